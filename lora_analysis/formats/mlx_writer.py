"""The folder that mlx-lm loads: ``adapters.safetensors`` and ``adapter_config.json``.

mlx-lm makes every layer of the rank and scale in the configuration before it loads the factors:
smaller ranks are filled up with zeros, other scales folded into ``lora_b``. ``num_layers`` is -1,
all layers, since the depth of the base is not known; a layer without factors keeps its zeros.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.formats.mlx import SWITCH, WEIGHTS_NAME, is_embedding
from lora_analysis.formats.peft_config import CONFIG_NAME
from lora_analysis.formats.peft_pairs import DORA
from lora_analysis.formats.text_writing import (
    Factors,
    folded,
    folding_note,
    one_scale,
    with_experts_stacked,
    writable,
)
from lora_analysis.storage.atomic import write_together

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, LowRankUpdate

_FORMAT: Final = "MLX"
_LAYER: Final = re.compile(r".*?layers\.\d+\.(?P<key>.+)")


def write_mlx(adapter: Adapter, folder: Path) -> Path:
    """Write ``adapter`` as mlx-lm does.

    Raises
    ------
    InputError
        An embedding has a name that mlx-lm's models do not give one, or only some modules are
        DoRA's.
    UnsupportedMethodError
        An update needs more than MLX can say.
    """
    from safetensors.numpy import save

    updates = writable(adapter, _FORMAT, variants=(DORA,))
    dora = _is_dora(updates.values(), adapter.label)
    scale = one_scale(updates)
    factors = with_experts_stacked(folded(updates, lambda _update: scale), _FORMAT)
    rank = max(one.rank for one in factors.values())
    tensors: dict[str, NDArray[np.float32]] = {}
    names = {name: _mlx_name(name, one) for name, one in factors.items()}
    for name, one in factors.items():
        tensors |= _module_tensors(names[name], _filled(one, rank))
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
    stated = f"{json.dumps(config, indent=4)}\n".encode()
    weights = save(tensors, metadata={"format": "mlx"})
    write_together({folder / WEIGHTS_NAME: weights, folder / CONFIG_NAME: stated})
    return folder


def mlx_notes(adapter: Adapter) -> list[str]:
    """Return what was folded or filled up."""
    updates = writable(adapter, _FORMAT, variants=(DORA,))
    ranks = {update.rank for update in updates.values()}
    filled = sum(update.rank != max(ranks) for update in updates.values())
    notes = folding_note(updates, _FORMAT, "scale")
    if filled:
        notes.append(
            f"MLX has one rank for all modules: {filled} of {len(updates)} are filled up with "
            f"zeros to rank {max(ranks)}. ΔW is the same."
        )
    return notes


def _is_dora(updates: Iterable[LowRankUpdate], label: str) -> bool:
    kinds = {update.variant == DORA for update in updates}
    if len(kinds) > 1 or any(u.layout == "embedding" and u.variant for u in updates):
        message = f"{label} is DoRA in some modules only or in an embedding; MLX cannot say that."
        raise InputError(message)
    return kinds.pop()


def _mlx_name(name: str, one: Factors) -> str:
    """Return mlx-lm's name of a module; refuse one that it would take for another kind."""
    if one.a.ndim == 3:
        name = name.replace(".experts.", SWITCH)
    if (one.layout == "embedding") != is_embedding(name):
        message = (
            f"'{name}' is of layout '{one.layout}', and its name says otherwise to who reads MLX "
            "files. It is not written."
        )
        raise InputError(message)
    return name


def _key(name: str) -> str:
    """Return the name inside a layer, by which mlx-lm finds what to adapt, or the whole one."""
    match = _LAYER.fullmatch(name)
    return match["key"] if match else name


def _filled(one: Factors, rank: int) -> Factors:
    lacking = rank - one.rank
    if not lacking:
        return one
    stack = [(0, 0)] * (one.a.ndim - 2)
    a: Any = np.pad(one.a, [*stack, (0, lacking), (0, 0)])
    b: Any = np.pad(one.b, [*stack, (0, 0), (0, lacking)])
    return Factors(a, b, one.layout, one.norms)


def _module_tensors(name: str, one: Factors) -> dict[str, NDArray[np.float32]]:
    if one.a.ndim == 3:  # experts lie as they are, all else transposed
        return {f"{name}.lora_a": one.a, f"{name}.lora_b": one.b}
    a, b = (np.ascontiguousarray(factor.T) for factor in (one.a, one.b))
    norms = {} if one.norms is None else {f"{name}.m": one.norms}
    return {f"{name}.lora_a": a, f"{name}.lora_b": b, **norms}
