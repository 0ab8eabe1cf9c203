"""Base weights in GGUF files, converted back from the names and rows of llama.cpp's converter.

The package ``gguf`` decodes blocks and maps tensors to modules. The reordering of rows by the
converter is reversed: the rotary order of q and k, and fused tensors whose interleaved heads were
reordered into blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.bases.base_weights import BaseWeights
from lora_analysis.bases.quantized.codes import MXFP4_REACH, cell_variances
from lora_analysis.bases.weight import TensorSource
from lora_analysis.errors import BaseWeightError, MissingExtraError
from lora_analysis.storage.gguf import TYPES, GGUFFile, read_gguf
from lora_analysis.storage.gguf_names import PERMUTED, UNPERMUTED, is_q_or_k
from lora_analysis.storage.limits import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from lora_analysis.bases.weight import Tiles

_Decode = Callable[[str, "NDArray[np.uint8]"], "NDArray[np.float32]"]
_PLAIN: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Architectures whose fused rows the converter reorders into blocks → model_type in config.json.
_FUSED: Final = {"bloom": "bloom", "gptneox": "gpt_neox", "falcon": "falcon"}

# Bytes of the codes in a block, and the byte of codes that are all 1: its difference from zeros is
# the step. (start, stop, byte); the rest of the block (scales, high bits) is left as stored.
_CODES: Final = {
    "Q4_0": (2, 18, 0x11), "Q4_1": (4, 20, 0x11), "Q5_0": (6, 22, 0x11), "Q5_1": (8, 24, 0x11),
    "Q8_0": (2, 34, 1), "Q2_K": (16, 80, 0x55), "Q3_K": (32, 96, 0x55), "Q4_K": (16, 144, 0x11),
    "Q5_K": (48, 176, 0x11), "Q6_K": (0, 128, 0x11), "TQ2_0": (0, 64, 0x55),
}  # fmt: skip
# TQ1_0 packs five ternary digits into a byte: 0xFF makes each 2, which is two steps.
_TERNARY: Final = ("TQ1_0", (0, 52, 0xFF), 2)
# The same for types whose 4-bit codes mean unequal levels (``kvalues`` in the package).
_LEVELS: Final = {"IQ4_NL": (2, 18), "IQ4_XS": (8, 136), "MXFP4": (1, 17), "NVFP4": (4, 36)}


def open_gguf(path: Path, label: str) -> BaseWeights:
    """Return the weights of a GGUF file.

    Raises
    ------
    MissingExtraError
        The package ``gguf`` is not installed.
    MalformedFileError
        The file is damaged.
    """
    file = read_gguf(path)
    arch = str(file.metadata.get("general.architecture", ""))
    config: dict[str, Any] = {"model_type": _FUSED.get(arch, arch)}
    for key, field in (("head_count", "num_attention_heads"), ("head_count_kv", "num_kv_heads")):
        if isinstance(count := file.metadata.get(f"{arch}.attention.{key}"), int):
            config[field] = count
    if arch == "falcon":
        config["new_decoder_architecture"] = config.get("num_kv_heads", 1) > 1
    return BaseWeights(GGUFSource(file, arch, label), label=label, config=config, blocks=True)


class GGUFSource(TensorSource):
    """The tensors of a GGUF file, each matrix ``(d_out, d_in)``.

    Parameters
    ----------
    file
        Header of the file.
    arch
        ``general.architecture``.
    label
        The base's name, for messages.
    """

    def __init__(self, file: GGUFFile, arch: str, label: str) -> None:
        self._file = file
        self._arch = arch
        self._label = label
        self._aliases: dict[str, list[str]] = {}
        gguf = _gguf_package()
        architectures = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
        if arch not in architectures:
            return
        numbers = [int(name.split(".")[1]) for name in file.tensors if _has_block(name)]
        names = gguf.get_tensor_name_map(architectures[arch], 1 + max(numbers, default=-1))
        for module, (_, tensor) in names.mapping.items():
            if f"{tensor}.weight" in file.tensors and module != tensor:
                self._aliases.setdefault(f"{tensor}.weight", []).append(module)

    @property
    def names(self) -> Sequence[str]:
        """Names of all tensors."""
        return list(self._file.tensors)

    @property
    def aliases(self) -> Mapping[str, Sequence[str]]:
        """Tensor → the modules that it is the weight of, as many libraries spell them."""
        return self._aliases

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape, slowest axis first."""
        return self._file.tensors[name].shape

    def dtype(self, name: str) -> str:
        """Return the stored type."""
        kind = self._file.tensors[name].kind
        return _PLAIN.get(kind, kind)

    def storage(self, name: str) -> str:
        """Return the quantized type, "" for plain numbers."""
        kind = self._file.tensors[name].kind
        return "" if kind in _PLAIN else f"GGUF {kind}"

    def is_plain(self, name: str) -> bool:
        """Return True if the tensor is stored as plain numbers."""
        return self._file.tensors[name].kind in _PLAIN

    def transposed(self, name: str) -> bool | None:
        """Return False: the converter stores ``[out, in]``; None for embeddings."""
        return None if name.startswith("token_") else False

    def tiles(self, name: str, index: int | None) -> Tiles:
        """Yield a matrix tile by tile, its rows in the order of the running model."""
        return self._decode_rows(name, index, self._dequantize)

    def squared_errors(self, name: str, index: int | None) -> Tiles | None:
        """Yield the expected squared rounding errors; None if a code stands for several values."""
        kind = self._file.tensors[name].kind
        if kind in _LEVELS:
            return self._decode_rows(name, index, self._level_variances)
        scalar = kind in _CODES or kind == _TERNARY[0]
        return self._decode_rows(name, index, self._variances) if scalar else None

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor of any shape, its rows in the order of the file."""
        shape = self.shape(name)
        return self._dequantize(name, self._file.rows(name, 0, math.prod(shape[:-1]))).reshape(
            shape
        )

    def refuse_unreadable(self, name: str) -> None:
        """Raise if the type is not decoded, or the order of the rows is not known."""
        kind = self._file.tensors[name].kind
        gguf = _gguf_package()
        try:  # the package decodes the type if it decodes a block of zeros
            block = np.zeros((1, _block_bytes(kind)), np.uint8)
            gguf.dequantize(block, gguf.GGMLQuantizationType[kind])
        except (KeyError, NotImplementedError) as error:
            message = f"{self._label}: '{name}' is stored as GGUF {kind}, which is not read."
            raise BaseWeightError(message) from error
        if is_q_or_k(name.removesuffix(".weight")) and self._arch not in PERMUTED | UNPERMUTED:
            message = (
                f"{self._label}: whether the rows of '{name}' are permuted is not known for "
                f"architecture '{self._arch}'. Use the model as safetensors."
            )
            raise BaseWeightError(message)
        self._head_height(name, (1, 1, *self.shape(name))[-2])

    def _decode_rows(self, name: str, index: int | None, decode: _Decode) -> Tiles:
        """Yield decoded blocks of rows; interleaved rows of rotary heads are put back in order."""
        shape = self.shape(name)
        height, width = (1, *shape)[-2:]
        head_height = self._head_height(name, height)
        step = max(1, BLOCK_ELEMENTS // max(width, 1) // head_height) * head_height
        for top in range(0, height, step):
            bottom = min(top + step, height)
            first = (index or 0) * height
            tile = decode(name, self._file.rows(name, first + top, first + bottom))
            if (
                head_height > 1
            ):  # whole heads, back from interleaved rows to first halves, second halves
                pairs = tile.reshape(-1, head_height // 2, 2, width)
                tile = pairs.swapaxes(1, 2).reshape(tile.shape)
            yield slice(top, bottom), slice(0, width), tile

    def _dequantize(self, name: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        gguf = _gguf_package()
        kind = gguf.GGMLQuantizationType[self._file.tensors[name].kind]
        return np.asarray(gguf.dequantize(rows, kind), np.float32)

    def _variances(self, name: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return step²/12; the step is the difference that adding 1 to every code makes."""
        ternary = self._file.tensors[name].kind == _TERNARY[0]
        start, stop, ones = _TERNARY[1] if ternary else _CODES[self._file.tensors[name].kind]
        width = _block_bytes(self._file.tensors[name].kind)
        blocks = rows.reshape(len(rows), -1, width).copy()
        blocks[:, :, start:stop] = 0
        zero = self._dequantize(name, blocks.reshape(rows.shape))
        blocks[:, :, start:stop] = ones
        steps = self._dequantize(name, blocks.reshape(rows.shape)) - zero
        steps /= _TERNARY[2] if ternary else 1
        return np.asarray(np.square(steps) / np.float32(12))

    def _level_variances(self, name: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the mean square error of each value: its level's cell variance times scale²."""
        kind = self._file.tensors[name].kind
        gguf = _gguf_package()
        levels = np.array(
            gguf.quants._type_traits[gguf.GGMLQuantizationType[kind]].kvalues, np.float32
        )
        start, stop = _LEVELS[kind]
        blocks = rows.reshape(len(rows), -1, _block_bytes(kind)).copy()
        blocks[:, :, start:stop] = 0xFF
        scales = self._dequantize(name, blocks.reshape(rows.shape)) / levels[15]
        with np.errstate(divide="ignore", invalid="ignore"):  # a block of zeros has the scale 0
            numbers = np.nan_to_num(self._dequantize(name, rows) / scales)
        order = np.argsort(levels)
        middles = (levels[order][1:] + levels[order][:-1]) / 2
        codes = order[np.searchsorted(middles, numbers)]
        # The package's levels are twice those of the format.
        reach = 2 * MXFP4_REACH if kind == "MXFP4" else 0.0
        return np.asarray(cell_variances(levels, reach)[codes] * np.square(scales))

    def _head_height(self, name: str, height: int) -> int:
        """Return the rows of a head whose halves the converter has interleaved; 1 if it has not."""
        if self._arch not in PERMUTED or not is_q_or_k(name.removesuffix(".weight")):
            return 1
        metadata = self._file.metadata
        heads = metadata.get(f"{self._arch}.attention.head_count")
        if name.endswith("attn_k.weight"):
            heads = metadata.get(f"{self._arch}.attention.head_count_kv", heads)
        if isinstance(heads, list):  # one number per block
            block = int(name.split(".")[1]) if _has_block(name) else len(heads)
            heads = heads[block] if block < len(heads) else None
        if not isinstance(heads, int) or heads < 1 or height % (2 * heads):
            message = (
                f"{self._label}: the {height} rows of '{name}' are permuted by heads; the "
                f"file states {heads} of them."
            )
            raise BaseWeightError(message)
        return height // heads


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        message = "GGUF bases need the package gguf: pip install 'lora-analysis[gguf]'."
        raise MissingExtraError(message) from error
    return gguf


def _block_bytes(kind: str) -> int:
    return next(width for name, _, width in TYPES.values() if name == kind)


def _has_block(name: str) -> bool:
    number = name.split(".")[1] if name.startswith("blk.") else ""
    return number.isdecimal() and len(number) < 5  # the package makes a table entry for each
