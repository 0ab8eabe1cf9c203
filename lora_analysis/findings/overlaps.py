"""Sentences about pairs: what the reference is, who shares directions, what the start explains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_analysis.findings.levels import (
    SIDES_IN_ORDER,
    Finding,
    Level,
    level,
    median_chance,
    number,
    plural,
)
from lora_analysis.studies import REFERENCE, SHARED_SEED, Study

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.spectra import Side

# Pairs of unknown relation are described one by one up to this many, then together.
PAIRS_IN_WORDS = 6


def _verdict(found: Level, reference: Level) -> str:
    """Return what the pair medians say against those of the reference."""
    above = sum(one > max(reference.pair_medians) for one in found.pair_medians)
    if above == found.pairs:
        return "above every reference pair"
    if found.median > reference.high and above:
        return f"above every reference pair in {above} of {found.pairs} pairs"
    if found.median > reference.high:
        return "above most reference values, but not clear of them"
    return "no more alike than unrelated adapters"


def _side_clause(study: Study, rows: pd.DataFrame, side: Side) -> tuple[str, dict[str, Any]]:
    """Return "output side: median φ(1,1) 0.61 ..., reference 0.04, chance 0.005: verdict"."""
    own = rows[rows["side"] == side]
    found = level(own, "phi_1_1")
    if found is None:
        return f"on the {side} side no first direction is well defined", {}
    reference = level(study.select(REFERENCE, side), "phi_1_1")
    chance = median_chance(own, "phi_1_1")
    text = (
        f"median φ(1,1) on the {side} side {number(found.median)} "
        f"(quartiles {number(found.low)} to {number(found.high)})"
    )
    values: dict[str, Any] = {
        f"phi_1_1_{side}": found.median,
        f"chance_{side}": chance,
        f"pairs_{side}": found.pairs,
        f"modules_{side}": found.modules,
    }
    if reference is None:
        return f"{text}, isotropic chance {number(chance)}", values
    values[f"reference_{side}"] = reference.median
    values[f"verdict_{side}"] = verdict = _verdict(found, reference)
    return (
        f"{text}, other tasks {number(reference.median)}, isotropic chance {number(chance)}: "
        f"{verdict}"
    ), values


def _shared_words(values: Mapping[str, Any]) -> str:
    """Return which first direction a group shares, in words no stronger than the verdicts."""
    clear = [
        side
        for side in SIDES_IN_ORDER
        if values.get(f"verdict_{side}") == "above every reference pair"
    ]
    if len(clear) == 2:
        return "share their first output and input direction"
    if clear:
        return f"share their first {clear[0]} direction"
    return "do not clearly share a first direction"


def _compared(study: Study, rows: pd.DataFrame, who: str, topic: str) -> Finding:
    clauses: list[str] = []
    values: dict[str, Any] = {}
    for side in SIDES_IN_ORDER:
        clause, found = _side_clause(study, rows, side)
        clauses.append(clause)
        values.update(found)
    pairs = plural(rows.groupby(["a", "b"]).ngroups, "pair")
    modules = plural(int(rows["module"].nunique()), "module")
    numbers = "; ".join(clauses)
    if any(key.startswith("verdict") for key in values):
        text = f"{who} {_shared_words(values)} ({pairs}, {modules}): {numbers}."
    else:
        text = f"{who} ({pairs}, {modules}): {numbers}. No reference, so no verdict."
    return Finding("result", topic, text, values)


def reference(study: Study) -> Iterator[Finding]:
    """Say what unrelated adapters give, or that none are known."""
    output = level(study.select(REFERENCE, "output"), "phi_1_1")
    if output is None:
        if len(study.adapters) > 1:
            yield _no_reference()
        return
    values: dict[str, float | int | str | None] = {}
    parts: list[str] = []
    for side in SIDES_IN_ORDER:
        rows = study.select(REFERENCE, side)
        found, chance = level(rows, "phi_1_1"), median_chance(rows, "phi_1_1")
        if found is None:
            continue
        parts.append(f"{side} {number(found.median)} (chance {number(chance)})")
        values |= {f"phi_1_1_{side}": found.median, f"chance_{side}": chance}
    text = (
        f"Unrelated adapters set the reference: {plural(output.pairs, 'pair')} with other task and "
        f"other seed have a median φ(1,1) of {' and '.join(parts)}. Every verdict here is made "
        "against these pairs, not against chance."
    )
    yield Finding("reference", "reference", text, values)


def _no_reference() -> Finding:
    text = (
        "No pair with another task and another seed is known here, so there is no reference. "
        "Overlaps above isotropic chance are reported as just that: unrelated adapters of one "
        "base exceed chance too."
    )
    return Finding("limit", "no reference", text)


def by_rank_pair(study: Study) -> Iterator[Finding]:
    """Compare ranks on one task, one sentence per pair of ranks."""
    rows = study.similarities
    if rows.empty:
        return
    rows = rows[rows["relation"] == "same task, other rank"]
    ranks = study.runs.set_index("adapter")["rank"]
    keys = [tuple(sorted((ranks[a], ranks[b]))) for a, b in zip(rows["a"], rows["b"], strict=True)]
    for low, high in sorted(set(keys)):
        chosen = rows[[key == (low, high) for key in keys]]
        who = f"Rank {int(low)} and rank {int(high)} on the same task"
        yield _compared(study, chosen, who, "ranks")


def by_seed(study: Study) -> Iterator[Finding]:
    """Compare seeds on one task, one sentence per rank."""
    rows = study.similarities
    if rows.empty:
        return
    rows = rows[rows["relation"] == "same task, other seed"]
    ranks = study.runs.set_index("adapter")["rank"].reindex(rows["a"]).to_numpy()
    for rank in sorted(set(ranks)):
        chosen = rows[ranks == rank]
        who = f"Two seeds of rank {int(rank)} on the same task"
        yield _compared(study, chosen, who, "seeds")


def unknown(study: Study) -> Iterator[Finding]:
    """Describe pairs whose relation is not known, without a verdict."""
    rows = study.similarities
    rows = rows if rows.empty else rows[rows["relation"] == "unknown"]
    if rows.empty:
        return
    groups = list(rows.groupby(["a", "b"], sort=False))
    if len(groups) > PAIRS_IN_WORDS:
        yield _compared(study, rows, f"{len(study.adapters)} adapters of unknown relation", "pairs")
        return
    for (a, b), chosen in groups:
        yield _compared(study, chosen, f"{a} and {b}", "pairs")


def shared_seed(study: Study) -> Iterator[Finding]:
    """Show what a shared initial A does to adapters of different tasks."""
    flagged = study.pairs[(study.pairs["relation"] == SHARED_SEED)] if len(study.pairs) else None
    if flagged is None or flagged.empty:
        return
    flagged = flagged[flagged["start"] == "same initial A"]
    if flagged.empty:
        return
    keys = set(zip(flagged["a"], flagged["b"], strict=True))
    sides: dict[str, tuple[float, float, float]] = {}
    for side in SIDES_IN_ORDER:
        rows = study.select(SHARED_SEED, side)
        own = rows[[key in keys for key in zip(rows["a"], rows["b"], strict=True)]]
        other = study.select(REFERENCE, side)
        sides[side] = (
            own["phi_r_r"].median(),
            other["phi_r_r"].median(),
            own["chance_r_r"].median(),
        )
    (i, i_ref, i_c), (o, o_ref, o_c) = sides["input"], sides["output"]
    text = (
        f"{plural(len(flagged), 'pair')} of different tasks share their initial A because they ran "
        f"the same seed. Their input-side φ(r,r) is {number(i)} (median; other seeds "
        f"{number(i_ref)}, chance {number(i_c)}) while their output side is at {number(o)} (other "
        f"seeds {number(o_ref)}, chance {number(o_c)}): the input overlap is the common start, "
        "not something both tasks learned. It counts in no result."
    )
    values = {"input": i, "input_reference": i_ref, "output": o, "output_reference": o_ref}
    yield Finding("artefact", "shared seed", text, {k: float(v) for k, v in values.items()})
