"""Isotropic chance: closed forms, and the same numbers by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from reference import IDENTITY, assert_close

from lora_analysis import chance

DRAWS = 8000


@pytest.mark.parametrize(
    ("dimension", "i", "j"),
    [(8, 1, 1), (8, 2, 3), (8, 3, 2), (8, 1, 5), (8, 6, 5), (3, 2, 2), (20, 4, 8)],
)
def test_similarity_mean_and_variance_equal_a_simulation(rng, dimension, i, j):
    one = reference.haar_stack(rng, DRAWS, dimension, i)
    two = reference.haar_stack(rng, DRAWS, dimension, j)
    phi = np.sum((np.swapaxes(one, -1, -2) @ two) ** 2, axis=(-2, -1)) / min(i, j)
    reference.assert_mean(phi, chance.similarity_mean(dimension, i, j))
    reference.assert_variance(phi, chance.similarity_variance(dimension, i, j))


@pytest.mark.parametrize(
    ("dimension", "j", "expected"), [(12288, 64, 0.005), (768, 64, 0.083), (192, 64, 0.33)]
)
def test_chance_at_64_directions_is_what_the_widths_of_known_models_give(dimension, j, expected):
    assert chance.similarity_mean(dimension, 8, j) == pytest.approx(expected, rel=0.05)


def test_similarity_with_the_whole_space_is_one_without_spread():
    assert chance.similarity_mean(7, 7, 3) == 1
    assert chance.similarity_variance(7, 7, 3) == 0
    assert chance.similarity_variance(7, 2, 7) == 0
    assert chance.similarity_mean(1, 1, 1) == 1
    assert chance.similarity_variance(1, 1, 1) == 0


def test_one_direction_against_one_follows_the_beta_distribution():
    # cos² ~ Beta(1/2, (d−1)/2)
    d, a, b = 11, 0.5, 5.0
    assert chance.similarity_mean(d, 1, 1) == pytest.approx(a / (a + b))
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    assert chance.similarity_variance(d, 1, 1) == pytest.approx(variance)


def test_moments_broadcast_and_are_symmetric():
    i, j = np.arange(1, 5)[:, None], np.arange(1, 7)[None, :]
    for moment in (chance.similarity_mean, chance.similarity_variance):
        table = moment(9, i, j)
        assert table.shape == (4, 6)
        np.testing.assert_array_equal(table, moment(9, j, i))
        assert table[1, 4] == moment(9, 2, 5)


def test_similarity_grid_mean_counts_from_one():
    grid = chance.similarity_grid_mean(10, 2, 3)
    assert_close(grid, [[0.1, 0.2, 0.3], [0.2, 0.2, 0.3]], rtol=IDENTITY)
    assert chance.similarity_grid_mean(10, 0, 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("s", "t"), [([1.0, 1.0], [1.0, 1.0, 1.0]), ([5.0, 1.0], [3.0, 2.0, 0.1]), ([1.0], [4.0])]
)
def test_energy_overlap_mean_equals_a_simulation(rng, s, t):
    dimension, s, t = 9, np.array(s), np.array(t)
    one = reference.haar_stack(rng, DRAWS, dimension, len(s))
    two = reference.haar_stack(rng, DRAWS, dimension, len(t))
    gram = np.swapaxes(one, -1, -2) @ two
    omega = np.einsum("a,nab,b->n", s**2, gram**2, t**2) / np.sqrt(np.sum(s**4) * np.sum(t**4))
    participation = tuple(np.sum(x**2) ** 2 / np.sum(x**4) for x in (s, t))
    reference.assert_mean(omega, chance.energy_overlap_mean(dimension, participation))


@pytest.mark.parametrize(
    ("k", "expected", "update_norm", "chance_factor", "projected", "enrichment"),
    [(4, 0.0202, 6.91, 343, 0.32, 15.9), (64, 0.3227, 3.57, 11.1, 1.90, 5.9)],
)
def test_random_directions_give_the_random_column_of_table_7(
    *, k, expected, update_norm, chance_factor, projected, enrichment
):
    # The paper prints 0.02 and 0.33 for ‖W_q‖ = 61.95 in GPT-3's layer 48.
    rms = chance.projected_norm_rms(61.95, (12288, 12288), k)
    assert rms == pytest.approx(expected, abs=5e-5)
    assert update_norm / rms == pytest.approx(chance_factor, rel=5e-3)
    assert projected / rms == pytest.approx(enrichment, rel=5e-3)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_squared_projection_on_random_directions_has_its_exact_mean(rng, k):
    W = rng.standard_normal((9, 6)) * np.array([5, 3, 1, 1, 0.5, 0.1])
    U = reference.haar_stack(rng, DRAWS, 9, k)
    V = reference.haar_stack(rng, DRAWS, 6, k)
    squares = np.sum((np.swapaxes(U, -1, -2) @ W @ V) ** 2, axis=(-2, -1))
    rms = chance.projected_norm_rms(np.linalg.norm(W), (9, 6), k)
    reference.assert_mean(squares, rms**2)


def test_projected_norm_rms_of_all_directions_is_the_norm():
    assert chance.projected_norm_rms(3.5, (8, 8), 8) == pytest.approx(3.5)
    assert_close(chance.projected_norm_rms(2.0, (4, 9), [1, 3]), [1 / 3, 1])


def test_excess_is_zero_at_chance_one_at_agreement_and_nan_where_nothing_can_exceed():
    found = chance.excess([0.25, 1.0, 0.0, 1.0], [0.25, 0.25, 0.25, 1.0])
    assert_close(found, [0, 1, -1 / 3, np.nan])
