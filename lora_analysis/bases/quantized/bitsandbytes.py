"""bitsandbytes: 4-bit code-books (nf4, fp4) with one scale per block, and int8 by rows.

4-bit codes run through the flattened weight, two a byte, the first in the high half; each block of
64 (``blocksize``) has a scale ``absmax``, which may itself be stored as 8-bit codes ("nested" or
double quantization). The code-book and a JSON of shapes are separate tensors of the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.bases.quantized.codes import Coded, Decoder, RawTensors, nibbles, storage_error
from lora_analysis.storage.documents import parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True, slots=True)
class Blockwise4Bit:
    """One nf4 or fp4 weight ``X.weight``."""

    name: str
    shape: tuple[int, ...]
    storage: str
    state: dict[str, Any]
    transposed: None = None
    step: int = 1

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:  # noqa: ARG002
        """Return a function that decodes runs of rows."""
        levels = tensors.read(f"{self.name}.quant_map").astype(np.float32).reshape(-1)
        scales = self._scales(tensors)
        columns, block = self.shape[1], int(self.state["blocksize"])

        def decode(rows: slice) -> Coded:
            first, last = rows.start * columns, rows.stop * columns
            packed = tensors.raw(self.name, first // 2, (last + 1) // 2)
            codes = nibbles(packed, high_first=True)[first % 2 :][: last - first]
            scale = scales[np.arange(first, last) // block]
            return Coded(codes.reshape(-1, columns), scale.reshape(-1, columns), levels)

        return decode

    def _scales(self, tensors: RawTensors) -> NDArray[np.float32]:
        """Return one scale per block."""
        # Their numbers of elements were checked, their shapes were not.
        absmax = tensors.read(f"{self.name}.absmax").reshape(-1)
        if "nested_blocksize" not in self.state:
            return absmax.astype(np.float32)
        nested = tensors.read(f"{self.name}.nested_quant_map").reshape(-1)[absmax]
        outer = tensors.read(f"{self.name}.nested_absmax").reshape(-1)
        outer = outer[np.arange(len(absmax)) // int(self.state["nested_blocksize"])]
        scales = nested * outer + np.float32(self.state.get("nested_offset", 0.0))
        return np.asarray(scales, np.float32)


def blockwise_4bit(name: str, kind: str, tensors: RawTensors, label: str) -> Blockwise4Bit:
    """Return the weight ``X.weight`` with a state of ``kind``; the sizes must fit together."""
    storage = f"bitsandbytes {kind}"
    try:
        state = parse_json(bytes(tensors.read(f"{name}{STATE}{kind}")).decode("utf-8"))
        m, n = (int(size) for size in state["shape"])
        blocks = math.ceil(m * n / int(state["blocksize"]))
        nested = int(state.get("nested_blocksize", 1))
        sizes = {
            name: math.ceil(m * n / 2),
            f"{name}.absmax": blocks,
            f"{name}.quant_map": 16,
        }
        if "nested_blocksize" in state:
            sizes[f"{name}.nested_absmax"] = math.ceil(blocks / nested)
            sizes[f"{name}.nested_quant_map"] = 256
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise storage_error(
            label, name, storage, f"its quant_state is not readable ({error})"
        ) from error
    for tensor, elements in sizes.items():
        info = tensors.infos.get(tensor)
        if info is None or info.elements != elements:
            actual = "is missing" if info is None else f"has {info.elements:,}"
            why = f"'{tensor}' should have {elements:,} elements, it {actual}"
            raise storage_error(label, name, storage, why)
    kinds = {name: "uint8"} | ({f"{name}.absmax": "uint8"} if "nested_blocksize" in state else {})
    for tensor, dtype in kinds.items():
        if tensors.infos[tensor].dtype != dtype:
            why = f"'{tensor}' should be {dtype}, it is {tensors.infos[tensor].dtype}"
            raise storage_error(label, name, storage, why)
    return Blockwise4Bit(name, (m, n), storage, state)


@dataclass(frozen=True, slots=True)
class RowwiseInt8:
    """One int8 weight ``X.weight`` with the largest value of each row in ``X.SCB``."""

    name: str
    scale: str
    shape: tuple[int, ...]
    storage: str = "bitsandbytes int8"
    transposed: None = None
    step: int = 1

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:  # noqa: ARG002
        """Return a function that decodes runs of rows: ``codes·SCB/127``."""
        scales = tensors.read(self.scale).astype(np.float32).reshape(-1, 1) / np.float32(127)
        columns = self.shape[1]

        def decode(rows: slice) -> Coded:
            codes = tensors.raw(self.name, rows.start * columns, rows.stop * columns)
            return Coded(codes.reshape(-1, columns), scales[rows])

        return decode


def rowwise_int8(name: str, scale: str, tensors: RawTensors, label: str) -> RowwiseInt8:
    """Return the weight; it must be int8 with one scale per row."""
    info, rows = tensors.infos[name], tensors.infos[scale]
    if info.dtype != "int8" or len(info.shape) != 2 or rows.elements != info.shape[0]:
        why = f"it is {info.dtype} {info.shape}, its SCB has shape {rows.shape}"
        raise storage_error(label, name, "bitsandbytes int8", why)
    return RowwiseInt8(name, scale, info.shape)
