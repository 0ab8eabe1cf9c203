"""One file under the names of a model's authors, as ComfyUI and ai-toolkit name its layers.

``diffusion_model.<path>.lora_A.weight`` and ``lora_B.weight``, with an ``alpha`` next to them if
the scale is not 1, and LyCORIS' ``dora_scale``. Modules keep the spelling that their file had:
kohya's for text encoders, XLabs' for a file of its processors, no prefix for control LoRAs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import InputError
from lora_analysis.formats.diffusion.flux import BARE, NAME, PROCESSOR_KEYS, processor_key
from lora_analysis.formats.diffusion.image_writing import image_file, planned_modules
from lora_analysis.formats.diffusion.kohya import FLATTENED
from lora_analysis.formats.diffusion.kohya_writer import FILE_NAME, PATH, kohya_tensors
from lora_analysis.formats.side_tensors import side_output

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_analysis.adapter import Adapter
    from lora_analysis.storage.atomic import Content

_NAMED: Final = re.compile(r"(diffusion_model|text_encoders)\..+")
_DENOISER: Final = re.compile(r"(transformer|unet)\.(?P<path>.+)")
_TEXT_ENCODER: Final = re.compile(r"(text_encoder(_\d)?|prior|transformer_2)\..+")


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as the file that ai-toolkit makes, by its name."""
    modules = planned_modules(adapter, NAME)
    names = authors_names(modules)
    if all(FLATTENED.fullmatch(name) for name in names.values()):
        message = (
            f"The modules of {adapter.label} have kohya's names, from which the paths in ComfyUI's "
            "keys cannot be recovered. Write it as kohya's (command line: --to kohya)."
        )
        raise InputError(message)
    processors = bool(adapter.config.get(PROCESSOR_KEYS))
    tensors = side_output(adapter, NAME)
    for module, plan in modules.items():
        name = names[module]
        if FLATTENED.fullmatch(name):
            tensors += kohya_tensors(adapter, plan, name)
            continue
        stem = processor_key(name) if processors else None
        a, b = ("down", "up") if stem else ("lora_A", "lora_B")
        stem = stem or name
        tensors += plan.tensors(
            adapter,
            f"{stem}.{a}.weight",
            f"{stem}.{b}.weight",
            alpha=f"{stem}.alpha" if plan.outline.scale != 1 else None,
            norms=f"{stem}.dora_scale",
        )
    return image_file(adapter, NAME, FILE_NAME, modules.values(), tensors)


def authors_names(modules: Iterable[str]) -> dict[str, str]:
    """Return the name of each module in such a file.

    Raises
    ------
    InputError
        Two modules would have one name, or a name is that of a text encoder in diffusers.
    """
    names: dict[str, str] = {}
    for module in modules:
        name = _authors_name(module)
        if name in names.values():
            message = f"Two modules would both be '{name}' in ComfyUI's keys."
            raise InputError(message)
        names[module] = name
    return names


def _authors_name(module: str) -> str:
    if FLATTENED.fullmatch(module):
        return module.replace(".", "_")
    if not PATH.fullmatch(module) or _TEXT_ENCODER.fullmatch(module):
        message = f"'{module}' is not a module of a denoiser, which ComfyUI's keys name."
        raise InputError(message)
    if _NAMED.fullmatch(module) or BARE.fullmatch(module):
        return module
    denoiser = _DENOISER.fullmatch(module)
    return f"diffusion_model.{denoiser['path'] if denoiser else module}"
