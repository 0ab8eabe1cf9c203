"""FLUX files under the names of its authors' code: XLabs, ai-toolkit, and the control LoRAs.

XLabs names processors, ``double_blocks.0.processor.qkv_lora1.down.weight``; 1 is the image's
stream and 2 the text's. ai-toolkit and others put ``diffusion_model.`` before the layers' names
and PEFT's ``lora_A`` after them, the control LoRAs nothing before them. None of the three has an
alpha: their code multiplies by 1. An ``alpha`` tensor, where one lies beside, counts.
Reference: x-flux ``src/flux/modules/layers.py``, diffusers 0.42 ``loaders/
lora_conversion_utils.py``, ai-toolkit ``toolkit/network_mixins.py``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.formats.diffusion import kohya
from lora_analysis.formats.diffusion.image_keys import Spelling, spelled
from lora_analysis.formats.diffusion.image_pairs import read_image_adapter
from lora_analysis.formats.sources import AdapterRef, ReadOptions, label_of, tensors_at
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.adapter import Adapter

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


_XLABS: Final = Spelling(
    re.compile(
        r"(?P<module>(diffusion_model\.)?(double|single)_blocks\.\d+\.processor"
        r"\.(qkv|proj)_lora[12]?)\.(?P<role>down|up)\.weight"
    ),
    default=1.0,
    reason="XLabs' format has none, its scale is 1",
    renamed=_of_processor,
)
_PREFIXED: Final = Spelling(
    # OneTrainer's files for ComfyUI hold text encoders too, as ComfyUI names these.
    re.compile(
        r"(?P<module>(diffusion_model|text_encoders)\..+)\.lora_(?P<role>[AB])(\.[^.]+)?\.weight"
    ),
    default=1.0,
    reason="ai-toolkit's format has none, its scale is 1; a conversion may have lost it",
)
# Layers of the model without a prefix.
BARE: Final = re.compile(
    r"(double|single)_blocks\.\d+\..+|(img|txt|time|vector|guidance)_in(\..+)?|final_layer\..+"
)
_BARE: Final = Spelling(
    re.compile(rf"(?P<module>{BARE.pattern})\.lora_(?P<role>[AB])(\.[^.]+)?\.weight"),
    default=1.0,
    reason="FLUX's control LoRAs have none, their scale is 1",
)
# Whatever else lies in a file of these: it is not left out.
_OTHERS: Final = Spelling(
    re.compile(r"(?P<module>.+)\.lora_(?P<role>[AB])(\.[^.]+)?\.weight"),
    default=1.0,
    reason=_PREFIXED.reason,
)
SPELLINGS: Final = (_XLABS, _PREFIXED, _BARE, *kohya.SPELLINGS, _OTHERS)


def recognizes(path: Path, options: ReadOptions) -> bool:
    """Say whether a file holds factors under one of these names."""
    tensors = None if options.pair else tensors_at(path, options)
    if tensors is None:
        return False
    blocks = any(re.match(r"(double|single)_blocks\.\d+\.", key) for key in tensors.infos)
    return spelled(tensors.infos, (_XLABS, _PREFIXED, *([_BARE] if blocks else [])))


def find(path: Path, options: ReadOptions) -> list[AdapterRef]:
    """Return the file, where it holds such factors."""
    return [AdapterRef(path, NAME, label_of(path))] if recognizes(path, options) else []


def read(path: Path, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG001 - unnamed
    """Read the file; it holds one adapter.

    Raises
    ------
    MalformedFileError
        A module has one factor only, or its factors do not fit.
    UnsupportedMethodError
        Another method's tensors lie beside the factors.
    """
    keys = open_tensors(path, allow_pickle=options.allow_pickle).infos
    config = {PROCESSOR_KEYS: True} if spelled(keys, (_XLABS,)) else None
    return read_image_adapter(path, options, format=NAME, spellings=SPELLINGS, config=config)
