"""Every pair of many adapters at once.

`products` holds the updates of one module against each other, `walk` goes through the modules of
whole adapters. What a group has in common is in ``groups``.
"""

from lora_analysis.pairwise.alignment import MATCHING_CODES, align_adapters
from lora_analysis.pairwise.products import (
    ModulePairs,
    PairValues,
    module_pairs,
    pair_angles,
    pair_blocks,
    updates_start,
)
from lora_analysis.pairwise.walk import (
    PairwiseSimilarity,
    chosen_modules,
    pairwise,
    updates_of_one_shape,
)

__all__ = [
    "MATCHING_CODES",
    "ModulePairs",
    "PairValues",
    "PairwiseSimilarity",
    "align_adapters",
    "chosen_modules",
    "module_pairs",
    "pair_angles",
    "pair_blocks",
    "pairwise",
    "updates_of_one_shape",
    "updates_start",
]
