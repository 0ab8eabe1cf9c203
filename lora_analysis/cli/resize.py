"""``lora-analysis resize``: reduce an adapter's rank by truncated SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lora_analysis.cli.options import VerbCommand, output_options, progress_bar
from lora_analysis.cli.reading import Reading, reading_options
from lora_analysis.cli.writing import (
    adapter_to_write,
    choose_output_path,
    chosen_format,
    require_one_size,
    resize_options,
    write_resized,
)

if TYPE_CHECKING:
    from pathlib import Path


@click.command(name="resize", cls=VerbCommand)
@click.argument("source", metavar="SOURCE")
@resize_options
@reading_options
@output_options("the relative error of ΔW")
def command(
    source: str,
    *,
    rank: int | None,
    energy: float | None,
    budget: int | None,
    rank_for: dict[str, int],
    output: Path,
    force: bool,
    kind: str | None,
    dtype: str | None,
    reading: Reading,
    form: str,
) -> None:
    """Reduce an adapter's rank by truncated SVD and report the error.

    Each module keeps its leading singular directions: the best approximation of that rank. The
    error is ‖ΔW − new ΔW‖, relative to ‖ΔW‖ in the last column. Format, stored type, scale,
    metadata and all other tensors stay as they are; rounding to the type is part of the error.
    """
    from lora_analysis.edit import resize_adapter
    from lora_analysis.formats.writing import check_adapter_place

    size = require_one_size(rank=rank, energy=energy, budget=budget)
    adapter = reading.read(source)
    check_adapter_place(output, inputs=adapter.inputs, force=force)
    written = chosen_format(kind, adapter, output)
    output = choose_output_path(output, adapter, written)
    check_adapter_place(output, inputs=adapter.inputs, force=force)
    with progress_bar(form) as progress:
        resized = resize_adapter(
            adapter_to_write(adapter, written),
            **size,
            rank_for=rank_for,
            dtype=dtype,
            progress=progress,
        )
    write_resized(
        resized,
        output,
        written,
        form,
        dtype=dtype,
        given_bytes=sum(path.stat().st_size for path in adapter.provenance.files),
        inputs=adapter.inputs,
        force=force,
    )
