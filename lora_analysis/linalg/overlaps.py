"""Overlaps and angles of two orthonormal bases, and random frames."""

from __future__ import annotations

import numpy as np

from lora_analysis.linalg.arrays import Float


def cumulative_overlap(gram: Float) -> Float:
    """Return ``‖U₁[:, :i]ᵀ U₂[:, :j]‖_F²`` for all i, j, from the Gram matrix ``U₁ᵀU₂``."""
    total = gram * gram
    for axis in (-2, -1):  # in place: for r = 256 fresh pages cost more than the sums
        np.cumsum(total, axis=axis, out=total)
    return total


def overlap_grid(gram: Float) -> Float:
    """Return φ(i, j) for all i, j from the Gram matrix ``U₁ᵀU₂`` of two orthonormal bases.

    ``φ(i, j) = ‖U₁[:, :i]ᵀ U₂[:, :j]‖_F² / min(i, j)``, the mean squared cosine of the principal
    angles (LoRA, arXiv 2106.09685, section 7.2).

    Returns
    -------
    ndarray
        Shape of ``gram`` ``(k₁, k₂)``; entry ``[i-1, j-1]`` is φ(i, j), in [0, 1].
    """
    rows, columns = (np.arange(1.0, k + 1) for k in gram.shape[-2:])
    grid = cumulative_overlap(gram)
    grid /= np.minimum(rows[:, None], columns)
    # Rounding may exceed 1 by a few ulp where the spans coincide.
    return np.minimum(grid, 1.0, out=grid)


def principal_angles(U: Float, V: Float) -> Float:
    """Return the principal angles between two column spans, in radians, ascending.

    Cosines come from ``UᵀV``, sines from the part of the smaller basis outside the larger span;
    ``atan2`` of the two is accurate for angles near 0 and near π/2 alike (Björck & Golub 1973).

    Parameters
    ----------
    U, V
        Orthonormal columns, ``(d, i)`` and ``(d, j)``.

    Returns
    -------
    ndarray
        ``(min(i, j),)``, in [0, π/2].
    """
    if U.shape[1] < V.shape[1]:
        U, V = V, U
    gram = U.T @ V  # (larger, smaller)
    cosines = np.linalg.svd(gram, compute_uv=False)
    outside = V - U @ gram
    sines = np.linalg.svd(outside, compute_uv=False)[::-1]
    angles: Float = np.arctan2(sines, cosines)
    return angles


def haar_frame(rng: np.random.Generator, dimension: int, columns: int) -> Float:
    """Return ``(dimension, columns)`` orthonormal columns, uniform over all orthonormal frames."""
    q, r = np.linalg.qr(rng.standard_normal((dimension, columns)))
    # LAPACK fixes the signs of R, so Q alone is not uniform: give them back to Q.
    return q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
