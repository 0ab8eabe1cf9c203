"""Sentences about pairs: what the reference is, who shares directions, what the start explains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.conclusions.levels import (
    PAIRS_IN_WORDS,
    SIDES_IN_ORDER,
    Finding,
    number,
    on,
)
from lora_analysis.conclusions.verdicts import compared, reference_rows, study_level
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation, Study
from lora_analysis.studies.base_models import per_base
from lora_analysis.text import plural

if TYPE_CHECKING:
    import pandas as pd


def reference(study: Study) -> Iterator[Finding]:
    """Say what unrelated adapters give, base by base, or that none are known."""
    output = study.select(Relation.REFERENCE, "output")
    if study_level(study, output) is None:
        if len(study.adapters) > 1:
            yield _no_reference()
        return
    for base, own in per_base(study, output):
        found = _reference(study, own, base)
        if found is not None:
            yield found


def _reference(study: Study, output: pd.DataFrame, base: str) -> Finding | None:
    """Return the sentence about the unrelated pairs among ``output``; None if none counts."""
    found = study_level(study, output)
    if found is None:
        return None
    values: dict[str, float | int | str | None] = {"base": base} if base else {}
    pairs = set(zip(output["a"], output["b"], strict=True))
    parts: list[str] = []
    for side in SIDES_IN_ORDER:
        rows = study.select(Relation.REFERENCE, side)
        both = enumerate(zip(rows["a"], rows["b"], strict=True))
        one = study_level(study, rows.iloc[[i for i, pair in both if pair in pairs]])
        if one is None:
            continue
        parts.append(
            f"{one.text(one.median)} on the {side} side (95 % below "
            f"{one.text(one.quantile(0.95))}, chance {number(one.chance)})"
        )
        values |= {f"phi_1_1_{side}": one.median, f"chance_{side}": one.chance}
    text = (
        f"Unrelated adapters{on(base)} set the reference: "
        f"{plural(found.pairs, 'pair')} with other task and other seed (ranks "
        f"{_rank_pairs(study, output)}) have a median {found.name} of {' and '.join(parts)}. "
        f"Every verdict{on(base) or ' here'} is made against these pairs (in the types of module "
        "that a comparison has), not against chance: “share” means that the median of each pair "
        "exceeds that of every reference pair, and at least half of the modules exceed 95 % of the "
        "reference's."
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
    """Compare ranks on one task, one sentence per base and pair of ranks.

    Pairs with other seeds lead: with one seed, both saw their data in one order.
    """
    ranks = study.runs.set_index("adapter")["rank"]
    relations = {
        Relation.OTHER_RANK_AND_SEED: "with other seeds",
        Relation.OTHER_RANK: "with one seed",
    }
    table = study.similarities[study.similarities["relation"].isin(relations)]
    for base, rows in per_base(study, table):
        seen: set[tuple[int, int]] = set()
        for relation, seeds in relations.items():
            chosen = rows[rows["relation"] == relation]
            pairs = zip(chosen["a"], chosen["b"], strict=True)
            keys = [_in_order(int(ranks[a]), int(ranks[b])) for a, b in pairs]
            # As the figure does: the largest rank first, against the one closest to the paper's 8.
            for low, high in sorted(set(keys) - seen, key=lambda key: (-key[1], abs(key[0] - 8))):
                own = chosen[[key == (low, high) for key in keys]]
                who = f"Rank {low} and rank {high} on the same task {seeds}{on(base)}"
                yield compared(study, own, who, "ranks")
            seen |= set(keys)


def by_seed(study: Study) -> Iterator[Finding]:
    """Compare seeds on one task, one sentence per base and rank."""
    ranks = study.runs.set_index("adapter")["rank"]
    table = study.similarities
    for base, rows in per_base(study, table[table["relation"] == Relation.OTHER_SEED]):
        own = rows["a"].map(ranks)
        for rank in sorted(set(own), reverse=True):
            who = f"Two seeds of rank {int(rank)} on the same task{on(base)}"
            yield compared(study, rows[own == rank], who, "seeds")


def unknown(study: Study) -> Iterator[Finding]:
    """Describe pairs whose relation is not known, without a verdict."""
    table = study.similarities
    # One run twice is no pair: `starts` has said so.
    table = table[
        (table["relation"] == Relation.UNKNOWN) & (table["initialization"] != InitRelation.SAME_RUN)
    ]
    for base, rows in per_base(study, table):
        groups = list(rows.groupby(["a", "b"], sort=False))
        if len(groups) > PAIRS_IN_WORDS:
            count = len(set(rows["a"]) | set(rows["b"]))
            who = f"{count} adapters of unknown relation{on(base)}"
            yield compared(study, rows, who, "pairs")
            continue
        for (a, b), chosen in groups:
            yield compared(study, chosen, f"{a} and {b}", "pairs")


def shared_seed(study: Study) -> Iterator[Finding]:
    """Show what a shared initial A does to adapters of different tasks, base by base."""
    pairs = study.pairs[study.pairs["relation"] == Relation.SHARED_SEED]
    for base, own in per_base(study, pairs):
        yield from _shared_seed(study, own, base)


def _shared_seed(study: Study, pairs: pd.DataFrame, base: str) -> Iterator[Finding]:
    whole = int((pairs["initialization"] == InitRelation.SHARED).sum())
    partly = int((pairs["initialization"] == InitRelation.PARTLY_SHARED).sum())
    if not whole + partly:
        return
    named = set(zip(pairs["a"], pairs["b"], strict=True))
    sides: dict[str, tuple[float, float, float]] = {}
    for side in SIDES_IN_ORDER:
        own = study.select(Relation.SHARED_SEED, side)
        pairs_here = zip(own["a"], own["b"], strict=True)
        mine = np.array([pair in named for pair in pairs_here], dtype=bool)
        own = own[own["shared_init"] & mine]
        other = reference_rows(study, own, side)
        same_ranks = other["rank_a"].isin(own["rank_a"]) & other["rank_b"].isin(own["rank_b"])
        other = other[same_ranks]  # φ(r, r) depends on r: like is held against like
        sides[side] = (
            own["phi_r_r"].median(),
            other["phi_r_r"].median(),
            own["chance_r_r"].median(),
        )
    (i, i_ref, i_c), (o, o_ref, o_c) = sides["input"], sides["output"]
    text = (
        f"{plural(whole + partly, 'pair')} of different tasks{on(base)} ran the same seed and "
        f"share their initial A (found in {_where(whole, partly)}). Median φ(r,r) there is "
        f"{number(i)} on the input side{_others(i_ref)}, chance {number(i_c)}, and {number(o)} on "
        f"the output side{_others(o_ref)}, chance {number(o_c)}. What the input side has more "
        "comes with the start and counts in no result."
    )
    values = {"input": i, "input_reference": i_ref, "output": o, "output_reference": o_ref}
    yield Finding("artifact", "shared seed", text, {k: float(v) for k, v in values.items()})


def _where(whole: int, partly: int) -> str:
    """Return in which modules the check finds the shared start."""
    if not partly:
        return "every module"
    return f"every module of {whole} pairs, part of the modules of {partly}"


def _others(reference: float) -> str:
    """Return the value of pairs with other seeds, where there are such pairs of these ranks."""
    return f", with other seeds {number(reference)}" if np.isfinite(reference) else ""
