"""The rank test of a pair among reference pairs: what is chosen, ranked, and refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from factories import RUN_VALUES, directions, planted_run, reference_runs

from lora_analysis.adapter import Adapter
from lora_analysis.bases import open_base
from lora_analysis.chance import rank_test
from lora_analysis.studies import Study, study
from lora_analysis.studies.reference_test import (
    ReferenceTest,
    choose_references,
    reference_test,
    training_strength,
)


@pytest.fixture
def pair(rng: np.random.Generator) -> list[Adapter]:
    shared = directions(rng)
    return [planted_run(rng, label, shared) for label in "ab"]


def rank_of_pair(result: Study, side: str = "output") -> ReferenceTest:
    test = reference_test(result, "a", "b", side)  # type: ignore[arg-type]
    assert test is not None
    return test


def with_t(result: Study, values: dict[tuple[str, str], float], rest: float = 0.0) -> Study:
    """Return the study with other values of T."""
    pairs = result.pairs.copy()
    pairs["mean_excess_output"] = [
        values.get((a, b), rest) for a, b in zip(pairs["a"], pairs["b"], strict=True)
    ]
    return replace(result, pairs=pairs)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_the_smallest_p_is_one_over_the_number_of_pairs(
    count: int, pair: list[Adapter], rng: np.random.Generator
) -> None:
    test = rank_of_pair(study(pair, reference=reference_runs(rng, count)))
    pairs = (count + 2) * (count + 1) // 2
    assert (test.rank, test.pairs) == (1, pairs)
    assert test.p_value == test.smallest_p_value == 1 / pairs
    assert len(test.references) == count
    assert (test.smallest_p_value <= 0.05) == (count >= 5)


def test_the_rank_counts_every_pair_that_is_as_alike(
    pair: list[Adapter], rng: np.random.Generator
) -> None:
    result = study(pair, reference=reference_runs(rng, 3))
    values = {("a", "b"): 0.5, ("a", "task0"): 0.7, ("task1", "task2"): 0.6, ("b", "task1"): 0.4}
    test = rank_of_pair(with_t(result, values))
    assert (test.rank, test.pairs, test.p_value) == (3, 10, 0.3)


def test_ties_count_against_the_pair(pair: list[Adapter], rng: np.random.Generator) -> None:
    result = study(pair, reference=reference_runs(rng, 3))
    assert rank_of_pair(with_t(result, {("a", "b"): 0.5, ("a", "task0"): 0.5})).rank == 2
    assert rank_of_pair(with_t(result, {})).rank == 10


def test_the_test_is_that_of_the_matrix_of_t(pair: list[Adapter], rng: np.random.Generator) -> None:
    result = study(pair, reference=reference_runs(rng, 4))
    labels = ["a", "b", *(f"task{i}" for i in range(4))]
    for side in ("output", "input"):
        matrix = np.zeros((6, 6))
        for row in result.pairs.itertuples():
            i, j = labels.index(row.a), labels.index(row.b)
            matrix[i, j] = matrix[j, i] = getattr(row, f"mean_excess_{side}")
        expected = rank_test(matrix)
        test = rank_of_pair(result, side)
        assert (test.rank, test.pairs, test.p_value) == (
            expected.rank, expected.pairs, expected.p_value,
        )  # fmt: skip


def test_one_reference_per_task_nearest_in_rank_then_in_norm(
    pair: list[Adapter], rng: np.random.Generator
) -> None:
    def of_task(label: str, factor: float, rank: int = 4) -> Adapter:
        values = (*RUN_VALUES, 0.3, 0.2)[:rank]
        seed = 100 + sum(map(ord, label))
        return planted_run(rng, label, task=label[0], seed=seed, factor=factor, values=values)

    references = [
        of_task("p far", 3.0), of_task("p near", 1.1), of_task("p other rank", 1.0, rank=6),
        of_task("q small", 0.5), of_task("q near", 0.8),
        planted_run(rng, "unknown 1"), planted_run(rng, "unknown 2"),
    ]  # fmt: skip
    result = study(pair, reference=references)
    chosen = choose_references(result, "a", "b")
    assert chosen == ("p near", "q near", "unknown 1", "unknown 2")
    # The others serve the level: all their pairs are unrelated.
    assert (result.pairs["population_output"] == "unrelated").sum() == 7 * 2 + 7 * 6 // 2 - 3 - 1
    assert rank_of_pair(result).references == chosen


def test_the_choice_looks_at_no_similarity(pair: list[Adapter], rng: np.random.Generator) -> None:
    result = study(pair, reference=reference_runs(rng, 5, task="z"))
    shuffled = with_t(result, {("a", "task3"): 0.9}, rest=0.2)
    assert choose_references(result, "a", "b") == choose_references(shuffled, "a", "b")
    assert len(choose_references(result, "a", "b")) == 1


def test_without_a_reference_there_is_no_test(pair: list[Adapter]) -> None:
    assert reference_test(study(pair), "a", "b") is None


def test_a_reference_related_to_one_of_the_pair_is_not_used(rng: np.random.Generator) -> None:
    a, b = (planted_run(rng, label, task=label, seed=i) for i, label in enumerate("ab"))
    references = [
        planted_run(rng, "seed of b", task="z", seed=1),
        Adapter(dict(a), label="copy of a", provenance=replace(a.provenance, task=None, seed=None)),
        planted_run(rng, "good", task="z", seed=8),
    ]
    assert choose_references(study([a, b], reference=references), "a", "b") == ("good",)


@pytest.mark.parametrize(
    ("kwargs", "quantity"),
    [
        ({"factor": 2.0}, "norm"),
        ({"factor": 0.5}, "norm"),
        ({"values": (3.2, 2.6, 2.2, 1.8)}, "participation_ratio"),
        ({"values": (4.0, 2.0, 1.0, 0.5, 0.1)}, "rank"),
    ],
)
def test_a_quantity_outside_the_range_of_the_references_is_named(
    kwargs: dict[str, object], quantity: str, rng: np.random.Generator
) -> None:
    pair = [planted_run(rng, "a", **kwargs), planted_run(rng, "b")]  # type: ignore[arg-type]
    result = study(pair, reference=reference_runs(rng, 5))
    outside = rank_of_pair(result).out_of_range
    assert {(o.quantity, o.adapter) for o in outside} == {(quantity, "a")}
    strength = training_strength(result)
    values = strength.loc[[f"task{i}" for i in range(5)], quantity]
    assert (outside[0].low, outside[0].high) == (values.min(), values.max())
    assert outside[0].value == strength.loc["a", quantity]
    assert not outside[0].low <= outside[0].value <= outside[0].high


def test_the_range_is_closed_and_has_no_tolerance(
    pair: list[Adapter], rng: np.random.Generator
) -> None:
    references = reference_runs(rng, 5)
    result = study(pair, reference=references)
    assert rank_of_pair(result).out_of_range == ()
    runs = result.runs.copy()
    edge = runs.loc[runs["adapter"].isin(result.reference), "norm"].max()
    for value, count in ((edge, 0), (np.nextafter(edge, np.inf), 1)):
        runs.loc[runs["adapter"] == "a", "norm"] = value
        assert len(rank_of_pair(replace(result, runs=runs)).out_of_range) == count


def test_training_strength_is_that_of_the_tables(
    pair: list[Adapter], rng: np.random.Generator
) -> None:
    weights = {f"{n}.weight": rng.standard_normal((96, 80)).astype("float32") for n in pair[0]}
    result = study(pair, base=open_base(weights), draws=0)
    strength = training_strength(result)
    norms = {n: np.linalg.norm(weights[f"{n}.weight"]) for n in pair[0]}
    for adapter in pair:
        deltas = {name: np.linalg.norm(update.delta_weight()) for name, update in adapter.items()}
        row = strength.loc[adapter.label]
        assert row["norm"] == pytest.approx(np.linalg.norm(list(deltas.values())))
        relative = [deltas[name] / norms[name] for name in deltas]
        assert row["relative_norm"] == pytest.approx(np.median(relative), rel=1e-6)
        s = np.asarray(RUN_VALUES)
        assert row["participation_ratio"] == pytest.approx((s**2).sum() ** 2 / (s**4).sum())


def test_a_common_seed_or_start_is_reported(rng: np.random.Generator) -> None:
    pair = [planted_run(rng, label) for label in "ab"]
    apart = reference_runs(rng, 3)
    assert not rank_of_pair(study(pair, reference=apart)).shares_start
    one_seed = [run.with_provenance(seed=5) for run in apart]
    assert rank_of_pair(study(pair, reference=one_seed)).shares_start
