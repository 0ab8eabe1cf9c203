"""One file as diffusers saves it now: PEFT's keys, and the config of each component beside them."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.diffusion.diffusers import COMPONENT, METADATA_KEY, NAME
from lora_analysis.formats.diffusion.image_metadata import image_metadata
from lora_analysis.formats.diffusion.image_scheme import FACTOR_KEYS
from lora_analysis.formats.diffusion.image_writing import (
    PlannedModule,
    alpha_tensor,
    factor_tensors,
    norms_tensor,
    planned_modules,
)
from lora_analysis.formats.diffusion.kohya import FLATTENED
from lora_analysis.formats.diffusion.kohya_writer import PATH
from lora_analysis.formats.side_tensors import side_output, source_format
from lora_analysis.storage.tensor_writer import safetensors_content

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_analysis.adapter import Adapter
    from lora_analysis.storage.atomic import Content
    from lora_analysis.storage.tensor_writer import OutputTensor

FILE_NAME: Final = "pytorch_lora_weights.safetensors"
_BIAS: Final = re.compile(r"\.lora_B(\.[^.]+)?\.bias$")


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as diffusers' file, by its name; see :func:`lora_analysis.write_adapter`.

    Modules named after a component of a pipeline (``unet.``, ``transformer.``, ``text_encoder.``)
    make a file of ``save_lora_weights``; without any, one of ``save_lora_adapter`` for one model.
    """
    modules = planned_modules(adapter, NAME)
    tensors = side_output(adapter, NAME)
    biased = any(_BIAS.search(tensor.name) for tensor in tensors)
    earlier = _keys_of_earlier_eras(adapter, modules)
    for name, plan in modules.items():
        if name in earlier:
            tensors += _as_it_was(adapter, plan, *earlier[name])
        else:
            tensors += _module_tensors(adapter, plan, name)
    stated: dict[str, Any] = {}
    plain = {name: plan for name, plan in modules.items() if name not in earlier}
    for component, members in _components(plain).items():
        prefix = f"{component}." if component else ""
        config = _config(members, component) | ({"lora_bias": True} if biased else {})
        stated |= {f"{prefix}{key}": value for key, value in config.items()}
    text = json.dumps(stated, indent=2, sort_keys=True, allow_nan=False)
    metadata = {"format": "pt", **image_metadata(adapter, NAME, modules.values(), tensors)}
    if plain:
        metadata[METADATA_KEY] = text
    return {FILE_NAME: safetensors_content(tensors, metadata)}


def _keys_of_earlier_eras(
    adapter: Adapter, modules: Mapping[str, PlannedModule]
) -> dict[str, tuple[str, str, str | None]]:
    """Return the keys of modules that stay as their file of diffusers spelled them.

    Programs that load an earlier spelling do not all know PEFT's. It has no place for DoRA's norms,
    and for a scale only if there is an alpha; where a file states PEFT's config, that counts.
    """
    stored = adapter.config.get(FACTOR_KEYS, {})
    if source_format(adapter) != NAME or METADATA_KEY in adapter.provenance.metadata:
        return {}
    return {
        name: keys
        for name, keys in stored.items()
        if (plan := modules.get(name)) and plan.norms is None and (plan.scale == 1 or keys[2])
    }


def _as_it_was(
    adapter: Adapter, plan: PlannedModule, a: str, b: str, alpha: str | None
) -> list[OutputTensor]:
    """Return the tensors of a module under the keys of the file it was read from."""
    tensors = factor_tensors(adapter, plan, a, b)
    return [*tensors, alpha_tensor(alpha, plan.alpha)] if alpha else tensors


def _components(modules: Mapping[str, PlannedModule]) -> dict[str, dict[str, PlannedModule]]:
    """Return the modules by component and their names in it; all or none must name one."""
    components: dict[str, dict[str, PlannedModule]] = {}
    for module, plan in modules.items():
        match = COMPONENT.match(module)
        component = match[0] if match else ""
        components.setdefault(component, {})[module.removeprefix(f"{component}.")] = plan
    if "" in components and len(components) > 1:
        inside = next(module for module in modules if COMPONENT.match(module))
        outside = next(iter(components[""]))
        message = (
            f"'{inside}' names a component of a pipeline and '{outside}' none; a file of diffusers "
            "is for a pipeline or for one model."
        )
        raise InputError(message)
    return components


def _module_tensors(adapter: Adapter, plan: PlannedModule, name: str) -> list[OutputTensor]:
    if FLATTENED.fullmatch(name) or not PATH.fullmatch(name):
        message = f"'{name}' is no path of a module, by which diffusers finds the layer."
        raise InputError(message)
    tensors = factor_tensors(adapter, plan, f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    if plan.norms is None:
        return tensors
    if plan.magnitude_side == "input":
        message = (
            f"'{name}' is DoRA's with norms of input columns; diffusers knows those of rows alone. "
            "It is not written."
        )
        raise UnsupportedMethodError(message)
    rows = plan.shape[0]
    shape = (1, rows, *(1 for _ in plan.kernel)) if plan.kernel else (rows,)
    return [*tensors, norms_tensor(adapter, plan, f"{name}.lora_magnitude_vector", shape)]


def _config(modules: Mapping[str, PlannedModule], component: str) -> dict[str, Any]:
    """Return PEFT's config of one component; a module that differs has an anchored key."""
    kinds = {plan.norms is not None for plan in modules.values()}
    if len(kinds) > 1:
        message = f"DoRA in some modules of '{component}' only, which its config cannot say."
        raise InputError(message)
    rank, ranks = _default_and_pattern({name: plan.rank for name, plan in modules.items()})
    alpha, alphas = _default_and_pattern({n: _alpha(plan) for n, plan in modules.items()})
    return {
        "alpha_pattern": alphas,
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "target_modules": list(modules),
        "use_dora": kinds.pop(),
        "use_rslora": False,
    }


def _alpha(plan: PlannedModule) -> float:
    return int(plan.alpha) if plan.alpha == int(plan.alpha) else plan.alpha


def _default_and_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return the commonest value, and each other one under a key that matches its module alone."""
    default, _ = Counter(values.values()).most_common(1)[0]
    others = {name: value for name, value in values.items() if value != default}
    return default, {f"^{re.escape(name)}": value for name, value in others.items()}
