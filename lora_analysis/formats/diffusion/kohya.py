"""kohya-ss sd-scripts, and all who took over its keys: LyCORIS LoCon, OneTrainer, SimpleTuner.

``<module>.lora_down.weight`` is A, ``<module>.lora_up.weight`` B, ``<module>.alpha`` a number; the
scale is ``alpha/r``. A module's name is the one in the file: its path in the base with ``_`` for
``.`` after a prefix (``lora_unet_``, ``lora_te1_``), which cannot be undone without the base.
Most programs that run image models load such a file.
Reference: sd-scripts ``networks/lora.py`` and ``lora_flux.py``, LyCORIS 4.1 ``modules/locon.py``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import InputError
from lora_analysis.formats.diffusion.image_names import FLATTENED
from lora_analysis.formats.diffusion.image_scheme import complete_image
from lora_analysis.formats.diffusion.image_writing import PlannedModule, image_file, planned_modules
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme
from lora_analysis.formats.side_tensors import side_output
from lora_analysis.names import split_component, strip_wrappers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_analysis.adapter import Adapter
    from lora_analysis.storage.atomic import Content
    from lora_analysis.storage.tensor_writer import OutputTensor

NAME: Final = "kohya"

# Converters put their own prefix before a name that still began with the component's.
_DOUBLED: Final = {"lora_unet_unet_": "lora_unet_", "lora_te_text_encoder_": "lora_te_"}


def _flatten_name(module: str) -> str:
    """Return a module's name with one prefix, and underscores for the dots that were left."""
    for doubled, plain in _DOUBLED.items():
        if module.startswith(doubled):
            module = plain + module.removeprefix(doubled)
    return module.replace(".", "_") if FLATTENED.fullmatch(module) else module


KEYS: Final = (
    KeyPattern(
        # Some converters wrote underscores for all the dots, those of diffusers' keys too.
        re.compile(r"(?P<module>.+?)[._]lora(_linear_layer)?_(?P<role>down|up|mid)\.weight"),
        scale=1.0,
        reason="the format then takes alpha = r, a scale of 1; a conversion may have lost it",
        rename=_flatten_name,
        alpha_is_rank=True,
    ),
)
FORMAT: Final = KeyScheme(NAME, KEYS, complete_image)


# A file without a name of its own in a folder: the folder's name replaces the star.
FILE_NAME: Final = "*.safetensors"
# Component of a pipeline → prefix of its modules' names.
_PREFIXES: Final = {
    "": "lora_unet_",
    "denoiser_2": "lora_unet_2_",
    "prior": "lora_prior_unet_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
    "text_encoder_4": "lora_te4_",
}
# Names of the first text encoder that leave open whether there is a second one.
_FIRST_ENCODERS: Final = ("text_encoder.", "cond_stage_model.", "te.")
# Blocks as diffusers names them. ComfyUI looks for these under OneTrainer's prefix, for the names
# of a model's authors under "lora_unet_"; sd-scripts has only the authors' names.
_DIFFUSERS_BLOCKS: Final = re.compile(r"transformer\.(single_)?transformer_blocks\..+")
PATH: Final = re.compile(r"[\w.-]+")
"""A module's path in a model."""


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as sd-scripts' file, by its name; see :func:`lora_analysis.write_adapter`.

    Dots in a module's name become underscores after the prefix of its component; one without a
    component is the denoiser's (``lora_unet_``). Names that kohya's files gave are unchanged.
    """
    modules = planned_modules(adapter, NAME)
    names = flattened_names(modules)
    tensors = side_output(adapter, NAME)
    for module, plan in modules.items():
        tensors += kohya_tensors(adapter, plan, names[module])
    return image_file(adapter, NAME, FILE_NAME, modules.values(), tensors)


def kohya_tensors(adapter: Adapter, plan: PlannedModule, name: str) -> list[OutputTensor]:
    """Return the tensors of one module under kohya's keys.

    Raises
    ------
    InputError
        Its scale is 0, which loaders would read as 1.
    """
    if plan.alpha == 0:
        message = f"'{plan.name}' has scale 0, and kohya's loaders take an alpha of 0 for the rank."
        raise InputError(message)
    return plan.tensors(
        adapter,
        f"{name}.lora_down.weight",
        f"{name}.lora_up.weight",
        alpha=f"{name}.alpha",
        norms=f"{name}.dora_scale",
    )


def flattened_names(modules: Iterable[str]) -> dict[str, str]:
    """Return kohya's name of each module.

    Raises
    ------
    InputError
        Two modules would have one name, a name has a different meaning in kohya's keys, or a
        module belongs to a component that they do not have.
    """
    given = list(modules)
    second = any(split_component(module).component == "text_encoder_2" for module in given)
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for module in given:
        if FLATTENED.fullmatch(module):
            name = module.replace(".", "_")
        else:
            if not PATH.fullmatch(module):
                message = f"'{module}' is not a path of a module, from which kohya's keys are made."
                raise InputError(message)
            path = strip_wrappers(module)
            component, rest = split_component(path)
            if component not in _PREFIXES:
                message = (
                    f"'{module}' belongs to the component '{component}', for which kohya's keys "
                    "have no prefix. It is not written; diffusers and peft keep such names "
                    "(command line: --to)."
                )
                raise InputError(message)
            prefix = _PREFIXES[component]
            if _DIFFUSERS_BLOCKS.fullmatch(path):
                prefix = "lora_transformer_"
            if prefix == "lora_te_" and (second or not path.startswith(_FIRST_ENCODERS)):
                prefix = "lora_te1_"
            name = f"{prefix}{rest}".replace(".", "_")
        if taken.setdefault(name, module) != module:
            message = f"'{taken[name]}' and '{module}' would both be '{name}' in kohya's keys."
            raise InputError(message)
        if KEYS[0].match(f"{name}.lora_down.weight") != (name, "A"):
            message = f"'{module}' would be '{name}', which means something else in kohya's keys."
            raise InputError(message)
        names[module] = name
    return names
