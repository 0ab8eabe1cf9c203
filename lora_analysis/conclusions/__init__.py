"""The rules that turn a study's numbers into findings; codes and sentences are in `finding`.

Which pairs and modules count is decided once, in ``studies.pair_classes`` and
``studies.pair_tables``; what is concluded from them in `comparison_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from lora_analysis.conclusions import (
    adapter_findings,
    comparison_findings,
    initialization_findings,
    summary_lines,
    weight_findings,
)
from lora_analysis.conclusions.comparison_findings import comparison_fields
from lora_analysis.conclusions.comparison_rules import comparisons
from lora_analysis.conclusions.comparison_values import Comparison, Conclusion, Level, Reason
from lora_analysis.conclusions.summary_lines import SummaryLine
from lora_analysis.finding import Finding
from lora_analysis.studies import Study

__all__ = [
    "Comparison",
    "Conclusion",
    "Finding",
    "Level",
    "Reason",
    "SummaryLine",
    "comparison_fields",
    "comparisons",
    "findings",
    "summary",
]

_RULES: tuple[Callable[[Study], Iterator[Finding]], ...] = (
    adapter_findings.failures,
    adapter_findings.damaged_files,
    partial(weight_findings.base_notes, damage=True),
    adapter_findings.untrained,
    adapter_findings.diverged,
    adapter_findings.base_models,
    adapter_findings.unknown_tasks,
    adapter_findings.sampled_pairs,
    adapter_findings.incomparable_pairs,
    initialization_findings.classes,
    initialization_findings.shared_seeds,
    initialization_findings.degenerate_directions,
    partial(adapter_findings.file_notes, severities=("artifact",)),
    comparison_findings.compared,
    comparison_findings.refused,
    comparison_findings.reference_pairs,
    comparison_findings.largest_overlaps,
    comparison_findings.left_out_pairs,
    comparison_findings.left_out_modules,
    comparison_findings.checkpoints,
    weight_findings.missing_weights,
    partial(weight_findings.base_notes, damage=False),
    weight_findings.different_base,
    weight_findings.quantized_base,
    weight_findings.amplifications,
    weight_findings.enrichment_controls,
    weight_findings.directions_by_energy,
    weight_findings.accuracies,
    partial(adapter_findings.file_notes, severities=("limit", "result")),
)


def findings(study: Study) -> tuple[Finding, ...]:
    """Return all findings of a study; artifacts stand before the results they bear on."""
    return tuple(finding for rule in _RULES for finding in rule(study))


def summary(study: Study) -> tuple[SummaryLine, ...]:
    """Summarize a study in at most five sentences, the lines a report begins with.

    Each prints as its sentence and names the section of the report that has the numbers.
    """
    return summary_lines.summary(study, comparisons(study), findings(study))
