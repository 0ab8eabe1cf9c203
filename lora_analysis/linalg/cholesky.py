"""Tall matrices as Q·R from their Gram matrix: many times quicker than Householder's QR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_analysis.linalg.constants import Float

# A Gram matrix squares the condition: up to the first bound its error, 1e-16·condition², stays
# below 1e-12; up to the second one, a second pass repairs it; beyond it Householder's QR is taken.
ONE_PASS_CONDITION = 1e2
TWO_PASS_CONDITION = 1e6
# Squares of columns within these bounds neither overflow nor lose digits in a Gram matrix.
_SAFE_SQUARES = (1e-200, 1e200)
# Elements of single precision widened at a time: what stays in the cache is widened for nothing.
_WIDENED = 1 << 16


class Triangular(NamedTuple):
    """A tall matrix M as Q·R, its columns in another order: R, and ``Q = matrix @ coefficients``.

    ``unit`` is R with columns of length one.
    """

    R: Float
    unit: Float
    matrix: NDArray[np.floating]
    coefficients: Float

    def rows(self, turn: Float) -> Float:
        """Return ``(Q @ turn).T``, with rows contiguous in memory."""
        weights, matrix = (self.coefficients @ turn).T, self.matrix
        if matrix.dtype == np.float64:
            return np.asarray(weights @ matrix.T)
        rows = np.empty((len(weights), len(matrix)))
        height = max(1, _WIDENED // matrix.shape[1])
        for start in range(0, len(matrix), height):
            block = matrix[start : start + height].astype(np.float64)
            np.matmul(weights, block.T, out=rows[:, start : start + height])
        return rows


def by_cholesky(matrices: Sequence[NDArray[np.floating]]) -> list[Triangular] | None:
    """Return tall matrices ``(d, r)`` as Q·R; None if that would lose digits.

    The columns of all are sorted alike, by falling product of their lengths.
    """
    rank = matrices[0].shape[1]
    if any(matrix.shape[0] < rank for matrix in matrices):
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # checked on the result
        grams = np.stack([_gram(matrix) for matrix in matrices])  # (n, r, r)
    squares = np.diagonal(grams, axis1=-2, axis2=-1)
    low, high = _SAFE_SQUARES
    if not (low < squares.min() and squares.max() < high):
        return None
    lengths = np.sqrt(squares)  # (n, r)
    order = np.argsort(-np.prod(lengths, axis=0), kind="stable")
    lengths = lengths[:, order]
    # To unit columns first: what is merely scaled is not ill-conditioned.
    units = grams[:, order[:, None], order] / (lengths[:, :, None] * lengths[:, None, :])
    try:
        r = np.linalg.cholesky(units).mT  # (n, r, r)
        inverse = np.linalg.inv(r)
        conditions = np.sqrt((r * r).sum((-2, -1)) * (inverse * inverse).sum((-2, -1)))
        if not (conditions < TWO_PASS_CONDITION).all():
            return None
        coefficients = np.empty_like(inverse)
        coefficients[:, order] = inverse / lengths[:, :, None]
        return [
            _triangular(matrix, *parts)
            for matrix, *parts in zip(matrices, r, lengths, coefficients, conditions, strict=True)
        ]
    except np.linalg.LinAlgError:  # exactly rank-deficient
        return None


def _gram(matrix: NDArray[np.floating]) -> Float:
    """Return ``MᵀM`` in float64; wider copies are made of a cacheful at a time."""
    if matrix.dtype == np.float64:
        return np.asarray(matrix.T @ matrix)
    total = np.zeros((matrix.shape[1], matrix.shape[1]))
    rows = max(1, _WIDENED // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        block = matrix[start : start + rows].astype(np.float64)
        total += block.T @ block
    return total


def _triangular(
    matrix: NDArray[np.floating], unit: Float, length: Float, coefficients: Float, condition: float
) -> Triangular:
    """Return one matrix as Q·R, with a second pass if it is ill-conditioned."""
    if condition < ONE_PASS_CONDITION:
        return Triangular(unit * length, unit, matrix, coefficients)
    nearly = matrix.astype(np.float64, copy=False) @ coefficients
    second = np.linalg.cholesky(nearly.T @ nearly).T
    # Two steps of R, each well enough conditioned (Yamamoto et al. 2015, CholeskyQR2).
    unit = np.asarray(second @ unit)
    return Triangular(unit * length, unit, nearly, np.linalg.inv(second))
