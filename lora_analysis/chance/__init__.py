"""What unrelated, isotropic directions give: the level every number is held against.

Isotropic chance means independent subspaces drawn uniformly (Haar). Real unrelated adapters of
one base agree more than that, so "above chance" means "not isotropic" and nothing more; a verdict
needs a reference (see ``studies``).
"""

from lora_analysis.chance.overlaps import (
    energy_overlap_mean,
    excess,
    similarity_grid_mean,
    similarity_mean,
    similarity_variance,
)
from lora_analysis.chance.projections import projected_norm_rms

__all__ = [
    "energy_overlap_mean",
    "excess",
    "projected_norm_rms",
    "similarity_grid_mean",
    "similarity_mean",
    "similarity_variance",
]
