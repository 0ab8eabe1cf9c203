"""Options and output of the commands that write an adapter: resize, convert, extract."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_analysis.cli.options import MODULES_SHOWN, OutputPath, force_option
from lora_analysis.cli.show import decimals, print_facts, print_json, print_table

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter
    from lora_analysis.edit import ResizedAdapter

Command = TypeVar("Command", bound=Callable[..., Any])


class WrittenFormat(click.ParamType):  # type: ignore[type-arg]  # generic in new clicks only
    """A format that has a writer; the list is loaded when a command needs it."""

    name = "format"

    def get_metavar(self, *_: object, **__: object) -> str:
        """Return the formats for the help."""
        return f"[{'|'.join(_writers())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the format; fail for one without a writer."""
        if value not in _writers():
            self.fail(f"{value!r} is not one of {', '.join(_writers())}.", param, ctx)
        return value


def _writers() -> list[str]:
    from lora_analysis.formats.registry import WRITERS

    return list(WRITERS)


def output_location_options(command: Command) -> Command:
    """Add ``--output`` and ``--force``."""
    command = force_option(command)
    return click.option(
        "-o",
        "--output",
        type=OutputPath(path_type=Path),
        required=True,
        help="Folder or file for the new adapter. A single file stays one: its suffix may be "
        "left out.",
    )(command)


def format_option(command: Command) -> Command:
    """Add ``--to``."""
    return click.option(
        "--to",
        "kind",
        type=WrittenFormat(),
        help="Format to write; by default that of the source if it is one of these, else peft.",
    )(command)


def dtype_option(command: Command) -> Command:
    """Add ``--dtype``."""
    return click.option(
        "--dtype",
        type=click.Choice(("float32", "float16", "bfloat16")),
        help="Type of the factors in the new file; by default that of the source.",
    )(command)


def _parse_ranks(
    _ctx: click.Context, _param: click.Parameter, values: Sequence[str]
) -> dict[str, int]:
    """Return the ranks by pattern of ``--rank-for PATTERN=RANK``."""
    ranks = {}
    for value in values:
        pattern, _, rank = value.rpartition("=")
        if not pattern or not rank.isdecimal() or int(rank) < 1:
            message = f"{value!r} is not PATTERN=RANK, for example v_proj=16."
            raise click.BadParameter(message)
        ranks[pattern] = int(rank)
    return ranks


def resize_options(command: Command) -> Command:
    """Add the options for size, format, type and output path."""
    command = dtype_option(command)
    command = format_option(command)
    command = output_location_options(command)
    for option in (
        click.option(
            "--rank-for",
            multiple=True,
            metavar="PATTERN=RANK",
            callback=_parse_ranks,
            help="Rank of the modules that PATTERN matches; overrides --rank and --energy. Can be "
            "repeated: the first match wins. A pattern selects as --module does.",
        ),
        click.option(
            "--budget",
            type=click.IntRange(1),
            help="Total number of parameters; ranks are distributed to minimize the error.",
        ),
        click.option(
            "--energy",
            type=click.FloatRange(0, 1, min_open=True),
            help="Minimum share of Σσ² to keep in every module, for example 0.9.",
        ),
        click.option("--rank", type=click.IntRange(1), help="Rank of every module."),
    ):
        command = option(command)
    return command


def require_one_size(**sizes: Any) -> dict[str, Any]:
    """Return the one size that was passed.

    Raises
    ------
    click.UsageError
        None or several were passed.
    """
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) != 1:
        message = "Give exactly one of --rank, --energy and --budget."
        raise click.UsageError(message)
    return given


def chosen_format(kind: str | None, adapter: Adapter | None, output: Path) -> str:
    """Return the format to write: the requested one, else that of the source, else PEFT's.

    Raises
    ------
    click.UsageError
        The output names a file with a suffix that the format does not have.
    """
    from lora_analysis.formats.registry import FILE_SUFFIXES
    from lora_analysis.formats.sources import CONTAINER_SUFFIXES
    from lora_analysis.formats.writing import file_suffix, written_format

    chosen = kind or ("peft" if adapter is None else written_format(adapter))
    suffix = output.suffix.lower()
    written = FILE_SUFFIXES.get(chosen) if adapter is None else file_suffix(adapter, chosen)
    if suffix in CONTAINER_SUFFIXES and suffix != written and not output.is_dir():
        makes = f"files that end in {written}" if written else "a folder"
        others = ", ".join(name for name, ending in FILE_SUFFIXES.items() if ending == suffix)
        way_on = f", or choose a format of such files with --to: {others}" if others else ""
        message = (
            f"-o {output} names a {suffix} file, and the format {chosen} is written as {makes}. "
            f"Name {'such a file or ' if written else ''}a folder{way_on}."
        )
        raise click.UsageError(message)
    return chosen


def choose_output_path(output: Path, adapter: Adapter, kind: str) -> Path:
    """Return the path to write: a single file stays one, whether or not the path has a suffix."""
    from lora_analysis.formats.writing import file_suffix

    suffix, source = file_suffix(adapter, kind), adapter.provenance.path
    if suffix is None or output.suffix == suffix or output.exists():
        return output
    return output.with_name(output.name + suffix) if source and source.is_file() else output


def adapter_to_write(adapter: Adapter, kind: str) -> Adapter:
    """Return the adapter with the scale that loaders of its format assume, if it states none.

    Only for formats that have the same loaders.
    """
    from lora_analysis.formats.diffusion.diffusers import with_loaders_scale
    from lora_analysis.formats.registry import IMAGE_FORMATS

    return with_loaders_scale(adapter) if kind in IMAGE_FORMATS else adapter


def write_resized(
    resized: ResizedAdapter,
    output: Path,
    kind: str,
    form: str,
    *,
    dtype: str | None,
    given_bytes: int | None = None,
    inputs: Sequence[Path],
    force: bool,
    verb: str = "resize",
) -> None:
    """Write a smaller adapter and print its size and its error."""
    from lora_analysis.formats import unwritten_findings, write_adapter

    path = write_adapter(
        resized.adapter,
        output,
        format=kind,
        dtype=dtype,
        force=force,
        inputs=inputs,
        verb=verb,
    )
    sizes = given_bytes, written_bytes(path)
    unwritten = unwritten_findings(resized.adapter, kind)
    findings = (*resized.adapter.provenance.findings, *unwritten)
    resized = replace(resized, adapter=resized.adapter.with_provenance(findings=findings))
    if form == "json":
        modules = [
            {field: getattr(module, field) for field in _FIELDS} for module in resized.modules
        ]
        print_json(
            {
                "adapter": resized.adapter.label,
                "output": path,
                "format": kind,
                "given_bytes": sizes[0],
                "bytes": sizes[1],
                **{
                    field: getattr(resized, field)
                    for field in ("given_parameters", "parameters", "norm", "error_norm", "error")
                },
                "modules": modules,
                "left_out": [
                    {
                        "module": module.module,
                        "code": "nothing-kept",
                        "reason": "no direction was kept",
                    }
                    for module in resized.modules
                    if module.rank == 0
                ],
                "findings": [finding.to_dict() for finding in resized.adapter.provenance.findings],
            }
        )
    elif form == "quiet":
        click.echo(decimals(resized.error))
    else:
        _print_result(resized, path, sizes_sentence(*sizes, resized.error))


def written_bytes(path: Path) -> int:
    """Return the size of the files of a written adapter."""
    from lora_analysis.formats import read_adapter

    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in read_adapter(path).provenance.files)


def sizes_sentence(given: int | None, written: int, error: float) -> str:
    """Return the sizes before and after, and the relative error over all modules."""
    before = "" if given is None else f"{_format_size(given)} → "
    return f"{before}{_format_size(written)}, error {100 * error:.2g} %"


def _format_size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def notes(adapter: Adapter) -> list[tuple[str, object]]:
    """Return the findings of an adapter as lines for `print_facts`."""
    return [
        ("damage" if finding.severity == "damage" else "note", finding.text)
        for finding in adapter.provenance.findings
    ]


_FIELDS = ("module", "shape", "given_rank", "rank", "parameters", "norm", "error_norm", "error")


def _print_result(resized: ResizedAdapter, path: Path, sizes: str) -> None:
    from lora_analysis.blocks import group_modules

    by_name = {module.module: module for module in resized.modules}
    groups = {name: [name] for name in by_name}
    title = "error of the truncation"
    if len(by_name) > MODULES_SHOWN:
        groups = group_modules(by_name)
        title += ", by group of modules (every module: --format json)"
    rows = []
    for name, members in groups.items():
        modules = [by_name[member] for member in members]
        norm, error = (
            math.hypot(*(getattr(module, field) for module in modules))
            for field in ("norm", "error_norm")
        )
        rows.append(
            (
                name,
                _format_range([module.given_rank for module in modules]),
                _format_range([module.rank for module in modules]),
                f"{sum(module.parameters for module in modules):,}",
                *map(decimals, (norm, error, error / norm if norm else 0.0)),
            )
        )
    totals = (decimals(value) for value in (resized.norm, resized.error_norm, resized.error))
    print_table(
        f"{resized.adapter.label}: {title}",
        ("module", "rank", "new", "parameters", "‖ΔW‖", "error", "relative"),
        rows,
        footer=("all", "", "", f"{resized.parameters:,}", *totals),
    )
    click.echo()
    print_facts([("written", path), ("size", sizes), *notes(resized.adapter)])


def _format_range(ranks: Sequence[int]) -> str:
    """Return the ranks of some modules, as one number or as a range; 0 is left out."""
    low, high = min(ranks), max(ranks)
    if low == high:
        return str(high) if high else "left out"
    return f"{low} to {high}"
