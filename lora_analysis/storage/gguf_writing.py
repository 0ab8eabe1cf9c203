"""A GGUF file of float32 tensors: version 3, little-endian, aligned to 32 bytes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_ALIGNMENT: Final = 32
_STRING: Final = 8
_FLOAT32: Final = 6
_UINT32: Final = 4
_TENSOR_F32: Final = 0


def gguf_bytes(
    facts: Mapping[str, str | int | float], tensors: Mapping[str, NDArray[np.float32]]
) -> bytes:
    """Return the file: strings, whole numbers and float32 as key-value pairs, then the tensors."""
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(facts))]
    for key, value in facts.items():
        header.append(_text(key))
        if isinstance(value, str):
            header.append(struct.pack("<I", _STRING) + _text(value))
        elif isinstance(value, int):
            header.append(struct.pack("<II", _UINT32, value))
        else:
            header.append(struct.pack("<If", _FLOAT32, value))
    data, offset = [], 0
    for name, tensor in tensors.items():
        sizes = tuple(reversed(tensor.shape))
        header.append(_text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        header.append(struct.pack("<IQ", _TENSOR_F32, offset))
        raw = _padded(np.ascontiguousarray(tensor, "<f4").tobytes())
        data.append(raw)
        offset += len(raw)
    return _padded(b"".join(header)) + b"".join(data)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % _ALIGNMENT)
