"""One file under kohya's keys, which most programs that run image models load."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import InputError
from lora_analysis.formats.image_metadata import image_metadata
from lora_analysis.formats.image_writing import (
    PlannedModule,
    alpha_tensor,
    factor_tensors,
    norms_tensor,
    planned_modules,
)
from lora_analysis.formats.kohya import FLATTENED, NAME, SPELLINGS
from lora_analysis.formats.side_tensors import side_output
from lora_analysis.storage.tensor_writer import safetensors_content

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_analysis.adapter import Adapter
    from lora_analysis.storage.atomic import Content
    from lora_analysis.storage.tensor_writer import OutputTensor

# Of a file in a folder that has no name of its own: the folder's name takes the star's place.
FILE_NAME: Final = "*.safetensors"
# Component of a pipeline → prefix of its modules' names. Where the path of a module in ComfyUI's
# model starts otherwise, the longer one counts.
_PREFIXES: Final = {
    "unet": "lora_unet_",
    "diffusion_model": "lora_unet_",
    "transformer": "lora_unet_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
    "text_encoders.clip_l.transformer": "lora_te1_",
    "text_encoders.clip_g.transformer": "lora_te2_",
    "text_encoders.t5xxl.transformer": "lora_te3_",
}
# Blocks as diffusers names them. ComfyUI looks for these under OneTrainer's prefix, for the names
# of a model's authors under "lora_unet_"; sd-scripts knows the authors' names alone.
_DIFFUSERS_BLOCKS: Final = re.compile(r"transformer\.(single_)?transformer_blocks\..+")
PATH: Final = re.compile(r"[\w.-]+")
"""A module's path in a model."""


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as sd-scripts' file, by its name; see :func:`lora_analysis.write_adapter`.

    Dots in a module's name become underscores after the prefix of its component; one without a
    component is the denoiser's (``lora_unet_``). Names that kohya's files gave are kept.
    """
    modules = planned_modules(adapter, NAME)
    names = flattened_names(modules)
    tensors = side_output(adapter, NAME)
    for module, plan in modules.items():
        tensors += module_tensors(adapter, plan, names[module])
    metadata = image_metadata(adapter, NAME, modules.values(), tensors)
    return {FILE_NAME: safetensors_content(tensors, {"format": "pt", **metadata})}


def module_tensors(adapter: Adapter, plan: PlannedModule, name: str) -> list[OutputTensor]:
    """Return the tensors of one module under kohya's keys.

    Raises
    ------
    InputError
        Its scale is 0, which loaders would read as 1.
    """
    if plan.alpha == 0:
        message = f"'{plan.name}' has scale 0, and kohya's loaders take an alpha of 0 for the rank."
        raise InputError(message)
    tensors = factor_tensors(adapter, plan, f"{name}.lora_down.weight", f"{name}.lora_up.weight")
    tensors.append(alpha_tensor(f"{name}.alpha", plan.alpha))
    if plan.norms:
        tensors.append(norms_tensor(adapter, plan, f"{name}.dora_scale", plan.norms))
    return tensors


def flattened_names(modules: Iterable[str]) -> dict[str, str]:
    """Return kohya's name of each module.

    Raises
    ------
    InputError
        Two modules would have one name, or a name has a meaning of its own in kohya's keys.
    """
    given = list(modules)
    second = any(module.startswith("text_encoder_2.") for module in given)
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for module in given:
        name = _flattened(module, two_encoders=second)
        if taken.setdefault(name, module) != module:
            message = f"'{taken[name]}' and '{module}' would both be '{name}' in kohya's keys."
            raise InputError(message)
        if SPELLINGS[0].factor(f"{name}.lora_down.weight") != (name, "A"):
            message = f"'{module}' would be '{name}', which means something else in kohya's keys."
            raise InputError(message)
        names[module] = name
    return names


def _flattened(module: str, *, two_encoders: bool) -> str:
    if FLATTENED.fullmatch(module):
        return module.replace(".", "_")
    if not PATH.fullmatch(module):
        message = f"'{module}' is no path of a module, which kohya's keys are made from."
        raise InputError(message)
    prefix, rest = "lora_unet_", module
    for component in sorted(_PREFIXES, key=len, reverse=True):
        if module.startswith(f"{component}."):
            prefix, rest = _PREFIXES[component], module.removeprefix(f"{component}.")
            break
    if _DIFFUSERS_BLOCKS.fullmatch(module):
        prefix = "lora_transformer_"
    if two_encoders and prefix == "lora_te_":
        prefix = "lora_te1_"
    return f"{prefix}{rest}".replace(".", "_")
