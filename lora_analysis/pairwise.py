"""All pairs of many adapters, or of many updates of one module, as arrays.

`Study.group_analysis` analyzes a group as a whole; tables with conclusions come from ``studies``.
"""

from lora_analysis.studies.all_pairs import PairwiseSimilarity, pairwise
from lora_analysis.studies.module_walk import MATCHING_CODES, align_adapters
from lora_analysis.studies.pair_products import (
    ModulePairs,
    PairValues,
    module_pairs,
    pair_angles,
    pair_blocks,
)

__all__ = [
    "MATCHING_CODES",
    "ModulePairs",
    "PairValues",
    "PairwiseSimilarity",
    "align_adapters",
    "module_pairs",
    "pair_angles",
    "pair_blocks",
    "pairwise",
]
