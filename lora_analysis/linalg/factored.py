"""The SVD of a product ``B·A`` from its factors, without forming it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_analysis.linalg.constants import Float, namespace

# A Gram matrix squares the condition: up to the first bound its error, 1e-16·condition², stays
# below 1e-12; up to the second one, a second pass repairs it; beyond it Householder's QR is taken.
ONE_PASS_CONDITION = 1e2
TWO_PASS_CONDITION = 1e6
# Squares of columns within these bounds neither overflow nor lose digits in a Gram matrix.
_SAFE_SQUARES = (1e-200, 1e200)


class FactoredSVD(NamedTuple):
    """Thin SVD of ``B·A``, with what its accuracy depends on.

    The norms are spectral; the conditions are those of B with unit columns and A with unit rows
    (zero ones left out), which bound the relative error of small singular values.
    """

    U: Float
    S: Float
    V: Float
    B_norm: Float
    A_norm: Float
    B_condition: Float
    A_condition: Float


class _Triangular(NamedTuple):
    """A tall matrix as Q·R: R, and ``Q = matrix @ coefficients``."""

    R: Float
    matrix: Float
    coefficients: Float


def factored_svd(B: Any, A: Any) -> FactoredSVD:
    """Return the thin SVD ``B·A = U·diag(S)·Vᵀ`` without forming the product.

    QR of B and of Aᵀ, then the SVD of the small core ``R_B·R_Aᵀ``. Where the factors are well
    conditioned, R comes from the Cholesky factor of their Gram matrices, which is several times
    quicker; the accuracy is the same.

    Parameters
    ----------
    B
        ``(..., d_out, r)``.
    A
        ``(..., r, d_in)``. Both are numpy arrays, computed in float64, or torch tensors, computed
        where they are and in their own type (float32 has an error of 1e-6·‖B‖₂‖A‖₂).

    Returns
    -------
    FactoredSVD
        With ``k = min(r, d_out, d_in)``: U ``(..., d_out, k)`` and V ``(..., d_in, k)`` with
        orthonormal columns, S ``(..., k)`` descending. The largest entry of each column of U is
        positive.

    Notes
    -----
    O((d_out + d_in)·r² + r³). The absolute error of S is about 1e-15·‖B‖₂‖A‖₂; columns of U and V
    that belong to singular values below that are orthonormal but arbitrary. The relative error of
    a small singular value is about 1e-16 times the sum of the two conditions, at least 1e-12.
    """
    if not isinstance(B, np.ndarray):
        return _householder_svd(B, A)
    b, a = _double(B), _double(A)
    both = _by_cholesky(b, a)
    if both is None:
        return _householder_svd(b, a)
    left, right = both
    u, values, v_t = np.linalg.svd(left.R @ right.R.T)
    U = left.matrix @ (left.coefficients @ u)
    sign = column_signs(U)
    U *= sign
    V = right.matrix @ (right.coefficients @ (v_t.T * sign))
    return FactoredSVD(
        U,
        values,
        V,
        *(_norm(one.R) for one in both),
        *(_condition(one.R) for one in both),
    )


def factored_singular_values(B: NDArray[np.floating], A: NDArray[np.floating]) -> Float:
    """Return the singular values ``(..., k)`` of ``B·A``, descending; no vectors are built."""
    b, a = _double(B), _double(A)
    both = _by_cholesky(b, a)
    if both is not None:
        left, right = both
        return np.asarray(np.linalg.svd(left.R @ right.R.T, compute_uv=False))
    b, a, *scales = _prepared(b, a, np)
    r_b, r_a = (np.asarray(np.linalg.qr(m, mode="r")) for m in (b, np.swapaxes(a, -1, -2)))
    values = np.linalg.svd(r_b @ np.swapaxes(r_a, -1, -2), compute_uv=False)
    unscaled: Float = _unscaled(values, *scales)
    return unscaled


def _double(matrix: NDArray[np.floating]) -> Float:
    return np.asarray(matrix, dtype=np.float64)


# --- by Cholesky ------------------------------------------------------------------------------


def _by_cholesky(b: Float, a: Float) -> tuple[_Triangular, _Triangular] | None:
    """Return both factors as Q·R from their Gram matrices; None where that would cost digits."""
    if b.ndim != 2 or b.shape[1] > min(b.shape[0], a.shape[1]):
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # told by what comes out
        grams = b.T @ b, a @ a.T  # (r, r)
    squares = [np.diagonal(gram) for gram in grams]
    low, high = _SAFE_SQUARES
    if not all(low < square.min() and square.max() < high for square in squares):
        return None
    order = np.argsort(-(squares[0] * squares[1]), kind="stable")
    left = _cholesky_qr(b, grams[0], order)
    right = _cholesky_qr(a.T, grams[1], order) if left is not None else None
    return None if left is None or right is None else (left, right)


def _cholesky_qr(matrix: Float, gram: Float, order: NDArray[np.intp]) -> _Triangular | None:
    """Return ``matrix[:, order] = Q·R``; None beyond the condition that two passes can take.

    Columns are brought to unit length first: what is merely scaled is not ill-conditioned.
    """
    length = np.sqrt(np.diagonal(gram))[order]
    try:
        r: Float = np.linalg.cholesky(gram[np.ix_(order, order)] / np.outer(length, length)).T
        inverse = np.linalg.inv(r)
        condition = np.linalg.norm(r) * np.linalg.norm(inverse)
        if not condition < TWO_PASS_CONDITION:
            return None
        coefficients = np.empty_like(inverse)
        coefficients[order] = inverse / length[:, None]
        if condition < ONE_PASS_CONDITION:
            return _Triangular(r * length, matrix, coefficients)
        nearly = matrix @ coefficients
        second = np.linalg.cholesky(nearly.T @ nearly).T
        # Two steps of R, each well enough conditioned (Yamamoto et al. 2015, CholeskyQR2).
        return _Triangular(np.asarray(second @ r) * length, nearly, np.linalg.inv(second))
    except np.linalg.LinAlgError:  # exactly rank-deficient
        return None


# --- by Householder's QR ----------------------------------------------------------------------


def _prepared(b: Any, a: Any, xp: Any) -> tuple[Any, Any, Any, Any]:
    """Return both factors scaled and sorted, and the powers of two they were divided by."""
    b, scale_b = _scaled(b, xp)
    a, scale_a = _scaled(a, xp)
    # The order leaves B·A as it is, but a core graded from the top left keeps its small singular
    # values to full relative accuracy: at a grading of 1e12 the error falls from 3e-5 to 2e-15.
    size = xp.linalg.vector_norm(b, axis=-2) * xp.linalg.vector_norm(a, axis=-1)
    order = xp.argsort(-size, axis=-1, stable=True)
    b = xp.take_along_axis(b, xp.broadcast_to(order[..., None, :], b.shape), axis=-1)
    a = xp.take_along_axis(a, xp.broadcast_to(order[..., :, None], a.shape), axis=-2)
    return b, a, scale_b, scale_a


def _scaled(matrix: Any, xp: Any) -> tuple[Any, Any]:
    """Return the matrix divided by a power of two near its largest entry, and that power.

    Exact, and it keeps squares and products of extreme factors (1e-200, 1e200) in range.
    """
    largest = xp.max(xp.abs(matrix), axis=(-2, -1))
    power = xp.round(xp.log2(xp.where(largest > 0, largest, 1.0)))
    # In two halves: one power of two may itself be out of range.
    half = xp.exp2(xp.floor(power / 2))
    rest = xp.exp2(power - xp.floor(power / 2))
    scale = xp.stack([half, rest], axis=-1)
    return matrix / half[..., None, None] / rest[..., None, None], scale


def _unscaled(values: Any, *scales: Any) -> Any:
    for scale in scales:
        values = values * scale[..., :1]
    for scale in scales:
        values = values * scale[..., 1:]
    return values


def _householder_svd(b: Any, a: Any) -> FactoredSVD:
    """Return the SVD of any factors, stacks and tensors included, by the array API standard."""
    xp = namespace(b)
    b, a, scale_b, scale_a = _prepared(b, a, xp)
    q_b, r_b = xp.linalg.qr(b)
    q_a, r_a = xp.linalg.qr(a.mT)
    left, values, right_t = xp.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    u = q_b @ left
    sign = _signs(u, xp)
    return FactoredSVD(
        U=u * sign,
        S=_unscaled(values, scale_b, scale_a),
        V=(q_a @ right_t.mT) * sign,
        B_norm=_unscaled(_norm(r_b)[..., None], scale_b)[..., 0],
        A_norm=_unscaled(_norm(r_a)[..., None], scale_a)[..., 0],
        B_condition=_condition(r_b),
        A_condition=_condition(r_a),
    )


def _norm(r: Any) -> Any:
    return namespace(r).linalg.svdvals(r)[..., 0]


def _condition(r: Any) -> Any:
    """Return the condition of R with unit columns, zero columns left out; inf if they depend."""
    xp = namespace(r)
    length = xp.linalg.vector_norm(r, axis=-2, keepdims=True)
    unit = r / xp.where(length > 0, length, 1.0)
    values = xp.linalg.svdvals(unit)
    there = xp.count_nonzero(length, axis=-1)  # (..., 1)
    last = xp.clip(there - 1, 0, values.shape[-1] - 1)
    smallest = xp.take_along_axis(values, last, axis=-1)[..., 0]
    lost = (there[..., 0] > values.shape[-1]) | (smallest == 0)
    return xp.where(lost, xp.inf, values[..., 0] / xp.where(lost, 1.0, smallest))


def column_signs(U: Float) -> Float:
    """Return ``(..., 1, k)`` signs that make the largest entry of each column positive."""
    signs: Float = _signs(U, np)
    return signs


def _signs(u: Any, xp: Any) -> Any:
    lowest, highest = xp.min(u, axis=-2, keepdims=True), xp.max(u, axis=-2, keepdims=True)
    return xp.where(-lowest > highest, -1.0, 1.0)
