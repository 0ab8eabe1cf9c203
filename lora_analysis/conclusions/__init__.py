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
    adapter_findings.report_failures,
    adapter_findings.report_damaged_files,
    partial(weight_findings.report_base_notes, damage=True),
    adapter_findings.report_untrained,
    adapter_findings.report_diverged,
    adapter_findings.report_base_models,
    adapter_findings.report_unknown_tasks,
    adapter_findings.report_sampled_pairs,
    adapter_findings.report_incomparable_pairs,
    initialization_findings.report_init_classes,
    initialization_findings.report_shared_seeds,
    initialization_findings.report_degenerate_directions,
    partial(adapter_findings.report_file_notes, severities=("artifact",)),
    comparison_findings.report_comparisons,
    comparison_findings.report_refused_references,
    comparison_findings.report_reference_pairs,
    comparison_findings.report_largest_overlaps,
    comparison_findings.report_left_out_pairs,
    comparison_findings.report_left_out_modules,
    comparison_findings.report_checkpoints,
    weight_findings.report_missing_weights,
    partial(weight_findings.report_base_notes, damage=False),
    weight_findings.report_different_base,
    weight_findings.report_quantized_base,
    weight_findings.report_amplifications,
    weight_findings.report_enrichment_controls,
    weight_findings.report_directions_by_energy,
    weight_findings.report_accuracies,
    partial(adapter_findings.report_file_notes, severities=("limit", "result")),
)


def findings(study: Study) -> tuple[Finding, ...]:
    """Return all findings of a study; artifacts stand before the results they bear on."""
    return tuple(finding for rule in _RULES for finding in rule(study))


def summary(study: Study) -> tuple[SummaryLine, ...]:
    """Summarize a study in at most five sentences, the lines a report begins with.

    Each prints as its sentence and names the section of the report that has the numbers.
    """
    return summary_lines.summary(study, comparisons(study), findings(study))
