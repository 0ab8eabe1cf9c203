"""Codes packed into words and bytes: GPTQ, AWQ, compressed-tensors, MXFP4, MXFP6 and NVFP4.

GPTQ and AWQ have integers of 2 to 8 bits in 32-bit words, a scale and a zero per group, and store
``[in, out]``. GPTQ packs along the input, eight 4-bit codes of one column a word; its ``g_idx``
gives the group of each input; format version 1 stores zeros less one. AWQ ("gemm") packs eight
outputs a word in the order 0, 2, 4, 6, 1, 3, 5, 7. AWQ also moves a factor per input feature from W
into the layer before it, which no file states: such a W differs from the unquantized one by more
than its rounding.

Integers of compressed-tensors, of 1 to 8 bits, follow each other without gaps in 32-bit words along
the input, offset by half their range. 4-bit floats are E2M1, two a byte, the first in the low half:
MXFP4 has a power of two per 32, NVFP4 an fp8 scale per 16 and one factor for the whole, by which
compressed-tensors divides and modelopt multiplies. 6-bit floats are E2M3, four in three bytes, the
first lowest. ComfyUI keeps the first 4-bit float in the high half, and its scales in tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.bases.quantized.codes import (
    E2M1,
    E2M3,
    MXFP4_REACH,
    MXFP6_REACH,
    Coded,
    Decoder,
    RawTensors,
    nibbles,
    powers_of_two,
    six_bit_codes,
    storage_error,
    unpack,
    untile,
    untiled_shape,
)
from lora_analysis.bases.quantized.schemes import DECODED_PACKED, Scheme, decoding_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
        size: int | None = -(-rows // groups)
        fits = True
        if f"{path}.g_idx" in infos:  # assigns each input to one of the groups
            index = tensors.read(f"{path}.g_idx")
            size = None
            fits = index.shape == (rows,) and index.min() >= 0 and index.max() < groups
        if fits:
            version = config.get("checkpoint_format", "gptq")
            if version not in ("gptq", "gptq_v2"):
                why = f"checkpoint_format {version!r} is not read; dequantize it first"
                raise storage_error(label, f"{path}.qweight", "GPTQ", why)
            # The first format stores zeros less one.
            return GPTQ(path, (rows, out), bits, size, zero_offset=int(version == "gptq"))
    raise storage_error(label, f"{path}.qweight", storage, f"the shapes do not fit: {shapes}")


@dataclass(frozen=True, slots=True)
class PackedIntegers:
    """One weight ``X.weight_packed`` of compressed-tensors."""

    path: str
    shape: tuple[int, ...]
    bits: int
    groups: NDArray[np.intp]
    asymmetric: bool
    transposed: bool = False
    step: int = 1

    @property
    def storage(self) -> str:
        """Name of the storage with the bits."""
        return f"compressed-tensors int{self.bits}"

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:  # noqa: ARG002
        """Return a function that decodes runs of rows: ``scale·(code − zero)``."""
        name = f"{self.path}.weight_packed"
        words = tensors.infos[name].shape[1]
        scales = tensors.read(f"{self.path}.weight_scale").astype(np.float32)
        scales = scales.reshape(len(scales), -1)
        # Without zero points, the middle of the range is 0: that is the offset itself.
        zeros: NDArray[Any] = np.full((1, 1), 1 << (self.bits - 1))
        if self.asymmetric:
            stored = tensors.read(f"{self.path}.weight_zero_point")
            zeros = unpack(np.ascontiguousarray(stored), self.bits)[: self.shape[0]]

        def decode(rows: slice) -> Coded:
            packed = tensors.raw(name, rows.start * words, rows.stop * words).reshape(-1, words)
            codes = unpack(np.ascontiguousarray(packed.T), self.bits)[: self.shape[1]].T
            scale = scales[rows] if len(scales) > 1 else scales
            zero = zeros[rows][:, self.groups] if self.asymmetric else zeros
            return Coded(codes, scale[:, self.groups], zero=zero)

        return decode


def packed_integers(path: str, tensors: RawTensors, label: str) -> PackedIntegers:
    """Return the weight ``X.weight_packed``; its tensors must fit together."""
    name, infos, storage = f"{path}.weight_packed", tensors.infos, "compressed-tensors"
    scale, shape = infos.get(f"{path}.weight_scale"), infos.get(f"{path}.weight_shape")
    info = infos[name]
    if scale is None or shape is None or shape.elements != 2 or len(info.shape) != 2:
        raise storage_error(
            label, name, storage, "it needs weight_scale and a weight_shape of 2 numbers"
        )
    out, columns = (int(size) for size in tensors.read(f"{path}.weight_shape"))
    fitting = [b for b in range(1, 9) if math.ceil(columns * b / 32) == info.shape[1]]
    if info.shape[0] != out or len(fitting) != 1:
        why = f"words {info.shape} do not hold a weight of shape {(out, columns)}"
        raise storage_error(label, name, storage, why)
    count = scale.elements // scale.shape[0] if scale.shape and scale.shape[0] else 0
    if scale.shape[:1] not in ((out,), (1,)) or not count or columns % count:
        why = f"scales of shape {scale.shape} do not cover a weight of shape {(out, columns)}"
        raise storage_error(label, name, storage, why)
    groups = np.arange(columns) // (columns // count)
    if f"{path}.weight_g_idx" in infos:
        groups = tensors.read(f"{path}.weight_g_idx").astype(np.intp)
        if groups.shape != (columns,) or groups.min() < 0 or groups.max() >= count:
            raise storage_error(label, name, storage, f"its g_idx does not name {count} groups")
    zero = infos.get(f"{path}.weight_zero_point")
    words = (math.ceil(out * fitting[0] / 32), count)
    if zero is not None and (zero.dtype != "int32" or zero.shape != words):
        why = f"zero points are {zero.dtype} {zero.shape}, packed they would be int32 {words}"
        raise storage_error(label, name, storage, why)
    return PackedIntegers(path, (out, columns), fitting[0], groups, asymmetric=zero is not None)


@dataclass(frozen=True, slots=True)
class _Format:
    """A packed float: its bits, its levels, the run of one scale, and the reach."""

    bits: int
    levels: NDArray[np.float32]
    run: int
    reach: float = 0.0


_FORMATS = {
    "MXFP4": _Format(4, E2M1, 32, MXFP4_REACH),
    "MXFP6": _Format(6, E2M3, 32, MXFP6_REACH),
    "NVFP4": _Format(4, E2M1, 16),
}


@dataclass(frozen=True, slots=True)
class PackedFloats:
    """One weight of packed 4- or 6-bit floats with scales for runs along the input."""

    name: str
    scale: str
    shape: tuple[int, ...]
    storage: str
    whole: str | None = None
    divided: bool = False
    tiled: bool = False
    transposed: bool = False
    step: int = 1

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:
        """Return a function that decodes runs of rows."""
        height, width = self.shape[-2:]
        kind = _FORMATS[self.storage]
        stored = tensors.read(self.scale)
        if len(self.shape) == 3:
            stored = stored[index or 0]
        scales = powers_of_two(stored) if stored.dtype == np.uint8 else stored.astype(np.float32)
        if self.tiled:
            scales = untile(scales, height, width // kind.run)
        if self.whole is not None:
            factor = np.float32(tensors.read(self.whole).reshape(-1)[0])
            scales *= 1 / factor if self.divided else factor
        first, size = (index or 0) * height, width * kind.bits // 8

        def decode(rows: slice) -> Coded:
            bounds = ((first + row) * size for row in (rows.start, rows.stop))
            packed = tensors.raw(self.name, *bounds).reshape(-1, size)
            codes = (
                six_bit_codes(packed) if kind.bits == 6 else nibbles(packed, high_first=self.tiled)
            )
            spread = scales[rows].repeat(kind.run, axis=-1)
            return Coded(codes, spread, kind.levels, reach=kind.reach)

        return decode


def packed_floats(
    name: str,
    scale: str,
    tensors: RawTensors,
    scheme: Scheme,
    label: str,
    *,
    whole: str | None = None,
) -> PackedFloats:
    """Return the weight in ``name``: MXFP4, MXFP6 or NVFP4, by the table of schemes.

    Raises
    ------
    BaseWeightError
        The types are not decoded, the shapes do not fit together, NVFP4 lacks the factor for the
        whole, or the file has a further tensor that would change the values.
    """
    info, scales = tensors.infos[name], tensors.infos[scale]
    decoding = decoding_of(DECODED_PACKED, info, scales, scheme, label)
    storage, kind = decoding.name, _FORMATS[decoding.name]
    path = name.rpartition(".")[0]
    for last in ("pre_quant_scale", "weight_zero_point"):
        if f"{path}.{last}" in tensors.infos:
            raise storage_error(label, name, storage, f"'{path}.{last}' next to it is not read")
    # gpt-oss stores the bytes of a run on a separate axis.
    by_run = len(info.shape) > 2 and info.shape[:-1] == scales.shape
    packed = info.shape[-2:] if by_run else info.shape[-1:]
    bits = kind.bits if info.dtype == "float4_e2m1" else 8  # whose shape counts numbers
    width = math.prod(packed) * bits // kind.bits
    shape = (*info.shape[: len(info.shape) - len(packed)], width)
    grid = untiled_shape(shape, scales, kind.run) if scheme.tiled else scales.shape
    kernels = len(shape) > 2 and name.endswith(".weight")  # a stack is a parameter of its own name
    fits = len(shape) in (2, 3) and not kernels and math.prod(packed) * bits == width * kind.bits
    if not fits or width * kind.bits % 8 or grid != (*shape[:-1], width / kind.run):
        why = f"{info.dtype} {info.shape} and scales {scales.dtype} {scales.shape} do not fit"
        raise storage_error(label, name, storage, why)
    if storage == "NVFP4" and (whole is None or tensors.infos[whole].elements != 1):
        raise storage_error(label, name, storage, "its one factor for the whole is missing")
    divided = whole is not None and whole.endswith("_global_scale")
    return PackedFloats(name, scale, shape, storage, whole, divided, scheme.tiled)
