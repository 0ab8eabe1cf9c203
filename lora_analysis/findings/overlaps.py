"""Sentences about pairs: what the reference is, who shares directions, what the start explains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora_analysis.findings.levels import (
    PAIRS_IN_WORDS,
    SIDES_IN_ORDER,
    Finding,
    Level,
    level,
    number,
    plural,
)
from lora_analysis.studies import REFERENCE, SHARED_SEED, Study
from lora_analysis.studies.relations import base_key

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.spectra import Side

# Fewer pairs say too little about what unrelated adapters give.
MIN_REFERENCE_PAIRS = 3

Verdict = Literal["share", "partly", "no more"]


@dataclass(frozen=True, slots=True)
class _SideLevel:
    """One side of a group of pairs: what was found, in the reference, and by chance."""

    side: Side
    found: Level
    reference: Level | None

    @property
    def above(self) -> int:
        """How many values exceed 95 % of the reference's."""
        if self.reference is None:
            return 0
        return int((self.found.values > self.reference.quantile(0.95)).sum())

    @property
    def verdict(self) -> Verdict | None:
        """What the values say against the reference; None without one that is large enough.

        "share": every pair's median exceeds that of every reference pair, and at least half of
        the modules exceed 95 % of the reference's. Five in a hundred do so among unrelated pairs.
        """
        if self.reference is None or self.reference.pairs < MIN_REFERENCE_PAIRS:
            return None
        best = max(self.reference.pair_medians)
        share = self.above / len(self.found.values)
        if share >= 0.5 and all(one > best for one in self.found.pair_medians):
            return "share"
        return "partly" if share >= 0.25 else "no more"

    @property
    def reason(self) -> str | None:
        """Why there is no verdict; None where there is one."""
        if self.verdict is not None:
            return None
        pairs = self.reference.pairs if self.reference else 0
        return f"a reference of {plural(pairs, 'pair')} is too small" if pairs else "no reference"

    def numbers(self, *, first: bool) -> str:
        """Return "median φ(1,1) 0.61 over ..."; short where a first side has said what it is."""
        one = self.found
        quartiles = f"quartiles {one.text(one.quantile(0.25))} to {one.text(one.quantile(0.75))}"
        over = f"{plural(one.modules, 'module')} of {plural(one.pairs, 'pair')}"
        text = f"median {one.name} {one.text(one.median)} over {over} ({quartiles})"
        if not first:
            text = f"{one.text(one.median)} ({quartiles})"
        if one.left_out:
            text += f", {one.left_out} left out as ill defined or shared from the start"
        if self.reference is not None:
            text += (
                f", {self.above} of {len(one.values)} above 95 % of unrelated pairs (their median "
                f"{self.reference.text(self.reference.median)})"
            )
        return f"{text}, isotropic chance {number(one.chance)}" if first else text

    def values(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        found = {
            "phi_1_1": self.found.median,
            "chance": self.found.chance,
            "above_chance": self.found.above_chance,
            "pairs": self.found.pairs,
            "modules": self.found.modules,
            "left_out": self.found.left_out,
            "above_reference_95": self.above if self.reference else None,
            "reference": self.reference.median if self.reference else None,
            "verdict": self.verdict,
            "reason": self.reason,
        }
        return {f"{name}_{self.side}": value for name, value in found.items()}


def _side_level(study: Study, rows: pd.DataFrame, side: Side) -> _SideLevel | None:
    own = rows[rows["side"] == side]
    found = _level(study, own)
    if found is None:
        return None
    return _SideLevel(side, found, _level(study, _reference_rows(study, rows, side)))


def _level(study: Study, rows: pd.DataFrame) -> Level | None:
    """Return the level of rows on the one scale of the study.

    Chosen group by group, φ of square modules would be held against the reference's φ above
    chance wherever the reference has modules of other dimensions.
    """
    return level(rows, above_chance=study.similarities["dimension"].nunique() > 1)


def _reference_rows(study: Study, rows: pd.DataFrame, side: Side) -> pd.DataFrame:
    """Return the unrelated pairs on the bases of ``rows``: those of another base say nothing.

    An adapter that names no base may be of any.
    """
    reference = study.select(REFERENCE, side)
    wanted = {base for one in ("a", "b") for base in _bases(study, rows[one])}
    if None in wanted:
        return reference
    # Of rows, by number: an empty list would choose columns.
    bases = enumerate(_bases(study, reference["a"]))
    return reference.iloc[[i for i, base in bases if base is None or base in wanted]]


def _bases(study: Study, adapters: pd.Series) -> list[str | None]:
    """Return what tells the base of each adapter apart, None where it names none."""
    named = dict(zip(study.runs["adapter"], study.runs["base_model"], strict=True))
    names = (named[one] for one in adapters)
    return [base_key(name) if isinstance(name, str) else None for name in names]


_VERDICT_WORDS: dict[Verdict, str] = {
    "share": "share their first {side} direction",
    "partly": "share their first {side} direction in part of the modules",
    "no more": "share no more of their first {side} direction than unrelated adapters do",
}


def _clause(one: _SideLevel, *, first: bool) -> str:
    """Return "share their first output direction: ..." or that there is no verdict, and why."""
    numbers = one.numbers(first=first)
    if one.verdict is not None:
        return f"{_VERDICT_WORDS[one.verdict].format(side=one.side)}: {numbers}"
    return f"have no verdict on the {one.side} side ({one.reason}): {numbers}"


def _compared(study: Study, rows: pd.DataFrame, who: str, topic: str) -> Finding:
    """Return one sentence about a group of pairs: the verdict on either side, and its numbers."""
    sides = [_side_level(study, rows, side) for side in SIDES_IN_ORDER]
    present = [one for one in sides if one is not None]
    if not present:
        text = f"{who}: no first direction is well defined, or none counts; φ(1,1) says nothing."
    else:
        text = f"{who} {'; they '.join(_clause(one, first=one is present[0]) for one in present)}."
    values = {name: value for one in present for name, value in one.values().items()}
    return Finding("result", topic, text, {"subject": who} | values)


def reference(study: Study) -> Iterator[Finding]:
    """Say what unrelated adapters give, base by base, or that none are known."""
    output = study.select(REFERENCE, "output")
    if _level(study, output) is None:
        if len(study.adapters) > 1:
            yield _no_reference()
        return
    bases = _bases(study, output["a"])
    groups = list(dict.fromkeys(bases))
    for base in groups:
        own = output[[one == base for one in bases]]
        found = _reference(study, own, base if len(groups) > 1 else None)
        if found is not None:
            yield found


def _reference(study: Study, output: pd.DataFrame, base: str | None) -> Finding | None:
    """Return the sentence about the unrelated pairs among ``output``; None if none counts."""
    found = _level(study, output)
    if found is None:
        return None
    values: dict[str, float | int | str | None] = {} if base is None else {"base": base}
    pairs = set(zip(output["a"], output["b"], strict=True))
    parts: list[str] = []
    for side in SIDES_IN_ORDER:
        rows = study.select(REFERENCE, side)
        both = enumerate(zip(rows["a"], rows["b"], strict=True))
        one = _level(study, rows.iloc[[i for i, pair in both if pair in pairs]])
        if one is None:
            continue
        parts.append(
            f"{one.text(one.median)} on the {side} side (95 % below "
            f"{one.text(one.quantile(0.95))}, chance {number(one.chance)})"
        )
        values |= {f"phi_1_1_{side}": one.median, f"chance_{side}": one.chance}
    where = "here" if base is None else f"on {base}"
    text = (
        f"Unrelated adapters{'' if base is None else f' of {base}'} set the reference: "
        f"{plural(found.pairs, 'pair')} with other task and other seed (ranks "
        f"{_rank_pairs(study, output)}) have a median {found.name} of {' and '.join(parts)}. "
        f"Every verdict {where} is made against these pairs, not against chance: “share” means "
        "that the median of each pair exceeds that of every reference pair, and at least half of "
        "the modules exceed 95 % of the reference's."
    )
    return Finding("reference", "reference", text, values)


def _rank_pairs(study: Study, rows: pd.DataFrame) -> str:
    """Return the ranks of the reference pairs, "8/8, 4/8": φ(1, 1) has one chance for all."""
    ranks = study.spectra.groupby("adapter")["rank"].max()
    found = {
        _in_order(int(ranks[a]), int(ranks[b])) for a, b in zip(rows["a"], rows["b"], strict=True)
    }
    return ", ".join(f"{low}/{high}" for low, high in sorted(found))


def _in_order(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a <= b else (b, a)


def _no_reference() -> Finding:
    text = (
        "No pair with another task and another seed is known here, so there is no reference. "
        "Overlaps above isotropic chance are reported as just that: unrelated adapters of one "
        "base exceed chance too."
    )
    return Finding("limit", "no reference", text)


def by_rank_pair(study: Study) -> Iterator[Finding]:
    """Compare ranks on one task, one sentence per pair of ranks.

    Pairs with other seeds lead: with one seed, both saw their data in one order.
    """
    rows = study.similarities
    ranks = study.runs.set_index("adapter")["rank"]
    with_seeds = {
        "with other seeds": rows[rows["relation"] == "same task, other rank and seed"],
        "with one seed": rows[rows["relation"] == "same task, other rank"],
    }
    seen: set[tuple[int, int]] = set()
    for seeds, chosen in with_seeds.items():
        pairs = zip(chosen["a"], chosen["b"], strict=True)
        keys = [_in_order(int(ranks[a]), int(ranks[b])) for a, b in pairs]
        # As the figure does: the largest rank first, against the one closest to the paper's 8.
        for low, high in sorted(set(keys) - seen, key=lambda key: (-key[1], abs(key[0] - 8))):
            own = chosen[[key == (low, high) for key in keys]]
            who = f"Rank {low} and rank {high} on the same task {seeds}"
            yield _compared(study, own, who, "ranks")
        seen |= set(keys)


def by_seed(study: Study) -> Iterator[Finding]:
    """Compare seeds on one task, one sentence per rank."""
    rows = study.similarities
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
        count = len(set(rows["a"]) | set(rows["b"]))
        yield _compared(study, rows, f"{count} adapters of unknown relation", "pairs")
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
        f"{plural(whole + partly, 'pair')} of different tasks ran the same seed and share their "
        f"initial A (found in {_where(whole, partly)}). Median φ(r,r) there is {number(i)} on the "
        f"input side{_others(i_ref)}, chance {number(i_c)}, and {number(o)} on the output side"
        f"{_others(o_ref)}, chance {number(o_c)}. What the input side has more comes with the "
        "start and counts in no result."
    )
    values = {"input": i, "input_reference": i_ref, "output": o, "output_reference": o_ref}
    yield Finding("artefact", "shared seed", text, {k: float(v) for k, v in values.items()})


def _where(whole: int, partly: int) -> str:
    """Return in which modules the check finds the shared start."""
    if not partly:
        return "every module"
    return f"every module of {whole} pairs, part of the modules of {partly}"


def _others(reference: float) -> str:
    """Return the value of pairs with other seeds, where there are such pairs of these ranks."""
    return f", with other seeds {number(reference)}" if np.isfinite(reference) else ""
