"""A weight as runs of rows out of stored tensors: one whole tensor, a part of one, or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Tiles = Iterator[tuple[slice, slice, "NDArray[np.float32]"]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of W that come from one tensor.

    Attributes
    ----------
    tensor, index
        The tensor, and which matrix of a stack (an expert's) where it holds several.
    runs
        The rows, as runs of the tensor's own rows in the orientation of W, in order.
    """

    tensor: str
    index: int | None
    runs: tuple[slice, ...]

    @property
    def height(self) -> int:
        """Number of rows."""
        return sum(run.stop - run.start for run in self.runs)


def tiles_of(
    pieces: Sequence[Piece], stored: Callable[[str, int | None], Tiles], *, transposed: bool
) -> Tiles:
    """Yield first and second slice and tile of the weight that pieces make, as it is stored.

    Where it is stored as ``[in, out]``, the rows of W are the columns of the tiles.
    """
    top = 0
    for piece in pieces:
        for first, second, tile in stored(piece.tensor, piece.index):
            if not transposed:
                for place, own in _overlaps(piece.runs, top, first):
                    yield place, second, tile[own]
            else:
                for place, own in _overlaps(piece.runs, top, second):
                    yield first, place, tile[:, own]
        top += piece.height


def _overlaps(runs: Sequence[slice], top: int, rows: slice) -> Iterator[tuple[slice, slice]]:
    """Yield where rows of a tile go in W, and which of the tile they are."""
    for run in runs:
        low, high = max(run.start, rows.start), min(run.stop, rows.stop)
        if low < high:
            start = top + low - run.start
            yield (
                slice(start, start + high - low),
                slice(low - rows.start, high - rows.start),
            )
        top += run.stop - run.start
