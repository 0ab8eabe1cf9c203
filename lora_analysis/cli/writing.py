"""What the verbs that write an adapter share: where it goes, in which format, what was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_analysis.cli.options import force_option
from lora_analysis.cli.show import decimals, print_facts, print_json, print_table

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter
    from lora_analysis.edit import Resized

Command = TypeVar("Command", bound=Callable[..., Any])


class WrittenFormat(click.ParamType):  # type: ignore[type-arg]  # generic in new clicks only
    """A format that has a writer; which they are is asked when a command needs it."""

    name = "format"

    def get_metavar(self, *_: object, **__: object) -> str:
        """Return the formats for the help."""
        return f"[{'|'.join(_writers())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the format; refuse one without a writer."""
        if value not in _writers():
            self.fail(f"{value!r} is not one of {', '.join(_writers())}.", param, ctx)
        return value


def _writers() -> list[str]:
    from lora_analysis.formats.registry import WRITERS

    return list(WRITERS)


def output_place(command: Command) -> Command:
    """Add ``--output`` and ``--force``."""
    command = force_option(command)
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=True,
        help="Folder (or file) for the new adapter.",
    )(command)


def format_option(command: Command) -> Command:
    """Add ``--to``."""
    return click.option(
        "--to",
        "kind",
        type=WrittenFormat(),
        help="Format to write. By default that of SOURCE if it is one of these, else peft.",
    )(command)


def smaller_options(command: Command) -> Command:
    """Add the size (see `one_size`), where to write, and ``--to``."""
    command = format_option(command)
    command = output_place(command)
    for option in (
        click.option(
            "--budget",
            type=click.IntRange(1),
            help="Parameters in all factors together; ranks go where they keep most.",
        ),
        click.option(
            "--energy",
            type=click.FloatRange(0, 1, min_open=True),
            help="Share of Σσ² that every module keeps at least, as 0.9.",
        ),
        click.option("--rank", type=click.IntRange(1), help="Rank of every module."),
    ):
        command = option(command)
    return command


def one_size(**sizes: Any) -> dict[str, Any]:
    """Return the one size that is given.

    Raises
    ------
    click.UsageError
        None or several are.
    """
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) != 1:
        message = "Give exactly one of --rank, --energy and --budget."
        raise click.UsageError(message)
    return given


def chosen_format(kind: str | None, adapter: Adapter | None, output: Path) -> str:
    """Return the format to write: the one asked for, else that of the source, else PEFT's.

    Raises
    ------
    click.UsageError
        The output names a file of a kind that the format is not written in.
    """
    from lora_analysis.formats.registry import FILE_SUFFIXES, WRITERS
    from lora_analysis.formats.sources import CONTAINER_SUFFIXES

    source = adapter.provenance.format if adapter is not None else "peft"
    chosen = kind or (source if source in WRITERS else "peft")
    suffix, written = output.suffix.lower(), FILE_SUFFIXES.get(chosen)
    if suffix in CONTAINER_SUFFIXES and suffix != written and not output.is_dir():
        makes = f"files that end in {written}" if written else "a folder"
        others = ", ".join(name for name, own in FILE_SUFFIXES.items() if own == suffix)
        way_on = f", or choose a format of such files with --to: {others}" if others else ""
        message = (
            f"-o {output} names a {suffix} file, and the format {chosen} is written as {makes}. "
            f"Name {'such a file or ' if written else ''}a folder{way_on}."
        )
        raise click.UsageError(message)
    return chosen


def adapter_to_write(adapter: Adapter, kind: str) -> Adapter:
    """Return an adapter as a format is to state it.

    A scale that no file states is the one that the source's loaders take, if the format is for
    such loaders too.
    """
    from lora_analysis.formats.diffusion.diffusers import with_loaders_scale
    from lora_analysis.formats.registry import LIKE_SOURCE

    return with_loaders_scale(adapter) if kind in LIKE_SOURCE else adapter


def write_resized(
    resized: Resized, output: Path, kind: str, form: str, *, inputs: Sequence[Path], force: bool
) -> None:
    """Write a smaller adapter and say what it lost."""
    from lora_analysis.formats import unwritten_findings, write_adapter

    path = write_adapter(
        resized.adapter, output, format=kind, force=force, inputs=inputs, verb="resize"
    )
    unwritten = unwritten_findings(resized.adapter, kind)
    findings = (*resized.adapter.provenance.findings, *unwritten)
    resized = replace(resized, adapter=resized.adapter.described(findings=findings))
    if form == "json":
        print_json(_document(resized, path, kind))
    elif form == "quiet":
        click.echo(decimals(resized.error))
    else:
        _print(resized, path)


def notes(adapter: Adapter) -> list[tuple[str, object]]:
    """Return what is known of an adapter beyond its numbers, for `print_facts`."""
    return [
        ("damage" if finding.severity == "damage" else "note", finding.text)
        for finding in adapter.provenance.findings
    ]


_FIELDS = ("module", "shape", "given_rank", "rank", "parameters", "norm", "lost", "error")


def _document(resized: Resized, path: Path, kind: str) -> dict[str, Any]:
    modules = [{field: getattr(one, field) for field in _FIELDS} for one in resized.modules]
    return {
        "adapter": resized.adapter.label,
        "output": path,
        "format": kind,
        **{
            field: getattr(resized, field)
            for field in ("given_parameters", "parameters", "norm", "lost", "error")
        },
        "modules": modules,
        "left_out": [
            {"module": one.module, "code": "nothing-kept", "reason": "no direction was kept of it"}
            for one in resized.modules
            if one.rank == 0
        ],
        "findings": [one.to_dict() for one in resized.adapter.provenance.findings],
    }


def _print(resized: Resized, path: Path) -> None:
    rows = [
        (
            one.module,
            one.given_rank,
            one.rank or "left out",
            f"{one.parameters:,}",
            *(decimals(value) for value in (one.norm, one.lost, one.error)),
        )
        for one in resized.modules
    ]
    totals = (decimals(value) for value in (resized.norm, resized.lost, resized.error))
    print_table(
        f"{resized.adapter.label}: what was lost",
        ("module", "rank", "now", "parameters", "‖ΔW‖", "lost", "relative"),
        rows,
        footer=("all", "", "", f"{resized.parameters:,}", *totals),
    )
    click.echo()
    print_facts([("written", path), *notes(resized.adapter)])
