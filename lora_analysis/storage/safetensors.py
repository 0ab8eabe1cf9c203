"""The header of a safetensors file, parsed and checked whole before any tensor is read.

Also the types that every container describes its tensors with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

from lora_analysis.errors import MalformedFileError
from lora_analysis.storage.documents import (
    LOOK_BYTES,
    describe_impostor,
    parse_json_object,
    regular_file_size,
    text_start,
)
from lora_analysis.storage.dtypes import BITS
from lora_analysis.storage.limits import MAX_HEADER_BYTES, MAX_TENSOR_DIMENSIONS, MAX_TENSORS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of any container: its name, its type (``"bfloat16"``) and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorInfo(TensorSpec):
    """A tensor stored as plain numbers, and its byte range in the file.

    ``strides`` are in elements; None if the rows follow each other without gaps, which all
    containers but a torch pickle guarantee.
    """

    start: int
    stop: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """Metadata and tensors of a file, every offset checked against the file's size."""

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
        The file is cut short, or its header is too large, not a JSON object, names a tensor twice,
        or describes tensors that overlap, leave holes, or do not fill the file exactly.
    SourceError
        The path is not a regular file.
    """
    size = regular_file_size(path)
    with path.open("rb") as stream:
        count = header_size(path, stream.read(LOOK_BYTES), size)
        stream.seek(0)
        raw = stream.read(count)
    if len(raw) != count:
        message = f"{path}: the file shrank while its header was read."
        raise MalformedFileError(message)
    return parse_header(path, raw, size)


def header_size(path: Path, start: bytes, size: int) -> int:
    """Return the size of the header in bytes, its length field included, from a file's first bytes.

    Raises
    ------
    MalformedFileError
        The stated length exceeds the limit or the file's size.
    """
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if len(start) >= _LENGTH_BYTES and length <= min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        return _LENGTH_BYTES + length
    if kind := describe_impostor(start) or text_start(start[:LOOK_BYTES]):
        message = f"{path}: this is {kind}"
    elif len(start) < _LENGTH_BYTES:
        message = f"{path}: {size} bytes are too few for a safetensors file; is it cut short?"
    elif length > MAX_HEADER_BYTES:
        message = (
            f"{path}: the header claims {length:,} bytes (limit {MAX_HEADER_BYTES:,}). "
            "Is this a safetensors file?"
        )
    else:
        message = (
            f"{path}: the header claims {length:,} bytes, the file has {size:,} in all. "
            "Is it cut short?"
        )
    raise MalformedFileError(message)


def parse_header(path: Path, start: bytes, size: int) -> Header:
    """Parse the header from the first bytes of a file and check it against the file's size.

    Raises
    ------
    MalformedFileError
        As for `read_header`.
    """
    raw, length = start[_LENGTH_BYTES:], len(start) - _LENGTH_BYTES
    document = parse_json_object(raw, path, what="the safetensors header", constants=False)
    metadata = document.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        message = f"{path}: __metadata__ must map strings to strings."
        raise MalformedFileError(message)
    if len(document) > MAX_TENSORS:
        message = f"{path}: {len(document):,} tensors are too many (limit {MAX_TENSORS:,})."
        raise MalformedFileError(message)
    data_start = _LENGTH_BYTES + length
    tensors = {
        name: _parse_tensor(path, name, entry, data_start) for name, entry in document.items()
    }
    # Tensors must not overlap, leave holes, or end elsewhere than the file.
    ordered = sorted(tensors.values(), key=lambda info: (info.start, info.stop))
    edges = [TensorInfo("the header", "", (), 0, data_start), *ordered]
    for before, after in pairwise(edges):
        if after.start != before.stop:
            problem = "overlaps" if after.start < before.stop else "leaves a hole after"
            gap = abs(after.start - before.stop)
            names = f"{quote(after.name)} {problem} {quote(before.name)}"
            message = f"{path}: tensor {names} by {gap:,} bytes."
            raise MalformedFileError(message)
    end = edges[-1].stop
    if end != size:
        question = "Is it cut short?" if end > size else "What are the trailing bytes?"
        message = f"{path}: its tensors end at byte {end:,}, the file at {size:,}. {question}"
        raise MalformedFileError(message)
    return Header(metadata, tensors)


def _parse_tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Return one entry of the header, its type, shape and byte range checked for consistency."""
    fields = entry if isinstance(entry, dict) else {}
    code, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or code not in BITS:
        reason = f"it has the unknown type {quote(code)}"
    elif not _are_counts(shape, MAX_TENSOR_DIMENSIONS):
        reason = f"it has no valid shape: {quote(shape)}"
    elif not _are_counts(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        reason = f"it has no valid data_offsets: {quote(offsets)}"
    else:
        dtype, bits = BITS[code]
        begin, end = offsets
        if math.prod(shape) * bits == (end - begin) * 8:
            return TensorInfo(name, dtype, tuple(shape), data_start + begin, data_start + end)
        needed = -(-math.prod(shape) * bits // 8)
        reason = f"{dtype} {tuple(shape)} needs {needed:,} bytes, its offsets give {end - begin:,}"
    message = f"{path}: tensor {quote(name)}: {reason}."
    raise MalformedFileError(message)


def _are_counts(value: object, limit: int) -> TypeGuard[list[int]]:
    """Return True if ``value`` is a list of at most ``limit`` integers from 0 to 2^63."""
    return (
        isinstance(value, list)
        and len(value) <= limit
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def quote(value: object) -> str:
    """Quote a value from a file, cut to a length that fits into a message."""
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
