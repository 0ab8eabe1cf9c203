"""Sentences over runs: do runs of one task agree more, how one run went on, the largest of many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import chance
from lora_analysis.conclusions.levels import Finding, number, on
from lora_analysis.errors import InputError
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation, Study
from lora_analysis.studies.base_models import per_base, runs_per_base
from lora_analysis.studies.relations import base_key
from lora_analysis.text import plural

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter
    from lora_analysis.studies import RunInference

_MANY = 8


def inference(study: Study) -> Iterator[Finding]:
    """Hold runs of one task against runs of other tasks, rank by rank, with the run as the unit."""
    one_dimension = study.similarities["dimension"].nunique() <= 1
    quantity = "omega" if one_dimension else "excess_r_r"
    for base, runs in runs_per_base(study):
        for rank in sorted({int(one) for one in runs["rank"].dropna()}):
            try:
                found = study.run_inference(quantity=quantity, rank=rank, base=base or None)
            except InputError:
                continue  # a rank of one task, or of one run each, has nothing to relabel
            if not np.isnan([found.within[1], found.between[1]]).any():
                yield _inferred(found, rank, base)


def _inferred(found: RunInference, rank: int, base: str) -> Finding:
    name = "ω" if found.quantity == "omega" else "φ(r,r) above chance"
    test = found.permutation
    spread = found.standard_error if test.allows_interval else None
    error = "" if spread is None else f" (jackknife over the runs: standard error {number(spread)})"
    at_least = chance.p_value_text(test.smallest_p_value)
    text = (
        f"Run by run at rank {rank}{on(base)} ({plural(found.n, 'run')} of "
        f"{plural(len(set(found.tasks)), 'task')}): median {name} on the output side is "
        f"{_quartiles(found.within)} between runs of one task and {_quartiles(found.between)} "
        f"between runs of different tasks; the means differ by {number(test.difference)}{error}. "
        f"Relabeling the runs gives p = {chance.p_value_text(test.p_value)}; the smallest that so "
        f"few runs allow is {at_least}."
    )
    if test.smallest_p_value > 0.05:
        text += " With more runs it could say more."
    values = {
        **({"base": base} if base else {}),
        "rank": rank,
        "runs": found.n,
        "within": float(found.within[1]),
        "between": float(found.between[1]),
        "difference": test.difference,
        "standard_error": spread,
        "p": test.p_value,
        "smallest_p": test.smallest_p_value,
    }
    return Finding("result", "runs", text, values)


def _quartiles(values: NDArray[np.float64]) -> str:
    values = np.round(values, 4) + 0.0  # above chance, nothing is 0 and not −1e-5
    return f"{number(values[1])} (quartiles {number(values[0])} to {number(values[2])})"


def trajectories(study: Study) -> Iterator[Finding]:
    """Say how far the checkpoints of one run were from its last."""
    for rows in last_steps(study):
        text = "; ".join(
            f"step {int(one.step)}: {number(one.omega)}" for one in rows.itertuples(index=False)
        )
        text = (
            f"Checkpoints of one run against its last, {rows['last'].iloc[0]} (median ω over "
            f"modules, output side): {text}. They are one sample: earlier ones count in no other "
            "result."
        )
        yield Finding("result", "steps", text, {"checkpoints": len(rows) + 1})


def last_steps(study: Study) -> Iterator[pd.DataFrame]:
    """Yield per run its earlier checkpoints by step, with ω and φ(1, 1) against its last.

    Columns: adapter, step, last, last_step, omega, phi_1_1 (medians over modules, output side).
    """
    rows = study.select(Relation.SAME_RUN, "output")
    if rows.empty:
        return
    step = study.runs.set_index("adapter")["step"]
    pairs = rows.groupby(["a", "b"], sort=False)[["omega", "phi_1_1"]].median().reset_index()
    later = pairs["a"].map(step) > pairs["b"].map(step)
    pairs["last"] = pairs["a"].where(later, pairs["b"])
    pairs["adapter"] = pairs["b"].where(later, pairs["a"])
    pairs["step"] = pairs["adapter"].map(step)
    pairs["last_step"] = pairs["last"].map(step)
    final = pairs[~pairs["last"].isin(pairs["adapter"])]
    for _, own in final.groupby("last", sort=False):
        yield own.sort_values("step")[["adapter", "step", "last", "last_step", "omega", "phi_1_1"]]


def largest(study: Study) -> Iterator[Finding]:
    """Name the largest overlap on each base, as the largest of M, beside what M random ones reach.

    Where there are few, a maximum is one of the numbers that lead anyway.
    """
    rows = study.similarities
    rows = rows[(rows["side"] == "output") & (rows["degeneracy_1_1"] == "")]
    rows = rows[
        (rows["initialization"] != InitRelation.SAME_RUN)
        & ~rows["relation"].isin([Relation.SAME_RUN, Relation.EARLIER])
    ]
    for base, own in per_base(study, rows[rows["relation"] != Relation.OTHER_BASE]):
        others = own[own["relation"] == Relation.REFERENCE]
        chosen = own[own["relation"] != Relation.REFERENCE]
        if len(chosen) >= _MANY:
            yield _largest(chosen, others, base)


def _largest(rows: pd.DataFrame, others: pd.DataFrame, base: str) -> Finding:
    top = rows.loc[_excess(rows).idxmax()]
    expected = max(
        chance.similarity_maximum(int(d), 1, 1, len(own)) for d, own in rows.groupby("dimension")
    )
    text = (
        f"The largest φ(1,1) on the output side{on(base)} is the largest of {len(rows)}: "
        f"{number(top['phi_1_1'])} in {top['module']} of {top['a']} and {top['b']}. The largest of "
        f"so many random ones is {number(expected)} on average"
    )
    if len(others):
        best = others.loc[_excess(others).idxmax(), "phi_1_1"]
        text += f", of the {len(others)} unrelated ones it is {number(best)}"
    values = {"phi_1_1": float(top["phi_1_1"]), "count": len(rows), "expected_maximum": expected}
    return Finding("result", "largest", f"{text}.", values | {"module": str(top["module"])})


def _excess(rows: pd.DataFrame) -> pd.Series:
    return (rows["phi_1_1"] - rows["chance_1_1"]) / (1 - rows["chance_1_1"])


def bases(study: Study) -> Iterator[Finding]:
    """Say how the adapters fall into groups by their base, and which could not be placed."""
    named = study.runs.assign(base=study.runs["base_model"].map(base_key, na_action="ignore"))
    groups = {
        str(own["base_model"].iloc[0]): len(own) for _, own in named.groupby("base", sort=False)
    }
    if len(groups) < 2:
        return
    listed = ", ".join(f"{base} ({plural(count, 'adapter')})" for base, count in groups.items())
    apart = (
        f"{plural(study.across_bases, 'pair')} across them not compared"
        if study.across_bases
        else "pairs across them compared all the same"
    )
    unnamed = list(named.loc[named["base"].isna(), "adapter"])
    rest = (
        f" {some(unnamed)} name no base and could not be grouped; they are compared wherever "
        "shapes agree."
        if unnamed
        else ""
    )
    text = (
        f"The adapters name {len(groups)} base models: {listed}. Directions of different bases "
        f"have nothing to do with each other, even where shapes agree: {apart}.{rest}"
    )
    yield Finding("limit", "several bases", text, {"bases": len(groups)})


def ungrouped(study: Study) -> Iterator[Finding]:
    """Name the adapters whose task or seed is not known, where there are several adapters.

    Not those whose name does not fit the user's pattern: a note on the file says so.
    """
    runs = study.runs[~study.runs["adapter"].isin(study.reference)]
    unknown = list(runs.loc[runs["task"].isna() | runs["seed"].isna(), "adapter"])
    unknown = [label for label in unknown if not _misfit(study.adapters[label])]
    if len(runs) < 2 or not unknown:
        return
    one = "it was trained"
    if len(unknown) == len(runs):
        who = f"No adapter says which task and seed {one}"
    elif len(unknown) == 1:
        who = f"{unknown[0]} does not say which task and seed {one}"
    else:
        who = f"{some(unknown)} do not say which task and seed they were trained"
    text = (
        f"{who} with, so the pairs concerned could not be "
        "grouped by them. A pattern for the names says it (--label '{task}-r{rank}-s{seed}'), or "
        'a manifest.json beside the adapter ({"task": ..., "seed": ...}).'
    )
    yield Finding("limit", "not grouped", text, {"adapters": len(unknown)})


def _misfit(adapter: Adapter) -> bool:
    """Say whether a note on the adapter says already that its name tells nothing."""
    return any(note.code == "label-misfit" for note in adapter.provenance.findings)


def chosen(study: Study) -> Iterator[Finding]:
    """Say that the tables of pairs hold a choice of the adapters."""
    left = len(study.adapters) - len(study.tabulated)
    if left > 0:
        text = (
            f"Pairs of {len(study.tabulated)} adapters, some of every task and rank, are compared "
            f"module by module; the other {left} are in the similarity matrix, which holds all "
            f"{len(study.adapters)}, and in the tables of single adapters."
        )
        yield Finding("limit", "choice", text, {"in_pairs": len(study.tabulated)})


def some(names: list[str], at_most: int = 4) -> str:
    """Return "a, b and 3 more"."""
    if len(names) <= at_most + 1:
        return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return f"{', '.join(names[:at_most])} and {len(names) - at_most} more"
