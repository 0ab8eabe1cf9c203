"""SVDs of many products ``B·A`` of one shape, and the overlaps of all of their vectors.

Singular vectors are the columns of the factors times small matrices. Their products follow from
those of the factors: one product of all columns with each other per side, and no vector is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_analysis.linalg.arrays import Float
from lora_analysis.linalg.cholesky import ONE_PASS_CONDITION, cholesky
from lora_analysis.linalg.factored import FactoredSVD

# Numbers of all matrices that are widened at a time: they stay in the cache.
_WIDENED = 1 << 16


class JointSVD(NamedTuple):
    """The SVDs ``U_i·diag(S_i)·V_iᵀ`` of N products, without their vectors.

    ``left`` holds ``U_iᵀ·U_j`` and ``right`` ``V_iᵀ·V_j`` for all i and j, ``(Σr, Σr)``. The sign
    of a pair of vectors is arbitrary, but the same on both sides.
    """

    svds: list[FactoredSVD]
    left: Float
    right: Float


def joint_gram(matrices: Sequence[NDArray[np.floating]]) -> Float:
    """Return the products of all rows of some matrices ``(r, d)``, ``(Σr, Σr)`` in float64."""
    stops = np.cumsum([len(matrix) for matrix in matrices]).tolist()
    total, (_, d) = stops[-1], matrices[0].shape
    parts = [slice(stop - len(matrix), stop) for matrix, stop in zip(matrices, stops, strict=True)]
    gram = np.zeros((total, total))
    # Blocks in the order of memory; deep ones if there are many rows, since each one is mirrored.
    rowwise = matrices[0].flags.c_contiguous
    depth = min(d, max(_WIDENED // total, total, 1))
    block = np.empty((total, depth) if rowwise else (depth, total))
    for start in range(0, d, depth):
        count = min(depth, d - start)
        rows = block[:, :count] if rowwise else block[:count].T  # (Σr, count)
        for part, matrix in zip(parts, matrices, strict=True):
            rows[part] = matrix[:, start : start + count]
        gram += rows @ rows.T  # BLAS computes half of it
    return gram


def joint_svd(B_gram: Float, A_gram: Float, ranks: Sequence[int]) -> JointSVD | None:
    """Return the SVDs of N products ``B_i·A_i``; None if that would lose digits.

    Parameters
    ----------
    B_gram, A_gram
        ``(Σr, Σr)``: products of the columns of all B, and of the rows of all A.
    ranks
        Number of columns of each B.

    Notes
    -----
    The error of an overlap is about 1e-16·condition², at most 1e-12.
    """
    stops = np.cumsum(ranks)
    parts = [slice(stop - rank, stop) for rank, stop in zip(ranks, stops.tolist(), strict=True)]
    svds: dict[int, FactoredSVD] = {}
    turns: dict[int, tuple[Float, Float]] = {}
    for rank in sorted(set(ranks)):
        members = [i for i, other in enumerate(ranks) if other == rank]
        grams = np.stack([[g[parts[i], parts[i]] for g in (B_gram, A_gram)] for i in members])
        factors = cholesky(grams)  # (N, 2, r, r)
        if factors is None:
            return None
        extremes = np.linalg.eigvalsh(factors.units)[..., [0, -1]]
        if not (extremes[..., 1] < ONE_PASS_CONDITION**2 * extremes[..., 0]).all():
            return None
        conditions = np.sqrt(extremes[..., 1] / extremes[..., 0])  # (N, 2)
        norms = np.sqrt(np.linalg.eigvalsh(grams)[..., -1])
        triangles = factors.unit * factors.lengths[..., None, :]
        u, s, v_t = np.linalg.svd(triangles[:, 0] @ triangles[:, 1].mT)
        left = factors.coefficients[:, 0] @ u
        right = factors.coefficients[:, 1] @ v_t.mT
        for index, member in enumerate(members):
            svds[member] = FactoredSVD(None, s[index], None, *norms[index], *conditions[index])
            turns[member] = left[index], right[index]
    in_order = range(len(ranks))
    sides = (
        _rotate_blocks(gram, parts, [turns[i][side] for i in in_order])
        for side, gram in enumerate((B_gram, A_gram))
    )
    return JointSVD([svds[i] for i in in_order], *sides)


def _rotate_blocks(gram: Float, parts: Sequence[slice], turns: Sequence[Float]) -> Float:
    """Return ``T_iᵀ·G_ij·T_j`` for all blocks of a Gram matrix."""
    half, whole = np.empty_like(gram), np.empty_like(gram)
    for part, turn in zip(parts, turns, strict=True):
        np.matmul(turn.T, gram[part], out=half[part])
    for part, turn in zip(parts, turns, strict=True):
        np.matmul(half[:, part], turn, out=whole[:, part])
    return whole
