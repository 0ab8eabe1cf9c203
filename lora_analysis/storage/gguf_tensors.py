"""The tensors of a GGUF file by name: plain numbers read as they lie, quantized blocks decoded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import MissingExtraError, UnknownFormatError
from lora_analysis.storage.gguf import GGUFFile, read_gguf
from lora_analysis.storage.headers import Header, TensorInfo
from lora_analysis.storage.limits import BLOCK_ELEMENTS
from lora_analysis.storage.safetensors import tile_slices
from lora_analysis.storage.tensors import TensorFiles

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

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


class GGUFTensors(TensorFiles):
    """The tensors of one GGUF file; shapes slowest axis first, as numpy's.

    ``facts`` are the key-value pairs with their own types. A quantized type goes by
    ``"gguf_q8_0"`` and is decoded by the package ``gguf``, imported when one is read.
    """

    __slots__ = ("_file", "facts")

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.facts: Mapping[str, Any] = file.metadata
        texts = {key: value for key, value in file.metadata.items() if isinstance(value, str)}
        header = Header(texts, {name: _info(file, name) for name in file.tensors})
        super().__init__(file.path, {file.path: header}, dict.fromkeys(header.tensors, file.path))

    @classmethod
    def open(cls, path: Path) -> GGUFTensors:
        """Open a file; raises as :func:`~lora_analysis.storage.gguf.read_gguf` does."""
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
        return self._decoded(name)

    def blocks(
        self, name: str, *, elements: int = BLOCK_ELEMENTS
    ) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
        """Yield one matrix tile by tile."""
        if self._file.tensors[name].kind in _PLAIN:
            yield from super().blocks(name, elements=elements)
            return
        whole = self._decoded(name)
        for rows, columns in tile_slices(self.infos[name].shape, elements):
            yield rows, columns, whole[rows, columns]

    def _decoded(self, name: str) -> NDArray[np.float32]:
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


def _info(file: GGUFFile, name: str) -> TensorInfo:
    tensor = file.tensors[name]
    stop = tensor.start + math.prod(tensor.shape[:-1]) * tensor.row_bytes
    dtype = _PLAIN.get(tensor.kind, f"gguf_{tensor.kind.lower()}")
    return TensorInfo(name, dtype, tensor.shape, tensor.start, stop)
