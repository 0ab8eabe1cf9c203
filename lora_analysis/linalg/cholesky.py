"""Tall matrices as Q·R from their Gram matrix: many times quicker than Householder's QR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_analysis.linalg.arrays import Float

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
    parts = cholesky(grams)
    if parts is None:
        return None
    # ‖R‖·‖R⁻¹‖ in the Frobenius norm, which bounds the condition.
    units = np.stack([parts.unit, parts.inverse])
    conditions = np.sqrt((units * units).sum((-2, -1))).prod(axis=0)
    if not (conditions < TWO_PASS_CONDITION).all():
        return None
    try:
        return [
            _triangular(matrix, *values)
            for matrix, *values in zip(
                matrices, parts.unit, parts.lengths, parts.coefficients, conditions, strict=True
            )
        ]
    except np.linalg.LinAlgError:  # rank-deficient to the last digits
        return None


class Cholesky(NamedTuple):
    """Cholesky factors of Gram matrices ``(..., n, r, r)`` whose columns are sorted n by n alike.

    ``lengths`` are those of the columns, in their order; ``unit`` is R with columns of length one,
    ``inverse`` its inverse, and ``Q = matrix @ coefficients``.
    """

    lengths: Float
    units: Float
    unit: Float
    inverse: Float
    coefficients: Float


def cholesky(grams: Float) -> Cholesky | None:
    """Return the Cholesky factors of Gram matrices ``(..., n, r, r)``; None if one has none.

    The columns of the n matrices are sorted alike, by falling product of their lengths.
    """
    squares = np.diagonal(grams, axis1=-2, axis2=-1)
    low, high = _SAFE_SQUARES
    if not (low < squares.min() and squares.max() < high):
        return None
    lengths = np.sqrt(squares)  # (..., n, r)
    order = np.argsort(-np.prod(lengths, axis=-2), axis=-1, kind="stable")[..., None, :]
    lengths = np.take_along_axis(lengths, order, axis=-1)
    units = np.take_along_axis(grams, order[..., None], axis=-2)
    units = np.take_along_axis(units, order[..., None, :], axis=-1)
    # To unit columns first: what is merely scaled is not ill-conditioned.
    units /= lengths[..., :, None] * lengths[..., None, :]
    try:
        unit = np.asarray(np.linalg.cholesky(units).mT, np.float64)  # (..., n, r, r)
        inverse = np.asarray(np.linalg.inv(unit), np.float64)
    except np.linalg.LinAlgError:  # exactly rank-deficient
        return None
    coefficients = np.empty_like(inverse)
    rows = np.broadcast_to(order[..., None], inverse.shape)
    np.put_along_axis(coefficients, rows, inverse / lengths[..., :, None], axis=-2)
    return Cholesky(lengths, units, unit, inverse, coefficients)


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
