"""FLUX files under the names of its authors' code: XLabs, ai-toolkit, and the control LoRAs.

XLabs names processors, ``double_blocks.0.processor.qkv_lora1.down.weight``; 1 is the image's
stream and 2 the text's. ai-toolkit and others put ``diffusion_model.`` before the layers' names
and PEFT's ``lora_A`` after them, the control LoRAs nothing before them. None of the three has an
alpha: their code multiplies by 1. An ``alpha`` tensor next to the factors counts.

A file is written as ComfyUI and ai-toolkit name the layers, with an ``alpha`` if the scale is not
1, and LyCORIS' ``dora_scale``. Modules keep the spelling that their file had: kohya's for text
encoders, XLabs' for a file of its processors, no prefix for control LoRAs.
Reference: x-flux ``src/flux/modules/layers.py``, diffusers 0.42 ``loaders/
lora_conversion_utils.py``, ai-toolkit ``toolkit/network_mixins.py``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import InputError
from lora_analysis.formats.diffusion import kohya
from lora_analysis.formats.diffusion.image_names import FLATTENED
from lora_analysis.formats.diffusion.image_scheme import complete_image
from lora_analysis.formats.diffusion.image_writing import image_file, planned_modules
from lora_analysis.formats.diffusion.kohya import FILE_NAME, PATH, kohya_tensors
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, StoredModules, has_factors
from lora_analysis.formats.side_tensors import side_output

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.build import AdapterParts
    from lora_analysis.storage.atomic import Content
    from lora_analysis.storage.tensors import NamedTensors

NAME: Final = "flux"

# XLabs' processor layers, and the layers of the base whose output they are added to. In a single
# block, linear1 makes q, k, v and the input of the MLP at once; qkv_lora adds to the first three.
_LAYERS: Final = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1.qkv",
    "proj_lora": "linear2",
}


# Key of the config of an adapter whose file names XLabs' processors.
PROCESSOR_KEYS: Final = "processor_keys"


def _of_processor(module: str) -> str:
    path, processor, layer = module.rpartition(".processor.")
    return f"{path}.{_LAYERS[layer]}" if processor and layer in _LAYERS else module


def processor_key(module: str) -> str | None:
    """Return the name of XLabs' processor layer for a layer of the base, None without one."""
    for processor, layer in _LAYERS.items():
        if module.endswith(f".{layer}"):
            return f"{module.removesuffix(f'.{layer}')}.processor.{processor}"
    return None


_XLABS: Final = KeyPattern(
    re.compile(
        r"(?P<module>(diffusion_model\.)?(double|single)_blocks\.\d+\.processor"
        r"\.(qkv|proj)_lora[12]?)\.(?P<role>down|up)\.weight"
    ),
    scale=1.0,
    reason="XLabs' format has none, its scale is 1",
    rename=_of_processor,
)
_PREFIXED: Final = KeyPattern(
    # OneTrainer's files for ComfyUI hold text encoders too, as ComfyUI names these.
    re.compile(
        r"(?P<module>(diffusion_model|text_encoders)\..+)\.lora_(?P<role>[AB])(\.[^.]+)?\.weight"
    ),
    scale=1.0,
    reason="ai-toolkit's format has none, its scale is 1; a conversion may have lost it",
)
# Layers of the model without a prefix.
BARE: Final = re.compile(
    r"(double|single)_blocks\.\d+\..+|(img|txt|time|vector|guidance)_in(\..+)?|final_layer\..+"
)
_BARE: Final = KeyPattern(
    re.compile(rf"(?P<module>{BARE.pattern})\.lora_(?P<role>[AB])(\.[^.]+)?\.weight"),
    scale=1.0,
    reason="FLUX's control LoRAs have none, their scale is 1",
)
# Whatever else lies in a file of these: it is not left out.
_OTHERS: Final = KeyPattern(
    re.compile(r"(?P<module>.+)\.lora_(?P<role>[AB])(\.[^.]+)?\.weight"),
    scale=1.0,
    reason=_PREFIXED.reason,
)
KEYS: Final = (_XLABS, _PREFIXED, _BARE, *kohya.KEYS, _OTHERS)


def _is_marked(tensors: NamedTensors) -> bool:
    blocks = any(re.match(r"(double|single)_blocks\.\d+\.", key) for key in tensors.infos)
    return has_factors(tensors.infos, (_XLABS, _PREFIXED, *([_BARE] if blocks else [])))


def _complete(stored: StoredModules) -> AdapterParts:
    has_processors = has_factors(stored.tensors.infos, [_XLABS])
    return complete_image(stored, config={PROCESSOR_KEYS: True} if has_processors else None)


FORMAT: Final = KeyScheme(NAME, KEYS, _complete, is_marked=_is_marked)


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
        if FLATTENED.fullmatch(module):
            name = module.replace(".", "_")
        elif not PATH.fullmatch(module) or _TEXT_ENCODER.fullmatch(module):
            message = f"'{module}' is not a module of a denoiser, which ComfyUI's keys name."
            raise InputError(message)
        elif _NAMED.fullmatch(module) or BARE.fullmatch(module):
            name = module
        else:
            denoiser = _DENOISER.fullmatch(module)
            name = f"diffusion_model.{denoiser['path'] if denoiser else module}"
        if name in names.values():
            message = f"Two modules would both be '{name}' in ComfyUI's keys."
            raise InputError(message)
        names[module] = name
    return names
