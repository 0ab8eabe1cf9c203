"""Findings about adapters, their runs and their base weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import adapter
from safetensors.numpy import save_file
from test_conclusions_overlaps import of_code, on_base
from test_studies import NAMES, sweep  # noqa: F401  (a fixture)
from test_studies_similarity_matrix import scaled

from lora_analysis.adapter import Adapter, Provenance
from lora_analysis.bases import open_base
from lora_analysis.conclusions import findings
from lora_analysis.finding import Finding
from lora_analysis.studies import study


def test_untrained_adapters_of_known_tasks_do_not_break_the_findings(
    sweep: list[Adapter],  # noqa: F811
) -> None:
    empty = [
        Adapter(
            {name: replace(one, B=np.zeros_like(one.B)) for name, one in task.items()},  # type: ignore[type-var]
            label=task.label,
            provenance=task.provenance,
        )
        for task in (sweep[0], sweep[2])
    ]
    assert len(of_code(study(empty), "untrained-adapter")) == 2


def test_ranks_are_compared_with_w_at_equal_k_and_on_equal_tasks(
    sweep: list[Adapter],  # noqa: F811
    rng: np.random.Generator,
) -> None:
    weights = {f"{name}.weight": rng.standard_normal((48, 40)) for name in NAMES}
    result = study(sweep, base=open_base(weights), draws=0)
    (full,) = of_code(result, "amplification")
    (equal,) = of_code(result, "amplification-at-equal-k")
    table = result.amplifications
    turn = table[table["adapter"].str.startswith("turn")]  # flip was trained at rank 4 only
    rank8 = turn["adapter"] == "turn-r8-s0"
    own = turn[~rank8 & turn["at_rank"]]["enrichment"].median()
    assert full.fields["ranks"][0]["rank"] == 4
    assert full.fields["ranks"][0]["enrichment"] == pytest.approx(own)
    assert equal.fields["k"] == 4
    expected = turn[rank8 & (turn["k"] == 4)]["enrichment"].median()
    assert equal.fields["ranks"][1] == {"rank": 8, "enrichment": pytest.approx(expected)}


def test_several_base_models_are_named(rng: np.random.Generator) -> None:
    made = [
        Adapter(dict(adapter(rng)), label=base, provenance=Provenance(base_model=base))
        for base in ("org/one", "org/two")
    ]
    (finding,) = of_code(study(made), "several-bases")
    assert "org/one (1 adapter), org/two (1 adapter)" in finding.text
    assert "1 pair across base models not compared" in finding.text
    (finding,) = of_code(study(made, across_bases=True), "several-bases")
    assert "1 pair across base models compared as requested" in finding.text


def test_an_adapter_of_another_base_is_not_compared_with_this_one(
    sweep: list[Adapter],  # noqa: F811
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    weights = {f"{name}.weight": rng.standard_normal((48, 40)) for name in NAMES}
    folder = tmp_path / "first-awq"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    ours = on_base(sweep[0], "somebody/First", "ours")
    theirs = on_base(sweep[1], "somebody/first-instruct", "theirs")
    result = study([ours, theirs, sweep[2]], base=open_base(folder))
    assert set(result.amplifications["adapter"]) == {"ours", sweep[2].label}
    (finding,) = of_code(result, "different-base")
    assert finding.fields == {"base": "first-awq", "excluded": ["theirs"]}
    # All name one base, which can have another name on this disk: compared, and reported.
    alone = study([theirs], base=open_base(folder))
    assert set(alone.amplifications["adapter"]) == {"theirs"}
    (finding,) = of_code(alone, "base-name-differs")
    assert "somebody/first-instruct" in finding.text
    codes = {"different-base", "base-name-differs"}
    fitting = study([ours], base=open_base(folder))
    assert not codes & {finding.code for finding in findings(fitting)}
    shutil.copytree(folder, tmp_path / "model")  # a generic name contradicts none
    nothing = study([theirs], base=open_base(tmp_path / "model"))
    assert not codes & {finding.code for finding in findings(nothing)}
    unnamed = study([ours, theirs], base=open_base(weights))  # arrays have no name
    assert set(unnamed.amplifications["adapter"]) == {"ours", "theirs"}


def test_adapters_of_one_size_have_not_diverged(rng: np.random.Generator) -> None:
    assert not of_code(study([adapter(rng, label=str(n)) for n in range(4)]), "diverged")


def test_norms_of_other_bases_modules_or_steps_are_no_measure(rng: np.random.Generator) -> None:
    def of(label: str, factor: float, **facts: object) -> Adapter:
        return scaled(adapter(rng), label, factor, **facts)

    small = [of(f"s{n}", 0.01, base_model="one") for n in range(3)]
    steps = [of(f"t{n}", 0.01, base_model="two", task="t", seed=0, step=n) for n in (1, 2)]
    last = of("last", 1.0, base_model="two", task="t", seed=0, step=3)
    assert not of_code(
        study([*small, of("other", 1.0, base_model="two"), *steps, last]), "diverged"
    )


def test_runs_are_compared_with_the_smallest_p_there_is(
    sweep: list[Adapter],  # noqa: F811
) -> None:
    finding = of_code(study(sweep), "too-few-runs")[0]
    assert finding.fields["kind"] == "tasks"
    assert finding.fields["smallest_p"] > 0.05
    assert "too few runs for a test" in finding.text
    assert finding.fields["mean_excess"] > finding.fields["unrelated_maximum"]


def test_a_copied_factor_is_an_artifact_before_the_results(
    sweep: list[Adapter],  # noqa: F811
) -> None:
    note = Finding("copied-a", {"count": 4, "modules": ["a", "b"]})
    noted = sweep[0].with_provenance(findings=(note, "its config names no base."))
    every = findings(study([noted, *sweep[1:]]))
    copied = every.index(note.of_adapters([sweep[0].label]))
    assert every[copied].severity == "artifact"
    assert copied < [finding.severity for finding in every].index("result")
    assert every[-1].text == f"{sweep[0].label}: its config names no base."


def test_many_findings_of_one_code_are_one(rng: np.random.Generator) -> None:
    made = [
        adapter(rng, label=str(n)).with_provenance(
            findings=(Finding("scale-unknown", {"modules": n, "of": 9, "reason": "none stated"}),)
        )
        for n in range(7)
    ]
    (finding,) = of_code(study(made), "scale-unknown")
    assert finding.fields["adapters"] == [str(n) for n in range(7)]
    assert finding.text.startswith("0, 1, 2, 3 and 3 more: The scale of 0 of 9 modules")
