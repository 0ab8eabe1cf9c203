"""The tables of pairs, column by column from what the walk gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lora_analysis import chance
from lora_analysis.patterns import layer_index, module_type
from lora_analysis.shared_init import SharedInit, classify_init
from lora_analysis.spectra import SIDES
from lora_analysis.studies.rows import PAIR_COLUMNS, SIMILARITY_COLUMNS
from lora_analysis.studies.walk import Group, Walk

Columns = dict[str, NDArray[Any]]


def pair_tables(walk: Walk) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the summary of every pair, and one row per pair, module and side."""
    lost = {at for at, adapter in enumerate(walk.adapters) if adapter.label in walk.failed}
    kept = [at for at, pair in enumerate(walk.pairs) if lost.isdisjoint(pair.tolist())]
    table = _similarities(walk, np.array(kept, dtype=np.intp))
    starts = [_start(walk, at, table) for at in kept]
    summaries = [_summary(walk, at, start) for at, start in zip(kept, starts, strict=True)]
    by_pair = dict(zip(kept, starts, strict=True))
    table["initialization"] = [by_pair[at].kind for at in table["pair"]]
    table["shared_init"] = np.array(
        [
            by_pair[at].contaminates_input or module in by_pair[at].modules
            for at, module in zip(table["pair"], table["module"], strict=True)
        ],
        # Without rows the column would hold objects, and a selection by it would choose columns.
        dtype=bool,
    )
    similarities = table.reindex(columns=list(SIMILARITY_COLUMNS))
    return pd.DataFrame(summaries, columns=PAIR_COLUMNS), similarities


def _similarities(walk: Walk, kept: NDArray[np.intp]) -> pd.DataFrame:
    """Return the rows, pair by pair, then module by module, the input side first."""
    parts = [
        part
        for visit in walk.visits
        for group in visit.groups
        for part in _group_columns(walk, kept, group)
    ]
    if not parts:
        return pd.DataFrame(columns=["pair", *SIMILARITY_COLUMNS])
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    table = pd.DataFrame(columns)
    table = table.iloc[np.argsort(columns["pair"], kind="stable")].reset_index(drop=True)
    table["p_r_r"] = _p_values(table)
    # One value per module, of one pair and one side: never over (i, j), whose cells are nested.
    table["q_r_r"] = table.groupby(["pair", "side"])["p_r_r"].transform(
        lambda values: chance.benjamini_hochberg(values.to_numpy())
    )
    return table


def _group_columns(walk: Walk, kept: NDArray[np.intp], group: Group) -> list[Columns]:
    """Return the columns of both sides for the pairs whose two updates are here and trained."""
    pairs = group.pairs
    i, j = group.place[walk.pairs[kept]].T
    here = (i >= 0) & (j >= 0)
    here &= (pairs.ranks[i] > 0) & (pairs.ranks[j] > 0)
    at, i, j = kept[here], i[here], j[here]
    labels = np.array([adapter.label for adapter in walk.adapters], dtype=object)
    relations = np.array(walk.relations, dtype=object)
    count, layer = len(at), layer_index(pairs.module)

    def all_equal(value: object) -> NDArray[np.object_]:
        return np.full(count, value, dtype=object)

    common: Columns = {
        "pair": at,
        "a": labels[walk.pairs[at, 0]],
        "b": labels[walk.pairs[at, 1]],
        "relation": relations[at],
        "module": all_equal(pairs.module),
        "module_type": all_equal(module_type(pairs.module)),
        "layer": all_equal(layer) if layer is None else np.full(count, layer),
        "rank_a": pairs.ranks[i],
        "rank_b": pairs.ranks[j],
        "degeneracy_1_1": _worse(group.degeneracy[i], group.degeneracy[j]),
        "signed_cosine": pairs.cosine[i, j],
    }
    found = []
    for side, angles in zip(SIDES, group.angles, strict=True):
        values = pairs.sides[side]
        found.append(
            common
            | {
                "side": all_equal(side),
                "dimension": np.full(count, values.dimension),
                "phi_1_1": values.phi_1_1[i, j],
                "chance_1_1": np.full(count, 1 / values.dimension),
                "phi_r_r": values.phi_r_r[i, j],
                "chance_r_r": values.chance_r_r[i, j],
                "excess_r_r": values.excess_r_r[i, j],
                "omega": values.omega[i, j],
                "chance_omega": values.chance_omega[i, j],
                "smallest_angle": angles[0][i, j],
                "largest_angle": angles[1][i, j],
            }
        )
    return found


def _worse(a: NDArray[np.object_], b: NDArray[np.object_]) -> NDArray[np.object_]:
    both = np.where(
        (a == "nearly degenerate") | (b == "nearly degenerate"), "nearly degenerate", ""
    )
    worst: NDArray[np.object_] = np.where(
        (a == "degenerate") | (b == "degenerate"), "degenerate", both
    )
    return worst.astype(object)


def _p_values(table: pd.DataFrame) -> NDArray[np.float64]:
    """Return P(φ_null(r, r) ≥ φ) of isotropic subspaces, dimension by dimension."""
    found = np.full(len(table), np.nan)
    for dimension, rows in table.groupby("dimension").indices.items():
        own = table.iloc[rows]
        found[rows] = chance.similarity_p_value(
            int(dimension),
            own["rank_a"].to_numpy(),
            own["rank_b"].to_numpy(),
            own["phi_r_r"].to_numpy(),
        )
    return found


def _groups(walk: Walk, at: int) -> list[tuple[Group, int, int]]:
    """Return the groups that hold both adapters of a pair, and their places there."""
    a, b = walk.pairs[at]
    groups = (group for visit in walk.visits for group in visit.groups)
    return [
        (group, int(group.place[a]), int(group.place[b]))
        for group in groups
        if group.place[a] >= 0 and group.place[b] >= 0
    ]


def _start(walk: Walk, at: int, table: pd.DataFrame) -> SharedInit:
    """Return the verdict on a pair's start; wide adapters fill the space by chance."""
    a, b = walk.pairs[at]
    starts = [group.start(a, b) for group, _, _ in _groups(walk, at)]
    low, high = np.searchsorted(table["pair"].to_numpy(dtype=np.intp), [at, at + 1])
    own = table.iloc[low:high]
    spans = own[(own["side"] == "input") & (own["chance_r_r"] <= 0.35)]["phi_r_r"]
    return classify_init([start for start in starts if start is not None], spans.to_numpy())


def _summary(walk: Walk, at: int, start: SharedInit) -> dict[str, Any]:
    a, b = walk.pairs[at]
    groups = _groups(walk, at)
    both = sum(
        any(group.place[a] >= 0 for group in visit.groups)
        and any(group.place[b] >= 0 for group in visit.groups)
        for visit in walk.visits
    )
    return {
        "a": walk.adapters[a].label,
        "b": walk.adapters[b].label,
        "relation": walk.relations[at],
        "modules": len(groups),
        "mismatched_modules": both - len(groups),
        "initialization": start.kind,
        "shared_init_modules": len(start.modules),
        "b_cosine": start.other_cosine,
        "total_cosine": _total_cosine(groups),
    }


def _total_cosine(groups: Sequence[tuple[Group, int, int]]) -> float:
    """Return the signed cosine of two updates over all modules in which both are trained."""
    found = [
        (group.pairs.cosine[i, j], group.pairs.norms[i], group.pairs.norms[j])
        for group, i, j in groups
        if not np.isnan(group.pairs.cosine[i, j])
    ]
    if not found:
        return float("nan")
    cosine, one, two = np.array(found).T
    return float(cosine @ (one * two) / (np.linalg.norm(one) * np.linalg.norm(two)))
