"""The trainable core: low-rank factors added to the frozen layers of any torch model.

`core` is the method itself. Next to it: other kinds of layers, the choice of modules, and the
conversion of a model's adapter to an :class:`~lora_analysis.adapter.Adapter` and back. Files, data
and training loops are elsewhere.
"""

from lora_analysis.lora.adapter_io import extract_adapter, initial_adapter, load_adapter_into
from lora_analysis.lora.core import (
    LoraFactors,
    LoraLayer,
    MergeHandle,
    initial_factor,
    merge_lora,
    parameter_counts,
    set_active,
    trainable_parameters,
    unmerge_lora,
)
from lora_analysis.lora.layer_kinds import Conv1DLoraLayer, ConvLoraLayer, EmbeddingLoraLayer
from lora_analysis.lora.new_adapter import add_lora

__all__ = [
    "Conv1DLoraLayer",
    "ConvLoraLayer",
    "EmbeddingLoraLayer",
    "LoraFactors",
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
