"""What a group of adapters of one base shares: a mean, a subspace, or nothing.

Overlaps are blind to sign: adapters μ + ε and adapters that use one subspace with random signs are
equally alike. The analysis tells them apart by what the others explain of each adapter that is left
out. It describes energy, not skill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from lora_analysis import chance
from lora_analysis.blocks import locate_module
from lora_analysis.errors import InputError
from lora_analysis.finding import Finding
from lora_analysis.results import frame, short_repr
from lora_analysis.studies.group_members import FEWEST_MEMBERS, choose_members
from lora_analysis.studies.group_shares import (
    FEWEST,
    PARTS,
    ROOM,
    group_sizes,
    group_splits,
    module_shares,
)
from lora_analysis.studies.module_walk import choose_modules, walk_modules
from lora_analysis.studies.pair_classes import ModuleExclusion
from lora_analysis.studies.similarity_matrix import ALL
from lora_analysis.text import html_table, plural

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from lora_analysis.progress import Progress
    from lora_analysis.studies.group_members import GroupMembers, Removal
    from lora_analysis.studies.group_shares import ModuleShares
    from lora_analysis.studies.result import Study

# From so many adapters of other groups on, the members' shares are tested against theirs.
FEWEST_OTHERS: Final = 3
_LEVEL: Final = 0.05
# Less energy than this beyond the random baseline is called nothing, however significant.
_LEAST: Final = 0.01
# "Nothing" also needs intervals that end below this: a wider one shows too little.
_UNCLEAR: Final = 0.1
_MAX_K: Final = 8
# Up to so many members all sign flips are computed, beyond it random ones.
_MAX_EXACT: Final = 14
_FLIPS: Final = 9999
# The parts of which one is enough for a shared subspace.
_SUBSPACES: Final = ("directions", "output", "input")


class SharedPart(StrEnum):
    """The conclusion of a group analysis."""

    MEAN = "mean"
    SUBSPACE = "subspace"
    NOTHING = "nothing"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class GroupAnalysis:
    """The energy of N adapters that common parts of the others hold.

    Shares are means over modules and adapters. Arrays over parts follow `parts`: the mean of the
    others (signed), their k leading matrices, those beyond their mean, and their joint k directions
    of both sides together, of the input and of the output side.

    Attributes
    ----------
    labels, others
        The N members, and T adapters of other groups, whose shares in the same bases are a null.
    tasks
        The known tasks of the members.
    removed
        Adapters that are left out, with the reason and the member that they are related to.
    shared_init
        Whether members share an initialization, because fewer than six were left without them:
        then the input side and both sides together are excluded from the conclusion.
    modules, left_out
        Modules that are analyzed, and those that are not, with the reason.
    k
        Number of matrices, and of directions of each side: the same for every size of the basis.
    sizes
        ``(S,)``: adapters in a basis; the last is N − 1, or a little less for large groups.
    shares, chance
        ``(P, S)``: of the members, and of random directions with the same spectra (exact mean).
    chance_limit
        ``(P,)``: what random directions stay below with a probability of 95 % (conservative).
    others_range
        ``(2, P, S)``: smallest and largest share among the others; NaN without.
    interval
        ``(P, 2)``: 95 % interval of the shares at the largest size, over these members.
    rho, rho_interval
        ρ, mean cosine of two members: the share of the energy that their mean would hold in an
        unlimited group, and its 95 % interval (jackknife over members).
    p_values
        Of the mean (random signs of the members), and of the joint directions of both sides, the
        output and the input side (random directions); with three or more others the larger of
        this and of the rank-sum test against their shares. Adjusted by Holm's method; NaN below six
        members.
    explained, explained_chance
        ``(N,)``: cumulated share of the members' energy in their own leading matrices, inflated
        because nothing is left out, and the same for random matrices; empty if no module is in all.
    cosines
        ``(N, N)``: signed cosines, mean over modules.
    conclusion
        What is concluded: see `SharedPart`.
    finding
        The conclusion as a sentence with its numbers.
    """

    labels: tuple[str, ...]
    others: tuple[str, ...]
    tasks: tuple[str, ...]
    removed: Mapping[str, Removal]
    shared_init: bool
    modules: tuple[str, ...]
    left_out: Mapping[str, ModuleExclusion]
    k: int
    sizes: tuple[int, ...]
    shares: NDArray[np.float64]
    chance: NDArray[np.float64]
    chance_limit: NDArray[np.float64]
    others_range: NDArray[np.float64]
    interval: NDArray[np.float64]
    rho: float
    rho_interval: tuple[float, float]
    p_values: Mapping[str, float]
    explained: NDArray[np.float64]
    explained_chance: NDArray[np.float64]
    cosines: NDArray[np.float64]
    by_type: Mapping[str, Mapping[str, Any]]
    conclusion: SharedPart = field(init=False)
    finding: Finding = field(init=False)

    def __post_init__(self) -> None:
        conclusion, finding = _conclude(self)
        object.__setattr__(self, "conclusion", conclusion)
        object.__setattr__(self, "finding", finding)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts, in the order of the arrays."""
        return PARTS

    __repr__ = short_repr

    def __str__(self) -> str:
        return self.finding.text

    @property
    def expected_mean(self) -> NDArray[np.float64]:
        """``(S,)``: share of the mean that ρ gives at each size, nρ²/(1 + (n − 1)ρ)."""
        n = np.array(self.sizes, dtype=np.float64)
        return np.asarray(n * self.rho * abs(self.rho) / np.maximum(1 + (n - 1) * self.rho, 1 / n))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per type of module (first ``"all"``) and part, at the largest size."""
        rows = []
        for kind, values in self.by_type.items():
            for p, part in enumerate(PARTS):
                rows.append(
                    {
                        "module_type": kind,
                        "modules": values["modules"],
                        "part": part,
                        "rho": values["rho"],
                        "share": values["shares"][p],
                        "chance": values["chance"][p],
                        "others": values["others"][p],
                    }
                )
        return frame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the matrix of cosines as JSON values hold it, NaN included."""
        return {
            "conclusion": str(self.conclusion),
            "text": self.finding.text,
            "adapters": list(self.labels),
            "others": list(self.others),
            "tasks": list(self.tasks),
            "removed": [{"adapter": a, "reason": str(why)} for a, why in self.removed.items()],
            "shared_init": self.shared_init,
            "modules": list(self.modules),
            "left_out": [{"module": m, "reason": str(why)} for m, why in self.left_out.items()],
            "k": self.k,
            "rho": self.rho,
            "rho_interval": list(self.rho_interval),
            "p_values": dict(self.p_values),
            "curve": [
                {
                    "part": part,
                    "size": size,
                    "share": self.shares[p, s],
                    "others_low": self.others_range[0, p, s],
                    "others_high": self.others_range[1, p, s],
                    "chance": self.chance[p, s],
                }
                for p, part in enumerate(PARTS)
                for s, size in enumerate(self.sizes)
            ],
            "by_type": self.to_frame().to_dict("records"),
        }

    def _repr_html_(self) -> str:
        table = self.to_frame()
        rows = table[table["module_type"] == ALL][["part", "share", "chance", "others"]]
        title = f"Group of {len(self.labels)} adapters: {self.conclusion}"
        columns = ("part", "share", "random", "other adapters")
        return html_table(title, columns, rows.values.tolist(), self.finding.text)


def group_analysis_of(
    study: Study,
    members: Sequence[str] | None = None,
    *,
    k: int | None = None,
    modules: str | Sequence[str] | None = None,
    modules_per_type: int | None = None,
    remove_related: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
) -> GroupAnalysis:
    """Analyze a group of adapters of a study; see `Study.group_analysis`."""
    group = choose_members(study, members, remove_related=remove_related)
    labels, others = group.members, group.others
    if len(labels) < FEWEST:
        removed = "; ".join(f"{label}, {why}" for label, why in group.removed.items()) or "none"
        message = (
            f"A group needs at least three independent adapters of one base, found {len(labels)} "
            f"of {len(labels) + len(group.removed)} (removed: {removed}). Add "
            "adapters, or pass remove_related=False to analyze copies and shared initializations."
        )
        raise InputError(message)
    if k is not None and k < 1:
        message = f"A group analysis needs k >= 1 directions, got k = {k}."
        raise InputError(message)
    if k is None:
        k = _default_directions(study, labels)
    adapters = [study.adapters[label] for label in (*labels, *others)]
    chosen = choose_modules(adapters[: len(labels)], modules)
    if modules_per_type is not None:
        chosen = _spread_over_types(chosen, modules_per_type)
    splits = group_splits(len(labels))
    left_out: dict[str, ModuleExclusion] = {}
    results: list[ModuleShares] = []
    analyze = partial(module_shares, adapters, len(labels), splits, k)
    walk = walk_modules(analyze, chosen, workers=workers, progress=progress)
    for module, result in zip(chosen, walk, strict=True):
        if isinstance(result, ModuleExclusion):
            left_out[module] = result
        else:
            results.append(result)
    if not results:
        message = (
            f"No module can be analyzed: a group needs three trained adapters that have one module "
            f"in one shape, of at least {ROOM * k} dimensions on both sides for k = {k} "
            f"({plural(len(left_out), 'module')} left out)."
        )
        raise InputError(message)
    return _summarize(group, results, left_out, k)


def _default_directions(study: Study, labels: Sequence[str]) -> int:
    """Return the median numerical rank of the members' trained updates, at most `_MAX_K`."""
    spectra = study.spectra[study.spectra["adapter"].isin(labels)]
    ranks = spectra.loc[spectra["numerical_rank"] > 0, "numerical_rank"]
    return int(np.clip(ranks.median() if len(ranks) else 1, 1, _MAX_K))


def _spread_over_types(modules: Sequence[str], per_type: int) -> list[str]:
    """Return so many modules of each type, evenly over the model, in the given order."""
    by_type: dict[str, list[str]] = {}
    for name in modules:
        by_type.setdefault(locate_module(name).name, []).append(name)
    chosen: set[str] = set()
    for names in by_type.values():
        middle = (np.arange(per_type) + 0.5) * len(names) / per_type
        chosen.update(names[int(i)] for i in middle)
    return [name for name in modules if name in chosen]


class _Pool:
    """Means over some modules; all arrays are as in `ModuleShares`."""

    def __init__(self, results: Sequence[ModuleShares], count: int) -> None:
        self.modules = len(results)
        self.shares = _mean([result.shares for result in results], 0)
        self.chance = _mean([result.chance for result in results], 0)
        # Of a mean over independent modules; members of one module are not taken as independent.
        self.variance = np.sum([r.variance for r in results], axis=0) / len(results) ** 2
        self.cosines = _mean([result.cosines for result in results], 0)
        self.members = self.shares[:, -1, :count]
        self.others = self.shares[:, -1, count:]
        self.rho = float(_mean(self.cosines[np.triu_indices(count, 1)], 0))

    def summary(self) -> dict[str, Any]:
        """Return the numbers of one row of a table per part."""
        return {
            "modules": self.modules,
            "rho": self.rho,
            "shares": _mean(self.members, -1),
            "chance": self.chance[:, -1],
            "others": _maximum(self.others),
        }


def _summarize(
    group: GroupMembers,
    results: Sequence[ModuleShares],
    left_out: Mapping[str, ModuleExclusion],
    k: int,
) -> GroupAnalysis:
    count = len(group.members)
    pool = _Pool(results, count)
    kinds: dict[str, list[ModuleShares]] = {}
    for result in results:
        kinds.setdefault(locate_module(result.module).name, []).append(result)
    types = {kind: _Pool(some, count) for kind, some in sorted(kinds.items())}
    others = pool.shares[:, :, count:]
    explained = [r.explained for r in results if r.explained is not None]
    by_chance = [r.explained_chance for r in results if r.explained_chance is not None]
    centers = _mean(pool.members, -1)
    defined = np.count_nonzero(~np.isnan(pool.members), axis=-1)
    deviation = pool.members - centers[..., None]
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.asarray(np.sqrt(np.nansum(deviation**2, axis=-1) / (defined - 1) / defined))
    interval = _interval(centers, error, count)
    rho_interval = _interval(np.array(pool.rho), _jackknife_error(pool.cosines), count)
    p_values = _NO_P_VALUES
    if count >= FEWEST_MEMBERS:
        p_values = _p_values(pool, centers, ("output",) if group.shared_init else _SUBSPACES)
    return GroupAnalysis(
        labels=tuple(group.members),
        others=tuple(group.others),
        tasks=tuple(group.tasks),
        removed=group.removed,
        shared_init=group.shared_init,
        modules=tuple(result.module for result in results),
        left_out=left_out,
        k=k,
        sizes=group_sizes(count),
        shares=_mean(pool.shares[:, :, :count], -1),
        chance=pool.chance,
        chance_limit=_chance_limits(pool),
        others_range=np.stack([-_maximum(-others), _maximum(others)]),
        interval=interval,
        rho=pool.rho,
        rho_interval=(float(rho_interval[0]), float(rho_interval[1])),
        p_values=p_values,
        explained=np.mean(explained, axis=0) if explained else np.empty(0),
        explained_chance=np.mean(by_chance, axis=0) if by_chance else np.empty(0),
        cosines=pool.cosines,
        by_type={ALL: pool.summary()} | {kind: some.summary() for kind, some in types.items()},
    )


def _mean(values: Any, axis: int) -> NDArray[np.float64]:
    """Return the mean of the values that are defined; NaN without one."""
    array = np.asarray(values, dtype=np.float64)
    count = np.count_nonzero(~np.isnan(array), axis=axis)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(array, axis=axis) / count)


def _maximum(others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest share of each part among adapters of other groups; NaN without any."""
    defined = np.where(np.isnan(others), -np.inf, others)
    largest = np.max(defined, axis=-1, initial=-np.inf)
    return np.where(np.isinf(largest), np.nan, largest)


def _jackknife_error(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard error of ρ, leaving out each member in turn."""
    off_diagonal = np.where(np.eye(len(cosines), dtype=bool), np.nan, cosines)
    sums, counts = np.nansum(off_diagonal, axis=1), np.sum(~np.isnan(off_diagonal), axis=1)
    with np.errstate(invalid="ignore"):
        rhos = (sums.sum() - 2 * sums) / (counts.sum() - 2 * counts)
    deviation = rhos - rhos.mean()
    return np.asarray(np.sqrt((len(rhos) - 1) / len(rhos) * np.sum(deviation**2)))


def _interval(
    center: NDArray[np.float64], error: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    from scipy.special import stdtrit

    spread = float(stdtrit(count - 1, 0.975)) * error
    return np.stack([center - spread, center + spread], axis=-1)


def _chance_limits(pool: _Pool) -> NDArray[np.float64]:
    """Return the 95 % points of the shares of random directions."""
    from scipy.special import gammaincinv

    mean, variance = pool.chance[:, -1], pool.variance
    with np.errstate(invalid="ignore", divide="ignore"):
        limits = gammaincinv(mean**2 / variance, 1 - _LEVEL) * variance / mean
    limits[0] = 1.645 * np.sqrt(variance[0])  # the signed share of the mean is symmetric around 0
    return np.asarray(np.where(variance > 0, limits, mean))


_NO_P_VALUES: Final = dict.fromkeys(("mean", *_SUBSPACES), float("nan"))


def _p_values(pool: _Pool, centers: NDArray[np.float64], tested: Sequence[str]) -> dict[str, float]:
    """Return the p-values of the mean and of the tested directions, adjusted for their number.

    With enough adapters of other groups, both nulls must be rejected: the larger p-value counts.
    """
    values = []
    for part in _NO_P_VALUES:
        p = PARTS.index(part)
        if part == "mean":
            p_value = _sign_flip_p_value(pool.cosines)
        elif part not in tested:
            values.append(np.nan)
            continue
        else:
            by_chance = pool.chance[p, -1], pool.variance[p]
            p_value = float(chance.energy_p_value(centers[p], *by_chance, 1.0))
        if pool.others.shape[-1] >= FEWEST_OTHERS:
            p_value = np.fmax(p_value, _rank_sum_p_value(pool.members[p], pool.others[p]))
        values.append(p_value)
    return dict(zip(_NO_P_VALUES, chance.holm(values).tolist(), strict=True))


def _rank_sum_p_value(members: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Return P(U ≥ u) of the exact rank-sum test that members exceed others; ties count against."""
    members, others = members[~np.isnan(members)], others[~np.isnan(others)]
    n, m = len(members), len(others)
    u = int(np.sum(members[:, None] > others))
    # Gaussian binomial coefficient: how many orders of n + m values have each u.
    orders = np.zeros(n * m + 1)
    orders[0] = 1.0
    for i in range(1, m + 1):
        for j in range(n * m, n + i - 1, -1):
            orders[j] -= orders[j - n - i]
        for j in range(i, n * m + 1):
            orders[j] += orders[j - i]
    return float(orders[u:].sum() / orders.sum())


def _sign_flip_p_value(cosines: NDArray[np.float64]) -> float:
    """Return the share of sign patterns with a Σ e_i·e_j·H_ij as large as without flips.

    Exact over the 2^(N − 1) patterns of up to 14 members, else over random ones. If updates are as
    likely as their negatives, all patterns are equally likely.
    """
    count = len(cosines)
    matrix = np.nan_to_num(cosines)
    np.fill_diagonal(matrix, 0.0)
    if count <= _MAX_EXACT:
        bits = np.arange(2 ** (count - 1))[:, None] >> np.arange(count)  # the last one is never set
        signs = 1.0 - 2.0 * (bits & 1)
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (_FLIPS + 1, count))
        signs[0] = 1.0
    sums = np.einsum("fi,fi->f", signs @ matrix, signs)
    # A pattern that is equal up to rounding counts as equal.
    return float(np.mean(sums >= sums[0] - 1e-12 * np.abs(matrix).sum()))


class _TestedPart(NamedTuple):
    """One tested part: its energy beyond the random baseline, and what the others do not reach."""

    effect: float
    interval: tuple[float, float]
    level: float
    p_value: float

    @property
    def is_significant(self) -> bool:
        return self.p_value <= _LEVEL and self.effect >= _LEAST

    @property
    def is_clear(self) -> bool:
        return self.is_significant and self.interval[0] > self.level

    @property
    def is_open(self) -> bool:
        """True if it may exceed the others or random directions, but does not clearly do so."""
        may_exceed = self.is_significant and self.interval[1] > self.level + _LEAST
        return (may_exceed and not self.is_clear) or self.interval[1] > self.level + _UNCLEAR


def _conclude(analysis: GroupAnalysis) -> tuple[SharedPart, Finding]:
    """Return the conclusion and its sentence.

    A part counts if its test rejects at 5 %, if it holds at least 1 % of the energy beyond the
    random baseline, and if its interval lies beyond the random baseline and beyond the largest
    share among adapters of other groups. The conclusion is the mean if ρ is at least half of what
    the best joint directions hold; else these directions.
    """
    parts = _tested_parts(analysis)
    mean = parts["mean"]
    # On the input side, adapters with a shared initialization agree in that alone.
    tested = ("output",) if analysis.shared_init else _SUBSPACES
    directions = {name: parts[name] for name in tested}
    has_subspace = any(part.is_clear for part in directions.values())
    best = _best_directions(directions)
    open_parts = [part for part in (mean, *directions.values()) if part.is_open]
    is_small = len(analysis.labels) < FEWEST_MEMBERS
    if is_small:
        conclusion = SharedPart.UNDECIDED
    elif mean.is_clear and (not has_subspace or mean.effect >= directions[best].effect / 2):
        conclusion = SharedPart.MEAN
    elif has_subspace:
        conclusion = SharedPart.SUBSPACE
    else:
        conclusion = SharedPart.UNDECIDED if open_parts else SharedPart.NOTHING
    fields = _group_fields(analysis, best, None if is_small else len(open_parts))
    return conclusion, Finding(f"group-{conclusion}", fields)


def _tested_parts(analysis: GroupAnalysis) -> dict[str, _TestedPart]:
    """Return the parts that have a p-value, by name."""
    shares, by_chance = analysis.shares[:, -1], analysis.chance[:, -1]
    # One or two others are no test: members that they do not reach lie beyond single values.
    is_level_only = 0 < len(analysis.others) < FEWEST_OTHERS
    widening = np.sqrt(len(analysis.labels) + 1) if is_level_only else 1.0
    parts = {}
    for name, p_value in analysis.p_values.items():
        p = PARTS.index(name)
        low, high = shares[p] + widening * (analysis.interval[p] - shares[p])
        effect = (shares[p] - by_chance[p]) / (1 - by_chance[p])
        if name == "mean":  # ρ does not depend on the number of members, the share of a mean does
            effect = analysis.rho
            low, high = min(low, analysis.rho_interval[0]), max(high, analysis.rho_interval[1])
        level = float(np.fmax(by_chance[p], analysis.others_range[1, p, -1]))
        parts[name] = _TestedPart(float(effect), (float(low), float(high)), level, p_value)
    return parts


def _best_directions(directions: Mapping[str, _TestedPart]) -> str:
    """Return the directions that the conclusion names: the clear ones that hold the most energy.

    Both sides together are the stronger statement, unless one side holds twice as much.
    """
    clear = {name: part for name, part in directions.items() if part.is_clear} or directions
    best = max(clear, key=lambda name: np.nan_to_num(clear[name].effect))
    if "directions" in clear and clear["directions"].effect >= clear[best].effect / 2:
        return "directions"
    return best


def _group_fields(
    analysis: GroupAnalysis, directions: str, open_parts: int | None
) -> dict[str, Any]:
    """Return the fields of the finding: the group, its mean, and some joint directions."""
    shares, limits = analysis.shares[:, -1], analysis.others_range[1, :, -1]
    count, others = len(analysis.labels), len(analysis.others)
    p = PARTS.index(directions)
    removed = Counter(removal.reason for removal in analysis.removed.values())
    return {
        "members": count,
        "tasks": len(analysis.tasks) if len(analysis.tasks) > 1 else None,
        "modules": len(analysis.modules),
        "k": analysis.k,
        "rho": analysis.rho,
        "rho_low": analysis.rho_interval[0],
        "rho_high": analysis.rho_interval[1],
        "p_mean": _or_none(analysis.p_values["mean"]),
        "mean_share": float(shares[PARTS.index("mean")]),
        "others_mean": _or_none(limits[PARTS.index("mean")]),
        "side": None if directions == "directions" else directions,
        "share": float(shares[p]),
        "share_low": float(analysis.interval[p, 0]),
        "share_high": float(analysis.interval[p, 1]),
        "random_share": float(analysis.chance[p, -1]),
        "others_share": _or_none(limits[p]),
        "p_share": _or_none(analysis.p_values[directions]),
        "beyond_mean": float(shares[PARTS.index("matrices_beyond_mean")]),
        "others": others if others >= FEWEST_OTHERS else None,
        "shared_init": count if analysis.shared_init else None,
        "few_others": others if others < FEWEST_OTHERS else None,
        "needed": FEWEST_MEMBERS if count < FEWEST_MEMBERS else None,
        "is_unclear": open_parts,
        "removed": [{"reason": why, "count": n} for why, n in removed.items()] or None,
    }


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
