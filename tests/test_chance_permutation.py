"""Relabeling blocks of tasks and seeds: schemes, counts, and the test by hand."""

from __future__ import annotations

import itertools
from math import factorial

import numpy as np
import pytest
from reference import assert_close
from scipy import stats

from lora_analysis import chance
from lora_analysis.chance.permutation import count_relabelings
from lora_analysis.errors import InputError


def labeled(design):
    """Tasks and seeds of the blocks of a design: the seeds of each task."""
    tasks = [task for task, seeds in enumerate(design) for _ in seeds]
    return tasks, [seed for seeds in design for seed in seeds]


def crossed(tasks, seeds):
    return [range(seeds)] * tasks


def separate(tasks, seeds):
    return [range(task * seeds, (task + 1) * seeds) for task in range(tasks)]


def planted(tasks, seeds, rng=None, effect=0.5):
    """Values of pairs: an effect within tasks, noise, and NaN for pairs of one seed."""
    tasks, seeds = np.array(list(tasks)), np.array(seeds)
    noise = 0 if rng is None else rng.standard_normal((len(tasks), len(tasks)))
    values = 0.1 + effect * (tasks[:, None] == tasks) + noise + np.transpose(noise)
    return np.where(seeds[:, None] == seeds, np.nan, values)


def looped_difference(values, labels):
    pairs = [(i, j) for i in range(len(labels)) for j in range(i) if not np.isnan(values[i, j])]
    same = [values[i, j] for i, j in pairs if labels[i] == labels[j]]
    other = [values[i, j] for i, j in pairs if labels[i] != labels[j]]
    return np.mean(same) - np.mean(other) if same and other else np.nan


def every_order(tasks, strata):
    """All orders of the labels within strata, renamed tasks and all."""
    members = [[i for i, s in enumerate(strata) if s == stratum] for stratum in set(strata)]
    for orders in itertools.product(*(itertools.permutations(m) for m in members)):
        labels = list(tasks)
        for blocks, order in zip(members, orders, strict=True):
            for block, source in zip(blocks, order, strict=True):
                labels[block] = tasks[source]
        yield labels


@pytest.mark.parametrize(
    ("tasks", "seeds", "relabelings"),
    [(2, 2, 3), (2, 3, 10), (2, 4, 35), (3, 2, 15), (3, 3, 280), (4, 2, 105), (4, 3, 15_400)],
)
def test_runs_with_seeds_of_their_own_are_relabeled_over_all(tasks, seeds, relabelings):
    design = labeled(separate(tasks, seeds))
    result = chance.permute_blocks(planted(*design), *design)
    assert (result.scheme, result.exact, result.blocks) == ("all runs", True, tasks * seeds)
    assert result.relabelings == relabelings
    expected = factorial(tasks * seeds) // (factorial(seeds) ** tasks * factorial(tasks))
    assert relabelings == expected
    assert_close([result.p_value, result.smallest_p_value], 1 / relabelings)
    assert_close(result.difference, 0.5)


@pytest.mark.parametrize(
    ("tasks", "seeds", "relabelings"), [(3, 3, 36), (4, 2, 24), (4, 3, 576), (2, 6, 32)]
)
def test_seeds_that_tasks_have_in_common_are_relabeled_within(tasks, seeds, relabelings):
    design = labeled(crossed(tasks, seeds))
    result = chance.permute_blocks(planted(*design), *design)
    assert (result.scheme, result.exact) == ("within seeds", True)
    assert result.relabelings == relabelings == factorial(tasks) ** (seeds - 1)
    assert_close([result.p_value, result.smallest_p_value], 1 / relabelings)


@pytest.mark.parametrize(
    ("tasks", "seeds", "within", "over_all"),
    [(2, 3, 4, 10), (2, 4, 8, 35), (3, 2, 6, 15), (3, 3, 36, 280), (4, 2, 24, 105)],
)
def test_both_schemes_of_a_crossed_design_are_counted_in_closed_form(
    tasks, seeds, within, over_all
):
    codes, strata = (np.array(labels) for labels in labeled(crossed(tasks, seeds)))
    assert count_relabelings(codes, strata) == within
    assert count_relabelings(codes, np.zeros_like(codes)) == over_all


@pytest.mark.parametrize(
    ("tasks", "seeds", "scheme", "smallest"),
    [
        (2, 2, "within seeds", 1 / 2),  # over all runs one of three has no pair within tasks
        (2, 3, "all runs", 1 / 10),  # within seeds 1 / 4
        (3, 2, "all runs", 1 / 15),  # within seeds 1 / 6
        (2, 4, "all runs", 1 / 35),  # within seeds 1 / 8
        (2, 5, "all runs", 1 / 126),  # within seeds 1 / 16
    ],
)
def test_of_two_valid_schemes_the_one_with_the_smaller_attainable_p_value_counts(
    tasks, seeds, scheme, smallest
):
    design = labeled(crossed(tasks, seeds))
    result = chance.permute_blocks(planted(*design), *design)
    assert result.scheme == scheme
    assert_close([result.p_value, result.smallest_p_value], smallest)


@pytest.mark.parametrize(
    ("design", "scheme", "relabelings"),
    [
        ([(0, 1), (2,)], "all runs", 3),
        ([(0, 1, 2, 3), (0, 4, 5, 6)], "within seeds", 20),  # one seed in common
        ([(0, 1, 2), (0, 1), (0, 2, 3)], "within seeds", 24),
        (
            [(0, 1, 2), (0, 1, 2), (3, 4, 5)],
            "within seeds",
            4,
        ),  # the third task apart: not over all
        ([(0, 1, 2), (0, 1), (0, 1)], "all runs", 105),  # 18 within seeds
    ],
)
def test_incomplete_designs(design, scheme, relabelings, rng):
    tasks, seeds = labeled(design)
    values = planted(tasks, seeds, rng, effect=1.0)
    result = chance.permute_blocks(values, tasks, seeds)
    assert (result.scheme, result.relabelings) == (scheme, relabelings)
    strata = [seed if scheme == "within seeds" and seeds.count(seed) > 1 else -1 for seed in seeds]
    observed = looped_difference(values, tasks)
    if len(tasks) > 8:
        return
    every = [looped_difference(values, labels) for labels in every_order(tasks, strata)]
    assert_close(result.difference, observed)
    assert_close(result.p_value, np.mean([not value < observed - 1e-12 for value in every]))


@pytest.mark.parametrize(
    "design", [separate(2, 3), crossed(3, 2), crossed(2, 3), [(0, 1), (2, 3, 4)]]
)
def test_the_test_equals_all_orders_of_the_labels(design, rng):
    tasks, seeds = labeled(design)
    for effect in (0.0, 2.0):
        values = planted(tasks, seeds, rng, effect)
        result = chance.permute_blocks(values, tasks, seeds)
        observed = looped_difference(values, tasks)
        every = [
            looped_difference(values, labels) for labels in every_order(tasks, [0] * len(tasks))
        ]
        assert_close(result.difference, observed)
        assert_close(result.p_value, np.mean([not value < observed - 1e-12 for value in every]))


@pytest.mark.parametrize(("design", "levels"), [(separate(2, 3), 10), (crossed(3, 2), 0)])
def test_without_an_effect_p_values_are_uniform_or_conservative(rng, design, levels):
    design = labeled(design)
    p = [
        chance.permute_blocks(planted(*design, rng, effect=0), *design).p_value for _ in range(600)
    ]
    if levels:
        counts = np.bincount(np.round(np.array(p) * levels).astype(int), minlength=levels + 1)[1:]
        assert stats.chisquare(counts).pvalue > 1e-3
    else:
        assert all(np.mean(np.array(p) <= level) <= level + 0.03 for level in (0.07, 0.14, 0.3))


def test_effects_of_the_seed_cancel_within_seeds(rng):
    tasks, seeds = labeled(crossed(3, 3))
    strength = 10 * rng.standard_normal(3)[seeds]
    values = planted(tasks, seeds, rng, effect=0)
    result = chance.permute_blocks(values, tasks, seeds)
    strong = chance.permute_blocks(values + strength[:, None] + strength, tasks, seeds)
    assert_close([strong.difference, strong.p_value], [result.difference, result.p_value])


def test_many_blocks_are_relabeled_by_drawing(rng):
    design = labeled(separate(4, 4))
    result = chance.permute_blocks(planted(*design, rng, 5.0), *design, draws=199)
    assert (result.exact, result.relabelings, result.scheme) == (False, 199, "all runs")
    assert_close([result.p_value, result.smallest_p_value], 1 / 200)
    design = labeled(crossed(5, 4))
    result = chance.permute_blocks(planted(*design, rng, 5.0), *design, draws=199)
    assert (result.exact, result.scheme) == (False, "within seeds")
    assert_close(result.p_value, 1 / 200)
    again = chance.permute_blocks(planted(*design), *design, draws=199, random_seed=0)
    assert again == chance.permute_blocks(planted(*design), *design, draws=199)


def test_equal_runs_show_nothing_and_missing_pairs_never_help():
    flat = chance.permute_blocks(np.full((6, 6), 0.3), "aaabbb", range(6))
    assert_close([flat.p_value, flat.difference], [1, 0], atol=1e-12)
    values = planted("aaabbb", range(6))
    values[0, 1] = values[1, 0] = np.nan
    assert_close(chance.permute_blocks(values, "aaabbb", range(6)).p_value, 0.1)
    values = planted("aabb", range(4))
    values[3] = values[:, 3] = np.nan
    result = chance.permute_blocks(values, "aabb", range(4))
    assert_close([result.p_value, result.smallest_p_value], 1 / 3)
    values[2] = values[:, 2] = np.nan
    nothing = chance.permute_blocks(values, "aabb", range(4))
    assert np.isnan(nothing.difference)
    assert nothing.p_value == nothing.smallest_p_value == 1


def test_values_on_the_diagonal_do_not_count():
    values = planted("aaabbb", range(6))
    filled = values.copy()
    np.fill_diagonal(filled, 1.0)
    expected = chance.permute_blocks(values, "aaabbb", range(6))
    assert chance.permute_blocks(filled, "aaabbb", range(6)) == expected
    assert chance.task_difference(filled, np.repeat([0, 1], 3)) == expected.difference


def test_the_jackknife_leaves_out_blocks(rng):
    tasks, seeds = labeled(crossed(2, 3))
    values = planted(tasks, seeds, rng)
    rest = [[j for j in range(6) if j != i] for i in range(6)]
    left = [looped_difference(values[np.ix_(r, r)], [tasks[j] for j in r]) for r in rest]
    expected = np.sqrt(5 / 6 * np.sum((left - np.mean(left)) ** 2))
    assert_close(chance.task_difference_error(values, tasks), expected)
    assert chance.task_difference_error(values[:4, :4], tasks[:4]) is None
    # Both tasks have two blocks, but leaving out one leaves no pair within tasks.
    values = planted("aabb", range(4))
    values[2, 3] = values[3, 2] = np.nan
    assert chance.task_difference_error(values, "aabb") is None


@pytest.mark.parametrize(
    ("values", "tasks", "seeds", "message"),
    [
        (np.eye(3), "aabb", range(4), r"4 blocks.*\(4, 4\).*\(3, 3\)"),
        (np.eye(4), "aabb", range(3), "found 3 seeds"),
        (np.eye(3), "aaa", range(3), "needs two tasks"),
        (np.eye(3), "abc", range(3), "needs two tasks"),
        (np.eye(1), "a", range(1), "needs two tasks"),
        (np.eye(4), "aabb", (0, 0, 1, 2), "task 'a' and seed 0"),
    ],
)
def test_what_cannot_be_relabeled_is_refused(values, tasks, seeds, message):
    with pytest.raises(InputError, match=message):
        chance.permute_blocks(values, tasks, seeds)
