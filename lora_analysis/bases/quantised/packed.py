"""compressed-tensors integers, and 4-bit floats with block scales (MXFP4, NVFP4).

Integers of 1 to 8 bits follow each other without gaps in 32-bit words along the input, offset by
half their range. 4-bit floats are E2M1, two a byte, the first in the low half: MXFP4 has a power
of two per 32, NVFP4 an fp8 scale per 16 and one factor for the whole, by which compressed-tensors
divides and modelopt multiplies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.bases.quantised.codes import (
    E2M1,
    MXFP4_REACH,
    Coded,
    Decoder,
    RawTensors,
    nibbles,
    powers_of_two,
    refused,
    unpacked,
)

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
        """Its name with the bits."""
        return f"compressed-tensors int{self.bits}"

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:  # noqa: ARG002
        """Return what decodes runs of rows: ``scale·(code − zero)``."""
        name = f"{self.path}.weight_packed"
        words = tensors.infos[name].shape[1]
        scales = tensors.read(f"{self.path}.weight_scale").astype(np.float32)
        scales = scales.reshape(len(scales), -1)
        # Without zero points, the middle of the range is 0: that is the offset itself.
        zeros: NDArray[Any] = np.full((1, 1), 1 << (self.bits - 1))
        if self.asymmetric:
            stored = tensors.read(f"{self.path}.weight_zero_point")
            zeros = unpacked(np.ascontiguousarray(stored), self.bits)[: self.shape[0]]

        def decode(rows: slice) -> Coded:
            packed = tensors.raw(name, rows.start * words, rows.stop * words).reshape(-1, words)
            codes = unpacked(np.ascontiguousarray(packed.T), self.bits)[: self.shape[1]].T
            own = scales[rows] if len(scales) > 1 else scales
            zero = zeros[rows][:, self.groups] if self.asymmetric else zeros
            return Coded(codes, own[:, self.groups], zero=zero)

        return decode


def packed_integers(path: str, tensors: RawTensors, label: str) -> PackedIntegers:
    """Return the weight ``X.weight_packed``; its tensors must fit together."""
    name, infos, storage = f"{path}.weight_packed", tensors.infos, "compressed-tensors"
    scale, stated = infos.get(f"{path}.weight_scale"), infos.get(f"{path}.weight_shape")
    info = infos[name]
    if scale is None or stated is None or stated.elements != 2 or len(info.shape) != 2:
        raise refused(label, name, storage, "it needs weight_scale and a weight_shape of 2 numbers")
    out, columns = (int(size) for size in tensors.read(f"{path}.weight_shape"))
    fitting = [b for b in range(1, 9) if math.ceil(columns * b / 32) == info.shape[1]]
    if info.shape[0] != out or len(fitting) != 1:
        why = f"words {info.shape} do not hold a weight of shape {(out, columns)}"
        raise refused(label, name, storage, why)
    count = scale.elements // scale.shape[0] if scale.shape and scale.shape[0] else 0
    if scale.shape[:1] not in ((out,), (1,)) or not count or columns % count:
        why = f"scales of shape {scale.shape} do not cover a weight of shape {(out, columns)}"
        raise refused(label, name, storage, why)
    groups = np.arange(columns) // (columns // count)
    if f"{path}.weight_g_idx" in infos:
        groups = tensors.read(f"{path}.weight_g_idx").astype(np.intp)
        if groups.shape != (columns,) or groups.min() < 0 or groups.max() >= count:
            raise refused(label, name, storage, f"its g_idx does not name {count} groups")
    zero = infos.get(f"{path}.weight_zero_point")
    words = (math.ceil(out * fitting[0] / 32), count)
    if zero is not None and (zero.dtype != "int32" or zero.shape != words):
        why = f"zero points are {zero.dtype} {zero.shape}, packed they would be int32 {words}"
        raise refused(label, name, storage, why)
    return PackedIntegers(path, (out, columns), fitting[0], groups, asymmetric=zero is not None)


@dataclass(frozen=True, slots=True)
class Packed4BitFloats:
    """One E2M1 weight with scales for runs of 16 or 32 along the input."""

    name: str
    scale: str
    shape: tuple[int, ...]
    storage: str
    run: int
    whole: str | None = None
    divided: bool = False
    transposed: bool = False
    step: int = 1

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:
        """Return what decodes runs of rows."""
        height, width = self.shape[-2:]
        stored = tensors.read(self.scale)
        if len(self.shape) == 3:
            stored = stored[index or 0]
        scales = powers_of_two(stored) if stored.dtype == np.uint8 else stored.astype(np.float32)
        if self.whole is not None:
            factor = np.float32(tensors.read(self.whole).reshape(-1)[0])
            scales *= 1 / factor if self.divided else factor
        first = (index or 0) * height
        reach = MXFP4_REACH if self.whole is None else 0.0

        def decode(rows: slice) -> Coded:
            bounds = ((first + at) * width // 2 for at in (rows.start, rows.stop))
            codes = nibbles(tensors.raw(self.name, *bounds), high_first=False)
            spread = scales[rows].repeat(self.run, axis=-1)
            return Coded(codes.reshape(-1, width), spread, E2M1, reach=reach)

        return decode


def four_bit_floats(
    name: str, scale: str, tensors: RawTensors, label: str, *, whole: str | None = None
) -> Packed4BitFloats:
    """Return the weight in ``name``: MXFP4 with scales in uint8, NVFP4 with scales in fp8."""
    info, scales = tensors.infos[name], tensors.infos[scale]
    kind, run = ("MXFP4", 32) if scales.dtype in ("uint8", "float8_e8m0fnu") else ("NVFP4", 16)
    # gpt-oss keeps the sixteen bytes of a run on an axis of their own.
    by_run = len(info.shape) > 2 and info.shape[:-1] == scales.shape
    packed = info.shape[-2:] if by_run else info.shape[-1:]
    shape = (*info.shape[: len(info.shape) - len(packed)], 2 * math.prod(packed))
    wrong = info.dtype != "uint8" or len(shape) not in (2, 3)
    if wrong or scales.shape != (*shape[:-1], shape[-1] / run):
        why = f"{info.dtype} {info.shape} and scales {scales.dtype} {scales.shape} do not fit"
        raise refused(label, name, kind, why)
    if kind == "NVFP4" and (whole is None or tensors.infos[whole].elements != 1):
        raise refused(label, name, kind, "its one factor for the whole is missing")
    divided = whole is not None and whole.endswith("_global_scale")
    return Packed4BitFloats(name, scale, shape, kind, run, whole, divided)
