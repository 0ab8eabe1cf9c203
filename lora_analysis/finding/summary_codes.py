"""Codes of the lines with which a report begins, and which stand for what follows in it."""

from __future__ import annotations

from typing import Final

from lora_analysis.finding.templates import Code

_BASE: Final = "[[ on {base}]]"
_SCALE: Final = "on a scale from 0 (random) to 1 (the same directions)"

SUMMARY_CODES: Final[dict[str, Code]] = {
    # Alike?
    "summary-tasks-told-apart": Code(
        "result",
        "runs",
        f"The {{tasks:plural task}} can be told apart{_BASE}: on the {{side}} side, runs of one "
        "task are more alike than runs of different tasks (p {p:p}).",
    ),
    "summary-tasks-not-told-apart": Code(
        "result",
        "runs",
        f"The {{tasks:plural task}} cannot be told apart{_BASE}: on the {{side}} side, runs of one "
        "task are not distinguishable from runs of different tasks (p {p:p}).",
    ),
    "summary-tasks-unequal": Code(
        "result",
        "runs",
        f"The {{tasks:plural task}} cannot be told apart as a whole{_BASE}: on the {{side}} side, "
        "only {count} agree more with themselves than with every other one[[ ({apart:and})]], "
        "although p {p:p}.",
    ),
    "summary-tasks-too-few-runs": Code(
        "result",
        "runs",
        f"Whether the {{tasks:plural task}} differ cannot be tested{_BASE}: the smallest p-value "
        "that so few runs can give is {smallest_p:.2g}.",
    ),
    "summary-more-alike-than-random": Code(
        "result",
        "overlap",
        f"{{compared}}{_BASE}: more alike than random on the {{side}} side ({{significant}} of "
        "{significant_of} {unit}), which unrelated adapters often are, too.",
    ),
    "summary-conclusion": Code(
        "result",
        "overlap",
        f"{{compared}}{_BASE}: {{conclusion}} on the {{side}} side[[ (p {{p:p}})]].",
    ),
    "summary-no-conclusion": Code(
        "limit",
        "overlap",
        f"{{compared}}{_BASE}: no conclusion on the {{side}} side ({{reason}}).",
    ),
    "summary-pairs": Code(
        "result",
        "overlap",
        f"{{conclusion}} on the {{side}} side{_BASE}: {{count}} of {{total}} pairs.",
    ),
    "summary-size": Code(
        "result",
        "overlap",
        f"{{compared}}{_BASE}[[ are {{size}}]]: T {{mean_excess:overlap}} {_SCALE}[[; unrelated "
        "adapters {unrelated:overlap}]][[; by task {by_task:range}]].",
    ),
    # Ranks
    "summary-ranks": Code(
        "result",
        "spectra",
        "90 % of ‖ΔW‖² is in {high_directions:g} directions at rank {high}, and in "
        "{low_directions:g} at rank {low} (medians over modules of the same tasks).",
    ),
    "summary-rank": Code(
        "result",
        "spectra",
        "90 % of ‖ΔW‖² is in {directions:g} of {rank} directions (median over modules).",
    ),
    # Damage, artifacts
    "summary-damage": Code(
        "damage",
        "numbers",
        "Results that involve {named:and} are unreliable: diverged training or damaged "
        "files ({count:plural finding}).",
    ),
    "summary-diverged": Code(
        "artifact",
        "numbers",
        "{named:and} probably diverged in training ({count} of {total} adapters).",
    ),
    "summary-started-from-base": Code(
        "artifact",
        "initialization",
        "Both factors started from the base weights in {count} of {total:plural pair}: B·A is not "
        "the update, and nothing is concluded from them.",
    ),
    "summary-wrong-labels": Code(
        "artifact",
        "labels",
        "One update has two task names in {count} of {total:plural pair}: at least one name is "
        "wrong, and these adapters are excluded from all conclusions.",
    ),
    "summary-one-sample": Code(
        "artifact",
        "adapters",
        "Copies, resized copies or one training run: {count} of {total:plural pair}, each of which "
        "is one sample, not two.",
    ),
    "summary-shared-initialization": Code(
        "artifact",
        "initialization",
        "Initial factors are shared in {count} of {total:plural pair}, which alone makes the input "
        "side alike: this overlap is excluded.",
    ),
    "summary-no-artifacts": Code(
        "result",
        "initialization",
        "No damage, copy or shared initialization was detected in {pairs:plural pair}.",
    ),
    "summary-no-damage": Code(
        "result",
        "numbers",
        "No damage was detected in {modules:plural module}.",
    ),
    # What cannot be said
    "summary-unanalyzed": Code(
        "limit",
        "adapters",
        "{count:plural source} could not be analyzed.",
    ),
    "summary-no-reference": Code(
        "limit",
        "overlap",
        "How alike unrelated adapters of this base are cannot be said: a test at 5 % needs five "
        "adapters of other tasks.",
    ),
    "summary-unknown-labels": Code(
        "limit",
        "labels",
        "Whether tasks differ cannot be said: task or seed of {count} of {total} adapters is "
        "unknown.",
    ),
    "summary-side-left-out": Code(
        "limit",
        "modules",
        "No conclusion for the {side} side: {count} of {total} modules cannot be used in all "
        "pairs[[ ({reason})]].",
    ),
    "summary-side-inconclusive": Code(
        "limit",
        "overlap",
        "No conclusion for the {side} side (T {mean_excess:overlap}): {reason}.",
    ),
    "summary-nothing-compared": Code(
        "limit",
        "overlap",
        "None of these {count:plural adapter} can be compared with another: they name different "
        "base models, or have no trained module in common.",
    ),
    "summary-one-run-each": Code(
        "limit",
        "overlap",
        "The {count:plural adapter} were compared in pairs, but no conclusion is drawn: it takes "
        "two runs of a task, with different seeds, next to runs of other tasks.",
    ),
    "summary-one-adapter": Code(
        "limit",
        "overlap",
        "{count:plural adapter} alone cannot show whether others use the same directions.",
    ),
    "summary-scope": Code(
        "limit",
        "overlap",
        "Nothing is said about other bases or tasks than those of these {count:plural adapter}; "
        "overlap does not predict whether adapters can be merged, or which is better.",
    ),
}
