"""Array kernels: the SVD of a product, overlaps of orthonormal bases, angles, Haar frames.

Everything here works on bare float64 arrays and knows no names and no files. Shapes: ``B`` is
``(..., d_out, r)``, ``A`` is ``(..., r, d_in)``; bases have orthonormal columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)

# Below this size LAPACK's full SVD of a dense matrix is quicker than an iteration on it.
DENSE_SVD_LIMIT = 768


class FactoredSVD(NamedTuple):
    """Thin SVD of ``B·A``, with what its accuracy depends on."""

    U: Float
    S: Float
    V: Float
    B_norm: Float
    A_norm: Float


def _scaled(matrix: Float) -> tuple[Float, NDArray[np.intc]]:
    """Return the matrix in float64 divided by ``2**exponent``, near its largest entry, and that.

    Exact, and it keeps squares and products of extreme factors (1e-200, 1e200) in range.
    """
    m = np.asarray(matrix, dtype=np.float64)
    exponent = np.frexp(np.max(np.abs(m), axis=(-2, -1)))[1]
    return np.ldexp(m, -exponent[..., None, None]), exponent


def _sorted_factors(b: Float, a: Float) -> tuple[Float, Float]:
    """Return the factors with the rank-one terms ordered by size, largest first.

    The order leaves B·A as it is, but a core graded from the top left keeps its small singular
    values to full relative accuracy: at a grading of 1e12 the error falls from 3e-5 to 2e-15.
    """
    size = np.linalg.norm(b, axis=-2) * np.linalg.norm(a, axis=-1)
    order = np.argsort(-size, axis=-1, kind="stable")
    return (
        np.take_along_axis(b, order[..., None, :], axis=-1),
        np.take_along_axis(a, order[..., :, None], axis=-2),
    )


def factored_svd(B: Float, A: Float) -> FactoredSVD:
    """Return the thin SVD ``B·A = U·diag(S)·Vᵀ`` without forming the product.

    QR of B and of Aᵀ, then the SVD of the small core ``R_B·R_Aᵀ``.

    Parameters
    ----------
    B
        ``(..., d_out, r)``.
    A
        ``(..., r, d_in)``.

    Returns
    -------
    FactoredSVD
        With ``k = min(r, d_out, d_in)``: U ``(..., d_out, k)`` and V ``(..., d_in, k)`` with
        orthonormal columns, S ``(..., k)`` descending, and the spectral norms of the factors.
        The largest entry of each column of U is positive.

    Notes
    -----
    O((d_out + d_in)·r² + r³). The absolute error of S is about 1e-15·‖B‖₂‖A‖₂; columns of U and V
    that belong to singular values below that are orthonormal but arbitrary.
    """
    scaled_b, exponent_b = _scaled(B)
    scaled_a, exponent_a = _scaled(A)
    b, a = _sorted_factors(scaled_b, scaled_a)
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(np.swapaxes(a, -1, -2))
    core = r_b @ np.swapaxes(r_a, -1, -2)
    left, values, right_t = np.linalg.svd(core, full_matrices=False)
    u = q_b @ left
    v = q_a @ np.swapaxes(right_t, -1, -2)
    sign = column_signs(u)
    return FactoredSVD(
        U=u * sign,
        S=np.ldexp(values, (exponent_b + exponent_a)[..., None]),
        V=v * sign,
        B_norm=np.ldexp(np.linalg.norm(r_b, 2, (-2, -1)), exponent_b),
        A_norm=np.ldexp(np.linalg.norm(r_a, 2, (-2, -1)), exponent_a),
    )


def factored_singular_values(B: Float, A: Float) -> Float:
    """Return the singular values ``(..., k)`` of ``B·A``, descending; no vectors are built."""
    scaled_b, exponent_b = _scaled(B)
    scaled_a, exponent_a = _scaled(A)
    b, a = _sorted_factors(scaled_b, scaled_a)
    r_b = np.linalg.qr(b, mode="r")
    r_a = np.linalg.qr(np.swapaxes(a, -1, -2), mode="r")
    values = np.linalg.svd(r_b @ np.swapaxes(r_a, -1, -2), compute_uv=False)
    scaled: Float = np.ldexp(values, (exponent_b + exponent_a)[..., None])
    return scaled


def column_signs(U: Float) -> Float:
    """Return ``(..., 1, k)`` signs that make the largest entry of each column positive."""
    rows = np.argmax(np.abs(U), axis=-2, keepdims=True)
    return np.where(np.take_along_axis(U, rows, axis=-2) < 0, -1.0, 1.0)


def cumulative_overlap(gram: Float) -> Float:
    """Return ``‖U₁[:, :i]ᵀ U₂[:, :j]‖_F²`` for all i, j, from the Gram matrix ``U₁ᵀU₂``."""
    return np.cumsum(np.cumsum(gram**2, axis=-2), axis=-1)


def overlap_grid(gram: Float) -> Float:
    """Return φ(i, j) for all i, j from the Gram matrix ``U₁ᵀU₂`` of two orthonormal bases.

    ``φ(i, j) = ‖U₁[:, :i]ᵀ U₂[:, :j]‖_F² / min(i, j)``, the mean squared cosine of the principal
    angles (LoRA, arXiv 2106.09685, section 7.2).

    Returns
    -------
    ndarray
        Shape of ``gram`` ``(k₁, k₂)``; entry ``[i-1, j-1]`` is φ(i, j), in [0, 1].
    """
    smaller = np.minimum.outer(np.arange(1, gram.shape[-2] + 1), np.arange(1, gram.shape[-1] + 1))
    # Rounding may exceed 1 by a few ulp where the spans coincide.
    return np.minimum(cumulative_overlap(gram) / smaller, 1.0)


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
    """Return ``(dimension, columns)`` orthonormal columns, uniform over all such frames."""
    q, r = np.linalg.qr(rng.standard_normal((dimension, columns)))
    # LAPACK fixes the signs of R, so Q alone is not uniform: give them back to Q.
    return q * np.where(np.diagonal(r) < 0, -1.0, 1.0)


def leading_singular_values(W: NDArray[np.floating], k: int) -> Float:
    """Return the ``k`` largest singular values of a dense matrix, descending.

    Small matrices take LAPACK's full SVD; larger ones ARPACK's Lanczos iteration, whose residual
    is checked: should it not reach 1e-8 of the largest value, the full SVD is taken after all.
    """
    dense = np.asarray(W, dtype=np.float64)
    if min(dense.shape) <= DENSE_SVD_LIMIT or k > min(dense.shape) // 8:
        return _all_singular_values(dense)[:k]
    from scipy.sparse.linalg import ArpackError, svds

    start = np.random.default_rng(0).standard_normal(min(dense.shape))
    try:
        u, s, vt = svds(dense, k=k, v0=start, solver="arpack")
    except ArpackError:
        return _all_singular_values(dense)[:k]
    # One of the two residuals is zero by the way svds builds its result; the other one tells.
    residual = max(np.linalg.norm(dense @ vt.T - u * s), np.linalg.norm(dense.T @ u - vt.T * s))
    if residual > 1e-8 * s.max():
        return _all_singular_values(dense)[:k]
    values: Float = np.sort(s)[::-1]
    return values


def _all_singular_values(dense: Float) -> Float:
    return np.asarray(np.linalg.svd(dense, compute_uv=False), dtype=np.float64)
