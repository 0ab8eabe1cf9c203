"""What a reader sees first: the lines with which a report begins, and the boxes of findings.

At most five lines, each with one number and where it is from, in this order: whether tasks differ
(or what two adapters are), by how much, what ranks add, what is damage or an artifact, and what
cannot be said. Few boxes by severity, findings of one code in one box.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from lora_analysis.conclusions.comparison_values import TASKS_DIFFER, Comparison, Conclusion, Reason
from lora_analysis.conclusions.weight_findings import spectra_by_rank
from lora_analysis.finding import Finding, Severity
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies.pair_classes import ONE_SAMPLE, PairClass, have_conflicting_tasks

if TYPE_CHECKING:
    from lora_analysis.studies import Study


MOST_LINES: Final = 5
_OF_UNREAD_LABELS: Final = "unknown-task-or-seed"

SectionName = Literal["alike", "ranks", "tasks", "layers", "weights", "modules", "limits"]


@dataclass(frozen=True, slots=True)
class SummaryLine:
    """One line: a finding, and the section of the report with the numbers behind it."""

    finding: Finding
    section: SectionName

    @property
    def text(self) -> str:
        """The sentence."""
        return self.finding.text

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON output."""
        return {**self.finding.to_dict(), "section": self.section}


def summary(
    study: Study, compared: Sequence[Comparison], findings: Sequence[Finding]
) -> tuple[SummaryLine, ...]:
    """Return the lines of a study, from its comparisons and findings."""
    # The comparison that the report leads with: of tasks if there is one, output first.
    usable = [c for c in compared if c.kind in ("tasks", "pair", "adapters")]
    with_value = [c for c in usable if c.modules] or usable
    tasks = [c for c in with_value if c.kind == "tasks"]
    leading = max(tasks or with_value, key=lambda c: c.pairs, default=None)
    lines = list(_summarize_conclusion(leading, compared)) if leading else []
    lines += _summarize_ranks(study)
    artifacts = list(_summarize_artifacts(study, findings))
    if len(artifacts) > 1 and lines[-1:] and lines[-1].finding.code == "summary-rank":
        del lines[-1]  # with one rank only, the least important line
    limit = _choose_limit(study, leading, compared, findings)
    room = MOST_LINES - len(lines) - 1
    return (*lines, *artifacts[:room], limit)


def _summarize_ranks(study: Study) -> list[SummaryLine]:
    """Return how many directions hold the energy, at the smallest and the largest rank."""
    by_rank, _ = spectra_by_rank(study)
    if not by_rank:
        return []
    low, high = by_rank[0], by_rank[-1]
    if len(by_rank) == 1:
        fields = {"rank": low.rank, "directions": low.energy_rank_90[1]}
        return [SummaryLine(Finding("summary-rank", fields), "ranks")]
    fields = {
        "low": low.rank,
        "high": high.rank,
        "low_directions": low.energy_rank_90[1],
        "high_directions": high.energy_rank_90[1],
    }
    return [SummaryLine(Finding("summary-ranks", fields), "ranks")]


def _summarize_conclusion(
    leading: Comparison, compared: Sequence[Comparison]
) -> Iterator[SummaryLine]:
    """Yield what was concluded, and how large the overlap is."""
    several = [
        c for c in compared
        if leading.kind == "pair" and c.kind == "pair" and c.side == leading.side
    ]  # fmt: skip
    if len(several) > 1:
        conclusion, count = Counter(str(c.conclusion or "") for c in several).most_common(1)[0]
        fields = {
            "base": several[0].base,
            "side": several[0].side,
            "conclusion": conclusion[:1].upper() + conclusion[1:],
            "count": count,
            "total": len(several),
        }
        yield SummaryLine(Finding("summary-pairs", fields), "alike")
        several.sort(key=lambda c: -np.nan_to_num(c.mean_excess, nan=-np.inf))
        leading = several[0]
    else:
        yield SummaryLine(_conclusion_finding(leading), "alike")
    if np.isfinite(leading.mean_excess):
        yield SummaryLine(_size_finding(leading), "alike")


def _size_finding(comparison: Comparison) -> Finding:
    """Return how large the overlap is: in words only if a test has detected it or has not."""
    is_tested = comparison.conclusion in (Conclusion.MORE_ALIKE, Conclusion.NOT_DISTINGUISHABLE)
    values = [task.within for task in comparison.tasks if np.isfinite(task.within)]
    differ = len(values) > 1 and np.ptp(values) > TASKS_DIFFER
    return Finding(
        "summary-size",
        {
            "compared": comparison.subject,
            "base": comparison.base,
            "side": comparison.side,
            "size": (comparison.size or None) if is_tested else None,
            "mean_excess": comparison.mean_excess,
            "unrelated": comparison.unrelated.median if comparison.unrelated else None,
            "by_task": [min(values), max(values)] if differ else None,
        },
    )


def _conclusion_finding(comparison: Comparison) -> Finding:
    fields: dict[str, Any] = {
        "base": comparison.base,
        "side": comparison.side,
        "compared": comparison.subject,
        "conclusion": str(comparison.conclusion or ""),
        "reason": str(comparison.reason),
        "p": comparison.p,
        "smallest_p": comparison.smallest_p,
        "tasks": len(comparison.tasks),
        "significant": comparison.significant[0],
        "significant_of": comparison.significant[1],
        "unit": "modules" if comparison.kind == "pair" else "pairs",
    }
    conclusion = comparison.conclusion
    if conclusion is Conclusion.MORE_ALIKE_THAN_RANDOM:
        return Finding("summary-more-alike-than-random", fields)
    if comparison.kind == "tasks" and comparison.p is not None:
        if conclusion is Conclusion.MORE_ALIKE:
            return Finding("summary-tasks-told-apart", fields)
        if conclusion is Conclusion.NOT_DISTINGUISHABLE:
            return Finding("summary-tasks-not-told-apart", fields)
        if conclusion is Conclusion.TOO_FEW_RUNS:
            return Finding("summary-tasks-too-few-runs", fields)
        apart = [task.task for task in comparison.tasks if task.is_apart]
        return Finding(
            "summary-tasks-unequal", {**fields, "apart": apart or None, "count": len(apart)}
        )
    if conclusion in (Conclusion.INCONCLUSIVE, Conclusion.TOO_FEW_RUNS, None):
        return Finding("summary-no-conclusion", fields)
    return Finding("summary-conclusion", fields)


def _summarize_artifacts(study: Study, findings: Sequence[Finding]) -> Iterator[SummaryLine]:
    """Yield what is damaged or has another cause than learning, most serious first."""
    damage = [finding for finding in findings if finding.severity == "damage"]
    if damage:
        named = dict.fromkeys(
            label for finding in damage for label in finding.fields.get("adapters", ("the base",))
        )
        fields: dict[str, Any] = {"named": list(named), "count": len(damage)}
        yield SummaryLine(Finding("summary-damage", fields), "limits")
    diverged = [f.fields["adapter"] for f in findings if f.code == "diverged"]
    if diverged:
        fields = {"named": diverged, "count": len(diverged), "total": len(study.adapters)}
        yield SummaryLine(Finding("summary-diverged", fields), "limits")
    pairs, total = study.pairs, len(study.pairs)
    is_conflict = have_conflicting_tasks(pairs, study.runs)
    counts = {
        "summary-started-from-base": pairs["pair_class"] == PairClass.STARTED_FROM_BASE,
        "summary-wrong-labels": is_conflict,
        "summary-one-sample": pairs["pair_class"].isin(list(ONE_SAMPLE)) & ~is_conflict,
        "summary-shared-initialization": (
            pairs["initialization"].isin(
                [InitRelation.SHARED, InitRelation.PARTLY_SHARED, InitRelation.SAME_SPACE]
            )
            | (pairs["pair_class"] == PairClass.SHARED_INIT)
        )
        & ~pairs["pair_class"].isin(
            [*ONE_SAMPLE, PairClass.WRONG_LABEL, PairClass.STARTED_FROM_BASE]
        ),
    }
    clean = not damage and not diverged
    for code, chosen in counts.items():
        if count := int(chosen.sum()):
            clean = False
            yield SummaryLine(Finding(code, {"count": count, "total": total}), "limits")
    if clean and total:
        yield SummaryLine(Finding("summary-no-artifacts", {"pairs": total}), "limits")
    elif clean:
        modules = int(study.spectra["module"].nunique())
        yield SummaryLine(Finding("summary-no-damage", {"modules": modules}), "limits")


def _choose_limit(
    study: Study,
    leading: Comparison | None,
    compared: Sequence[Comparison],
    findings: Sequence[Finding],
) -> SummaryLine:
    """Return the most important thing that cannot be said."""
    adapters = len(study.adapters)
    if adapters < 2:
        return SummaryLine(Finding("summary-one-adapter", {"count": adapters}), "limits")
    if leading is None and study.pairs["modules"].max() > 0:
        # Pairs were compared, and none by itself: they are of other tasks, and of one run each.
        return SummaryLine(Finding("summary-one-run-each", {"count": adapters}), "limits")
    if leading is None:
        return SummaryLine(Finding("summary-nothing-compared", {"count": adapters}), "limits")
    if leading.reason in (Reason.NO_REFERENCE, Reason.LEVEL_ONLY):
        return SummaryLine(Finding("summary-no-reference"), "limits")
    unread = next((f for f in findings if f.code == _OF_UNREAD_LABELS), None)
    if unread is not None:
        fields = {name: unread.fields[name] for name in ("count", "total")}
        return SummaryLine(Finding("summary-unknown-labels", fields), "limits")
    for comparison in compared:
        if comparison.side == leading.side or comparison.subject != leading.subject:
            continue
        if not comparison.modules:
            left_out = study.left_out.get(comparison.side, {})
            reasons = Counter(left_out.values())
            rows = study.similarities[study.similarities["side"] == comparison.side]
            fields = {
                "side": comparison.side,
                "count": len(left_out),
                "total": int(rows["module"].nunique()),
                "reason": reasons.most_common(1)[0][0] if reasons else None,
            }
            return SummaryLine(Finding("summary-side-left-out", fields), "limits")
        if comparison.conclusion is Conclusion.INCONCLUSIVE:
            fields = {
                "side": comparison.side,
                "mean_excess": comparison.mean_excess,
                "reason": str(comparison.reason),
            }
            return SummaryLine(Finding("summary-side-inconclusive", fields), "alike")
    if study.failures:
        fields = {"count": len(study.failures)}
        return SummaryLine(Finding("summary-unanalyzed", fields), "limits")
    return SummaryLine(Finding("summary-scope", {"count": adapters}), "limits")


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
    boxes: dict[Severity, list[FindingBox]] = {severity: [] for severity in SEVERITIES}
    for (severity, code), group in groups.items():
        boxes[severity].append(FindingBox(code, severity, tuple(group)))
    for of_severity in boxes.values():
        of_severity.sort(key=_importance)
    while sum(map(len, boxes.values())) > MOST_BOXES:
        # Of damage, twice as many as of the others.
        boxes[max(SEVERITIES, key=lambda name: len(boxes[name]) / (1 + (name == "damage")))].pop()
    chosen = tuple(box for severity in SEVERITIES for box in boxes[severity])
    in_boxes = {id(finding) for box in chosen for finding in box.findings}
    return chosen, tuple(finding for finding in findings if id(finding) not in in_boxes)


def _importance(box: FindingBox) -> int:
    """Return the position of a box among those of its severity."""
    return _ORDER.index(box.code) if box.code in _ORDER else len(_ORDER)
