"""The pairs and modules that a report draws: few, and the same ones every time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from lora_analysis.patterns import NO_TYPE, layer_index, module_type
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_analysis.studies import Study

# The smaller rank of the paper's Figure 3.
SMALL_RANK = 8
# Names of query and value projections; a model has at most one of each.
_PAPER_TYPES = (
    "q_proj", "query", "q", "to_q", "wq", "q_lin", "v_proj", "value", "v", "to_v", "wv", "v_lin",
)  # fmt: skip


def representative_modules(names: Sequence[str], count: int = 2) -> list[str]:
    """Return one middle-layer module of each of ``count`` types.

    Queries and values, which the paper adapts, if there are any, else the first types in order.
    With a single type (or names without one), neighbors in the middle are returned.
    """
    by_type: dict[str, list[str]] = {}
    for name in names:
        by_type.setdefault(module_type(name), []).append(name)
    if len(by_type) >= count:
        first = [kind for kind in _PAPER_TYPES if kind in by_type]
        order = dict.fromkeys([*(first if len(first) > 1 else ()), *by_type])
        return [by_type[kind][len(by_type[kind]) // 2] for kind in list(order)[:count]]
    start = max(0, (len(names) - count) // 2)
    return list(names[start : start + count])


def common_modules(study: Study, a: str, b: str) -> list[str]:
    """Return the modules in which both adapters are trained and can be compared."""
    table = study.similarities
    if table.empty:
        return []
    pair = table["a"].isin([a, b]) & table["b"].isin([a, b])
    return list(table.loc[pair & (table["side"] == "input"), "module"])


def _with_ranks(study: Study) -> pd.DataFrame:
    """Return the pairs that share a trained module, with the rank of either adapter."""
    if study.similarities.empty:
        return pd.DataFrame()
    compared = study.similarities[["a", "b"]].drop_duplicates()
    ranks = study.spectra.groupby("adapter")["rank"].max()
    pairs = study.pairs.merge(compared, on=["a", "b"])
    return pairs.assign(rank_a=pairs["a"].map(ranks), rank_b=pairs["b"].map(ranks))


def rank_pair(study: Study) -> tuple[str, str] | None:
    """Return the pair for the figure of ranks, smaller rank first; None if all ranks are equal.

    Pairs of one task with different seeds lead, pairs of unknown relation are last, whatever their
    ranks; then the largest rank is compared with the one closest to 8.
    """
    pairs = _with_ranks(study)
    if pairs.empty:
        return None
    # Different seeds first: with one seed, both adapters saw their data in one order.
    preference = (Relation.OTHER_RANK_AND_SEED, Relation.OTHER_RANK, Relation.UNKNOWN)
    pairs = pairs[pairs["relation"].isin(preference)]
    pairs = pairs[pairs["rank_a"] != pairs["rank_b"]]
    if pairs.empty:
        return None
    low = pairs[["rank_a", "rank_b"]].min(axis=1)
    high = pairs[["rank_a", "rank_b"]].max(axis=1)
    order = pd.DataFrame(
        {
            # The section is about ranks of one task, which unrelated adapters cannot show.
            Relation.UNKNOWN: pairs["relation"] == Relation.UNKNOWN,
            "high": -high,
            "distance": (low - SMALL_RANK).abs(),
            "relation": pairs["relation"].map(preference.index),
        }
    )
    best = pairs.loc[order.sort_values(list(order), kind="stable").index[0]]
    first, second = str(best["a"]), str(best["b"])
    return (first, second) if best["rank_a"] < best["rank_b"] else (second, first)


def seed_pair(study: Study) -> tuple[str, str] | None:
    """Return the two seeds of the largest rank on one task; None if no task has two."""
    pairs = _with_ranks(study)
    if pairs.empty:
        return None
    pairs = pairs[pairs["relation"] == Relation.OTHER_SEED]
    if pairs.empty:
        return None
    best = pairs.sort_values("rank_a", ascending=False, kind="stable").iloc[0]
    return str(best["a"]), str(best["b"])


def any_pair(study: Study) -> tuple[str, str] | None:
    """Return two adapters of unknown relation; None if there are none to compare."""
    pairs = _with_ranks(study)
    if pairs.empty:
        return None
    pairs = pairs[
        (pairs["relation"] == Relation.UNKNOWN) & (pairs["initialization"] != InitRelation.SAME_RUN)
    ]
    if pairs.empty:
        return None
    return str(pairs.iloc[0]["a"]), str(pairs.iloc[0]["b"])


def drawn_pairs(study: Study) -> dict[str, tuple[str, str]]:
    """Return the pairs whose heat-maps are drawn, by what they show; empty without pairs."""
    candidates = {"ranks": rank_pair(study), "seeds": seed_pair(study)}
    chosen = {name: pair for name, pair in candidates.items() if pair is not None}
    if not chosen and (other := any_pair(study)) is not None:
        chosen["pair"] = other
    return chosen


def modules_far_from_median(study: Study, a: str, b: str, count: int) -> list[str]:
    """Return the modules whose overlap is farthest from the pair's median, in both directions.

    The overlap is the excess of φ(r, r) on the output side, which a shared initialization does not
    affect. The largest alone would be those that chance or an artifact made large.
    """
    table = study.similarities
    rows = table[table["a"].isin([a, b]) & table["b"].isin([a, b]) & (table["side"] == "output")]
    values = rows.set_index("module")["excess_r_r"].dropna()
    far = (values - values.median()).abs().sort_values(ascending=False, kind="stable")
    return list(far.index[:count])


def short_name(module: str) -> str:
    """Return ``"q_proj, layer 2"`` for a module name, or the name if it has neither."""
    layer, kind = layer_index(module), module_type(module)
    return f"{kind}, layer {layer}" if layer is not None and kind != NO_TYPE else module
