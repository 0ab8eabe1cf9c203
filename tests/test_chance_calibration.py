"""The null of φ against draws of what it is the null of, with stated bounds."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from factories import low_rank_update
from reference import assert_close
from scipy import stats

from lora_analysis import chance
from lora_analysis.similarity import random_similarity, subspace_similarity

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
    np.testing.assert_array_equal(p, chance.similarity_p_value(d, j, i, phi))
    assert distance(p) <= 0.009
    assert 0.0006 <= np.mean(p <= 0.001) <= 0.0014


NARROW = [(16, 2, 2), (16, 3, 12), (20, 2, 15), (32, 2, 30), (64, 60, 3), (64, 62, 62), (64, 2, 61)]
TINY = [(4, 2, 2), (5, 2, 3), (6, 3, 3), (8, 4, 3), (15, 6, 6), (8, 7, 6)]


@pytest.mark.parametrize(("d", "i", "j"), NARROW + TINY)
def test_p_values_hold_in_small_spaces_and_where_subspaces_nearly_fill_them(d, i, j):
    phi = chance.similarity_draws(d, i, j, 20_000, seed=7)
    p = chance.similarity_p_value(d, i, j, phi)
    assert distance(p) <= 0.014
    assert 0.0004 <= np.mean(p <= 0.001) <= 0.0022
    assert np.mean(p <= 0.01) == pytest.approx(0.01, abs=0.003)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("d", "i", "j"), [c for c in CELLS if c[1] <= c[2]] + NARROW)
def test_the_tail_holds_at_one_in_a_thousand_and_one_in_ten_thousand(d, i, j):
    phi = chance.similarity_draws(d, i, j, 400_000, seed=11)
    p = chance.similarity_p_value(d, i, j, phi)
    assert distance(p) <= 0.006
    assert 0.00075 <= np.mean(p <= 1e-3) <= 0.0015
    assert np.mean(p <= 1e-4) <= 0.0003


@pytest.mark.slow
@pytest.mark.parametrize(("d", "i", "j"), [(64, 16, 16), (64, 4, 16), (64, 1, 4), (768, 4, 16)])
def test_p_values_hold_for_ten_thousand_real_pairs_of_frames(rng, d, i, j):
    phi = []
    for _ in range(10):
        one, two = (reference.haar_stack(rng, 1000, d, k) for k in (i, j))
        phi.append(np.sum((np.swapaxes(one, -1, -2) @ two) ** 2, axis=(-2, -1)) / min(i, j))
    p = chance.similarity_p_value(d, i, j, np.concatenate(phi))
    assert distance(p) <= 0.02
    assert 0.0003 <= np.mean(p <= 0.001) <= 0.002


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
    exact = np.maximum(stats.beta(2.5, 7.5).sf(phi), chance.P_FLOOR)
    assert_close(chance.similarity_p_value(20, 1, 5, phi), exact, atol=1e-12)
    complement = chance.similarity_p_value(20, 19, 4, (3 + phi) / 4)  # three are common to all
    exact = np.maximum(stats.beta(8, 2).sf(phi), chance.P_FLOOR)
    assert_close(complement, exact, atol=1e-12)


def test_every_p_value_names_its_method():
    methods = chance.similarity_null_method(20, [1, 2, 19, 20], [5, 5, 4, 3]).tolist()
    assert methods == ["exact", "matched beta", "exact", "exact"]
    assert chance.similarity_null_method(9, [1, 2, 8, 9], 3).tolist() == [
        "exact",
        "sampled",
        "exact",
        "exact",
    ]


def test_no_p_value_is_below_the_floor():
    assert (chance.similarity_p_value(9, 3, [2, 3], 1.0) == chance.P_FLOOR).all()
    assert (chance.similarity_p_value(99, 3, [1, 3, 97], [1.0, 1.0, 1.0]) == chance.P_FLOOR).all()
    assert np.isnan(chance.similarity_p_value(9, 3, 3, np.nan))


def test_p_values_of_whole_grids_are_those_of_their_cells():
    for d in (9, 30):
        i, j = np.indices((9, 7)) + 1
        phi = chance.similarity_mean(d, i, j) * 1.1
        grid = chance.similarity_p_value(d, i, j, phi)
        bands = chance.similarity_quantile(d, i, j, 0.9)
        assert not np.isnan(grid).any()
        for at in np.ndindex(9, 7):
            cell = (d, at[0] + 1, at[1] + 1)
            assert_close(grid[at], chance.similarity_p_value(*cell, phi[at]), atol=1e-14)
            assert_close(bands[at], chance.similarity_quantile(*cell, 0.9), atol=1e-14)


def test_p_values_fall_as_the_overlap_grows_and_end_at_the_support():
    p = chance.similarity_p_value(20, 12, 14, np.array([0.0, 0.5, 0.6, 0.7, 0.9, 1.0]))
    assert_close(
        p[[0, 1, -1]], [1, 1, chance.P_FLOOR], atol=1e-12
    )  # twelve and fourteen of twenty share six
    assert (np.diff(p) <= 0).all()


def test_the_whole_space_is_never_significant():
    assert chance.similarity_p_value(8, 8, 3, 1.0) == 1
    assert chance.similarity_quantile(8, 8, 3, 0.99) == 1
    assert np.isnan(chance.similarity_p_value(8, 8, 3, np.nan))
    assert (chance.similarity_draws(8, 8, 3, 5) == 1).all()


def test_quantiles_invert_p_values():
    level = np.array([0.025, 0.5, 0.975])
    for d, i, j in [(64, 1, 1), (64, 16, 4), (768, 8, 64), (30, 20, 20), (64, 63, 5), (32, 30, 2)]:
        value = chance.similarity_quantile(d, i, j, level)
        assert_close(chance.similarity_p_value(d, i, j, value), 1 - level, atol=1e-9)


def test_the_expected_largest_of_many_modules_equals_a_simulation():
    for i, j, count in [(1, 1, 24), (4, 8, 200)]:
        draws = chance.similarity_draws(64, i, j, 2000 * count, seed=3).reshape(2000, count)
        expected = chance.similarity_maximum(64, i, j, count)
        assert_close(expected, draws.max(axis=1).mean(), rtol=0.02)
    assert_close(chance.similarity_maximum(64, 4, 8, 1), 8 / 64, rtol=1e-4)


def test_a_maximum_is_compared_with_the_expected_maximum_of_its_own_dimension():
    dimensions = [64, 768, 64, 768, 768]
    assert chance.similarity_maximum_at(dimensions, 0) == chance.similarity_maximum(64, 1, 1, 2)
    expected = chance.similarity_maximum(768, 2, 4, 3)
    assert chance.similarity_maximum_at(np.array(dimensions), 4, 2, 4) == expected


# --- grids ------------------------------------------------------------------------------------


def test_grid_p_values_are_those_of_their_cells(rng):
    one, two = (low_rank_update(rng, 24, 20, r) for r in (3, 5))
    grid = subspace_similarity(one, two)  # output side
    for i, j in [(1, 1), (2, 4), (3, 5)]:
        expected = chance.similarity_p_value(24, i, j, grid.at(i, j))
        assert grid.p_value[i - 1, j - 1] == expected
    assert grid.null_method[0, 4] == grid.null_method[2, 0] == "exact"
    assert grid.null_method[1, 1] == "matched beta"
    assert subspace_similarity(one, one).p_value[2, 2] == chance.P_FLOOR


def test_a_grid_of_random_directions_carries_its_p_values():
    grid = random_similarity(64, (5, 6), seed=3)
    assert grid.p_value.shape == grid.null_method.shape == (5, 6)
    assert (grid.p_value > 1e-3).all()
    assert (grid.p_value <= 1).all()


def test_an_untrained_update_has_no_p_values(rng):
    one = low_rank_update(rng, 24, 20, 3)
    empty = subspace_similarity(one, type(one)("m", one.A, 0 * one.B, 1.0))
    assert empty.p_value.shape == empty.null_method.shape == (3, 0)
