"""The leading SVD of a diagonal matrix plus one of low rank: W + ΔW in W's own coordinates."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from lora_analysis.linalg.arrays import EPS, Float
from lora_analysis.linalg.dense import DENSE_SVD_LIMIT, gram_svd
from lora_analysis.linalg.krylov import DenseSVD

Start = Literal["projected", "counted"]
_STARTS: tuple[Start, Start] = ("projected", "counted")
# Diagonal entries this near to a shift are not divided by, but solved for together.
_NEAR = 64
# Rounds of bisection before inverse iteration, which leave 2**-16 of the first ratio of bounds.
_BISECTIONS = 16
# Rounds of inverse iteration, each followed by a projection; three are enough but for ties.
_REFINEMENTS = 10
# Eigenvalues below this share of the squared scale count as zero.
_SMALLEST = 1e-18
# Residual, relative to σ₁², at which a singular vector is taken as found.
_RESIDUAL = 64 * EPS


def modified_svd(values: Float, P: Float, Q: Float, k: int) -> DenseSVD:
    """Return the ``k`` leading singular triplets of ``M = [diag(values); 0] + P·Qᵀ``.

    Known singular values make M's Gram matrix a diagonal one plus a correction of twice the rank,
    whose eigenvalues above any number can be counted exactly (Sylvester's law of inertia, as for
    the secular equation of Golub 1973). Inverse iteration finds the leading ones, from those of a
    projection on M's leading axes and the change, or where that misleads from a bisection by such
    counts; a last count proves that none was missed.

    Parameters
    ----------
    values
        ``(n,)``, descending, not negative.
    P, Q
        ``(m, r)`` with m ≥ n, and ``(n, r)``.
    k
        How many triplets, at most n.

    Returns
    -------
    DenseSVD
        U ``(m, k)``, S ``(k,)``, V ``(n, k)``; a vector's error is about 1e-15·σ₁² over the gap of
        its σ² to the next. If no certificate is found, M is decomposed whole.

    Notes
    -----
    O(k·n·r²) and less than a second for n = 4096, r = 16, where the whole takes half a minute.
    """
    m, n = len(P), len(Q)
    if n <= DENSE_SVD_LIMIT or 2 * P.shape[1] + _NEAR >= n or k > n // 8:
        return _dense_svd(values, P, Q, k)
    size = float(values[0] + np.linalg.norm(P, 2) * np.linalg.norm(Q, 2))
    if size == 0:
        return DenseSVD(np.eye(m, k), np.zeros(k), np.eye(n, k))
    problem = _problem(values / size, P / size, Q)
    tried = (problem.leading_vectors(k, start) for start in _STARTS)
    vectors = next((candidate for candidate in tried if candidate is not None), None)
    if vectors is None:
        return _dense_svd(values, P, Q, k)
    images = P @ (Q.T @ vectors)
    images[:n] += values[:, None] * vectors
    S = np.linalg.norm(images, axis=0)
    return DenseSVD(images / np.where(S > 0, S, 1.0), S, vectors)


def _dense_svd(values: Float, P: Float, Q: Float, k: int) -> DenseSVD:
    dense = P @ Q.T
    dense[np.arange(len(values)), np.arange(len(values))] += values
    if len(Q) <= DENSE_SVD_LIMIT:
        u, s, vt = np.linalg.svd(dense, full_matrices=False)
        return DenseSVD(u[:, :k], s[:k], vt[:k].T)
    u, s, v = gram_svd(dense)
    return DenseSVD(u[:, :k], s[:k], v[:, :k])


def _problem(values: Float, P: Float, Q: Float) -> _Modified:
    """Return MᵀM as ``diag(d) + F·C·Fᵀ``, with the two parts of F of one size."""
    balance = np.sqrt(max(float(np.linalg.norm(P, 2)), 1e-150) / float(np.linalg.norm(Q, 2)))
    P, Q = P / balance, Q * balance
    rank = P.shape[1]
    identity, zero = np.eye(rank), np.zeros((rank, rank))
    return _Modified(
        diagonal=values**2,
        F=np.hstack([values[:, None] * P[: len(values)], Q]),
        inverse=np.block([[-(P.T @ P), identity], [identity, zero]]),
    )


class _Modified(NamedTuple):
    """``H = diag(diagonal) + F·C·Fᵀ``, with C by its inverse; C has as many signs + as −."""

    diagonal: Float  # (n,), descending
    F: Float  # (n, 2r)
    inverse: Float  # (2r, 2r)

    def apply(self, vectors: Float) -> Float:
        """Return H·vectors."""
        inner = np.linalg.solve(self.inverse, self.F.T @ vectors)
        return np.asarray(self.diagonal[:, None] * vectors + self.F @ inner)

    def _condense(self, shift: float) -> tuple[slice, Float, Float]:
        """Return the entries near the shift, the inverses of the others, the Schur complement.

        ``[[E, F], [Fᵀ, −C⁻¹]]`` with E = diag − shift, after the far entries of E are eliminated.
        """
        index = int(np.searchsorted(-self.diagonal, -shift))
        start = min(max(index - _NEAR // 2, 0), len(self.diagonal) - _NEAR)
        near = slice(start, start + _NEAR)
        far = self.diagonal - shift
        far[near] = np.inf
        far[far == 0] = EPS  # more equal entries than are kept, and the shift on them
        weights = 1.0 / far  # zero for the near ones
        block = -self.inverse - (self.F.T * weights) @ self.F
        F_near = self.F[near]
        small = np.block([[np.diag(self.diagonal[near] - shift), F_near], [F_near.T, block]])
        return near, weights, (small + small.T) / 2

    def count_above(self, shift: float) -> int:
        """Return the number of eigenvalues of H above the shift."""
        _, weights, small = self._condense(shift)
        rank = len(self.inverse) // 2
        return int(np.sum(weights > 0) + np.sum(np.linalg.eigvalsh(small) > 0) - rank)

    def solve(self, shift: float, vector: Float) -> Float:
        """Return ``(H − shift)⁻¹·vector``, of length one."""
        near, weights, small = self._condense(shift)
        scaled = weights * vector
        right = np.concatenate([vector[near], -(self.F.T @ scaled)])
        try:
            solution = np.linalg.solve(small, right)
        except np.linalg.LinAlgError:  # the shift is an eigenvalue to the last digit
            solution = np.linalg.solve(small + EPS * np.eye(len(small)), right)
        x = scaled - weights * (self.F @ solution[_NEAR:])
        x[near] = solution[:_NEAR]
        length = float(np.linalg.norm(x))
        return x / length if np.isfinite(length) and length > 0 else vector

    def leading_vectors(self, k: int, start: Start) -> Float | None:
        """Return the ``k`` leading eigenvectors ``(n, k)``; None without convergence."""
        # More than requested: the projection separates close neighbors.
        count = min(k + 4, len(self.diagonal))
        shifts, vectors = (
            self._start_by_projection(count)
            if start == "projected"
            else self._start_by_counting(count)
        )
        for done in range(_REFINEMENTS):
            vectors = np.stack(
                [self.solve(float(s), v) for s, v in zip(shifts, vectors.T, strict=True)], axis=1
            )
            shifts, vectors, residual = self._ritz(vectors, count)
            if done >= 1 and (residual[:k] <= _RESIDUAL).all():
                break
        return vectors[:, :k] if self.are_leading(vectors[:, :k], shifts[:k]) else None

    def _ritz(self, vectors: Float, count: int) -> tuple[Float, Float, Float]:
        """Return the leading Ritz values and vectors of a span, and their residuals."""
        basis = np.linalg.qr(vectors)[0]
        image = self.apply(basis)
        projected = basis.T @ image
        squares, turn = np.linalg.eigh((projected + projected.T) / 2)
        squares, turn = squares[::-1][:count], turn[:, ::-1][:, :count]
        ritz_vectors = basis @ turn
        return squares, ritz_vectors, np.linalg.norm(image @ turn - ritz_vectors * squares, axis=0)

    def _start_by_projection(self, count: int) -> tuple[Float, Float]:
        """Return eigenvalues and vectors on the leading axes and the directions of the change."""
        n = len(self.diagonal)
        axes = np.eye(n, min(n, count + 2 * len(self.inverse)))
        squares, vectors, _ = self._ritz(np.hstack([axes, self.F]), count)
        return squares, vectors

    def _start_by_counting(self, count: int) -> tuple[Float, Float]:
        """Return numbers near the largest eigenvalues, and random vectors to begin with."""
        vectors = np.random.default_rng(0).standard_normal((len(self.diagonal), count))
        return self._bisect(count), vectors

    def _bisect(self, count: int) -> Float:
        """Return numbers near the ``count`` largest eigenvalues, by counting those above."""
        # A change of rank r moves a singular value by r places at most; the scale bounds the rest.
        rank, n = len(self.inverse) // 2, len(self.diagonal)
        position = np.arange(1, count + 1)
        low: Float = np.maximum(self.diagonal[np.minimum(position + rank, n) - 1], _SMALLEST)
        high = np.where(position > rank, self.diagonal[np.maximum(position - rank, 1) - 1], 1.0)
        high = np.maximum(high, low)
        counts: dict[float, int] = {}
        for _ in range(_BISECTIONS):
            middle = np.sqrt(low * high)  # of ratios: the wanted ones may be far below the first
            for shift in {float(x) for x in middle} - set(counts):
                counts[shift] = self.count_above(shift)
            enough = np.array([counts[float(x)] for x in middle]) >= position
            low, high = np.where(enough, middle, low), np.where(enough, high, middle)
        return np.asarray(np.sqrt(low * high))

    def are_leading(self, vectors: Float, squares: Float) -> bool:
        """Return True if these are the leading eigenpairs and none was missed."""
        margin = 1e3 * _RESIDUAL
        residual = np.linalg.norm(self.apply(vectors) - vectors * squares, axis=0)
        last, k = float(squares[-1]), len(squares)
        complete = self.count_above(last + margin) < k <= self.count_above(max(last - margin, 0.0))
        return bool(complete and (residual <= margin).all())
