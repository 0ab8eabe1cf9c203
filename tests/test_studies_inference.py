"""From pairs to runs: blocks of task and seed, the relabeling test, and its numbers by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from factories import directions, orthonormal, planted_run
from reference import assert_close
from test_studies import NAMES, planted_adapter

from lora_analysis.adapter import Adapter
from lora_analysis.chance import permute_blocks
from lora_analysis.errors import InputError
from lora_analysis.similarity import energy_overlap
from lora_analysis.studies import Study, run_inference, study

TASKS = ("turn", "flip")


@pytest.fixture(scope="module")
def runs() -> list[Adapter]:
    """Two tasks × three seeds at rank 4, each task with an output direction of its own."""
    rng = np.random.default_rng(3)
    output = {task: {name: orthonormal(rng, 48, 1) for name in NAMES} for task in TASKS}
    return [
        planted_adapter(rng, task=task, rank=4, seed=seed, output=output[task])
        for task in TASKS
        for seed in range(3)
    ]


def changed(adapter: Adapter, label: str, **provenance: object) -> Adapter:
    return Adapter(dict(adapter), label=label, provenance=replace(adapter.provenance, **provenance))


def seeds_apart(runs: Sequence[Adapter]) -> list[Adapter]:
    """The runs with a seed of its own for each."""
    return [changed(run, run.label, seed=i) for i, run in enumerate(runs)]


def t_by_hand(a: Adapter, b: Adapter, side: str) -> float:
    """Mean over modules of the excess of ω."""
    excess = []
    for name in NAMES:
        spectra = [np.linalg.svd(run[name].delta_weight(), compute_uv=False) for run in (a, b)]
        ratios = [(s**2).sum() ** 2 / (s**4).sum() for s in spectra]
        baseline = np.sqrt(np.prod(ratios)) / (48 if side == "output" else 40)
        omega = energy_overlap(a[name], b[name], side=side)  # type: ignore[arg-type]
        excess.append((omega - baseline) / (1 - baseline))
    return float(np.mean(excess))


def by_hand(adapters: list[Adapter], side: str) -> np.ndarray:
    """T of every pair, one pair after the other."""
    matrix = np.full((len(adapters), len(adapters)), np.nan)
    for i, a in enumerate(adapters):
        for j, b in enumerate(adapters):
            if i != j:
                matrix[i, j] = t_by_hand(a, b, side)
    return matrix


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_numbers_are_those_of_the_pairs_by_hand(runs, side):
    # Blocks are sorted by task and seed.
    every = seeds_apart([*runs[3:], *runs[:3]])
    inference = study(every).run_inference(side=side)
    matrix = by_hand(every, side)
    assert_close(inference.mean_excess, matrix)
    assert inference.adapters == tuple((run.label,) for run in every)
    assert inference.blocks == tuple(("flip" if i < 3 else "turn", i) for i in range(6))
    within = [matrix[i, j] for i in range(6) for j in range(i) if i // 3 == j // 3]
    between = [matrix[i, j] for i in range(6) for j in range(i) if i // 3 != j // 3]
    assert_close(np.sort(inference.within), np.sort(within))
    assert_close(np.sort(inference.between), np.sort(between))
    assert_close(inference.permutation.difference, np.mean(within) - np.mean(between))
    by_blocks = permute_blocks(matrix, [task for task, _ in inference.blocks], range(6))
    assert_close(inference.permutation.p_value, by_blocks.p_value)
    assert inference.permutation.scheme == by_blocks.scheme == "all runs"
    left = []
    for run in range(6):
        rest = [i for i in range(6) if i != run]
        pairs = [(i, j) for i in rest for j in rest if i > j]
        same = [matrix[i, j] for i, j in pairs if i // 3 == j // 3]
        other = [matrix[i, j] for i, j in pairs if i // 3 != j // 3]
        left.append(np.mean(same) - np.mean(other))
    assert_close(inference.standard_error, np.sqrt(5 / 6 * np.sum((left - np.mean(left)) ** 2)))


def test_each_task_has_its_own_agreement_and_strength(runs):
    every = seeds_apart([*runs[3:], *runs[:3]])
    result = study(every)
    flip, turn = result.run_inference().tasks
    matrix = by_hand(every, "output")
    assert (flip.task, turn.task) == ("flip", "turn")
    assert_close(flip.within, matrix[:3, :3][np.triu_indices(3, 1)].mean())
    assert_close(flip.others["turn"], matrix[:3, 3:].mean())
    assert_close(turn.others["flip"], flip.others["turn"])
    assert flip.is_apart
    norms = result.runs.set_index("adapter")["norm"]
    assert_close(turn.norm, norms[[run.label for run in every[3:]]].median())
    ratios = result.spectra.groupby("adapter")["participation_ratio"].median()
    assert_close(turn.participation_ratio, ratios[[run.label for run in every[3:]]].median())


def test_planted_tasks_reach_the_smallest_p_that_six_runs_allow(runs):
    inference = run_inference(study(seeds_apart(runs)))
    permutation = inference.permutation
    assert_close([permutation.p_value, permutation.smallest_p_value], [0.1, 0.1])
    assert inference.has_all_tasks_apart
    assert inference.within.min() > 0.9
    assert inference.between.max() < 0.2


def test_pairs_of_one_seed_over_tasks_do_not_count(runs):
    inference = study(runs).run_inference()
    same_seed = [[a[1] == b[1] and a[0] != b[0] for b in inference.blocks]
                 for a in inference.blocks]  # fmt: skip
    np.testing.assert_array_equal(
        np.isnan(inference.mean_excess), np.array(same_seed) | np.eye(6, dtype=bool)
    )
    assert len(inference.between) == 6


def test_ranks_of_one_task_and_seed_are_one_block(rng):
    shared = {task: directions(rng) for task in "xy"}
    runs = [
        planted_run(rng, f"{task}{seed}-{len(values)}", shared[task], values=values,
                    task=task, seed=seed + 10 * (task == "y"))
        for task in "xy" for seed in range(2) for values in ((4, 2, 1), (4, 2, 1, 0.5))
    ]  # fmt: skip
    result = study(runs)
    inference = result.run_inference()
    assert inference.n == 4
    assert inference.adapters[0] == ("x0-3", "x0-4")
    values = result.pairs.set_index(["a", "b"])["mean_excess_output"]
    pairs = [(a, b) for a in inference.adapters[0] for b in inference.adapters[1]]
    assert_close(inference.mean_excess[0, 1], values[pairs].mean())
    assert_close(len(inference.within), 2)


def test_a_run_that_is_there_twice_counts_once(runs):
    every = seeds_apart(runs)
    plain = study(every).run_inference()
    for copy in (changed(every[0], "again"), changed(every[0], "other seed", seed=9)):
        result = study([*every, copy])
        inference = result.run_inference()
        assert inference.adapters == plain.adapters
        assert inference.permutation == plain.permutation
        excluded = result.runs.set_index("adapter")["excluded"]
        assert excluded[copy.label] == "one sample with another adapter"
    # Under another task name, neither of the two can be trusted.
    copy = changed(every[0], "other task", task="third", seed=9)
    inference = study([*every, copy]).run_inference()
    assert inference.n == 5
    assert every[0].label not in {label for block in inference.adapters for label in block}


def test_modules_with_a_shared_start_do_not_count_on_the_input_side_of_any_pair(runs):
    every = seeds_apart(runs)
    mixed = {
        name: replace(every[3][name], A=every[0][name].A) if name == NAMES[0] else every[3][name]
        for name in NAMES
    }
    every[3] = Adapter(mixed, label=every[3].label, provenance=every[3].provenance)
    result = study(every)
    assert result.left_out["input"] == {NAMES[0]: "shared initialization"}
    inference = result.run_inference(side="input")
    rows = result.similarities[
        (result.similarities["side"] == "input") & (result.similarities["module"] != NAMES[0])
    ]
    means = rows.groupby(["a", "b"])["excess_omega"].mean()
    index = {labels[0]: i for i, labels in enumerate(inference.adapters)}
    for (a, b), value in means.items():
        assert_close(inference.mean_excess[index[a], index[b]], value)
    blocks = {run.label: run for run in every}
    ordered = [blocks[labels[0]] for labels in inference.adapters]
    assert_close(result.run_inference().mean_excess, by_hand(ordered, "output"))


def test_one_rank_can_be_tested_alone(runs):
    rng = np.random.default_rng(8)
    output = {name: orthonormal(rng, 48, 1) for name in NAMES}
    wide = planted_adapter(rng, task="turn", rank=8, seed=0, output=output)
    result = study([*runs, wide])
    assert result.run_inference().n == 6
    assert ("turn-r4-s0", "turn-r8-s0") in result.run_inference().adapters
    inference = result.run_inference(rank=4)
    assert (inference.n, inference.rank) == (6, 4)
    assert_close(inference.mean_excess, study(runs).run_inference().mean_excess)
    with pytest.raises(InputError, match=r"No run has rank 16; the 7 runs .* have \[4, 8\]"):
        result.run_inference(rank=16)


def test_runs_without_task_or_seed_and_references_take_no_part(runs):
    unknown = changed(runs[1], "unknown", task=None)
    reference = changed(runs[5], "reference", task="other", seed=77)
    unseeded = planted_run(np.random.default_rng(2), "unseeded", names=NAMES, shape=(48, 40))
    result = study([*runs[:5], unseeded], reference=[reference])
    labels = {label for block in result.run_inference().adapters for label in block}
    assert labels == {run.label for run in runs[:5]}
    # A copy without a label is one sample with the run that it copies.
    copies = study([*runs[:5], unknown])
    assert copies.runs.set_index("adapter")["excluded"]["unknown"] != ""
    assert copies.run_inference().n == 5


def test_few_runs_have_no_standard_error(runs):
    # Leaving out either "turn" leaves no pair of one task.
    every = seeds_apart([runs[0], runs[1], runs[3]])
    inference = study(every).run_inference()
    assert inference.standard_error is None
    assert_close(inference.permutation.smallest_p_value, 1 / 3)
    alone = {task.task: task.within for task in inference.tasks}
    assert np.isnan(alone["flip"])


def test_a_pair_without_a_usable_module_is_refused(runs):
    result = study(seeds_apart(runs))
    pairs = result.pairs.copy()
    pairs.loc[0, "mean_excess_output"] = np.nan
    with pytest.raises(InputError, match="no module on the output side that is usable"):
        replace(result, pairs=pairs).run_inference()


def test_what_cannot_be_relabeled_is_refused(runs):
    result: Study = study(runs)
    with pytest.raises(InputError, match="side must be"):
        result.run_inference(side="left")  # type: ignore[arg-type]
    unknown = [changed(run, f"u{i}", task=None) for i, run in enumerate(runs[:3])]
    with pytest.raises(InputError, match="of 3 adapters none has both"):
        study(unknown, label="none").run_inference()
    with pytest.raises(InputError, match="needs two tasks"):
        study(runs[:3]).run_inference()
    based = [changed(run, run.label, base_model=f"org/base{i}") for i, run in enumerate(runs)]
    with pytest.raises(InputError, match=r"6 base models \(org/base0, org/base1"):
        study(based).run_inference()
    one_base = [changed(run, run.label, base_model=f"org/base{i % 2}")
                for i, run in enumerate(seeds_apart(runs))]  # fmt: skip
    assert study(one_base).run_inference(base="org/base0").n == 3
