"""One frozen weight W in the orientation of ΔW, assembled from rows of stored tensors.

A `TensorSource` yields stored matrices tile by tile. A `Weight` is made of pieces: one whole
tensor, some rows of one, or several tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Tiles = Iterator[tuple[slice, slice, "NDArray[np.float32]"]]


class TensorSource:
    """The tensors of a base: in files, in a live model, or in arrays.

    Defaults are those of plain numbers.
    """

    @property
    def names(self) -> Sequence[str]:
        """Names of all tensors, one for each weight, however it is stored."""
        raise NotImplementedError

    @property
    def aliases(self) -> Mapping[str, Sequence[str]]:
        """Tensor name → further modules that it is the weight of, if the source knows them."""
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the plain numbers."""
        raise NotImplementedError

    def dtype(self, name: str) -> str:
        """Return the stored type, as ``"bfloat16"``."""
        raise NotImplementedError

    def storage(self, name: str) -> str:  # noqa: ARG002 - by default, all are plain
        """Return the storage of a quantized weight ("bitsandbytes nf4"), "" for plain numbers."""
        return ""

    def is_plain(self, name: str) -> bool:  # noqa: ARG002
        """Return True if the tensor is stored as plain numbers; nothing is read for it."""
        return True

    def transposed(self, name: str) -> bool | None:
        """Return True if the matrix is stored as ``[in, out]``; None if the source cannot tell."""
        raise NotImplementedError

    def tiles(self, name: str, index: int | None) -> Tiles:
        """Yield a matrix in stored orientation, tile by tile, as float32.

        ``index`` selects a matrix of a stack.
        """
        raise NotImplementedError

    def squared_errors(self, name: str, index: int | None) -> Tiles | None:  # noqa: ARG002
        """Yield the expected squared rounding errors; None for plain numbers, or if not known."""
        return None

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor of any shape, as stored."""
        raise NotImplementedError

    def refuse_unreadable(self, name: str) -> None:
        """Raise BaseWeightError if the tensor does not contain the weight's numbers."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of W that come from one tensor.

    Attributes
    ----------
    tensor, index
        The tensor, and the matrix in it (the expert) if it is a stack.
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


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One frozen weight ``W``, shape ``(d_out, d_in)``, read when its blocks are asked for.

    Attributes
    ----------
    name
        Name of the tensor, or of the tensors and parts that make the weight.
    shape
        ``(d_out, d_in)``.
    stored_dtype
        Type of the stored numbers.
    transposed
        True if it is stored as ``[in, out]``.
    storage
        Quantized storage, as "bitsandbytes nf4"; empty for plain numbers.
    pieces
        The tensors it is made of, and which rows of them.
    """

    name: str
    shape: tuple[int, int]
    stored_dtype: str
    transposed: bool
    _tiles: Callable[[], Tiles] = field(repr=False)
    storage: str = ""
    _errors: Callable[[], Tiles | None] = field(repr=False, default=lambda: None)
    _check: Callable[[NDArray[np.float32]], None] = field(repr=False, default=lambda _: None)
    pieces: tuple[Piece, ...] = ()

    def blocks(self, *, check: bool = True) -> Tiles:
        """Yield row slice, column slice and that tile of ``W``, covering it once.

        A tile is float32 and has about a million elements. Its memory is reused: the values are
        valid until the next step. Open files are closed at the end.

        Parameters
        ----------
        check
            Raise at the first tile with numbers that cannot be computed with. False is for callers
            that compute the norm of W anyway, which detects them too.

        Raises
        ------
        BaseWeightError
            The tensor contains non-finite values, or magnitudes above `MAX_VALUE`.
        """
        for rows, columns, tile in self._tiles():
            if check:
                self._check(tile)
            if self.transposed:
                yield columns, rows, tile.T
            else:
                yield rows, columns, tile

    def array(self) -> NDArray[np.float32]:
        """Return ``W`` whole, shape ``(d_out, d_in)``."""
        whole = np.empty(self.shape, dtype=np.float32)
        for rows, columns, tile in self.blocks():
            whole[rows, columns] = tile
        return whole

    def noise(self) -> float | None:
        """Return the expected ‖error of rounding‖_F/‖W‖_F of a quantized weight.

        Computed from the stored scales and levels: a value that rounds to a level is taken as
        uniform over the values that do. Correct if each value was rounded to the nearest level;
        methods that compensate (GPTQ) or rescale (AWQ) differ from the unquantized weight by more.
        None if the weight is not quantized, or its storage does not determine the error.

        Notes
        -----
        Takes two passes over the weight.
        """
        errors = self._errors()
        if not self.storage or errors is None:
            return None
        square = 0.0
        for _, _, tile in errors:
            self._check(tile)
            square += float(np.sum(tile, dtype=np.float64))
        tiles = (tile for _, _, tile in self.blocks())
        norm = sum(float(np.sum(np.square(tile, dtype=np.float64))) for tile in tiles)
        return math.sqrt(square / norm) if norm else 0.0


def tiles_of(
    pieces: Sequence[Piece], stored: Callable[[str, int | None], Tiles], *, transposed: bool
) -> Tiles:
    """Yield first slice, second slice and tile of the weight that pieces make, as it is stored.

    If it is stored as ``[in, out]``, the rows of W are the columns of the tiles.
    """
    top = 0
    for piece in pieces:
        for first, second, tile in stored(piece.tensor, piece.index):
            if not transposed:
                for target, rows in _overlaps(piece.runs, top, first):
                    yield target, second, tile[rows]
            else:
                for target, rows in _overlaps(piece.runs, top, second):
                    yield first, target, tile[:, rows]
        top += piece.height


def _overlaps(runs: Sequence[slice], top: int, rows: slice) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of W that a tile covers, and the rows of the tile that they come from."""
    for run in runs:
        low, high = max(run.start, rows.start), min(run.stop, rows.stop)
        if low < high:
            start = top + low - run.start
            yield (
                slice(start, start + high - low),
                slice(low - rows.start, high - rows.start),
            )
        top += run.stop - run.start
