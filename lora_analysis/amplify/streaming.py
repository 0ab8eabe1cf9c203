"""Project W onto any number of directions in one pass over its tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from lora_analysis import linalg
from lora_analysis.bases.sanity_checks import WeightWatch
from lora_analysis.storage.limits import MAX_VALUE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.bases import Weight
    from lora_analysis.bases.sanity_checks import WeightStatistics

Precision = Literal["float64", "float32"]
Frames = Sequence[tuple["NDArray[np.float64]", "NDArray[np.float64]"]]

# Elements of a dense weight taken at a time.
_TILE = 1 << 20
# Stored types whose values have so few digits that float32 products lose none of them.
_HALF = {"bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"}
# Below this size float64 costs next to nothing.
_SMALL = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """W seen through one pair of frames U, V with r columns each.

    Attributes
    ----------
    core
        ``UᵀWV``, ``(r, r)``.
    input_squares
        ``‖W·v_j‖²``, ``(r,)``.
    output_squares
        ``‖u_jᵀ·W‖²``, ``(r,)``; None if not asked for.
    """

    core: NDArray[np.float64]
    input_squares: NDArray[np.float64]
    output_squares: NDArray[np.float64] | None


class TileSum(Protocol):
    """A further sum over the tiles of W, which shares their reading with the projections."""

    def add(
        self,
        rows: slice,
        columns: slice,
        block: NDArray[np.floating],
        images: NDArray[np.float64],
    ) -> None:
        """Add one tile of W, and its product with all V of the frames, ``(rows, Σr)``."""


def precision_for(W: Weight | NDArray[np.floating]) -> Precision:
    """Return in which type products with W are taken.

    float32 for large weights in half precision, whose blocks are summed in float64 over rows: the
    error of ‖UᵀWV‖ is then about 1e-7 of what random directions give. float64 otherwise.
    """
    if isinstance(W, np.ndarray) or W.stored_dtype not in _HALF:
        return "float64"
    return "float64" if W.shape[0] * W.shape[1] <= _SMALL else "float32"


def project(
    W: Weight | NDArray[np.floating],
    frames: Frames,
    *,
    precision: Precision,
    one_sided: bool = False,
    norm: bool = True,
    sums: Sequence[TileSum] = (),
) -> tuple[list[Projection], float, WeightStatistics | None]:
    """Return every projection, ‖W‖_F, and what was counted of a stored W, from one pass over W.

    Parameters
    ----------
    W
        The weight, ``(d_out, d_in)``.
    frames
        Pairs of U ``(d_out, r)`` and V ``(d_in, r)``, orthonormal columns.
    precision
        Type of the products with W; sums over its rows are always in float64.
    one_sided
        Whether to find ``‖u_jᵀ·W‖²`` too, which doubles the products.
    norm
        Whether to find ``‖W‖_F``, and to look W's numbers over; 0 and None otherwise.
    sums
        Further sums, to which every tile is added too.

    Notes
    -----
    O(d_out·d_in·Σr). Next to one tile it holds ``Σr`` columns of a tile's height, and ``Σr`` rows
    of W's width if ``one_sided``.
    """
    watch = WeightWatch(W.shape[0] * W.shape[1]) if norm and not isinstance(W, np.ndarray) else None
    passed = _Pass(
        W.shape, frames, precision, one_sided=one_sided, norm=norm, watch=watch, sums=sums
    )
    with np.errstate(over="ignore", invalid="ignore"):  # damage is reported at the end
        for rows, columns, tile in _tiles(W):
            passed.add(rows, columns, tile)
    if not isinstance(W, np.ndarray) and not passed.square <= MAX_VALUE**2:
        for _ in W.blocks():  # raises if a number is not finite, naming its tensor
            pass
    statistics = None if watch is None or isinstance(W, np.ndarray) else watch.statistics(W)
    return passed.projections(), float(np.sqrt(passed.square)), statistics


def _tiles(
    W: Weight | NDArray[np.floating],
) -> Iterator[tuple[slice, slice, NDArray[np.floating]]]:
    """Yield row slice, column slice and tile; an array keeps its own type."""
    if not isinstance(W, np.ndarray):
        yield from W.blocks(check=False)  # the norm shows what is not finite
        return
    rows = max(1, _TILE // W.shape[1])
    for start in range(0, W.shape[0], rows):
        yield (
            slice(start, min(start + rows, W.shape[0])),
            slice(0, W.shape[1]),
            W[start : start + rows],
        )


class _Pass:
    """The sums of one pass."""

    def __init__(
        self,
        shape: tuple[int, int],
        frames: Frames,
        precision: Precision,
        *,
        one_sided: bool,
        norm: bool,
        watch: WeightWatch | None,
        sums: Sequence[TileSum],
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(precision)
        self.V = np.hstack([v for _, v in frames]).astype(self.dtype, order="C")  # (d_in, Σr)
        self.U = np.hstack([u for u, _ in frames])  # (d_out, Σr)
        edges = np.cumsum([0, *(u.shape[1] for u, _ in frames)])
        self.own = [slice(*ends) for ends in pairwise(edges)]
        self.cores = [np.zeros((part.stop - part.start,) * 2) for part in self.own]
        self.inputs = np.zeros(edges[-1])
        # W·V of rows that come in pieces: a weight stored transposed arrives column by column.
        self.pieces: NDArray[np.float64] | None = None
        self.outputs = np.zeros((edges[-1], shape[1])) if one_sided else None
        self.norm, self.square, self.watch = norm, 0.0, watch
        self.sums = sums
        self.buffer = np.empty(0)

    def add(self, rows: slice, columns: slice, tile: NDArray[np.floating]) -> None:
        """Add what one tile of W contributes."""
        block = tile
        if tile.dtype != self.dtype:
            if self.buffer.size < tile.size:
                self.buffer = np.empty(tile.size)  # fresh pages cost more than the arithmetic
            block = self.buffer[: tile.size].reshape(tile.shape)
            np.copyto(block, tile)
        if self.norm:
            # The square of each row's norm, as products of rows with themselves, in which numpy
            # lets other threads run; `vecdot` does not.
            runs = block if block.flags.c_contiguous else block.T
            squares = (runs[:, None, :] @ runs[:, :, None])[:, 0, 0]
            self.square += float(np.sum(squares, dtype=np.float64))
            if self.watch is not None:
                self.watch.add(tile if tile.flags.c_contiguous else tile.T, squares)
        images = linalg.thin_product(block, self.V[columns])
        for index, columns_of_frame in enumerate(self.own):
            self.cores[index] += self.U[rows, columns_of_frame].T @ images[:, columns_of_frame]
        if columns.stop - columns.start == self.shape[1]:
            self.inputs += np.einsum("ij,ij->j", images, images)
        else:
            if self.pieces is None:
                self.pieces = np.zeros((self.shape[0], len(self.inputs)))
            self.pieces[rows] += images
        if self.outputs is not None:
            self.outputs[:, columns] += linalg.thin_left_product(
                self.U[rows].astype(self.dtype), block
            )
        for total in self.sums:
            total.add(rows, columns, block, images)

    def projections(self) -> list[Projection]:
        """Return the projections, one per frame."""
        inputs = self.inputs
        if self.pieces is not None:
            inputs = inputs + np.einsum("ij,ij->j", self.pieces, self.pieces)
        outputs = None
        if self.outputs is not None:
            outputs = np.einsum("ij,ij->i", self.outputs, self.outputs)
        return [
            Projection(
                core,
                inputs[columns_of_frame],
                None if outputs is None else outputs[columns_of_frame],
            )
            for core, columns_of_frame in zip(self.cores, self.own, strict=True)
        ]
