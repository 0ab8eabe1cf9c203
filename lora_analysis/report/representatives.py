"""The pairs and modules that a report draws, few and the same ones every time, and their changes.

The change of a module is ‖ΔW‖/‖W‖ if a base is given, else ‖ΔW‖.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from lora_analysis.blocks import forward_order, locate_module, short_names
from lora_analysis.studies import Relation
from lora_analysis.studies.base_models import bases_of, per_base, several_bases
from lora_analysis.studies.pair_classes import Exclusion, PairClass
from lora_analysis.text import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_analysis.spectra import Side
    from lora_analysis.studies import Study


# The smaller rank of the paper's Figure 3.
SMALL_RANK = 8
# Names of query and value projections; a model has at most one of each.
_PAPER_TYPES = (
    "q_proj", "query", "q", "to_q", "wq", "q_lin", "v_proj", "value", "v", "to_v", "wv", "v_lin",
)  # fmt: skip


def representative_modules(names: Sequence[str], count: int = 2) -> list[str]:
    """Return one middle-layer module of each of ``count`` types.

    Queries and values, which the paper adapts, if there are any, else the first types in order. Of
    an image model, types of the first component (the denoiser). With a single type (or names
    without one), neighbors in the middle are returned.
    """
    ordered = forward_order(names)
    by_type: dict[str, list[str]] = {}
    for name in ordered:
        where = locate_module(name)
        if where.component == locate_module(ordered[0]).component:
            by_type.setdefault(where.name, []).append(name)
    if len(by_type) >= count:
        # The first attention of an image model has the first name that ends so.
        ends = {kind.rpartition(".")[2]: kind for kind in reversed(by_type)}
        first = [ends[end] for end in _PAPER_TYPES if end in ends]
        order = dict.fromkeys([*(first if len(first) > 1 else ()), *by_type])
        return [by_type[kind][len(by_type[kind]) // 2] for kind in list(order)[:count]]
    start = max(0, (len(ordered) - count) // 2)
    return ordered[start : start + count]


def module_titles(study: Study) -> dict[str, str]:
    """Return a short title of every module of a study, the same one everywhere."""
    return short_names(study.spectra["module"])


def common_modules(study: Study, a: str, b: str) -> list[str]:
    """Return the modules in which both adapters are trained and can be compared."""
    table = study.similarities
    if table.empty:
        return []
    pair = table["a"].isin([a, b]) & table["b"].isin([a, b])
    return list(table.loc[pair & (table["side"] == "input"), "module"])


@dataclass(frozen=True, slots=True)
class DrawnPair:
    """A pair whose heat-maps are drawn, with the unrelated pair that it is compared with.

    Attributes
    ----------
    a, b
        Labels, the smaller rank first.
    relation
        What the two adapters are, in words.
    unrelated
        Labels of an unrelated pair of the same ranks in the same order; None without one.
    """

    a: str
    b: str
    relation: str
    unrelated: tuple[str, str] | None

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The pair itself, then the unrelated one."""
        return ((self.a, self.b), *([self.unrelated] if self.unrelated else []))


def _with_ranks(study: Study) -> pd.DataFrame:
    """Return the pairs that share a trained module, with the rank of either adapter."""
    if study.similarities.empty:
        return pd.DataFrame()
    compared = study.similarities[["a", "b"]].drop_duplicates()
    ranks = study.spectra.groupby("adapter")["rank"].max()
    pairs = study.pairs.merge(compared, on=["a", "b"])
    return pairs.assign(rank_a=pairs["a"].map(ranks), rank_b=pairs["b"].map(ranks))


def _build_drawn_pair(pairs: pd.DataFrame, best: pd.Series, relation: str) -> DrawnPair:
    a, b = _in_rank_order(best)
    # The unrelated pair of these ranks whose T is the median is a typical one; pairs with one of
    # the two adapters come first.
    without = {a, b}
    low, high = sorted((best["rank_a"], best["rank_b"]))
    rows = pairs[
        (pairs["population_output"] == "unrelated")
        & ~(pairs["a"].isin(without) & pairs["b"].isin(without))
        & (pairs[["rank_a", "rank_b"]].min(axis=1) == low)
        & (pairs[["rank_a", "rank_b"]].max(axis=1) == high)
    ]
    shared = rows[rows["a"].isin(without) | rows["b"].isin(without)]
    rows = shared if len(shared) else rows
    if rows.empty:
        unrelated = None
    else:
        order = rows["mean_excess_output"].sort_values(kind="stable").index
        unrelated = _in_rank_order(rows.loc[order[(len(order) - 1) // 2]])
    return DrawnPair(a, b, relation, unrelated)


def _in_rank_order(pair: pd.Series) -> tuple[str, str]:
    a, b = str(pair["a"]), str(pair["b"])
    return (a, b) if pair["rank_a"] <= pair["rank_b"] else (b, a)


def rank_pair(study: Study) -> DrawnPair | None:
    """Return the pair for the figure of ranks, smaller rank first; None if all ranks are equal.

    Replicates lead, then pairs of one seed; pairs of unknown relation are last, whatever their
    ranks. The largest rank is compared with the one closest to 8.
    """
    pairs = _with_ranks(study)
    if pairs.empty:
        return None
    # Different seeds first: with one seed, both adapters saw their data in one order.
    preference = {
        PairClass.REPLICATE: "same task, different seeds",
        PairClass.SHARED_INIT: "same task, shared initialization",
        PairClass.SAME_DATA_ORDER: "same task and seed, so the same order of data",
        PairClass.UNKNOWN: "relation unknown",
    }
    of_task = pairs["relation"].isin(
        [Relation.OTHER_RANK, Relation.OTHER_RANK_AND_SEED, Relation.UNKNOWN]
    )
    chosen = pairs[
        pairs["pair_class"].isin(list(preference)) & of_task & (pairs["rank_a"] != pairs["rank_b"])
    ]
    if chosen.empty:
        return None
    low = chosen[["rank_a", "rank_b"]].min(axis=1)
    high = chosen[["rank_a", "rank_b"]].max(axis=1)
    classes = list(preference)
    order = pd.DataFrame(
        {
            # The section is about ranks of one task, which unrelated adapters cannot show.
            "unknown": chosen["pair_class"] == PairClass.UNKNOWN,
            "high": -high,
            "distance": (low - SMALL_RANK).abs(),
            "class": [classes.index(value) for value in chosen["pair_class"]],
        },
        index=chosen.index,
    )
    best = chosen.loc[order.sort_values(list(order), kind="stable").index[0]]
    return _build_drawn_pair(pairs, best, preference[best["pair_class"]])


def seed_pair(study: Study) -> DrawnPair | None:
    """Return two seeds of one task and rank; None if no task has two.

    Of several ranks, the largest of which there is an unrelated pair to compare with.
    """
    pairs = _with_ranks(study)
    if pairs.empty:
        return None
    chosen = pairs[
        (pairs["population_output"] == "replicate") & (pairs["rank_a"] == pairs["rank_b"])
    ].sort_values("rank_a", ascending=False, kind="stable")
    relation = "same task, different seeds"
    drawn = [
        _build_drawn_pair(pairs, of_rank.iloc[0], relation)
        for _, of_rank in chosen.groupby("rank_a", sort=False)
    ]
    return next((pair for pair in drawn if pair.unrelated), drawn[0] if drawn else None)


def choose_drawn_pairs(study: Study) -> dict[str, DrawnPair]:
    """Return the pairs whose heat-maps are drawn, by what they show; empty without pairs."""
    candidates = {"ranks": rank_pair(study), "seeds": seed_pair(study)}
    chosen = {name: pair for name, pair in candidates.items() if pair is not None}
    pairs = _with_ranks(study)
    if not chosen and not pairs.empty:
        # Two adapters of unknown relation, else the first pair.
        unknown = pairs[pairs["pair_class"] == PairClass.UNKNOWN]
        if unknown.empty:
            best = pairs.iloc[0]
            chosen["pair"] = _build_drawn_pair(pairs, best, str(best["pair_class"]))
        else:
            chosen["pair"] = _build_drawn_pair(pairs, unknown.iloc[0], "relation unknown")
    return chosen


@dataclass(frozen=True, slots=True, eq=False)
class ModulePopulation:
    """Values of one population of pairs on one base, pooled per module on one side.

    Attributes
    ----------
    name
        What the pairs are, with their number, in words.
    base
        The base model, if the study has several.
    excess
        Median over the pairs of the excess of ω, by module.
    rows
        The rows of ``Study.similarities`` behind it.
    is_unrelated
        Whether the pairs are unrelated ones.
    """

    name: str
    base: str | None
    excess: pd.Series
    rows: pd.DataFrame
    is_unrelated: bool


def module_populations(study: Study, side: Side) -> list[list[ModulePopulation]]:
    """Return the populations that are shown per module, the first one leading, base by base.

    Replicates and unrelated pairs; without replicates pairs of unknown relation; else all pairs.
    """
    rows = study.similarities
    rows = rows[(rows["side"] == side) & rows["usable"].astype(bool)]
    result = []
    for base, of_base in per_base(study, rows):
        choices = {
            "{count} {pairs} of one task, different seeds": of_base["population"] == "replicate",
            "{count} {pairs} of unknown relation": of_base["pair_class"] == PairClass.UNKNOWN,
            "{count} unrelated {pairs}": of_base["population"] == "unrelated",
        }
        names = [name for name, chosen in choices.items() if chosen.any()]
        if len(names) == 3:
            names.pop(1)
        if not names:
            choices, names = {"{count} {pairs}": of_base["pair_class"] != ""}, ["{count} {pairs}"]
        populations = []
        for name in names:
            pooled = of_base[choices[name]]
            count = pooled.groupby(["a", "b"]).ngroups
            words = name.format(count=count, pairs="pair" if count == 1 else "pairs")
            excess = pooled.groupby("module", sort=False)["excess_omega"].median()
            is_unrelated = "unrelated" in name
            populations.append(ModulePopulation(words, base or None, excess, pooled, is_unrelated))
        result.append(populations)
    return result


def modules_far_from_median(excess: pd.Series, count: int) -> list[str]:
    """Return the modules whose overlap is farthest from the median, in both directions.

    The largest alone would be those that chance or an artifact made large.
    """
    values = excess.dropna()
    far = (values - values.median()).abs().sort_values(ascending=False, kind="stable")
    return list(far.index[:count])


@dataclass(frozen=True, slots=True, eq=False)
class ModuleChanges:
    """Size of the update of each module.

    Attributes
    ----------
    values
        Median over the adapters, by module in the order of the model.
    symbol
        ``"‖ΔW‖/‖W‖"`` or ``"‖ΔW‖"``.
    of
        The adapters behind the medians, in words.
    note
        What limits the comparison between modules; "" if nothing does.
    """

    values: pd.Series
    symbol: str
    of: str
    note: str


def module_changes(study: Study) -> ModuleChanges | None:
    """Return the size of the update of each module; None without a trained module.

    Adapters of one base, without references, earlier checkpoints and repeated copies; of several
    bases, the one with most adapters.
    """
    excluded = study.runs.loc[
        study.runs["excluded"].isin([Exclusion.EARLIER, Exclusion.ONE_SAMPLE, Exclusion.UNTRAINED]),
        "adapter",
    ]
    without = {*excluded, *study.reference}
    symbol, table = "‖ΔW‖", study.spectra[["adapter", "module", "norm"]]
    relative = study.amplifications
    if len(relative):
        relative = relative[relative["at_rank"]]
        symbol, table = "‖ΔW‖/‖W‖", relative[["adapter", "module", "relative_norm"]]
    table = table.set_axis(["adapter", "module", "value"], axis=1)
    table = table[~table["adapter"].isin(without)].dropna()
    if table.empty:
        return None
    of = ""
    if several_bases(study):
        bases = table["adapter"].map(
            dict(zip(study.runs["adapter"], bases_of(study, study.runs["adapter"]), strict=True))
        )
        base = bases.mode().iloc[0]
        table, of = table[bases == base], f" on {base}"
    unknown = study.spectra.loc[
        study.spectra["adapter"].isin(table["adapter"]), "in_units_of_scale"
    ].any()
    notes = [
        " ‖ΔW‖ grows with the size of a module; with base weights (--base) it is divided by ‖W‖."
        if symbol == "‖ΔW‖"
        else "",
        " The scale of some adapters is unknown: their values are in units of it."
        if unknown
        else "",
    ]
    return ModuleChanges(
        values=table.groupby("module", sort=False)["value"].median(),
        symbol=symbol,
        of=f"{plural(table['adapter'].nunique(), 'adapter')}{of}",
        note="".join(notes),
    )
