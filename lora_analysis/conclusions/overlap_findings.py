"""Findings about pairs: what unrelated adapters give, and how alike ranks, seeds and pairs are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

from lora_analysis import chance
from lora_analysis.conclusions.overlap_summaries import (
    SIDES_IN_ORDER,
    Conclusion,
    side_conclusion,
    study_summary,
)
from lora_analysis.finding import Finding
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation, Study
from lora_analysis.studies.base_models import per_base
from lora_analysis.studies.relations import ACROSS_BASES

if TYPE_CHECKING:
    import pandas as pd

# Codes whose findings have a conclusion for each side of one group of pairs.
OVERLAP_CODES = frozenset(
    ["overlap-of-ranks", "overlap-of-seeds", "overlap-of-pair", "overlap-of-adapters"]
)
# Pairs alike are described one by one up to this many, then together.
PAIRS_IN_WORDS = 6
# With fewer values, the maximum is one of the numbers that lead anyway.
_MANY_VALUES = 8


def reference_pairs(study: Study) -> Iterator[Finding]:
    """Describe what unrelated adapters give, base by base, or report that none are known."""
    output = study.select(Relation.REFERENCE, "output")
    if study_summary(study, output) is None:
        if len(study.adapters) > 1:
            yield Finding("no-reference-pairs")
        return
    ranks = study.spectra.groupby("adapter")["rank"].max()
    for base, rows in per_base(study, output):
        summary = study_summary(study, rows)
        if summary is None:
            continue
        pairs = set(zip(rows["a"], rows["b"], strict=True))
        rank_pairs = {tuple(sorted((int(ranks[a]), int(ranks[b])))) for a, b in pairs}
        yield Finding(
            "reference-pairs",
            {
                "base": base or None,
                "pairs": summary.pairs,
                "ranks": [{"low": low, "high": high} for low, high in sorted(rank_pairs)],
                "quantity": summary.quantity,
                "sides": list(_reference_sides(study, pairs)),
            },
        )


def _reference_sides(study: Study, pairs: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield median, 95 % quantile and random baseline of the reference pairs, side by side."""
    for side in SIDES_IN_ORDER:
        rows = study.select(Relation.REFERENCE, side)
        numbered = enumerate(zip(rows["a"], rows["b"], strict=True))
        summary = study_summary(study, rows.iloc[[i for i, pair in numbered if pair in pairs]])
        if summary is not None:
            yield {
                "side": side,
                "median": summary.median,
                "quantile_95": summary.quantile(0.95),
                "chance": summary.chance,
            }


def overlaps(study: Study) -> Iterator[Finding]:
    """Compare ranks, seeds and pairs of unknown relation; inconclusive ones are summed up."""
    comparisons = chain(overlaps_of_ranks(study), overlaps_of_seeds(study), other_overlaps(study))
    for key, group in groupby(comparisons, _inconclusive_because):
        alike = list(group)
        if key is None or len(alike) == 1:
            yield from alike
        else:
            yield _summed_up(alike)


def overlaps_of_ranks(study: Study) -> Iterator[Finding]:
    """Compare ranks on one task, one finding per base and pair of ranks.

    Pairs with different seeds lead: with one seed, both saw their data in one order.
    """
    ranks = study.runs.set_index("adapter")["rank"]
    relations = {
        Relation.OTHER_RANK_AND_SEED: "different seeds",
        Relation.OTHER_RANK: "same seed",
    }
    table = study.similarities[study.similarities["relation"].isin(relations)]
    for base, rows in per_base(study, table):
        seen: set[tuple[int, ...]] = set()
        for relation, seeds in relations.items():
            chosen = rows[rows["relation"] == relation]
            pairs = zip(chosen["a"], chosen["b"], strict=True)
            keys = [tuple(sorted((int(ranks[a]), int(ranks[b])))) for a, b in pairs]
            # As the figure does: the largest rank first, against the one closest to the paper's 8.
            for key in sorted(set(keys) - seen, key=lambda pair: (-pair[1], abs(pair[0] - 8))):
                fields = {"low": key[0], "high": key[1], "seeds": seeds, "base": base or None}
                matching = chosen[[pair == key for pair in keys]]
                yield _compared(study, matching, "overlap-of-ranks", fields)
            seen |= set(keys)


def overlaps_of_seeds(study: Study) -> Iterator[Finding]:
    """Compare seeds on one task, one finding per base and rank."""
    rank_of = study.runs.set_index("adapter")["rank"]
    table = study.similarities
    for base, rows in per_base(study, table[table["relation"] == Relation.OTHER_SEED]):
        ranks = rows["a"].map(rank_of)
        for rank in sorted(set(ranks), reverse=True):
            fields = {"rank": int(rank), "base": base or None}
            yield _compared(study, rows[ranks == rank], "overlap-of-seeds", fields)


def other_overlaps(study: Study) -> Iterator[Finding]:
    """Compare pairs of unknown relation: one by one if they are few, else as one group."""
    table = study.similarities
    # `shared_initializations` reports pairs from one training run.
    table = table[
        (table["relation"] == Relation.UNKNOWN) & (table["initialization"] != InitRelation.SAME_RUN)
    ]
    for base, rows in per_base(study, table):
        pairs = list(rows.groupby(["a", "b"], sort=False))
        if len(pairs) > PAIRS_IN_WORDS:
            fields = {"count": len(set(rows["a"]) | set(rows["b"])), "base": base or None}
            yield _compared(study, rows, "overlap-of-adapters", fields)
            continue
        for (a, b), chosen in pairs:
            yield _compared(study, chosen, "overlap-of-pair", {"a": a, "b": b})


def _compared(study: Study, rows: pd.DataFrame, code: str, fields: Mapping[str, Any]) -> Finding:
    """Return the finding about a group of pairs: the conclusion on each side, and its numbers."""
    sides = [side_conclusion(study, rows, side) for side in SIDES_IN_ORDER]
    defined = [side for side in sides if side is not None]
    finding = Finding(code, {**fields, "sides": defined})
    return finding if defined else Finding("overlap-undefined", {"compared": finding.subject})


def _inconclusive_because(finding: Finding) -> tuple[Any, ...] | None:
    """Return why all sides are inconclusive and what is measured; None if one has an outcome."""
    sides = finding.fields.get("sides", ())
    if not sides or not all(Conclusion(side["conclusion"]).is_inconclusive for side in sides):
        return None
    keys = ("side", "conclusion", "reference_pairs", "quantity")
    return tuple(tuple(side[key] for key in keys) for side in sides)


def _summed_up(alike: list[Finding]) -> Finding:
    """Return one finding for several inconclusive comparisons, each of which it lists."""
    rows = list(zip(*(finding.fields["sides"] for finding in alike), strict=True))
    first = alike[0].fields["sides"][0]
    return Finding(
        "overlaps-inconclusive",
        {
            "count": len(alike),
            "conclusion": first["conclusion"],
            "quantity": first["quantity"],
            "sides": [
                {
                    "side": sides[0]["side"],
                    "medians": _ends([side["median"] for side in sides]),
                    "chances": _ends([side["chance"] for side in sides]),
                }
                for sides in rows
            ],
            "excluded": sum(side["excluded"] for sides in rows for side in sides),
            "comparisons": [
                {"compared": finding.subject, "sides": finding.fields["sides"]} for finding in alike
            ],
        },
    )


def _ends(values: list[float]) -> list[float]:
    return [min(values), max(values)]


def largest_overlaps(study: Study) -> Iterator[Finding]:
    """Report the maximum on each base, next to the maximum of as many random values."""
    rows = study.similarities
    rows = rows[
        (rows["side"] == "output")
        & (rows["degeneracy_1_1"] == "")
        & (rows["initialization"] != InitRelation.SAME_RUN)
        & ~rows["relation"].isin([Relation.SAME_RUN, Relation.EARLIER, *ACROSS_BASES])
    ]
    rows = rows.assign(excess=chance.excess(rows["phi_1_1"], rows["chance_1_1"]))
    for base, of_base in per_base(study, rows):
        reference = of_base[of_base["relation"] == Relation.REFERENCE]
        chosen = of_base[of_base["relation"] != Relation.REFERENCE]
        if len(chosen) < _MANY_VALUES:
            continue
        top = chosen.loc[chosen["excess"].idxmax()]
        by_dimension = chosen.groupby("dimension").size().items()
        expected = max(chance.similarity_maximum(int(d), 1, 1, n) for d, n in by_dimension)
        best = reference.loc[reference["excess"].idxmax(), "phi_1_1"] if len(reference) else None
        yield Finding(
            "largest-overlap",
            {
                "base": base or None,
                "count": len(chosen),
                "phi_1_1": float(top["phi_1_1"]),
                "module": str(top["module"]),
                "a": top["a"],
                "b": top["b"],
                "expected_maximum": expected,
                "reference_count": len(reference),
                "reference_maximum": None if best is None else float(best),
            },
        )
