"""A group of adapters as a whole: what its members have in common, and what merging them meets.

`bases` holds the directions that members share, with each member left out in turn; `merging`
describes how members add up; `totals` walks over whole adapters, module by module. `stacking` is
what these share: all directions of a module side by side, and their products. `shares` holds an
explained share beside its isotropic chance. Pairs are in ``pairwise``.
"""

from lora_analysis.groups.bases import SharedBasis, UnionSubspace, shared_basis, union_subspace
from lora_analysis.groups.merging import Interference, SubspaceAlignment, interference
from lora_analysis.groups.shares import Shares
from lora_analysis.groups.totals import GroupSimilarity, group_similarity

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
