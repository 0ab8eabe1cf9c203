"""From single p-values to statements: many modules, many runs, few draws."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb, factorial
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

# Fewer runs than this bear no interval.
FEWEST_RUNS = 3
# Up to so many relabelings of runs are all gone through; beyond, as many are drawn.
ALL_RELABELINGS = 20_000


def monte_carlo_p_value(draws: ArrayLike, value: float) -> float:
    """Return ``(b + 1)/(N + 1)``, b of N draws of the null being at least ``value``.

    Never 0: N draws cannot show less than 1/(N + 1). NaN stays NaN.
    """
    if np.isnan(value):
        return float("nan")
    null = np.asarray(draws)
    return float((np.count_nonzero(null >= value) + 1) / (null.size + 1))


def benjamini_hochberg(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return q-values: the false discovery rate at which each p-value would be called.

    Benjamini & Hochberg (1995), step-up, over all values given: one per module, for one pair and
    one side. NaN stays NaN and does not count.
    """
    p = np.asarray(p_values, dtype=np.float64)
    q = np.full(p.shape, np.nan)
    defined = np.flatnonzero(~np.isnan(p))
    order = defined[np.argsort(p[defined])]
    scaled = p[order] * defined.size / np.arange(1, defined.size + 1)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


@dataclass(frozen=True, slots=True)
class RunPermutation:
    """Whether runs of one task agree more with each other than with runs of other tasks.

    Attributes
    ----------
    difference
        Mean over pairs of one task minus mean over pairs of different tasks.
    p_value
        Share of the relabelings whose difference is at least as large.
    smallest_p_value
        What the p-value could be at best with so many runs.
    relabelings
        How many were gone through, or drawn.
    exact
        Whether those were all.
    runs
        How many runs: below three there is no interval to be given.
    """

    difference: float
    p_value: float
    smallest_p_value: float
    relabelings: int
    exact: bool
    runs: int

    @property
    def allows_interval(self) -> bool:
        """Whether there are runs enough for a jackknife interval."""
        return self.runs >= FEWEST_RUNS


def permute_runs(
    similarity: ArrayLike, tasks: Sequence[Hashable], *, draws: int = 9999, seed: int = 0
) -> RunPermutation:
    """Return the permutation test over runs: the unit is the run, never the pair.

    Parameters
    ----------
    similarity
        ``(N, N)``, symmetric: one number per pair of runs, for example the median ω. NaN pairs
        do not count.
    tasks
        Task of each run. Relabeling keeps how many runs each task has.
    draws, seed
        Random relabelings, where all would be more than 20,000.

    Raises
    ------
    InputError
        Fewer than two tasks, no task with two runs, or a matrix of another shape.

    Notes
    -----
    The smallest p there is: 1/3 for two tasks of two runs, 1/10 for 2 × 3, 1/280 for 3 × 3.
    """
    values = np.array(similarity, dtype=np.float64)
    codes = np.unique(np.array([str(task) for task in tasks]), return_inverse=True)[1]
    sizes = np.bincount(codes)
    if len(sizes) < 2 or sizes.max() < 2:
        message = (
            f"A permutation of runs needs two tasks, one of them with two runs; the {len(codes)} "
            f"runs have {len(sizes)} task(s), at most {sizes.max(initial=0)} run(s) each."
        )
        raise InputError(message)
    if values.shape != codes.shape * 2:
        message = (
            f"Every pair of the {len(codes)} runs needs a value: similarity must have shape "
            f"{codes.shape * 2}, found {values.shape}."
        )
        raise InputError(message)
    np.fill_diagonal(values, np.nan)
    observed = task_difference(values, codes)
    total = _partitions(sizes)
    exact = total <= ALL_RELABELINGS
    relabeled = _all_partitions(sizes) if exact else _random_partitions(codes, draws, seed)
    differences = np.array([task_difference(values, labels) for labels in relabeled])
    # A relabeling that is the same partition must not be lost to rounding; one that missing
    # pairs leave without a difference speaks against the claim.
    as_large = int(np.count_nonzero(~(differences < observed - 1e-12 * abs(observed))))
    count = len(differences)
    p = as_large / count if exact else (as_large + 1) / (count + 1)
    smallest = 1 / total if exact else 1 / (count + 1)
    return RunPermutation(observed, p, smallest, count, exact, len(codes))


def task_difference(values: NDArray[np.float64], codes: NDArray[np.intp]) -> float:
    """Return the mean over pairs of one task minus that over pairs of different tasks.

    Parameters
    ----------
    values
        ``(N, N)``, symmetric, NaN where a pair is not known and on the diagonal.
    codes
        Task of each run as a number, ``(N,)``.

    Returns
    -------
    float
        NaN where pairs of one task, or of different ones, are missing altogether.
    """
    same = codes[:, None] == codes[None, :]
    defined = ~np.isnan(values)
    within, between = values[same & defined], values[~same & defined]
    if not (within.size and between.size):
        return float("nan")
    return float(within.mean() - between.mean())


def _partitions(sizes: NDArray[np.intp]) -> int:
    """Return in how many ways runs fall into unnamed groups of these sizes."""
    total, left = 1, int(sizes.sum())
    for size in sizes:
        total *= comb(left, int(size))
        left -= int(size)
    for alike in np.unique(sizes, return_counts=True)[1]:
        total //= factorial(int(alike))
    return total


def _all_partitions(sizes: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
    """Yield every partition once, as group codes."""
    codes = np.full(int(sizes.sum()), -1)

    def place(group: int) -> Iterator[NDArray[np.intp]]:
        if group == len(sizes):
            yield codes.copy()
            return
        free = np.flatnonzero(codes < 0)
        for chosen in combinations(free.tolist(), int(sizes[group])):
            # Groups of one size are the same group under another name: keep them in order.
            if group and sizes[group] == sizes[group - 1]:
                before = int(np.flatnonzero(codes == group - 1)[0])
                if chosen[0] < before:
                    continue
            codes[list(chosen)] = group
            yield from place(group + 1)
            codes[list(chosen)] = -1

    # Sizes in order, so that equal ones are neighbors.
    sizes = np.sort(sizes)
    yield from place(0)


def _random_partitions(
    codes: NDArray[np.intp], draws: int, seed: int
) -> Iterator[NDArray[np.intp]]:
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield rng.permutation(codes)


def jackknife(
    statistic: Callable[[NDArray[np.intp]], float], runs: int
) -> tuple[float, float | None]:
    """Return a statistic over runs and its leave-one-run-out standard error.

    Parameters
    ----------
    statistic
        Of an array of run indices.
    runs
        How many there are; below three there is no error to be had, and it is None.
    """
    every = np.arange(runs)
    value = float(statistic(every))
    if runs < FEWEST_RUNS:
        return value, None
    left = np.array([statistic(np.delete(every, run)) for run in every])
    return value, float(np.sqrt((runs - 1) / runs * np.sum((left - left.mean()) ** 2)))
