"""GGUF files written tensor by tensor: the header by the package ``gguf``, then the numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO, Final

from lora_analysis import __version__
from lora_analysis.errors import InputError, MissingExtraError
from lora_analysis.storage.dtypes import raw_dtype
from lora_analysis.storage.headers import shown
from lora_analysis.storage.marks import GGUF_VERSION_KEY
from lora_analysis.storage.tensor_writer import (
    OutputTensor,
    refuse_repeated,
    stored_bytes,
    tensor_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_analysis.storage.atomic import Content

# Our name of a type → the package's.
_TYPES: Final = {
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


def gguf_content(
    tensors: Iterable[OutputTensor], fields: Mapping[str, str | int | float]
) -> Content:
    """Return a GGUF file of ours: its fields carry our mark.

    Raises
    ------
    InputError
        A name occurs twice, or a type is not one of GGUF's plain ones.
    MissingExtraError
        The package ``gguf`` is not installed.
    """
    given = list(tensors)
    marked = {**fields, GGUF_VERSION_KEY: __version__}
    _gguf()
    for tensor in given:
        if tensor.dtype not in _TYPES:
            message = f"Tensor {shown(tensor.name)} is {tensor.dtype}, which GGUF does not have."
            raise InputError(message)
    refuse_repeated(given)
    return lambda stream: write_gguf(stream, given, marked)


def write_gguf(
    stream: BinaryIO, tensors: Iterable[OutputTensor], fields: Mapping[str, str | int | float]
) -> None:
    """Write a GGUF file (version 3, little-endian), tensor by tensor.

    Parameters
    ----------
    stream
        An empty file.
    tensors
        In the order of the file; each producer is called once.
    fields
        Strings, whole numbers (uint32) and floats (float32) by key, ``general.architecture``
        first.

    Raises
    ------
    InputError
        A producer returns another type or shape than announced.
    """
    gguf = _gguf()
    given = list(tensors)
    others = dict(fields)
    writer = gguf.GGUFWriter(None, str(others.pop(_ARCHITECTURE)))
    for key, value in others.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    for tensor in given:
        kind = gguf.GGMLQuantizationType[_TYPES[tensor.dtype]]
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            raw_dtype(tensor.dtype),
            stored_bytes(tensor),
            raw_dtype=kind,
        )
    # The package opens a path of its own; here the file is another's, who puts it in its place.
    writer.fout = [stream]
    writer.state = gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(stream, stream.tell())
    # Its write_tensor_data uses ndarray.tofile, whose errors do not say what the disk refused.
    for tensor in given:
        stream.write(tensor_bytes(tensor))
        writer.write_padding(stream, stored_bytes(tensor))


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        message = "Writing GGUF needs the package gguf: pip install 'lora-analysis[gguf]'."
        raise MissingExtraError(message) from error
    return gguf
