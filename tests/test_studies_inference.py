"""From pairs to runs: which runs count, the relabeling test, and its numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from factories import orthonormal
from reference import assert_close
from test_studies import NAMES, planted_adapter

from lora_analysis.adapter import Adapter
from lora_analysis.chance import permute_blocks
from lora_analysis.errors import InputError
from lora_analysis.similarity import energy_overlap
from lora_analysis.studies import run_inference, study

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


def by_hand(adapters: list[Adapter], side: str) -> np.ndarray:
    """Median ω over modules of every pair, one pair after the other."""
    found = np.full((len(adapters), len(adapters)), np.nan)
    for i, a in enumerate(adapters):
        for j, b in enumerate(adapters):
            if i != j:
                found[i, j] = np.median([energy_overlap(a[n], b[n], side=side) for n in NAMES])
    return found


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_numbers_are_those_of_the_pairs_by_hand(runs, side):
    found = study(runs).run_inference(side=side)
    matrix = by_hand(runs, side)
    assert_close(found.similarity, matrix)
    assert found.runs == tuple(one.label for one in runs)
    assert found.tasks == ("turn",) * 3 + ("flip",) * 3
    assert (found.n, found.duplicates) == (6, ())
    within = [matrix[i, j] for i in range(6) for j in range(i) if i // 3 == j // 3]
    between = [matrix[i, j] for i in range(6) for j in range(i) if i // 3 != j // 3]
    assert_close(found.within, np.quantile(within, (0.25, 0.5, 0.75)))
    assert_close(found.between, np.quantile(between, (0.25, 0.5, 0.75)))
    assert_close(found.permutation.difference, np.mean(within) - np.mean(between))
    by_blocks = permute_blocks(matrix, found.tasks, range(6))
    assert_close(found.permutation.p_value, by_blocks.p_value)
    left = []
    for run in range(6):
        kept = [one for one in range(6) if one != run]
        pairs = [(i, j) for i in kept for j in kept if i > j]
        same = [matrix[i, j] for i, j in pairs if i // 3 == j // 3]
        other = [matrix[i, j] for i, j in pairs if i // 3 != j // 3]
        left.append(np.mean(same) - np.mean(other))
    assert_close(found.standard_error, np.sqrt(5 / 6 * np.sum((left - np.mean(left)) ** 2)))


def test_planted_tasks_reach_the_smallest_p_that_six_runs_allow(runs):
    found = run_inference(study(runs))
    assert_close([found.permutation.p_value, found.permutation.smallest_p_value], [0.1, 0.1])
    assert found.within[0] > 0.9
    assert found.between[2] < 0.2


def test_a_run_that_is_there_twice_is_one_run_and_is_named(runs):
    again = changed(runs[0], "turn again")
    thrice = changed(runs[0], "turn once more")
    found = study([*runs, again, thrice]).run_inference()
    assert found.duplicates == (("turn again", runs[0].label), ("turn once more", runs[0].label))
    plain = study(runs).run_inference()
    assert found.runs == plain.runs
    assert found.permutation == plain.permutation
    # A copy of the copy alone is still the first one's run.
    table = study([*runs, again, thrice]).pairs
    unclear = (table["a"] == runs[0].label) & (table["b"] == "turn once more")
    chain = table.assign(initialization=table["initialization"].mask(unclear, "partly shared"))
    linked = replace(study([*runs, again, thrice]), pairs=chain).run_inference()
    assert linked.duplicates == found.duplicates
    # Under another seed it counts as a run, but its pair with itself is no number.
    other = study([*runs, changed(runs[0], "other", seed=9)]).run_inference()
    assert (other.n, other.duplicates) == (7, ())
    assert np.isnan(other.similarity[0, 6])
    assert np.isfinite(other.similarity[1:6, 6]).all()


def test_input_rows_of_a_shared_start_do_not_count(runs):
    mixed = {
        name: replace(runs[3][name], A=runs[0][name].A) if name == NAMES[0] else runs[3][name]
        for name in NAMES
    }
    sharing = Adapter(mixed, label=runs[3].label, provenance=runs[3].provenance)
    every = [*runs[:3], sharing, *runs[4:]]
    found = study(every).run_inference(side="input")
    rest = [energy_overlap(runs[0][n], sharing[n], side="input") for n in NAMES[1:]]
    assert_close(found.similarity[0, 3], np.median(rest))
    assert_close(study(every).run_inference().similarity, by_hand(every, "output"))


def test_one_rank_can_be_asked_for_alone(runs):
    rng = np.random.default_rng(8)
    output = {name: orthonormal(rng, 48, 1) for name in NAMES}
    wide = planted_adapter(rng, task="turn", rank=8, seed=0, output=output)
    result = study([*runs, wide])
    assert result.run_inference().n == 7
    found = result.run_inference(rank=4)
    assert (found.n, found.rank) == (6, 4)
    assert_close(found.similarity, study(runs).run_inference().similarity)
    with pytest.raises(InputError, match=r"No run has rank 16; the 7 runs .* have \[4, 8\]"):
        result.run_inference(rank=16)


def test_runs_without_task_or_seed_and_references_take_no_part(runs):
    unknown = changed(runs[1], "unknown", task=None)
    unseeded = changed(runs[1], "unseeded", seed=None)
    reference = changed(runs[5], "reference", task="other", seed=77)
    found = study([*runs[:5], unknown, unseeded], reference=[reference]).run_inference()
    assert found.runs == tuple(one.label for one in runs[:5])


def test_other_quantities_are_medians_too_and_ill_defined_ones_do_not_count(runs):
    result = study(runs)
    rows = result.similarities[
        (result.similarities["side"] == "output")
        & (result.similarities["a"] == runs[0].label)
        & (result.similarities["b"] == runs[1].label)
    ]
    for quantity in ("phi_r_r", "signed_cosine"):
        found = result.run_inference(quantity=quantity)
        assert_close(found.similarity[0, 1], rows[quantity].median())
    soft = result.similarities.copy()
    soft.loc[rows.index[0], "degeneracy_1_1"] = "nearly degenerate"
    found = replace(result, similarities=soft).run_inference(quantity="phi_1_1")
    assert_close(found.similarity[0, 1], rows["phi_1_1"].iloc[1:].median())


def test_few_runs_have_no_standard_error(runs):
    # Leaving out either "turn" leaves no pair of one task.
    found = study([runs[0], runs[1], runs[3]]).run_inference()
    assert found.standard_error is None
    between = [found.similarity[0, 2], found.similarity[1, 2]]
    assert_close(found.between, np.quantile(between, (0.25, 0.5, 0.75)))
    assert_close(found.permutation.smallest_p_value, 1 / 3)


def test_what_cannot_be_relabeled_is_refused(runs):
    result = study(runs)
    with pytest.raises(InputError, match="quantity must be one of omega"):
        result.run_inference(quantity="norm")
    with pytest.raises(InputError, match="side must be"):
        result.run_inference(side="left")
    unknown = [changed(one, f"u{at}", task=None) for at, one in enumerate(runs[:3])]
    with pytest.raises(InputError, match="of 3 adapters none has both"):
        study(unknown).run_inference()
    with pytest.raises(InputError, match="needs two tasks"):
        study(runs[:3]).run_inference()
    based = [changed(one, one.label, base_model=f"base{at}") for at, one in enumerate(runs)]
    with pytest.raises(InputError, match=r"6 base models \(base0, base1"):
        study(based).run_inference()
