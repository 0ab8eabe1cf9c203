"""Files of tensors, written tensor by tensor: a header from names, types and shapes, then numbers.

No file is ever held in memory: each tensor is computed when its turn comes, and dropped once it is
written. The functions that return a `Content` compute nothing; the numbers are asked for when the
content is written.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.storage.dtypes import BITS, READABLE, raw_dtype
from lora_analysis.storage.headers import TensorSpec, shown
from lora_analysis.storage.limits import MAX_HEADER_BYTES
from lora_analysis.storage.marks import safetensors_mark

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.storage.atomic import Content

_CODES: Final = {name: code for code, (name, _) in BITS.items()}
# The order of types in a file of the safetensors library; within a type, names ascend.
_TYPE_ORDER: Final = {
    code: place
    for place, code in enumerate(
        (
            "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
            "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2",
            "F6_E2M3", "F4", "BOOL",
        )
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutputTensor(TensorSpec):
    """A tensor to be written: its name, type and shape, and a function that returns its numbers.

    ``producer`` is called once, when the tensor's turn in the file comes. Types that numpy does
    not have are given as their bits (bfloat16 as uint16, 8-bit floats as uint8).
    """

    producer: Callable[[], NDArray[Any]]


def output_array(name: str, array: NDArray[Any]) -> OutputTensor:
    """Return a tensor whose numbers are at hand."""
    return OutputTensor(name, array.dtype.name, array.shape, lambda: array)


def output_group(
    shapes: Mapping[str, tuple[int, ...]],
    produce: Callable[[], Mapping[str, NDArray[Any]]],
    *,
    dtype: str = "float32",
) -> list[OutputTensor]:
    """Return tensors that are computed together, such as the two factors of one module.

    ``produce`` is called for the first of them that is written; the others are kept until their
    turn comes, which in a file sorted by name is at once.

    Parameters
    ----------
    shapes
        Shape by name.
    produce
        Returns all of them by name.
    dtype
        Type of all of them.
    """
    waiting: dict[str, NDArray[Any]] = {}

    def take(name: str) -> NDArray[Any]:
        if name not in waiting:
            waiting.update(produce())
        return waiting.pop(name)

    return [OutputTensor(name, dtype, shape, partial(take, name)) for name, shape in shapes.items()]


def safetensors_content(
    tensors: Iterable[OutputTensor],
    metadata: Mapping[str, str],
    *,
    config: Mapping[str, Any] | None = None,
) -> Content:
    """Return a safetensors file of ours: its metadata carry our mark.

    Parameters
    ----------
    tensors
        In any order.
    metadata
        What else the file states.
    config
        The configuration written with the weights; its digest ties the two.

    Raises
    ------
    InputError
        The header cannot be written: a name occurs twice, a type is unknown, or it is too long.
    """
    ordered = _ordered(tensors)
    marked = {**metadata, **safetensors_mark(config)}
    _header(ordered, marked)
    return lambda stream: write_safetensors(stream, ordered, marked)


def write_safetensors(
    stream: BinaryIO, tensors: Iterable[OutputTensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, tensor by tensor; the same bytes for the same content.

    The layout is that of the safetensors library: wider types first, then names ascending, so that
    every tensor is aligned. Keys of the metadata are sorted.

    Parameters
    ----------
    stream
        Where to; written from its current position, never read or moved in.
    tensors
        In any order; each producer is called once, in the order of the file.
    metadata
        Strings by key.

    Raises
    ------
    InputError
        The header cannot be written, or a producer returns another type or shape than announced.
    """
    ordered = _ordered(tensors)
    stream.write(_header(ordered, metadata))
    for tensor in ordered:
        stream.write(tensor_bytes(tensor))


def tensor_bytes(tensor: OutputTensor) -> memoryview:
    """Return the numbers of a tensor as bytes, checked against what was announced.

    Raises
    ------
    InputError
        The producer returns another type or shape.
    """
    array = tensor.producer()
    raw = raw_dtype(tensor.dtype)
    if array.shape != tensor.shape or array.dtype.newbyteorder("<") != raw.newbyteorder("<"):
        message = (
            f"Tensor {shown(tensor.name)} was announced as {tensor.dtype} {tensor.shape} and is "
            f"{array.dtype} {array.shape}. Did its source change while it was written?"
        )
        raise InputError(message)
    flat = np.ascontiguousarray(array, raw).reshape(-1).view(np.uint8)
    return memoryview(flat)  # type: ignore[arg-type]  # numpy arrays are buffers


def stored_bytes(tensor: TensorSpec) -> int:
    """Return how many bytes the numbers of a tensor take."""
    return tensor.elements * raw_dtype(tensor.dtype).itemsize


def _ordered(tensors: Iterable[OutputTensor]) -> list[OutputTensor]:
    """Return tensors in the order of a safetensors file; refuse what has no place in one."""
    given = list(tensors)
    for tensor in given:
        if tensor.dtype not in READABLE:
            message = f"Tensor {shown(tensor.name)} is {tensor.dtype}, which is not written."
            raise InputError(message)
    refuse_repeated(given)
    return sorted(given, key=lambda one: (_TYPE_ORDER[_CODES[one.dtype]], one.name))


def refuse_repeated(tensors: Sequence[TensorSpec]) -> None:
    """Raise InputError if two tensors have one name."""
    name, count = Counter(one.name for one in tensors).most_common(1)[0] if tensors else ("", 0)
    if count > 1:
        message = f"Two tensors would both be stored as {shown(name)}. The file is not written."
        raise InputError(message)


def _header(ordered: Sequence[OutputTensor], metadata: Mapping[str, str]) -> bytes:
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for tensor, (start, stop) in zip(ordered, _offsets(ordered), strict=True):
        document[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
    try:
        text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        message = f"A tensor's name or the metadata hold {error.object[error.start]!r}, no text."
        raise InputError(message) from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        message = f"The file's header would take {len(text):,} bytes (limit {MAX_HEADER_BYTES:,})."
        raise InputError(message)
    return len(text).to_bytes(8, "little") + text


def _offsets(ordered: Sequence[OutputTensor]) -> Iterator[tuple[int, int]]:
    start = 0
    for tensor in ordered:
        stop = start + stored_bytes(tensor)
        yield start, stop
        start = stop
