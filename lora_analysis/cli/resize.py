"""``lora-analysis resize``: the same adapter in fewer parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lora_analysis.cli.options import output_options, progress_bar
from lora_analysis.cli.reading import Reading, reading_options
from lora_analysis.cli.writing import (
    one_size,
    smaller_options,
    write_resized,
)

if TYPE_CHECKING:
    from pathlib import Path


@click.command(name="resize")
@click.argument("source", metavar="SOURCE")
@smaller_options
@reading_options
@output_options
def command(
    source: str,
    *,
    rank: int | None,
    energy: float | None,
    budget: int | None,
    output: Path,
    force: bool,
    kind: str,
    reading: Reading,
    form: str,
) -> None:
    """Write SOURCE with fewer directions per module, and say what that loses.

    Each module keeps its leading singular directions: no update of that rank is closer to it.
    "lost" is the norm of what is gone, √Σσ², and "relative" that over ‖ΔW‖.
    """
    from lora_analysis.edit import resize_adapter
    from lora_analysis.formats.writing import check_adapter_place

    size = one_size(rank=rank, energy=energy, budget=budget)
    adapter = reading.read(source)
    check_adapter_place(output, inputs=adapter.inputs, force=force)
    with progress_bar(form) as progress:
        resized = resize_adapter(adapter, **size, progress=progress)
    write_resized(resized, output, kind, form, inputs=adapter.inputs, force=force)
