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


def energy_overlap_mean(dimension: int, participation: tuple[float, float]) -> float:
    """Return the mean of ω for spectra with the given participation ratios.

    ``E ω = sqrt(PR₁·PR₂) / d``, since every squared cosine between independent uniform
    directions has mean 1/d.
    """
    return float(np.sqrt(participation[0] * participation[1]) / dimension)


def excess(value: ArrayLike, chance: ArrayLike) -> NDArray[np.float64]:
    """Return ``(value − chance) / (1 − chance)``: 0 at chance, 1 at full agreement.

    The only form in which overlaps of modules with different dimensions are averaged. NaN where
    chance is 1, since nothing can exceed it there.
    """
    v, c = np.asarray(value, dtype=np.float64), np.asarray(chance, dtype=np.float64)
    room = 1.0 - c
    return np.where(room > 0, (v - c) / np.where(room > 0, room, 1.0), np.nan)
