"""Chance of φ and ω: what independent uniform subspaces give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


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


def similarity_p_value(
    dimension: int, i: ArrayLike, j: ArrayLike, value: ArrayLike
) -> NDArray[np.float64]:
    """Return P(φ_null(i, j) ≥ value) for independent uniform subspaces of R^dimension.

    Exact where min(i, j) = 1 (φ is then Beta distributed); otherwise a Beta distribution with the
    exact mean, variance and support of φ, whose distribution function is off by at most 0.004 and
    by a sixth of itself at p = .001. It is not to be trusted below 1e-4: see `p_value_text`.

    Parameters
    ----------
    dimension
        Of the space.
    i, j, value
        Dimensions of the subspaces and φ; they broadcast.

    Returns
    -------
    ndarray
        In [0, 1]; 1 where a subspace is the whole space, since φ is 1 there whatever the other.
        NaN where φ is.
    """
    from scipy.special import betainc

    mean, variance, low = _similarity_moments(dimension, i, j)
    a, b = _beta_shape(mean, variance, low, 1.0)
    above = np.clip((1 - np.asarray(value, dtype=np.float64)) / (1 - low), 0, 1)
    return np.where(variance > 0, betainc(b, a, above), np.where(np.isnan(value), np.nan, 1.0))


def similarity_null_method(i: ArrayLike, j: ArrayLike) -> NDArray[np.str_]:
    """Return how `similarity_p_value` finds each p: ``"exact"`` or ``"matched beta"``."""
    return np.where(np.minimum(i, j) == 1, "exact", "matched beta")


def similarity_quantile(
    dimension: int, i: ArrayLike, j: ArrayLike, level: ArrayLike
) -> NDArray[np.float64]:
    """Return the value that φ(i, j) of random subspaces stays below with probability ``level``.

    The inverse of `similarity_p_value`, for bands in plots.
    """
    from scipy.special import betaincinv

    mean, variance, low = _similarity_moments(dimension, i, j)
    a, b = _beta_shape(mean, variance, low, 1.0)
    return np.where(variance > 0, low + (1 - low) * betaincinv(a, b, level), 1.0)


def similarity_draws(
    dimension: int, i: int, j: int, draws: int, *, seed: int = 0
) -> NDArray[np.float64]:
    """Return ``(draws,)`` exact samples of φ(i, j) of random subspaces, without any subspace.

    min(i, j)·φ is Pillai's trace of a matrix-variate Beta distribution, whose tridiagonal model
    (Edelman & Sutton 2008) needs 2·min(i, j) − 1 scalar Beta variables per draw.
    """
    rng = np.random.default_rng(seed)
    least = max(0, i + j - dimension)  # so many directions are common to any two such subspaces
    rows, columns = (dimension - i, dimension - j) if least else (i, j)
    p, q = sorted((rows, columns))
    if p == 0:
        return np.ones(draws)
    a, b = q - p, dimension - p - q
    k = np.arange(1, p + 1)
    c = rng.beta((a + k) / 2, (b + k) / 2, (draws, p))
    e = rng.beta(k[:-1] / 2, (a + b + 1 + k[:-1]) / 2, (draws, p - 1))
    trace = c[:, -1] + np.sum(c[:, :-1] * (1 - e) + (1 - c[:, 1:]) * e, axis=1)
    values: NDArray[np.float64] = (trace + least) / min(i, j)
    return values


def similarity_maximum(dimension: int, i: int, j: int, count: int) -> float:
    """Return the expected largest of ``count`` independent φ(i, j) of random subspaces.

    What "the largest of M modules" has to be held against.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    levels = ((nodes + 1) / 2) ** (1 / count)  # the maximum's quantiles, by those of one value
    return float(np.sum(weights / 2 * similarity_quantile(dimension, i, j, levels)))


def _similarity_moments(
    dimension: int, i: ArrayLike, j: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return mean, variance and least value of φ(i, j)."""
    rows, columns = np.asarray(i, dtype=np.float64), np.asarray(j, dtype=np.float64)
    least = np.maximum(0.0, rows + columns - dimension) / np.minimum(rows, columns)
    variance = similarity_variance(dimension, i, j)
    # Where nothing varies the support is a point; any other keeps the arithmetic finite.
    return similarity_mean(dimension, i, j), variance, np.where(variance > 0, least, 0.0)


def _beta_shape(
    mean: ArrayLike, variance: ArrayLike, low: ArrayLike, high: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (a, b) of the Beta distribution on [low, high] with this mean and variance."""
    width = np.subtract(high, low)
    m = np.clip(np.subtract(mean, low) / width, 1e-300, 1 - 1e-16)
    v = np.asarray(variance) / width**2
    size = m * (1 - m) / np.where(v > 0, v, 1.0) - 1
    size = np.maximum(size, 1e-300)
    return m * size, (1 - m) * size


def energy_overlap_mean(dimension: int, participation: tuple[float, float]) -> float:
    """Return the mean of ω for spectra with the given participation ratios.

    ``E ω = sqrt(PR₁·PR₂) / d``, since every squared cosine between independent uniform
    directions has mean 1/d.
    """
    return float(np.sqrt(participation[0] * participation[1]) / dimension)


def energy_overlap_variance(dimension: int, participation: tuple[float, float]) -> float:
    """Return the variance of ω for spectra with the given participation ratios (exact).

    ``2(1 − PR₁/d)(1 − PR₂/d) / [(d−1)(d+2)]``: ω is tr(M·QNQᵀ)/(‖M‖‖N‖) for a Haar rotation Q,
    whose second moment depends on the traces of M, M², N and N² alone.
    """
    d = dimension
    if d == 1:
        return 0.0
    spread = [1.0 - pr / d for pr in participation]
    return 2.0 * spread[0] * spread[1] / ((d - 1.0) * (d + 2.0))


def energy_overlap_p_value(
    dimension: int, participation: tuple[ArrayLike, ArrayLike], value: ArrayLike
) -> NDArray[np.float64]:
    """Return P(ω_null ≥ value), by the Beta distribution with ω's exact mean and variance.

    Exact for two updates of rank 1; else off by at most 0.06 in the distribution function, most
    where one direction dominates either update.
    ``participation`` and ``value`` broadcast.
    """
    from scipy.special import betainc

    d = float(dimension)
    one, two = (np.asarray(pr, dtype=np.float64) for pr in participation)
    mean = np.sqrt(one * two) / d
    variance = 2 * (1 - one / d) * (1 - two / d) / max((d - 1) * (d + 2), 1.0)
    a, b = _beta_shape(mean, variance, 0.0, 1.0)
    above = np.clip(1 - np.asarray(value, dtype=np.float64), 0, 1)
    return np.where(variance > 0, betainc(b, a, above), np.where(np.isnan(value), np.nan, 1.0))


def signed_cosine_p_value(
    shape: tuple[int, int], participation: tuple[float, float], value: ArrayLike
) -> NDArray[np.float64]:
    """Return the two-sided p-value of a signed cosine of independent, isotropic updates.

    The null has mean 0, variance 1/(d_out·d_in) and excess kurtosis 6/(PR₁·PR₂): it is taken as a
    sum of PR₁·PR₂ products of normal variables (variance-gamma), which has all three; its
    distribution function is off by at most 0.06, most for rank one against two. A normal
    distribution would call one pair in 70 of rank-one updates significant at p = .001.
    """
    from scipy.special import erfc, gammaincinv

    scaled = np.abs(np.asarray(value, dtype=np.float64)) * np.sqrt(float(shape[0]) * shape[1])
    half = max(participation[0] * participation[1], 1.0) / 2
    nodes, weights = np.polynomial.legendre.leggauss(200)
    # Given the one side's sizes the sum is normal; these are the nodes of their distribution,
    # crowded towards the upper end, where the tail comes from.
    level = 1 - ((1 - nodes) / 2) ** 4
    weights = weights / 2 * 4 * ((1 - nodes) / 2) ** 3
    spread = gammaincinv(half, level) / half
    p: NDArray[np.float64] = np.tensordot(
        erfc(scaled[..., None] / np.sqrt(2 * spread)), weights, axes=1
    )
    return p


def excess(value: ArrayLike, chance: ArrayLike) -> NDArray[np.float64]:
    """Return ``(value − chance) / (1 − chance)``: 0 at chance, 1 at full agreement.

    The only form in which overlaps of modules with different dimensions are averaged. NaN where
    chance is 1, since nothing can exceed it there.
    """
    v, c = np.asarray(value, dtype=np.float64), np.asarray(chance, dtype=np.float64)
    room = 1.0 - c
    return np.where(room > 0, (v - c) / np.where(room > 0, room, 1.0), np.nan)
