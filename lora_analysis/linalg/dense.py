"""The SVD of a dense matrix: its leading part by iteration, the whole of it by its Gram matrix.

Most of the time of an iteration goes into products with few columns or rows, which are at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, reduce

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from lora_analysis.linalg.arrays import Float
from lora_analysis.linalg.krylov import TOLERANCE, DenseSVD, Operator, krylov_svd

# Below this size LAPACK's full SVD of a dense matrix is quicker than an iteration on it.
DENSE_SVD_LIMIT = 768
# Singular vectors W·v/σ lose (σ₁/σ)² digits: below this share of σ₁ they are recomputed.
GRAM_RANGE = 1e-3
# Error of a singular vector over its relative gap from which it is improved, and how often at most.
VECTOR_TOLERANCE = 5e-7
_POLISHES = 2
# Elements that are taken at a time.
_TILE = 1 << 20


def leading_singular_values(W: NDArray[np.floating], k: int) -> Float:
    """Return the ``k`` largest singular values of a dense matrix, descending; see `leading_svd`."""
    if _is_small(W.shape, k):
        return np.asarray(np.linalg.svd(np.asarray(W, np.float64), compute_uv=False))[:k]
    return leading_svd(W, k).S


def leading_svd(W: NDArray[np.floating], k: int) -> DenseSVD:
    """Return the ``k`` leading singular triplets of a dense matrix.

    Small matrices take LAPACK's full SVD. Larger ones take a block Krylov iteration whose products
    are in float32 and whose last projection is in float64, where the error of a singular value is
    the square of that of its vector: it stops at a relative error of 1e-9 by the residuals, and
    what has not got there takes the full SVD after all.

    Returns
    -------
    DenseSVD
        The relative error of S is below 1e-8; that of a vector is below 1e-6 over its relative
        gap, so vectors of (nearly) equal values are arbitrary within their span.

    Notes
    -----
    W is copied to float32 unless it has that type. O(m·n·k), with a factor of some tens on flat
    spectra.
    """
    if _is_small(W.shape, k):
        return _lapack_svd(W, k)
    exponent = int(np.frexp(max(np.max(W), -np.min(W)))[1])  # no copy of W for its sizes
    if abs(exponent) > 30:  # squares must stay in range, those of float32 too
        u, s, v = leading_svd(np.ldexp(np.asarray(W, dtype=np.float64), -exponent), k)
        return DenseSVD(u, np.ldexp(s, exponent), v)
    tall = W if W.shape[0] >= W.shape[1] else W.T
    svd = krylov_svd(_operator(tall.astype(np.float32, copy=False)), k)
    if svd is not None:
        svd = _polish(tall, _svd_on_span(tall, svd.V), k)
        if not _is_exact(svd, _residuals(tall, svd), k):
            # Next to a value some hundred times larger, float32 does not resolve the others.
            svd = krylov_svd(_operator(np.asarray(tall, dtype=np.float64)), k, start=svd.V)
            svd = None if svd is None else _polish(tall, svd, k)
    u, s, v = _lapack_svd(tall, k) if svd is None else svd
    return DenseSVD(u[:, :k], s[:k], v[:, :k]) if tall is W else DenseSVD(v[:, :k], s[:k], u[:, :k])


def _polish(W: NDArray[np.floating], svd: DenseSVD, k: int) -> DenseSVD:
    """Return the triplets with vectors improved in float64, until their residuals are small.

    The iteration stops once the values are exact, whose error is the square of that of vectors.
    The residual over the distance to the values that were not found bounds the error of a vector,
    which may be `VECTOR_TOLERANCE` over the gap to the next value. Each round adds the directions
    of the residuals to the span.
    """
    count = len(svd.S)
    for _ in range(_POLISHES):
        away = _residuals(W, svd)
        size, distance = np.linalg.norm(away, axis=0), svd.S - svd.S[-1]
        gap = svd.S - np.append(svd.S[1:], svd.S[-1])
        error = size * gap / np.where(distance > 0, distance, 1.0)
        coarse = (error > VECTOR_TOLERANCE * svd.S) & (GRAM_RANGE**2 * svd.S[0] < svd.S)
        if not coarse[:k].any():
            break
        u, s, v = _svd_on_span(W, np.hstack([svd.V, away[:, coarse] / size[coarse]]))
        svd = DenseSVD(u[:, :count], s[:count], v[:, :count])
    return svd


def _residuals(W: NDArray[np.floating], svd: DenseSVD) -> Float:
    """Return how far each triplet is from one of W, ``Wᵀu − σv``."""
    return np.asarray(_product(W.T, svd.U) - svd.V * svd.S)


def _operator(W: NDArray[np.floating]) -> Operator:
    """Return a tall matrix for the iteration, multiplied in the order of its memory."""
    kind = W.dtype.type

    def normal(X: NDArray[np.floating]) -> NDArray[np.floating]:
        if W.flags.c_contiguous:  # W comes from memory once for both products
            parts = (
                thin_left_product(thin_product(W[run], X).astype(kind), W[run])
                for run in _runs(W.shape)
            )
            return np.asarray(reduce(np.add, parts).T)
        wide, runs = W.T, list(_runs(W.T.shape))
        images = reduce(np.add, (thin_left_product(X[run], wide[run]) for run in runs)).T  # W·X
        return np.vstack([thin_product(wide[run], images).astype(kind) for run in runs])

    return Operator((W.shape[0], W.shape[1]), lambda X: W @ X, normal, kind)


def _runs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield runs of rows, as many at a time as make a tile."""
    height = max(1, _TILE // shape[1])
    for start in range(0, shape[0], height):
        yield slice(start, start + height)


def _is_exact(svd: DenseSVD, away: Float, k: int) -> bool:
    """Check the residual in float64: the error of a value is residual² over its gap."""
    residual, top = np.linalg.norm(away, axis=0)[:k], svd.S[0]
    gap = np.maximum(svd.S[:k] - svd.S[-1], 1e-300)
    error = np.minimum(residual, residual * (residual / gap))
    return bool(np.all((error <= TOLERANCE * svd.S[:k]) | (svd.S[:k] <= 1e-6 * top)))


def whole_svd(W: NDArray[np.floating]) -> DenseSVD:
    """Return the whole thin SVD of a dense matrix: LAPACK's, beyond some size by `gram_svd`."""
    return gram_svd(W) if min(W.shape) > DENSE_SVD_LIMIT else _lapack_svd(W, min(W.shape))


def _is_small(shape: tuple[int, ...], k: int) -> bool:
    return min(shape) <= DENSE_SVD_LIMIT or k > min(shape) // 8


def _lapack_svd(W: NDArray[np.floating], k: int) -> DenseSVD:
    u, s, vt = np.linalg.svd(np.asarray(W, dtype=np.float64), full_matrices=False)
    return DenseSVD(u[:, :k], s[:k], vt[:k].T)


def _svd_on_span(W: NDArray[np.floating], directions: NDArray[np.floating]) -> DenseSVD:
    """Return the SVD of a tall W on the span of some directions of R^n, in float64."""
    basis = np.linalg.qr(directions.astype(np.float64))[0]
    left, s, vt = np.linalg.svd(_product(W, basis), full_matrices=False)
    return DenseSVD(left, s, basis @ vt.T)


def _product(W: NDArray[np.floating], basis: Float) -> Float:
    """Return ``W·basis`` in float64 without a copy of W in it."""
    return np.vstack([W[run].astype(np.float64) @ basis for run in _runs(W.shape)])


# --- the whole spectrum -----------------------------------------------------------------------


def gram_svd(W: NDArray[np.floating]) -> DenseSVD:
    """Return the whole thin SVD of a dense matrix, through ``eigh`` of its smaller Gram matrix.

    Several times quicker than LAPACK's SVD. A Gram matrix squares the condition: singular values
    and vectors below 1e-3·σ₁ are recomputed from W on their span, so that both sides are
    orthonormal to 1e-9 and ``U·diag(S)·Vᵀ`` is W to 1e-12·σ₁.

    Returns
    -------
    DenseSVD
        With ``k = min(m, n)``.

    Notes
    -----
    O(m·n² + n³) for n the smaller side: about 20 s for 4096 × 4096 on one core; see
    `gram_seconds`. Some five matrices of W's size in float64.
    """
    if W.shape[0] < W.shape[1]:
        u, s, v = gram_svd(W.T)
        return DenseSVD(v, s, u)
    exponent = int(np.frexp(np.max(np.abs(W)))[1])
    dense = np.ldexp(np.asarray(W, dtype=np.float64), -exponent)
    squares, vectors = np.linalg.eigh(dense.T @ dense)
    V = vectors[:, ::-1]
    rough = np.sqrt(np.maximum(squares[::-1], 0.0))
    images = dense @ V
    n = len(rough)
    clear = int(np.count_nonzero(rough > GRAM_RANGE * rough[0])) if rough[0] > 0 else 0
    S = np.linalg.norm(images[:, :clear], axis=0)
    U = np.empty_like(images)
    U[:, :clear] = images[:, :clear] / S
    if clear < n:
        # U, S and the rotation of V on the span that the Gram matrix does not resolve.
        u, rest, vt = np.linalg.svd(images[:, clear:], full_matrices=False)
        # Directions of vanishing σ are arbitrary, but must stay outside those that are known.
        for _ in range(2):
            u = u - U[:, :clear] @ (U[:, :clear].T @ u)
            u, r = np.linalg.qr(u)
            u = u * np.where(np.diagonal(r) < 0, -1.0, 1.0)
        U[:, clear:] = u
        V = np.hstack([V[:, :clear], V[:, clear:] @ vt.T])
        S = np.append(S, rest)
    order = np.argsort(-S, kind="stable")
    return DenseSVD(U[:, order], np.ldexp(S[order], exponent), V[:, order])


def gram_seconds(shape: tuple[int, int]) -> float:
    """Return about how many seconds `gram_svd` takes on one core, to be announced before."""
    small, large = sorted(shape)
    # Products and eigh (9·n³) at 30 GFLOP/s.
    return (4 * large * small**2 + 9 * small**3) / 30e9


# --- products of a large block with few columns or rows ----------------------------------------
#
# A BLAS first copies both sides of a product into an order of its own. If one of them is thin,
# that takes longer than the product; OpenBLAS spares it for small products where there is AVX-512:
# hence the pieces there. Elsewhere whole products are a quarter to a third faster than pieces, and
# also if the BLAS may use several threads.

# With more columns the copy is not what counts.
_FEW = 32
# Depth and width of a piece, and how many multiplications it may take.
_DEPTH = 128
_WORK = 1_000_000
# OpenBLAS's names of processors with AVX-512.
_WITH_SMALL_KERNELS = {"SkylakeX", "Cooperlake", "SapphireRapids"}
# Sums of so many pieces are taken in their own type.
_GROUP = 8


def thin_product(block: NDArray[np.floating], X: NDArray[np.floating]) -> Float:
    """Return ``block·X`` in float64, ``(m, r)``.

    Parameters
    ----------
    block
        ``(m, n)``, of the type the products are taken in.
    X
        ``(n, r)``, of the same type.

    Notes
    -----
    In float32 a product of a few columns errs by some 2e-7 of its size in pieces, by 4e-7 whole.
    """
    (m, n), r = block.shape, X.shape[1]
    pieces = n // _DEPTH
    if not pieces or not _has_fast_kernels(block, r):
        return np.asarray(block @ X, dtype=np.float64)
    whole, height = pieces * _DEPTH, max(1, _WORK // (_DEPTH * r))
    grouped = pieces // _GROUP * _GROUP
    deep = np.ascontiguousarray(X[:whole]).reshape(pieces, _DEPTH, r)
    product = np.zeros((m, r))
    if whole < n:
        product += block[:, whole:] @ X[whole:]
    for top in range(0, m, height):
        part = block[top : top + height, :whole].reshape(-1, pieces, _DEPTH)
        products = part.transpose(1, 0, 2) @ deep
        groups = products[:grouped].reshape(-1, _GROUP, len(part), r).sum(axis=1)
        product[top : top + height] += groups.sum(axis=0, dtype=np.float64)
        if grouped < pieces:
            product[top : top + height] += products[grouped:].sum(axis=0)
    return product


def thin_left_product(Y: NDArray[np.floating], block: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return ``Yᵀ·block``, ``(r, n)``, for Y ``(m, r)`` and a block ``(m, n)`` of one type."""
    (m, n), r = block.shape, Y.shape[1]
    rows = np.ascontiguousarray(Y.T)
    pieces = n // _DEPTH
    if not pieces or m * r > _WORK // _DEPTH or not _has_fast_kernels(block, r):
        return np.asarray(rows @ block)
    whole = pieces * _DEPTH
    product = np.empty((r, n), block.dtype)
    wide = block[:, :whole].reshape(m, pieces, _DEPTH).transpose(1, 0, 2)
    product[:, :whole].reshape(r, pieces, _DEPTH)[:] = (rows @ wide).transpose(1, 0, 2)
    if whole < n:
        product[:, whole:] = rows @ block[:, whole:]
    return product


def _has_fast_kernels(block: NDArray[np.floating], columns: int) -> bool:
    controllers = _blas().lib_controllers
    return (
        0 < columns <= _FEW
        and block.flags.c_contiguous
        and bool(controllers)
        and all(
            controller.internal_api == "openblas"
            and controller.num_threads == 1
            and getattr(controller, "architecture", "") in _WITH_SMALL_KERNELS
            for controller in controllers
        )
    )


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")
