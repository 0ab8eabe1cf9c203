"""``lora-analysis amplify``: one adapter against its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.options import (
    modules_option,
    output_options,
    progress_bar,
    read_one,
    reading_options,
)
from lora_analysis.cli.show import decimals, print_json, print_table, records

if TYPE_CHECKING:
    import pandas as pd


@click.command(name="amplify")
@click.argument("source", metavar="ADAPTER")
@click.option("--base", required=True, help="Base weights: a safetensors file or model folder.")
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
    draws: int,
    modules: str | None,
    pair: Any,
    scale: float | None,
    alpha: float | None,
    form: str,
) -> None:
    """Hold ADAPTER against its base weights: the paper's Table 7 for every module.

    The amplification factor ‖ΔW‖/‖UᵀWV‖ proves little by itself; "chance" is what random
    directions of the same size score, and enrichment the ratio of the two.
    """
    from lora_analysis.errors import InputError
    from lora_analysis.studies import study

    adapter = read_one(source, pair=pair, scale=scale, alpha=alpha)
    with progress_bar(form) as progress:
        result = study([adapter], base=base, modules=modules, draws=draws, progress=progress)
    if result.failures:
        raise InputError(result.failures[0].reason)
    table = result.amplifications
    if table.empty:
        unknown = bool(result.spectra["in_units_of_scale"].any())
        message = (
            f"The scale of {adapter.label} is not known, and the factor depends on it. "
            "Pass --scale or --alpha."
            if unknown
            else f"{adapter.label} is untrained: ΔW is zero in every module."
        )
        raise InputError(message)
    full = table[table["at_rank"]]
    if form == "json":
        print_json(
            {"adapter": adapter.label, "base": base, "modules": records(table), **_medians(full)}
        )
    elif form == "quiet":
        click.echo(decimals(float(full["amplification_factor"].median())))
    else:
        _print(adapter.label, full)


def _medians(full: pd.DataFrame) -> dict[str, dict[str, float]]:
    columns = ("amplification_factor", "chance_factor", "enrichment", "relative_norm")
    return {"medians": {column: float(full[column].median()) for column in columns}}


_NAMES = {
    "k": "k",
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
    rows = [
        (row["module"], row["k"], *(decimals(row[name]) for name in list(_NAMES)[1:]))
        for row in records(full)
    ]
    rows.append(("median", "", *(decimals(full[name].median()) for name in list(_NAMES)[1:])))
    print_table(f"{label} against W, at full rank", ("module", *_NAMES.values()), rows)
    click.echo()
    click.echo(
        "ΔW's, W's, random: ‖UᵀWV‖ with the top-k directions of each; random is the exact rms."
    )
    click.echo("factor = ‖ΔW‖ / ΔW's; chance = ‖ΔW‖ / random; enrichment = ΔW's / random.")
