"""The rules that turn a study's numbers into findings; codes and sentences are in `finding`.

Medians over modules lead, pairs of adapters are the unit, and a conclusion is made against
reference pairs (adapters of different tasks with different seeds on the same modules), never
against the random baseline: unrelated adapters exceed that too. Degenerate directions, and input
sides with a shared initialization, are excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lora_analysis.conclusions import (
    adapter_findings,
    initialization_findings,
    overlap_findings,
    run_findings,
    weight_findings,
)
from lora_analysis.conclusions.overlap_summaries import (
    Conclusion,
    OverlapSummary,
    summarize_overlaps,
)
from lora_analysis.finding import Finding
from lora_analysis.studies import Study

__all__ = ["Conclusion", "Finding", "OverlapSummary", "findings", "summarize_overlaps"]

_RULES: tuple[Callable[[Study], Iterator[Finding]], ...] = (
    adapter_findings.failures,
    adapter_findings.damaged_files,
    weight_findings.damaged_base,
    adapter_findings.untrained,
    adapter_findings.diverged,
    adapter_findings.base_models,
    adapter_findings.unknown_tasks,
    adapter_findings.sampled_adapters,
    adapter_findings.incomparable_pairs,
    adapter_findings.near_duplicates,
    initialization_findings.shared_initializations,
    initialization_findings.shared_seeds,
    initialization_findings.degenerate_directions,
    adapter_findings.file_artifacts,
    adapter_findings.few_seeds,
    overlap_findings.reference_pairs,
    overlap_findings.overlaps,
    run_findings.run_comparisons,
    overlap_findings.largest_overlaps,
    run_findings.checkpoints,
    weight_findings.missing_weights,
    weight_findings.unusual_base,
    weight_findings.different_base,
    weight_findings.quantized_base,
    weight_findings.amplifications,
    weight_findings.enrichment_controls,
    weight_findings.directions_by_energy,
    weight_findings.accuracies,
    adapter_findings.file_notes,
)


def findings(study: Study) -> tuple[Finding, ...]:
    """Return all findings of a study; artifacts stand before the results they bear on."""
    return tuple(finding for rule in _RULES for finding in rule(study))
