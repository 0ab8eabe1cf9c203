"""``lora-analysis amplify``: one adapter against its base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lora_analysis.cli.options import (
    Reading,
    modules_option,
    output_options,
    progress_bar,
    reading_options,
    transposed_option,
)
from lora_analysis.cli.show import decimals, print_json, print_table, print_text, records

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies import Study


@click.command(name="amplify")
@click.argument("source", metavar="ADAPTER")
@click.option(
    "--base", required=True, help="Base weights: a safetensors or GGUF file, or a model folder."
)
@transposed_option
@click.option(
    "--draws", type=click.IntRange(0), default=16, show_default=True, help="Random draws."
)
@modules_option
@reading_options
@output_options
def command(
    source: str,
    *,
    base: str,
    transposed: bool | None,
    draws: int,
    modules: str | None,
    reading: Reading,
    form: str,
) -> None:
    """Hold ADAPTER against its base weights: the paper's Table 7 for every module.

    The amplification factor ‖ΔW‖/‖UᵀWV‖ proves little by itself; "chance" is what random
    directions of the same size score, and enrichment the ratio of the two.
    """
    from lora_analysis.studies import study

    adapter = reading.read(source)
    with progress_bar(form) as progress:
        result = study(
            [adapter],
            base=base,
            transposed=transposed,
            modules=modules,
            draws=draws,
            progress=progress,
        )
    table = _amplifications(result, adapter.label)
    full = table[table["at_rank"]]
    if form == "json":
        print_json(
            {"adapter": adapter.label, "base": base, "modules": records(table), **_medians(full)}
        )
    elif form == "quiet":
        click.echo(decimals(float(full["amplification_factor"].median())))
    else:
        _print(adapter.label, full)


def _amplifications(result: Study, label: str) -> pd.DataFrame:
    """Return the table; raise where there is nothing in it, and say why."""
    from lora_analysis.errors import InputError

    for reason in result.unmatched.values():
        click.echo(f"Left out: {reason}", err=True)
    table = result.amplifications
    if not table.empty:
        return table
    unknown = bool(result.spectra["in_units_of_scale"].any())
    message = (
        f"The scale of {label} is not known, and the factor depends on it. Pass --scale or --alpha."
        if unknown
        else f"{label} is untrained: ΔW is zero in every module."
    )
    raise InputError(message)


def _medians(full: pd.DataFrame) -> dict[str, dict[str, float]]:
    columns = ("amplification_factor", "chance_factor", "enrichment", "relative_norm")
    return {"medians": {column: float(full[column].median()) for column in columns}}


def _print_storage(full: pd.DataFrame) -> None:
    """Say how W is quantised and what that leaves uncertain; nothing where it is not."""
    storages = sorted(set(full["storage"]) - {""})
    if not storages:
        return
    noise = full["noise"].median()
    moved = "an unknown part" if noise != noise else decimals(float(noise))  # noqa: PLR0124 - NaN
    print_text(
        f"W is quantised ({', '.join(storages)}); rounding moved it by {moved} of ‖W‖ (expected), "
        "which alone gives an enrichment of that size."
    )


_NAMES = {
    "delta_norm": "‖ΔW‖",
    "weight_norm": "‖W‖",
    "projected": "ΔW's",
    "projected_weight": "W's",
    "projected_random": "random",
    "amplification_factor": "factor",
    "chance_factor": "chance",
    "enrichment": "enrichment",
}


def _print(label: str, full: pd.DataFrame) -> None:
    ranks = sorted(set(full["k"]))
    k = f"k = {ranks[0]}" if len(ranks) == 1 else f"k = {ranks[0]} to {ranks[-1]}"
    print_table(
        f"{label} against W, at full rank ({k})",
        ("module", *_NAMES.values()),
        [(row["module"], *(decimals(row[name]) for name in _NAMES)) for row in records(full)],
        footer=("median", *(decimals(full[name].median()) for name in _NAMES)),
    )
    click.echo()
    _print_storage(full)
    print_text(
        "ΔW's, W's, random: ‖UᵀWV‖ with the top-k directions of each; random is the exact rms."
    )
    print_text("factor = ‖ΔW‖ / ΔW's; chance = ‖ΔW‖ / random; enrichment = ΔW's / random.")
