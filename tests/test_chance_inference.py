"""From p-values to statements: false discovery rate, permuted runs, jackknife."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from reference import assert_close
from scipy import stats

from lora_analysis import chance
from lora_analysis.errors import InputError


def looped_q_values(p):
    """Benjamini–Hochberg as it is written down: the smallest level at which each is called."""
    p = list(p)
    found = []
    for value in p:
        levels = [other * len(p) / sum(x <= other for x in p) for other in p if other >= value]
        found.append(min(1.0, *levels))
    return np.array(found)


def test_q_values_equal_the_step_up_procedure(rng):
    p = rng.random(40) ** 3
    assert_close(chance.benjamini_hochberg(p), looped_q_values(p))
    assert_close(
        chance.benjamini_hochberg([0.01, 0.04, 0.03, 0.5]), [0.04, 0.16 / 3, 0.16 / 3, 0.5]
    )


def test_missing_p_values_stay_missing_and_do_not_count():
    q = chance.benjamini_hochberg([0.01, np.nan, 0.04, 0.03, 0.5])
    assert np.isnan(q[1])
    assert_close(q[[0, 2, 3, 4]], chance.benjamini_hochberg([0.01, 0.04, 0.03, 0.5]))
    assert chance.benjamini_hochberg([]).size == 0


def test_the_false_discovery_rate_is_held():
    rng = np.random.default_rng(5)
    false = []
    for _ in range(400):
        p = np.append(rng.random(80), rng.random(20) * 1e-3)
        called = chance.benjamini_hochberg(p) <= 0.1
        false.append(called[:80].sum() / max(called.sum(), 1))
    assert 0.06 <= np.mean(false) <= 0.1


@pytest.mark.parametrize(
    ("tasks", "smallest"),
    [("aabb", 1 / 3), ("aaabbb", 0.1), ("aaabbbccc", 1 / 280), ("aab", 1 / 3)],
)
def test_runs_that_agree_by_task_reach_the_smallest_p_there_is(tasks, smallest):
    codes = np.array([ord(task) for task in tasks])
    similarity = 0.1 + 0.5 * (codes[:, None] == codes)
    found = chance.permute_runs(similarity, tasks)
    assert_close(found.p_value, smallest)
    assert_close(found.smallest_p_value, smallest)
    assert_close(found.difference, 0.5)
    assert found.exact
    assert found.allows_interval
    assert found.relabelings == round(1 / smallest)


def test_permuted_runs_without_an_effect_are_uniform(rng):
    tasks = "aaabbb"
    p = []
    for _ in range(500):
        noise = rng.standard_normal((6, 6))
        p.append(chance.permute_runs(noise + noise.T, tasks).p_value)
    counts = np.bincount(np.round(np.array(p) * 10).astype(int), minlength=11)[1:]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_many_runs_are_permuted_by_drawing(rng):
    tasks = list(range(4)) * 4
    codes = np.array(tasks)
    noise = rng.standard_normal((16, 16))
    similarity = (codes[:, None] == codes) * 5.0 + noise + noise.T
    found = chance.permute_runs(similarity, tasks, draws=199)
    assert (found.exact, found.relabelings) == (False, 199)
    assert_close([found.p_value, found.smallest_p_value], 1 / 200)


def test_equal_runs_show_nothing_and_missing_pairs_never_help():
    flat = chance.permute_runs(np.full((6, 6), 0.3), "aaabbb")
    assert_close([flat.p_value, flat.difference], [1, 0], atol=1e-12)
    similarity = 0.1 + 0.5 * np.kron(np.eye(2), np.ones((3, 3)))
    similarity[0, 1] = similarity[1, 0] = np.nan
    assert_close(chance.permute_runs(similarity, "aaabbb").p_value, 0.1)
    # Nothing known within tasks: no difference, and no p-value below 1.
    similarity = np.where(np.kron(np.eye(2), np.ones((2, 2))) > 0, np.nan, 0.2)
    nothing = chance.permute_runs(similarity, "aabb")
    assert np.isnan(nothing.difference)
    assert nothing.p_value == 1


def test_the_permutation_of_runs_equals_all_orders_of_the_labels(rng):
    noise = rng.standard_normal((5, 5))
    similarity, tasks = noise + noise.T, np.array(list("aabbb"))

    def difference(labels):
        pairs = [(i, j) for i in range(5) for j in range(i)]
        same = [similarity[i, j] for i, j in pairs if labels[i] == labels[j]]
        other = [similarity[i, j] for i, j in pairs if labels[i] != labels[j]]
        return np.mean(same) - np.mean(other)

    every = [difference(tasks[list(order)]) for order in itertools.permutations(range(5))]
    found = chance.permute_runs(similarity, tasks.tolist())
    assert_close(found.difference, difference(tasks))
    assert_close(found.p_value, np.mean(np.array(every) >= difference(tasks) - 1e-12))


def test_a_matrix_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"4 runs.*\(4, 4\).*\(3, 3\)"):
        chance.permute_runs(np.eye(3), "aabb")


@pytest.mark.parametrize("tasks", ["aaa", "abc", "a"])
def test_too_few_tasks_or_runs_are_refused(tasks):
    with pytest.raises(InputError, match="needs two tasks"):
        chance.permute_runs(np.eye(len(tasks)), tasks)


def test_the_jackknife_error_of_a_mean_is_its_standard_error(rng):
    x = rng.standard_normal(9)
    value, error = chance.jackknife(lambda runs: x[runs].mean(), 9)
    assert_close([value, error], [x.mean(), x.std(ddof=1) / 3])
    assert chance.jackknife(lambda runs: x[runs].mean(), 2)[1] is None


def test_small_p_values_are_reported_as_such():
    texts = [chance.p_value_text(p) for p in (3e-7, 0.00123, 0.5, float("nan"))]
    assert texts == ["< 1e-4", "0.0012", "0.5", ""]
    assert_close([chance.monte_carlo_p_value([1, 2, 3], x) for x in (2.5, 3, 9)], [0.5, 0.5, 0.25])
    assert np.isnan(chance.monte_carlo_p_value([1, 2, 3], np.nan))
