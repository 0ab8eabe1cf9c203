"""Runs of elements out of a stored tensor, bit for bit: for weights that are stored as codes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_analysis.storage.dtypes import raw_dtype
from lora_analysis.storage.safetensors import TensorInfo, check_readable, read_tensor

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# Bytes are bytes: an integer type of the same width carries any other unchanged.
_CARRIERS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def read_elements(path: Path, info: TensorInfo, start: int, stop: int) -> NDArray[Any]:
    """Return elements ``start`` to ``stop`` of a tensor as it lies in the file, flat.

    Types that numpy lacks come as unsigned integers of their width. Of types of less than a byte,
    ``start`` and ``stop`` count bytes, which come as they are packed.

    Raises
    ------
    MalformedFileError
        The file is shorter than its header said.
    """
    if info.strides is not None:
        return read_tensor(path, replace(info, dtype=_carrier(info.dtype))).reshape(-1)[start:stop]
    size = raw_dtype(info.dtype).itemsize
    part = part_of(info, (stop - start,), info.start + start * size)
    return read_tensor(path, replace(part, dtype=_carrier(info.dtype)))


def read_stored(path: Path, info: TensorInfo) -> NDArray[Any]:
    """Return a whole tensor as it lies in the file, in its shape and the type of its bytes.

    Types that numpy lacks come as unsigned integers of their width.

    Raises
    ------
    MalformedFileError
        The file is shorter than its header said.
    UnknownFormatError
        The tensor is stored in a type that cannot be read as plain numbers.
    """
    check_readable(path, info)
    elements = read_elements(path, info, 0, info.elements)
    return elements.view(raw_dtype(info.dtype)).reshape(info.shape)


def part_of(info: TensorInfo, shape: tuple[int, ...], start: int) -> TensorInfo:
    """Return a run of a tensor's bytes as a tensor of its own."""
    part = replace(info, shape=shape)
    return replace(part, start=start, stop=start + part.elements * raw_dtype(info.dtype).itemsize)


def _carrier(dtype: str) -> str:
    raw = raw_dtype(dtype)
    return dtype if raw.kind == "i" else _CARRIERS[raw.itemsize]
