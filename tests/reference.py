"""Slow twins of the fast numbers: every formula as it is written down, dense and in loops.

Nothing here may call the package: a twin that shares code with what it checks checks nothing.
"""

from __future__ import annotations

import mpmath
import numpy as np

# Named once. Identities of float64 arithmetic; numbers against an oracle; factors from float32.
IDENTITY = 1e-10
ORACLE = 1e-9
FLOAT32 = 1e-5
# A statistical claim holds if the sample lies within this many of its standard errors.
STANDARD_ERRORS = 5.0


def delta(A, B, scale=1.0):
    """ΔW, formed."""
    return scale * (np.asarray(B, dtype=np.float64) @ np.asarray(A, dtype=np.float64))


def dense_svd(matrix, k):
    """Leading k singular triplets of a dense matrix: U (m, k), S (k,), V (n, k)."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    return u[:, :k], s[:k], vt[:k].T


def exact_singular_values(B, A, digits=60):
    """Singular values of B·A in multiple precision, through the Gram matrices of the factors.

    The route (Cholesky of BᵀB and AAᵀ) is none that double precision could take. Full rank only.
    """
    with mpmath.workdps(digits):
        b, a = mpmath.matrix(B.tolist()), mpmath.matrix(A.tolist())
        core = mpmath.cholesky(b.T * b).T * mpmath.cholesky(a * a.T)
        return np.array([float(value) for value in mpmath.svd_r(core, compute_uv=False)])


def exact_svd(B, A, k, digits=40):
    """Leading k singular triplets of B·A in multiple precision, from the product, as `dense_svd`.

    Where factors are graded the dense SVD in float64 is the less accurate side: at a condition of
    1e8 its last vector is wrong by 2e-9.
    """
    with mpmath.workdps(digits):
        u, s, vt = mpmath.svd_r(mpmath.matrix(B.tolist()) * mpmath.matrix(A.tolist()))
        U, S, Vt = (np.array(m.tolist(), dtype=float) for m in (u, s, vt))
    return U[:, :k], S[:k].ravel(), Vt[:k].T


def _mp_orthonormal(basis):
    q, _ = mpmath.qr(mpmath.matrix(basis.tolist()), mode="skinny")
    return q


def exact_principal_angles(U, V, digits=50):
    """Principal angles of two column spans in multiple precision, ascending.

    The bases are orthonormalized again in that precision: their spans are what is compared.
    """
    with mpmath.workdps(digits):
        u, v = _mp_orthonormal(U), _mp_orthonormal(V)
        if u.cols < v.cols:
            u, v = v, u
        sines = mpmath.svd_r(v - u * (u.T * v), compute_uv=False)
        return np.array(sorted(float(mpmath.asin(min(s, mpmath.mpf(1)))) for s in sines))


def similarity(U, V):
    """φ(i, j) for all i, j by its definition: one norm per cell, divided by min(i, j)."""
    grid = np.empty((U.shape[1], V.shape[1]))
    for i in range(1, U.shape[1] + 1):
        for j in range(1, V.shape[1] + 1):
            grid[i - 1, j - 1] = np.linalg.norm(U[:, :i].T @ V[:, :j], "fro") ** 2 / min(i, j)
    return grid


def energy_overlap(delta1, delta2, side):
    """ω: the cosine between ΔW₁ᵀΔW₁ and ΔW₂ᵀΔW₂ (input) or ΔW₁ΔW₁ᵀ and ΔW₂ΔW₂ᵀ (output)."""
    if side == "input":
        one, two = delta1.T @ delta1, delta2.T @ delta2
    else:
        one, two = delta1 @ delta1.T, delta2 @ delta2.T
    return cosine(one, two)


def cosine(one, two):
    """Cosine between two matrices of one shape, entry by entry."""
    return np.sum(one * two) / (np.linalg.norm(one) * np.linalg.norm(two))


def projected_norms(U, W, V):
    """‖U_kᵀWV_k‖_F for k = 1…: one product per k."""
    return np.array([np.linalg.norm(U[:, :k].T @ W @ V[:, :k]) for k in range(1, U.shape[1] + 1)])


def entropy_rank(weights):
    """exp(−Σ p ln p) in a loop."""
    total = sum(weights)
    return float(np.exp(-sum(w / total * np.log(w / total) for w in weights if w > 0)))


def start(A1, A2):
    """c, q and z of two initial factors, by loops over their rows."""
    matched, crossed = [], []
    for k in range(A1.shape[0]):
        for m in range(A2.shape[0]):
            value = A1[k] @ A2[m] / (np.linalg.norm(A1[k]) * np.linalg.norm(A2[m]))
            (matched if k == m else crossed).append(value)
    c = np.mean(matched)
    q = np.sqrt(np.mean(np.square(crossed)))
    return c, q, np.sqrt(len(matched)) * c / max(q, 1 / np.sqrt(A1.shape[1]))


def group_shares(deltas, basis, member, k):
    """Shares of one update that others hold, signed for the mean: dense vectors and SVDs.

    The mean, k matrices, k matrices beyond the mean, k joint directions, input and output side.
    """
    unit = [d / np.linalg.norm(d) for d in deltas]
    Z, x = np.stack([unit[j].ravel() for j in basis]), unit[member].ravel()
    mean = Z.mean(axis=0) / np.linalg.norm(Z.mean(axis=0))
    shares = [(x @ mean) * abs(x @ mean)]
    for rows, vector in ((Z, x), (Z - np.outer(Z @ mean, mean), x - (x @ mean) * mean)):
        _, s, vt = np.linalg.svd(rows, full_matrices=False)
        leading = vt[: min(k, int(np.sum(s > 1e-6)))]
        shares.append(np.sum((leading @ vector) ** 2))
    U = np.linalg.svd(np.hstack([unit[j] for j in basis]))[0][:, :k]
    V = np.linalg.svd(np.vstack([unit[j] for j in basis]))[2][:k].T
    sides = (U.T @ unit[member] @ V, unit[member] @ V, U.T @ unit[member])
    return np.array([*shares, *(np.sum(part**2) for part in sides)])


def haar_stack(rng, count, dimension, columns):
    """Orthonormal bases of ``count`` uniform subspaces, (count, dimension, columns)."""
    q, r = np.linalg.qr(rng.standard_normal((count, dimension, columns)))
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None, :]


def assert_close(found, expected, *, rtol=None, atol=0.0):
    """Every number lies within exactly the tolerance that is named; relative 1e-10 without one."""
    relative = rtol if rtol is not None else 0.0 if atol else IDENTITY
    np.testing.assert_allclose(found, expected, rtol=relative, atol=atol)


def assert_mean(sample, expected):
    """The sample's mean lies within 5 of its standard errors of what is expected."""
    error = sample.std(ddof=1) / np.sqrt(len(sample))
    assert abs(sample.mean() - expected) <= STANDARD_ERRORS * error


def assert_variance(sample, expected):
    """The sample's variance lies within 5 of its standard errors of what is expected."""
    assert_mean((sample - sample.mean()) ** 2, expected)


# --- what W becomes -----------------------------------------------------------------------------


def basis_energy(W, D):
    """Per side: ‖x_iᵀΔW‖²/‖ΔW‖² for W's singular vectors; and the energy off both top-k's."""
    X, _, Zt = np.linalg.svd(W, full_matrices=False)
    total = np.linalg.norm(D) ** 2
    sides = {
        "output": np.array([np.linalg.norm(x @ D) ** 2 / total for x in X.T]),
        "input": np.array([np.linalg.norm(D @ z) ** 2 / total for z in Zt]),
    }
    off = []
    for k in range(1, X.shape[1] + 1):
        left, right = np.eye(len(W)) - X[:, :k] @ X[:, :k].T, np.eye(W.shape[1]) - Zt[:k].T @ Zt[:k]
        off.append(np.linalg.norm(left @ D @ right) ** 2 / total)
    return sides, np.array(off)


def largest_cosines(W, D, k):
    """Per side: for the leading singular vectors of W + ΔW the largest |cosine| with any of W's."""
    before, after = (np.linalg.svd(m, full_matrices=False) for m in (W, W + D))
    sides = {"output": (before[0], after[0]), "input": (before[2].T, after[2].T)}
    return {
        side: np.array([max(abs(x @ y) for x in old.T) for y in new.T[:k]])
        for side, (old, new) in sides.items()
    }


def vector_changes(W, D):
    """Per side: change of length of each vector of W, and 1 − cos of its turn, one by one."""
    sides = {}
    for side, before, after in (("output", W, W + D), ("input", W.T, (W + D).T)):
        both = list(zip(before, after, strict=True))
        lengths = [(np.linalg.norm(v), np.linalg.norm(w)) for v, w in both]
        pairs = zip(before, after, lengths, strict=True)
        turns = [1 - v @ w / (a * b) for v, w, (a, b) in pairs]
        sides[side] = np.array([b - a for a, b in lengths]), np.array(turns)
    return sides
