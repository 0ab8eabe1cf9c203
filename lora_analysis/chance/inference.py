"""From single p-values to conclusions: many modules, few adapters, few draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.text import P_FLOOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

# Fewer runs than this bear no interval.
FEWEST_RUNS = 3


def floored_p_value(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return p-values of at least `P_FLOOR`; NaN stays NaN."""
    floored: NDArray[np.float64] = np.maximum(p_values, P_FLOOR)
    return floored


def p_is_bound(p_values: ArrayLike) -> NDArray[np.bool_]:
    """Return True where a p-value is only an upper bound: at or below `P_FLOOR`.

    All p-values of this package that are computed from a distribution are at least `P_FLOOR`, exact
    ones too: a matched distribution does not resolve smaller ones. NaN is not a bound.
    """
    return np.asarray(np.less_equal(p_values, P_FLOOR))


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


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return p-values adjusted for testing all of them: Holm's step-down method (1979).

    The probability of any false rejection is at most the level, however the tests depend on each
    other. Each adjusted value is the smallest level at which its test is rejected. NaN stays NaN
    and does not count.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    defined = np.flatnonzero(~np.isnan(p))
    order = defined[np.argsort(p[defined], kind="stable")]
    scaled = p[order] * np.arange(order.size, 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


@dataclass(frozen=True, slots=True)
class RankTest:
    """Rank of one pair of adapters among all pairs of the two and their references.

    Attributes
    ----------
    p_value
        Share of all pairs whose value is at least that of the tested pair.
    smallest_p_value
        ``1/pairs``: the p-value of the most alike pair.
    rank
        1 for the most alike pair; ties count against the tested pair.
    pairs
        Number of pairs, ``n(n − 1)/2``.
    """

    p_value: float
    smallest_p_value: float
    rank: int
    pairs: int


def rank_test(values: ArrayLike) -> RankTest:
    """Test if the first two of n adapters are more alike than all n are among each other.

    ``p = #{pairs with value ≥ value(0, 1)}/N`` over all ``N = n(n − 1)/2`` pairs. Exact if the n
    adapters are exchangeable, that is if the first two were trained as the others were, on two more
    unrelated tasks. Adapters that were trained twice as hard as every other are at p ≤ .05 in 35 to
    67 % of simulated comparisons without a relation: check norms and ranks first.

    Parameters
    ----------
    values
        ``(n, n)``, symmetric: one value per pair. Adapters 0 and 1 are tested; the others are
        references, one per task. The diagonal is ignored.

    Raises
    ------
    InputError
        No reference adapter, a matrix that is not square, or an undefined value.

    Notes
    -----
    The smallest p-value is .17 with two references, .10 with three, .067 with four, .048 with five
    and .022 with eight.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 3:
        message = (
            "A rank test needs one value per pair of two adapters and at least one reference: "
            f"values must have shape (n, n) with n of at least 3, found {matrix.shape}."
        )
        raise InputError(message)
    i, j = np.triu_indices(len(matrix), 1)
    pairs = matrix[i, j]  # (0, 1) comes first
    if np.isnan(pairs).any():
        a, b = next((a, b) for a, b, value in zip(i, j, pairs, strict=True) if np.isnan(value))
        message = (
            f"The value of adapters {a} and {b} is undefined (NaN): leave out one of them, or the "
            "modules that are not defined for every pair."
        )
        raise InputError(message)
    # Values that are equal but for the order of a sum are ties.
    tolerance = 1e-12 * np.abs(pairs).max()
    rank = int(np.count_nonzero(pairs >= pairs[0] - tolerance))
    return RankTest(rank / len(pairs), 1 / len(pairs), rank, len(pairs))


def jackknife(
    statistic: Callable[[NDArray[np.intp]], float], runs: int
) -> tuple[float, float | None]:
    """Return a statistic over runs and its leave-one-run-out standard error.

    Parameters
    ----------
    statistic
        Function of an array of run indices.
    runs
        Number of runs; fewer than three give None for the error.
    """
    every = np.arange(runs)
    value = float(statistic(every))
    if runs < FEWEST_RUNS:
        return value, None
    left = np.array([statistic(np.delete(every, run)) for run in every])
    return value, float(np.sqrt((runs - 1) / runs * np.sum((left - left.mean()) ** 2)))
