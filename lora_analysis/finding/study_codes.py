"""Codes of findings about a study: what its adapters, pairs, runs and base weights show."""

from __future__ import annotations

from typing import Final

from lora_analysis.finding.templates import Code

_SIDES: Final = {
    "sides": (
        "{side} side {conclusion} ([[{above_reference} of {values} values above 95 % of the "
        "reference; ]]median {quantity} {median:overlap}[[, reference {reference:overlap}]], "
        "random {chance:number}[[; {excluded:nonzero} excluded]])"
    )
}
_PAIRS: Final = "[[{pairs} pairs (medians), for example ]]{a} and {b}"
_RUNS: Final = (
    "Rank {rank}[[ on {base}]], {runs:plural run} of {tasks:plural task}: median {quantity} on the "
    "output side {within:quartiles} between runs of one task and {between:quartiles} between runs "
    "of different tasks. The means differ by {difference:number}[[ (jackknife standard error over "
    "runs {standard_error:number})]]; relabeling the runs gives p {p:p} (smallest possible p "
    "{smallest_p:p})."
)
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
    "near-duplicates": Code(
        "artifact",
        "adapters",
        "{duplicates:and} are near-duplicates: the signed cosine of their whole updates is at "
        "least 0.99, and their norms differ by a factor of {norm_ratio:number}. They are one "
        "sample.",
    ),
    "several-bases": Code(
        "limit",
        "adapters",
        "The adapters name {count} base models: {bases}. Directions of different base models are "
        "unrelated, even if shapes agree[[: {excluded_pairs:plural pair} across base models not "
        "compared]][[; {compared_pairs:plural pair} across base models compared as requested]]."
        "[[ No base model is named by {unnamed:and}: compared with all adapters of the same "
        "shapes.]]",
        items={"bases": "{base} ({adapters:plural adapter})"},
    ),
    "unknown-task-or-seed": Code(
        "limit",
        "adapters",
        "Task or seed of {count} of {total} adapters is unknown ({unlabeled}), so their pairs "
        "cannot be grouped by task and seed. Pass label= (command line: --label "
        "'{{task}}-r{{rank}}-s{{seed}}'), or put a manifest.json next to each adapter "
        '({{"task": ..., "seed": ...}}).',
    ),
    "sampled-adapters": Code(
        "limit",
        "adapters",
        "Pairs of {compared} of {total} adapters, a sample of every task and rank, are compared "
        "module by module. The similarity matrix and the tables of single adapters hold all "
        "{total}.",
    ),
    "few-seeds": Code(
        "limit",
        "runs",
        "Too few seeds for an interval over seeds (at least 3 are needed): {groups}. Quartiles are "
        "over modules and describe this study only.",
        items={"groups": "{task} rank {rank} ({seeds:plural seed})"},
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
    # Initializations
    "same-run": Code(
        "artifact",
        "initialization",
        "same training run: A started from the same values and B agrees too (median matched cosine "
        "{b_cosine:number}). Possible causes are one run stored twice, a continued run, or the "
        "same seed on the same task. They are one sample, not two, and are excluded from all "
        "results.",
        subject=_PAIRS,
    ),
    "shared-initialization": Code(
        "artifact",
        "initialization",
        "shared initialization of A in all {shared_modules} modules (same script, same seed); B "
        "was learned independently (median matched cosine {b_cosine:number}). Input-side overlap "
        "comes from the initialization and is excluded.",
        subject=_PAIRS,
    ),
    "partly-shared-initialization": Code(
        "artifact",
        "initialization",
        "shared initialization of A in {shared_modules} of {modules} modules, which are excluded "
        "on the input side.",
        subject=_PAIRS,
    ),
    "same-input-space": Code(
        "artifact",
        "initialization",
        "same input space, spanned by different rows of A (a resized copy, or an initialization "
        "from data or from W). Input-side overlap was not learned.",
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
        "{pairs:plural pair} of different tasks[[ on {base}]] used the same seed and share their "
        "initial A ({whole} in every module[[, {partly:nonzero} in part of the modules]]). Median "
        "φ(r,r): {sides}. The extra input-side overlap comes from the shared initialization; these "
        "pairs are excluded.",
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
        "Reference[[ on {base}]]: {pairs:plural pair} of unrelated adapters (different task, "
        "different seed; ranks {ranks}) with median {quantity} {sides}. A group counts as more "
        "alike than unrelated adapters if the median of each of its pairs exceeds that of every "
        "reference pair, and at least half of its values exceed 95 % of the reference values (in "
        "the module types of the group).",
        items={
            "ranks": "{low}/{high}",
            "sides": "{median:overlap} on the {side} side (95 % below {quantile_95:overlap}, "
            "random {chance:number})",
        },
    ),
    "no-reference-pairs": Code(
        "limit",
        "overlap",
        "No reference pairs (different task, different seed), so overlaps are compared with random "
        "subspaces only. Whether unrelated adapters of this base are as alike is unknown: pass two "
        "or more as reference= (command line: --reference).",
    ),
    "overlap-of-ranks": Code(
        "result",
        "overlap",
        "{sides}.",
        subject="Rank {low} and rank {high} on the same task, {seeds}[[, on {base}]]",
        items=_SIDES,
    ),
    "overlap-of-seeds": Code(
        "result",
        "overlap",
        "{sides}.",
        subject="Two seeds of rank {rank} on the same task[[, on {base}]]",
        items=_SIDES,
    ),
    "overlap-of-pair": Code("result", "overlap", "{sides}.", subject="{a} and {b}", items=_SIDES),
    "overlap-of-adapters": Code(
        "result",
        "overlap",
        "{sides}.",
        subject="{count} adapters of unknown relation[[, on {base}]]",
        items=_SIDES,
    ),
    "overlap-undefined": Code(
        "result",
        "overlap",
        "φ(1,1) is undefined: no first direction is well defined, or all are excluded because of a "
        "shared initialization.",
        subject="{compared}",
    ),
    "overlaps-inconclusive": Code(
        "result",
        "overlap",
        "{count} comparisons are {conclusion}. Median {quantity} {sides}[[; {excluded:nonzero} "
        "values excluded (degenerate directions or shared initialization)]]. The table of "
        "conclusions lists each.",
        items={"sides": "{medians:range} on the {side} side (random {chances:range})"},
    ),
    "largest-overlap": Code(
        "result",
        "overlap",
        "Maximum φ(1,1) on the output side[[ on {base}]] over {count} values: {phi_1_1:number}, in "
        "{module} of {a} and {b}. The maximum of {count} random values would be "
        "{expected_maximum:number}[[; that of the {reference_count} reference values is "
        "{reference_maximum:number}]].",
    ),
    # Runs
    "runs-compared": Code("result", "runs", _RUNS),
    "too-few-runs": Code(
        "result", "runs", f"{_RUNS} Too few runs: p cannot fall below 0.05 with so few."
    ),
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
        "Directions that hold 90 % of ‖ΔW‖², median over modules (quartiles): {ranks}. A low "
        "number can also mean that the optimizer left the others unused.",
        # Medians and quartiles of counts: 2, 2.5 or 2.25, never rounded to integers.
        items={"ranks": "rank {rank}: {median} ({low} to {high})"},
    ),
    "accuracy": Code(
        "result",
        "accuracy",
        "Accuracy on held-out data: {groups}.",
        items={"groups": "{task} rank {rank}[[ from {before:.0%}]] to {after:.0%}"},
    ),
}
