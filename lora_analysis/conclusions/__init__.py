"""Plain sentences made from a study's numbers.

Each sentence carries its value, its reference and its chance. Medians over modules lead, pairs of
adapters are the unit, and a verdict is made against a reference (adapters of other tasks with
other seeds on the same modules), never against isotropic chance: unrelated adapters exceed that
too. Cells whose direction is ill defined, and input sides that share their start, do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lora_analysis.conclusions import groups, notes, overlaps, runs, unjudged, weights
from lora_analysis.conclusions.levels import Finding, Level, level, number
from lora_analysis.studies import Study
from lora_analysis.text import plural

__all__ = ["Finding", "Level", "findings", "level", "number", "plural"]

_MAKERS: tuple[Callable[[Study], Iterator[Finding]], ...] = (
    notes.failures,
    notes.damaged,
    weights.damaged_base,
    notes.untrained,
    groups.diverged,
    runs.bases,
    runs.ungrouped,
    runs.chosen,
    notes.mismatched,
    groups.duplicates,
    notes.starts,
    overlaps.shared_seed,
    groups.degenerate,
    notes.file_artifacts,
    notes.few_runs,
    overlaps.reference,
    unjudged.comparisons,
    runs.inference,
    runs.largest,
    runs.trajectories,
    notes.unmatched,
    weights.unusual_base,
    weights.other_base,
    weights.quantized,
    weights.amplified,
    weights.energy,
    weights.accuracy,
    notes.file_notes,
)


def findings(study: Study) -> tuple[Finding, ...]:
    """Return everything the study can say in words; artifacts stand before what they touch."""
    return tuple(finding for maker in _MAKERS for finding in maker(study))
