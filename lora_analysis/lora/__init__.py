"""The trainable core: low-rank factors beside the frozen layers of any torch model.

What lives here: the adapted layer, which modules get one, merging, and the way from a model to an
:class:`~lora_analysis.adapter.Adapter` and back. What does not: files, data, training loops.
"""

from lora_analysis.lora.adapter_io import extract_adapter, initial_adapter, load_adapter_into
from lora_analysis.lora.kinds import ConvLoraLayer, EmbeddingLoraLayer
from lora_analysis.lora.layers import Conv1DLoraLayer, Factors, LoraLayer, initial_factor
from lora_analysis.lora.model import (
    MergeHandle,
    add_lora,
    merge_lora,
    parameter_counts,
    set_active,
    trainable_parameters,
    unmerge_lora,
)

__all__ = [
    "Conv1DLoraLayer",
    "ConvLoraLayer",
    "EmbeddingLoraLayer",
    "Factors",
    "LoraLayer",
    "MergeHandle",
    "add_lora",
    "extract_adapter",
    "initial_adapter",
    "initial_factor",
    "load_adapter_into",
    "merge_lora",
    "parameter_counts",
    "set_active",
    "trainable_parameters",
    "unmerge_lora",
]
