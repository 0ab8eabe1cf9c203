"""The tables of pairs, assembled column by column from the results of all modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from lora_analysis import chance
from lora_analysis.patterns import layer_index, module_type
from lora_analysis.shared_init import SharedInit, classify_init
from lora_analysis.spectra import SIDES
from lora_analysis.studies.table_rows import PAIR_COLUMNS, SIMILARITY_COLUMNS, Degeneracy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.studies.module_analysis import ModuleResult, PairGroup
    from lora_analysis.studies.spec import OpenStudy

    Columns = dict[str, NDArray[Any]]


def pair_tables(
    study: OpenStudy, results: Sequence[ModuleResult], failed: frozenset[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of pairs, and the table with one row per pair, module and side.

    Parameters
    ----------
    study
        The adapters and their pairs.
    results
        The results of all modules.
    failed
        Labels of adapters that are left out.
    """
    labels = np.array([adapter.label for adapter in study.adapters], dtype=object)
    readable = np.array([label not in failed for label in labels], dtype=bool)
    chosen = np.flatnonzero(readable[study.pairs.pairs].all(axis=1))
    table = _similarities(study, labels, results, chosen)
    # Rows of one pair are adjacent, in the order of the pairs.
    starts = np.searchsorted(table["pair"].to_numpy(dtype=np.intp), [*chosen, len(readable) ** 2])
    summaries, initializations, shared = [], [], []
    for position, (pair, first) in enumerate(zip(chosen.tolist(), starts[:-1], strict=True)):
        rows = table.iloc[first : starts[position + 1]]
        common = _common_groups(results, *study.pairs.pairs[pair])
        init = _shared_init(common, rows)
        summaries.append(_summary(study, results, common, pair, init))
        initializations += [init.kind] * len(rows)
        shared += [init.contaminates_input or m in init.modules for m in rows["module"]]
    table["initialization"] = initializations
    # Without rows the column would hold objects, and a selection by it would choose columns.
    table["shared_init"] = np.array(shared, dtype=bool)
    similarities = table.reindex(columns=list(SIMILARITY_COLUMNS))
    return pd.DataFrame(summaries, columns=PAIR_COLUMNS), similarities


def _similarities(
    study: OpenStudy,
    labels: NDArray[np.object_],
    results: Sequence[ModuleResult],
    chosen: NDArray[np.intp],
) -> pd.DataFrame:
    """Return the rows, pair by pair, then module by module, the input side first."""
    parts = [
        part
        for result in results
        for group in result.groups
        for part in _group_columns(study, labels, chosen, group)
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


def _group_columns(
    study: OpenStudy, labels: NDArray[np.object_], chosen: NDArray[np.intp], group: PairGroup
) -> list[Columns]:
    """Return the columns of both sides for the pairs in a group whose updates are trained."""
    pairs = group.pairs
    i, j = group.index[study.pairs.pairs[chosen]].T
    compared = (i >= 0) & (j >= 0)
    compared &= (pairs.ranks[i] > 0) & (pairs.ranks[j] > 0)
    rows, i, j = chosen[compared], i[compared], j[compared]
    count, layer = len(rows), layer_index(pairs.module)

    def constant(value: object) -> NDArray[np.object_]:
        return np.full(count, value, dtype=object)

    common: Columns = {
        "pair": rows,
        "a": labels[study.pairs.pairs[rows, 0]],
        "b": labels[study.pairs.pairs[rows, 1]],
        "relation": np.array(study.pairs.relations, dtype=object)[rows],
        "module": constant(pairs.module),
        "module_type": constant(module_type(pairs.module)),
        "layer": constant(layer) if layer is None else np.full(count, layer),
        "rank_a": pairs.ranks[i],
        "rank_b": pairs.ranks[j],
        "degeneracy_1_1": _worse(group.degeneracy[i], group.degeneracy[j]),
        "signed_cosine": pairs.cosine[i, j],
    }
    both_sides = []
    for side, angles in zip(SIDES, group.angles, strict=True):
        values = pairs.sides[side]
        both_sides.append(
            common
            | {
                "side": constant(side),
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
    return both_sides


def _worse(a: NDArray[np.object_], b: NDArray[np.object_]) -> NDArray[np.object_]:
    """Return the worse degeneracy of each pair."""
    worst = np.full(len(a), Degeneracy.NONE, dtype=object)
    for level in (Degeneracy.NEARLY, Degeneracy.FULL):
        worst[(a == level) | (b == level)] = level
    return worst


def _p_values(table: pd.DataFrame) -> NDArray[np.float64]:
    """Return P(φ_null(r, r) ≥ φ) of isotropic subspaces, computed per dimension."""
    p = np.full(len(table), np.nan)
    for dimension, indices in table.groupby("dimension").indices.items():
        rows = table.iloc[indices]
        p[indices] = chance.similarity_p_value(
            int(dimension),
            rows["rank_a"].to_numpy(),
            rows["rank_b"].to_numpy(),
            rows["phi_r_r"].to_numpy(),
        )
    return p


class _Common(NamedTuple):
    """A group that contains both adapters of a pair, and their rows in it."""

    group: PairGroup
    i: int
    j: int


def _common_groups(results: Sequence[ModuleResult], a: int, b: int) -> list[_Common]:
    """Return the groups of all modules that both adapters have in one shape."""
    return [
        _Common(group, int(group.index[a]), int(group.index[b]))
        for result in results
        for group in result.groups
        if group.index[a] >= 0 and group.index[b] >= 0
    ]


def _shared_init(common: Sequence[_Common], rows: pd.DataFrame) -> SharedInit:
    """Return the relation of the initializations of a pair."""
    inits = [init for group, i, j in common if (init := group.init(i, j)) is not None]
    # Subspaces of ranks close to the dimension overlap by chance.
    narrow = rows[(rows["side"] == "input") & (rows["chance_r_r"] <= 0.35)]
    return classify_init(inits, narrow["phi_r_r"].to_numpy())


def _summary(
    study: OpenStudy,
    results: Sequence[ModuleResult],
    common: Sequence[_Common],
    pair: int,
    init: SharedInit,
) -> dict[str, Any]:
    a, b = study.pairs.pairs[pair]
    in_both = sum(
        any(group.index[a] >= 0 for group in result.groups)
        and any(group.index[b] >= 0 for group in result.groups)
        for result in results
    )
    return {
        "a": study.adapters[a].label,
        "b": study.adapters[b].label,
        "relation": study.pairs.relations[pair],
        "modules": len(common),
        "mismatched_modules": in_both - len(common),
        "initialization": init.kind,
        "shared_init_modules": len(init.modules),
        "b_cosine": init.other_cosine,
        "total_cosine": _total_cosine(common),
    }


def _total_cosine(common: Sequence[_Common]) -> float:
    """Return the signed cosine of two updates over all modules in which both are trained."""
    values = [
        (group.pairs.cosine[i, j], group.pairs.norms[i], group.pairs.norms[j])
        for group, i, j in common
        if not np.isnan(group.pairs.cosine[i, j])
    ]
    if not values:
        return float("nan")
    cosine, norms_a, norms_b = np.array(values).T
    norms = np.linalg.norm(norms_a) * np.linalg.norm(norms_b)
    return float(cosine @ (norms_a * norms_b) / norms)
