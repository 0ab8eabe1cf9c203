"""Findings from comparisons: which runs and pairs are alike, next to unrelated and random ones.

The checkpoints of one run are compared with its last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis import chance
from lora_analysis.conclusions.comparison_rules import comparisons
from lora_analysis.conclusions.comparison_values import (
    SIDES_IN_ORDER,
    TASKS_DIFFER,
    Comparison,
    Conclusion,
    Reason,
)
from lora_analysis.finding import Finding
from lora_analysis.studies import Relation, Study
from lora_analysis.studies.base_models import per_base
from lora_analysis.studies.reference_test import (
    REFERENCES_FOR_TEST,
    ReferenceTest,
    StrengthQuantity,
    refused_references,
)

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies import Study


# Factor between what exceeds the unrelated level in two tasks, see `TASKS_DIFFER`.
_TASKS_DIFFER_FACTOR: Final = 2.0
# With fewer values, the maximum is one of the numbers that lead anyway.
_MANY_VALUES: Final = 8
_CODES: Final = {
    Conclusion.MORE_ALIKE: "more-alike",
    Conclusion.NOT_DISTINGUISHABLE: "not-distinguishable",
    Conclusion.MORE_ALIKE_THAN_RANDOM: "more-alike-than-random",
    Conclusion.NOT_DISTINGUISHABLE_FROM_RANDOM: "not-distinguishable-from-random",
    Conclusion.TOO_FEW_RUNS: "too-few-runs",
    Conclusion.NEAR_DUPLICATE: "near-duplicate-pair",
    Conclusion.INCONCLUSIVE: "inconclusive",
}
_QUANTITIES: Final[dict[StrengthQuantity, str]] = {
    "relative_norm": "‖ΔW‖/‖W‖",
    "norm": "‖ΔW‖",
    "participation_ratio": "participation ratio",
    "rank": "rank",
}


def report_comparisons(study: Study) -> Iterator[Finding]:
    """Report the comparisons of tasks, of single ranks together, and of pairs."""
    every = comparisons(study)
    for comparison in every:
        if comparison.kind in ("tasks", "pair", "adapters"):
            yield _conclusion_finding(comparison)
            # What a conclusion needs is the same on both sides: report it once.
            if comparison.side == "output":
                yield from _missing_references(study, comparison)
        if comparison.kind == "tasks" and comparison.p is not None and _tasks_differ(comparison):
            tasks = [task for task in comparison.tasks if np.isfinite(task.within)]
            fields = {"base": comparison.base, "side": comparison.side, "tasks": _strengths(tasks)}
            yield Finding("single-tasks", fields)
    for base in dict.fromkeys(comparison.base for comparison in every):
        yield from _overlap_of_ranks([c for c in every if c.kind == "ranks" and c.base == base])


def _missing_references(study: Study, comparison: Comparison) -> Iterator[Finding]:
    """Report the references that a comparison would need for a stronger conclusion."""
    subject = {"compared": comparison.subject}
    if study.reference_levels and comparison.reason is Reason.NO_REFERENCE:
        yield Finding("no-level-for-pair", subject)
    test = comparison.reference_test
    if test is None:
        return
    if comparison.reason is Reason.FEW_REFERENCES:
        missing = REFERENCES_FOR_TEST - len(test.references)
        yield Finding("more-references-needed", {**subject, "missing": missing})
    elif comparison.reason is Reason.TRAINING_STRENGTH:
        quantities = list(dict.fromkeys(_QUANTITIES[o.quantity] for o in test.out_of_range))
        yield Finding("other-references-needed", {**subject, "quantities": quantities})


def _overlap_of_ranks(ranks: Sequence[Comparison]) -> Iterator[Finding]:
    """Report T of replicates at two different ranks, next to that of unrelated pairs."""
    output = [c for c in ranks if c.side == "output" and np.isfinite(c.mean_excess)]
    if not output:
        return
    level = output[0].unrelated
    pairs_of_ranks = [
        {
            "low": comparison.ranks[0],
            "high": comparison.ranks[1],
            "mean_excess": comparison.mean_excess,
        }
        for comparison in output
    ]
    yield Finding(
        "overlap-of-ranks",
        {
            "base": output[0].base,
            "unrelated": level.median if level else None,
            "unrelated_maximum": level.maximum if level else None,
            "pairs_of_ranks": pairs_of_ranks,
        },
    )


def _conclusion_finding(comparison: Comparison) -> Finding:
    conclusion = comparison.conclusion or Conclusion.INCONCLUSIVE
    code = _CODES[conclusion]
    if code == "too-few-runs" and comparison.kind == "pair":
        code = "too-few-references"
    elif comparison.reason is Reason.TRAINING_STRENGTH:
        code = "trained-differently"
    return Finding(code, comparison_fields(comparison))


def comparison_fields(comparison: Comparison) -> dict[str, Any]:
    """Return the values of a comparison as fields of a finding, and for JSON output."""
    level, test = comparison.unrelated, comparison.reference_test
    count, total = comparison.significant
    strength = comparison.training_strength
    return {
        "kind": comparison.kind,
        "compared": comparison.subject,
        "base": comparison.base,
        "side": comparison.side,
        "conclusion": str(comparison.conclusion or ""),
        "reason": str(comparison.reason),
        "ranks": list(comparison.ranks),
        "pair_class": str(comparison.pair_class or ""),
        "pairs": comparison.pairs,
        "modules": comparison.modules,
        "mean_excess": _defined(comparison.mean_excess),
        "quartiles": [_defined(value) for value in comparison.quartiles],
        "omega": _defined(comparison.omega),
        "chance_omega": _defined(comparison.chance_omega),
        "angle": _defined(comparison.angle),
        "cosine": _defined(comparison.cosine),
        "unrelated": level.median if level else None,
        "unrelated_maximum": level.maximum if level else None,
        "unrelated_pairs": level.pairs if level else 0,
        "size": comparison.size or None,
        "position": comparison.position,
        "p": comparison.p,
        "smallest_p": comparison.smallest_p,
        "significant": count,
        "significant_of": total,
        "unit": "modules" if comparison.kind == "pair" else "pairs",
        "tasks": _strengths(comparison.tasks),
        "references": list(test.references) if test else None,
        "reference_count": len(test.references) if test else 0,
        "rank_of_pair": test.rank if test else None,
        "pairs_of_test": test.pairs if test else None,
        "trained": None if strength is None else str(strength),
        "outside": _outside_fields(test),
    }


def _outside_fields(test: ReferenceTest | None) -> list[dict[str, Any]] | None:
    """Return the quantities of training strength that are outside the range of the references."""
    rows = [
        {
            "adapter": quantity.adapter,
            "quantity": _QUANTITIES[quantity.quantity],
            "value": quantity.value,
            "low": quantity.low,
            "high": quantity.high,
        }
        for quantity in (test.out_of_range if test else ())
    ]
    return rows or None


def _defined(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _strengths(tasks: Sequence[Any]) -> list[dict[str, Any]] | None:
    """Return T and training strength of every task."""
    rows = [
        {
            "task": task.task,
            "own": task.within if np.isfinite(task.within) else None,
            "other": max(task.others.values(), default=None),
            "norm": task.norm,
            "participation_ratio": task.participation_ratio,
            "is_apart": task.is_apart,
        }
        for task in tasks
    ]
    return rows or None


def _tasks_differ(comparison: Comparison) -> bool:
    """Return True if one T does not describe all tasks."""
    values = np.array([task.within for task in comparison.tasks if np.isfinite(task.within)])
    if len(values) < 2 or comparison.unrelated is None:
        return False
    above = values - comparison.unrelated.median
    apart = [task.is_apart for task in comparison.tasks if np.isfinite(task.within)]
    return bool(
        np.ptp(values) > TASKS_DIFFER
        or (above.min() > 0 and above.max() > _TASKS_DIFFER_FACTOR * above.min())
        or above.min() <= 0 < above.max()
        or not all(apart)
        # With two tasks, a difference in strength cannot be told from one of the tasks.
        or len(values) == 2
    )


def report_reference_pairs(study: Study) -> Iterator[Finding]:
    """Report the unrelated pairs, base by base, or report that there are none."""
    if len(study.adapters) < 2:
        return
    counts = {side: (study.pairs[f"population_{side}"] == "unrelated").sum()
              for side in SIDES_IN_ORDER}  # fmt: skip
    if not counts["output"] or len(study.adapters) == 2:  # an only pair is no level for itself
        fewer = None if study.reference_levels else "fewer"
        yield Finding("no-reference-pairs", {"fewer": fewer})
        return
    for base, rows in per_base(study, study.pairs):
        sides = []
        for side in SIDES_IN_ORDER:
            unrelated = rows[rows[f"population_{side}"] == "unrelated"]
            values = unrelated[f"mean_excess_{side}"].dropna()
            if len(values):
                sides.append(
                    {
                        "side": side,
                        "median": float(values.median()),
                        "maximum": float(values.max()),
                        "pairs": len(values),
                    }
                )
        if sides:
            yield Finding("reference-pairs", {"base": base or None, "sides": sides})


def report_refused_references(study: Study) -> Iterator[Finding]:
    """Report the references that are not unrelated to the adapters."""
    references = [
        {
            "reference": refusal.reference,
            "reason": refusal.reason,
            "adapters": list(refusal.adapters),
        }
        for refusal in refused_references(study)
    ]
    if references:
        yield Finding("references-refused", {"references": references})


def report_left_out_pairs(study: Study) -> Iterator[Finding]:
    """Report how many pairs of each class count in no population."""
    pairs = study.pairs
    if len(pairs) < 2 or not (pairs["population_output"] != "").any():
        return
    excluded = dict(zip(study.runs["adapter"], study.runs["excluded"], strict=True))
    out = pairs[pairs["population_output"] == ""]
    reasons = Counter(
        excluded[a] or excluded[b] or str(pair_class)
        for a, b, pair_class in zip(out["a"], out["b"], out["pair_class"], strict=True)
    )
    if reasons:
        classes = [{"pair_class": name, "pairs": count} for name, count in reasons.most_common()]
        yield Finding(
            "pairs-left-out", {"count": len(out), "total": len(pairs), "classes": classes}
        )


def report_left_out_modules(study: Study) -> Iterator[Finding]:
    """Report the modules that do not count in any pair, and why."""
    for side in SIDES_IN_ORDER:
        by_reason: dict[str, list[str]] = {}
        for module, reason in study.left_out.get(side, {}).items():
            by_reason.setdefault(reason, []).append(module)
        if by_reason and len(study.adapters) > 1:
            yield Finding(
                "modules-left-out",
                {
                    "side": side,
                    "count": sum(map(len, by_reason.values())),
                    "reasons": [
                        {"reason": reason, "modules": modules}
                        for reason, modules in by_reason.items()
                    ],
                },
            )


def report_largest_overlaps(study: Study) -> Iterator[Finding]:
    """Report the maximum of φ(1, 1) on each base, next to that of as many random values."""
    rows = study.similarities
    rows = rows[(rows["side"] == "output") & rows["usable"].astype(bool)]
    rows = rows[(rows["degeneracy_1_1"] == "") & (rows["population"] != "")]
    rows = rows.assign(excess=chance.excess(rows["phi_1_1"], rows["chance_1_1"]))
    for base, of_base in per_base(study, rows):
        unrelated = of_base[of_base["population"] == "unrelated"]
        chosen = of_base[of_base["population"] == "replicate"]
        if len(chosen) < _MANY_VALUES:
            continue
        top = chosen.loc[chosen["excess"].idxmax()]
        same = unrelated[unrelated["dimension"] == top["dimension"]]
        yield Finding(
            "largest-overlap",
            {
                "base": base or None,
                "count": int((chosen["dimension"] == top["dimension"]).sum()),
                "phi_1_1": float(top["phi_1_1"]),
                "module": str(top["module"]),
                "a": top["a"],
                "b": top["b"],
                "expected_maximum": chance.similarity_maximum_at(
                    chosen["dimension"], chosen.index.get_loc(top.name)
                ),
                "reference_count": len(same),
                "reference_maximum": float(same["phi_1_1"].max()) if len(same) else None,
            },
        )


def report_checkpoints(study: Study) -> Iterator[Finding]:
    """Report how far the checkpoints of one run were from its last."""
    for rows in overlaps_with_last_step(study):
        steps = [
            {"adapter": row.adapter, "step": int(row.step), "omega": float(row.omega)}
            for row in rows.itertuples(index=False)
        ]
        yield Finding("checkpoints", {"last": rows["last"].iloc[0], "steps": steps})


def overlaps_with_last_step(study: Study) -> Iterator[pd.DataFrame]:
    """Yield per run its earlier checkpoints by step, with ω and φ(1, 1) against its last.

    Columns: adapter, step, last, last_step, omega, phi_1_1 (medians over modules, output side).
    """
    rows = study.select(Relation.SAME_RUN, "output")
    if rows.empty:
        return
    step = study.runs.set_index("adapter")["step"]
    pairs = rows.groupby(["a", "b"], sort=False)[["omega", "phi_1_1"]].median().reset_index()
    later = pairs["a"].map(step) > pairs["b"].map(step)
    pairs["last"] = pairs["a"].where(later, pairs["b"])
    pairs["adapter"] = pairs["b"].where(later, pairs["a"])
    pairs["step"] = pairs["adapter"].map(step)
    pairs["last_step"] = pairs["last"].map(step)
    final = pairs[~pairs["last"].isin(pairs["adapter"])]
    columns = ["adapter", "step", "last", "last_step", "omega", "phi_1_1"]
    for _, steps in final.groupby("last", sort=False):
        yield steps.sort_values("step")[columns]
