"""One file as diffusers saves it now: PEFT's keys, and the config of each component beside them."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError
from lora_analysis.formats.diffusers import COMPONENT, METADATA_KEY
from lora_analysis.formats.image_writing import exact_alpha, writable_updates
from lora_analysis.formats.kohya_writer import KOHYAS_NAME, PATH
from lora_analysis.formats.peft_pairs import DORA
from lora_analysis.formats.written import layer_shapes, layer_tensors
from lora_analysis.storage.tensor_writer import OutputTensor, safetensors_content

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_analysis.adapter import Adapter, UpdateOutline
    from lora_analysis.storage.atomic import Content

FILE_NAME: Final = "pytorch_lora_weights.safetensors"


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as diffusers' file, by its name; see :func:`lora_analysis.write_adapter`.

    Modules named after a component of a pipeline (``unet.``, ``transformer.``, ``text_encoder.``)
    make a file of ``save_lora_weights``; without any, one of ``save_lora_adapter`` for one model.
    """
    updates = writable_updates(adapter, "diffusers")
    tensors: list[OutputTensor] = []
    for module, update in updates.items():
        tensors += _module_tensors(adapter, module, update)
    stated: dict[str, Any] = {}
    for component, members in _components(updates).items():
        prefix = f"{component}." if component else ""
        stated |= {f"{prefix}{key}": value for key, value in _config(members, component).items()}
    text = json.dumps(stated, indent=2, sort_keys=True, allow_nan=False)
    return {FILE_NAME: safetensors_content(tensors, {"format": "pt", METADATA_KEY: text})}


def _components(updates: Mapping[str, UpdateOutline]) -> dict[str, dict[str, UpdateOutline]]:
    """Return the updates by component and their names in it; all or none must name one."""
    components: dict[str, dict[str, UpdateOutline]] = {}
    for module, update in updates.items():
        match = COMPONENT.match(module)
        component = match[0] if match else ""
        components.setdefault(component, {})[module.removeprefix(f"{component}.")] = update
    if "" in components and len(components) > 1:
        inside = next(module for module in updates if COMPONENT.match(module))
        outside = next(iter(components[""]))
        message = (
            f"'{inside}' names a component of a pipeline and '{outside}' none; a file of diffusers "
            "is for a pipeline or for one model."
        )
        raise InputError(message)
    return components


def _module_tensors(adapter: Adapter, name: str, update: UpdateOutline) -> list[OutputTensor]:
    if KOHYAS_NAME.fullmatch(name) or not PATH.fullmatch(name):
        message = f"'{name}' is no path of a module, by which diffusers finds the layer."
        raise InputError(message)
    a, b = layer_shapes(update)
    shapes = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    if update.has_magnitude:
        rows = update.shape[0]
        conv = update.layout == "conv"
        norms = (1, rows, *(1 for _ in update.kernel)) if conv else (rows,)
        shapes[f"{name}.lora_magnitude_vector"] = norms
    return layer_tensors(adapter, name, shapes)


def _config(updates: Mapping[str, UpdateOutline], component: str) -> dict[str, Any]:
    """Return PEFT's config of one component; a module that differs has an anchored key."""
    kinds = {update.variant == DORA for update in updates.values()}
    if len(kinds) > 1:
        message = f"DoRA in some modules of '{component}' only, which its config cannot say."
        raise InputError(message)
    rank, ranks = _default_and_pattern({name: u.rank for name, u in updates.items()})
    alpha, alphas = _default_and_pattern({name: _alpha(u) for name, u in updates.items()})
    return {
        "alpha_pattern": alphas,
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "target_modules": list(updates),
        "use_dora": kinds.pop(),
        "use_rslora": False,
    }


def _alpha(update: UpdateOutline) -> float:
    alpha = exact_alpha(update)
    return int(alpha) if alpha == int(alpha) else alpha


def _default_and_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return the commonest value, and each other one under a key that matches its module alone."""
    default, _ = Counter(values.values()).most_common(1)[0]
    others = {name: value for name, value in values.items() if value != default}
    return default, {f"^{re.escape(name)}": value for name, value in others.items()}
