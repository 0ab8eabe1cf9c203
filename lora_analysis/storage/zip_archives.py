"""Zip archives with uncompressed members: byte ranges of the members, and numpy's ``.npz``.

``.npz`` is what MLX saved its adapters as at first; torch files are zip archives too.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import MalformedFileError
from lora_analysis.storage.documents import regular_file_size
from lora_analysis.storage.dtypes import BITS
from lora_analysis.storage.limits import MAX_TENSOR_DIMENSIONS, MAX_TENSORS
from lora_analysis.storage.safetensors import Header, TensorInfo, quote

if TYPE_CHECKING:
    from pathlib import Path

_LOCAL_HEADER_BYTES = 30
_STORED = 0
_ARRAY_SUFFIX: Final = ".npy"
# Longer than the header of any plain array; numpy itself limits what it evaluates.
_ARRAY_HEADER_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class ZipMember:
    """The byte range of one member in its archive."""

    name: str
    start: int
    stop: int


def zip_members(path: Path) -> dict[str, ZipMember]:
    """Return the members of an archive, every range checked against the file's size.

    Raises
    ------
    MalformedFileError
        It is damaged, or a member is compressed or encrypted: a few bytes could then expand to
        any number of them.
    SourceError
        It is not a regular file.
    """
    import zipfile  # most adapters are not archives

    size = regular_file_size(path)
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            if len(entries) > 2 * MAX_TENSORS:
                message = f"{path}: {len(entries):,} members are too many for an archive."
                raise MalformedFileError(message)
            members = {}
            for entry in entries:
                name = entry.filename
                if entry.compress_type != _STORED or entry.flag_bits & 1:
                    message = (
                        f"{path}: member '{name}' is compressed or encrypted. Only archives that "
                        "store their members as they are can be read; save it again uncompressed."
                    )
                    raise MalformedFileError(message)
                stream.seek(entry.header_offset)
                local = stream.read(_LOCAL_HEADER_BYTES)
                lengths = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
                start = entry.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)
                if local[:4] != b"PK\x03\x04" or start + entry.file_size > size:
                    message = f"{path}: member '{name}' leads out of the archive. Is it cut short?"
                    raise MalformedFileError(message)
                members[name] = ZipMember(name, start, start + entry.file_size)
            return members
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        if isinstance(error, MalformedFileError):
            raise
        message = f"{path}: not a readable zip archive: {error}. Is it cut short?"
        raise MalformedFileError(message) from error


def read_npz_header(path: Path) -> Header:
    """Return the arrays of an ``.npz`` archive by name; none is read.

    Raises
    ------
    MalformedFileError
        A member is compressed, is not an array of plain little-endian numbers, or has another
        size than its header states.
    """
    tensors = {}
    for filename, member in zip_members(path).items():
        if not filename.endswith(_ARRAY_SUFFIX):
            continue
        name = filename.removesuffix(_ARRAY_SUFFIX)
        with path.open("rb") as stream:
            stream.seek(member.start)
            head = io.BytesIO(stream.read(min(member.stop - member.start, _ARRAY_HEADER_BYTES)))
        try:
            version = np.lib.format.read_magic(head)
            read = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(head)
        except Exception as error:  # numpy has it tokenized and evaluated, which fails in many ways
            message = f"{path}: array {quote(name)} is damaged: {str(error)[:120]}."
            raise MalformedFileError(message) from error
        start = member.start + head.tell()
        is_number = dtype.name in {number for number, _ in BITS.values()}
        plain = is_number and dtype.byteorder in "<=|" and len(shape) <= MAX_TENSOR_DIMENSIONS
        if not plain or math.prod(shape) * dtype.itemsize != member.stop - start:
            message = (
                f"{path}: array {quote(name)} of {quote(dtype.str)} {shape} is not plain "
                f"little-endian numbers that fill its {member.stop - start:,} bytes."
            )
            raise MalformedFileError(message)
        strides = None
        if by_columns and sum(n > 1 for n in shape) > 1:
            strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
        tensors[name] = TensorInfo(name, dtype.name, shape, start, member.stop, strides)
    return Header({}, tensors)
