"""The safetensors format, read by hand: header checked whole, tensors read piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

import numpy as np

from lora_analysis.errors import MalformedFileError, UnknownFormatError
from lora_analysis.storage.documents import parse_json_object, regular_file_size
from lora_analysis.storage.dtypes import BITS, READABLE, raw_dtype, result_dtype, widen
from lora_analysis.storage.limits import (
    BLOCK_ELEMENTS,
    MAX_HEADER_BYTES,
    MAX_TENSOR_DIMENSIONS,
    MAX_TENSORS,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: its type (``"bfloat16"``), shape, and the bytes it lies in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says it holds, every offset checked against the file's size."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file, checked.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    Header
        Metadata, and per tensor its type, shape and absolute byte range.

    Raises
    ------
    MalformedFileError
        The file is cut short, or its header is too large, no JSON object, names a tensor twice,
        or describes tensors that overlap, leave holes, or do not fill the file exactly.
    SourceError
        The path is not a regular file.
    """
    size = regular_file_size(path)
    with path.open("rb") as stream:
        prefix = stream.read(_LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        _check_header_length(path, size, prefix, length)
        raw = stream.read(length)
    if len(raw) != length:
        message = f"{path}: the file shrank while its header was read."
        raise MalformedFileError(message)
    document = parse_json_object(raw, path, what="the safetensors header", constants=False)
    metadata = _checked_metadata(path, document.pop("__metadata__", None))
    if len(document) > MAX_TENSORS:
        message = f"{path}: {len(document):,} tensors are too many (limit {MAX_TENSORS:,})."
        raise MalformedFileError(message)
    data_start = _LENGTH_BYTES + length
    tensors = {
        name: _checked_tensor(path, name, entry, data_start) for name, entry in document.items()
    }
    _check_layout(path, list(tensors.values()), data_start, size)
    return Header(metadata, tensors)


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
    _check_readable(path, info)
    out = np.empty(info.elements, dtype=result_dtype(info.dtype))
    with path.open("rb", buffering=0) as stream:
        _check_size(path, info, stream)
        stream.seek(info.start)
        if out.dtype == raw_dtype(info.dtype):
            _fill(path, info, stream, out)
        else:
            scratch = np.empty(min(info.elements, BLOCK_ELEMENTS), raw_dtype(info.dtype))
            for first in range(0, info.elements, BLOCK_ELEMENTS):
                part = out[first : first + BLOCK_ELEMENTS]
                _fill_widened(path, info, stream, part, scratch)
    return out.reshape(info.shape)


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
        Largest size of a tile. A tile is a run of whole rows, or, where one row is larger than
        ``elements``, a piece of a row.

    Yields
    ------
    tuple
        Row slice, column slice, and the tile, whose values last until the next step.

    Raises
    ------
    MalformedFileError
        The file is shorter than its header said.
    UnknownFormatError
        The tensor is stored in a type that cannot be read as plain numbers.
    """
    _check_readable(path, info)
    tiles = list(tile_slices(info.shape, elements))
    largest = max((_span(rows) * _span(columns) for rows, columns in tiles), default=0)
    buffer = np.empty(largest, dtype=np.float32)
    plain = raw_dtype(info.dtype) == buffer.dtype
    scratch = np.empty(0 if plain else largest, dtype=raw_dtype(info.dtype))
    with path.open("rb", buffering=0) as stream:
        _check_size(path, info, stream)
        stream.seek(info.start)  # tiles follow each other in the file: one seek is enough
        for rows, columns in tiles:
            flat = buffer[: _span(rows) * _span(columns)]
            if plain:
                _fill(path, info, stream, flat)
            else:
                _fill_widened(path, info, stream, flat, scratch)
            yield rows, columns, flat.reshape(_span(rows), _span(columns))


def tile_slices(shape: tuple[int, ...], elements: int) -> Iterator[tuple[slice, slice]]:
    """Yield the row and column slices that cut a matrix into runs of at most ``elements``."""
    m, n = shape
    rows = max(1, elements // max(n, 1) + 1)
    columns = max(1, min(n, elements))
    for top in range(0, m, rows):
        for left in range(0, n, columns):
            yield slice(top, min(top + rows, m)), slice(left, min(left + columns, n))


def _span(part: slice) -> int:
    return int(part.stop - part.start)


def _check_header_length(path: Path, size: int, prefix: bytes, length: int) -> None:
    if len(prefix) < _LENGTH_BYTES:
        message = f"{path}: {size} bytes are too few for a safetensors file; is it cut short?"
    elif length > MAX_HEADER_BYTES:
        message = (
            f"{path}: the header claims {length:,} bytes (limit {MAX_HEADER_BYTES:,}). "
            "Is this a safetensors file?"
        )
    elif length > size - _LENGTH_BYTES:
        message = (
            f"{path}: the header claims {length:,} bytes, the file has {size:,} in all. "
            "Is it cut short?"
        )
    else:
        return
    raise MalformedFileError(message)


def _checked_metadata(path: Path, found: object) -> dict[str, str]:
    if found is None:
        return {}
    if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
        return found
    message = f"{path}: __metadata__ must map strings to strings."
    raise MalformedFileError(message)


def _checked_tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Return what the header says of one tensor, its own numbers checked against each other."""
    fields = entry if isinstance(entry, dict) else {}
    code, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or code not in BITS:
        reason = f"it has the unknown type {_short(code)}"
    elif not _are_counts(shape, MAX_TENSOR_DIMENSIONS):
        reason = f"it has no valid shape: {_short(shape)}"
    elif not _are_counts(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        reason = f"it has no valid data_offsets: {_short(offsets)}"
    else:
        dtype, bits = BITS[code]
        begin, end = offsets
        if math.prod(shape) * bits == (end - begin) * 8:
            return TensorInfo(name, dtype, tuple(shape), data_start + begin, data_start + end)
        needed = -(-math.prod(shape) * bits // 8)
        reason = f"{dtype} {tuple(shape)} needs {needed:,} bytes, its offsets give {end - begin:,}"
    message = f"{path}: tensor {_short(name)}: {reason}."
    raise MalformedFileError(message)


def _are_counts(found: object, most: int) -> TypeGuard[list[int]]:
    """Say whether ``found`` is a list of at most ``most`` integers from 0 to 2^63."""
    return (
        isinstance(found, list)
        and len(found) <= most
        and all(type(item) is int and 0 <= item < 2**63 for item in found)
    )


def _short(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _check_layout(path: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    """Refuse tensors that overlap, leave holes, or do not end where the file ends."""
    ordered = sorted(tensors, key=lambda info: (info.start, info.stop))
    edges = [TensorInfo("the header", "", (), 0, data_start), *ordered]
    for before, after in pairwise(edges):
        if after.start != before.stop:
            what = "overlaps" if after.start < before.stop else "leaves a hole after"
            gap = abs(after.start - before.stop)
            names = f"{_short(after.name)} {what} {_short(before.name)}"
            message = f"{path}: tensor {names} by {gap:,} bytes."
            raise MalformedFileError(message)
    end = edges[-1].stop
    if end != size:
        state = "Is it cut short?" if end > size else "What are the trailing bytes?"
        message = f"{path}: its tensors end at byte {end:,}, the file at {size:,}. {state}"
        raise MalformedFileError(message)


def _check_readable(path: Path, info: TensorInfo) -> None:
    if info.dtype not in READABLE:
        message = (
            f"{path}: tensor {_short(info.name)} is stored as {info.dtype}, which cannot be read "
            "as plain numbers. Convert it to bfloat16 or wider."
        )
        raise UnknownFormatError(message)


def _check_size(path: Path, info: TensorInfo, stream: BinaryIO) -> None:
    size = stream.seek(0, 2)
    if size < info.stop:
        message = (
            f"{path}: tensor {_short(info.name)} ends at byte {info.stop:,}, the file now has "
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
            message = f"{path}: the file ends inside tensor {_short(info.name)}; was it cut short?"
            raise MalformedFileError(message)
        done += count


def _fill_widened(
    path: Path, info: TensorInfo, stream: BinaryIO, out: NDArray[Any], scratch: NDArray[Any]
) -> None:
    raw = scratch[: out.size]
    _fill(path, info, stream, raw)
    widen(raw, info.dtype, out)
