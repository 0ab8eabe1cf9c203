"""``lora-analysis compare``: two adapters, module by module."""

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
from lora_analysis.cli.show import fraction, print_json, print_table, records

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies import Study


@click.command(name="compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@modules_option
@reading_options
@output_options
def command(
    a: str,
    b: str,
    *,
    modules: str | None,
    pair: Any,
    scale: float | None,
    alpha: float | None,
    form: str,
) -> None:
    """Compare adapters A and B: subspace similarity φ on both sides, ω, angles, signed cosine.

    Isotropic chance stands beside every number. It is a floor, not a verdict: unrelated adapters
    of one base exceed it too. Use `report` with adapters of other tasks for a reference.
    """
    from lora_analysis.findings import findings
    from lora_analysis.studies import study

    adapters = [read_one(one, pair=pair, scale=scale, alpha=alpha) for one in (a, b)]
    with progress_bar(form) as progress:
        result = study(adapters, modules=modules, progress=progress)
    _raise_failures(result)
    said = [one for one in findings(result) if one.topic != "directions needed"]
    if form == "json":
        print_json(
            {
                "pair": records(result.pairs)[0],
                "summary": _summary(result.similarities),
                "modules": records(result.similarities),
                "findings": [{"kind": one.kind, "text": one.text} for one in said],
            }
        )
    elif form == "quiet":
        click.echo(fraction(_median(result.similarities, "output", "omega")))
    else:
        _print(result.similarities, [one.text for one in said])


def _raise_failures(result: Study) -> None:
    """Refuse a comparison that lost one of its two adapters."""
    from lora_analysis.errors import InputError

    if result.failures:
        raise InputError(result.failures[0].reason)


def _median(table: pd.DataFrame, side: str, column: str) -> float:
    if table.empty:
        return float("nan")
    return float(table.loc[table["side"] == side, column].median())


def _summary(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    columns = ("phi_1_1", "chance_1_1", "phi_r_r", "chance_r_r", "omega", "omega_chance")
    return {
        side: {
            f"{name}_{column}": float(getattr(table.loc[table["side"] == side, column], name)())
            for column in columns
            for name in ("median", "mean")
        }
        for side in ("input", "output")
        if not table.empty
    }


def _print(table: pd.DataFrame, sentences: list[str]) -> None:
    for text in sentences:
        click.echo(text)
        click.echo()
    if table.empty:
        return
    columns = ("module", "φ(1,1)", "chance", "φ(r,r)", "chance", "ω", "chance", "cosine")
    names = ("phi_1_1", "chance_1_1", "phi_r_r", "chance_r_r", "omega", "omega_chance")
    for side in ("output", "input"):
        own = table[table["side"] == side]
        rows = [
            (
                row["module"] + (" *" if row["shared_start"] and side == "input" else ""),
                *(fraction(row[name]) for name in (*names, "signed_cosine")),
            )
            for row in records(own)
        ]
        rows.append(("median", *(fraction(own[n].median()) for n in (*names, "signed_cosine"))))
        print_table(f"{side} side", columns, rows)
        click.echo()
    if table["shared_start"].any():
        click.echo("* starts from the same A: its input side says nothing about learning.")
    ranks = sorted(set(zip(table["rank_a"], table["rank_b"], strict=True)))
    shown = ", ".join(f"{i}/{j}" for i, j in ranks)
    click.echo(f"r: numerical ranks of the two updates ({shown}). Angles: --format json.")
