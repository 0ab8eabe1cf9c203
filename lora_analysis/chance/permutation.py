"""Permutation of task labels over blocks: are runs of one task more alike than runs of two."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import factorial, prod
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np

from lora_analysis.chance.inference import FEWEST_RUNS, jackknife
from lora_analysis.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

    Scheme = Literal["within seeds", "all runs"]

# Level of the test, and with it the smallest p-value above which there are too few runs.
LEVEL: Final = 0.05
# Up to this many relabelings are enumerated; of more, a random sample is drawn.
MAX_EXACT: Final = 20_000
# Pairs times relabelings of one batch.
_BATCH: Final = 1 << 22
# Relative difference up to which two statistics are equal: sums in another order.
_ROUNDING: Final = 1e-12


@dataclass(frozen=True, slots=True)
class RunPermutation:
    """Comparison of blocks of one task with blocks of different tasks, by relabeling blocks.

    Attributes
    ----------
    difference
        Mean over pairs within tasks minus mean over pairs between tasks; NaN if either is empty.
    p_value
        Share of the relabelings whose difference is at least as large.
    smallest_p_value
        Smallest p-value that this design can reach. Above .05 there are too few runs.
    relabelings
        Number of relabelings that were enumerated or drawn.
    exact
        True if these are all relabelings.
    scheme
        "within seeds" if labels were permuted within each seed that several tasks have in common,
        "all runs" if they were permuted over all blocks.
    blocks
        Number of blocks (task, seed).
    """

    difference: float
    p_value: float
    smallest_p_value: float
    relabelings: int
    exact: bool
    scheme: Scheme
    blocks: int


def permute_blocks(
    values: ArrayLike,
    tasks: Sequence[Hashable],
    seeds: Sequence[Hashable],
    *,
    draws: int = 19_999,
    random_seed: int = 0,
) -> RunPermutation:
    """Test if runs of one task are more alike than runs of different tasks, by relabeling runs.

    The unit is the block: all adapters of one task and seed. The statistic is the mean value of
    pairs within tasks minus that of pairs between tasks. If ranks of one task and seed counted as
    separate runs, p would be at most .05 in 100 % of simulated studies without any task effect.

    Parameters
    ----------
    values
        ``(N, N)``, symmetric: one value per pair of blocks, for example their mean excess. NaN for
        pairs that do not count, such as two tasks with one seed. The diagonal is ignored.
    tasks, seeds
        Task and seed of each block. Relabeling moves tasks; a block keeps its values and its seed.
    draws, random_seed
        Number and seed of random relabelings if there are more than 20,000 relabelings.

    Raises
    ------
    InputError
        Fewer than two tasks, no task with two blocks, two blocks of one task and seed, or a matrix
        of another shape.

    Notes
    -----
    Tasks and seeds determine the scheme, before any value is seen. If several tasks have seeds in
    common, labels are permuted within each of these seeds, and among the blocks whose seed no other
    task has: effects of the seed are the same in every relabeling. Otherwise, labels are permuted
    over all blocks. A design too small to reach p = .05 within its seeds is relabeled over all
    blocks as well if it has two tasks, or if of any two tasks one has all seeds of the other; the
    scheme with the smaller attainable p-value counts. That is conservative: in simulated studies
    without a task effect, p ≤ .05 in 0 to 4 %, against 2 to 5 % within seeds.

    Number of relabelings of T tasks × S seeds: ``(T·S)!/(S!^T·T!)`` over all runs (2 × 3: 10,
    2 × 4: 35, 3 × 3: 280), ``T!^(S − 1)`` within seeds (2 × 3: 4, 3 × 3: 36, 4 × 2: 24). A
    relabeling that leaves no pair within tasks or none between tasks counts as at least as large.

    A small p-value alone does not mean that the tasks have different directions: tasks trained with
    unequal strength reach p = .05 in 42 to 71 % of simulated studies without a task effect, and in
    1 to 14 % if every task's own mean must also exceed its mean with every other task.
    """
    matrix = np.asarray(values, dtype=np.float64)
    codes, groups = _codes(tasks), _codes(seeds)
    sizes = np.bincount(codes)
    if len(sizes) < 2 or sizes.max() < 2:
        message = (
            f"A permutation of runs needs two tasks, one of them with two runs; the {len(codes)} "
            f"runs have {len(sizes)} task(s), at most {sizes.max(initial=0)} run(s) each."
        )
        raise InputError(message)
    if len(groups) != len(codes) or matrix.shape != codes.shape * 2:
        message = (
            f"The {len(codes)} blocks need a seed each and a value for every pair: values must "
            f"have shape {codes.shape * 2}, found {len(groups)} seeds and shape {matrix.shape}."
        )
        raise InputError(message)
    repeated = [key for key, n in Counter(zip(tasks, seeds, strict=True)).items() if n > 1]
    if repeated:
        task, seed = repeated[0]
        message = (
            f"Several blocks have task {task!r} and seed {seed!r}: adapters of one task and seed "
            "form one block, whose value is the mean over their pairs."
        )
        raise InputError(message)
    i, j = np.nonzero(np.triu(~np.isnan(matrix), 1))
    pairs = _Pairs(i, j, matrix[i, j])
    design = _choose_design(pairs, codes, groups, draws, random_seed)
    differences = pairs.differences(design.labels)
    observed = float(pairs.differences(codes[None])[0])
    # A relabeling that is the same partition must not be lost to rounding; one that has no
    # difference (NaN) counts against the claim.
    tolerance = _ROUNDING * np.abs(pairs.values).max(initial=0.0)
    at_least = int(np.count_nonzero(~(differences < observed - tolerance)))
    return RunPermutation(
        difference=observed,
        p_value=design.p_value(at_least),
        smallest_p_value=design.smallest_p_value,
        relabelings=len(design.labels),
        exact=design.exact,
        scheme=design.scheme,
        blocks=len(codes),
    )


def task_difference(values: NDArray[np.float64], codes: NDArray[np.intp]) -> float:
    """Return the mean over pairs within tasks minus that over pairs between tasks.

    Parameters
    ----------
    values
        ``(N, N)``, symmetric; NaN for pairs that do not count. The diagonal is ignored.
    codes
        Task of each block as a number, ``(N,)``.

    Returns
    -------
    float
        NaN if no pair within tasks, or none between tasks, has a value.
    """
    i, j = np.nonzero(np.triu(~np.isnan(values), 1))
    return float(_Pairs(i, j, values[i, j]).differences(np.asarray(codes)[None])[0])


def task_difference_error(values: ArrayLike, tasks: Sequence[Hashable]) -> float | None:
    """Return the jackknife standard error of `task_difference`, leaving out one block at a time.

    Conservative, and over these runs only. None if a task has one block, or if leaving out a block
    leaves no pair within tasks or none between tasks.
    """
    matrix, codes = np.asarray(values, dtype=np.float64), _codes(tasks)
    if len(codes) < FEWEST_RUNS or np.bincount(codes).min() < 2:
        return None

    def difference(blocks: NDArray[np.intp]) -> float:
        return task_difference(matrix[np.ix_(blocks, blocks)], codes[blocks])

    error = jackknife(difference, len(codes))[1]
    return None if error is None or np.isnan(error) else error


class _Pairs(NamedTuple):
    """Pairs of blocks that count: positions of their members, and their values."""

    i: NDArray[np.intp]
    j: NDArray[np.intp]
    values: NDArray[np.float64]

    def batches(self, labels: NDArray[np.intp]) -> Iterator[NDArray[np.bool_]]:
        """Yield whether pairs are within a task, ``(R', P)``, for ``(R, N)`` labels."""
        rows = max(1, _BATCH // max(len(self.i), 1))
        for start in range(0, len(labels), rows):
            part = labels[start : start + rows]
            yield part[:, self.i] == part[:, self.j]

    def differences(self, labels: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the mean within minus the mean between tasks, ``(R,)``; NaN if one is empty."""
        parts = []
        for within in self.batches(labels):
            counts = within.sum(axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                means = within @ self.values / counts
                means -= ~within @ self.values / (len(self.i) - counts)
            parts.append(means)
        return np.concatenate(parts)

    def count_unavoidable(self, codes: NDArray[np.intp], labels: NDArray[np.intp]) -> int:
        """Return how many relabelings count as at least as large, whatever the values are.

        These are the relabelings with an empty side, and those with the same pairs within tasks.
        """
        count = 0
        observed = codes[self.i] == codes[self.j]
        for within in self.batches(labels):
            empty = ~within.any(axis=1) | within.all(axis=1)
            count += int(np.count_nonzero(empty | (within == observed).all(axis=1)))
        return count


def _codes(labels: Sequence[Hashable]) -> NDArray[np.intp]:
    """Return a number for each label; labels may be of types that do not sort."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return np.array([numbers[label] for label in labels], dtype=np.intp)


@dataclass(frozen=True, slots=True)
class _Design:
    """The relabelings of a scheme, ``(R, N)``, and how many of them count whatever the values."""

    scheme: Scheme
    labels: NDArray[np.intp]
    exact: bool
    unavoidable: int

    def p_value(self, at_least: int) -> float:
        """Return the p-value if so many relabelings are at least as large."""
        extra = 0 if self.exact else 1
        return (at_least + extra) / (len(self.labels) + extra)

    @property
    def smallest_p_value(self) -> float:
        return self.p_value(self.unavoidable)


def _choose_design(
    pairs: _Pairs, codes: NDArray[np.intp], seeds: NDArray[np.intp], draws: int, random_seed: int
) -> _Design:
    """Return the scheme that tasks and seeds determine, with its relabelings."""

    def design(scheme: Scheme, strata: NDArray[np.intp]) -> _Design:
        exact = count_relabelings(codes, strata) <= MAX_EXACT
        if exact:
            labels = np.array(list(_relabelings(codes, strata)))
        else:  # task codes permuted at random within strata
            rng = np.random.default_rng(random_seed)
            labels = np.tile(codes, (draws, 1))
            for stratum in np.unique(strata):
                members = np.flatnonzero(strata == stratum)
                labels[:, members] = rng.permuted(labels[:, members], axis=1)
        return _Design(scheme, labels, exact, pairs.count_unavoidable(codes, labels))

    recurring = np.bincount(seeds) > 1
    if not recurring.any():
        return design("all runs", np.zeros_like(codes))
    # The blocks whose seed no other task has are one stratum.
    strata = np.unique(np.where(recurring[seeds], seeds, -1), return_inverse=True)[1]
    within = design("within seeds", strata)
    # All runs can be relabeled although tasks have seeds in common: that is conservative for two
    # tasks, and for more if of any two tasks one has all seeds of the other. If one of three tasks
    # has seeds of its own, seeds of unequal strength look like tasks: p ≤ .05 in 7.1 % of simulated
    # studies without an effect.
    seeds_of = sorted((set(seeds[codes == task].tolist()) for task in np.unique(codes)), key=len)
    is_balanced = len(seeds_of) == 2 or all(a <= b for a, b in pairwise(seeds_of))
    if within.smallest_p_value <= LEVEL or not is_balanced:
        return within
    return min(within, design("all runs", np.zeros_like(codes)), key=lambda d: d.smallest_p_value)


def count_relabelings(codes: NDArray[np.intp], strata: NDArray[np.intp]) -> int:
    """Return the number of different partitions that permuting labels within strata gives.

    ``Π_s n_s!/Π_t n_st!`` labelings, of which those that only rename tasks are one partition: tasks
    with equally many blocks in every stratum can change names.
    """
    table = _block_counts(codes, strata)
    labelings = prod(
        factorial(int(row.sum())) // prod(factorial(int(n)) for n in row) for row in table
    )
    names = Counter(map(tuple, table.T.tolist())).values()
    return labelings // prod(map(factorial, names))


def _block_counts(codes: NDArray[np.intp], strata: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the number of blocks of each stratum and task, ``(strata, tasks)``."""
    table = np.zeros((strata.max() + 1, codes.max() + 1), dtype=np.intp)
    np.add.at(table, (strata, codes), 1)
    return table


def _relabelings(codes: NDArray[np.intp], strata: NDArray[np.intp]) -> Iterator[list[int]]:
    """Yield every partition once, as task codes."""
    table = _block_counts(codes, strata).tolist()
    # Tasks that can change names are in the order of their first blocks, in the first stratum that
    # has any: ``before`` is the previous one there.
    before: dict[tuple[int, int], int] = {}
    previous: dict[tuple[int, ...], int] = {}
    for task, counts in enumerate(zip(*table, strict=True)):
        if counts in previous:
            before[next(s for s, n in enumerate(counts) if n), task] = previous[counts]
        previous[counts] = task
    members = [np.flatnonzero(strata == stratum).tolist() for stratum in range(len(table))]
    steps = [(s, task) for s, row in enumerate(table) for task, n in enumerate(row) if n]
    labels = [-1] * len(codes)

    def assign(step: int) -> Iterator[list[int]]:
        if step == len(steps):
            yield labels.copy()
            return
        stratum, task = steps[step]
        free = [block for block in members[stratum] if labels[block] < 0]
        if steps[step] in before:
            earlier = before[steps[step]]
            first = next(block for block in members[stratum] if labels[block] == earlier)
        else:
            first = -1
        for chosen in combinations(free, table[stratum][task]):
            if chosen[0] < first:
                continue
            for block in chosen:
                labels[block] = task
            yield from assign(step + 1)
            for block in chosen:
                labels[block] = -1

    return assign(0)
