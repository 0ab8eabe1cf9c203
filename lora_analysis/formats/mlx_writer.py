"""The folder that mlx-lm loads: ``adapters.safetensors`` and ``adapter_config.json``.

mlx-lm makes every layer of the rank and scale in the configuration before it loads the factors:
smaller ranks are filled up with zeros, different scales folded into ``lora_b``. ``num_layers`` is
-1, all layers, since the depth of the base is not known; a layer without factors keeps its zeros.
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.formats.mlx import SWITCH, WEIGHTS_NAME, is_embedding
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.text_writing import (
    PlannedFactors,
    common_scale,
    fold_scales,
    folding_note,
    stack_experts,
    text_outlines,
)
from lora_analysis.formats.written import is_dora
from lora_analysis.storage.tensor_writer import OutputTensor, output_group, safetensors_content

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.written import Shape
    from lora_analysis.storage.atomic import Content

_FORMAT: Final = "MLX"
_LAYER: Final = re.compile(r".*?layers\.\d+\.(?P<key>.+)")


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as mlx-lm's files by name.

    Raises
    ------
    InputError
        An embedding has a name that mlx-lm's models do not give one, or only some modules are
        DoRA's.
    UnsupportedMethodError
        MLX cannot express an update.
    """
    updates = text_outlines(adapter, _FORMAT, variants=(DORA,))
    scale = common_scale(updates)
    scales = dict.fromkeys(updates, scale)
    dora = is_dora(updates.values(), adapter.label, _FORMAT)
    if dora and any(update.layout == "embedding" for update in updates.values()):
        message = f"{adapter.label}: DoRA in an embedding, which MLX cannot express."
        raise InputError(message)
    factors = stack_experts(fold_scales(adapter, updates, scales), _FORMAT)
    rank = max(planned.rank for planned in factors.values())
    names = {name: _mlx_name(name, planned) for name, planned in factors.items()}
    tensors: list[OutputTensor] = []
    for name, planned in factors.items():
        tensors += _module_tensors(names[name], planned, rank)
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {
            "keys": sorted({_key(name) for name in names.values()}),
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
        },
        "model": adapter.provenance.base_model,
        "num_layers": -1,
    }
    return {
        WEIGHTS_NAME: safetensors_content(tensors, {"format": "mlx"}, config=config),
        CONFIG_NAME: f"{json.dumps(config, indent=4)}\n".encode(),
    }


def mlx_notes(adapter: Adapter) -> list[str]:
    """Return sentences on scales that were folded and ranks that were filled up."""
    updates = text_outlines(adapter, _FORMAT, variants=(DORA,))
    scale = common_scale(updates)
    scales = dict.fromkeys(updates, scale)
    ranks = {update.rank for update in updates.values()}
    filled = sum(update.rank != max(ranks) for update in updates.values())
    notes = folding_note(updates, scales, _FORMAT, "scale")
    if filled:
        notes.append(
            f"MLX has one rank for all modules: {filled} of {len(updates)} are filled up with "
            f"zeros to rank {max(ranks)}. ΔW is the same."
        )
    return notes


def _mlx_name(name: str, planned: PlannedFactors) -> str:
    """Return mlx-lm's name of a module; refuse one that implies a different layout."""
    if len(planned.a) == 3:
        name = name.replace(".experts.", SWITCH)
    if (planned.layout == "embedding") != is_embedding(name):
        message = (
            f"'{name}' is of layout '{planned.layout}', but readers of MLX files infer a different "
            "one from the name. It is not written."
        )
        raise InputError(message)
    return name


def _key(name: str) -> str:
    """Return the name inside a layer, by which mlx-lm finds modules to adapt, or the whole one."""
    match = _LAYER.fullmatch(name)
    return match["key"] if match else name


def _module_tensors(name: str, planned: PlannedFactors, rank: int) -> list[OutputTensor]:
    """Return one module's tensors, filled up to a rank: experts as they are, others transposed."""
    a, b = (*planned.a[:-2], rank, planned.a[-1]), (*planned.b[:-1], rank)
    shapes = {f"{name}.lora_a": a, f"{name}.lora_b": b}
    if len(a) == 2:
        shapes = {key: shape[::-1] for key, shape in shapes.items()}
        if planned.norms is not None:
            shapes[f"{name}.m"] = planned.norms
    return output_group(shapes, partial(_module_arrays, planned, shapes), dtype=planned.dtype)


def _module_arrays(planned: PlannedFactors, shapes: Mapping[str, Shape]) -> dict[str, NDArray[Any]]:
    factors = planned.load(planned.dtype)
    a, b = factors.a, factors.b
    if a.ndim == 2:
        a, b = a.T, b.T
    arrays = [a, b] if factors.norms is None else [a, b, factors.norms]
    return {
        name: _filled(array, shape)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True)
    }


def _filled(array: NDArray[Any], shape: Shape) -> NDArray[Any]:
    """Return an array with zeros after its last entries along each axis, up to a shape."""
    if array.shape == shape:
        return np.ascontiguousarray(array)
    whole = np.zeros(shape, array.dtype)
    whole[tuple(slice(size) for size in array.shape)] = array
    return whole
