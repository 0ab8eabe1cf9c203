"""Chance of ω and of the signed cosine, and the form in which overlaps are averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.chance.inference import floored_p_value
from lora_analysis.chance.moments import (
    Energies,
    OverlapDistribution,
    energy_sums,
    matched_quantile,
    overlap_moments,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

# Pairs whose distributions are computed at a time.
_PAIRS = 1 << 15


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

    By the Beta or beta prime distribution with ω's exact first three moments. Exact if both ranks
    are 1. Otherwise p-values below .3 are off by at most 0.04; with one direction far above a flat
    rest, p-values near 1 are off by up to 0.15. `energy_overlap_draws` gives exact p-values.

    In simulations of random subspaces (flat and geometric spectra, one strong direction, rank 1;
    d = 64, 192 and 768) the probability is .050 to .057 for p ≤ .05, .009 to .013 for p ≤ .01 and
    .0006 to .0012 for p ≤ .001 (two moments alone would give .011). Benjamini–Hochberg at .05 over
    24 modules then finds anything in 3.4 to 5.7 % of pairs. In small spaces (d = 16) p ≤ .05 has a
    probability of .064 at most. p-values hold for isotropic directions only: of unrelated adapters
    of one base far more are significant.

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
        In [1e-4, 1], see `p_is_bound`; 1 in one dimension. NaN if ω is NaN or an update is zero.
    """
    a, b = map(Energies.of_spectrum, singular_values)
    unit = np.sqrt(a.sums[1] * b.sums[1])
    omega = np.asarray(value, dtype=np.float64)
    return floored_p_value(OverlapDistribution.of(dimension, a, b).p_value(omega * unit))


def energy_overlap_p_values(
    dimension: ArrayLike, a: Energies, b: Energies, omega: ArrayLike
) -> NDArray[np.float64]:
    """Return `energy_overlap_p_value` of many pairs of updates, of any modules.

    Parameters
    ----------
    dimension
        Dimension of the space of each pair, ``(n,)``.
    a, b
        Energies of the two updates of each pair (`Energies.of_spectrum`).
    omega
        ω of each pair, ``(n,)``.

    Returns
    -------
    ndarray
        ``(n,)``; NaN if ω is NaN, or if an update is zero.

    Notes
    -----
    O(n), 0.4 µs each, a few megabytes at a time.
    """
    dimensions, values = np.asarray(dimension), np.asarray(omega, dtype=np.float64)
    p_values = np.empty(len(values))
    for start in range(0, len(values), _PAIRS):
        part = slice(start, start + _PAIRS)
        x, y = (Energies(e.sums[:, part], e.largest[part]) for e in (a, b))
        distribution = OverlapDistribution.of(dimensions[part], x, y)
        unit = np.sqrt(x.sums[1] * y.sums[1])
        p_values[part] = distribution.p_value(values[part] * unit)
    return floored_p_value(p_values)


def energy_overlap_quantile(
    dimension: int, singular_values: Sequence[ArrayLike], level: ArrayLike
) -> NDArray[np.float64]:
    """Return the value that ω stays below with probability ``level``, for bands in plots."""
    a, b = map(Energies.of_spectrum, singular_values)
    unit = np.sqrt(a.sums[1] * b.sums[1])
    quantile: NDArray[np.float64] = OverlapDistribution.of(dimension, a, b).quantile(level) / unit
    return quantile


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
        In [1e-4, 1], see `p_is_bound`; 1 if both dimensions are 1. NaN if the cosine is NaN or an
        update is zero.

    Notes
    -----
    By a quadrature over S with 64 nodes, with a relative error of 1e-6; about 0.1 ms each.
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
    return floored_p_value(np.where(np.isnan(moments[0]), np.nan, p))


def excess(value: ArrayLike, chance: ArrayLike) -> NDArray[np.float64]:
    """Return ``(value − chance) / (1 − chance)``: 0 at chance, 1 at full agreement.

    The only form in which overlaps of modules with different dimensions are averaged. NaN if
    chance is 1, since nothing can exceed it there.
    """
    v, c = np.asarray(value, dtype=np.float64), np.asarray(chance, dtype=np.float64)
    room = 1.0 - c
    return np.where(room > 0, (v - c) / np.where(room > 0, room, 1.0), np.nan)
