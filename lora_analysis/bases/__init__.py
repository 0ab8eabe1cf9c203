"""Frozen base weights: which tensor belongs to a module, how it lies, and its values in blocks.

Nothing above this folder knows where W is stored or which way round; nothing in it knows an
adapter's format. A base is a safetensors, torch or GGUF file or a folder with one, plain or
quantized, a live ``torch.nn.Module`` (torch is not imported for it), or a mapping of arrays.
"""

from lora_analysis.bases.differences import read_fine_tune
from lora_analysis.bases.fit import check_experts
from lora_analysis.bases.opening import open_base
from lora_analysis.bases.weights import BaseWeights, Weight

__all__ = ["BaseWeights", "Weight", "check_experts", "open_base", "read_fine_tune"]
