"""The class and the populations of a pair, from every kind of evidence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from factories import directions, planted_run, reference_runs

from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation, study
from lora_analysis.studies.pair_classes import (
    Exclusion,
    PairClass,
    PairEvidence,
    classify_pairs,
    one_sample_exclusions,
)
from lora_analysis.studies.reference_test import refused_references

REPLICATE: dict[str, Any] = {
    "relation": Relation.OTHER_SEED,
    "same_task": True,
    "same_seed": False,
    "initialization": InitRelation.INDEPENDENT,
}
UNRELATED = REPLICATE | {"relation": Relation.OTHER_TASK, "same_task": False}
UNKNOWN = UNRELATED | {"relation": Relation.UNKNOWN, "same_task": None, "same_seed": None}
SHARED = {"initialization": InitRelation.SHARED, "b_cosine": 0.1}
AGREES = SHARED | {"second_factor_agrees": True, "b_cosine": 0.6}


def classified(**evidence: Any) -> tuple[PairClass, str, str]:
    """Return the class of one pair, and its populations on the output and the input side."""
    (pair,) = classify_pairs([PairEvidence(**evidence)])
    return pair.pair_class, pair.populations["output"], pair.populations["input"]


@pytest.mark.parametrize(
    ("evidence", "pair_class", "output", "input_side"),
    [
        (REPLICATE, PairClass.REPLICATE, "replicate", "replicate"),
        (UNRELATED, PairClass.UNRELATED, "unrelated", "unrelated"),
        (UNKNOWN, PairClass.UNKNOWN, "", ""),
        # Labels
        (REPLICATE | {"relation": Relation.OTHER_BASE}, PairClass.DIFFERENT_BASE, "", ""),
        (REPLICATE | {"relation": Relation.BASE_NOT_KNOWN_SAME}, PairClass.BASE_NOT_KNOWN, "", ""),
        (REPLICATE | {"relation": Relation.SAME_RUN}, PairClass.SAME_RUN, "", ""),
        (REPLICATE | {"relation": Relation.EARLIER}, PairClass.CHECKPOINT, "", ""),
        (REPLICATE | {"same_seed": True}, PairClass.SAME_DATA_ORDER, "", ""),
        (UNRELATED | {"same_seed": True}, PairClass.SAME_SEED, "", ""),
        (REPLICATE | {"same_seed": None}, PairClass.UNKNOWN, "", ""),
        (UNRELATED | {"same_seed": None}, PairClass.UNKNOWN, "", ""),
        (UNRELATED | {"same_seed": None, "one_study": False}, PairClass.UNRELATED,
         "unrelated", "unrelated"),
        (UNRELATED | {"same_seed": None, "one_study": False,
                      "initialization": InitRelation.INCONCLUSIVE}, PairClass.UNKNOWN, "", ""),
        # Copies come before labels, a different base before copies
        (UNRELATED | {"copied": 0.9}, PairClass.NEAR_DUPLICATE, "", ""),
        (UNRELATED | {"copied": 0.89}, PairClass.UNRELATED, "unrelated", "unrelated"),
        (REPLICATE | {"negated": 1.0}, PairClass.NEGATED_COPY, "", ""),
        (REPLICATE | {"copied": 0.5, "negated": 0.4}, PairClass.NEAR_DUPLICATE, "", ""),
        (REPLICATE | {"copied": 1.0, "relation": Relation.OTHER_BASE}, PairClass.DIFFERENT_BASE,
         "", ""),
        (REPLICATE | {"containment": 0.9}, PairClass.CONTAINED, "", ""),
        (REPLICATE | {"containment": 0.89}, PairClass.REPLICATE, "replicate", "replicate"),
        (REPLICATE | {"containment": float("nan")}, PairClass.REPLICATE, "replicate", "replicate"),
        # Initializations
        (REPLICATE | SHARED, PairClass.SHARED_INIT, "replicate", ""),
        (UNRELATED | SHARED, PairClass.SHARED_INIT, "unrelated", ""),
        (UNRELATED | SHARED | {"same_seed": True}, PairClass.SHARED_INIT, "", ""),
        (REPLICATE | SHARED | {"same_seed": True}, PairClass.SHARED_INIT, "", ""),
        (UNKNOWN | SHARED, PairClass.SHARED_INIT, "", ""),
        (REPLICATE | AGREES, PairClass.SAME_RUN, "", ""),
        (UNKNOWN | AGREES, PairClass.SAME_RUN, "", ""),
        (UNRELATED | AGREES, PairClass.GRADIENTS_ALIKE, "", ""),
        (UNRELATED | AGREES | {"b_cosine": 0.9}, PairClass.WRONG_LABEL, "", ""),
        (REPLICATE | {"initialization": InitRelation.SAME_SPACE}, PairClass.SHARED_INIT,
         "replicate", ""),
        (UNRELATED | {"initialization": InitRelation.SAME_SPACE}, PairClass.SHARED_INIT,
         "unrelated", ""),
        (UNKNOWN | {"initialization": InitRelation.UNDECIDED}, PairClass.SHARED_INIT, "", ""),
        # The second factor alone makes no class
        (REPLICATE | {"second_factor_agrees": True}, PairClass.REPLICATE, "replicate",
         "replicate"),
        (REPLICATE | {"initialization": InitRelation.PARTLY_SHARED}, PairClass.REPLICATE,
         "replicate", "replicate"),
        # References
        (UNKNOWN | {"reference": True}, PairClass.UNRELATED, "unrelated", "unrelated"),
        (UNRELATED | {"reference": True}, PairClass.UNRELATED, "unrelated", "unrelated"),
        (REPLICATE | {"reference": True}, PairClass.REPLICATE, "", ""),
        (UNRELATED | {"same_seed": True, "reference": True}, PairClass.SAME_SEED, "", ""),
        (UNKNOWN | SHARED | {"reference": True}, PairClass.SHARED_INIT, "unrelated", ""),
        (REPLICATE | SHARED | {"reference": True}, PairClass.SHARED_INIT, "", ""),
        (UNKNOWN | {"copied": 1.0, "reference": True}, PairClass.NEAR_DUPLICATE, "", ""),
    ],
)  # fmt: skip
def test_a_pair_has_the_first_class_that_applies(
    evidence: dict[str, Any], pair_class: PairClass, output: str, input_side: str
) -> None:
    assert classified(**evidence) == (pair_class, output, input_side)


def test_most_strangers_must_agree_before_both_factors_are_said_to_start_from_the_base() -> None:
    agreeing = PairEvidence(**UNRELATED | AGREES)
    other = PairEvidence(**UNRELATED)
    replicate = PairEvidence(**REPLICATE | AGREES)
    classes = [pair.pair_class for pair in classify_pairs([agreeing, other, other])]
    assert classes == [PairClass.GRADIENTS_ALIKE, PairClass.UNRELATED, PairClass.UNRELATED]
    classes = [pair.pair_class for pair in classify_pairs([agreeing, agreeing, other, replicate])]
    assert classes == [
        PairClass.STARTED_FROM_BASE,
        PairClass.STARTED_FROM_BASE,
        PairClass.UNRELATED,
        PairClass.STARTED_FROM_BASE,
    ]


def test_of_one_sample_the_first_adapter_counts() -> None:
    tasks: dict[str, str | None] = dict.fromkeys("abcd")
    pairs = [
        ("a", "c", PairClass.NEAR_DUPLICATE),
        ("b", "c", PairClass.UNKNOWN),
        ("c", "d", PairClass.SAME_RUN),
    ]
    assert one_sample_exclusions(pairs, tasks) == {
        "c": Exclusion.ONE_SAMPLE,
        "d": Exclusion.ONE_SAMPLE,
    }
    assert one_sample_exclusions([], tasks) == {}


def test_of_one_sample_under_several_task_names_none_counts() -> None:
    tasks = {"x0": "x", "y0": "y", "x1": "x", "unknown": None}
    pairs = [("x0", "y0", PairClass.WRONG_LABEL), ("y0", "unknown", PairClass.CONTAINED)]
    conflicts = one_sample_exclusions(pairs, tasks)
    assert conflicts == dict.fromkeys(("x0", "y0", "unknown"), Exclusion.CONFLICTING_LABELS)


def test_a_reference_excludes_no_analyzed_adapter() -> None:
    tasks = {"x0": "x", "copy": "z"}
    pairs = [("x0", "copy", PairClass.NEAR_DUPLICATE)]
    assert one_sample_exclusions(pairs, tasks, ["copy"]) == {"copy": Exclusion.CONFLICTING_LABELS}
    assert one_sample_exclusions(pairs, tasks | {"copy": "x"}, ["copy"]) == {
        "copy": Exclusion.ONE_SAMPLE
    }


# --- in a study -------------------------------------------------------------------------------


def recomposed(adapter: Adapter, label: str, rng: np.random.Generator, **facts: Any) -> Adapter:
    """The same updates in other factors."""
    updates = {}
    for name, update in adapter.items():
        mix = rng.standard_normal((update.rank, update.rank)) + 2 * np.eye(update.rank)  # type: ignore[union-attr]
        updates[name] = LowRankUpdate(
            name,
            mix @ update.A,  # type: ignore[union-attr]
            update.B @ np.linalg.inv(mix),  # type: ignore[union-attr]
            1.0,
            label=label,
        )
    return Adapter(updates, label=label, provenance=replace(adapter.provenance, **facts))


def populations(result: Any) -> dict[tuple[str, str], str]:
    """Return the population of each pair on the output side."""
    pairs = result.pairs
    return dict(zip(zip(pairs["a"], pairs["b"], strict=True), pairs["population_output"],
                    strict=True))  # fmt: skip


def test_a_copy_under_another_seed_counts_once(rng: np.random.Generator) -> None:
    shared = directions(rng)
    runs = [planted_run(rng, f"x{s}", shared, task="x", seed=s) for s in range(2)]
    result = study([*runs, recomposed(runs[0], "copy", rng, seed=7)])
    excluded = result.runs.set_index("adapter")["excluded"]
    assert excluded.to_dict() == {"x0": "", "x1": "", "copy": Exclusion.ONE_SAMPLE}
    assert populations(result) == {("x0", "x1"): "replicate", ("x0", "copy"): "",
                                   ("x1", "copy"): ""}  # fmt: skip
    rows = result.population("replicate", "output")
    assert set(zip(rows["a"], rows["b"], strict=True)) == {("x0", "x1")}


def test_a_copy_under_another_task_leaves_the_unrelated_pairs(rng: np.random.Generator) -> None:
    runs = [planted_run(rng, f"{t}{s}", directions(rng), task=t, seed=10 * "xyz".index(t) + s)
            for t in "xy" for s in range(2)]  # fmt: skip
    copy = recomposed(runs[0], "copy", rng, task="z", seed=33)
    result = study([*runs, copy])
    excluded = result.runs.set_index("adapter")["excluded"]
    assert set(excluded[["x0", "copy"]]) == {Exclusion.CONFLICTING_LABELS}
    assert not any("x0" in pair or "copy" in pair
                   for pair, name in populations(result).items() if name)  # fmt: skip
    assert populations(result)["x1", "y0"] == "unrelated"


def test_untrained_and_earlier_adapters_are_in_no_population(rng: np.random.Generator) -> None:
    runs = [planted_run(rng, f"x{s}", task="x", seed=s) for s in range(2)]
    empty = Adapter(
        {name: replace(update, B=0 * update.B) for name, update in runs[0].items()},  # type: ignore[union-attr, type-var]
        label="empty",
        provenance=replace(runs[0].provenance, seed=5),
    )
    steps = [planted_run(rng, f"step{n}", task="x", seed=6, step=n) for n in (1, 2)]
    result = study([*runs, empty, *steps])
    assert result.runs.set_index("adapter")["excluded"].to_dict() == {
        "x0": "", "x1": "", "empty": Exclusion.UNTRAINED, "step1": Exclusion.EARLIER, "step2": "",
    }  # fmt: skip
    counted = {pair for pair, name in populations(result).items() if name}
    assert counted == {("x0", "x1"), ("x0", "step2"), ("x1", "step2")}


def test_references_are_refused_by_name(rng: np.random.Generator) -> None:
    pair = [planted_run(rng, f"x{s}", task="x", seed=s) for s in range(2)]
    references = [
        planted_run(rng, "same seed", task="y", seed=1),
        recomposed(pair[0], "copy", rng, task=None, seed=None),
        planted_run(rng, "good", task="z", seed=8),
        planted_run(rng, "unlabeled"),
    ]
    refused = refused_references(study(pair, reference=references))
    assert {(r.reference, r.reason, r.adapters) for r in refused} == {
        ("same seed", "same seed", ("x1",)),
        ("copy", Exclusion.ONE_SAMPLE, ("x0", "x1")),
    }
    assert refused_references(study(pair, reference=reference_runs(rng, 3))) == ()
