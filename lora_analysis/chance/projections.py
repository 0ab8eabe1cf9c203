"""Chance of ‖UᵀWV‖ and its kin: what random directions give against a fixed matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.chance.inference import floored_p_value
from lora_analysis.chance.moments import (
    Energies,
    OverlapDistribution,
    energy_sums,
    matched_p_value,
    projected_moments,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def projected_norm_rms(
    weight_norm: float, shape: tuple[int, int], k: ArrayLike
) -> NDArray[np.float64]:
    """Return the root mean square of ‖UᵀWV‖_F for k random directions on each side (exact).

    ``‖W‖_F·k / sqrt(d_out·d_in)``: E‖UᵀWV‖_F² = k²‖W‖_F²/(d_out·d_in) for Haar U and V.
    """
    directions: NDArray[np.float64] = np.asarray(k, dtype=np.float64)
    return directions * (weight_norm / float(np.sqrt(float(shape[0] * shape[1]))))


def projected_energy_variance(
    norm_square: float, fourth: float, shape: tuple[int, int], k: ArrayLike
) -> NDArray[np.float64]:
    """Return the variance of ‖UᵀWV‖_F² for k random directions on each side (exact).

    Parameters
    ----------
    norm_square, fourth
        ``Σσ²`` and ``Σσ⁴`` of W.
    shape
        Of W.
    k
        Directions on each side.
    """
    n_directions = np.asarray(k, dtype=np.float64)
    (alpha_m, beta_m), (alpha_n, beta_n) = (_projection_moments(d, n_directions) for d in shape)
    t2, u = norm_square**2, fourth
    mean = n_directions**2 * norm_square / (float(shape[0]) * shape[1])
    second = t2 * (alpha_m * alpha_n + 2 * beta_m * beta_n) + 2 * u * (
        alpha_m * beta_n + beta_m * alpha_n + beta_m * beta_n
    )
    variance: NDArray[np.float64] = np.maximum(second - mean**2, 0.0)
    return variance


def _projection_moments(
    dimension: int, k: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return α, β: E[P_ab·P_cd] = α·δ_ab·δ_cd + β·(δ_ac·δ_bd + δ_ad·δ_bc) for a projection P."""
    d = float(dimension)
    if dimension == 1:
        return np.ones_like(k), np.zeros_like(k)
    scale = d * (d - 1) * (d + 2)
    return k * (k * (d + 1) - 2) / scale, k * (d - k) / scale


def one_sided_energy_variance(
    norm_square: float, fourth: float, dimension: int, k: ArrayLike
) -> NDArray[np.float64]:
    """Return the variance of ‖U_kᵀW‖_F² for k random directions of R^dimension (exact).

    Its mean is ``k·Σσ²/d``. For the rows, ``dimension`` is d_out; for ‖W·V_k‖_F² it is d_in. The
    same holds for the energy of ΔW in k directions that W fixes, with ΔW's own Σσ² and Σσ⁴.
    """
    d, n = float(dimension), np.asarray(k, dtype=np.float64)
    if dimension == 1:
        return np.zeros_like(n)
    room = max(d * fourth - norm_square**2, 0.0)
    variance: NDArray[np.float64] = 2 * n * (d - n) * room / (d**2 * (d - 1) * (d + 2))
    return variance


def largest_cosine_median(count: int, dimension: int) -> float:
    """Return about the median largest ``|cosine|`` of a random direction with ``count`` axes.

    ``Φ⁻¹(1 − ½(1 − 2^(−1/count)))/√dimension`` for orthonormal axes, each cosine taken as normal
    and independent: .0588 for 4096 of 4096, .120 for 768, .319 for 64. From 16 axes up it is off
    by at most 0.02 of itself.
    """
    from scipy.special import ndtri

    tail = -0.5 * np.expm1(-np.log(2.0) / count)
    return min(float(-ndtri(tail) / np.sqrt(dimension)), 1.0)


def energy_p_value(
    value: ArrayLike, mean: ArrayLike, variance: ArrayLike, total: ArrayLike = np.inf
) -> NDArray[np.float64]:
    """Return P(energy_null ≥ value), by the gamma distribution of this mean and variance.

    For squared norms of W through random directions where no more than ``Σσ²`` and ``Σσ⁴`` of W
    are known. p-values below .3 are off by at most 0.08; .001 stands for .0002 to .004, less where
    few directions meet many flat singular values and more where one or two carry W. With all
    singular values use `enrichment_p_value` or `one_sided_energy_p_value`.

    Parameters
    ----------
    value, mean, variance
        Energy, and its mean and variance for random directions.
    total
        ``Σσ²`` of W, if known. If random directions hold more than half of it on average, a Beta
        distribution on [0, total] replaces the gamma distribution, which gives far too large
        p-values near the total. In simulations (k from half of the directions to d − 1) p ≤ .001
        then has a probability of .002 at most for d ≥ 64, and of .007 for d = 16.

    Returns
    -------
    ndarray
        In [1e-4, 1], see `p_is_bound`; 1 if nothing varies. NaN if the value is NaN.
    """
    from scipy.special import betaincc, gammaincc

    x, m, v, t = (np.asarray(a, dtype=np.float64) for a in (value, mean, variance, total))
    safe = np.where(v > 0, v, 1.0)
    p = gammaincc(m**2 / safe, x * m / safe)
    near = 2 * m > t
    if near.any():
        whole = np.where(near, t, 2 * m)
        share = np.minimum(m / whole, 1.0)
        size = np.maximum(share * (1 - share) * whole**2 / safe - 1, 1e-12)
        unit = np.clip(x / whole, 0.0, 1.0)
        beta = betaincc(
            np.maximum(share * size, 1e-12), np.maximum((1 - share) * size, 1e-12), unit
        )
        p = np.where(near, beta, p)
    return floored_p_value(np.where(np.isnan(x), np.nan, np.where(v > 0, p, 1.0)))


def enrichment_p_value(
    enrichment: ArrayLike, singular_values: ArrayLike, shape: tuple[int, int], k: ArrayLike
) -> NDArray[np.float64]:
    """Return P(enrichment_null ≥ enrichment) for k random directions on each side.

    By the Beta or beta prime distribution with the exact first three moments of ‖UᵀWV‖_F². For
    weights carried by ten directions or more the distribution function is off by at most 0.01;
    whatever W, p-values below .3 are off by at most 0.03, and .001 stands for .0005 to .002.
    `enrichment_draws` gives exact ones.

    Parameters
    ----------
    enrichment
        ``‖U_kᵀWV_k‖_F / (‖W‖_F·k/√(d_out·d_in))``, not squared.
    singular_values
        Of W, ``(n,)``: all of them, in any scale.
    shape
        Of W.
    k
        Directions on each side; broadcasts with ``enrichment``.

    Returns
    -------
    ndarray
        In [1e-4, 1], see `p_is_bound`; 1 if nothing varies. NaN if the enrichment is NaN.
    """
    directions = np.asarray(k, dtype=np.float64)
    moments = projected_moments(shape, energy_sums(singular_values), directions)
    share = np.square(np.asarray(enrichment, dtype=np.float64)) * moments[0]
    return floored_p_value(matched_p_value(moments, share))


def one_sided_energy_p_value(
    ratio: ArrayLike, singular_values: ArrayLike, dimension: int, k: ArrayLike
) -> NDArray[np.float64]:
    """Return P(energy_null ≥ energy) for the energy of a matrix in k directions of one side.

    For ``‖U_kᵀW‖_F²`` with U_k random, or ‖U_kᵀΔW‖_F² with U_k the top of W's basis and ΔW's
    directions random. By the distribution with the exact first three moments of the share of energy
    in the k directions, or, if they are more than half of all, of the share outside them; exact for
    rank 1.

    In simulations (d = 16, 64 and 192, k = 1 to d − 1) p ≤ .05 has a probability of .06 at most and
    p ≤ .001 one of .0015 at most, for every spectrum. If one direction dominates and k is nearly d,
    p-values are far too large: at k = d − 1, p ≤ .05 has a probability of .002.

    Parameters
    ----------
    ratio
        Energy over its mean, ``‖U_kᵀW‖_F² / (k·‖W‖_F²/dimension)``.
    singular_values
        Of the matrix, ``(r,)``, in any scale.
    dimension
        d_out for the rows, d_in for the columns.
    k
        How many directions; broadcasts with ``ratio``.

    Returns
    -------
    ndarray
        In [1e-4, 1], see `p_is_bound`; 1 if the k directions are all. NaN if the ratio is NaN.
    """
    directions = np.asarray(k, dtype=np.float64)
    share = np.asarray(ratio, dtype=np.float64) * directions / dimension
    return floored_p_value(_shares(singular_values, dimension, directions).p_value(share))


def one_sided_energy_quantile(
    singular_values: ArrayLike, dimension: int, k: ArrayLike, level: ArrayLike
) -> NDArray[np.float64]:
    """Return a quantile of the share ‖U_kᵀΔW‖_F²/‖ΔW‖_F², in [0, 1], for bands in plots.

    For parameters and distribution see `one_sided_energy_p_value`; 1 if k directions are all.
    If one direction of ΔW dominates, bands are too wide towards the nearer end of [0, 1]: outside
    the 2.5 % quantile there may be 0.3 % of the shares.
    """
    directions = np.asarray(k, dtype=np.float64)
    quantile = _shares(singular_values, dimension, directions).quantile(level)
    return np.clip(quantile, 0.0, 1.0)


def _shares(
    singular_values: ArrayLike, dimension: int, directions: NDArray[np.float64]
) -> OverlapDistribution:
    energies = Energies.of_spectrum(singular_values)
    for _ in range(directions.ndim):
        energies = energies.expand_dims(-1)
    return OverlapDistribution.of(dimension, energies, Energies.of_projection(directions))
