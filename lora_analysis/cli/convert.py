"""``lora-analysis convert``: the same adapter in another format."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.options import VerbCommand, output_options
from lora_analysis.cli.reading import Reading, reading_options
from lora_analysis.cli.show import decimals, print_facts, print_json, print_table
from lora_analysis.cli.writing import (
    adapter_to_write,
    choose_output_path,
    chosen_format,
    dtype_option,
    format_option,
    notes,
    output_location_options,
    sizes_sentence,
    written_bytes,
)
from lora_analysis.text import printable

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.adapter import Adapter

# Relative error; factors are written as float32, whose rounding is smaller.
_EQUAL = 1e-6


@click.command(name="convert", cls=VerbCommand)
@click.argument("source", metavar="SOURCE")
@format_option
@dtype_option
@click.option(
    "--architecture",
    help="For gguf: llama.cpp's name of the base's architecture, for example llama; --heads may be "
    "needed too. By default taken from the file or from a local base.",
)
@output_location_options
@reading_options
@output_options("the path of the new adapter")
def command(
    source: str,
    *,
    kind: str | None,
    dtype: str | None,
    architecture: str | None,
    output: Path,
    force: bool,
    reading: Reading,
    form: str,
) -> None:
    """Convert SOURCE to another format, read it back and report the error of ΔW."""
    from lora_analysis.formats import unwritten_findings, write_adapter, writing_notes
    from lora_analysis.formats.registry import IMAGE_FORMATS
    from lora_analysis.formats.sanity_checks import with_sanity_findings
    from lora_analysis.formats.writing import check_adapter_place, written_form

    adapter = reading.read(source)
    check_adapter_place(output, inputs=adapter.inputs, force=force)
    written = chosen_format(kind, adapter, output)
    output = choose_output_path(output, adapter, written)
    check_adapter_place(output, inputs=adapter.inputs, force=force)
    if architecture is not None and written != "gguf":
        message = f"--architecture belongs to --to gguf, not to {written}."
        raise click.UsageError(message)
    given_bytes = sum(path.stat().st_size for path in adapter.provenance.files)
    adapter = with_sanity_findings(adapter_to_write(adapter, written))
    options: dict[str, Any] = (
        {"architecture": architecture, "heads": reading.options.heads} if written == "gguf" else {}
    )
    path = write_adapter(
        adapter, output, format=written, dtype=dtype, force=force, verb="convert", **options
    )
    folded = writing_notes(adapter, written)
    unwritten = unwritten_findings(adapter, written)
    if written in IMAGE_FORMATS:
        adapter = written_form(adapter, written)
    adapter, errors, error = _read_back(adapter, path, written)
    sizes = given_bytes, written_bytes(path)
    adapter = adapter.with_provenance(findings=(*adapter.provenance.findings, *unwritten))
    if form == "json":
        print_json(
            {
                "adapter": adapter.label,
                "output": path,
                "format": written,
                "given_bytes": sizes[0],
                "bytes": sizes[1],
                "error": max(errors.values(), default=float("nan")),
                "total_error": error,
                "modules": [{"module": name, "error": error} for name, error in errors.items()],
                "folded": folded,
                "left_out": [
                    {
                        "module": name,
                        "code": "renamed",
                        "reason": "it has a different name in the file and was not compared",
                    }
                    for name in adapter
                    if name not in errors
                ],
                "findings": [finding.to_dict() for finding in adapter.provenance.findings],
            }
        )
    elif form == "quiet":
        click.echo(printable(str(path)))
    else:
        _print_result(adapter, errors, path, sizes_sentence(*sizes, error), folded)


def _read_back(
    adapter: Adapter, path: Path, format: str
) -> tuple[Adapter, dict[str, float], float]:
    """Return the adapter in the modules of the written file, and ΔW's relative errors.

    The errors are those of each module, and of all that were compared as one matrix. Parts of
    fused weights are joined if the file stores them so; renamed modules have no error.
    """
    from lora_analysis.edit import relative_difference
    from lora_analysis.formats import read_adapter, written_names
    from lora_analysis.formats.fused_parts import join_parts
    from lora_analysis.names import match_names
    from lora_analysis.spectra import spectrum

    written = read_adapter(path, allow_pickle=True)  # a file of our own
    if not adapter.keys() <= written.keys():
        adapter = join_parts(adapter)
    names = written_names(adapter, format)
    missing = [name for name in adapter if names[name] not in written]
    others = written.keys() - set(names.values())
    if missing:
        names |= match_names(
            missing, sorted(others), fits=partial(_has_same_shape, adapter, written)
        ).pairs
    errors = {
        name: relative_difference(written[names[name]], adapter[name])
        for name in adapter
        if names[name] in written
    }
    norms = {name: spectrum(adapter[name], vectors=False).norm for name in errors}
    norm = math.hypot(*norms.values())
    error = math.hypot(*(errors[name] * norms[name] for name in errors)) / norm if norm else 0.0
    return adapter, errors, error


def _has_same_shape(adapter: Adapter, written: Adapter, name: str, other: str) -> bool:
    return adapter[name].shape == written[other].shape


def _print_result(
    adapter: Adapter, errors: dict[str, float], path: Path, sizes: str, folded: list[str]
) -> None:
    worst = max(errors.values(), default=0.0)
    if worst > _EQUAL:
        rows = [(name, decimals(error)) for name, error in errors.items()]
        print_table(f"{adapter.label}: error of ΔW", ("module", "relative error"), rows)
        click.echo()
    renamed = len(adapter) - len(errors)
    facts: list[tuple[str, object]] = [("written", path), ("size", sizes)]
    if errors:
        facts.append(
            ("read back", f"{len(errors)} modules, maximum relative error of ΔW {worst:.1g}")
        )
    if renamed:
        facts.append(
            ("renamed", f"{renamed} modules have different names in the file and were not compared")
        )
    facts += [("folded", sentence) for sentence in folded]
    print_facts([*facts, *notes(adapter)])
