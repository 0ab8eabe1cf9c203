"""Every null against draws of what it is the null of, with a stated bound."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from factories import low_rank_update
from reference import assert_close
from scipy import stats

from lora_analysis import chance
from lora_analysis.errors import InputError
from lora_analysis.similarity import energy_overlap, signed_cosine, subspace_similarity

CELLS = [
    (d, i, j)
    for d in (64, 768, 4096)
    for i in (1, 4, 16, 64)
    for j in (1, 4, 16, 64)
    if d not in (i, j)
]


def distance(p_values):
    """sup|F̂(p) − p|: how far a sample of p-values is from uniform."""
    return stats.kstest(p_values, "uniform").statistic


@pytest.mark.parametrize(("d", "i", "j"), CELLS)
def test_similarity_p_values_are_uniform_under_the_null(d, i, j):
    phi = chance.similarity_draws(d, i, j, 40_000, seed=d + 100 * i + j)
    p = chance.similarity_p_value(d, i, j, phi)
    assert distance(p) <= 0.012
    assert 0.0006 <= np.mean(p <= 0.001) <= 0.0016


@pytest.mark.parametrize(
    ("d", "i", "j"), [(9, 1, 1), (9, 2, 3), (9, 4, 2), (9, 6, 5), (9, 8, 3), (30, 4, 16)]
)
def test_the_exact_sampler_draws_what_random_subspaces_give(rng, d, i, j):
    one, two = (reference.haar_stack(rng, 20_000, d, k) for k in (i, j))
    phi = np.sum((np.swapaxes(one, -1, -2) @ two) ** 2, axis=(-2, -1)) / min(i, j)
    drawn = chance.similarity_draws(d, i, j, 20_000, seed=1)
    assert stats.ks_2samp(phi, drawn).pvalue > 1e-4
    assert drawn.min() >= max(0, i + j - d) / min(i, j) - 1e-12
    reference.assert_mean(drawn, chance.similarity_mean(d, i, j))
    reference.assert_variance(drawn, chance.similarity_variance(d, i, j))


@pytest.mark.parametrize(("d", "i", "j"), [(64, 1, 1), (64, 16, 4), (30, 20, 20)])
def test_p_values_of_a_grid_are_uniform_for_real_subspaces(rng, d, i, j):
    one, two = (reference.haar_stack(rng, 10_000, d, k) for k in (i, j))
    phi = np.sum((np.swapaxes(one, -1, -2) @ two) ** 2, axis=(-2, -1)) / min(i, j)
    assert distance(chance.similarity_p_value(d, i, j, phi)) <= 0.02


def test_a_p_value_with_one_direction_is_the_exact_beta_tail():
    phi = np.linspace(0, 1, 11)
    assert_close(chance.similarity_p_value(20, 1, 5, phi), stats.beta(2.5, 7.5).sf(phi), atol=1e-12)
    assert chance.similarity_null_method([1, 2], [5, 5]).tolist() == ["exact", "matched beta"]


def test_p_values_fall_as_the_overlap_grows_and_end_at_the_support():
    p = chance.similarity_p_value(10, 6, 7, np.array([0.0, 0.5, 0.6, 0.7, 0.9, 1.0]))
    assert_close(p[[0, 1, -1]], [1, 1, 0], atol=1e-12)  # six and seven of ten share three
    assert (np.diff(p) <= 0).all()


def test_the_whole_space_is_never_significant():
    assert chance.similarity_p_value(8, 8, 3, 1.0) == 1
    assert chance.similarity_quantile(8, 8, 3, 0.99) == 1
    assert np.isnan(chance.similarity_p_value(8, 8, 3, np.nan))
    assert (chance.similarity_draws(8, 8, 3, 5) == 1).all()


def test_quantiles_invert_p_values():
    level = np.array([0.025, 0.5, 0.975])
    for d, i, j in [(64, 1, 1), (64, 16, 4), (768, 8, 64), (30, 20, 20)]:
        value = chance.similarity_quantile(d, i, j, level)
        assert_close(chance.similarity_p_value(d, i, j, value), 1 - level, atol=1e-9)


def test_the_expected_largest_of_many_modules_equals_a_simulation():
    for i, j, count in [(1, 1, 24), (4, 8, 200)]:
        draws = chance.similarity_draws(64, i, j, 2000 * count, seed=3).reshape(2000, count)
        expected = chance.similarity_maximum(64, i, j, count)
        assert_close(expected, draws.max(axis=1).mean(), rtol=0.02)
    assert_close(chance.similarity_maximum(64, 4, 8, 1), 8 / 64, rtol=1e-4)


def isotropic(rng, d_out, d_in, s):
    """An update with given singular values in uniform directions on both sides."""
    U, V = (reference.haar_stack(rng, 1, d, len(s))[0] for d in (d_out, d_in))
    one = low_rank_update(rng, d_out, d_in, len(s))
    return type(one)("m", V.T, U * s, 1.0)


SPECTRA = [([1.0], [1.0]), ([3.0, 1.0], [1.0]), ([1.0] * 4, [2.0, 1.0, 1.0, 0.5]), ([1.0] * 8,) * 2]


def participation(s):
    energy = np.square(s)
    return energy.sum() ** 2 / np.sum(energy**2)


@pytest.mark.parametrize(("s", "t"), SPECTRA)
def test_the_null_of_omega_and_of_the_signed_cosine(rng, s, t):
    pairs = [(isotropic(rng, 32, 24, s), isotropic(rng, 32, 24, t)) for _ in range(3000)]
    pr = participation(s), participation(t)
    for side, d in (("input", 24), ("output", 32)):
        omega = np.array([energy_overlap(a, b, side=side) for a, b in pairs])
        reference.assert_mean(omega, chance.energy_overlap_mean(d, pr))
        reference.assert_variance(omega, chance.energy_overlap_variance(d, pr))
        assert distance(chance.energy_overlap_p_value(d, pr, omega)) <= 0.07
    cosine = np.array([signed_cosine(a, b) for a, b in pairs])
    reference.assert_variance(cosine, 1 / (32 * 24))
    assert distance(chance.signed_cosine_p_value((32, 24), pr, cosine)) <= 0.06


@pytest.mark.parametrize("pr", [(1.0, 1.0), (1.5, 2.0), (4.0, 5.0), (16.0, 16.0)])
def test_the_signed_cosines_tail_is_calibrated_at_one_in_a_thousand(rng, pr):
    n = round(pr[0] * pr[1])
    draws = np.mean([rng.standard_normal((200_000, 2)).prod(axis=1) for _ in range(n)], axis=0)
    p = chance.signed_cosine_p_value((100, 100), (n, 1.0), draws * np.sqrt(n) / 100)
    assert distance(p) <= 0.005
    assert 0.0007 <= np.mean(p <= 0.001) <= 0.0013


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("values", [np.linspace(1, 0.5, 12), [5.0, 2.0, 1.0, 0.5], [1.0]])
def test_the_null_of_enrichment_on_both_sides_and_on_one(rng, k, values):
    m, n, count = 20, 12, 6000
    W = np.zeros((m, n))
    W[range(len(values)), range(len(values))] = values
    t, u = np.sum(np.square(values)), np.sum(np.power(values, 4))
    U, V = reference.haar_stack(rng, count, m, k), reference.haar_stack(rng, count, n, k)
    both = np.sum((np.swapaxes(U, 1, 2) @ W @ V) ** 2, axis=(1, 2))
    reference.assert_mean(both, k * k * t / (m * n))
    variance = chance.projected_energy_variance(t, u, (m, n), k)
    reference.assert_variance(both, variance)
    rows = np.sum((np.swapaxes(U, 1, 2) @ W) ** 2, axis=(1, 2))
    reference.assert_mean(rows, k * t / m)
    one_sided = chance.one_sided_energy_variance(t, u, m, k)
    reference.assert_variance(rows, one_sided)
    columns = np.sum((W @ V) ** 2, axis=(1, 2))
    reference.assert_variance(columns, chance.one_sided_energy_variance(t, u, n, k))
    if len(values) == 12:  # many directions carry W: what the gamma distribution is for
        assert distance(chance.energy_p_value(both, k * k * t / (m * n), variance)) <= 0.06
        assert distance(chance.energy_p_value(rows, k * t / m, one_sided)) <= 0.06
    assert chance.energy_p_value(3.0, 3.0, 0.0) == 1


def test_bands_of_an_energy_share_hold_what_they_say(rng):
    s = np.array([3.0, 1.0, 0.5])
    d, k, t, u = 40, 10, np.sum(s**2), np.sum(s**4)
    U = reference.haar_stack(rng, 8000, d, 3)
    share = np.sum((U[:, :k] * s) ** 2, axis=(1, 2)) / t
    variance = chance.one_sided_energy_variance(t, u, d, k) / t**2
    low, high = (chance.energy_share_quantile(k, d, variance, level) for level in (0.025, 0.975))
    assert_close([np.mean(share < low), np.mean(share > high)], 0.025, atol=0.008)
    assert chance.energy_share_quantile(d, d, 0.0, 0.5) == 1


def test_grid_p_values_are_those_of_their_cells(rng):
    one, two = (low_rank_update(rng, 24, 20, r) for r in (3, 5))
    grid = subspace_similarity(one, two)
    for i, j in [(1, 1), (2, 4), (3, 5)]:
        expected = chance.similarity_p_value(20, i, j, grid.at(i, j))
        assert grid.p_value[i - 1, j - 1] == expected
    assert grid.null_method[0, 4] == grid.null_method[2, 0] == "exact"
    assert grid.null_method[1, 1] == "matched beta"
    assert_close(subspace_similarity(one, one).p_value[2, 2], 0, atol=1e-12)


# --- many modules, many runs ------------------------------------------------------------------


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
    assert found.relabellings == round(1 / smallest)


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
    assert (found.exact, found.relabellings) == (False, 199)
    assert_close([found.p_value, found.smallest_p_value], 1 / 200)


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
    assert_close(chance.monte_carlo_p_value([1, 2, 3], 2.5), 0.5)
