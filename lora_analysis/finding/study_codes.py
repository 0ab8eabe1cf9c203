"""Codes of findings about a study: what its adapters, pairs, runs and base weights show."""

from __future__ import annotations

from typing import Final

from lora_analysis.finding.templates import Code

_PAIRS: Final = "[[{pairs} pairs (medians), for example ]]{a} and {b}"
_BASE: Final = "[[ on {base}]]"
_COMPARED: Final = "{compared}[[ on {base}]], {side} side"
_LEVEL: Final = "[[; unrelated pairs {unrelated:overlap}, at most {unrelated_maximum:overlap}]]"
_T: Final = f"T {{mean_excess:overlap}}[[ ({{size}})]]{_LEVEL}; random 0."
_RANDOM: Final = (
    "Median ω {omega:overlap}, random {chance_omega:overlap}[[; T {mean_excess:overlap}"
    f"]][[ ({{size}})]]{_LEVEL}."
)
# What every sentence on a group ends with: the other part, both nulls, and what was removed.
_GROUP: Final = "{members} adapters[[ of {tasks} tasks]]"
_GROUP_MEAN: Final = (
    "The mean of the others holds {mean_share:overlap} of an adapter's energy (random 0"
    "[[, adapters of other groups at most {others_mean:overlap}]][[; p {p_mean:p}]]). Mean cosine "
    "ρ: {rho:overlap} ({rho_low:overlap} to {rho_high:overlap})."
)
_GROUP_DIRECTIONS: Final = (
    "The joint top {k:plural direction} of the others[[ on the {side} side]] hold {share:overlap} "
    "(random {random_share:number}[[, adapters of other groups at most {others_share:overlap}]]"
    "[[; p {p_share:p}]])."
)
_GROUP_END: Final = (
    " {modules:plural module}.[[ Adapters of other groups: {others}.]][[ Adapters of other groups: "
    "{few_others}, too few for a test; unrelated adapters of one base often share more than random "
    "directions.]]"
    "[[ Some of the {shared_init} share an initialization or parts of both factors: the input side "
    "is excluded from the conclusion.]]"
    "[[ Adapters of one task explain each other: this is not only what the {tasks} tasks have in "
    "common.]][[ Removed: {removed}.]] This describes energy, not skill."
)
_GROUP_ITEMS: Final = {"removed": "{count} ({reason})"}
_MODULES: Final = "{significant} of {significant_of} {unit}"
# The numbers of both controls, in each of the three statements about them.
_CONTROLS: Final = (
    " Enrichment by rank: {ranks}. Crossed: U of one adapter with V of an unrelated one. "
    "Through W: random directions after one product with W.[[ The base's geometry alone gives "
    "{geometry:range} times random, or more, to anything that passes through it.]]"
    "[[ {untested:nonzero} further runs have fewer than {needed} crossed values.]]"
)
_CONTROLS_BY_RANK: Final = {
    "ranks": "rank {rank}: {enrichment:number} times random[[, crossed {enrichment_crossed:number} "
    "({low:number} to {high:number})]][[, through W {enrichment_through_weight:number}]]"
}

STUDY_CODES: Final[dict[str, Code]] = {
    # Adapters
    "not-analyzed": Code("limit", "adapters", "{sources:and 12} could not be analyzed: {reason}"),
    "untrained-adapter": Code(
        "limit",
        "adapters",
        "{adapter} is untrained: ΔW is zero in all {modules:plural module}, so it has no "
        "directions and is excluded from all comparisons.",
    ),
    "untrained-modules": Code(
        "limit",
        "adapters",
        "{adapter}: ΔW is zero in {untrained} of {modules:plural module}, which are excluded.",
    ),
    "diverged": Code(
        "artifact",
        "adapters",
        "{adapter} has probably diverged: ‖ΔW‖ is {norm:number}[[, {ratio:number} times the median "
        "of comparable adapters]][[, {relative_norm:number} times ‖W‖ (median over modules)]]. Its "
        "directions are computed as usual; check its training before you interpret them.",
    ),
    "several-bases": Code(
        "limit",
        "adapters",
        "The adapters name {count} base models: {bases}. Directions of different base models are "
        "unrelated, even if shapes agree[[: {excluded_pairs:plural pair} across base models not "
        "compared]][[; {compared_pairs:plural pair} across base models compared as requested]].",
        items={"bases": "{base} ({adapters:plural adapter})"},
    ),
    "base-not-known-same": Code(
        "limit",
        "adapters",
        "[[It is not known whether {bases:and} are the same base model: a local path, or a name "
        "under a different organization, does not identify a model.]][[ {excluded_pairs:plural "
        "pair} not compared; if they have the same base, pass across_bases=True (command line: "
        "--across-bases).]][[ {compared_pairs:plural pair} compared as requested.]]"
        "[[No base model is named by {unnamed:and}: compared with all adapters of the same "
        "shapes.]]",
    ),
    "unknown-task-or-seed": Code(
        "limit",
        "adapters",
        "Task or seed of {count} of {total} adapters is unknown ({unlabeled}), so their pairs "
        "cannot be grouped by task and seed. Pass label= (command line: --label "
        "'{{task}}-r{{rank}}-s{{seed}}'), or put a manifest.json next to each adapter "
        '({{"task": ..., "seed": ...}}).',
    ),
    "sampled-pairs": Code(
        "limit",
        "adapters",
        "{compared} of {total} pairs of the {count} adapters are compared module by module: "
        "replicates and unrelated pairs of all tasks, ranks and seeds. Tests use the {together} "
        "adapters that are all compared with each other. The similarity matrix has all pairs. To "
        "compare more, pass max_pairs= (command line: --max-pairs).",
    ),
    "different-shapes": Code(
        "limit",
        "overlap",
        "{a} and {b} have different shapes in {modules:plural module} of the same name: they adapt "
        "different base models and are not compared there.",
    ),
    "no-common-module": Code(
        "limit",
        "overlap",
        "{a} and {b} adapt no module in common: nothing can be compared.[[ {alike:plural module} "
        "have the same shapes under different names: {a} has {modules_a}; {b} has {modules_b}. If "
        "they are the same modules, pass prefix= (command line: --prefix OLD=NEW).]]",
    ),
    # Classes of pairs
    "near-duplicates": Code(
        "artifact",
        "adapters",
        "near-duplicates (cosine of ΔW at least 0.99 in 90 % of the modules). They are one sample.",
        subject=_PAIRS,
    ),
    "negated-copies": Code(
        "artifact",
        "adapters",
        "one is the other with its sign reversed (cosine of ΔW at most -0.99 in 90 % of the "
        "modules). They are one sample.",
        subject=_PAIRS,
    ),
    "contained": Code(
        "artifact",
        "adapters",
        "one contains the other (median φ at the smaller rank, on both sides: "
        "{containment:number}). Possible causes are a resized copy, a stack or merge of adapters, "
        "or a continued run. They are one sample.",
        subject=_PAIRS,
    ),
    "same-run": Code(
        "artifact",
        "initialization",
        "same training run (shared initialization of A, and B agrees: median matched cosine "
        "{b_cosine:number}). Possible causes are one run stored twice, a continued run, or the "
        "same seed on the same task. They are one sample.",
        subject=_PAIRS,
    ),
    "conflicting-labels": Code(
        "artifact",
        "labels",
        "{pair_class}, but under two task names, so at least one name is wrong. Adapters with such "
        "a name are excluded from all conclusions.",
        subject=_PAIRS,
    ),
    "started-from-base": Code(
        "artifact",
        "initialization",
        "A and B agree row by row although tasks and seeds differ (median matched cosine of B "
        "{b_cosine:number}): both factors started from the base weights, as PiSSA does, and B·A is "
        "not the update. Nothing can be concluded. Subtract the initial product: pass initial= "
        "(command line: --initial, or --trained-on BASE).",
        subject=_PAIRS,
    ),
    "gradients-alike": Code(
        "artifact",
        "initialization",
        "shared initialization, and B agrees in part although the tasks differ (median matched "
        "cosine {b_cosine:number}): the first gradients were alike. These pairs are excluded.",
        subject=_PAIRS,
    ),
    "shared-initialization": Code(
        "artifact",
        "initialization",
        "shared initialization of A in {shared_modules} of {modules} modules (median matched "
        "cosine of B {b_cosine:number}: B was learned independently). Input-side overlap comes "
        "from the initialization and is excluded.",
        subject=_PAIRS,
    ),
    "same-input-space": Code(
        "artifact",
        "initialization",
        "same input space, spanned by different rows of A (resized copies of adapters with a "
        "shared initialization, or an initialization from data or from W). Input-side overlap was "
        "not learned and is excluded.",
        subject=_PAIRS,
    ),
    "partly-shared-initialization": Code(
        "artifact",
        "initialization",
        "shared initialization of A in {shared_modules} of {modules} modules, which are excluded "
        "on the input side of all pairs.",
        subject=_PAIRS,
    ),
    "initialization-inconclusive": Code(
        "artifact",
        "initialization",
        "rank 1, so a shared initialization can be neither detected nor excluded.",
        subject=_PAIRS,
    ),
    "shared-seed": Code(
        "artifact",
        "initialization",
        "Shared initialization of A in {pairs:plural pair} of different tasks and one seed"
        "[[ on {base}]] ({whole} in most modules[[, {partly:nonzero} in some]]). "
        "Median φ(r,r): {sides}. The extra input-side overlap comes from the shared "
        "initialization; these pairs are excluded.",
        items={
            "sides": "{side} side {phi_r_r:number} ([[{reference:number} with different seeds, ]]"
            "random {chance_r_r:number})"
        },
    ),
    # Overlaps
    "degenerate-directions": Code(
        "artifact",
        "overlap",
        "The first direction is not well defined in {count} of {comparisons:plural comparison}: "
        "σ₁ and σ₂ coincide in {degenerate} and differ by less than 5 % in {nearly_degenerate}. "
        "These modules are excluded from summaries of φ(1,1).",
    ),
    "reference-pairs": Code(
        "result",
        "overlap",
        f"Unrelated pairs{_BASE} (different tasks and seeds): T {{sides}}. T is the mean excess "
        "of ω over the random baseline, 0 for random adapters and 1 for identical subspaces.",
        items={
            "sides": "{median:overlap} on the {side} side (at most {maximum:overlap}, "
            "{pairs:plural pair})"
        },
    ),
    "no-reference-pairs": Code(
        "limit",
        "overlap",
        "No unrelated pairs to compare with. Pass five adapters of other tasks for a test at 5 % "
        "(reference=, command line: --reference)[[; {fewer}, or a reference file, give a level]].",
    ),
    "no-level-for-pair": Code(
        "limit",
        "overlap",
        "The reference file has no level for {compared}: their base, module types, ranks or "
        "training strength are not those that it was made from.",
    ),
    "more-references-needed": Code(
        "limit",
        "overlap",
        "A test of {compared} at 5 % needs {missing:plural more adapter} of another task each "
        "(reference=, command line: --reference).",
    ),
    "other-references-needed": Code(
        "limit",
        "overlap",
        "A test of {compared} needs references that were trained as they were: the references' "
        "range of {quantities:and} must include both.",
    ),
    "references-refused": Code(
        "limit",
        "overlap",
        "Refused as references: {references}. A reference has another task and another seed, and "
        "the same base.",
        items={"references": "{reference} for {adapters:and} ({reason})"},
    ),
    "pairs-left-out": Code(
        "limit",
        "overlap",
        "{count} of {total:plural pair} are in no comparison: {classes}.",
        items={"classes": "{pair_class} ({pairs})"},
    ),
    "modules-left-out": Code(
        "limit",
        "modules",
        "{count:plural module} on the {side} side cannot be used in all pairs: {reasons}.",
        items={"reasons": "{modules:and} ({reason})"},
    ),
    "more-alike": Code(
        "result",
        "overlap",
        f"more alike than unrelated adapters. {_T} p {{p:p}} (smallest possible p "
        "{smallest_p:p}).",
        subject=_COMPARED,
    ),
    "not-distinguishable": Code(
        "result",
        "overlap",
        f"not distinguishable from unrelated adapters. {_T} p {{p:p}} (smallest possible "
        "p {smallest_p:p}).",
        subject=_COMPARED,
    ),
    "more-alike-than-random": Code(
        "result",
        "overlap",
        f"more alike than random subspaces in {_MODULES} (q < 0.05). {_RANDOM} Unrelated adapters "
        "of one base often are, too.",
        subject=_COMPARED,
    ),
    "not-distinguishable-from-random": Code(
        "result",
        "overlap",
        f"not distinguishable from random subspaces: {_MODULES} exceed them (q < 0.05). {_RANDOM}",
        subject=_COMPARED,
    ),
    "too-few-runs": Code(
        "result",
        "runs",
        f"too few runs for a test: the smallest possible p is {{smallest_p:overlap}}. {_T}",
        subject=_COMPARED,
    ),
    "too-few-references": Code(
        "result",
        "overlap",
        f"too few references for a test: {{reference_count}} of the five tasks needed. {_T} By T, "
        "the pair is number {rank_of_pair} of {pairs_of_test}. {significant} of {significant_of} "
        "modules exceed random subspaces (q < 0.05).",
        subject=_COMPARED,
    ),
    "trained-differently": Code(
        "result",
        "overlap",
        "inconclusive: trained {trained}. That alone makes unrelated adapters more or less alike. "
        f"{_T} {{outside}}.",
        subject=_COMPARED,
        items={
            "outside": "{adapter} has {quantity} {value:number} (references {low:number} to "
            "{high:number})"
        },
    ),
    "near-duplicate-pair": Code(
        "result",
        "overlap",
        "{pair_class}: one sample, not two.[[ T {mean_excess:overlap}; random 0.]]",
        subject=_COMPARED,
    ),
    "inconclusive": Code(
        "result",
        "overlap",
        "inconclusive: {reason}.[[ T {mean_excess:overlap}; random 0.]]"
        "[[ Unrelated pairs {unrelated:overlap}, at most {unrelated_maximum:overlap}.]]",
        subject=_COMPARED,
    ),
    "single-tasks": Code(
        "result",
        "runs",
        f"Tasks differ in T on the {{side}} side{_BASE}: {{tasks}}. Tasks that were trained more "
        "strongly can be more alike for that reason alone.",
        items={
            "tasks": "{task} {own:overlap} (with other tasks [[at most {other:overlap}]]; ‖ΔW‖ "
            "{norm:number}, participation ratio {participation_ratio:number})"
        },
    ),
    "overlap-of-ranks": Code(
        "result",
        "overlap",
        f"Different ranks of one task, different seeds, output side{_BASE}: T {{pairs_of_ranks}}"
        "[[; unrelated pairs {unrelated:overlap}, at most {unrelated_maximum:overlap}]].",
        items={"pairs_of_ranks": "{mean_excess:overlap} for ranks {low} and {high}"},
    ),
    "largest-overlap": Code(
        "result",
        "overlap",
        "Maximum φ(1,1) between runs of one task on the output side[[ on {base}]] over {count} "
        "values: {phi_1_1:number}, in {module} of {a} and {b}. The maximum of {count} random "
        "values would be {expected_maximum:number}[[; that of the {reference_count} unrelated "
        "values is {reference_maximum:number}]].",
    ),
    # Groups
    "group-mean": Code(
        "result",
        "groups",
        f"{_GROUP} share a mean. {_GROUP_MEAN} {_GROUP_DIRECTIONS} {{k}} further "
        f"matrices hold {{beyond_mean:overlap}}.{_GROUP_END}",
        items=_GROUP_ITEMS,
    ),
    "group-subspace": Code(
        "result",
        "groups",
        f"{_GROUP} share a subspace. {_GROUP_DIRECTIONS} {_GROUP_MEAN}{_GROUP_END}",
        items=_GROUP_ITEMS,
    ),
    "group-nothing": Code(
        "result",
        "groups",
        f"{_GROUP} share nothing beyond random directions[[ and adapters of {{others}} "
        f"other groups]]. {_GROUP_DIRECTIONS} {_GROUP_MEAN}{_GROUP_END}",
        items=_GROUP_ITEMS,
    ),
    "group-undecided": Code(
        "result",
        "groups",
        f"Whether {_GROUP} share a mean, a subspace or nothing is undecided[[: fewer than "
        "{needed} allow no p ≤ 0.05 by random signs]][[: {is_unclear:plural quantity} may or may "
        f"not exceed the random baseline or the other adapters]]. {_GROUP_DIRECTIONS} "
        f"{_GROUP_MEAN}{_GROUP_END}",
        items=_GROUP_ITEMS,
    ),
    "group-not-analyzed": Code(
        "limit", "groups", "What the adapters share as a group was not analyzed: {reason}"
    ),
    # Runs
    "checkpoints": Code(
        "result",
        "runs",
        "Earlier checkpoints of {last} compared with {last} (median ω over modules, output side): "
        "{steps}. Checkpoints of one run are one sample; earlier ones are excluded from all other "
        "results.",
        items={"steps": "step {step}: {omega:number}"},
    ),
    # Base weights, spectra, accuracy
    "no-base-weight": Code(
        "limit",
        "base weights",
        "{count:plural module} could not be compared with the base weights, for example "
        "'{module}': {reason}",
    ),
    "different-base": Code(
        "limit",
        "base weights",
        "Excluded from the comparison with {base}, because another base model is named: "
        "{excluded:and}.",
    ),
    "base-name-differs": Code(
        "limit",
        "base weights",
        "The adapters name {named} as their base model; the base weights are called {given}. If "
        "these are two models (versions of a model have the same shapes), comparisons with W are "
        "meaningless.",
    ),
    "quantized-base": Code(
        "limit",
        "base weights",
        "W is quantized ({storages}), and comparisons are with the rounded weights. The expected "
        "rounding error is {noise:number} of ‖W‖ (median over modules; maximum "
        "{largest_noise:number}). It is as unaligned with ΔW as random directions, so it alone "
        "gives an enrichment of that size: {buried} of {total} enrichments are below twice theirs.",
    ),
    "quantized-base-error-unknown": Code(
        "limit",
        "base weights",
        "W is quantized ({storages}), and comparisons are with the rounded weights. The rounding "
        "error of this storage type is unknown.",
    ),
    "amplification": Code(
        "result",
        "amplification",
        "Amplification factor ‖ΔW‖/‖UᵀWV‖ along ΔW's own directions, median over modules: {ranks}. "
        "Enrichment is ‖UᵀWV‖ over its root mean square for random directions: 1 means that W is "
        "not stronger along ΔW's directions than along random ones.",
        items={
            "ranks": "rank {rank}: {amplification_factor:number} (random {chance_factor:number}, "
            "enrichment {enrichment:number})"
        },
    ),
    "amplification-at-equal-k": Code(
        "result",
        "amplification",
        "From rank {low} to rank {high}, the enrichment at full rank {enrichments:trend}; that of "
        "the first {k:plural direction} alone {equal:trend}.",
    ),
    "enrichment-specific": Code(
        "result",
        "amplification",
        "Enrichment exceeds its crossed values in {specific} of {tested:plural run} (p ≤ 0.05 "
        f"each; about {{expected:number}} would by chance): {{adapters:and}}.{_CONTROLS}",
        items=_CONTROLS_BY_RANK,
    ),
    "enrichment-not-specific": Code(
        "result",
        "amplification",
        "Enrichment is not specific to the adapters: it exceeds the crossed values in none of "
        f"{{tested:plural run}} (smallest p {{p:p}}; p ≤ 0.05 is required).{_CONTROLS}",
        items=_CONTROLS_BY_RANK,
    ),
    "enrichment-untested": Code(
        "limit",
        "amplification",
        "Whether the enrichment is specific to the adapters is unknown: that takes at least "
        "{needed} crossed values per run (two for each unrelated adapter); the most is {values}. "
        "Pass unrelated adapters of this base as reference= (command line: --reference)."
        f"{_CONTROLS}",
        items=_CONTROLS_BY_RANK,
    ),
    "directions-by-energy": Code(
        "result",
        "spectra",
        "Directions that hold 90 % of ‖ΔW‖², median over modules (quartiles)[[, adapters of "
        "{tasks:and}]]: {ranks}. A low number can also mean that the optimizer left the others "
        "unused.",
        items={"ranks": "rank {rank}: {median:g} ({low:g} to {high:g})"},
    ),
    "accuracy": Code(
        "result",
        "accuracy",
        "Accuracy on held-out data: {groups}.",
        items={"groups": "{task} rank {rank}[[ from {before:.0%}]] to {after:.0%}"},
    ),
}
