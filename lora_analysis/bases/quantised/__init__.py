"""Weights stored as codes: which tensors belong together, and how their values are found.

Each storage says what its codes, scales and levels are; values and the error of rounding follow
from those in one place (:mod:`~lora_analysis.bases.quantised.codes`). Nothing here knows modules'
names or which way the family stores a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.bases.quantised.bitsandbytes import STATE, blockwise_4bit, rowwise_int8
from lora_analysis.bases.quantised.codes import Quantised, RawTensors
from lora_analysis.bases.quantised.gptq import packed_words
from lora_analysis.bases.quantised.packed import four_bit_floats, packed_integers
from lora_analysis.bases.quantised.scaled import FLOAT8, scaled
from lora_analysis.storage.limits import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Quantised", "RawTensors", "quantised_weights", "tiles"]

Makers = Mapping[str, Callable[[], Quantised]]

_SCALES: Final = ("weight_scale_inv", "weight_scale", "scale_weight")


def quantised_weights(tensors: RawTensors, config: Mapping[str, Any], label: str) -> Makers:
    """Return what makes each quantised weight, by the name its plain numbers would have.

    Parameters
    ----------
    tensors
        What is stored.
    config
        The model's ``quantization_config``, empty where there is none.
    label
        The base's name, for messages.
    """
    return dict(_recognised(tensors, config, label))


def tiles(
    weight: Quantised, tensors: RawTensors, index: int | None, *, errors: bool = False
) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
    """Yield the values of a weight by runs of whole rows, or their expected square errors."""
    height, width = weight.shape[-2:]
    step = max(1, BLOCK_ELEMENTS // max(width, 1) // weight.step) * weight.step
    decode = weight.decoder(tensors, index)
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        coded = decode(rows)
        yield rows, slice(0, width), coded.squared_errors() if errors else coded.values()


def _recognised(
    tensors: RawTensors, config: Mapping[str, Any], label: str
) -> Iterator[tuple[str, Callable[[], Quantised]]]:
    infos = tensors.infos
    for name in infos:
        path, _, last = name.rpartition(".")
        weight = f"{path}.weight"
        if STATE in name:
            own, _, kind = name.partition(STATE)
            yield own, partial(blockwise_4bit, own, kind, tensors, label)
        elif last == "qweight":
            yield weight, partial(packed_words, path, tensors, config, label)
        elif last == "SCB" and weight in infos:
            yield weight, partial(rowwise_int8, weight, name, tensors, label)
        elif last == "weight_packed":
            yield weight, _packed(path, tensors, label)
        elif last.endswith("_blocks") and name.removesuffix("blocks") + "scales" in infos:
            own = name.removesuffix("_blocks")
            yield own, partial(four_bit_floats, name, f"{own}_scales", tensors, label)
        elif last == "weight" and (maker := _scaled(name, tensors, config, label)):
            yield name, maker


def _packed(path: str, tensors: RawTensors, label: str) -> Callable[[], Quantised]:
    """Return what makes a packed weight of compressed-tensors: integers, or 4-bit floats."""
    name, scale, whole = (f"{path}.weight_{last}" for last in ("packed", "scale", "global_scale"))
    if tensors.infos[name].dtype == "uint8" and scale in tensors.infos:
        held = whole if whole in tensors.infos else None
        return partial(four_bit_floats, name, scale, tensors, label, whole=held)
    return partial(packed_integers, path, tensors, label)


def _scaled(
    name: str, tensors: RawTensors, config: Mapping[str, Any], label: str
) -> Callable[[], Quantised] | None:
    """Return what makes a weight of 8-bit numbers with scales beside it; None for others."""
    infos, path = tensors.infos, name.removesuffix(".weight")
    scale = next((f"{path}.{last}" for last in _SCALES if f"{path}.{last}" in infos), None)
    dtype = infos[name].dtype
    if dtype == "uint8" and scale is not None and f"{path}.weight_scale_2" in infos:
        whole = f"{path}.weight_scale_2"
        return partial(four_bit_floats, name, scale, tensors, label, whole=whole)
    if dtype in FLOAT8 or scale is not None:  # of other types with scales, it refuses to guess
        return partial(scaled, name, scale, tensors, config, label)
    return None
