"""Sentences about pairs: what the reference is, who shares directions, what the start explains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_analysis.findings.levels import (
    SIDES_IN_ORDER,
    Finding,
    Level,
    level,
    number,
    plural,
)
from lora_analysis.studies import REFERENCE, SHARED_SEED, Study

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.spectra import Side

# Pairs of unknown relation are described one by one up to this many, then together.
PAIRS_IN_WORDS = 6


Verdict = Literal["share", "partly", "no more"]


@dataclass(frozen=True, slots=True)
class _SideLevel:
    """One side of a group of pairs: what was found, in the reference, and by chance."""

    side: Side
    found: Level
    reference: Level | None

    @property
    def verdict(self) -> Verdict | None:
        """What the pair medians say against those of the reference; None without one."""
        if self.reference is None:
            return None
        above = sum(one > max(self.reference.pair_medians) for one in self.found.pair_medians)
        if above == self.found.pairs:
            return "share"
        return "partly" if above and self.found.median > self.reference.high else "no more"

    def numbers(self, *, first: bool) -> str:
        """Return "median φ(1,1) 0.61 over ..."; short where a first side has said what it is."""
        one = self.found
        quartiles = f"{number(one.low)} to {number(one.high)}"
        over = f"{plural(one.modules, 'module')} of {plural(one.pairs, 'pair')}"
        what = "φ(1,1) above chance" if one.above_chance else "φ(1,1)"
        text = (
            f"median {what} {number(one.median)} over {over} (quartiles {quartiles})"
            if first
            else f"{number(one.median)} ({quartiles})"
        )
        if self.reference is not None:
            text += f", other tasks {number(self.reference.median)}"
        return f"{text}, isotropic chance {number(one.chance)}"

    def values(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        found = {
            "phi_1_1": self.found.median,
            "chance": self.found.chance,
            "above_chance": self.found.above_chance,
            "pairs": self.found.pairs,
            "modules": self.found.modules,
            "reference": self.reference.median if self.reference else None,
            "verdict": self.verdict,
        }
        return {f"{name}_{self.side}": value for name, value in found.items()}


def _side_level(study: Study, rows: pd.DataFrame, side: Side) -> _SideLevel | None:
    own = rows[rows["side"] == side]
    found = level(own)
    if found is None:
        return None
    return _SideLevel(side, found, level(study.select(REFERENCE, side)))


_VERDICT_WORDS: dict[Verdict, str] = {
    "share": "share their first {side} direction",
    "partly": "share their first {side} direction in some pairs only",
    "no more": "share no more of their first {side} direction than unrelated adapters do",
}


def _compared(study: Study, rows: pd.DataFrame, who: str, topic: str) -> Finding:
    """Return one sentence about a group of pairs: the verdict on either side, and its numbers."""
    sides = [_side_level(study, rows, side) for side in SIDES_IN_ORDER]
    present = [one for one in sides if one is not None]
    numbers = [one.numbers(first=one is present[0]) for one in present]
    if not present:
        text = f"{who}: no first direction is well defined, or none counts; φ(1,1) says nothing."
    elif any(one.verdict is None for one in present):
        clauses = [f"{one.side} side, {said}" for one, said in zip(present, numbers, strict=True)]
        text = f"{who}: {'; '.join(clauses)}. No reference, so no verdict."
    else:
        clauses = [
            f"{_VERDICT_WORDS[one.verdict].format(side=one.side)}: {said}"
            for one, said in zip(present, numbers, strict=True)
            if one.verdict is not None
        ]
        text = f"{who} {'; they '.join(clauses)}."
    values = {name: value for one in present for name, value in one.values().items()}
    return Finding("result", topic, text, values)


def reference(study: Study) -> Iterator[Finding]:
    """Say what unrelated adapters give, or that none are known."""
    output = level(study.select(REFERENCE, "output"))
    if output is None:
        if len(study.adapters) > 1:
            yield _no_reference()
        return
    values: dict[str, float | int | str | None] = {}
    parts: list[str] = []
    for side in SIDES_IN_ORDER:
        found = level(study.select(REFERENCE, side))
        if found is None:
            continue
        parts.append(f"{number(found.median)} on the {side} side (chance {number(found.chance)})")
        values |= {f"phi_1_1_{side}": found.median, f"chance_{side}": found.chance}
    what = "φ(1,1) above chance" if output.above_chance else "φ(1,1)"
    text = (
        f"Unrelated adapters set the reference: {plural(output.pairs, 'pair')} with other task and "
        f"other seed have a median {what} of {' and '.join(parts)}. Every verdict here is made "
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
    # As the figure does: the largest rank first, against the one closest to the paper's 8.
    for low, high in sorted(set(keys), key=lambda key: (-key[1], abs(key[0] - 8))):
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
    for rank in sorted(set(ranks), reverse=True):
        chosen = rows[ranks == rank]
        who = f"Two seeds of rank {int(rank)} on the same task"
        yield _compared(study, chosen, who, "seeds")


def unknown(study: Study) -> Iterator[Finding]:
    """Describe pairs whose relation is not known, without a verdict."""
    rows = study.similarities
    # One run twice is no pair: `starts` has said so.
    rows = rows[(rows["relation"] == "unknown") & (rows["start"] != "same run")]
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
    pairs = study.pairs[study.pairs["relation"] == SHARED_SEED]
    whole = int((pairs["start"] == "same initial A").sum())
    partly = int((pairs["start"] == "partly shared").sum())
    if not whole + partly:
        return
    sides: dict[str, tuple[float, float, float]] = {}
    for side in SIDES_IN_ORDER:
        own = study.select(SHARED_SEED, side)
        own = own[own["shared_start"]]
        other = study.select(REFERENCE, side)
        same_ranks = other["rank_a"].isin(own["rank_a"]) & other["rank_b"].isin(own["rank_b"])
        other = other[same_ranks]  # φ(r, r) depends on r: like is held against like
        sides[side] = (
            own["phi_r_r"].median(),
            other["phi_r_r"].median(),
            own["chance_r_r"].median(),
        )
    (i, i_ref, i_c), (o, o_ref, o_c) = sides["input"], sides["output"]
    text = (
        f"{plural(whole + partly, 'pair')} of different tasks share their initial A because they "
        f"ran the same seed{_in_part(whole, partly)}. Their input-side φ(r,r) is {number(i)} "
        f"(median; other seeds {number(i_ref)}, chance {number(i_c)}) while their output side is "
        f"at {number(o)} (other seeds {number(o_ref)}, chance {number(o_c)}): the input overlap is "
        "the common start, not something both tasks learned. It counts in no result."
    )
    values = {"input": i, "input_reference": i_ref, "output": o, "output_reference": o_ref}
    yield Finding("artefact", "shared seed", text, {k: float(v) for k, v in values.items()})


def _in_part(whole: int, partly: int) -> str:
    """Return " (2 of them in part of the modules)", or nothing."""
    if not partly:
        return ""
    return f" ({partly} of them in part of the modules)" if whole else " (in part of the modules)"
