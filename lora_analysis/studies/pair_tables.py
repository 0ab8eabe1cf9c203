"""The tables of pairs, assembled column by column from the results of all modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd

from lora_analysis import chance
from lora_analysis.blocks import locate_module
from lora_analysis.chance.moments import Energies
from lora_analysis.shared_init import InitRelation, SharedInit, classify_init
from lora_analysis.spectra import SIDES, Side
from lora_analysis.studies.base_identity import resolve_keys
from lora_analysis.studies.pair_classes import (
    COPY_COSINE,
    ClassifiedPair,
    Exclusion,
    ModuleExclusion,
    PairClass,
    PairEvidence,
    classify_pairs,
    one_sample_exclusions,
)
from lora_analysis.studies.relations import ACROSS_BASES, earlier_checkpoints
from lora_analysis.studies.table_rows import PAIR_COLUMNS, SIMILARITY_COLUMNS, DegeneracyLevel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.studies.module_analysis import ModuleResult, PairGroup
    from lora_analysis.studies.spec import OpenStudy

    Columns = dict[str, NDArray[Any]]

# Random baseline of ω from which a module has no room for two updates to differ.
MOST_CHANCE: Final = 0.25


class PairTables(NamedTuple):
    """The tables of pairs, and what they leave out.

    Attributes
    ----------
    pairs, similarities
        One row per pair; one row per pair, module and side.
    exclusions
        Why all pairs of an adapter are left out of every population, by label.
    left_out
        Modules that are not usable, with the reason, per side.
    """

    pairs: pd.DataFrame
    similarities: pd.DataFrame
    exclusions: Mapping[str, Exclusion]
    left_out: Mapping[Side, Mapping[str, ModuleExclusion]]


def pair_tables(
    study: OpenStudy, results: Sequence[ModuleResult], failed: frozenset[str]
) -> PairTables:
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
    similarities = _similarities(study, labels, results, chosen)
    # Rows of one pair are adjacent, in the order of the pairs.
    starts = np.searchsorted(
        similarities["pair"].to_numpy(dtype=np.intp), [*chosen, len(readable) ** 2]
    )
    summaries, inits = _summarize_pairs(study, results, chosen, similarities, starts)
    bases = pair_bases(study, chosen)
    evidence = [
        _pair_evidence(study, pair, summary, init)
        for pair, summary, init in zip(chosen.tolist(), summaries, inits, strict=True)
    ]
    classes = _classify_by_base(evidence, bases)
    exclusions = _exclude_adapters(study, results, chosen, classes)
    is_excluded = [
        not exclusions.keys().isdisjoint(labels[study.pairs.pairs[pair]]) for pair in chosen
    ]
    populations = {
        side: [
            "" if excluded else classified.populations[side]
            for excluded, classified in zip(is_excluded, classes, strict=True)
        ]
        for side in SIDES
    }
    owner = np.repeat(np.arange(len(chosen)), np.diff(starts))
    _add_pair_columns(similarities, owner, inits, classes, populations)
    # Modules that leave the input side of all pairs, see `usable_modules`.
    shared = [
        frozenset(init.modules)
        if init.kind is InitRelation.PARTLY_SHARED and not excluded
        else frozenset()
        for init, excluded in zip(inits, is_excluded, strict=True)
    ]
    # An adapter without a module decides nothing if it is excluded for that reason.
    not_deciding = (Exclusion.UNTRAINED, Exclusion.OTHER_MODULES)
    deciding = frozenset(label for label in labels if exclusions.get(label) not in not_deciding)
    left_out = _add_usable(similarities, owner, bases, shared, deciding)
    pairs = pd.DataFrame(summaries)
    pairs["pair_class"] = [classified.pair_class for classified in classes]
    for side in SIDES:
        pairs[f"population_{side}"] = populations[side]
    _add_statistics(pairs, similarities, chosen)
    return PairTables(
        pairs.reindex(columns=list(PAIR_COLUMNS)),
        similarities.reindex(columns=list(SIMILARITY_COLUMNS)),
        exclusions,
        left_out,
    )


def _classify_by_base(
    evidence: Sequence[PairEvidence], bases: Mapping[str, Sequence[int]]
) -> list[ClassifiedPair]:
    """Return the class of each pair; the pairs of one base are decided together."""
    classes = [ClassifiedPair(PairClass.UNKNOWN)] * len(evidence)
    for positions in bases.values():
        of_base = classify_pairs([evidence[position] for position in positions])
        for position, classified in zip(positions, of_base, strict=True):
            classes[position] = classified
    return classes


def _add_pair_columns(
    similarities: pd.DataFrame,
    owner: NDArray[np.intp],
    inits: Sequence[SharedInit],
    classes: Sequence[ClassifiedPair],
    populations: Mapping[Side, Sequence[str]],
) -> None:
    """Add what holds for all modules of a pair to the rows of its modules.

    ``owner`` is the position of the pair of each row.
    """

    def repeat_per_row(values: Sequence[object]) -> NDArray[np.object_]:
        column = np.empty(len(values), dtype=object)
        column[:] = values
        return column[owner]

    modules = [frozenset(init.modules) for init in inits]
    similarities["initialization"] = repeat_per_row([init.kind for init in inits])
    # Without rows the column would hold objects, and a selection by it would choose columns.
    similarities["shared_init"] = np.array(
        [
            inits[pair].contaminates_input or module in modules[pair]
            for pair, module in zip(owner, similarities["module"], strict=True)
        ],
        dtype=bool,
    )
    similarities["pair_class"] = repeat_per_row([classified.pair_class for classified in classes])
    similarities["population"] = np.where(
        similarities["side"] == "input",
        repeat_per_row(populations["input"]),
        repeat_per_row(populations["output"]),
    )


def _add_usable(
    similarities: pd.DataFrame,
    owner: NDArray[np.intp],
    bases: Mapping[str, Sequence[int]],
    shared: Sequence[frozenset[str]],
    deciding: frozenset[str],
) -> dict[Side, dict[str, ModuleExclusion]]:
    """Add the column ``usable``, base by base, and return the modules that are not, per side.

    Parameters
    ----------
    similarities, owner
        The rows of all pairs, and the position of the pair of each row.
    bases
        Positions of the pairs of each base.
    shared
        Modules of each pair with a shared initialization, if the others of the pair have none.
    deciding
        Labels of the adapters that must have a module.
    """
    left_out: dict[Side, dict[str, ModuleExclusion]] = {side: {} for side in SIDES}
    usable = np.zeros(len(similarities), dtype=bool)
    for positions in bases.values():
        rows = np.flatnonzero(np.isin(owner, positions))
        table = similarities.iloc[rows]
        of_base = frozenset().union(*(shared[position] for position in positions))
        modules = usable_modules(table, deciding, of_base)
        usable[rows] = [
            module in modules.usable[side]
            for side, module in zip(table["side"], table["module"], strict=True)
        ]
        for side in SIDES:
            left_out[side] |= modules.left_out[side]
    similarities["usable"] = usable
    return left_out


def _add_statistics(
    pairs: pd.DataFrame, similarities: pd.DataFrame, chosen: NDArray[np.intp]
) -> None:
    """Add T of each pair, the number of modules behind it, and the median signed cosine."""
    for side in SIDES:
        rows = similarities[similarities["usable"] & (similarities["side"] == side)]
        by_pair = rows.groupby("pair")["excess_omega"]
        pairs[f"usable_{side}"] = by_pair.size().reindex(chosen, fill_value=0).to_numpy()
        pairs[f"mean_excess_{side}"] = by_pair.mean().reindex(chosen).to_numpy(dtype=np.float64)
    cosines = similarities[similarities["side"] == "output"].groupby("pair")["signed_cosine"]
    pairs["median_cosine"] = cosines.median().reindex(chosen).to_numpy(dtype=np.float64)


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
    # What follows from other columns, for all modules at once.
    a, b = (
        Energies(energies[:, :3].T, energies[:, 3])
        for energies in (columns.pop("energies_a"), columns.pop("energies_b"))
    )
    columns["chance_1_1"] = 1 / columns["dimension"]
    for name in ("r_r", "omega"):
        value = columns["phi_r_r" if name == "r_r" else name]
        columns[f"excess_{name}"] = chance.excess(value, columns[f"chance_{name}"])
    p_values = chance.energy_overlap_p_values(columns["dimension"], a, b, columns["omega"])
    columns["p_omega"], columns["p_is_bound"] = p_values, chance.p_is_bound(p_values)
    table = pd.DataFrame(columns)
    table = table.iloc[np.argsort(columns["pair"], kind="stable")].reset_index(drop=True)
    # One value per module, of one pair and one side: never over (i, j), whose cells are nested.
    table["q_omega"] = table.groupby(["pair", "side"])["p_omega"].transform(
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
    count, where = len(rows), locate_module(pairs.module)

    def constant(value: object) -> NDArray[np.object_]:
        return np.full(count, value, dtype=object)

    energies = np.column_stack([*group.energies.sums, group.energies.largest])  # (N, 4)
    a = group.degeneracy[i]
    b = group.degeneracy[j]
    worst = np.full(len(a), DegeneracyLevel.NONE, dtype=object)
    for level in (DegeneracyLevel.NEARLY, DegeneracyLevel.FULL):
        worst[(a == level) | (b == level)] = level
    common: Columns = {
        "energies_a": energies[i],
        "energies_b": energies[j],
        "pair": rows,
        "a": labels[study.pairs.pairs[rows, 0]],
        "b": labels[study.pairs.pairs[rows, 1]],
        "relation": np.array(study.pairs.relations, dtype=object)[rows],
        "module": constant(pairs.module),
        "module_type": constant(where.name),
        "layer": constant(None) if where.number is None else np.full(count, where.number),
        "rank_a": pairs.directions[i, j],
        "rank_b": pairs.directions[j, i],
        "degeneracy_1_1": worst,
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
                "phi_r_r": values.phi_r_r[i, j],
                "chance_r_r": values.chance_r_r[i, j],
                "omega": values.omega[i, j],
                "chance_omega": values.chance_omega[i, j],
                "smallest_angle": angles[0][i, j],
                "largest_angle": angles[1][i, j],
            }
        )
    return both_sides


class _Common(NamedTuple):
    """A group that contains both adapters of a pair, and their rows in it."""

    group: PairGroup
    i: int
    j: int


def _summarize_pairs(
    study: OpenStudy,
    results: Sequence[ModuleResult],
    chosen: NDArray[np.intp],
    similarities: pd.DataFrame,
    starts: NDArray[np.intp],
) -> tuple[list[dict[str, Any]], list[SharedInit]]:
    """Return a row for each chosen pair, and the relation of its initializations.

    The rows of ``similarities`` of the pair at one position begin at ``starts``.
    """
    # The groups of each adapter, module by module.
    groups: dict[int, list[PairGroup]] = {}
    for result in results:
        for group in result.groups:
            for position in np.flatnonzero(group.index >= 0).tolist():
                groups.setdefault(position, []).append(group)
    summaries, inits = [], []
    for position, pair in enumerate(chosen.tolist()):
        a, b = study.pairs.pairs[pair]
        # Modules that both adapters have in one shape.
        common = [
            _Common(group, int(group.index[a]), int(group.index[b]))
            for group in groups.get(a, ())
            if group.index[b] >= 0
        ]
        evidence = [init for group, i, j in common if (init := group.init(i, j)) is not None]
        rows = similarities.iloc[starts[position] : starts[position + 1]]
        # Subspaces of ranks close to the dimension overlap by chance.
        narrow = rows[(rows["side"] == "input") & (rows["chance_r_r"] <= 0.35)]
        same_task = _states_same(study, pair, "task")
        differ = None if same_task is None else not same_task
        shared = classify_init(evidence, narrow["phi_r_r"].to_numpy()).for_tasks(differ=differ)
        inits.append(shared)
        summaries.append(_summarize_pair(study, groups, common, pair, shared))
    return summaries, inits


def _states_same(study: OpenStudy, pair: int, field: str) -> bool | None:
    """Return True if both adapters of a pair state the same; None if one states nothing."""
    a, b = (getattr(study.adapters[i].provenance, field) for i in study.pairs.pairs[pair])
    return None if a is None or b is None else a == b


def _summarize_pair(
    study: OpenStudy,
    groups: Mapping[int, Sequence[PairGroup]],
    common: Sequence[_Common],
    pair: int,
    init: SharedInit,
) -> dict[str, Any]:
    a, b = study.pairs.pairs[pair]
    modules = [{group.pairs.module for group in groups.get(position, ())} for position in (a, b)]
    in_both = len(modules[0] & modules[1])
    every = np.array([c.group.pairs.cosine[c.i, c.j] for c in common])
    cosines = every[~np.isnan(every)]
    # The signed cosine of both updates over all modules in which both are trained.
    norms = np.array([(c.group.pairs.norms[c.i], c.group.pairs.norms[c.j]) for c in common])
    total_cosine = float("nan")
    if cosines.size:
        norms_a, norms_b = norms[~np.isnan(every)].T
        lengths = np.linalg.norm(norms_a) * np.linalg.norm(norms_b)
        total_cosine = float(cosines @ (norms_a * norms_b) / lengths)
    # Medians over modules of the smaller φ of both sides: φ(n, n), n the smaller rank, and φ at
    # both ranks. Modules in which a rank exceeds a quarter of a dimension cannot tell.
    values = []
    for group, i, j in common:
        ranks = group.pairs.directions[i, j], group.pairs.directions[j, i]
        sides = group.pairs.sides.values()
        if min(ranks) > 0 and max(ranks) <= min(side.dimension for side in sides) / 4:
            at_smaller = min(angles.phi_n_n[i, j] for angles in group.angles)
            values.append((at_smaller, min(side.phi_r_r[i, j] for side in sides)))
    leading, whole = np.median(values, axis=0) if values else (np.nan, np.nan)
    return {
        "a": study.adapters[a].label,
        "b": study.adapters[b].label,
        "relation": study.pairs.relations[pair],
        "modules": len(common),
        "mismatched_modules": in_both - len(common),
        "initialization": init.kind,
        "shared_init_modules": len(init.modules),
        "b_cosine": init.other_cosine,
        "copied": float(np.mean(cosines >= COPY_COSINE)) if cosines.size else 0.0,
        "negated": float(np.mean(cosines <= -COPY_COSINE)) if cosines.size else 0.0,
        "containment": float(leading),
        "inclusion": float(whole),
        "total_cosine": total_cosine,
    }


def _pair_evidence(
    study: OpenStudy, pair: int, summary: Mapping[str, Any], init: SharedInit
) -> PairEvidence:
    """Return the evidence that decides the class of a pair."""
    locations = [study.adapters[i].provenance.location for i in study.pairs.pairs[pair]]
    parents = [None if path is None else PurePath(path).parent for path in locations]
    return PairEvidence(
        relation=study.pairs.relations[pair],
        same_task=_states_same(study, pair, "task"),
        same_seed=_states_same(study, pair, "seed"),
        reference=bool((study.pairs.pairs[pair] >= study.analyzed).any()),
        one_study=None in parents or parents[0] == parents[1],
        copied=summary["copied"],
        negated=summary["negated"],
        containment=summary["containment"],
        inclusion=summary["inclusion"],
        initialization=init.kind,
        second_factor_agrees=init.other_agrees,
        b_cosine=abs(init.other_cosine or 0.0),
        both_spaces=min(init.row_space or 0.0, init.other_space or 0.0),
    )


def pair_bases(study: OpenStudy, chosen: NDArray[np.intp]) -> dict[str, list[int]]:
    """Return the positions among the chosen pairs of the pairs of each base model.

    A pair of which one adapter names no base belongs to the base of the other.
    """
    keys = resolve_keys([adapter.provenance.base_model for adapter in study.adapters])
    bases: dict[str, list[int]] = {}
    for position, pair in enumerate(chosen):
        a, b = (keys[i] for i in study.pairs.pairs[pair])
        # Pairs across bases, compared on request, are a population of their own.
        across = study.pairs.relations[pair] in ACROSS_BASES
        bases.setdefault(f"{a} {b}" if across else a or b or "", []).append(position)
    return bases


def _exclude_adapters(
    study: OpenStudy,
    results: Sequence[ModuleResult],
    chosen: NDArray[np.intp],
    classes: Sequence[ClassifiedPair],
) -> dict[str, Exclusion]:
    """Return the adapters whose pairs count in no population, with the reason."""
    labels = [adapter.label for adapter in study.adapters]
    earlier = earlier_checkpoints(study.adapters[: study.analyzed])
    trained = _trained_modules(study, results)
    exclusions = {label: Exclusion.EARLIER for label in labels if label in earlier}
    exclusions |= {label: Exclusion.UNTRAINED for label, names in trained.items() if not names}
    counted = {label: names for label, names in trained.items() if label not in exclusions}
    # References never decide what the analyzed adapters are compared in.
    analyzed = [counted[label] for label in labels[: study.analyzed] if label in counted]
    exclusions |= dict.fromkeys(
        _adapters_of_other_modules(counted, analyzed), Exclusion.OTHER_MODULES
    )
    pairs = [
        (labels[a], labels[b], classified.pair_class)
        for (a, b), classified in zip(study.pairs.pairs[chosen], classes, strict=True)
        if exclusions.keys().isdisjoint((labels[a], labels[b]))
    ]
    tasks = {a.label: a.provenance.task for a in study.adapters}
    reference = frozenset(labels[study.analyzed :])
    return one_sample_exclusions(pairs, tasks, reference) | exclusions


def _trained_modules(study: OpenStudy, results: Sequence[ModuleResult]) -> dict[str, set[str]]:
    """Return the trained modules of each adapter that is in a pair, by label."""
    trained: dict[int, set[str]] = {int(i): set() for i in set(study.pairs.pairs.flat)}
    for result in results:
        for group in result.groups:
            for position in np.flatnonzero(group.index >= 0).tolist():
                if position in trained and group.pairs.ranks[group.index[position]] > 0:
                    trained[position].add(result.module)
    return {study.adapters[position].label: names for position, names in trained.items()}


def _adapters_of_other_modules(
    counted: Mapping[str, set[str]], analyzed: Sequence[set[str]]
) -> list[str]:
    """Return the adapters that lack more than half of the modules that most adapters have."""
    counts = Counter(module for names in analyzed for module in names)
    usual = {module for module, count in counts.items() if 2 * count > len(analyzed)}
    if not usual or len(counted) <= 2:
        return []
    return [label for label, names in counted.items() if 2 * len(names & usual) < len(usual)]


class UsableModules(NamedTuple):
    """The modules that count in every pair of a comparison, and the others with the reason."""

    usable: Mapping[Side, frozenset[str]]
    left_out: Mapping[Side, Mapping[str, ModuleExclusion]]


def usable_modules(
    rows: pd.DataFrame, members: Collection[str], shared: frozenset[str]
) -> UsableModules:
    """Return the modules that are usable on each side: one set for all pairs of a comparison.

    A module is usable if all adapters have it trained and in one shape, and the random baseline
    of ω is at most `MOST_CHANCE` in every pair: a head with one output has no room to differ.

    Parameters
    ----------
    rows
        Rows of the table of similarities.
    members
        Labels of the adapters of the comparison.
    shared
        Modules with a shared initialization in pairs that otherwise start independently; they
        leave the input side of all pairs.
    """
    rows = rows[rows["a"].isin(members) & rows["b"].isin(members)]
    pairs = rows[["a", "b"]].drop_duplicates().shape[0]
    usable: dict[Side, frozenset[str]] = {}
    left_out: dict[Side, dict[str, ModuleExclusion]] = {}
    for side in SIDES:
        of_side = rows[rows["side"] == side]
        modules = of_side.groupby("module", sort=False)
        counts, chances = modules.size(), modules["chance_omega"].max()
        reasons: dict[str, ModuleExclusion] = {}
        for module in counts.index:
            if counts[module] < pairs:
                reasons[module] = ModuleExclusion.NOT_IN_ALL
            elif chances[module] > MOST_CHANCE:
                reasons[module] = ModuleExclusion.NO_ROOM
            elif side == "input" and module in shared:
                reasons[module] = ModuleExclusion.SHARED_INIT
        left_out[side] = reasons
        usable[side] = frozenset(counts.index) - reasons.keys()
    return UsableModules(usable, left_out)
