"""Every conclusion and reason, from small studies in memory; the rules of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import directions, planted_run, reference_runs

from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.conclusions import Comparison, Conclusion, Reason, comparison_fields, comparisons
from lora_analysis.conclusions.comparison_values import NO_MORE_ALIKE, size_in_words
from lora_analysis.studies import Study, study
from lora_analysis.studies.pair_classes import PairClass
from lora_analysis.studies.reference_levels import write_reference


def only_pair(result: Study) -> tuple[Comparison, Comparison]:
    """Return the comparison of the only pair on the output side and on the input side."""
    output, input_side = (c for c in comparisons(result) if c.kind == "pair")
    assert (output.side, input_side.side) == ("output", "input")
    return output, input_side


def related_pair(rng: np.random.Generator, **kwargs: object) -> list[Adapter]:
    """Two runs of one task with different seeds."""
    shared = directions(rng)
    return [
        planted_run(rng, f"x{seed}", shared, task="x", seed=seed, **kwargs)  # type: ignore[arg-type]
        for seed in range(2)
    ]


def strangers(rng: np.random.Generator, **kwargs: object) -> list[Adapter]:
    """Two adapters of unknown task."""
    return [planted_run(rng, label, **kwargs) for label in "ab"]  # type: ignore[arg-type]


def with_factors(
    adapter: Adapter, label: str, *, A: float = 1.0, B: float = 1.0, **provenance: object
) -> Adapter:
    """Return the adapter with its factors multiplied."""
    updates = {
        name: replace(update, A=A * update.A, B=B * update.B, label=label)  # type: ignore[union-attr, type-var]
        for name, update in adapter.items()
    }
    return Adapter(updates, label=label, provenance=replace(adapter.provenance, **provenance))


def with_other_b(
    rng: np.random.Generator, adapter: Adapter, label: str, **facts: object
) -> Adapter:
    """Return an adapter with the same A and an independent B."""
    updates = {
        name: replace(update, B=rng.standard_normal(update.B.shape), label=label)  # type: ignore[union-attr, type-var]
        for name, update in adapter.items()
    }
    return Adapter(updates, label=label, provenance=replace(adapter.provenance, **facts))


def check_defined(every: Sequence[Comparison]) -> None:
    """No undefined value in a comparison that has modules; none at all in its fields."""
    for comparison in every:
        if comparison.modules:
            numbers = (
                comparison.mean_excess, comparison.omega, comparison.chance_omega,
                comparison.cosine, *comparison.quartiles,
            )  # fmt: skip
            assert np.isfinite(numbers).all()
        for value in comparison_fields(comparison).values():
            assert not isinstance(value, float) or np.isfinite(value)


# --- two adapters without references ----------------------------------------------------------


def test_two_related_adapters_are_more_alike_than_random(rng: np.random.Generator) -> None:
    result = study(related_pair(rng))
    for comparison in only_pair(result):
        assert comparison.conclusion is Conclusion.MORE_ALIKE_THAN_RANDOM
        assert comparison.reason is Reason.NO_REFERENCE
        assert comparison.significant == (6, 6)
        assert (comparison.p, comparison.unrelated, comparison.size) == (None, None, "")
        assert comparison.omega > 0.5 > 10 * comparison.chance_omega
    check_defined(comparisons(result))


def test_two_strangers_are_not_distinguishable_from_random(rng: np.random.Generator) -> None:
    result = study(strangers(rng))
    for comparison in only_pair(result):
        assert comparison.conclusion is Conclusion.NOT_DISTINGUISHABLE_FROM_RANDOM
        assert comparison.reason is Reason.NO_REFERENCE
        assert abs(comparison.mean_excess) < 0.05
    check_defined(comparisons(result))


def test_the_values_of_a_comparison_are_those_of_its_rows(rng: np.random.Generator) -> None:
    result = study(related_pair(rng))
    rows = result.similarities[result.similarities["side"] == "output"]
    output, _ = only_pair(result)
    assert output.mean_excess == pytest.approx(rows["excess_omega"].mean())
    assert output.mean_excess == pytest.approx(result.pairs["mean_excess_output"].item())
    assert output.omega == pytest.approx(rows["omega"].median())
    assert output.chance_omega == pytest.approx(rows["chance_omega"].median())
    assert output.quartiles == pytest.approx(rows["excess_omega"].quantile([0.25, 0.75]).tolist())
    assert output.cosine == pytest.approx(rows["signed_cosine"].median())
    angles = np.degrees(np.arccos(np.sqrt(rows["phi_1_1"])))
    assert output.angle == pytest.approx(angles.median())
    assert (output.pairs, output.modules, output.members) == (1, 6, ("x0", "x1"))


# --- two adapters with references -------------------------------------------------------------


def test_related_adapters_pass_the_test_on_both_sides(rng: np.random.Generator) -> None:
    result = study(related_pair(rng), reference=reference_runs(rng, 5))
    output, input_side = only_pair(result)
    for comparison in (output, input_side):
        assert comparison.conclusion is Conclusion.MORE_ALIKE
        assert comparison.reason is Reason.NONE
        assert comparison.p == comparison.smallest_p == pytest.approx(1 / 21)
        assert comparison.unrelated is not None
        assert comparison.unrelated.pairs == 20
        assert comparison.size == "largely the same"
        assert comparison.unrelated.maximum < 0.1
    check_defined(comparisons(result))


def test_strangers_do_not_pass_the_test_and_the_input_side_is_not_tested(
    rng: np.random.Generator,
) -> None:
    result = study(strangers(rng), reference=reference_runs(rng, 6))
    output, input_side = only_pair(result)
    assert output.conclusion is Conclusion.NOT_DISTINGUISHABLE
    assert output.reference_test is not None
    assert output.p == output.reference_test.rank / 28
    assert input_side.conclusion is Conclusion.INCONCLUSIVE
    assert input_side.reason is Reason.OUTPUT_FIRST
    assert input_side.p is None
    check_defined(comparisons(result))


def test_fewer_than_five_references_give_a_level_and_a_rank(rng: np.random.Generator) -> None:
    result = study(related_pair(rng), reference=reference_runs(rng, 4))
    output, _ = only_pair(result)
    assert output.conclusion is Conclusion.TOO_FEW_RUNS
    assert output.reason is Reason.FEW_REFERENCES
    assert (output.p, output.smallest_p) == (None, pytest.approx(1 / 15))
    assert output.reference_test is not None
    assert (output.reference_test.rank, output.reference_test.pairs) == (1, 15)
    assert output.unrelated is not None


@pytest.mark.parametrize("factor", [3.0, 0.1])
def test_other_training_strength_is_inconclusive(factor: float, rng: np.random.Generator) -> None:
    result = study(related_pair(rng, factor=factor), reference=reference_runs(rng, 5))
    output, input_side = only_pair(result)
    assert output.conclusion is Conclusion.INCONCLUSIVE
    assert output.reason is Reason.TRAINING_STRENGTH
    assert output.p is None
    trained = "more strongly" if factor > 1 else "less strongly"
    assert comparison_fields(output)["trained"] == f"{trained} than every reference"
    assert input_side.reason is Reason.TRAINING_STRENGTH


def test_a_common_start_with_a_reference_leaves_the_input_side_untested(
    rng: np.random.Generator,
) -> None:
    pair, references = related_pair(rng), reference_runs(rng, 5)
    # Two of the references have one initial A.
    facts = {"task": "task1", "seed": 101}
    start = references[0]
    updates = {
        name: replace(update, A=start[name].A)  # type: ignore[union-attr, type-var]
        for name, update in references[1].items()
    }
    references[1] = Adapter(
        updates, label="task1", provenance=replace(references[1].provenance, **facts)
    )
    output, input_side = only_pair(study(pair, reference=references))
    assert output.conclusion is Conclusion.MORE_ALIKE
    assert input_side.conclusion is Conclusion.INCONCLUSIVE
    assert input_side.reason is Reason.SHARED_START


def test_references_of_the_same_seed_serve_neither_test_nor_level(
    rng: np.random.Generator,
) -> None:
    references = [planted_run(rng, f"r{seed}", task=f"r{seed}", seed=seed) for seed in range(2)]
    result = study(related_pair(rng), reference=references)
    output, _ = only_pair(result)
    assert output.conclusion is Conclusion.MORE_ALIKE_THAN_RANDOM
    assert output.reason is Reason.LEVEL_ONLY  # the pairs of either with the other seed
    assert output.reference_test is None


def test_a_reference_file_gives_a_level_and_no_test(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    path = tmp_path / "base.reference.json"
    write_reference(study([], reference=reference_runs(rng, 6)), path)
    output, _ = only_pair(study(related_pair(rng), reference=[path]))
    assert output.conclusion is Conclusion.MORE_ALIKE_THAN_RANDOM
    assert output.reason is Reason.LEVEL_ONLY
    assert output.unrelated is not None
    assert output.size == "largely the same"
    assert output.p is None
    outside, _ = only_pair(study(related_pair(rng, factor=3.0), reference=[path]))
    assert outside.reason is Reason.NO_REFERENCE
    assert outside.unrelated is None


# --- pairs without a test ---------------------------------------------------------------------


def copied(rng: np.random.Generator) -> list[Adapter]:
    a = planted_run(rng, "a")
    return [a, with_factors(a, "b", A=0.5, B=3.0)]


def negated(rng: np.random.Generator) -> list[Adapter]:
    a = planted_run(rng, "a")
    return [a, with_factors(a, "b", B=-1.0)]


def contained(rng: np.random.Generator) -> list[Adapter]:
    """The two strongest directions of the other, in other factors."""
    a = planted_run(rng, "a", values=(2.0, 1.9, 1.8, 1.7))
    updates = {}
    for name, update in a.items():
        u, s, vt = np.linalg.svd(update.delta_weight())
        mix = rng.standard_normal((2, 2)) + 2 * np.eye(2)
        B = u[:, :2] * s[:2] @ np.linalg.inv(mix)
        updates[name] = LowRankUpdate(name, mix @ vt[:2], B, 1.0, label="b")
    return [a, Adapter(updates, label="b", provenance=replace(a.provenance, rank=2))]


def same_run(rng: np.random.Generator) -> list[Adapter]:
    a = planted_run(rng, "a")
    updates = {
        name: replace(
            update,  # type: ignore[type-var]
            A=update.A + 0.2 * rng.standard_normal(update.A.shape) * update.A.std(),  # type: ignore[union-attr]
            B=update.B + 0.8 * rng.standard_normal(update.B.shape) * update.B.std(),  # type: ignore[union-attr]
        )
        for name, update in a.items()
    }
    return [a, Adapter(updates, label="b", provenance=a.provenance)]


def same_seed(rng: np.random.Generator) -> list[Adapter]:
    return [planted_run(rng, task, task=task, seed=0) for task in "xy"]


def same_data_order(rng: np.random.Generator) -> list[Adapter]:
    shared = directions(rng)
    return [
        planted_run(rng, f"x{len(values)}", shared, task="x", seed=0, values=values)
        for values in ((4, 2, 1, 0.5), (4, 2))
    ]


def two_bases(rng: np.random.Generator) -> list[Adapter]:
    return [planted_run(rng, base, base_model=f"org/{base}") for base in ("one", "two")]


def two_paths(rng: np.random.Generator) -> list[Adapter]:
    return [planted_run(rng, base, base_model=f"/data/{base}/final") for base in ("one", "two")]


def checkpoints(rng: np.random.Generator) -> list[Adapter]:
    a = planted_run(rng, "a", task="x", seed=0, step=1)
    return [a, planted_run(rng, "b", task="x", seed=0, step=2)]


def one_update_under_two_names(rng: np.random.Generator) -> list[Adapter]:
    """B differs too little for independent runs and too much for a copy."""
    a = planted_run(rng, "x", task="x", seed=0)
    updates = {
        name: replace(
            update,  # type: ignore[type-var]
            A=update.A + 0.3 * rng.standard_normal(update.A.shape) * update.A.std(),  # type: ignore[union-attr]
            B=update.B + 0.3 * rng.standard_normal(update.B.shape) * update.B.std(),  # type: ignore[union-attr]
        )
        for name, update in a.items()
    }
    facts = replace(a.provenance, task="y", seed=1)
    return [a, Adapter(updates, label="y", provenance=facts)]


def gradients_alike(rng: np.random.Generator) -> list[Adapter]:
    a = planted_run(rng, "x", task="x", seed=0)
    updates = {
        name: replace(
            update,  # type: ignore[type-var]
            B=update.B + 1.2 * rng.standard_normal(update.B.shape) * update.B.std(),  # type: ignore[union-attr]
        )
        for name, update in a.items()
    }
    return [a, Adapter(updates, label="y", provenance=replace(a.provenance, task="y", seed=0))]


@pytest.mark.parametrize(
    ("make", "pair_class", "conclusion", "reason"),
    [
        (copied, PairClass.NEAR_DUPLICATE, Conclusion.NEAR_DUPLICATE, Reason.ONE_SAMPLE),
        (negated, PairClass.NEGATED_COPY, Conclusion.NEAR_DUPLICATE, Reason.ONE_SAMPLE),
        (contained, PairClass.CONTAINED, Conclusion.INCONCLUSIVE, Reason.ONE_SAMPLE),
        (same_run, PairClass.SAME_RUN, Conclusion.INCONCLUSIVE, Reason.ONE_SAMPLE),
        (checkpoints, PairClass.SAME_RUN, Conclusion.INCONCLUSIVE, Reason.ONE_SAMPLE),
        (same_seed, PairClass.SAME_SEED, Conclusion.INCONCLUSIVE, Reason.SHARED_SEED),
        (same_data_order, PairClass.SAME_DATA_ORDER, Conclusion.INCONCLUSIVE, Reason.SHARED_SEED),
        (two_bases, PairClass.DIFFERENT_BASE, Conclusion.INCONCLUSIVE, Reason.DIFFERENT_BASE),
        (two_paths, PairClass.BASE_NOT_KNOWN, Conclusion.NOT_DISTINGUISHABLE_FROM_RANDOM,
         Reason.BASE_NOT_KNOWN),
        (one_update_under_two_names, PairClass.WRONG_LABEL, Conclusion.INCONCLUSIVE,
         Reason.WRONG_LABEL),
        (gradients_alike, PairClass.GRADIENTS_ALIKE, Conclusion.INCONCLUSIVE, Reason.SHARED_START),
    ],
)  # fmt: skip
def test_pairs_that_are_not_two_independent_runs_have_no_test(
    make, pair_class, conclusion, reason, rng: np.random.Generator
) -> None:
    pair = make(rng)
    references = reference_runs(rng, 5)
    for result in (
        study(pair, across_bases=True),
        study(pair, reference=references, across_bases=True),
    ):
        assert result.pairs["pair_class"][0] == pair_class
        for comparison in only_pair(result):
            assert comparison.pair_class is pair_class
            assert (comparison.conclusion, comparison.reason) == (conclusion, reason)
            assert comparison.p is None
        check_defined(comparisons(result))


def test_a_shared_initialization_leaves_the_output_side(rng: np.random.Generator) -> None:
    a = planted_run(rng, "a", values=(1.0, 0.9, 0.8, 0.7))
    pair = [a, with_other_b(rng, a, "b")]
    output, input_side = only_pair(study(pair))
    assert output.pair_class is PairClass.SHARED_INIT
    assert output.reason is Reason.NO_REFERENCE
    assert input_side.conclusion is Conclusion.INCONCLUSIVE
    assert input_side.reason is Reason.SHARED_START


def test_modules_without_room_leave_nothing_to_compare(rng: np.random.Generator) -> None:
    heads = [
        Adapter(
            {"score": LowRankUpdate("score", rng.standard_normal((4, 80)),
                                    rng.standard_normal((1, 4)), 1.0)},
            label=label,
        )
        for label in "ab"
    ]  # fmt: skip
    result = study(heads)
    output, input_side = only_pair(result)
    assert output.conclusion is Conclusion.INCONCLUSIVE
    assert output.reason is Reason.NO_USABLE_MODULE
    assert (output.modules, output.size) == (0, "")
    assert input_side.conclusion is Conclusion.NOT_DISTINGUISHABLE_FROM_RANDOM
    check_defined(comparisons(result))


def test_factors_that_start_from_the_base_allow_no_conclusion(rng: np.random.Generator) -> None:
    """Both factors of all tasks and seeds agree row by row, as with PiSSA."""
    start = planted_run(rng, "start")
    runs = []
    for task in "xy":
        for seed in range(2):
            updates = {
                name: replace(
                    update,  # type: ignore[type-var]
                    A=update.A + 0.3 * rng.standard_normal(update.A.shape) * update.A.std(),  # type: ignore[union-attr]
                    B=update.B + 0.3 * rng.standard_normal(update.B.shape) * update.B.std(),  # type: ignore[union-attr]
                )
                for name, update in start.items()
            }
            facts = replace(start.provenance, task=task, seed=seed + (task == "y") * 10)
            runs.append(Adapter(updates, label=f"{task}{seed}", provenance=facts))
    result = study(runs)
    assert set(result.pairs["pair_class"]) == {PairClass.STARTED_FROM_BASE}
    assert not comparisons(result)
    references = [run.with_provenance(task=f"z{i}") for i, run in enumerate(runs[1::2])]
    result = study(runs[::2], reference=references)
    for comparison in only_pair(result):
        assert comparison.conclusion is Conclusion.INCONCLUSIVE
        assert comparison.reason is Reason.STARTED_FROM_BASE


# --- studies of tasks and seeds ---------------------------------------------------------------


def sweep_of(
    rng: np.random.Generator,
    tasks: int,
    seeds: int,
    *,
    related: bool = True,
    ranks: Sequence[int] = (4,),
    factors: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> list[Adapter]:
    """Runs of tasks × seeds × ranks; the seeds of each task are its own."""
    runs = []
    for t in range(tasks):
        shared = directions(rng) if related else None
        for s in range(seeds):
            for rank in ranks:
                values = np.array([4.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1])[:rank]
                runs.append(
                    planted_run(
                        rng, f"t{t}-r{rank}-s{s}", shared, values=values,
                        factor=factors[t], task=f"t{t}", seed=10 * t + s,
                    )
                )  # fmt: skip
    return runs


def of_kind(result: Study, kind: str) -> list[Comparison]:
    return [comparison for comparison in comparisons(result) if comparison.kind == kind]


def test_tasks_are_told_apart_output_first(rng: np.random.Generator) -> None:
    result = study(sweep_of(rng, 3, 3))
    every = comparisons(result)
    assert [(c.kind, c.side) for c in every] == [("tasks", "output"), ("tasks", "input")]
    for comparison in every:
        assert comparison.conclusion is Conclusion.MORE_ALIKE
        assert comparison.reason is Reason.NONE
        assert comparison.p is not None
        assert comparison.smallest_p is not None
        assert comparison.smallest_p <= comparison.p <= 0.05
        assert comparison.pairs == 9
        assert all(task.is_apart for task in comparison.tasks)
        assert comparison.unrelated is not None
        assert comparison.unrelated.pairs == 27
        assert comparison.size == "largely the same"
    check_defined(every)


def test_unrelated_runs_are_not_told_apart_and_the_input_side_is_not_tested(
    rng: np.random.Generator,
) -> None:
    output, input_side = comparisons(study(sweep_of(rng, 3, 3, related=False)))
    assert output.conclusion is Conclusion.NOT_DISTINGUISHABLE
    assert output.p is not None
    assert output.p > 0.05
    assert input_side.conclusion is Conclusion.INCONCLUSIVE
    assert input_side.reason is Reason.OUTPUT_FIRST
    assert input_side.p is None


def test_too_few_runs_have_no_conclusion(rng: np.random.Generator) -> None:
    output, input_side = comparisons(study(sweep_of(rng, 2, 2)))
    assert output.conclusion is Conclusion.TOO_FEW_RUNS
    assert output.reason is Reason.FEW_RUNS
    assert output.smallest_p is not None
    assert output.smallest_p > 0.05
    assert input_side.reason is Reason.OUTPUT_FIRST


def test_one_task_is_compared_with_random_subspaces(rng: np.random.Generator) -> None:
    every = of_kind(study(sweep_of(rng, 1, 3)), "tasks")
    assert len(every) == 2
    for comparison in every:
        assert comparison.conclusion is Conclusion.MORE_ALIKE_THAN_RANDOM
        assert comparison.reason is Reason.NO_REFERENCE
        assert comparison.significant == (3, 3)


def test_every_task_must_agree_more_with_itself_than_with_others(
    rng: np.random.Generator,
) -> None:
    """One run of z writes the direction of x, the others none: p is small, and not enough."""
    shared = {task: directions(rng) for task in "xy"}
    runs = [
        planted_run(rng, f"{task}{s}", shared[task], task=task, seed=10 * "xy".index(task) + s)
        for task in "xy"
        for s in range(3)
    ]
    runs += [
        planted_run(rng, f"z{s}", None if s else shared["x"], task="z", seed=20 + s)
        for s in range(3)
    ]
    output, input_side = of_kind(study(runs), "tasks")
    assert output.p is not None
    assert output.p <= 0.05
    assert {task.task: task.is_apart for task in output.tasks} == {"x": True, "y": True, "z": False}
    assert output.conclusion is Conclusion.INCONCLUSIVE
    assert output.reason is Reason.UNEQUAL_TASKS
    assert input_side.reason is Reason.OUTPUT_FIRST


@pytest.mark.slow
def test_single_ranks_come_last_with_holm_among_them(rng: np.random.Generator) -> None:
    result = study(sweep_of(rng, 3, 3, ranks=(4, 8)))
    tasks, ranks = of_kind(result, "tasks"), of_kind(result, "rank")
    assert [c.conclusion for c in tasks] == [Conclusion.MORE_ALIKE] * 2
    assert [c.ranks for c in ranks] == [(8,), (4,)]
    for comparison in ranks:
        alone = result.run_inference(rank=comparison.ranks[0]).permutation
        assert comparison.conclusion is Conclusion.MORE_ALIKE
        # Of two equal p-values, both are doubled.
        assert comparison.p == pytest.approx(min(1.0, 2 * alone.p_value))
        assert comparison.smallest_p == pytest.approx(alone.smallest_p_value)
        assert comparison.pairs == 9
    described = of_kind(result, "ranks")
    assert {c.side for c in described} == {"output", "input"}
    assert all(c.conclusion is None and c.ranks == (4, 8) and c.pairs == 18 for c in described)
    check_defined(comparisons(result))


def test_ranks_are_not_tested_if_the_tasks_are_not_told_apart(rng: np.random.Generator) -> None:
    result = study(sweep_of(rng, 3, 3, ranks=(4, 8), related=False))
    for comparison in of_kind(result, "rank"):
        assert comparison.conclusion is Conclusion.INCONCLUSIVE
        assert comparison.reason is Reason.RANKS_LAST
        assert comparison.p is None


def test_a_rank_of_one_task_is_compared_with_random_subspaces(rng: np.random.Generator) -> None:
    shared = directions(rng)
    runs = sweep_of(rng, 3, 3)
    runs += [
        planted_run(rng, f"wide{s}", shared, values=(4, 2, 1, 0.5, 0.2), task="t0", seed=s)
        for s in (50, 51)
    ]
    wide = of_kind(study(runs), "rank")[0]
    assert wide.ranks == (5,)
    assert wide.conclusion is Conclusion.MORE_ALIKE_THAN_RANDOM
    assert wide.reason is Reason.NONE_AT_RANK


def test_many_pairs_of_unknown_relation_are_one_comparison(rng: np.random.Generator) -> None:
    few = study([planted_run(rng, str(i)) for i in range(3)])
    assert [c.kind for c in comparisons(few)] == ["pair"] * 6
    many = study([planted_run(rng, str(i)) for i in range(5)])
    output, input_side = comparisons(many)
    assert (output.kind, input_side.kind) == ("adapters", "adapters")
    assert output.subject == "5 adapters of unknown relation"
    assert output.pairs == 10
    assert output.conclusion is Conclusion.NOT_DISTINGUISHABLE_FROM_RANDOM
    assert output.significant[1] == 10


def test_bases_are_compared_each_by_itself(rng: np.random.Generator) -> None:
    runs = [
        Adapter(dict(run), label=f"{base}-{run.label}",
                provenance=replace(run.provenance, base_model=f"org/{base}"))
        for base in ("one", "two") for run in sweep_of(rng, 3, 3)
    ]  # fmt: skip
    every = comparisons(study(runs))
    assert [c.base for c in every] == ["org/one", "org/one", "org/two", "org/two"]
    alone = comparisons(study(runs[:9]))
    assert [c.mean_excess for c in alone] == [c.mean_excess for c in every[:2]]
    assert alone[0].base is None


def test_references_are_no_replicates_of_the_runs(rng: np.random.Generator) -> None:
    """Several references of one task serve the level; the runs are compared without them."""
    shared = directions(rng)
    references = [planted_run(rng, f"r{s}", shared, task="r", seed=90 + s) for s in range(3)]
    runs = sweep_of(rng, 3, 3)
    result, alone = study(runs, reference=references), study(runs)
    for comparison, expected in zip(comparisons(result), comparisons(alone), strict=True):
        assert comparison.pairs == expected.pairs
        assert comparison.mean_excess == pytest.approx(expected.mean_excess)
        assert comparison.p == expected.p


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (0.95, "nearly the same"),
        (0.9, "nearly the same"),
        (0.6, "largely the same"),
        (0.3, "partly the same"),
        (0.06, "weakly alike"),
        (0.04, "barely alike"),
        (0.03, NO_MORE_ALIKE),
        (-0.01, NO_MORE_ALIKE),
    ],
)
def test_size_has_a_word_only_above_the_largest_unrelated_pair(value: float, word: str) -> None:
    assert size_in_words(value, 0.03) == word
    assert size_in_words(value, None) == ""
    assert size_in_words(value, 0.99) == NO_MORE_ALIKE


def test_position_is_between_unrelated_and_replicate(rng: np.random.Generator) -> None:
    result = study(sweep_of(rng, 3, 3, ranks=(4, 8)))
    for comparison in of_kind(result, "ranks"):
        assert comparison.position is not None
        assert 0.5 < comparison.position < 1.5


def test_every_conclusion_and_reason_is_reached_by_a_test() -> None:
    """A new one needs a study in this file."""
    text = Path(__file__).read_text(encoding="utf-8")
    for value in (*Conclusion, *Reason):
        assert f"{type(value).__name__}.{value.name}" in text
