"""Edit adapters: truncate them, remove directions, or approximate a full fine-tune by LoRA.

Pure functions on updates and adapters: each returns an ordinary adapter that every writer can
write and every metric can read. Nothing here reads or writes a file, and nothing evaluates the
edited model: that is up to the user.
"""

from lora_analysis.edit.budgets import error_by_parameters, ranks_within
from lora_analysis.edit.interventions import (
    drop_directions,
    keep_directions,
    noise_of_equal_norm,
    project_out,
    without_directions,
    without_subspace,
)
from lora_analysis.edit.resizing import ResizedAdapter, approximate_fine_tune, resize_adapter
from lora_analysis.edit.truncation import Truncation, relative_difference, truncate

__all__ = [
    "ResizedAdapter",
    "Truncation",
    "approximate_fine_tune",
    "drop_directions",
    "error_by_parameters",
    "keep_directions",
    "noise_of_equal_norm",
    "project_out",
    "ranks_within",
    "relative_difference",
    "resize_adapter",
    "truncate",
    "without_directions",
    "without_subspace",
]
