"""The SVD of a product ``B·A`` from its factors, and of one tall factor, without forming it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_analysis.linalg.arrays import Float, namespace
from lora_analysis.linalg.cholesky import Triangular, by_cholesky

# From this length on, a product with as many terms is formed: below, all ways are quick.
_FORMED = 512


class FactoredSVD(NamedTuple):
    """Thin SVD of ``B·A``, with what its accuracy depends on.

    U and V are None if no vectors were asked for. The norms are spectral; the conditions are
    those of B with unit columns and A with unit rows (zero ones left out), which bound the
    relative error of small singular values.
    """

    U: Float | None
    S: Float
    V: Float | None
    B_norm: Float
    A_norm: Float
    B_condition: Float
    A_condition: Float


def factored_svd(B: Any, A: Any, *, vectors: bool | int = True) -> FactoredSVD:
    """Return the thin SVD ``B·A = U·diag(S)·Vᵀ`` without forming the product.

    QR of B and of Aᵀ, then the SVD of the small core ``R_B·R_Aᵀ``. If the factors are well
    conditioned, R comes from the Cholesky factor of their Gram matrices, which is several times
    quicker; the accuracy is the same.

    Parameters
    ----------
    B
        ``(..., d_out, r)``.
    A
        ``(..., r, d_in)``. Both are numpy arrays, computed in float64, or torch tensors, computed
        where they are and in their own type (float32 has an error of 1e-6·‖B‖₂‖A‖₂).
    vectors
        False leaves U and V out, which takes a quarter of the time; a number keeps so many leading
        columns of them.

    Returns
    -------
    FactoredSVD
        With ``k = min(r, d_out, d_in)``: U ``(..., d_out, k)`` and V ``(..., d_in, k)`` with
        orthonormal columns, S ``(..., k)`` descending. The largest entry of each column of U is
        positive.

    Notes
    -----
    O((d_out + d_in)·r² + r³); the product is formed if r is not smaller than it, as of LoHa with r²
    terms. The absolute error of S is about 1e-15·‖B‖₂‖A‖₂; columns of U and V
    that belong to singular values below that are orthonormal but arbitrary. The relative error of
    a small singular value is about 1e-16 times the sum of the two conditions, at least 1e-12.
    """
    if _is_cheaper_formed(B, A):
        # Neither factor has fewer numbers than the product.
        B, A = _to_float64(B), _to_float64(A)
        u, s, v_t = np.linalg.svd(B @ A, full_matrices=False)
        norms, conditions = zip(_formed_measures(B), _formed_measures(A.T), strict=True)
        if not vectors:
            return FactoredSVD(None, s, None, *norms, *conditions)
        count = len(s) if vectors is True else vectors
        U, V = u[:, :count], v_t.T[:, :count]
        sign = column_signs(U)
        return FactoredSVD(U * sign, s, V * sign, *norms, *conditions)
    triangles = _by_cholesky(B, A)
    if triangles is None:
        return _householder_svd(B, A, vectors=vectors)
    left, right = triangles
    core = left.R @ right.R.T
    # One call for all that is small: half of its time would go into making five.
    small = [left.R, right.R, left.unit, right.unit]
    values = np.linalg.svd(np.stack(small if vectors else [*small, core]), compute_uv=False)
    measures = (*values[:2, 0], *(values[2:4, 0] / values[2:4, -1]))
    if not vectors:
        return FactoredSVD(None, values[4], None, *measures)
    u, s, v_t = np.linalg.svd(core)
    count = len(s) if vectors is True else vectors
    U = left.rows(u[:, :count]).T
    sign = column_signs(U)
    U *= sign
    return FactoredSVD(U, s, right.rows(v_t.T[:, :count] * sign).T, *measures)


def kronecker_svd(
    first: FactoredSVD, second: FactoredSVD, *, vectors: bool | int = True
) -> FactoredSVD:
    """Return the SVD of ``M ⊗ N`` from those of M and N.

    Singular values are all products σ_i(M)·σ_j(N), vectors the Kronecker products of the vectors:
    exact, and as quick as they can be written down.

    Parameters
    ----------
    first, second
        SVDs of M and N, with all vectors unless none are asked for.
    vectors
        As for `factored_svd`.
    """
    products = np.multiply.outer(first.S, second.S).ravel()
    order = np.argsort(-products, kind="stable")
    leading = order[: len(order) if vectors is True else int(vectors)]
    columns = np.divmod(leading, len(second.S))

    def pair_up(left: Float | None, right: Float | None) -> Float | None:
        if left is None or right is None or not vectors:
            return None
        i, j = columns
        whole: Float = left[:, None, i] * right[None, :, j]
        return whole.reshape(-1, len(leading))

    return FactoredSVD(
        pair_up(first.U, second.U),
        products[order],
        pair_up(first.V, second.V),
        # Norms and conditions of a Kronecker product are products, too.
        *(left * right for left, right in zip(first[3:], second[3:], strict=True)),
    )


def factored_singular_values(B: NDArray[np.floating], A: NDArray[np.floating]) -> Float:
    """Return the singular values ``(..., k)`` of ``B·A``, descending; no vectors are built."""
    if _is_cheaper_formed(B, A):
        return np.asarray(np.linalg.svd(_to_float64(B) @ _to_float64(A), compute_uv=False))
    triangles = _by_cholesky(B, A)
    if triangles is not None:
        left, right = triangles
        return np.asarray(np.linalg.svd(left.R @ right.R.T, compute_uv=False))
    return _householder_svd(B, A, vectors=False).S


def tall_svd(matrix: Any) -> tuple[Float, Float]:
    """Return the left singular vectors ``(d, k)`` and values ``(k,)`` of a tall ``(d, r)`` matrix.

    Of A these are taken as those of Aᵀ. ``k = min(d, r)``; accuracy, order, signs and types are
    as for `factored_svd`.
    """
    triangles = by_cholesky([matrix]) if isinstance(matrix, np.ndarray) else None
    if triangles is not None:
        u, values, _ = np.linalg.svd(triangles[0].R)
        vectors = triangles[0].rows(u).T
    else:
        matrix, xp = _to_float64(matrix), namespace(matrix)
        q, r = xp.linalg.qr(matrix)
        u, values, _ = xp.linalg.svd(r, full_matrices=False)
        vectors = q @ u
    return vectors * _signs(vectors, namespace(vectors)), values


def _by_cholesky(B: Any, A: Any) -> list[Triangular] | None:
    """Return a pair of arrays as Q·R from their Gram matrices; None if that would lose digits."""
    if not isinstance(B, np.ndarray) or B.ndim != 2:
        return None
    return by_cholesky([B, A.T])


def _to_float64(matrix: Any) -> Any:
    return np.asarray(matrix, dtype=np.float64) if isinstance(matrix, np.ndarray) else matrix


def _is_cheaper_formed(B: Any, A: Any) -> bool:
    """Return True for arrays of at least as many terms as the product has rows or columns."""
    if not isinstance(B, np.ndarray) or B.ndim != 2:
        return False
    return bool(B.shape[1] >= min(B.shape[0], A.shape[1]) >= _FORMED)


def _formed_measures(matrix: Float) -> tuple[Float, Float]:
    """Return the norm and the condition of a factor; inf if it has more columns than rows."""
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows < columns else matrix.T @ matrix
    norm = np.sqrt(np.linalg.eigvalsh(gram)[-1])
    if rows < columns:
        return norm, np.asarray(np.inf)
    return norm, np.asarray(_condition(matrix if rows == columns else _triangle(matrix, np)))


# --- by Householder's QR ----------------------------------------------------------------------


def _scale_down(matrix: Any, xp: Any) -> tuple[Any, Any]:
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


def _undo_scaling(values: Any, *scales: Any) -> Any:
    for scale in scales:
        values = values * scale[..., :1]
    for scale in scales:
        values = values * scale[..., 1:]
    return values


def _householder_svd(b: Any, a: Any, *, vectors: bool | int) -> FactoredSVD:
    """Return the SVD of any factors, stacks and tensors included, by the array API standard."""
    xp = namespace(b)
    b, scale_b = _scale_down(_to_float64(b), xp)
    a, scale_a = _scale_down(_to_float64(a), xp)
    # The order leaves B·A as it is, but a core graded from the top left keeps its small singular
    # values to full relative accuracy: at a grading of 1e12 the error falls from 3e-5 to 2e-15.
    size = xp.linalg.vector_norm(b, axis=-2) * xp.linalg.vector_norm(a, axis=-1)
    order = xp.argsort(-size, axis=-1, stable=True)
    b = xp.take_along_axis(b, xp.broadcast_to(order[..., None, :], b.shape), axis=-1)
    a = xp.take_along_axis(a, xp.broadcast_to(order[..., :, None], a.shape), axis=-2)
    u, v = None, None
    if vectors:
        q_b, r_b = xp.linalg.qr(b)
        del b  # the memory of a factor in float64
        q_a, r_a = xp.linalg.qr(a.mT)
        del a
        left, values, right_t = xp.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        count = values.shape[-1] if vectors is True else vectors
        u = q_b @ left[..., :count]
        del q_b
        sign = _signs(u, xp)
        u, v = u * sign, (q_a @ right_t.mT[..., :count]) * sign
    else:
        r_b, r_a = _triangle(b, xp), _triangle(a.mT, xp)
        values = xp.linalg.svdvals(r_b @ r_a.mT)
    return FactoredSVD(
        U=u,
        S=_undo_scaling(values, scale_b, scale_a),
        V=v,
        B_norm=_undo_scaling(_norm(r_b)[..., None], scale_b)[..., 0],
        A_norm=_undo_scaling(_norm(r_a)[..., None], scale_a)[..., 0],
        B_condition=_condition(r_b),
        A_condition=_condition(r_a),
    )


def _triangle(matrix: Any, xp: Any) -> Any:
    """Return R alone of a QR; the standard has no mode for that, numpy has."""
    return np.linalg.qr(matrix, mode="r") if xp is np else xp.linalg.qr(matrix)[1]


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
    deficient = (there[..., 0] > values.shape[-1]) | (smallest == 0)
    return xp.where(deficient, xp.inf, values[..., 0] / xp.where(deficient, 1.0, smallest))


def column_signs(U: Float) -> Float:
    """Return ``(..., 1, k)`` signs that make the largest entry of each column positive."""
    signs: Float = _signs(U, np)
    return signs


def _signs(u: Any, xp: Any) -> Any:
    lowest, highest = xp.min(u, axis=-2, keepdims=True), xp.max(u, axis=-2, keepdims=True)
    return xp.where(-lowest > highest, -1.0, 1.0)
