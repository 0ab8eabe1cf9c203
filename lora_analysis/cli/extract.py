"""``lora-analysis extract``: the best low-rank approximation of a full fine-tune."""

from __future__ import annotations

from pathlib import Path

import click

from lora_analysis.cli.options import (
    VerbCommand,
    modules_option,
    output_options,
    progress_bar,
    transposed_option,
)
from lora_analysis.cli.writing import (
    chosen_format,
    require_one_size,
    resize_options,
    write_resized,
)


@click.command(name="extract", cls=VerbCommand)
@click.argument("tuned", metavar="TUNED")
@click.option("--base", required=True, help="Base weights that the fine-tune started from.")
@resize_options
@modules_option
@transposed_option
@output_options("the relative error of ΔW")
def command(
    tuned: str,
    *,
    base: str,
    rank: int | None,
    energy: float | None,
    budget: int | None,
    rank_for: dict[str, int],
    output: Path,
    force: bool,
    kind: str | None,
    dtype: str | None,
    modules: str | None,
    transposed: bool | None,
    form: str,
) -> None:
    """Extract the best low-rank approximation of the full fine-tune TUNED and report its error.

    The difference of each weight matrix and the base's is truncated to its leading singular
    directions. Embedding tables are included; select modules with --module.
    """
    from lora_analysis.edit import approximate_fine_tune
    from lora_analysis.formats.writing import check_adapter_place
    from lora_analysis.storage.source_names import source_paths

    size = require_one_size(rank=rank, energy=energy, budget=budget)
    inputs = [path for source in (tuned, base) for path in source_paths(source)]
    check_adapter_place(output, inputs=inputs, force=force)
    written = chosen_format(kind, None, output)
    with progress_bar(form) as progress:
        extracted = approximate_fine_tune(
            tuned,
            base,
            **size,
            rank_for=rank_for,
            dtype=dtype,
            modules=modules,
            transposed=transposed,
            progress=progress,
        )
    write_resized(
        extracted, output, written, form, dtype=dtype, verb="extract", inputs=inputs, force=force
    )
