"""Archives of numpy arrays (``.npz``), uncompressed, as MLX saved its adapters at first."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import MalformedFileError
from lora_analysis.storage.dtypes import BITS
from lora_analysis.storage.headers import Header, TensorInfo, shown
from lora_analysis.storage.limits import MAX_TENSOR_DIMENSIONS
from lora_analysis.storage.zips import ZipMember, zip_members

if TYPE_CHECKING:
    from pathlib import Path

_SUFFIX: Final = ".npy"
# Longer than the header of any plain array; numpy has a limit of its own on what it evaluates.
_HEADER_BYTES: Final = 4096


def read_npz_header(path: Path) -> Header:
    """Return the arrays of an archive by name; none is read.

    Raises
    ------
    MalformedFileError
        A member is compressed, no array of plain little-endian numbers, or of another size than
        its header says.
    """
    tensors = {}
    for name, member in zip_members(path).items():
        if name.endswith(_SUFFIX):
            own = name.removesuffix(_SUFFIX)
            tensors[own] = _array_info(path, own, member)
    return Header({}, tensors)


def _array_info(path: Path, name: str, member: ZipMember) -> TensorInfo:
    with path.open("rb") as stream:
        stream.seek(member.start)
        head = io.BytesIO(stream.read(min(member.stop - member.start, _HEADER_BYTES)))
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(head)
    except Exception as error:  # numpy has it tokenized and evaluated, which fails in many ways
        message = f"{path}: array {shown(name)} is damaged: {str(error)[:120]}."
        raise MalformedFileError(message) from error
    start = member.start + head.tell()
    known = dtype.name in {own for own, _ in BITS.values()}
    plain = known and dtype.byteorder in "<=|" and len(shape) <= MAX_TENSOR_DIMENSIONS
    if not plain or math.prod(shape) * dtype.itemsize != member.stop - start:
        message = (
            f"{path}: array {shown(name)} of {shown(dtype.str)} {shape} is not plain little-endian "
            f"numbers that fill its {member.stop - start:,} bytes."
        )
        raise MalformedFileError(message)
    strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    strided = by_columns and sum(n > 1 for n in shape) > 1
    return TensorInfo(name, dtype.name, shape, start, member.stop, strides if strided else None)
