"""Group analysis: what N adapters have in common, and how they interfere when merged.

`common_directions` computes shared bases and unions of subspaces with each member left out in turn,
`merging` the interference of members, `adapter_groups` both for whole adapters, module by module.
`stacking` has the directions of all members and their products, `shares` an explained share with
its random baseline. Pairs are compared in ``pairwise``.
"""

from lora_analysis.groups.adapter_groups import GroupSimilarity, group_similarity
from lora_analysis.groups.common_directions import (
    SharedBasis,
    UnionSubspace,
    shared_basis,
    union_subspace,
)
from lora_analysis.groups.merging import Interference, SubspaceAlignment, interference
from lora_analysis.groups.shares import Shares

__all__ = [
    "GroupSimilarity",
    "Interference",
    "SharedBasis",
    "Shares",
    "SubspaceAlignment",
    "UnionSubspace",
    "group_similarity",
    "interference",
    "shared_basis",
    "union_subspace",
]
