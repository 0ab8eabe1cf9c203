"""One file under kohya's keys, which most programs that run image models load."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.formats.image_writing import exact_alpha, writable_updates
from lora_analysis.formats.kohya import SPELLINGS
from lora_analysis.formats.written import layer_shapes, layer_tensors
from lora_analysis.storage.tensor_writer import OutputTensor, output_array, safetensors_content

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, UpdateOutline
    from lora_analysis.storage.atomic import Content

# Of a file in a folder that has no name of its own: the folder's name takes the star's place.
FILE_NAME: Final = "*.safetensors"
_PREFIXES: Final = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
}
# A module's path in a model, and a name that kohya's keys made of one.
PATH: Final = re.compile(r"[\w.-]+")
KOHYAS_NAME: Final = re.compile(r"(lora_(unet|transformer|te[123]?)|lycoris)_\w+")


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as sd-scripts' file, by its name; see :func:`lora_analysis.write_adapter`.

    Dots in a module's name become underscores after the prefix of its component; one without a
    component is the denoiser's (``lora_unet_``). Names that kohya's files gave are kept.
    """
    updates = writable_updates(adapter, "kohya")
    names = flattened_names(updates)
    tensors: list[OutputTensor] = []
    for module, update in updates.items():
        tensors += _module_tensors(adapter, module, names[module], update)
    base = adapter.provenance.base_model
    metadata = {"format": "pt"} | ({"ss_base_model_version": base} if base else {})
    return {FILE_NAME: safetensors_content(tensors, metadata)}


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
    if KOHYAS_NAME.fullmatch(module):
        return module
    if not PATH.fullmatch(module):
        message = f"'{module}' is no path of a module, which kohya's keys are made from."
        raise InputError(message)
    component, _, rest = module.partition(".")
    prefix = _PREFIXES.get(component, "")
    if component == "text_encoder" and two_encoders:
        prefix = "lora_te1_"
    return (prefix + rest if prefix and rest else f"lora_unet_{module}").replace(".", "_")


def _module_tensors(
    adapter: Adapter, module: str, name: str, update: UpdateOutline
) -> list[OutputTensor]:
    a, b = layer_shapes(update)
    shapes = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    if update.has_magnitude:
        shapes[f"{name}.dora_scale"] = (update.shape[0], *(1 for _ in a[1:]))
    factors = layer_tensors(adapter, module, shapes)
    return [*factors, output_array(f"{name}.alpha", _alpha_tensor(update))]


def _alpha_tensor(update: UpdateOutline) -> NDArray[np.floating]:
    """Return alpha as float32 where that holds it exactly, as float64 where it does not."""
    alpha = exact_alpha(update)
    if alpha == 0:
        message = (
            f"'{update.name}' has scale 0, and kohya's loaders take an alpha of 0 for the rank."
        )
        raise InputError(message)
    with np.errstate(over="ignore", under="ignore"):
        narrow = np.array(alpha, np.float32)
    return narrow if float(narrow) == alpha else np.array(alpha, np.float64)
