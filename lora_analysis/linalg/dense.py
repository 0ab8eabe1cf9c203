"""Singular values of a dense matrix: the leading ones by iteration, all by LAPACK."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lora_analysis.linalg.constants import Float

# Below this size LAPACK's full SVD of a dense matrix is quicker than an iteration on it.
DENSE_SVD_LIMIT = 768


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
