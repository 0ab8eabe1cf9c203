"""GGUF files: the header, parsed and checked whole before any tensor is read, and the tensors.

Little-endian, versions 2 and 3: magic, version, counts of tensors and of key-value pairs, the
pairs, the tensors (name, sizes from the fastest axis, type, offset), and their data, aligned.
Quantized types store a row in blocks with a fixed number of elements and bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from lora_analysis.errors import MalformedFileError, MissingExtraError, UnknownFormatError
from lora_analysis.storage.documents import regular_file_size
from lora_analysis.storage.limits import (
    BLOCK_ELEMENTS,
    MAX_GGUF_STRINGS,
    MAX_TENSOR_DIMENSIONS,
    MAX_TENSORS,
)
from lora_analysis.storage.safetensors import Header, TensorInfo, quote
from lora_analysis.storage.tensor_reader import tile_slices
from lora_analysis.storage.tensors import TensorFiles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

_MAGIC: Final = b"GGUF"
_ALIGNMENT: Final = "general.alignment"
_MAX_PAIRS: Final = 10_000
_Entry = tuple[str, tuple[int, ...], int, int]  # name, shape, type, offset
_MAX_TEXT: Final = 2**24
# Longer arrays belong to vocabularies, which are not needed.
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

# GGUF's name of a type → ours, for types whose numbers are stored plainly.
_PLAIN: Final = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: its type, its shape (slowest axis first), and the byte offset of its rows."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """The header of a GGUF file, every offset checked against the file's size.

    ``metadata`` contains numbers, strings, and short arrays of numbers.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the bytes of rows ``start`` to ``stop``, counted over all axes but the last.

        Raises
        ------
        MalformedFileError
            The file has become shorter.
        """
        tensor = self.tensors[name]
        count = stop - start
        with self.path.open("rb") as stream:
            stream.seek(tensor.start + start * tensor.row_bytes)
            raw = stream.read(count * tensor.row_bytes)
        if len(raw) != count * tensor.row_bytes:
            message = f"{self.path}: the file ends inside tensor {quote(name)}; was it cut short?"
            raise MalformedFileError(message)
        return np.frombuffer(raw, np.uint8).reshape(count, tensor.row_bytes)


def is_gguf(path: Path) -> bool:
    """Return True if a file begins as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == _MAGIC


def read_gguf(path: Path) -> GGUFFile:
    """Read and check the header of a GGUF file.

    Raises
    ------
    MalformedFileError
        The file is cut short, or its header claims more than the limits or the file's size.
    UnknownFormatError
        It is big-endian, or has another version.
    SourceError
        The path is not a regular file.
    """
    size = regular_file_size(path)
    with path.open("rb") as stream:
        reader = _Reader(path, stream, size)
        if stream.read(4) != _MAGIC:
            message = f"{path}: not a GGUF file: it does not begin with 'GGUF'."
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
        entries = [reader.tensor() for _ in range(tensors)]
        alignment = metadata.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            message = f"{path}: {_ALIGNMENT} {quote(alignment)} is not a number of bytes."
            raise MalformedFileError(message)
        data = -(-stream.tell() // alignment) * alignment
    checked = {entry[0]: _parse_tensor(path, size, data, entry) for entry in entries}
    if len(checked) != len(entries):
        message = f"{path}: two tensors have the same name."
        raise MalformedFileError(message)
    return GGUFFile(path, metadata, checked)


def _parse_tensor(path: Path, size: int, data: int, entry: _Entry) -> GGUFTensor:
    """Return one tensor, its byte range checked against the file's size."""
    name, shape, code, offset = entry
    if code not in TYPES:
        message = f"{path}: tensor {quote(name)} has the unknown type {code}."
        raise UnknownFormatError(message)
    kind, elements, width = TYPES[code]
    columns = shape[-1] if shape else 1
    rows = int(np.prod(shape[:-1], dtype=object)) if shape else 1
    start = data + offset
    if columns % elements or start + rows * (columns // elements) * width > size:
        message = (
            f"{path}: tensor {quote(name)}: {kind} {shape} at byte {start:,} does not fit into "
            f"blocks of {elements} and the file's {size:,} bytes. Is it cut short?"
        )
        raise MalformedFileError(message)
    return GGUFTensor(name, kind, shape, start, columns // elements * width)


class _Reader:
    """Reader of the header's values; each is checked against the bytes that are left."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path = path
        self._stream = stream
        self._size = size
        self._strings = 0

    def scalar(self, layout: str) -> Any:
        """Return one number."""
        return struct.unpack(layout, self._read(struct.calcsize(layout)))[0]

    def count(self, limit: int) -> int:
        """Return the number of entries that follow."""
        count = int(self.scalar("<Q"))
        if count > limit:
            message = f"{self._path}: the header claims {count:,} entries (limit {limit:,})."
            raise MalformedFileError(message)
        return count

    def text(self) -> str:
        """Return a string."""
        raw = self._read(self.count(_MAX_TEXT))
        return raw.decode("utf-8", errors="replace")

    def value(self, code: int) -> Any:
        """Return a value of a type; None for long arrays and arrays of strings."""
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
            self._skip(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            self._strings += count
            if self._strings > MAX_GGUF_STRINGS:
                message = (
                    f"{self._path}: the header claims {self._strings:,} strings in arrays (limit "
                    f"{MAX_GGUF_STRINGS:,})."
                )
                raise MalformedFileError(message)
            for _ in range(count):
                self._skip(self.count(_MAX_TEXT))
        else:
            message = f"{self._path}: an array holds values of the unknown type {kind}."
            raise MalformedFileError(message)
        return None

    def tensor(self) -> _Entry:
        """Return name, shape (slowest axis first), type and offset of a tensor."""
        name, axes = self.text(), self.scalar("<I")
        if axes > MAX_TENSOR_DIMENSIONS:
            message = f"{self._path}: tensor {quote(name)} claims {axes} dimensions."
            raise MalformedFileError(message)
        sizes = [self.scalar("<Q") for _ in range(axes)]
        return name, tuple(reversed(sizes)), self.scalar("<I"), self.scalar("<Q")

    def _read(self, count: int) -> bytes:
        raw = self._stream.read(count) if count <= self._size else b""
        if len(raw) != count:
            message = f"{self._path}: the file ends inside its header; is it cut short?"
            raise MalformedFileError(message)
        return raw

    def _skip(self, count: int) -> None:
        self._stream.seek(count, 1)
        if self._stream.tell() > self._size:
            message = f"{self._path}: the file ends inside its header; is it cut short?"
            raise MalformedFileError(message)


class GGUFTensors(TensorFiles):
    """The tensors of one GGUF file; shapes slowest axis first, as numpy's.

    ``facts`` are the key-value pairs with their stored types. A quantized type is named
    ``"gguf_q8_0"`` and decoded by the package ``gguf``, imported when one is read.
    """

    __slots__ = ("_file", "facts")

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.facts: Mapping[str, Any] = file.metadata
        texts = {key: value for key, value in file.metadata.items() if isinstance(value, str)}
        infos = {}
        for name, tensor in file.tensors.items():
            stop = tensor.start + math.prod(tensor.shape[:-1]) * tensor.row_bytes
            dtype = _PLAIN.get(tensor.kind, f"gguf_{tensor.kind.lower()}")
            infos[name] = TensorInfo(name, dtype, tensor.shape, tensor.start, stop)
        header = Header(texts, infos)
        super().__init__(file.path, {file.path: header}, dict.fromkeys(header.tensors, file.path))

    @classmethod
    def open(cls, path: Path) -> GGUFTensors:
        """Open a file; raises as `read_gguf` does."""
        return cls(read_gguf(path))

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor, read now.

        Raises
        ------
        MissingExtraError
            It is quantized and the package ``gguf`` is not installed.
        UnknownFormatError
            The package does not decode its type.
        """
        if self._file.tensors[name].kind in _PLAIN:
            return super().read(name)
        return self._decode(name)

    def blocks(
        self, name: str, *, elements: int = BLOCK_ELEMENTS
    ) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
        """Yield one matrix tile by tile."""
        if self._file.tensors[name].kind in _PLAIN:
            yield from super().blocks(name, elements=elements)
            return
        whole = self._decode(name)
        for rows, columns in tile_slices(self.infos[name].shape, elements):
            yield rows, columns, whole[rows, columns]

    def _decode(self, name: str) -> NDArray[np.float32]:
        info = self._file.tensors[name]
        try:
            import gguf
        except ImportError as error:
            message = (
                f"{self.path}: '{name}' is stored as {info.kind}; decoding it needs the package "
                "gguf: pip install 'lora-analysis[gguf]'."
            )
            raise MissingExtraError(message) from error
        rows = self._file.rows(name, 0, math.prod(info.shape[:-1]))
        try:
            values = gguf.dequantize(rows, gguf.GGMLQuantizationType[info.kind])
        except (KeyError, NotImplementedError) as error:
            message = f"{self.path}: '{name}' is stored as {info.kind}, which is not decoded."
            raise UnknownFormatError(message) from error
        return np.asarray(values, np.float32).reshape(info.shape)
