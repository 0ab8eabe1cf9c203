"""Tables of a report about pairs: comparisons, tasks, pairs, initializations, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.conclusions.comparison_findings import overlaps_with_last_step
from lora_analysis.conclusions.comparison_values import Comparison, Conclusion
from lora_analysis.report.tables import ReportTable, cell
from lora_analysis.shared_init import InitRelation, drift
from lora_analysis.studies import Relation
from lora_analysis.text import number, overlap_number, p_value_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_analysis.studies import Study


COMPARISON_COLUMNS: Final = (
    "comparison", "side", "conclusion", "T", "unrelated", "largest", "ω", "random ω", "angle",
    "cosine", "p", "least p", "pairs", "modules",
)  # fmt: skip


def comparisons_table(study: Study, compared: Sequence[Comparison]) -> ReportTable | None:
    """Return every comparison of a study, one row per side; None without any."""
    if not compared:
        return None
    several = len({comparison.base for comparison in compared}) > 1
    rows = []
    for comparison in compared:
        row = comparison_row(comparison)
        rows.append((comparison.base or "–", *row) if several else row)
    columns = (*(("base",) if several else ()), *COMPARISON_COLUMNS)
    table = study.similarities
    table = table[table["usable"].astype(bool)]
    random = ""
    if len(table):
        degrees = np.degrees(np.arccos(np.sqrt(float(table["chance_1_1"].median()))))
        random = f" (random: {degrees:.0f}°)"
    caption = (
        "T: mean over modules of the excess of ω over its random baseline, mean over pairs; random "
        "pairs have T 0. Unrelated, largest: median and maximum of T over unrelated pairs, of the "
        "same ranks if there are any. ω and random ω: medians. Angle: median angle between the "
        f"first directions{random}. Cosine: median signed cosine of ΔW. p: the permutation of runs "
        "in a study of tasks, the rank among reference pairs of two adapters; least p: the "
        "smallest one that the design allows."
    )
    if any(comparison.kind == "ranks" for comparison in compared):
        caption += " Pairs of different ranks are described and not tested."
    return ReportTable("comparisons", caption, columns, tuple(rows), 3 + several)


def comparison_row(comparison: Comparison) -> tuple[str, ...]:
    """Return the values of a comparison as the table prints them."""
    level = comparison.unrelated
    numbers = (
        comparison.mean_excess,
        level.median if level else np.nan,
        level.maximum if level else np.nan,
        comparison.omega,
        comparison.chance_omega,
    )
    angle = "–" if np.isnan(comparison.angle) else f"{comparison.angle:.0f}°"
    p_values = (
        "–" if value is None else p_value_text(value)
        for value in (comparison.p, comparison.smallest_p)
    )
    conclusion = str(comparison.conclusion or "not tested")
    # Of what was not detected, a word for the size would be read as a detection.
    detected = comparison.conclusion is Conclusion.MORE_ALIKE
    extra = (comparison.size if detected else "") or str(comparison.reason)
    return (
        comparison.subject,
        comparison.side,
        (f"{conclusion} ({extra})" if extra else conclusion),
        *map(overlap_number, numbers),
        angle,
        overlap_number(comparison.cosine),
        *p_values,
        str(comparison.pairs),
        str(comparison.modules),
    )


def tasks_table(compared: Sequence[Comparison]) -> ReportTable | None:
    """Return T of each task with itself and with the others, next to its training strength."""
    rows = []
    of_tasks = [c for c in compared if c.kind == "tasks" and c.tasks]
    several = len({comparison.base for comparison in of_tasks}) > 1
    for comparison in of_tasks:
        for task in comparison.tasks:
            other = max(task.others, key=lambda name: task.others[name], default=None)
            row = (
                task.task,
                comparison.side,
                overlap_number(task.within),
                "–" if other is None else f"{overlap_number(task.others[other])} ({other})",
                "–" if np.isnan(task.within) else "yes" if task.is_apart else "no",
                number(task.norm),
                number(task.participation_ratio),
            )
            rows.append((comparison.base or "–", *row) if several else row)
    if not rows:
        return None
    columns = (*(("base",) if several else ()), "task", "side", "own T",
               "largest T with another task", "apart", "‖ΔW‖", "participation ratio")  # fmt: skip
    caption = (
        "Own T: between runs of the task with different seeds. Apart: own T exceeds T with every "
        "other task. ‖ΔW‖ and participation ratio are medians over adapters: tasks that were "
        "trained more strongly can be more alike for that reason alone."
    )
    return ReportTable("tasks", caption, columns, tuple(rows), 2 + several)


def pairs_table(study: Study) -> ReportTable | None:
    """Return every pair: what it is, T on both sides and the cosine of the whole updates."""
    if len(study.pairs) < 2:
        return None
    rows = tuple(
        (
            pair.a,
            pair.b,
            str(pair.pair_class),
            overlap_number(pair.mean_excess_output),
            overlap_number(pair.mean_excess_input),
            overlap_number(float(pair.total_cosine)),
            str(pair.population_output or "–"),
            str(pair.population_input or "–"),
        )
        for pair in study.pairs.itertuples()
    )
    columns = ("adapter", "adapter", "class", "T output", "T input", "cosine",
               "population, output", "population, input")  # fmt: skip
    caption = (
        "T over the usable modules of each side; cosine: signed cosine of the two whole updates; "
        "population: replicates and unrelated pairs are compared with each other, others with none."
    )
    return ReportTable("pairs", caption, columns, rows, 3)


def initializations_table(study: Study) -> ReportTable | None:
    """Return the pairs whose initializations are not independent; None if all are."""
    ordinary = (InitRelation.INDEPENDENT, InitRelation.NOT_APPLICABLE)
    pairs = study.pairs[~study.pairs["initialization"].isin(ordinary)]
    if pairs.empty:
        return None
    rows = tuple(
        (pair.a, pair.b, str(pair.pair_class), pair.initialization,
         f"{pair.shared_init_modules} of {pair.modules}",
         cell(float(pair.b_cosine if pair.b_cosine is not None else np.nan)))
        for pair in pairs.itertuples()
    )  # fmt: skip
    columns = ("adapter", "adapter", "class", "initialization", "modules", "cosine of B")
    caption = (
        "Pairs whose initial A are not independent: the modules that share it, and the median "
        "matched cosine of B."
    )
    return ReportTable("initializations", caption, columns, rows, 4)


def steps_table(study: Study) -> ReportTable | None:
    """Return the checkpoints of each run by step: overlap with the last, spectrum, A's drift.

    A's drift is from the checkpoint of step 0, if there is one. None without checkpoints.
    """
    spectra = study.spectra.groupby("adapter")[["stable_rank", "energy_rank_90"]].median()
    norms = study.runs.set_index("adapter")["norm"]
    amplified = study.amplifications
    enrichment = None
    if not amplified.empty:
        at_rank = amplified[amplified["at_rank"]]
        enrichment = at_rank.groupby("adapter")["enrichment"].median()
    rows = []
    for rows_of_run in overlaps_with_last_step(study):
        last = str(rows_of_run["last"].iloc[0])
        overlaps = rows_of_run.set_index("adapter")[["phi_1_1", "omega"]]
        pairs = study.pairs[study.pairs["relation"] == Relation.SAME_RUN]
        pairs = pairs[(pairs["a"] == last) | (pairs["b"] == last)]
        labels = {*pairs["a"], *pairs["b"]}
        steps = study.runs.set_index("adapter")["step"]
        checkpoints = sorted(
            ((label, int(steps[label])) for label in labels), key=lambda pair: pair[1]
        )
        first = next((label for label, step in checkpoints if step == 0), None)
        for label, step in checkpoints:
            drifts = _drift(study, label, first)
            overlap = overlaps.loc[label] if label in overlaps.index else (np.nan, np.nan)
            phi, omega = (1.0, 1.0) if label == last else overlap
            cells = [cell(float(x)) for x in (phi, omega, norms[label], *spectra.loc[label])]
            if enrichment is not None:
                cells.append(cell(float(enrichment.get(label, np.nan))))
            rows.append((last, str(step), *cells, *(cell(drift) for drift in drifts)))
    if not rows:
        return None
    against = () if enrichment is None else ("enrichment",)
    columns = ("run", "step", "φ(1,1)", "ω", "‖ΔW‖", "stable rank", "90 % of energy", *against,
               "A's rotation", "A's growth")  # fmt: skip
    caption = (
        "φ(1,1) and ω: with the run's last step, output side. They, the ranks and the enrichment "
        "are medians over modules. A's rotation: 1 − cos between A and A at step 0; A's growth: "
        "‖A‖/‖A₀‖ − 1; –: step 0 was not saved."
    )
    return ReportTable("steps", caption, columns, tuple(rows), 1)


def _drift(study: Study, label: str, first: str | None) -> tuple[float, float]:
    """Return the rotation and growth of A since step 0, medians over modules."""
    if first is None:
        return np.nan, np.nan
    drifts = []
    for name, update in study.adapters[label].items():
        start = study.adapters[first].get(name)
        if isinstance(update, LowRankUpdate) and isinstance(start, LowRankUpdate):
            drifts.append(drift(update, start.A))
    if not drifts:
        return np.nan, np.nan
    medians = np.median([(module.angular, module.radial) for module in drifts], axis=0)
    return float(medians[0]), float(medians[1])
