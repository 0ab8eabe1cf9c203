"""Chance of ω and of the signed cosine, and the form in which overlaps are averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.chance.moments import (
    energy_sums,
    matched_p_value,
    matched_quantile,
    overlap_moments,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray


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
    dimension: int, singular_values: Sequence[ArrayLike], value: ArrayLike
) -> NDArray[np.float64]:
    """Return P(ω_null ≥ value) for two spectra in independent uniform directions.

    By the Beta or beta prime distribution with ω's exact first three moments. Exact where both
    ranks are 1. Elsewhere p-values below .3 are off by at most 0.04, and .001 stands for
    .0003 to .0015, whatever the spectra (two moments alone would call .011 a .001); where one
    direction stands far above a flat rest, p-values near 1 are off by up to 0.15. Below 1e-4 only
    the order is meant; `energy_overlap_draws` gives exact ones.

    Parameters
    ----------
    dimension
        Dimension of the space, d_in or d_out.
    singular_values
        Those of the two updates, ``(..., r₁)`` and ``(..., r₂)``, in any scale; zeros may fill up.
    value
        ω; broadcasts with the leading axes of the spectra.

    Returns
    -------
    ndarray
        In [0, 1]; NaN if ω is NaN or an update is zero; 1 in one dimension.
    """
    return matched_p_value(_energy_overlap_moments(dimension, singular_values), value)


def energy_overlap_quantile(
    dimension: int, singular_values: Sequence[ArrayLike], level: ArrayLike
) -> NDArray[np.float64]:
    """Return the value that ω stays below with probability ``level``, for bands in plots."""
    return matched_quantile(_energy_overlap_moments(dimension, singular_values), level)


def _energy_overlap_moments(
    dimension: int, singular_values: Sequence[ArrayLike]
) -> NDArray[np.float64]:
    sums_a, sums_b = (energy_sums(values) for values in singular_values)
    moments = overlap_moments(dimension, sums_a, sums_b)
    unit = np.sqrt(sums_a[1] * sums_b[1])
    scaled: NDArray[np.float64] = moments / np.stack([unit, unit**2, unit**3])
    return scaled


def signed_cosine_p_value(
    shape: tuple[int, int], singular_values: Sequence[ArrayLike], value: ArrayLike
) -> NDArray[np.float64]:
    """Return the two-sided p-value of a signed cosine of independent, isotropic updates.

    Given the directions on one side, the cosine is a sum of products that behaves like one entry
    of a uniform direction on the other side (exactly so for rank 1), of a size that is the null of
    the energy-weighted overlap: cos² = S·c² with c² ~ Beta(1/2, (d − 1)/2) and S matched in three
    moments. Variance, 1/(d_out·d_in), and the excess kurtosis, about 6/(PR₁·PR₂), follow; a normal
    distribution would call one pair in 70 of rank-one updates significant at p = .001. Exact for
    two updates of rank 1; else off by at most 0.05 in the distribution function (near p = 1), p
    below .3 by at most 0.01, and .001 stands for .0007 to .0014.

    Parameters
    ----------
    shape
        ``(d_out, d_in)``.
    singular_values
        Those of the two updates, ``(..., r₁)`` and ``(..., r₂)``, in any scale; zeros may fill up.
    value
        The cosine, in [−1, 1]; broadcasts with the leading axes of the spectra.

    Returns
    -------
    ndarray
        In [0, 1]; NaN if the cosine is or an update is zero; 1 if both dimensions are 1.

    Notes
    -----
    By a quadrature over S with 64 nodes, good to 1e-6 relative down to p = 1e-12; some 0.1 ms each.
    """
    from scipy.special import betaincc

    smaller, larger = sorted(shape)
    cosine = np.asarray(value, dtype=np.float64)
    if larger == 1:
        return np.where(np.isnan(cosine), np.nan, 1.0)  # two numbers: the cosine is ±1
    sums_a, sums_b = (energy_sums(values) for values in singular_values)
    moments = overlap_moments(smaller, sums_a, sums_b)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    # Crowded towards both ends: the upper one makes the tail, the lower one the peak.
    x = (1 - nodes) / 2
    above = x**3 * (10 - 15 * x + 6 * x**2)
    weights = weights / 2 * 30 * (x * (1 - x)) ** 2
    size = matched_quantile(moments[..., None], 1 - above)
    ratio = np.square(cosine)[..., None] / np.maximum(size, 1e-300)
    p: NDArray[np.float64] = betaincc(0.5, (larger - 1) / 2, np.minimum(ratio, 1.0)) @ weights
    return np.where(np.isnan(moments[0]), np.nan, p)


def excess(value: ArrayLike, chance: ArrayLike) -> NDArray[np.float64]:
    """Return ``(value − chance) / (1 − chance)``: 0 at chance, 1 at full agreement.

    The only form in which overlaps of modules with different dimensions are averaged. NaN if
    chance is 1, since nothing can exceed it there.
    """
    v, c = np.asarray(value, dtype=np.float64), np.asarray(chance, dtype=np.float64)
    room = 1.0 - c
    return np.where(room > 0, (v - c) / np.where(room > 0, room, 1.0), np.nan)
