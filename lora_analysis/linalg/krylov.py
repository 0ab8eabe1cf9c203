"""The leading part of the SVD of a matrix that is only multiplied, by a block Krylov iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_analysis.linalg.arrays import Float

# Columns of one step of the iteration, and of the basis before it is cut back.
BLOCK = 16
BASIS = 1024
# Relative error of a singular value at which the iteration stops, by its residual.
TOLERANCE = 1e-8

Product = Callable[[Any], Any]


class DenseSVD(NamedTuple):
    """Thin SVD ``W = U·diag(S)·Vᵀ``: U ``(m, k)``, S ``(k,)`` descending, V ``(n, k)``."""

    U: Float
    S: Float
    V: Float


class Operator(NamedTuple):
    """A tall matrix that is only multiplied: ``apply(X) = W·X``, ``normal(X) = Wᵀ·W·X``."""

    shape: tuple[int, int]
    apply: Product
    normal: Product
    dtype: type[np.floating[Any]] = np.float64


def krylov_svd(
    operator: Operator, k: int, *, start: NDArray[np.floating] | None = None, steps: int = 400
) -> DenseSVD | None:
    """Return a little more than ``k`` leading singular triplets; None if it did not converge.

    Block Lanczos on WᵀW with full orthogonalization, cut back to its best directions when the basis
    is full. Afterwards a search in what is left makes sure that no
    larger singular value was missed, as may happen where one occurs very often.

    Parameters
    ----------
    operator
        The matrix.
    k
        How many triplets.
    start
        Directions to begin with, ``(n, any)``.
    steps
        Products with WᵀW at most.
    """
    search = _Krylov(operator, k, start)
    for step in range(1, steps + 1):
        search.extend()
        if (step % 6 == 0 or search.is_full) and search.columns > k + BLOCK:
            search.project()
            if search.has_converged() and not search.find_missed():
                break
            if search.is_full:
                search.cut_back()
    else:
        return None
    right = search.vectors().astype(np.float64)
    images = operator.apply(right.astype(operator.dtype)).astype(np.float64)
    u, values, vt = np.linalg.svd(images, full_matrices=False)
    return DenseSVD(u, values, right @ vt.T)


class _Krylov:
    """A growing orthonormal basis Q of R^n, with ``Z = WᵀW·Q``, and the Ritz values they give."""

    def __init__(self, operator: Operator, k: int, start: NDArray[np.floating] | None) -> None:
        n = operator.shape[1]
        self.operator, self.k, self.n = operator, k, n
        self.kept = k + 8
        self.rng = np.random.default_rng(0)
        self.capacity = min(n, max(BASIS, 4 * self.kept))
        self.Q = np.empty((n, self.capacity), operator.dtype, order="F")
        self.Z = np.empty_like(self.Q)
        self.gram = np.zeros((self.capacity, self.capacity))  # QᵀZ, above its diagonal blocks
        self.columns = 0
        given = np.zeros((n, 0)) if start is None else start
        fresh = self.rng.standard_normal((n, max(BLOCK - given.shape[1], 4)))
        self.next = np.hstack([given, fresh]).astype(operator.dtype)

    @property
    def is_full(self) -> bool:
        return self.columns + BLOCK > self.capacity

    def extend(self) -> None:
        """Add the next block to the basis, made orthogonal, and multiply it."""
        Q = self.Q[:, : self.columns]
        block = self.next[:, : self.capacity - self.columns]
        for _ in range(3):
            size = np.linalg.norm(block, axis=0)
            block = block / np.where(size > 0, size, 1.0)
            block = block - Q @ (Q.T @ block)
            q, deficient = _orthonormal(block)
            if not deficient.any():
                break
            # Columns that are lost in the basis are redrawn.
            fresh = self.rng.standard_normal((self.n, int(deficient.sum())))
            block[:, deficient] = fresh.astype(block.dtype)
        q = q - Q @ (Q.T @ q)  # what was small next to the basis still points into it a little
        block = _orthonormal(q)[0]
        image = self.operator.normal(block)
        block_columns = slice(self.columns, self.columns + block.shape[1])
        self.Q[:, block_columns], self.Z[:, block_columns] = block, image
        self.columns = block_columns.stop
        self.gram[: block_columns.stop, block_columns] = self.Q[:, : block_columns.stop].T @ image
        self.next = image[:, -BLOCK:]

    def project(self) -> None:
        """Find the best approximations in the basis, and how far each is from a singular vector."""
        from scipy.linalg import eigh

        Q, Z = self.Q[:, : self.columns], self.Z[:, : self.columns]
        gram = self.gram[: self.columns, : self.columns]
        top = (max(0, self.columns - self.kept), self.columns - 1)
        values, turn = eigh(gram, lower=False, subset_by_index=top, check_finite=False)
        self.squares = np.maximum(values[::-1], 0.0)
        self.best = turn[:, ::-1].astype(self.operator.dtype)
        away = Z @ self.best - (Q @ self.best) * self.squares.astype(Z.dtype)
        self.residual = np.linalg.norm(away.astype(np.float64), axis=0)
        self.away = away

    def has_converged(self) -> bool:
        """Return True if all k values converged: the error of each is residual² over the gap."""
        top = self.squares[0]
        if top == 0:
            return True
        squares, residual = self.squares[: self.k], self.residual[: self.k]
        gap = squares - self.squares[min(self.kept - 1, len(self.squares) - 1)]
        error = np.minimum(residual, residual**2 / np.maximum(gap, residual + 1e-300))
        # In units of σ²; errors below that of the arithmetic cannot be required.
        floor = 4 * np.finfo(self.operator.dtype).eps * top
        return bool(np.all((error <= 2 * TOLERANCE * squares) | (residual <= floor)))

    def find_missed(self) -> bool:
        """Look for a larger value outside what was found; go on from there if there is one."""
        vectors = self.vectors()
        block = self.rng.standard_normal((self.n, 8)).astype(vectors.dtype)
        for _ in range(4):
            block = block - vectors @ (vectors.T @ block)
            block = np.linalg.qr(block)[0]
            image = self.operator.normal(block)
            square = float(np.linalg.norm(block.T @ image, 2))
            if square > self.squares[min(self.k, len(self.squares)) - 1] * (1 + 1e-5) > 0:
                self.next = image
                return True
            block = image
        return False

    def vectors(self) -> NDArray[np.floating]:
        """Return the best directions found, ``(n, k + 8)``."""
        return np.asarray(self.Q[:, : self.columns] @ self.best)

    def cut_back(self) -> None:
        """Keep the best directions only, and go on along their residuals."""
        vectors = self.vectors()
        images = self.Z[:, : self.columns] @ self.best
        self.columns = vectors.shape[1]
        self.Q[:, : self.columns], self.Z[:, : self.columns] = vectors, images
        self.gram[: self.columns, : self.columns] = vectors.T @ images
        worst = np.argsort(-self.residual[: self.k])[:BLOCK]
        self.next = self.away[:, worst]


def _orthonormal(
    block: NDArray[np.floating],
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """Return an orthonormal basis of a block of unit columns, and which of them it loses.

    Twice by its Gram matrix in float64: LAPACK's QR takes longer than the products with W.
    """
    eps = float(np.finfo(block.dtype).eps)
    deficient = np.linalg.norm(block, axis=0) < 100 * eps
    if not deficient.any():
        wide = block.astype(np.float64)
        try:
            for _ in range(2):
                wide = wide @ np.linalg.inv(np.linalg.cholesky(wide.T @ wide)).T
            return wide.astype(block.dtype), deficient
        except np.linalg.LinAlgError:
            pass
    q, r = np.linalg.qr(block)
    return q, deficient | (np.abs(np.diagonal(r)) < 100 * eps * np.max(np.abs(r), initial=1e-30))
