"""``lora-analysis compare``: two adapters, module by module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.exit_codes import DONE, PARTLY_FAILED
from lora_analysis.cli.options import (
    MODULES_SHOWN,
    label_option,
    modules_option,
    output_options,
    prefix_option,
    progress_bar,
    reference_option,
)
from lora_analysis.cli.reading import Reading, ReadingCommand, reading_options
from lora_analysis.cli.show import (
    decimals,
    print_facts,
    print_finding,
    print_json,
    print_table,
    print_text,
    records,
)
from lora_analysis.shared_init import InitRelation
from lora_analysis.text import printable

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies import Study


@click.command(name="compare", cls=ReadingCommand)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@reference_option
@click.option("--all", "every", is_flag=True, help="Show every module, however many.")
@modules_option
@prefix_option
@label_option
@reading_options
@output_options
def command(
    a: str,
    b: str,
    *,
    references: tuple[str, ...],
    every: bool,
    modules: str | None,
    prefixes: tuple[str, ...],
    label: str | None,
    reading: Reading,
    form: str,
) -> int:
    """Compare adapters A and B: subspace similarity φ on both sides, ω, angles, signed cosine.

    Isotropic chance stands beside every number. It is a floor, not a verdict: unrelated adapters
    of one base exceed it too, so a verdict needs some of them, given with --reference.
    """
    from lora_analysis.conclusions import findings
    from lora_analysis.studies import study

    adapters = [reading.read(one) for one in (a, b)]
    with progress_bar(form) as progress:
        others, left_out = reading.read_all(references, progress) if references else ([], [])
        result = study(
            adapters,
            reference=others,
            modules=modules,
            prefix=prefixes,
            label=label,
            across_bases=True,  # two adapters that are named are compared
            progress=progress,
        )
    _check_pair(result)
    failures = [*(one.to_dict() for one in left_out), *(one.to_dict() for one in result.failures)]
    missing = _left_out(result)
    pair, table = _of_the_pair(result, result.pairs), _of_the_pair(result, result.similarities)
    said = [one for one in findings(result) if one.topic not in _BESIDE]
    if form == "json":
        print_json(
            {
                "pair": records(pair)[0],
                "reference": list(result.reference),
                "summary": _summary(table),
                "modules": records(table),
                "findings": [one.to_dict() for one in said],
                "left_out": missing,
                "failures": failures,
            }
        )
    elif form == "quiet":
        click.echo(decimals(_median(table, "output", "omega")))
    else:
        _print(pair.iloc[0], table, [(one.kind, one.text) for one in said], every=every)
    mismatched = any(one["code"] == "shape-mismatch" for one in missing)
    return PARTLY_FAILED if failures or mismatched else DONE


def _check_pair(result: Study) -> None:
    """Name the references that could not be analyzed; refuse to go on without A or B."""
    from lora_analysis.errors import InputError

    if len(result.adapters) - len(result.reference) < 2:
        raise InputError(" ".join(one.reason for one in result.failures))
    for one in result.failures:
        click.echo(printable(f"Left out: {one.source}: {one.reason}"), err=True)


def _left_out(result: Study) -> list[dict[str, str]]:
    """Return the modules in which A and B are not compared, and why."""
    rows: dict[str, list[Any]] = {}
    labels = [label for label in result.adapters if label not in result.reference]
    for row in result.spectra.itertuples():
        if row.adapter in labels:
            rows.setdefault(row.module, []).append(row)
    missing = []
    for module, pair in rows.items():
        untrained = [row.adapter for row in pair if not row.numerical_rank]
        shapes = dict.fromkeys((row.d_out, row.d_in) for row in pair)
        if len(pair) == 1:
            missing.append((module, "only-in-one", f"only {pair[0].adapter} adapts it"))
        elif len(shapes) > 1:
            found = " and ".join(map(str, shapes))
            missing.append((module, "shape-mismatch", f"the shapes differ: {found}"))
        elif untrained:
            text = f"ΔW is zero in {' and '.join(untrained)}"
            missing.append((module, "untrained", text))
    return [{"module": name, "code": code, "reason": reason} for name, code, reason in missing]


def _of_the_pair(result: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows about A and B themselves."""
    return table[~(table["a"].isin(result.reference) | table["b"].isin(result.reference))]


def _median(table: pd.DataFrame, side: str, column: str) -> float:
    return float(table.loc[table["side"] == side, column].median())


def _summary(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    columns = ("phi_1_1", "chance_1_1", "phi_r_r", "chance_r_r", "omega", "chance_omega")
    return {
        side: {
            f"{name}_{column}": float(getattr(table.loc[table["side"] == side, column], name)())
            for column in columns
            for name in ("median", "mean")
        }
        for side in ("input", "output")
        if not table.empty
    }


# What a study says of its adapters one by one is for `inspect` and `report`.
_BESIDE = ("directions needed", "few runs", "accuracy", "not grouped")
_COLUMNS = {
    "phi_1_1": "φ(1,1)",
    "chance_1_1": "chance",
    "phi_r_r": "φ(r,r)",
    "chance_r_r": "chance",
    "omega": "ω",
    "chance_omega": "chance",
    "signed_cosine": "cosine",
}
# What a star beside a module of the input side means, by the pair's start.
_STARS = {
    InitRelation.PARTLY_SHARED: "has the same initial A in both adapters: its input "
    "side shows nothing that was learned.",
    InitRelation.SHARED: "has the same initial A in both adapters: its input "
    "side shows nothing that was learned.",
    InitRelation.SAME_RUN: "starts from the same A, and B agrees too: one run, not two samples.",
    InitRelation.SAME_SPACE: "spans the same input space with different rows (a resized copy or an "
    "initialization "
    "from data or from W): its input side shows nothing that was learned.",
}


def _print(
    pair: pd.Series, table: pd.DataFrame, said: list[tuple[str, str]], *, every: bool
) -> None:
    cosine = decimals(float(pair["total_cosine"]))
    print_facts(
        [
            ("A, B", f"{pair['a']}, {pair['b']}"),
            ("relation", f"{pair['relation']}; initialization: {pair['initialization']}"),
            ("in all", f"signed cosine {cosine} over {pair['modules']} common modules, chance 0"),
        ]
    )
    click.echo()
    for kind, text in said:
        print_finding(kind, text)
    if table.empty:
        return
    by_type = table["module"].nunique() > MODULES_SHOWN and not every
    for side in ("output", "input"):
        own = table[table["side"] == side]
        rows = _types(own) if by_type else _modules(own, side)
        what = ", medians by type of module (every module: --all)" if by_type else ""
        click.echo()
        print_table(
            f"{side} side{what}",
            ("modules" if by_type else "module", *_COLUMNS.values()),
            rows,
            footer=("median", *(decimals(own[name].median()) for name in _COLUMNS)),
        )
    click.echo()
    if table["shared_init"].any():
        print_text(f"* {_STARS[pair['initialization']]}")
    ranks = sorted(set(zip(table["rank_a"], table["rank_b"], strict=True)))
    shown = ", ".join(f"{i}/{j}" for i, j in ranks)
    print_text(f"r: numerical ranks of the two updates ({shown}). Angles: --format json.")


def _modules(own: pd.DataFrame, side: str) -> list[tuple[str, ...]]:
    return [
        (
            row["module"] + (" *" if row["shared_init"] and side == "input" else ""),
            *(decimals(row[name]) for name in _COLUMNS),
        )
        for row in records(own)
    ]


def _types(own: pd.DataFrame) -> list[tuple[str, ...]]:
    """Return medians over layers for each type of module."""
    return [
        (f"{kind} ({len(rows)})", *(decimals(float(rows[name].median())) for name in _COLUMNS))
        for kind, rows in own.groupby("module_type", sort=False)
    ]
