"""Streaming writers of safetensors and GGUF: a header from names, types and shapes, then tensors.

Each tensor is computed when its turn comes and dropped once it is written, so that no file is ever
in memory as a whole. The functions that return a `Content` compute nothing; writing the content
computes the tensors.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from lora_analysis import __version__
from lora_analysis.errors import InputError, MissingExtraError
from lora_analysis.storage.dtypes import BITS, READABLE, raw_dtype
from lora_analysis.storage.limits import MAX_HEADER_BYTES
from lora_analysis.storage.records import GGUF_VERSION_KEY, safetensors_mark
from lora_analysis.storage.safetensors import TensorSpec, quote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.storage.atomic import Content

_CODES: Final = {name: code for code, (name, _) in BITS.items()}
# The order of types in a file of the safetensors library; within a type, names ascend.
_TYPE_ORDER: Final = {
    code: rank
    for rank, code in enumerate(
        (
            "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
            "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2",
            "F6_E2M3", "F4", "BOOL",
        )
    )
}  # fmt: skip
# Our name of a type → that of the package ``gguf``.
_GGUF_TYPES: Final = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
}
_ARCHITECTURE: Final = "general.architecture"


@dataclass(frozen=True, slots=True)
class OutputTensor(TensorSpec):
    """A tensor to be written: its name, type and shape, and a function that returns its numbers.

    ``producer`` is called once, when the tensor's turn in the file comes. Types that numpy lacks
    are given as their bits (bfloat16 as uint16, 8-bit floats as uint8).
    """

    producer: Callable[[], NDArray[Any]]


def output_array(name: str, array: NDArray[Any]) -> OutputTensor:
    """Return an `OutputTensor` for an array in memory."""
    return OutputTensor(name, array.dtype.name, array.shape, lambda: array)


def output_group(
    shapes: Mapping[str, tuple[int, ...]],
    produce: Callable[[], Mapping[str, NDArray[Any]]],
    *,
    dtype: str = "float32",
) -> list[OutputTensor]:
    """Return tensors that are computed together, such as the two factors of one module.

    ``produce`` is called for the first of them that is written; the others are cached until they
    are written, which is next in a file sorted by name.

    Parameters
    ----------
    shapes
        Shape by name.
    produce
        Function that returns all of them by name.
    dtype
        Type of all of them.
    """
    cached: dict[str, NDArray[Any]] = {}

    def pop_array(name: str) -> NDArray[Any]:
        if name not in cached:
            cached.update(produce())
        return cached.pop(name)

    return [
        OutputTensor(name, dtype, shape, partial(pop_array, name)) for name, shape in shapes.items()
    ]


def safetensors_content(
    tensors: Iterable[OutputTensor],
    metadata: Mapping[str, str],
    *,
    config: Mapping[str, Any] | None = None,
) -> Content:
    """Return the content of a safetensors file whose metadata contain our mark.

    Parameters
    ----------
    tensors
        Tensors in any order.
    metadata
        Further metadata of the file.
    config
        The configuration that is written with the weights; the mark states its digest.

    Raises
    ------
    InputError
        The header cannot be written: a name occurs twice, a type is unknown, or it is too long.
    """
    ordered = _sort_tensors(tensors)
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
        Output stream; written from its current position, never read or repositioned.
    tensors
        Tensors in any order; each producer is called once, in the order of the file.
    metadata
        Strings by key.

    Raises
    ------
    InputError
        The header cannot be written, or a producer returns another type or shape than announced.
    """
    ordered = _sort_tensors(tensors)
    stream.write(_header(ordered, metadata))
    for tensor in ordered:
        stream.write(_tensor_bytes(tensor))


def gguf_content(
    tensors: Iterable[OutputTensor], fields: Mapping[str, str | int | float]
) -> Content:
    """Return the content of a GGUF file whose fields contain our mark.

    Raises
    ------
    InputError
        A name occurs twice, or a type is not one of GGUF's plain ones.
    MissingExtraError
        The package ``gguf`` is not installed.
    """
    tensors = list(tensors)
    marked = {**fields, GGUF_VERSION_KEY: __version__}
    _gguf_package()
    for tensor in tensors:
        if tensor.dtype not in _GGUF_TYPES:
            message = f"Tensor {quote(tensor.name)} is {tensor.dtype}, which GGUF does not have."
            raise InputError(message)
    _refuse_repeated(tensors)
    return lambda stream: write_gguf(stream, tensors, marked)


def write_gguf(
    stream: BinaryIO, tensors: Iterable[OutputTensor], fields: Mapping[str, str | int | float]
) -> None:
    """Write a GGUF file (version 3, little-endian), tensor by tensor.

    Parameters
    ----------
    stream
        An empty file.
    tensors
        Tensors in the order of the file; each producer is called once.
    fields
        Strings, whole numbers (uint32) and floats (float32) by key, ``general.architecture``
        first.

    Raises
    ------
    InputError
        A producer returns another type or shape than announced.
    """
    gguf = _gguf_package()
    tensors = list(tensors)
    writer = gguf.GGUFWriter(None, str(fields[_ARCHITECTURE]))
    for key, value in fields.items():
        if key == _ARCHITECTURE:
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[_GGUF_TYPES[tensor.dtype]]
        size = _stored_bytes(tensor)
        writer.add_tensor_info(
            tensor.name, tensor.shape, raw_dtype(tensor.dtype), size, raw_dtype=kind
        )
    # The package would open the path itself; `write_atomic` has opened a temporary file already.
    writer.fout = [stream]
    writer.state = gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(stream, stream.tell())
    # Not by write_tensor_data: it calls ndarray.tofile, whose errors lack the system's reason.
    for tensor in tensors:
        stream.write(_tensor_bytes(tensor))
        writer.write_padding(stream, _stored_bytes(tensor))


def _tensor_bytes(tensor: OutputTensor) -> memoryview:
    """Return the numbers of a tensor as bytes; they must have the announced type and shape.

    Raises
    ------
    InputError
        The producer returns another type or shape.
    """
    array = tensor.producer()
    raw = raw_dtype(tensor.dtype)
    if array.shape != tensor.shape or array.dtype.newbyteorder("<") != raw.newbyteorder("<"):
        message = (
            f"Tensor {quote(tensor.name)} was announced as {tensor.dtype} {tensor.shape} and is "
            f"{array.dtype} {array.shape}. Did its source change while it was written?"
        )
        raise InputError(message)
    flat = np.ascontiguousarray(array, raw).reshape(-1).view(np.uint8)
    return memoryview(flat)  # type: ignore[arg-type]  # numpy arrays are buffers


def _stored_bytes(tensor: TensorSpec) -> int:
    """Return the size of a tensor's numbers in bytes."""
    return tensor.elements * raw_dtype(tensor.dtype).itemsize


def _sort_tensors(tensors: Iterable[OutputTensor]) -> list[OutputTensor]:
    """Return tensors in the order of a safetensors file; refuse types that are not written."""
    tensors = list(tensors)
    for tensor in tensors:
        if tensor.dtype not in READABLE:
            message = f"Tensor {quote(tensor.name)} is {tensor.dtype}, which is not written."
            raise InputError(message)
    _refuse_repeated(tensors)
    return sorted(tensors, key=lambda tensor: (_TYPE_ORDER[_CODES[tensor.dtype]], tensor.name))


def _refuse_repeated(tensors: Sequence[TensorSpec]) -> None:
    """Raise InputError if two tensors have one name."""
    counts = Counter(tensor.name for tensor in tensors)
    name, count = counts.most_common(1)[0] if tensors else ("", 0)
    if count > 1:
        message = f"Two tensors would both be stored as {quote(name)}. The file is not written."
        raise InputError(message)


def _header(ordered: Sequence[OutputTensor], metadata: Mapping[str, str]) -> bytes:
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for tensor in ordered:
        stop = start + _stored_bytes(tensor)
        document[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
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


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        message = "Writing GGUF needs the package gguf: pip install 'lora-analysis[gguf]'."
        raise MissingExtraError(message) from error
    return gguf
