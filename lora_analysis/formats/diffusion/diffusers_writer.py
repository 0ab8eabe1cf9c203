"""One file as diffusers saves it now: PEFT's keys, and the config of each component as metadata."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError
from lora_analysis.formats.diffusion.diffusers import COMPONENT, METADATA_KEY, NAME
from lora_analysis.formats.diffusion.image_names import FLATTENED
from lora_analysis.formats.diffusion.image_scheme import FACTOR_KEYS
from lora_analysis.formats.diffusion.image_writing import PlannedModule, image_file, planned_modules
from lora_analysis.formats.diffusion.kohya import PATH
from lora_analysis.formats.side_tensors import side_output, source_format
from lora_analysis.formats.written import default_and_others, is_dora, json_number

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
    modules = planned_modules(adapter, NAME, input_norms=False)
    tensors = side_output(adapter, NAME)
    has_bias = any(_BIAS.search(tensor.name) for tensor in tensors)
    earlier = _keys_of_earlier_eras(adapter, modules)
    for name, plan in modules.items():
        if name in earlier:
            a, b, alpha = earlier[name]
            tensors += plan.tensors(adapter, a, b, alpha=alpha)
        else:
            tensors += _module_tensors(adapter, plan, name)
    fields: dict[str, Any] = {}
    plain = {name: plan for name, plan in modules.items() if name not in earlier}
    for component, members in _components(plain).items():
        prefix = f"{component}." if component else ""
        config = _config(members, component) | ({"lora_bias": True} if has_bias else {})
        fields |= {f"{prefix}{key}": value for key, value in config.items()}
    text = json.dumps(fields, indent=2, sort_keys=True, allow_nan=False)
    more = {METADATA_KEY: text} if plain else {}
    return image_file(adapter, NAME, FILE_NAME, modules.values(), tensors, more=more)


def _keys_of_earlier_eras(
    adapter: Adapter, modules: Mapping[str, PlannedModule]
) -> dict[str, tuple[str, str, str | None]]:
    """Return the keys of modules that stay as their file of diffusers spelled them.

    Not all programs that load an earlier spelling load PEFT's. It has no key for DoRA's norms, and
    stores a scale only with an alpha; if a file states PEFT's config, that counts.
    """
    stored = adapter.config.get(FACTOR_KEYS, {})
    if source_format(adapter) != NAME or METADATA_KEY in adapter.provenance.metadata:
        return {}
    return {
        name: keys
        for name, keys in stored.items()
        if name in modules
        and not (outline := modules[name].outline).has_magnitude
        and (outline.scale == 1 or keys[2])
    }


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
            f"'{inside}' names a component of a pipeline and '{outside}' does not; a file of "
            "diffusers is for a pipeline or for one model."
        )
        raise InputError(message)
    return components


def _module_tensors(adapter: Adapter, plan: PlannedModule, name: str) -> list[OutputTensor]:
    if FLATTENED.fullmatch(name) or not PATH.fullmatch(name):
        message = f"'{name}' is not a path of a module, by which diffusers finds the layer."
        raise InputError(message)
    return plan.tensors(
        adapter,
        f"{name}.lora_A.weight",
        f"{name}.lora_B.weight",
        norms=f"{name}.lora_magnitude_vector",
        peft_norms=True,
    )


def _config(modules: Mapping[str, PlannedModule], component: str) -> dict[str, Any]:
    """Return PEFT's config of one component; a module that differs has an anchored key."""
    dora = is_dora((p.outline for p in modules.values()), f"'{component or 'the model'}'", NAME)
    rank, ranks = default_and_others({name: p.outline.rank for name, p in modules.items()})
    alpha, alphas = default_and_others({name: json_number(p.alpha) for name, p in modules.items()})
    return {
        "alpha_pattern": _anchored(alphas),
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _anchored(ranks),
        "target_modules": list(modules),
        "use_dora": dora,
        "use_rslora": False,
    }


def _anchored(values: Mapping[str, float]) -> dict[str, float]:
    """Return values under patterns that match one module each."""
    return {f"^{re.escape(name)}": value for name, value in values.items()}
