"""GPTQ and AWQ: integers of 2 to 8 bits packed into 32-bit words, a scale and a zero per group.

Both store ``[in, out]``. GPTQ packs along the input, eight 4-bit codes of one column a word; its
``g_idx`` gives the group of each input; format version 1 stores zeros less one. AWQ ("gemm")
packs eight outputs a word in the order 0, 2, 4, 6, 1, 3, 5, 7. AWQ also moves a factor per input
feature from W into the layer before it, which no file states: such a W differs from the unquantized
one by more than its rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_analysis.bases.quantized.codes import Coded, Decoder, RawTensors, storage_error, unpack

# Position of column j of eight in an AWQ word, in steps of four bits.
_AWQ_POSITIONS = np.array([0, 4, 1, 5, 2, 6, 3, 7], dtype=np.uint32)


@dataclass(frozen=True, slots=True)
class GPTQ:
    """One weight ``X.qweight``."""

    path: str
    shape: tuple[int, ...]
    bits: int
    group: int | None
    zero_offset: int
    transposed: bool = True

    @property
    def storage(self) -> str:
        """Name of the storage with the bits."""
        return f"GPTQ {self.bits}-bit"

    @property
    def step(self) -> int:
        """Rows per whole words: runs start at the first row of a word."""
        return 32

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:  # noqa: ARG002
        """Return a function that decodes runs of input features: ``scale·(code − zero)``."""
        scales = tensors.read(f"{self.path}.scales").astype(np.float32)  # (groups, out)
        words = tensors.read(f"{self.path}.qzeros")
        stored = unpack(np.ascontiguousarray(words.T), self.bits).T
        # Zeros less one wrap: fifteen in four bits means 0.
        zeros = (stored.astype(np.int32) + self.zero_offset) & ((1 << self.bits) - 1)
        if self.group is None:
            groups = tensors.read(f"{self.path}.g_idx").astype(np.int64)
        else:
            groups = np.arange(self.shape[0]) // self.group

        def decode(rows: slice) -> Coded:
            columns = self.shape[1]
            first, last = rows.start * self.bits // 32, -(-rows.stop * self.bits // 32)
            packed = tensors.raw(f"{self.path}.qweight", first * columns, last * columns)
            codes = unpack(packed.reshape(-1, columns), self.bits)[: rows.stop - rows.start]
            group = groups[rows]
            return Coded(codes, scales[group], zero=zeros[group])

        return decode


@dataclass(frozen=True, slots=True)
class AWQ:
    """One weight ``X.qweight``, 4 bits."""

    path: str
    shape: tuple[int, ...]
    group: int
    storage: str = "AWQ 4-bit"
    transposed: bool = True
    step: int = 1

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:  # noqa: ARG002
        """Return a function that decodes runs of input features: ``scale·(code − zero)``."""
        scales = tensors.read(f"{self.path}.scales").astype(np.float32)
        zeros = _awq_codes(tensors.read(f"{self.path}.qzeros"))
        words = self.shape[1] // 8

        def decode(rows: slice) -> Coded:
            packed = tensors.raw(f"{self.path}.qweight", rows.start * words, rows.stop * words)
            group = np.arange(rows.start, rows.stop) // self.group
            return Coded(_awq_codes(packed.reshape(-1, words)), scales[group], zero=zeros[group])

        return decode


def _awq_codes(words: Any) -> Any:
    """Return the codes of 32-bit words, eight a word along the last axis, in their order."""
    codes = (words.view(np.uint32)[..., None] >> (4 * _AWQ_POSITIONS)) & np.uint32(15)
    return codes.astype(np.uint8).reshape(*words.shape[:-1], -1)


def packed_words(
    path: str, tensors: RawTensors, config: Mapping[str, Any], label: str
) -> GPTQ | AWQ:
    """Return the weight ``X.qweight``: GPTQ or AWQ by the shapes, which must fit together."""
    infos = tensors.infos
    storage = "GPTQ or AWQ"
    parts = {last: infos.get(f"{path}.{last}") for last in ("qweight", "qzeros", "scales")}
    if None in parts.values():
        lacking = ", ".join(last for last, info in parts.items() if info is None)
        raise storage_error(label, f"{path}.qweight", storage, f"it has no {lacking}")
    weight, zeros, scales = (info.shape for info in parts.values() if info is not None)
    shapes = f"qweight {weight}, qzeros {zeros}, scales {scales}"
    if not len(weight) == len(zeros) == len(scales) == 2 or zeros[0] != scales[0] or not scales[0]:
        raise storage_error(label, f"{path}.qweight", storage, f"the shapes do not fit: {shapes}")
    out, groups = scales[1], scales[0]
    if weight[1] * 8 == zeros[1] * 8 == out:
        group = -(-weight[0] // groups)
        if config.get("quant_method", "awq") != "awq" or config.get("version", "gemm") != "gemm":
            method = f"{config.get('quant_method')} {config.get('version', '')}".strip()
            why = f"the shapes are AWQ's gemm layout, the configuration says {method}"
            raise storage_error(label, f"{path}.qweight", storage, why)
        if group * groups == weight[0]:
            return AWQ(path, (weight[0], out), group)
    bits = zeros[1] * 32 // out if out else 0
    if weight[1] == out and bits in (2, 3, 4, 8) and zeros[1] * 32 == bits * out:
        rows = weight[0] * 32 // bits
        index = infos.get(f"{path}.g_idx")
        size = None if index is not None else -(-rows // groups)
        if index is None or _are_groups(tensors.read(f"{path}.g_idx"), rows, groups):
            return GPTQ(path, (rows, out), bits, size, _zero_offset(config, label, path))
    raise storage_error(label, f"{path}.qweight", storage, f"the shapes do not fit: {shapes}")


def _are_groups(index: Any, rows: int, groups: int) -> bool:
    """Return True if ``g_idx`` assigns each input to one of the groups."""
    return bool(index.shape == (rows,) and index.min() >= 0 and index.max() < groups)


def _zero_offset(config: Mapping[str, Any], label: str, path: str) -> int:
    """Return the number to add to stored zeros: 1 in the first format, 0 in the second."""
    version = config.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        why = f"checkpoint_format {version!r} is not read; dequantize it first"
        raise storage_error(label, f"{path}.qweight", "GPTQ", why)
    return 1 if version == "gptq" else 0
