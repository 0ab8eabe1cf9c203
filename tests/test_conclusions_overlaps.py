"""Findings about pairs: comparisons, levels, classes of pairs, what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from factories import (
    adapter,
    directions,
    low_rank_update,
    orthonormal,
    planted_run,
    planted_update,
    reference_runs,
)
from test_studies import sweep  # noqa: F401  (a fixture)

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.conclusions import comparison_fields, comparisons, findings
from lora_analysis.finding import Finding
from lora_analysis.studies import Study, study
from lora_analysis.text import overlap_number


def of_code(result: Study | Sequence[Finding], code: str) -> list[Finding]:
    """Return the findings of one code."""
    every = findings(result) if isinstance(result, Study) else result
    return [finding for finding in every if finding.code == code]


def side_of(finding: Finding, side: str) -> dict[str, Any]:
    """Return the fields of one side of a finding."""
    (fields,) = (fields for fields in finding.fields["sides"] if fields["side"] == side)
    return dict(fields)


def unlabeled(adapters: list[Adapter]) -> list[Adapter]:
    """Return the adapters as strangers publish them: no task, no seed."""
    return [
        Adapter(dict(run), label=f"{i}", provenance=Provenance(rank=run.provenance.rank))
        for i, run in enumerate(adapters)
    ]


def on_base(run: Adapter, base: str, label: str, **fields: Any) -> Adapter:
    """Return the adapter as one of the given base model."""
    provenance = replace(run.provenance, base_model=base, **fields)
    return Adapter(dict(run), label=label, provenance=provenance)


def runs_of(
    rng: np.random.Generator, tasks: str, seeds: int, prefix: str = "", **kwargs: Any
) -> list[Adapter]:
    """Related runs of several tasks; every run has a seed of its own."""
    shared = {task: directions(rng) for task in tasks}
    return [
        planted_run(
            rng,
            f"{prefix}{task}{seed}",
            shared[task],
            **{"task": task, "seed": 10 * ord(task) + seed, **kwargs},
        )
        for task in tasks
        for seed in range(seeds)
    ]


# --- comparisons in words -----------------------------------------------------------------------


def test_a_finding_has_all_values_of_its_comparison(rng: np.random.Generator) -> None:
    result = study(runs_of(rng, "xyz", 3))
    every = [c for c in comparisons(result) if c.kind in ("tasks", "pair", "adapters")]
    stated = [finding for finding in findings(result) if "conclusion" in finding.fields]
    assert [dict(finding.fields) for finding in stated] == list(map(comparison_fields, every))


@pytest.mark.parametrize(
    ("make", "code", "start"),
    [
        (lambda rng: study(runs_of(rng, "xyz", 3)), "more-alike",
         "Runs of one task, output side: more alike than unrelated adapters. T 0."),
        (lambda rng: study([planted_run(rng, f"{t}{s}", task=t, seed=10 * ord(t) + s)
                            for t in "xyz" for s in range(3)]), "not-distinguishable",
         "Runs of one task, output side: not distinguishable from unrelated adapters. T "),
        (lambda rng: study(runs_of(rng, "xy", 2)), "too-few-runs",
         "Runs of one task, output side: too few runs for a test: the smallest possible p is 0.33."
         " T 0."),
        (lambda rng: study(runs_of(rng, "x", 2)), "more-alike-than-random",
         "x0 and x1, output side: more alike than random subspaces in 6 of 6 modules (q < 0.05). "
         "Median ω 0."),
        (lambda rng: study([planted_run(rng, label) for label in "ab"]),
         "not-distinguishable-from-random",
         "a and b, output side: not distinguishable from random subspaces: 0 of 6 modules exceed "
         "them (q < 0.05). Median ω 0."),
        (lambda rng: study(runs_of(rng, "x", 2), reference=reference_runs(rng, 3)),
         "too-few-references",
         "x0 and x1, output side: too few references for a test: 3 of the five tasks needed. T 0."),
        (lambda rng: study(runs_of(rng, "x", 2, factor=2.0), reference=reference_runs(rng, 5)),
         "trained-differently",
         "x0 and x1, output side: inconclusive: trained more strongly than every reference. That "
         "alone makes unrelated adapters more or less alike. T 0."),
        (lambda rng: study(unlabeled(runs_of(rng, "x", 1) * 2)), "near-duplicate-pair",
         "0 and 1, output side: near-duplicate: one sample, not two. T 1.00; random 0."),
        (lambda rng: study([planted_run(rng, t, task=t, seed=0) for t in "xy"]), "inconclusive",
         "x and y, output side: inconclusive: same seed, and so the same data order. T "),
    ],
)  # fmt: skip
def test_each_conclusion_has_its_sentence_claim_first(make, code, start, rng) -> None:
    finding = of_code(make(rng), code)[0]
    assert finding.text.startswith(start)
    assert finding.statement == finding.text.removeprefix(f"{finding.subject}: ")
    assert "nan" not in finding.text
    assert "–" not in finding.text


def test_the_sentence_of_a_test_has_level_and_p(rng: np.random.Generator) -> None:
    result = study(runs_of(rng, "x", 2), reference=reference_runs(rng, 5))
    finding = of_code(result, "more-alike")[0]
    fields = finding.fields
    assert finding.statement == (
        f"more alike than unrelated adapters. T {fields['mean_excess']:.2f} (largely the same); "
        f"unrelated pairs {overlap_number(fields['unrelated'])}, at most "
        f"{fields['unrelated_maximum']:.2f}; random 0. p = 0.048 (smallest possible p = 0.048)."
    )


def test_what_a_test_still_needs_is_a_finding(rng: np.random.Generator) -> None:
    pair, references = runs_of(rng, "x", 2), reference_runs(rng, 5)
    (finding,) = of_code(study(pair), "no-reference-pairs")
    assert "Pass five adapters of other tasks" in finding.text
    strangers = [planted_run(rng, task, task=task, seed=ord(task)) for task in "yz"]
    assert of_code(study(strangers), "no-reference-pairs")  # the pair is no level for itself
    (finding,) = of_code(study(pair, reference=references[:4]), "more-references-needed")
    assert finding.fields == {"compared": "x0 and x1", "missing": 1}
    assert "needs 1 more adapter of another task" in finding.text
    stronger = runs_of(rng, "x", 2, factor=2.0)
    (finding,) = of_code(study(stronger, reference=references), "other-references-needed")
    assert finding.fields["quantities"] == ["‖ΔW‖"]
    codes = {f.code for f in findings(study(pair, reference=references))}
    assert not codes & {"more-references-needed", "other-references-needed", "no-reference-pairs"}


def test_refused_references_are_named(rng: np.random.Generator) -> None:
    pair = runs_of(rng, "x", 2)
    seed = pair[1].provenance.seed
    references = [planted_run(rng, "same seed", task="y", seed=seed), *reference_runs(rng, 1)]
    (finding,) = of_code(study(pair, reference=references), "references-refused")
    assert finding.text.startswith("Refused as references: same seed for x1 (same seed).")


def test_unequal_tasks_are_named_each_with_its_own_t(rng: np.random.Generator) -> None:
    runs = [*runs_of(rng, "xy", 3), *runs_of(rng, "z", 3, cosine=0.6)]
    (finding,) = [f for f in of_code(study(runs), "single-tasks") if f.fields["side"] == "output"]
    own = {task["task"]: task["own"] for task in finding.fields["tasks"]}
    assert own["x"] > 0.5 > own["z"] > 0
    assert all(f"{task} {value:.2f}" in finding.text for task, value in own.items())


def test_findings_tell_the_planted_story(sweep: list[Adapter]) -> None:  # noqa: F811
    every = findings(study(sweep))
    (shared,) = of_code(every, "shared-seed")
    assert shared.severity == "artifact"
    side = side_of(shared, "input")
    assert side["phi_r_r"] > 0.9 > side["reference"]
    (ranks,) = of_code(every, "overlap-of-ranks")
    (pair,) = ranks.fields["pairs_of_ranks"]
    assert (pair["low"], pair["high"]) == (4, 8)
    assert pair["mean_excess"] > 0.9
    assert ranks.fields["unrelated"] < 0.3
    codes = [finding.code for finding in every]
    assert codes.index("shared-seed") < codes.index("overlap-of-ranks")
    assert codes.index("overlap-of-ranks") < codes.index("reference-pairs")


def test_unrelated_pairs_are_described_base_by_base(rng: np.random.Generator) -> None:
    first = [on_base(run, "org/first", f"1{run.label}") for run in runs_of(rng, "xy", 2)]
    # On the other base, all tasks write the same directions: unrelated pairs agree there.
    shared = directions(rng)
    second = [
        on_base(planted_run(rng, "", shared), "org/second", f"2{task}{s}", task=task,
                seed=10 * ord(task) + s)
        for task in "xy" for s in range(2)
    ]  # fmt: skip
    mixed = findings(study([*first, *second]))
    references = of_code(mixed, "reference-pairs")
    assert [finding.fields["base"] for finding in references] == ["org/first", "org/second"]
    low, high = (side_of(finding, "output")["median"] for finding in references)
    assert low < 0.1
    assert high > 0.5
    # What is stated of each base is what is stated if it is alone: nothing is pooled.
    codes = {"too-few-runs", "inconclusive", "single-tasks", "largest-overlap"}
    for runs, base in ((first, "org/first"), (second, "org/second")):
        alone = [finding for finding in findings(study(runs)) if finding.code in codes]
        assert alone
        for finding in alone:
            same = Finding(finding.code, {**finding.fields, "base": base})
            assert any(equal_but_for_rounding(same, other) for other in mixed)


def equal_but_for_rounding(a: Finding, b: Finding) -> bool:
    """Products of more updates at once are summed in another order."""
    return a.code == b.code and a.text == b.text and approximately(a.fields) == b.fields


def approximately(value: Any) -> Any:
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True)
    if isinstance(value, dict):
        return {key: approximately(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(approximately(inner) for inner in value)
    return value


# --- what counts ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_unrelated_adapters_are_never_called_more_alike(rng: np.random.Generator) -> None:
    codes = []
    for i in range(20):
        made = [adapter(rng, label=f"{i}-{k}", modules=4) for k in range(4)]
        codes += [finding.code for finding in findings(study(made[:2], reference=made[2:]))]
    assert "more-alike" not in codes
    assert codes.count("too-few-references") == 40


def test_degenerate_first_directions_have_no_angle(rng: np.random.Generator) -> None:
    equal = np.array([1.0, 1.0, 0.5, 0.2])
    updates = [
        planted_update(orthonormal(rng, 24, 4), values, orthonormal(rng, 20, 4))
        for values in (equal, np.array([4.0, 2.0, 1.0, 0.5]))
    ]
    result = study([Adapter({"q": update}, label=str(i)) for i, update in enumerate(updates)])
    assert set(result.similarities["degeneracy_1_1"]) == {"degenerate"}
    for comparison in comparisons(result):
        assert np.isnan(comparison.angle)
        assert comparison_fields(comparison)["angle"] is None
        assert np.isfinite(comparison.mean_excess)
    (counted,) = of_code(result, "degenerate-directions")
    assert counted.fields == {
        "count": 1, "comparisons": 1, "degenerate": 1, "nearly_degenerate": 0,
    }  # fmt: skip


def test_one_run_twice_is_one_sample(
    sweep: list[Adapter],  # noqa: F811
) -> None:
    first = unlabeled(sweep)[0]
    later = Adapter(
        {
            name: LowRankUpdate(name=name, A=update.A + 0.01, B=update.B * 1.1, scale=update.scale)  # type: ignore[union-attr]
            for name, update in first.items()
        },
        label="later",
        provenance=first.provenance,
    )
    result = study([first, later])
    assert result.population("replicate", "output").empty
    assert result.population("unrelated", "output").empty
    assert (
        result.runs.set_index("adapter")["excluded"]["later"] == "one sample with another adapter"
    )
    every = findings(result)
    (copy,) = of_code(every, "near-duplicates")
    assert copy.text.endswith("They are one sample.")
    assert len(of_code(every, "near-duplicate-pair")) == 2


def test_many_pairs_with_a_shared_initialization_are_one_finding(rng: np.random.Generator) -> None:
    """Every A is that of the first; counts in the sentence are integers."""
    first = adapter(rng, label="0")
    made = [first]
    for n in range(1, 5):
        updates = {
            name: replace(update, B=rng.standard_normal(update.B.shape))  # type: ignore[type-var, union-attr]
            for name, update in first.items()
        }
        made.append(Adapter(updates, label=str(n)))
    (shared,) = of_code(study(made), "shared-initialization")
    assert shared.fields["pairs"] == 10
    assert shared.text.startswith(
        "10 pairs (medians), for example 0 and 1: shared initialization of A in 4 of 4 modules"
    )


def test_pairs_and_modules_that_are_left_out_are_counted_and_named(
    rng: np.random.Generator,
) -> None:
    runs = runs_of(rng, "xyz", 3)
    heads = [
        Adapter({**dict(run), "score": low_rank_update(rng, 1, 80, name="score")},
                label=run.label, provenance=run.provenance)
        for run in runs
    ]  # fmt: skip
    copy = Adapter(dict(heads[0]), label="copy", provenance=replace(heads[0].provenance, seed=1))
    every = findings(study([*heads, copy]))
    (pairs,) = of_code(every, "pairs-left-out")
    assert (pairs.fields["count"], pairs.fields["total"]) == (9, 45)
    assert "one sample with another adapter (9)" in pairs.text
    (modules,) = of_code(every, "modules-left-out")
    assert modules.text == (
        "1 module on the output side cannot be used in all pairs: score (too few dimensions: "
        "random subspaces already overlap)."
    )


def test_the_largest_of_many_stands_next_to_the_maximum_of_as_many_random_values(
    rng: np.random.Generator,
) -> None:
    result = study([
        adapter(rng, label=f"{task}{seed}", task=task, seed=10 * ord(task) + seed)
        for task in "xy" for seed in range(2)
    ])  # fmt: skip
    (finding,) = of_code(result, "largest-overlap")
    rows = result.population("replicate", "output")
    rows = rows[rows["degeneracy_1_1"] == ""]
    assert finding.fields["count"] == len(rows)
    assert finding.fields["phi_1_1"] == pytest.approx(rows["phi_1_1"].max())
    others = rng.standard_normal((400, len(rows), 24))
    lines = others[..., 0] ** 2 / (others**2).sum(axis=-1)
    expected = lines.max(axis=1).mean()
    assert finding.fields["expected_maximum"] == pytest.approx(expected, rel=0.05)
    unrelated = result.population("unrelated", "output")
    unrelated = unrelated[unrelated["degeneracy_1_1"] == ""]
    assert finding.fields["reference_count"] == len(unrelated)
    assert finding.fields["reference_maximum"] == pytest.approx(unrelated["phi_1_1"].max())


def test_copies_that_are_not_in_the_tables_of_pairs_are_named(rng: np.random.Generator) -> None:
    original, other = (adapter(rng, label=label) for label in ("original", "other"))
    every = [original, other, original.with_label("copy")]
    result = study(every, max_pairs=1)
    assert result.fully_compared == ("original", "other")
    (copies,) = of_code(findings(result), "near-duplicates")
    assert copies.subject == "original and copy"
