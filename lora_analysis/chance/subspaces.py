"""Chance of φ: what independent uniform subspaces give."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_analysis.chance.inference import floored_p_value, monte_carlo_p_value
from lora_analysis.chance.moments import (
    matched_cdf,
    matched_p_value,
    matched_quantile,
    overlap_moments,
)
from lora_analysis.chance.sampling import similarity_draws

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

# In spaces smaller than this no matched distribution holds (at d = 4, i = j = 2 what it calls .001
# is .006): their few cells are sampled.
_SAMPLED_BELOW = 16
_SAMPLES = 20_000


def similarity_mean(dimension: int, i: ArrayLike, j: ArrayLike) -> NDArray[np.float64]:
    """Return the mean of φ(i, j) for independent uniform subspaces of R^dimension.

    ``E φ = max(i, j) / d``. ``i`` and ``j`` broadcast.
    """
    larger: NDArray[np.float64] = np.maximum(np.asarray(i), np.asarray(j), dtype=np.float64)
    return larger / dimension


def similarity_grid_mean(dimension: int, rows: int, columns: int) -> NDArray[np.float64]:
    """Return the mean of φ(i, j) for i = 1…rows, j = 1…columns, shape ``(rows, columns)``."""
    return similarity_mean(
        dimension, np.arange(1, rows + 1)[:, None], np.arange(1, columns + 1)[None, :]
    )


def similarity_variance(dimension: int, i: ArrayLike, j: ArrayLike) -> NDArray[np.float64]:
    """Return the variance of φ(i, j) for independent uniform subspaces of R^dimension (exact).

    ``2ij(d−i)(d−j) / [d²(d−1)(d+2)·min(i, j)²]``: the second moment of ‖P₁P₂‖_F² for random
    projections. Zero where either subspace is the whole space.
    """
    d = np.float64(dimension)
    rows, columns = np.asarray(i, dtype=np.float64), np.asarray(j, dtype=np.float64)
    if dimension == 1:
        return np.zeros(np.broadcast_shapes(rows.shape, columns.shape))
    spread = 2 * rows * columns * (d - rows) * (d - columns)
    variance: NDArray[np.float64] = spread / (
        d**2 * (d - 1) * (d + 2) * np.minimum(rows, columns) ** 2
    )
    return variance


# Points of the integral over the limiting distribution of squared cosines.
_POINTS = 2048


@lru_cache(maxsize=4096)
def weaker_half_mean(dimension: int, i: int, j: int) -> float:
    """Return the mean of the smaller half of the squared cosines between random subspaces.

    Parameters
    ----------
    dimension
        Dimension of the space.
    i, j
        Dimensions of the subspaces, together at most ``dimension``.

    Returns
    -------
    float
        Mean of the ⌊n/2⌋ smallest of the n = min(i, j) squared cosines; 0 if n = 1.

    Notes
    -----
    From the limiting distribution of squared cosines for large dimensions (Wachter 1980), with
    density proportional to ``√((x₊ − x)(x − x₋)) / (x(1 − x))`` between
    ``x± = (√(p(1 − q)) ± √(q(1 − p)))²``, p and q the dimensions divided by that of the space.
    Draws at finite dimensions (16 to 1,024, ranks from 4) lie below it by at most 0.006.
    """
    least = min(i, j)
    half = least // 2
    if half == 0:
        return 0.0
    p, q = least / dimension, max(i, j) / dimension
    ends = np.square(np.sqrt(q * (1 - p)) + np.array([-1, 1]) * np.sqrt(p * (1 - q)))
    # x as the cosine of an angle: the density has square roots at both ends.
    angle = (np.arange(_POINTS) + 0.5) * np.pi / _POINTS
    x = ends.mean() - np.diff(ends) / 2 * np.cos(angle)
    mass = np.sin(angle) ** 2 / (x * (1 - x))
    mass /= mass.sum()
    below = np.cumsum(mass) - mass
    fraction = half / least
    return float(np.clip(fraction - below, 0.0, mass) @ x / fraction)


class _Cells(NamedTuple):
    """Pairs of subspaces reduced to those that meet only in 0, the smaller first.

    i + j − d directions are common to any two subspaces; what is left of φ is that of their
    complements. The trace min(i, j)·φ − common lies in [0, p].
    """

    dimension: int
    p: NDArray[np.float64]
    q: NDArray[np.float64]
    common: NDArray[np.float64]
    least: NDArray[np.float64]

    @property
    def constant(self) -> NDArray[np.bool_]:
        """True if a subspace is the whole space."""
        return np.less(self.p, 1)

    @property
    def exact(self) -> NDArray[np.bool_]:
        """True if the distribution is a Beta distribution, or a point."""
        return np.less_equal(self.p, 1)

    @property
    def upper(self) -> NDArray[np.bool_]:
        """True if the upper end of the support is the nearer one."""
        return np.greater(2 * self.q, self.dimension)

    @property
    def moments(self) -> NDArray[np.float64]:
        """Moments of the distance from the nearer end; arbitrary if the distribution is exact."""
        p, q = np.maximum(self.p, 1.0), np.maximum(self.q, 1.0)
        q = np.where(self.upper, np.maximum(self.dimension - q, 1.0), q)
        return overlap_moments(self.dimension, np.stack([p] * 3), np.stack([q] * 3))


def _cells(dimension: int, i: ArrayLike, j: ArrayLike) -> _Cells:
    rows, columns = np.asarray(i, dtype=np.float64), np.asarray(j, dtype=np.float64)
    common = np.maximum(rows + columns - dimension, 0.0)
    first = np.where(common > 0, dimension - rows, rows)
    second = np.where(common > 0, dimension - columns, columns)
    return _Cells(
        dimension,
        np.minimum(first, second),
        np.maximum(first, second),
        common,
        np.minimum(rows, columns),
    )


@lru_cache(maxsize=256)
def _traces(dimension: int, p: int, q: int) -> NDArray[np.float64]:
    return p * similarity_draws(dimension, p, q, _SAMPLES)


def similarity_p_value(
    dimension: int, i: ArrayLike, j: ArrayLike, value: ArrayLike
) -> NDArray[np.float64]:
    """Return P(φ_null(i, j) ≥ value) for independent uniform subspaces of R^dimension.

    Exact (Beta) where a subspace or its complement has one dimension. Otherwise a Beta
    distribution with the first three moments of φ, anchored at the nearer end of its support: its
    distribution function is off by at most 0.003, p = .001 by at most a third of itself. In spaces
    of less than 16 dimensions the p-value is that among 20,000 exact draws.

    Parameters
    ----------
    dimension
        Dimension of the space.
    i, j, value
        Dimensions of the subspaces and φ; they broadcast.

    Returns
    -------
    ndarray
        In [1e-4, 1], see `p_is_bound`; 1 if a subspace is the whole space, since φ is 1 there
        whatever the other. NaN if φ is NaN.
    """
    from scipy.special import betaincc

    phi = np.asarray(value, dtype=np.float64)
    cells = _cells(dimension, i, j)
    trace = np.clip(phi * cells.least - cells.common, 0.0, cells.p)
    beta = betaincc(
        np.maximum(cells.q, 1.0) / 2, np.maximum(dimension - cells.q, 1.0) / 2, np.minimum(trace, 1)
    )
    exact = np.where(cells.constant & ~np.isnan(phi), 1.0, beta)
    if cells.exact.all():
        return floored_p_value(exact)
    if dimension < _SAMPLED_BELOW:
        matched = _sample_statistic(cells, trace, monte_carlo_p_value)
    else:
        above = matched_p_value(cells.moments, trace)
        matched = np.where(cells.upper, matched_cdf(cells.moments, cells.p - trace), above)
    return floored_p_value(np.where(cells.exact, exact, matched))


def _sample_statistic(
    cells: _Cells, values: NDArray[np.float64], statistic: Callable[..., Any]
) -> NDArray[np.float64]:
    """Return a statistic of the draws of each cell and its value; 1 if the cell is exact."""
    every, p, q = np.broadcast_arrays(values, cells.p, cells.q)
    results = np.ones(every.shape)
    for index in np.ndindex(every.shape):
        if p[index] > 1:
            draws = _traces(cells.dimension, int(p[index]), int(q[index]))
            results[index] = statistic(draws, float(every[index]))
    return results


def similarity_null_method(dimension: int, i: ArrayLike, j: ArrayLike) -> NDArray[np.str_]:
    """Return how each p-value is computed: "exact", "matched beta" or "sampled"."""
    other = "sampled" if dimension < _SAMPLED_BELOW else "matched beta"
    return np.where(_cells(dimension, i, j).exact, "exact", other)


def similarity_quantile(
    dimension: int, i: ArrayLike, j: ArrayLike, level: ArrayLike
) -> NDArray[np.float64]:
    """Return the value that φ(i, j) of random subspaces stays below with probability ``level``.

    The inverse of `similarity_p_value`, for bands in plots; 1 if a subspace is everything.
    """
    from scipy.special import betaincinv

    cells = _cells(dimension, i, j)
    levels = np.asarray(level, dtype=np.float64)
    trace = betaincinv(
        np.maximum(cells.q, 1.0) / 2, np.maximum(dimension - cells.q, 1.0) / 2, levels
    )
    if not cells.exact.all():
        if dimension < _SAMPLED_BELOW:
            matched = _sample_statistic(cells, levels, np.quantile)
        else:
            below = matched_quantile(cells.moments, np.where(cells.upper, 1 - levels, levels))
            matched = np.where(cells.upper, cells.p - below, below)
        trace = np.where(cells.exact, trace, matched)
    trace = np.where(cells.constant, 0.0, np.clip(trace, 0.0, cells.p))
    return (trace + cells.common) / cells.least


def similarity_maximum(dimension: int, i: int, j: int, count: int) -> float:
    """Return the expected maximum of ``count`` independent φ(i, j) of random subspaces.

    The random baseline of a maximum over modules of one dimension, see `similarity_maximum_at`.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    levels = ((nodes + 1) / 2) ** (1 / count)  # the maximum's quantiles, by those of one value
    return float(np.sum(weights / 2 * similarity_quantile(dimension, i, j, levels)))


def similarity_maximum_at(dimensions: ArrayLike, index: int, i: int = 1, j: int = 1) -> float:
    """Return the expected maximum of φ(i, j) over the values with the dimension of one of them.

    φ of random subspaces is larger in a smaller space. A maximum over modules of several dimensions
    is therefore compared with the expected maximum of its own dimension.

    Parameters
    ----------
    dimensions
        ``(n,)``: dimension of the space of each value that the maximum was taken over.
    index
        Position of the maximum. If dimensions differ, choose it by excess, not by φ.
    i, j
        Dimensions of the subspaces.
    """
    every = np.asarray(dimensions)
    dimension = int(every[index])
    return similarity_maximum(dimension, i, j, int(np.count_nonzero(every == dimension)))
