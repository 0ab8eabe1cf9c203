"""compressed-tensors integers, and packed floats with block scales (MXFP4, MXFP6, NVFP4).

Integers of 1 to 8 bits follow each other without gaps in 32-bit words along the input, offset by
half their range. 4-bit floats are E2M1, two a byte, the first in the low half: MXFP4 has a power
of two per 32, NVFP4 an fp8 scale per 16 and one factor for the whole, by which compressed-tensors
divides and modelopt multiplies. 6-bit floats are E2M3, four in three bytes, the first lowest.
ComfyUI keeps the first 4-bit float in the high half, and its scales in tiles.
"""

from __future__ import annotations

import math
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
