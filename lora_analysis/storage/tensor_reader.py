"""Values of tensors stored as plain numbers: whole, in tiles, or as runs of raw elements.

For every container whose numbers are stored uncompressed. Files are read, never mapped: a file cut
short under a map kills the process.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lora_analysis.errors import MalformedFileError, UnknownFormatError
from lora_analysis.storage.dtypes import READABLE, raw_dtype, result_dtype, widen
from lora_analysis.storage.limits import BLOCK_ELEMENTS
from lora_analysis.storage.safetensors import TensorInfo, quote

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

# Bytes are bytes: an integer type of the same width carries any other unchanged.
_CARRIERS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def read_tensor(path: Path, info: TensorInfo) -> NDArray[Any]:
    """Return one tensor in its stored shape.

    Half precision and 8-bit floats come as float32, exactly; float32, float64, integers and
    booleans come as they are.

    Parameters
    ----------
    path
        The file whose header gave ``info``.
    info
        The tensor.

    Raises
    ------
    MalformedFileError
        The file is shorter than its header said.
    UnknownFormatError
        The tensor is stored in a type that cannot be read as plain numbers (4- and 6-bit floats).
    """
    check_readable(path, info)
    count = (info.stop - info.start) // raw_dtype(info.dtype).itemsize
    out: NDArray[Any] = np.empty(count, dtype=result_dtype(info.dtype))
    with path.open("rb", buffering=0) as stream:
        _check_size(path, info, stream)
        stream.seek(info.start)
        if out.dtype == raw_dtype(info.dtype):
            _fill(path, info, stream, out)
        else:
            scratch = np.empty(min(count, BLOCK_ELEMENTS), raw_dtype(info.dtype))
            for first in range(0, count, BLOCK_ELEMENTS):
                part = out[first : first + BLOCK_ELEMENTS]
                _fill_widened(path, info, stream, part, scratch)
    if info.strides is None:
        return out.reshape(info.shape)
    strides = [stride * out.itemsize for stride in info.strides]  # their span was checked
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(out, info.shape, strides))


def iter_blocks(
    path: Path, info: TensorInfo, *, elements: int = BLOCK_ELEMENTS
) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
    """Yield a matrix in tiles, top to bottom, as float32, each in the same reused buffer.

    Parameters
    ----------
    path
        The file whose header gave ``info``.
    info
        A tensor of two dimensions, shape ``(m, n)``.
    elements
        Largest size of a tile. A tile is a run of whole rows, or a piece of a row if one row is
        larger than ``elements``.

    Yields
    ------
    tuple
        Row slice, column slice, and the tile, whose values are valid until the next step.

    Raises
    ------
    MalformedFileError
        The file is shorter than its header said.
    UnknownFormatError
        The tensor is stored in a type that cannot be read as plain numbers.
    """
    check_readable(path, info)
    if info.strides is not None:  # stored by columns, for example
        whole = read_tensor(path, info)
        for rows, columns in tile_slices(info.shape, elements):
            yield rows, columns, whole[rows, columns].astype(np.float32)
        return
    tiles = list(tile_slices(info.shape, elements))
    largest = max((_span(rows) * _span(columns) for rows, columns in tiles), default=0)
    buffer = np.empty(largest, dtype=np.float32)
    plain = raw_dtype(info.dtype) == buffer.dtype
    scratch = np.empty(0 if plain else largest, dtype=raw_dtype(info.dtype))
    with path.open("rb", buffering=0) as stream:
        _check_size(path, info, stream)
        stream.seek(info.start)  # tiles follow each other in the file: one seek is enough
        if hasattr(os, "posix_fadvise"):  # the disk reads on while a tile is computed with
            os.posix_fadvise(
                stream.fileno(), info.start, info.stop - info.start, os.POSIX_FADV_WILLNEED
            )
        for rows, columns in tiles:
            flat = buffer[: _span(rows) * _span(columns)]
            if plain:
                _fill(path, info, stream, flat)
            else:
                _fill_widened(path, info, stream, flat, scratch)
            yield rows, columns, flat.reshape(_span(rows), _span(columns))


def read_elements(path: Path, info: TensorInfo, start: int, stop: int) -> NDArray[Any]:
    """Return elements ``start`` to ``stop`` of a tensor as stored, flat.

    Types that numpy lacks come as unsigned integers of their width. For types of less than a byte,
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


def part_of(info: TensorInfo, shape: tuple[int, ...], start: int) -> TensorInfo:
    """Return a run of a tensor's bytes as a tensor of its own."""
    part = replace(info, shape=shape)
    return replace(part, start=start, stop=start + part.elements * raw_dtype(info.dtype).itemsize)


def _carrier(dtype: str) -> str:
    raw = raw_dtype(dtype)
    return dtype if raw.kind == "i" else _CARRIERS[raw.itemsize]


def tile_slices(shape: tuple[int, ...], elements: int) -> Iterator[tuple[slice, slice]]:
    """Yield the row and column slices that cut a matrix into runs of at most ``elements``."""
    m, n = shape
    rows = max(1, elements // max(n, 1))
    columns = max(1, min(n, elements))
    for top in range(0, m, rows):
        for left in range(0, n, columns):
            yield slice(top, min(top + rows, m)), slice(left, min(left + columns, n))


def _span(part: slice) -> int:
    return int(part.stop - part.start)


def check_readable(path: Path, info: TensorInfo) -> None:
    """Raise UnknownFormatError if a tensor cannot be read as plain numbers."""
    if info.dtype not in READABLE:
        message = (
            f"{path}: tensor {quote(info.name)} is stored as {info.dtype}, which cannot be read "
            "as plain numbers. Convert it to bfloat16 or wider."
        )
        raise UnknownFormatError(message)


def _check_size(path: Path, info: TensorInfo, stream: BinaryIO) -> None:
    size = stream.seek(0, 2)
    if size < info.stop:
        message = (
            f"{path}: tensor {quote(info.name)} ends at byte {info.stop:,}, the file now has "
            f"{size:,}. Was it changed after it was opened?"
        )
        raise MalformedFileError(message)


def _fill(path: Path, info: TensorInfo, stream: BinaryIO, out: NDArray[Any]) -> None:
    """Fill ``out`` with the next bytes of ``stream``; a read may give fewer than asked for."""
    view = memoryview(out.view(np.uint8))  # type: ignore[arg-type]  # numpy arrays are buffers
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]  # raw file
        if not count:
            message = f"{path}: the file ends inside tensor {quote(info.name)}; was it cut short?"
            raise MalformedFileError(message)
        done += count


def _fill_widened(
    path: Path, info: TensorInfo, stream: BinaryIO, out: NDArray[Any], scratch: NDArray[Any]
) -> None:
    raw = scratch[: out.size]
    _fill(path, info, stream, raw)
    widen(raw, info.dtype, out)
