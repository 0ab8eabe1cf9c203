"""``lora-analysis resize``: reduce an adapter's rank by truncated SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lora_analysis.cli.options import VerbCommand, output_options, progress_bar
from lora_analysis.cli.reading import Reading, reading_options
from lora_analysis.cli.writing import (
    adapter_to_write,
    chosen_format,
    one_size,
    smaller_options,
    write_resized,
)

if TYPE_CHECKING:
    from pathlib import Path


@click.command(name="resize", cls=VerbCommand)
@click.argument("source", metavar="SOURCE")
@smaller_options
@reading_options
@output_options("the relative error of ΔW")
def command(
    source: str,
    *,
    rank: int | None,
    energy: float | None,
    budget: int | None,
    output: Path,
    force: bool,
    kind: str | None,
    reading: Reading,
    form: str,
) -> None:
    """Reduce an adapter's rank by truncated SVD and report the error.

    Each module keeps its leading singular directions: the best approximation of that rank. The
    error is ‖ΔW − new ΔW‖, relative to ‖ΔW‖ in the last column. Files of image models keep their
    stored type, metadata and other tensors; rounding to that type is part of the error.
    """
    from lora_analysis.edit import resize_adapter
    from lora_analysis.formats.registry import LIKE_SOURCE
    from lora_analysis.formats.writing import check_adapter_place

    size = one_size(rank=rank, energy=energy, budget=budget)
    adapter = reading.read(source)
    check_adapter_place(output, inputs=adapter.inputs, force=force)
    written = chosen_format(kind, adapter, output)
    with progress_bar(form) as progress:
        resized = resize_adapter(
            adapter_to_write(adapter, written),
            **size,
            like_source=written in LIKE_SOURCE,
            progress=progress,
        )
    write_resized(resized, output, written, form, inputs=adapter.inputs, force=force)
