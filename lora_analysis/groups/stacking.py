"""The directions of all members of a group as one matrix, and the products between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_analysis import linalg
from lora_analysis.errors import IncompatibleError, InputError
from lora_analysis.spectra import Side, Spectrum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Eigenvalues of a Gram matrix are squares: one below this share of the largest belongs to
# a direction below 1e-5 of the strongest one, whose vector is off by up to 1e-5 from rounding.
RESOLVED = 1e-10


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """One side of N updates of one module: R directions, those of one member together.

    Attributes
    ----------
    directions
        ``(d, R)``; columns of one member are orthonormal.
    weights
        ``(R,)``: σ/‖σ‖ of each member, so that every member has energy one.
    columns
        Indices of the columns of each member; empty for an untrained one.
    gram
        ``(R, R)``: Gram matrix of ``directions``.
    """

    directions: NDArray[np.float64]
    weights: NDArray[np.float64]
    columns: tuple[NDArray[np.intp], ...]
    gram: NDArray[np.float64]

    @property
    def dimension(self) -> int:
        """Dimension of the space of the directions."""
        return len(self.directions)

    @property
    def weighted_gram(self) -> NDArray[np.float64]:
        """The Gram matrix of the weighted directions."""
        return self.weights[:, None] * self.gram * self.weights

    @property
    def trained(self) -> NDArray[np.intp]:
        """Positions of the members that have directions."""
        return np.array([i for i, columns in enumerate(self.columns) if columns.size])

    @property
    def singular_values(self) -> NDArray[np.float64]:
        """``(N, n)``: the weights by member, padded with zeros."""
        values = np.zeros((len(self.columns), max(columns.size for columns in self.columns)))
        for i, columns in enumerate(self.columns):
            values[i, : columns.size] = self.weights[columns]
        return values


def check_group(spectra: Sequence[Spectrum]) -> None:
    """Raise unless these are two or more trained updates of one shape."""
    trained = [s for s in spectra if not s.untrained]
    if len(trained) < 2:
        module = f" of '{spectra[0].name}'" if spectra else ""
        message = (
            f"A group needs at least two trained updates{module}: {len(spectra)} given, "
            f"{len(trained)} of them trained. Add adapters, or leave this module out."
        )
        raise InputError(message)
    shapes = {s.shape for s in spectra}
    if len(shapes) != 1:
        message = (
            f"The updates of '{spectra[0].name}' have shapes {sorted(shapes)}. "
            "All must adapt the same weight."
        )
        raise IncompatibleError(message)


def stack_directions(spectra: Sequence[Spectrum], side: Side) -> Stack:
    """Return the directions of a group that passes `check_group`; O(d·R²)."""
    check_group(spectra)
    ends = np.cumsum([s.numerical_rank for s in spectra])
    columns = tuple(
        np.arange(end - s.numerical_rank, end) for end, s in zip(ends, spectra, strict=True)
    )
    directions = np.hstack([s.vectors(side) for s in spectra])
    weights = [s.S[: s.numerical_rank] / s.norm for s in spectra if not s.untrained]
    # σ beyond the numerical rank are rounding errors: the others are scaled to norm one.
    units = [part / np.linalg.norm(part) for part in weights]
    return Stack(directions, np.concatenate(units), columns, directions.T @ directions)


class Directions(NamedTuple):
    """The leading directions of a Gram matrix.

    Attributes
    ----------
    values
        Eigenvalues ``(K,)``, descending.
    vectors
        Eigenvectors ``(R, K)``.
    degenerate
        ``(K,)``: whether the leading k are arbitrary because eigenvalues k and k + 1 coincide.
    """

    values: NDArray[np.float64]
    vectors: NDArray[np.float64]
    degenerate: NDArray[np.bool_]


def resolved_directions(gram: NDArray[np.float64], k: int | None = None) -> Directions:
    """Return the eigenvectors of a Gram matrix above `RESOLVED` of the largest, ``k`` at most."""
    size = len(gram)
    if k is None or 4 * k > size:
        values, vectors = np.linalg.eigh(gram)
    else:
        # Computing a few of many takes a third of the time of all.
        from scipy.linalg import eigh

        values, vectors = eigh(gram, subset_by_index=(size - k - 1, size - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    gaps = values - np.append(values[1:], 0.0)
    degenerate = gaps <= 4 * size * linalg.EPS * values[0]
    count = int(np.count_nonzero(values[:k] > RESOLVED * values[0]))
    return Directions(values[:count], vectors[:, :count], degenerate[:count])
