"""Base weights in files: safetensors and torch files, plain or quantized."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.bases.quantized import Quantized, quantized_weights, tiles
from lora_analysis.bases.tensor_names import matrix_shape, quantized_error
from lora_analysis.bases.weight import TensorSource
from lora_analysis.errors import BaseWeightError
from lora_analysis.storage.dtypes import FLOATING, raw_dtype
from lora_analysis.storage.safetensors import TensorInfo
from lora_analysis.storage.tensor_reader import iter_blocks, part_of, read_elements

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_analysis.bases.weight import Tiles
    from lora_analysis.storage.tensors import TensorFiles

# Unsupported storages whose tensors look like those of others, by quant_method in the config.
_UNSUPPORTED = frozenset(
    {
        "aqlm", "auto-round", "bitnet", "eetq", "fp_quant", "higgs", "hqq", "intel/auto-round",
        "quanto", "quark", "sinq", "spqr", "torchao", "vptq",
    }
)  # fmt: skip


class _RawFiles:
    """Tensors of one file or its shards: values, and raw elements (`RawTensors`)."""

    def __init__(self, files: TensorFiles) -> None:
        self._files = files
        self.infos: Mapping[str, TensorInfo] = files.infos

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor's values."""
        return self._files.read(name)

    def raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return the elements ``start`` to ``stop`` of a tensor as stored, flat."""
        return read_elements(self._files.file_of(name), self.infos[name], start, stop)

    def blocks(self, name: str, index: int | None) -> Tiles:
        """Yield a matrix, or one of a stack, tile by tile."""
        info = self.infos[name]
        shape = matrix_shape(name, info.shape) if index is None else info.shape[1:]
        if shape == info.shape:
            yield from self._files.blocks(name)
        elif info.strides is not None:
            values = self.read(name)
            matrix = values[index] if index is not None else values.reshape(shape)
            yield slice(0, shape[0]), slice(0, shape[1]), np.asarray(matrix, np.float32)
        else:
            size = raw_dtype(info.dtype).itemsize * shape[0] * shape[1]
            part = part_of(info, shape, info.start + (index or 0) * size)
            yield from iter_blocks(self._files.file_of(name), part)


def _is_companion(name: str, quantized: Container[str]) -> bool:
    """Return True for the codes, scales and states next to a quantized weight of another name."""
    path, _, last = name.rpartition(".")
    if name in quantized or last == "bias":
        return False
    parameter = path.removesuffix(".quant_state")
    stem = name.removesuffix("_inv").rpartition("_")
    return (
        f"{path}.weight" in quantized
        or parameter in quantized
        or (stem[0] in quantized and stem[2] != "bias")
    )


class FileSource(TensorSource):
    """The weights of a base in files.

    Parameters
    ----------
    files
        The stored tensors.
    label
        The base's name, for messages.
    config
        The model's ``config.json``; its ``quantization_config`` decides if tensors do not.
    """

    def __init__(self, files: TensorFiles, label: str, config: Mapping[str, Any]) -> None:
        self._stored = _RawFiles(files)
        self._label = label
        quantization = config.get("quantization_config", config.get("compression_config"))
        self._config: Mapping[str, Any] = quantization if isinstance(quantization, Mapping) else {}
        self._makers = quantized_weights(self._stored, self._config, label, files.metadata)
        self._quantized: dict[str, Quantized] = {}
        plain = [name for name in files.infos if not _is_companion(name, self._makers)]
        self._names = list(dict.fromkeys([*plain, *self._makers]))

    @property
    def names(self) -> Sequence[str]:
        """Names of all tensors, and of the weights that quantized tensors make."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the plain numbers."""
        made = self._made(name)
        return self._stored.infos[name].shape if made is None else made.shape

    def dtype(self, name: str) -> str:
        """Return the stored type; for codes, the name of the storage."""
        made = self._made(name)
        return self._stored.infos[name].dtype if made is None else made.storage

    def storage(self, name: str) -> str:
        """Return the storage of a quantized weight, "" for plain numbers."""
        made = self._made(name)
        return "" if made is None else made.storage

    def is_plain(self, name: str) -> bool:
        """Return True if the tensor is stored as plain numbers; nothing is assembled for it."""
        return name not in self._makers

    def transposed(self, name: str) -> bool | None:
        """Return the orientation of a quantized storage; None for plain numbers."""
        made = self._made(name)
        return None if made is None else made.transposed

    def tiles(self, name: str, index: int | None) -> Tiles:
        """Yield a matrix tile by tile."""
        made = self._made(name)
        if made is None:
            return self._stored.blocks(name, index)
        return tiles(made, self._stored, index)

    def squared_errors(self, name: str, index: int | None) -> Tiles | None:
        """Yield the expected squared rounding errors; None for plain numbers."""
        made = self._made(name)
        return None if made is None else tiles(made, self._stored, index, errors=True)

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor of any shape."""
        return self._stored.read(name)

    def refuse_unreadable(self, name: str) -> None:
        """Raise if the tensor belongs to a storage that is not supported."""
        method = str(self._config.get("quant_method", ""))
        if self._made(name) is not None and method in _UNSUPPORTED:
            raise quantized_error(self._label, name, method)
        if self._made(name) is None and (dtype := self.dtype(name)) not in FLOATING:
            stateless = f"{name}.absmax" in self._stored.infos
            kind = "bitsandbytes 4-bit without its quant_state"
            raise quantized_error(self._label, name, kind if stateless else f"stored as {dtype}")

    def _made(self, name: str) -> Quantized | None:
        """Return the quantized weight of that name, assembled at first use; None for others."""
        if name in self._makers and name not in self._quantized:
            made = self._makers[name]()
            if min(made.shape, default=0) < 1:
                message = f"{self._label}: '{name}' ({made.storage}) has shape {made.shape}."
                raise BaseWeightError(message)
            self._quantized[name] = made
        return self._quantized.get(name)
