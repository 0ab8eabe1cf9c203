"""The random baseline: what independent, isotropic directions give.

The random baseline means independent subspaces drawn uniformly (Haar). Real unrelated adapters of
one base are more alike than that: of 4,776 output-side comparisons of unrelated adapters 43 % have
p < .001 against random subspaces. A value above the baseline means "more alike than random" and no
more. A conclusion needs reference pairs (see ``studies``).

p-values that are computed from a distribution are numbers of at least `P_FLOOR` (1e-4); a value at
the floor is a bound (`p_is_bound`), written "< 1e-4" (`p_value_text`).
"""

from lora_analysis.chance.inference import (
    RankTest,
    benjamini_hochberg,
    holm,
    jackknife,
    monte_carlo_p_value,
    p_is_bound,
    rank_test,
)
from lora_analysis.chance.overlaps import (
    energy_overlap_mean,
    energy_overlap_p_value,
    energy_overlap_p_values,
    energy_overlap_quantile,
    energy_overlap_variance,
    excess,
    signed_cosine_p_value,
)
from lora_analysis.chance.permutation import (
    RunPermutation,
    permute_blocks,
    task_difference,
    task_difference_error,
)
from lora_analysis.chance.projections import (
    energy_p_value,
    enrichment_p_value,
    largest_cosine_median,
    one_sided_energy_p_value,
    one_sided_energy_quantile,
    one_sided_energy_variance,
    projected_energy_variance,
    projected_norm_rms,
)
from lora_analysis.chance.sampling import (
    energy_overlap_draws,
    enrichment_draws,
    signed_cosine_draws,
    similarity_draws,
)
from lora_analysis.chance.subspaces import (
    similarity_grid_mean,
    similarity_maximum,
    similarity_maximum_at,
    similarity_mean,
    similarity_null_method,
    similarity_p_value,
    similarity_quantile,
    similarity_variance,
    weaker_half_mean,
)
from lora_analysis.text import P_FLOOR, p_value_text

__all__ = [
    "P_FLOOR",
    "RankTest",
    "RunPermutation",
    "benjamini_hochberg",
    "energy_overlap_draws",
    "energy_overlap_mean",
    "energy_overlap_p_value",
    "energy_overlap_p_values",
    "energy_overlap_quantile",
    "energy_overlap_variance",
    "energy_p_value",
    "enrichment_draws",
    "enrichment_p_value",
    "excess",
    "holm",
    "jackknife",
    "largest_cosine_median",
    "monte_carlo_p_value",
    "one_sided_energy_p_value",
    "one_sided_energy_quantile",
    "one_sided_energy_variance",
    "p_is_bound",
    "p_value_text",
    "permute_blocks",
    "projected_energy_variance",
    "projected_norm_rms",
    "rank_test",
    "signed_cosine_draws",
    "signed_cosine_p_value",
    "similarity_draws",
    "similarity_grid_mean",
    "similarity_maximum",
    "similarity_maximum_at",
    "similarity_mean",
    "similarity_null_method",
    "similarity_p_value",
    "similarity_quantile",
    "similarity_variance",
    "task_difference",
    "task_difference_error",
    "weaker_half_mean",
]
