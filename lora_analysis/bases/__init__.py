"""Frozen base weights: the tensor of a module, its orientation, and its values in blocks.

Nothing above this folder depends on where or in which orientation W is stored; nothing in it
depends on an adapter's format. A base is a safetensors, torch or GGUF file or a folder with one,
plain or quantized, a live ``torch.nn.Module`` (torch is not imported for it), or a mapping of
arrays.
"""

from lora_analysis.bases.base_weights import BaseWeights
from lora_analysis.bases.fine_tunes import read_fine_tune
from lora_analysis.bases.locating import check_experts
from lora_analysis.bases.memory_source import as_weight
from lora_analysis.bases.opening import as_base, open_base
from lora_analysis.bases.weight import Weight

__all__ = [
    "BaseWeights",
    "Weight",
    "as_base",
    "as_weight",
    "check_experts",
    "open_base",
    "read_fine_tune",
]
