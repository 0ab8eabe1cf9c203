"""Quantized weights: recognize which tensors belong together, and decode them.

Each storage defines its codes, scales and levels; values and rounding errors are computed from
those in one place (:mod:`~lora_analysis.bases.quantized.codes`). Module names and orientation of a
family's matrices are left to the callers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.bases.quantized.codes import Quantized, RawTensors, plane_of, storage_error
from lora_analysis.bases.quantized.packed import packed_floats, packed_integers, packed_words
from lora_analysis.bases.quantized.scaled import STATE, blockwise_4bit, rowwise_int8, scaled_weight
from lora_analysis.bases.quantized.schemes import Scheme, Schemes, stated_schemes
from lora_analysis.storage.dtypes import FLOAT8
from lora_analysis.storage.limits import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Quantized", "RawTensors", "quantized_weights", "tiles"]

Makers = Mapping[str, Callable[[], Quantized]]

# Names of scales next to ``X.weight``, and their suffixes for a parameter (a stack of experts).
_SCALES: Final = ("weight_scale_inv", "weight_scale", "scale_weight", "scale")
_PACKED: Final = frozenset({"uint8", "float4_e2m1"})
_CODES: Final = _PACKED | {"int8"}
_PARAMETER_SCALES: Final = ("_scale_inv", "_scale")
_GPT_OSS: Final = Scheme(frozenset({"mxfp4"}), "its names are gpt-oss's")


def quantized_weights(
    tensors: RawTensors,
    config: Mapping[str, Any],
    label: str,
    metadata: Mapping[str, str],
) -> Makers:
    """Return functions that make each quantized weight, by the name of its plain weight.

    Parameters
    ----------
    tensors
        The stored tensors.
    config
        The model's ``quantization_config``, empty if there is none.
    label
        The base's name, for messages.
    metadata
        Metadata of the file.
    """
    schemes = stated_schemes(config, metadata)
    infos = tensors.infos
    makers: dict[str, Callable[[], Quantized]] = {}
    for name in infos:
        path, _, last = name.rpartition(".")
        weight = f"{path}.weight"
        if STATE in name:
            plain, _, kind = name.partition(STATE)
            makers[plain] = partial(blockwise_4bit, plain, kind, tensors, label)
        elif last == "qweight":
            makers[weight] = partial(packed_words, path, tensors, config, label)
        elif last == "SCB" and weight in infos:
            makers[weight] = partial(rowwise_int8, weight, name, tensors, label)
        elif last == "weight_packed":  # compressed-tensors: integers, or floats in bytes
            scale, whole = f"{path}.weight_scale", f"{path}.weight_global_scale"
            makers[weight] = partial(packed_integers, path, tensors, label)
            if infos[name].dtype == "uint8" and scale in infos:
                factor = whole if whole in infos else None
                arguments = name, scale, tensors, schemes.whole, label
                makers[weight] = partial(packed_floats, *arguments, whole=factor)
        elif last.endswith("_blocks") and name.removesuffix("blocks") + "scales" in infos:
            plain = name.removesuffix("_blocks")
            arguments = name, f"{plain}_scales", tensors, _GPT_OSS, label
            makers[plain] = partial(packed_floats, *arguments)
        elif len(infos[name].shape) > 1 and (maker := _scaled_maker(name, tensors, schemes, label)):
            makers[name] = maker
    return makers


def tiles(
    weight: Quantized, tensors: RawTensors, index: int | None, *, errors: bool = False
) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
    """Yield the values of a weight in runs of whole rows, or their expected squared errors."""
    height, width = plane_of(weight.shape, index)
    step = max(1, BLOCK_ELEMENTS // max(width, 1) // weight.step) * weight.step
    decode = weight.decoder(tensors, index)
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        coded = decode(rows)
        yield rows, slice(0, width), coded.squared_errors() if errors else coded.values()


def _scaled_maker(
    name: str, tensors: RawTensors, schemes: Schemes, label: str
) -> Callable[[], Quantized] | None:
    """Return a function that makes a weight of codes with separate scales; None if it has none."""
    infos, dtype = tensors.infos, tensors.infos[name].dtype
    path, _, last = name.rpartition(".")
    if last == "weight":
        # Flux calls the gains of its norms "scale"; with plain numbers they are not such scales.
        ends = _SCALES if dtype in FLOAT8 | _CODES else _SCALES[:-1]
        scales = [f"{path}.{end}" for end in ends if f"{path}.{end}" in infos]
    else:
        scales = [f"{name}{end}" for end in _PARAMETER_SCALES if f"{name}{end}" in infos]
        if dtype not in FLOAT8 | _CODES:
            return None
    if not scales and dtype not in FLOAT8:
        return None

    def make() -> Quantized:
        if len(scales) > 1:
            listed = ", ".join(f"'{scale}'" for scale in scales)
            raise storage_error(
                label, name, "scaled", f"it has several tensors of scales: {listed}"
            )
        scheme = schemes.of(name, tensors, label)
        scale = scales[0] if scales else None
        if scale is not None and dtype in _PACKED:
            second = f"{scale}_2"
            whole = second if second in infos else None
            return packed_floats(name, scale, tensors, scheme, label, whole=whole)
        return scaled_weight(name, scale, tensors, scheme, label)

    return make
