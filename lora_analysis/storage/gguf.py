"""The header of a GGUF file: parsed by hand and checked whole before anything is read.

Little-endian, versions 2 and 3: magic, version, counts of tensors and of key-value pairs, the
pairs, the tensors (name, sizes from the fastest axis, type, offset), and their data, aligned.
Quantized types lay a row out in blocks of some elements and some bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from lora_analysis.errors import MalformedFileError, UnknownFormatError
from lora_analysis.storage.documents import regular_file_size
from lora_analysis.storage.headers import shown
from lora_analysis.storage.limits import MAX_GGUF_STRINGS, MAX_TENSOR_DIMENSIONS, MAX_TENSORS

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_MAGIC: Final = b"GGUF"
_ALIGNMENT: Final = "general.alignment"
_MAX_PAIRS: Final = 10_000
_Found = tuple[str, tuple[int, ...], int, int]  # name, shape, type, offset
_MAX_TEXT: Final = 2**24
# Longer arrays are a vocabulary's, which nothing here needs.
_MAX_ARRAY: Final = 1024
# Code of a value's type → how it is unpacked; 8 is a string, 9 an array.
_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING: Final = 8
_ARRAY: Final = 9

TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}  # fmt: skip
"""Code in the file → name, elements of a block, bytes of a block."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: its type, its shape slowest axis first, and where its rows begin."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """What a GGUF file says it holds, every offset checked against the file's size.

    ``metadata`` holds numbers and strings; of arrays, those of numbers that are short.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the bytes of rows ``start`` to ``stop``, all axes but the last made one.

        Raises
        ------
        MalformedFileError
            The file is shorter than it was.
        """
        tensor = self.tensors[name]
        count = stop - start
        with self.path.open("rb") as stream:
            stream.seek(tensor.start + start * tensor.row_bytes)
            raw = stream.read(count * tensor.row_bytes)
        if len(raw) != count * tensor.row_bytes:
            message = f"{self.path}: the file ends inside tensor {shown(name)}; was it cut short?"
            raise MalformedFileError(message)
        return np.frombuffer(raw, np.uint8).reshape(count, tensor.row_bytes)


def is_gguf(path: Path) -> bool:
    """Say whether a file begins as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == _MAGIC


def read_gguf(path: Path) -> GGUFFile:
    """Return the header of a GGUF file, checked.

    Raises
    ------
    MalformedFileError
        The file is cut short, or its header claims too much or more than the file holds.
    UnknownFormatError
        It is big-endian, or of another version.
    SourceError
        The path is not a regular file.
    """
    size = regular_file_size(path)
    with path.open("rb") as stream:
        reader = _Reader(path, stream, size)
        if stream.read(4) != _MAGIC:
            message = f"{path}: no GGUF file: it does not begin with 'GGUF'."
            raise MalformedFileError(message)
        version = reader.scalar("<I")
        if version not in (2, 3):
            message = f"{path}: GGUF version {version} is not read; 2 and 3 in little-endian are."
            raise UnknownFormatError(message)
        tensors, pairs = reader.count(MAX_TENSORS), reader.count(_MAX_PAIRS)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = reader.text()
            value = reader.value(reader.scalar("<I"))
            if value is not None:
                metadata[key] = value
        found = [reader.tensor() for _ in range(tensors)]
        alignment = metadata.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            message = f"{path}: {_ALIGNMENT} {shown(alignment)} is no number of bytes."
            raise MalformedFileError(message)
        data = -(-stream.tell() // alignment) * alignment
    placed = {one[0]: _placed(path, size, data, one) for one in found}
    if len(placed) != len(found):
        message = f"{path}: two tensors have the same name."
        raise MalformedFileError(message)
    return GGUFFile(path, metadata, placed)


def _placed(path: Path, size: int, data: int, found: _Found) -> GGUFTensor:
    """Return one tensor, its bytes checked against the file's size."""
    name, shape, code, offset = found
    if code not in TYPES:
        message = f"{path}: tensor {shown(name)} has the unknown type {code}."
        raise UnknownFormatError(message)
    kind, elements, width = TYPES[code]
    columns = shape[-1] if shape else 1
    rows = int(np.prod(shape[:-1], dtype=object)) if shape else 1
    start = data + offset
    if columns % elements or start + rows * (columns // elements) * width > size:
        message = (
            f"{path}: tensor {shown(name)}: {kind} {shape} at byte {start:,} does not fit into "
            f"blocks of {elements} and the file's {size:,} bytes. Is it cut short?"
        )
        raise MalformedFileError(message)
    return GGUFTensor(name, kind, shape, start, columns // elements * width)


class _Reader:
    """Reads the header's values; each is checked against the bytes that are left."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path = path
        self._stream = stream
        self._size = size
        self._strings = 0

    def scalar(self, layout: str) -> Any:
        """Return one number."""
        return struct.unpack(layout, self._read(struct.calcsize(layout)))[0]

    def count(self, most: int) -> int:
        """Return how many things follow."""
        found = int(self.scalar("<Q"))
        if found > most:
            message = f"{self._path}: the header claims {found:,} entries (limit {most:,})."
            raise MalformedFileError(message)
        return found

    def text(self) -> str:
        """Return a string."""
        raw = self._read(self.count(_MAX_TEXT))
        return raw.decode("utf-8", errors="replace")

    def value(self, code: int) -> Any:
        """Return a value of a type; None for arrays of strings and for long ones."""
        if code in _SCALARS:
            return self.scalar(_SCALARS[code])
        if code == _STRING:
            return self.text()
        if code == _ARRAY:
            return self._array()
        message = f"{self._path}: a value has the unknown type {code}."
        raise MalformedFileError(message)

    def _array(self) -> list[Any] | None:
        kind, count = self.scalar("<I"), self.count(self._size)
        if kind in _SCALARS and count <= _MAX_ARRAY:
            return [self.scalar(_SCALARS[kind]) for _ in range(count)]
        if kind in _SCALARS:
            self._forward(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            self._strings += count
            if self._strings > MAX_GGUF_STRINGS:
                message = (
                    f"{self._path}: the header claims {self._strings:,} strings in arrays (limit "
                    f"{MAX_GGUF_STRINGS:,})."
                )
                raise MalformedFileError(message)
            for _ in range(count):
                self._forward(self.count(_MAX_TEXT))
        else:
            message = f"{self._path}: an array holds values of the unknown type {kind}."
            raise MalformedFileError(message)
        return None

    def tensor(self) -> _Found:
        """Return name, shape slowest axis first, type and offset of a tensor."""
        name, axes = self.text(), self.scalar("<I")
        if axes > MAX_TENSOR_DIMENSIONS:
            message = f"{self._path}: tensor {shown(name)} claims {axes} dimensions."
            raise MalformedFileError(message)
        sizes = [self.scalar("<Q") for _ in range(axes)]
        return name, tuple(reversed(sizes)), self.scalar("<I"), self.scalar("<Q")

    def _read(self, count: int) -> bytes:
        raw = self._stream.read(count) if count <= self._size else b""
        if len(raw) != count:
            message = f"{self._path}: the file ends inside its header; is it cut short?"
            raise MalformedFileError(message)
        return raw

    def _forward(self, count: int) -> None:
        self._stream.seek(count, 1)
        if self._stream.tell() > self._size:
            message = f"{self._path}: the file ends inside its header; is it cut short?"
            raise MalformedFileError(message)
