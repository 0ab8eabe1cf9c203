"""Which findings a reader sees first: few boxes by severity, findings of one code in one box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lora_analysis.finding import Finding, Severity

MOST_BOXES: Final = 15
SEVERITIES: Final[tuple[Severity, ...]] = ("damage", "result", "artifact", "limit")
# Their numbers are rows of a table, or points of a figure, of every report.
_IN_TABLES: Final = frozenset(
    [
        "more-alike", "not-distinguishable", "more-alike-than-random",
        "not-distinguishable-from-random", "too-few-runs", "near-duplicate-pair", "inconclusive",
        "single-tasks", "overlap-of-ranks", "reference-pairs", "checkpoints",
        "directions-by-energy", "accuracy", "amplification",
    ]
)  # fmt: skip
# Most important first within a severity; others follow in the order of the rules.
_ORDER: Final = (
    "trained-differently", "too-few-references", "group-mean", "group-subspace", "group-nothing",
    "group-undecided", "enrichment-specific",
    "enrichment-not-specific", "amplification-at-equal-k",
    "diverged", "conflicting-labels", "started-from-base", "near-duplicates", "negated-copies",
    "contained", "same-run", "gradients-alike", "shared-seed", "shared-initialization",
    "same-input-space", "partly-shared-initialization", "not-analyzed", "untrained-adapter",
    "no-reference-pairs", "enrichment-untested", "several-bases", "base-not-known-same",
    "different-base", "base-name-differs", "unknown-task-or-seed", "modules-left-out",
    "pairs-left-out", "no-common-module", "different-shapes", "no-base-weight", "quantized-base",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FindingBox:
    """The findings of one code and severity."""

    code: str
    severity: Severity
    findings: tuple[Finding, ...]


def finding_boxes(
    findings: Sequence[Finding],
) -> tuple[tuple[FindingBox, ...], tuple[Finding, ...]]:
    """Return the boxes by severity, most important first, and the findings that are in none.

    Findings whose numbers stand in a table of the report get no box. If there are more than
    `MOST_BOXES`, the last ones of the severity with most boxes are left out.
    """
    groups: dict[tuple[Severity, str], list[Finding]] = {}
    for finding in findings:
        if finding.code not in _IN_TABLES:
            groups.setdefault((finding.severity, finding.code), []).append(finding)
    boxes = {
        severity: sorted(
            (
                FindingBox(code, severity, tuple(group))
                for (of_group, code), group in groups.items()
                if of_group == severity
            ),
            key=lambda box: _ORDER.index(box.code) if box.code in _ORDER else len(_ORDER),
        )
        for severity in SEVERITIES
    }
    while sum(map(len, boxes.values())) > MOST_BOXES:
        # Of damage, twice as many as of the others.
        boxes[max(SEVERITIES, key=lambda name: len(boxes[name]) / (1 + (name == "damage")))].pop()
    chosen = tuple(box for severity in SEVERITIES for box in boxes[severity])
    in_boxes = {id(finding) for box in chosen for finding in box.findings}
    return chosen, tuple(finding for finding in findings if id(finding) not in in_boxes)
