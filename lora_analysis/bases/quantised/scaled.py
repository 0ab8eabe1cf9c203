"""fp8 and int8 matrices with a scale for the whole, for rows, for groups or for square blocks.

``W = weight·scale``, also where the scale is called ``weight_scale_inv`` (DeepSeek's name for it).
What a scale covers follows from its shape; the edge of a block that does not divide the matrix,
from the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.bases.quantised.codes import (
    Coded,
    Decoder,
    RawTensors,
    float_levels,
    refused,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, slots=True)
class Scaled:
    """One weight ``X.weight``; its scales in a tensor, or 1."""

    name: str
    shape: tuple[int, ...]
    storage: str
    dtype: str
    scale: str | None
    block: tuple[int, int]
    zero: str | None = None
    transposed: None = None
    step: int = 1

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:
        """Return what decodes runs of rows."""
        scales = self._grid(tensors, self.scale, index)
        zeros = None if self.zero is None else self._grid(tensors, self.zero, index)
        levels = float_levels(self.dtype) if self.dtype in FLOAT8 else None
        height, width = self.shape[-2:]
        start = (index or 0) * height * width

        def decode(rows: slice) -> Coded:
            codes = tensors.raw(self.name, start + rows.start * width, start + rows.stop * width)
            codes = codes.reshape(-1, width)
            zero = None if zeros is None else self._spread(zeros, rows)
            return Coded(codes, self._spread(scales, rows), levels, zero)

        return decode

    def _grid(self, tensors: RawTensors, name: str | None, index: int | None) -> NDArray[Any]:
        """Return one number per block, as a matrix."""
        if name is None:
            return np.ones((1, 1), np.float32)
        found: NDArray[np.float32] = tensors.read(name).astype(np.float32)
        if len(self.shape) == 3 and found.size > 1:
            found = found[index or 0]
        height, width = (math.ceil(n / b) for n, b in zip(self.shape[-2:], self.block, strict=True))
        return found.reshape(height, width)

    def _spread(self, grid: NDArray[Any], rows: slice) -> NDArray[Any]:
        """Return the numbers of every row and column, kept thin where they are the same."""
        if grid.shape[1] > 1:
            grid = grid[:, np.arange(self.shape[-1]) // self.block[1]]
        own = np.arange(rows.start, rows.stop) // self.block[0]
        return grid if grid.shape[0] == 1 else grid[own]


def scaled(
    name: str, scale: str | None, tensors: RawTensors, config: Mapping[str, Any], label: str
) -> Scaled:
    """Return the weight ``X.weight`` with its scales; they must cover it."""
    info = tensors.infos[name]
    kind = "fp8" if info.dtype in FLOAT8 else "int8"
    if info.dtype not in (*FLOAT8, "int8"):
        raise refused(label, name, "scaled", f"it is stored as {info.dtype}, which is not read")
    if scale is None:
        return Scaled(name, info.shape, f"{kind} without scales", info.dtype, None, (1, 1))
    shape = tensors.infos[scale].shape
    block = block_of(info.shape, shape, _stated_block(config))
    if block is None:
        why = f"scales of shape {shape} do not cover a weight of shape {info.shape}"
        raise refused(label, name, f"scaled {kind}", why)
    zero = f"{name}_zero_point"
    if zero in tensors.infos and tensors.infos[zero].shape != shape:
        raise refused(label, name, kind, f"zero points and scales {shape} differ in shape")
    storage = f"{kind}, {_covering(info.shape, block)}"
    held = zero if zero in tensors.infos else None
    return Scaled(name, info.shape, storage, info.dtype, scale, block, held)


def _stated_block(config: Mapping[str, Any]) -> list[int] | None:
    """Return the edges of blocks that a configuration states, None where it states none."""
    stated = config.get("weight_block_size")
    if not isinstance(stated, list) or len(stated) != 2:
        return None
    return stated if all(isinstance(edge, int) and edge > 0 for edge in stated) else None


def block_of(
    weight: tuple[int, ...], scale: tuple[int, ...], stated: Sequence[int] | None
) -> tuple[int, int] | None:
    """Return rows and columns of a weight that one scale covers, None where none fits."""
    grid = scale[len(weight) - 2 :] if len(weight) == 3 and len(scale) > 1 else scale
    if len(weight) == 3 and len(scale) > 1 and scale[0] != weight[0]:
        return None
    if math.prod(grid) == 1:
        grid = (1, 1)
    if len(grid) == 1:  # one for each row
        grid = (grid[0], 1)
    if len(grid) != 2 or len(weight) not in (2, 3):
        return None
    square = stated or (128, 128)
    edges = [
        _edge(length, count, side)
        for length, count, side in zip(weight[-2:], grid, square, strict=True)
    ]
    return None if None in edges else (edges[0] or 1, edges[1] or 1)


def _edge(length: int, count: int, stated: int) -> int | None:
    """Return the edge of ``count`` blocks over ``length``: equal ones, or of the size stated."""
    if count == 1:
        return max(length, 1)
    if count == length:
        return 1
    if count == math.ceil(length / stated):
        return stated
    return length // count if count and length % count == 0 else None


def _covering(shape: tuple[int, ...], block: tuple[int, int]) -> str:
    height, width = shape[-2:]
    if block == (height, width):
        return "one scale"
    if block[1] == width:
        return "a scale per row" if block[0] == 1 else f"a scale per {block[0]} rows"
    return f"a scale per {block[0]} × {block[1]}"
