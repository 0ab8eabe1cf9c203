"""``lora-analysis compare``: two adapters, module by module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.exit_codes import DONE, PARTLY_FAILED
from lora_analysis.cli.options import (
    MODULES_SHOWN,
    label_option,
    labeled_pair,
    modules_option,
    output_options,
    prefix_option,
    progress_bar,
    reference_option,
    task_and_seed_options,
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
@task_and_seed_options
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
    tasks: tuple[str, ...],
    seeds: tuple[int, ...],
    reading: Reading,
    form: str,
) -> int:
    """Compare adapters A and B: subspace similarity φ on both sides, ω, angles, signed cosine.

    Every number comes with its random baseline. Unrelated adapters of one base exceed it too, so
    a conclusion beyond "more alike than random" needs some of them: pass --reference.
    """
    from lora_analysis.conclusions import findings
    from lora_analysis.studies import study, with_label_facts

    pair_read = [reading.read(source) for source in (a, b)]
    adapters = labeled_pair(pair_read, label, tasks, seeds)
    with progress_bar(form) as progress:
        others, left_out = reading.read_all(references, progress) if references else ([], [])
        if label is not None:
            others = with_label_facts(others, label)
        result = study(
            adapters,
            reference=others,
            modules=modules,
            prefix=prefixes,
            label=None if label is None else "none",  # applied above
            across_bases=True,  # two adapters that are named are compared
            progress=progress,
        )
    _check_pair(result)
    failures = [source.to_dict() for source in left_out]
    failures += [failure.to_dict() for failure in result.failures]
    missing = _left_out(result)
    pair, table = _of_the_pair(result, result.pairs), _of_the_pair(result, result.similarities)
    shown_findings = [f for f in findings(result) if f.code not in _NOT_ABOUT_THE_PAIR]
    if form == "json":
        print_json(
            {
                "pair": records(pair)[0],
                "reference": list(result.reference),
                "summary": _summary(table),
                "modules": records(table),
                "findings": [finding.to_dict() for finding in shown_findings],
                "left_out": missing,
                "failures": failures,
            }
        )
    elif form == "quiet":
        click.echo(decimals(_median(table, "output", "omega")))
    else:
        _print(pair.iloc[0], table, [(f.severity, f.text) for f in shown_findings], every=every)
    mismatched = any(module["code"] == "shape-mismatch" for module in missing)
    return PARTLY_FAILED if failures or mismatched else DONE


def _check_pair(result: Study) -> None:
    """Report sources that could not be analyzed; raise InputError without A or B."""
    from lora_analysis.errors import InputError

    if len(result.adapters) - len(result.reference) < 2:
        raise InputError(" ".join(failure.reason for failure in result.failures))
    for failure in result.failures:
        click.echo(printable(f"Left out: {failure.source}: {failure.reason}"), err=True)


def _left_out(result: Study) -> list[dict[str, str]]:
    """Return the modules that are not compared, with the reason."""
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
            different = " and ".join(map(str, shapes))
            missing.append((module, "shape-mismatch", f"the shapes differ: {different}"))
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


# Findings about single adapters are left to `inspect` and `report`.
_NOT_ABOUT_THE_PAIR = ("directions-by-energy", "few-seeds", "accuracy", "unknown-task-or-seed")
_COLUMNS = {
    "phi_1_1": "φ(1,1)",
    "chance_1_1": "random",
    "phi_r_r": "φ(r,r)",
    "chance_r_r": "random",
    "omega": "ω",
    "chance_omega": "random",
    "signed_cosine": "cosine",
}
# Meaning of a star after a module of the input side, by the pair's initialization.
_STARS = {
    InitRelation.PARTLY_SHARED: "has the same initial A in both adapters: its input "
    "side shows nothing that was learned.",
    InitRelation.SHARED: "has the same initial A in both adapters: its input "
    "side shows nothing that was learned.",
    InitRelation.SAME_RUN: "has the same initial A, and B agrees too: one training run, not "
    "two samples.",
    InitRelation.SAME_SPACE: "spans the same input space with different rows (a resized copy or an "
    "initialization from data or from W): its input side shows nothing that was learned.",
    InitRelation.UNDECIDED: "spans part of the same input space with different rows: its input "
    "side may show the initialization.",
}


def _print(
    pair: pd.Series, table: pd.DataFrame, lines: list[tuple[str, str]], *, every: bool
) -> None:
    cosine = decimals(float(pair["total_cosine"]))
    print_facts(
        [
            ("A, B", f"{pair['a']}, {pair['b']}"),
            ("relation", f"{pair['relation']}; initialization: {pair['initialization']}"),
            (
                "overall",
                f"signed cosine {cosine} over {pair['modules']} common modules (random: 0)",
            ),
        ]
    )
    click.echo()
    for kind, text in lines:
        print_finding(kind, text)
    if table.empty:
        return
    by_type = table["module"].nunique() > MODULES_SHOWN and not every
    for side in ("output", "input"):
        side_rows = table[table["side"] == side]
        rows = _types(side_rows) if by_type else _modules(side_rows, side)
        what = ", medians by type of module (every module: --all)" if by_type else ""
        click.echo()
        print_table(
            f"{side} side{what}",
            ("modules" if by_type else "module", *_COLUMNS.values()),
            rows,
            footer=("median", *(decimals(side_rows[name].median()) for name in _COLUMNS)),
        )
    click.echo()
    if table["shared_init"].any():
        print_text(f"* {_STARS[pair['initialization']]}")
    ranks = sorted(set(zip(table["rank_a"], table["rank_b"], strict=True)))
    rank_pairs = ", ".join(f"{i}/{j}" for i, j in ranks)
    print_text(f"r: numerical ranks of the two updates ({rank_pairs}). Angles: --format json.")


def _modules(rows: pd.DataFrame, side: str) -> list[tuple[str, ...]]:
    return [
        (
            row["module"] + (" *" if row["shared_init"] and side == "input" else ""),
            *(decimals(row[name]) for name in _COLUMNS),
        )
        for row in records(rows)
    ]


def _types(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """Return medians over layers for each type of module."""
    return [
        (f"{kind} ({len(rows)})", *(decimals(float(rows[name].median())) for name in _COLUMNS))
        for kind, rows in table.groupby("module_type", sort=False)
    ]
