"""Three exact moments of a random energy, and the distribution on [0, ∞) that has all three.

Every overlap and energy here is ``tr(M·Q·N·Qᵀ)`` with Q uniform over the orthogonal group. Its
moments follow from zonal polynomials C_κ (James 1964): averaging over Q gives
``C_κ(M)·C_κ(N)/C_κ(I)``, and the n-th power of a trace is the sum of C_κ over the partitions of n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    _Polynomials = tuple[NDArray[np.float64], ...]

# Relative variance below which nothing varies but the rounding.
_CONSTANT = 1e-13


def energy_sums(singular_values: ArrayLike) -> NDArray[np.float64]:
    """Return Σσ², Σσ⁴ and Σσ⁶ of values scaled to Σσ² = 1, shape ``(3, ...)``.

    ``singular_values`` is ``(..., r)``; zeros may fill it up. NaN if all are zero.
    """
    s = np.abs(np.asarray(singular_values, dtype=np.float64))
    largest = s.max(axis=-1, keepdims=True)
    energy = np.square(s / np.where(largest > 0, largest, np.nan))
    energy /= energy.sum(axis=-1, keepdims=True)
    return np.stack([np.sum(energy**power, axis=-1) for power in (1, 2, 3)])


def overlap_moments(
    dimension: ArrayLike, sums_m: NDArray[np.float64], sums_n: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return E T, E T², E T³ of ``T = tr(M·Q·N·Qᵀ)``, Q uniform on O(dimension); ``(3, ...)``.

    ``one`` and ``two``, ``(3, ...)``, hold tr M, tr M², tr M³ and those of N; they broadcast.
    """
    whole = _sums_of_identity(dimension)
    return _from_polynomials(
        [m * n / i for m, n, i in zip(_zonal(sums_m), _zonal(sums_n), _whole(whole), strict=True)]
    )


def projected_moments(
    shape: tuple[int, int], sums: NDArray[np.float64], k: ArrayLike
) -> NDArray[np.float64]:
    """Return E T, E T², E T³ of ``T = ‖UᵀWV‖_F²`` for k random directions on each side.

    ``sums`` are those of W's energies, ``(3,)``; the result is ``(3, ...)`` as k is.
    """
    weight = _zonal(np.reshape(sums, (3, *[1] * np.ndim(k))))
    rows, columns = (_whole(_sums_of_identity(d)) for d in shape)
    directions = _zonal(_sums_of_identity(k))
    return _from_polynomials(
        [
            w * (p / m) * (p / n)
            for w, p, m, n in zip(weight, directions, rows, columns, strict=True)
        ]
    )


def _sums_of_identity(dimension: ArrayLike) -> NDArray[np.float64]:
    d = np.asarray(dimension, dtype=np.float64)
    return np.stack([d, d, d])


def _zonal(sums: NDArray[np.float64]) -> _Polynomials:
    """Return C_κ for κ = (1), (2), (1,1), (3), (2,1), (1,1,1) from the first three power sums."""
    p1, p2, p3 = sums
    return (
        p1,
        (p1**2 + 2 * p2) / 3,
        2 * (p1**2 - p2) / 3,
        (p1**3 + 6 * p1 * p2 + 8 * p3) / 15,
        3 * (p1**3 + p1 * p2 - 2 * p3) / 5,
        (p1**3 - 3 * p1 * p2 + 2 * p3) / 3,
    )


def _whole(sums: NDArray[np.float64]) -> _Polynomials:
    """Return C_κ(I), with ∞ if there are too few dimensions for κ, whose term then vanishes."""
    return tuple(np.where(value > 0, value, np.inf) for value in _zonal(sums))


def _from_polynomials(terms: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    first, *rest = np.broadcast_arrays(*terms)
    return np.stack([first, rest[0] + rest[1], rest[2] + rest[3] + rest[4]])


def matched_p_value(moments: NDArray[np.float64], value: ArrayLike) -> NDArray[np.float64]:
    """Return P(X ≥ value) for the Beta or beta prime distribution with these three moments.

    ``moments`` is ``(3, ...)`` and broadcasts with ``value``. If nothing varies, 1; NaN stays.
    """
    from scipy.special import betaincc

    x = np.asarray(value, dtype=np.float64)
    a, b, top, varies = _matched_shape(moments)
    p: NDArray[np.float64] = betaincc(a, b, _to_unit(np.maximum(x, 0.0), top))
    return np.where(np.isnan(x) | np.isnan(moments[0]), np.nan, np.where(varies, p, 1.0))


def matched_cdf(moments: NDArray[np.float64], value: ArrayLike) -> NDArray[np.float64]:
    """Return P(X ≤ value), as `matched_p_value` returns P(X ≥ value)."""
    from scipy.special import betainc

    x = np.asarray(value, dtype=np.float64)
    a, b, top, varies = _matched_shape(moments)
    p: NDArray[np.float64] = betainc(a, b, _to_unit(np.maximum(x, 0.0), top))
    return np.where(np.isnan(x) | np.isnan(moments[0]), np.nan, np.where(varies, p, 1.0))


def matched_quantile(moments: NDArray[np.float64], level: ArrayLike) -> NDArray[np.float64]:
    """Return the value that X stays below with probability ``level``: `matched_p_value` inverted.

    Returns the mean if the variance is zero.
    """
    from scipy.special import betaincinv

    a, b, top, varies = _matched_shape(moments)
    y = betaincinv(a, b, level)
    with np.errstate(divide="ignore"):
        x = np.where(top > 0, top * y, -top * y / (1 - y))
    quantile: NDArray[np.float64] = np.where(varies, x, moments[0])
    return quantile


def _to_unit(x: NDArray[np.float64], top: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map [0, top] to [0, 1]; a negative top stands for the half-line and its scale."""
    return np.where(top > 0, np.minimum(x / top, 1.0), x / (x + np.abs(top)))


def _matched_shape(
    moments: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return a, b, the upper end, and whether anything varies.

    For top·Beta(a, b) the ratios of successive moments are q_n = top·(a + n)/(a + b + n): linear in
    the unknowns. The same line continued to a negative end is the beta prime distribution,
    |top|·Y/(1 − Y), which takes over where the skewness exceeds that of a gamma distribution.
    """
    mean = np.where(moments[0] > 0, moments[0], 1.0)
    q1 = 1.0  # in units of the mean
    q2 = moments[1] / mean**2
    varies = q2 - q1 > _CONSTANT
    q2 = np.where(varies, q2, 2.0)
    q3 = np.where(varies, moments[2] / (q2 * mean**3), 3.0)
    bend = q1 - 2 * q2 + q3
    bend = np.where(np.abs(bend) > 1e-15, bend, 1e-15)  # a gamma distribution: an end far away
    size = 2 * (q2 - q3) / bend
    top = q2 + (q2 - q1) * size
    a = size / top
    b = np.where(top > 0, size - a, 1 - size)
    return a, b, top * mean, varies
