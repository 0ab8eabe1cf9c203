"""Matrices with scales for the whole, rows, groups or blocks: fp8, int8, and bitsandbytes.

``W = weight·scale``, also if the scale is called ``weight_scale_inv`` (DeepSeek's name for it).
The shape of the scales determines what each covers; if blocks do not divide the matrix, the
configuration determines their edge. The table of schemes determines what a scale means.

bitsandbytes has int8 by rows, and 4-bit code-books (nf4, fp4). 4-bit codes run through the
flattened weight, two a byte, the first in the high half; each block of 64 (``blocksize``) has a
scale ``absmax``, which may itself be stored as 8-bit codes ("nested" or double quantization). The
code-book and a JSON of shapes are separate tensors of the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.bases.quantized.codes import (
    Coded,
    Decoder,
    RawTensors,
    float_levels,
    nibbles,
    plane_of,
    powers_of_two,
    storage_error,
    untile,
    untiled_shape,
)
from lora_analysis.bases.quantized.schemes import DECODED_8_BIT, Scheme, decoding_of
from lora_analysis.storage.documents import parse_json
from lora_analysis.storage.dtypes import FLOAT8

if TYPE_CHECKING:
    from numpy.typing import NDArray

STATE = ".quant_state.bitsandbytes__"


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
    power: bool = False
    tiled: bool = False
    transposed: None = None
    step: int = 1

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:
        """Return a function that decodes runs of rows."""
        scales = self._grid(tensors, self.scale, index)
        zeros = None if self.zero is None else self._grid(tensors, self.zero, index)
        levels = float_levels(self.dtype) if self.dtype in FLOAT8 else None
        height, width = plane_of(self.shape, index)
        start = (index or 0) * height * width

        def decode(rows: slice) -> Coded:
            codes = tensors.raw(self.name, start + rows.start * width, start + rows.stop * width)
            codes = codes.reshape(-1, width)
            zero = None if zeros is None else self._expand_grid(zeros, rows, width)
            return Coded(codes, self._expand_grid(scales, rows, width), levels, zero)

        return decode

    def _grid(self, tensors: RawTensors, name: str | None, index: int | None) -> NDArray[Any]:
        """Return one number per block, as a matrix."""
        if name is None:
            return np.ones((1, 1), np.float32)
        exponents = self.power and name == self.scale and tensors.infos[name].dtype == "uint8"
        stored = tensors.read(name)
        numbers = powers_of_two(stored) if exponents else stored.astype(np.float32)
        plane = plane_of(self.shape, index)
        height, width = (math.ceil(n / b) for n, b in zip(plane, self.block, strict=True))
        if self.tiled and name == self.scale:
            return untile(numbers, height, width)
        if index is not None and numbers.size > 1:
            numbers = numbers[index]
        return numbers.reshape(height, width)

    def _expand_grid(self, grid: NDArray[Any], rows: slice, width: int) -> NDArray[Any]:
        """Return the numbers of every row and column, as views of one row or column if possible."""
        if grid.shape[1] > 1:
            grid = grid[:, np.arange(width) // self.block[1]]
        blocks = np.arange(rows.start, rows.stop) // self.block[0]
        return grid if grid.shape[0] == 1 else grid[blocks]


def scaled_weight(
    name: str, scale: str | None, tensors: RawTensors, scheme: Scheme, label: str
) -> Scaled:
    """Return the weight ``name`` with its scales; the table must cover their types.

    Raises
    ------
    BaseWeightError
        The types are not decoded, the scales do not cover the weight, or the file has a further
        factor or zero point that would change the values.
    """
    info = tensors.infos[name]
    path = name.removesuffix(".weight")
    if f"{path}.pre_quant_scale" in tensors.infos:
        why = "its inputs are scaled too (pre_quant_scale), which is not read"
        raise storage_error(label, name, "scaled", why)
    if scale is None:
        if scheme.kinds and info.dtype in FLOAT8:
            why = f"{scheme.source}, but the weight has no scales; are tensors missing?"
            raise storage_error(label, name, "fp8", why)
        return Scaled(name, info.shape, "fp8 without scales", info.dtype, None, (1, 1))
    decoding = decoding_of(DECODED_8_BIT, info, tensors.infos[scale], scheme, label)
    kind, power = decoding.name, decoding.meaning == "power of two"
    tiled = scheme.tiled and kind == "MXFP8"
    # Kernels are scaled as a whole or by output, as the matrix that they are.
    kernel = len(info.shape) > 2 and name.endswith(".weight")
    matrix = plane_of(info.shape, None) if kernel else info.shape
    shape = _grid_shape(matrix, tensors.infos[scale].shape)
    if kernel and shape[1:] and math.prod(shape) == shape[0]:
        shape = shape[:1]
    if tiled:
        shape = untiled_shape(matrix, tensors.infos[scale], 32)
    default_block = (1, 32) if kind == "MXFP8" else None
    block = block_of(matrix, shape, scheme.block or default_block)
    if block is None:
        why = f"scales of shape {shape} do not cover a weight of shape {info.shape}"
        raise storage_error(label, name, f"scaled {kind}", why)
    zero = f"{name}_zero_point"
    if zero in tensors.infos:
        if tensors.infos[zero].shape != tensors.infos[scale].shape:
            raise storage_error(
                label, name, kind, f"zero points and scales {shape} differ in shape"
            )
        if info.dtype in FLOAT8 and np.any(tensors.read(zero)):
            raise storage_error(
                label, name, kind, "it has zero points, which are read for integers only"
            )
    storage = f"{kind}, {_describe_blocks(matrix, block)}"
    used_zero = zero if zero in tensors.infos and info.dtype not in FLOAT8 else None
    return Scaled(name, info.shape, storage, info.dtype, scale, block, used_zero, power, tiled)


def _grid_shape(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of scales without the axes of 1 that some writers leave between blocks.

    modelopt stores ``(rows, 1, columns, 1)``, musubi ``(rows, columns, 1)``.
    """
    if len(weight) == 2 and len(scale) == 4 and scale[1] == scale[3] == 1:
        return scale[0], scale[2]
    if len(weight) == 2 and len(scale) == 3 and scale[2] == 1:
        return scale[:2]
    return scale


def block_of(
    weight: tuple[int, ...], scale: tuple[int, ...], stated_block: Sequence[int] | None
) -> tuple[int, int] | None:
    """Return rows and columns of a weight that one scale covers, None if the shapes do not fit."""
    grid = scale[len(weight) - 2 :] if len(weight) == 3 and len(scale) > 1 else scale
    if len(weight) == 3 and len(scale) > 1 and scale[0] != weight[0]:
        return None
    if math.prod(grid) == 1:
        grid = (1, 1)
    if len(grid) == 1:  # one for each row
        grid = (grid[0], 1)
    if len(grid) != 2 or len(weight) not in (2, 3):
        return None
    sides = stated_block or (128, 128)
    edges = []  # equal blocks, or of the stated size
    for length, count, side in zip(weight[-2:], grid, sides, strict=True):
        if count == 1:
            edge = length
        elif count == length:
            edge = 1
        elif count == math.ceil(length / side):
            edge = side
        elif count and length % count == 0:
            edge = length // count
        else:
            return None
        edges.append(max(edge, 1))
    return edges[0], edges[1]


def _describe_blocks(shape: tuple[int, ...], block: tuple[int, int]) -> str:
    """Return how many values share a scale, in words."""
    height, width = shape[-2:]
    if block == (height, width):
        return "one scale"
    if block[1] == width:
        return "a scale per row" if block[0] == 1 else f"a scale per {block[0]} rows"
    return f"a scale per {block[0]} × {block[1]}"


@dataclass(frozen=True, slots=True)
class Blockwise4Bit:
    """One nf4 or fp4 weight ``X.weight``."""

    name: str
    shape: tuple[int, ...]
    storage: str
    state: dict[str, Any]
    transposed: None = None
    step: int = 1

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:  # noqa: ARG002
        """Return a function that decodes runs of rows."""
        levels = tensors.read(f"{self.name}.quant_map").astype(np.float32).reshape(-1)
        scales = self._scales(tensors)
        columns, block = self.shape[1], int(self.state["blocksize"])

        def decode(rows: slice) -> Coded:
            first, last = rows.start * columns, rows.stop * columns
            packed = tensors.raw(self.name, first // 2, (last + 1) // 2)
            codes = nibbles(packed, high_first=True)[first % 2 :][: last - first]
            scale = scales[np.arange(first, last) // block]
            return Coded(codes.reshape(-1, columns), scale.reshape(-1, columns), levels)

        return decode

    def _scales(self, tensors: RawTensors) -> NDArray[np.float32]:
        """Return one scale per block."""
        # Their numbers of elements were checked, their shapes were not.
        absmax = tensors.read(f"{self.name}.absmax").reshape(-1)
        if "nested_blocksize" not in self.state:
            return absmax.astype(np.float32)
        nested = tensors.read(f"{self.name}.nested_quant_map").reshape(-1)[absmax]
        outer = tensors.read(f"{self.name}.nested_absmax").reshape(-1)
        outer = outer[np.arange(len(absmax)) // int(self.state["nested_blocksize"])]
        scales = nested * outer + np.float32(self.state.get("nested_offset", 0.0))
        return np.asarray(scales, np.float32)


def blockwise_4bit(name: str, kind: str, tensors: RawTensors, label: str) -> Blockwise4Bit:
    """Return the weight ``X.weight`` with a state of ``kind``; the sizes must fit together."""
    storage = f"bitsandbytes {kind}"
    try:
        state = parse_json(bytes(tensors.read(f"{name}{STATE}{kind}")).decode("utf-8"))
        m, n = (int(size) for size in state["shape"])
        blocks = math.ceil(m * n / int(state["blocksize"]))
        nested = int(state.get("nested_blocksize", 1))
        sizes = {
            name: math.ceil(m * n / 2),
            f"{name}.absmax": blocks,
            f"{name}.quant_map": 16,
        }
        if "nested_blocksize" in state:
            sizes[f"{name}.nested_absmax"] = math.ceil(blocks / nested)
            sizes[f"{name}.nested_quant_map"] = 256
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise storage_error(
            label, name, storage, f"its quant_state is not readable ({error})"
        ) from error
    for tensor, elements in sizes.items():
        info = tensors.infos.get(tensor)
        if info is None or info.elements != elements:
            actual = "is missing" if info is None else f"has {info.elements:,}"
            why = f"'{tensor}' should have {elements:,} elements, it {actual}"
            raise storage_error(label, name, storage, why)
    kinds = {name: "uint8"} | ({f"{name}.absmax": "uint8"} if "nested_blocksize" in state else {})
    for tensor, dtype in kinds.items():
        if tensors.infos[tensor].dtype != dtype:
            why = f"'{tensor}' should be {dtype}, it is {tensors.infos[tensor].dtype}"
            raise storage_error(label, name, storage, why)
    return Blockwise4Bit(name, (m, n), storage, state)


@dataclass(frozen=True, slots=True)
class RowwiseInt8:
    """One int8 weight ``X.weight`` with the largest value of each row in ``X.SCB``."""

    name: str
    scale: str
    shape: tuple[int, ...]
    storage: str = "bitsandbytes int8"
    transposed: None = None
    step: int = 1

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:  # noqa: ARG002
        """Return a function that decodes runs of rows: ``codes·SCB/127``."""
        scales = tensors.read(self.scale).astype(np.float32).reshape(-1, 1) / np.float32(127)
        columns = self.shape[1]

        def decode(rows: slice) -> Coded:
            codes = tensors.raw(self.name, rows.start * columns, rows.stop * columns)
            return Coded(codes.reshape(-1, columns), scales[rows])

        return decode


def rowwise_int8(name: str, scale: str, tensors: RawTensors, label: str) -> RowwiseInt8:
    """Return the weight; it must be int8 with one scale per row."""
    info, rows = tensors.infos[name], tensors.infos[scale]
    if info.dtype != "int8" or len(info.shape) != 2 or rows.elements != info.shape[0]:
        why = f"it is {info.dtype} {info.shape}, its SCB has shape {rows.shape}"
        raise storage_error(label, name, "bitsandbytes int8", why)
    return RowwiseInt8(name, scale, info.shape)
