"""Chance of ‖UᵀWV‖ and its kin: what random directions give against a fixed matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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


def energy_p_value(value: ArrayLike, mean: ArrayLike, variance: ArrayLike) -> NDArray[np.float64]:
    """Return P(energy_null ≥ value), by the gamma distribution of this mean and variance.

    For squared norms of W through random directions. Where many singular values carry W
    ((Σσ²)²/Σσ⁴ ≥ 10) the distribution function is off by at most 0.05, and p = .001 stands for
    .0001 to .002; where one or two dominate by up to 0.2: draw random directions instead
    (`monte_carlo_p_value`). 1 where nothing varies.
    """
    from scipy.special import gammaincc

    m, v = np.asarray(mean, dtype=np.float64), np.asarray(variance, dtype=np.float64)
    safe = np.where(v > 0, v, 1.0)
    return np.where(v > 0, gammaincc(m**2 / safe, np.asarray(value) * m / safe), 1.0)


def energy_share_quantile(
    k: ArrayLike, dimension: int, variance: ArrayLike, level: float
) -> NDArray[np.float64]:
    """Return a quantile of the share of energy in k directions that know nothing of it.

    By the Beta distribution with mean k/d and this variance (of the share), for bands in plots.
    """
    from scipy.special import betaincinv

    mean = np.asarray(k, dtype=np.float64) / dimension
    v = np.asarray(variance, dtype=np.float64)
    inside = (v > 0) & (mean < 1)
    size = np.where(inside, mean * (1 - mean) / np.where(inside, v, 1.0) - 1, 1.0)
    m = np.where(inside, mean, 0.5)
    return np.where(inside, betaincinv(m * size, (1 - m) * size, level), mean)
