"""Intruder dimensions, and what W → W + ΔW does to W's spectrum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
from factories import low_rank_update, orthonormal, planted_update
from reference import ORACLE, assert_close

from lora_analysis import LowRankUpdate
from lora_analysis.adapter import DenseUpdate
from lora_analysis.errors import BaseWeightError, IncompatibleError, InputError, ScaleError
from lora_analysis.intruders import intruder_dimensions
from lora_analysis.spectra import SIDES, weight_svd

SHAPES = [(40, 40), (60, 32), (32, 60)]


def weight(rng, shape, values=None):
    n = min(shape)
    s = np.linspace(3, 0.5, n) if values is None else values
    return orthonormal(rng, shape[0], n) * s @ orthonormal(rng, shape[1], n).T


def update(rng, shape, size=1.0, rank=3):
    one = low_rank_update(rng, *shape, rank)
    return replace(one, scale=size / np.linalg.norm(one.B @ one.A))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.01, 3.0, 50.0])
def test_every_number_equals_the_dense_one(rng, shape, size):
    W, one = weight(rng, shape), update(rng, shape, size)
    D, k = one.delta_weight(), 8
    found = intruder_dimensions(one, W, k=k, span=12)
    before, after = (np.linalg.svd(m, full_matrices=False) for m in (W, W + D))
    assert_close(found.S, after[1][:k])
    assert_close(found.drift, after[1][:k] / before[1][:k] - 1, atol=1e-12)
    exact = reference.largest_cosines(W, D, k)
    old = {"output": before[0], "input": before[2].T}
    new = {"output": after[0][:, :k], "input": after[2].T[:, :k]}
    for side in SIDES:
        own = found.sides[side]
        assert_close(own.max_cosine, exact[side], rtol=ORACLE)
        np.testing.assert_array_equal(found.intruders(side), exact[side] < 0.5)
        X = old[side]
        novelty = [1 - np.linalg.norm(X[:, :12].T @ y) ** 2 for y in new[side].T]
        assert_close(own.novelty, novelty, atol=1e-10)
        cosines = np.abs(X.T @ new[side])
        np.testing.assert_array_equal(own.nearest, cosines.argmax(axis=0) + 1)
        angles = reference.exact_principal_angles(X[:, :k], new[side])
        assert_close(own.rotation, angles, atol=1e-9)
        energy = found.S**2
        share = energy[exact[side] < 0.5].sum() / energy.sum()
        assert found.energy_share(side) == pytest.approx(share)
        assert found.count(side) == int((exact[side] < 0.5).sum())


def test_an_update_that_w_does_not_know_is_one_intruder_with_full_novelty(rng):
    X, Z = orthonormal(rng, 40, 40), orthonormal(rng, 30, 30)
    # W lives on the first 20 directions of either side, ΔW on one of the others.
    W = X[:, :20] * np.linspace(3, 1, 20) @ Z[:, :20].T
    one = planted_update(X[:, 30:31], np.array([10.0]), Z[:, 25:26])
    found = intruder_dimensions(one, W, k=4, span=20)
    for side, d in (("input", 30), ("output", 40)):
        own = found.sides[side]
        # What fills up W's basis beyond its rank is arbitrary and is not held against.
        assert_close(own.max_cosine, [0, 1, 1, 1], atol=1e-12)
        assert_close(own.nearest[1:], [1, 2, 3])
        assert_close(own.novelty, [1, 0, 0, 0], atol=1e-12)
        assert own.chance_novelty == pytest.approx(1 - 20 / d)
        assert found.energy_share(side) == pytest.approx(100 / np.sum(found.S**2))
    assert_close(found.S, [10, *np.linspace(3, 1, 20)[:3]])


def test_mixing_wholly_inside_w_makes_intruders_without_novelty(rng):
    X, Z = orthonormal(rng, 64, 64), orthonormal(rng, 64, 64)
    W = X * np.r_[np.linspace(1.2, 1, 20), np.linspace(0.3, 0.1, 44)] @ Z.T
    turn, other = orthonormal(rng, 20, 20), orthonormal(rng, 20, 20)
    one = planted_update(X[:, :20] @ turn, np.linspace(9, 4, 20), Z[:, :20] @ other)
    found = intruder_dimensions(one, W, k=10, span=20)
    for side in SIDES:
        assert found.count(side) >= 5
        assert_close(found.sides[side].novelty, np.zeros(10), atol=1e-12)


def test_scaling_w_by_its_own_directions_makes_no_intruder_and_drifts(rng):
    X, Z = orthonormal(rng, 40, 30), orthonormal(rng, 30, 30)
    s = np.linspace(3, 1, 30)
    found = intruder_dimensions(planted_update(X[:, :2], s[:2], Z[:, :2]), X * s @ Z.T, k=5)
    for side in SIDES:
        assert found.count(side) == 0
        assert_close(found.sides[side].rotation, np.zeros(5), atol=1e-12)
    assert_close(found.drift, [1, 1, 0, 0, 0], atol=1e-12)


def test_a_dense_update_is_the_same_as_its_factors(rng):
    for shape in SHAPES:
        W, one = weight(rng, shape), update(rng, shape, 4.0)
        dense = DenseUpdate(name=one.name, delta=one.delta_weight())
        a, b = (intruder_dimensions(u, W, k=6) for u in (one, dense))
        assert_close(a.S, b.S)
        for side in SIDES:
            assert_close(a.sides[side].max_cosine, b.sides[side].max_cosine, rtol=ORACLE)
            assert_close(a.sides[side].novelty, b.sides[side].novelty, atol=1e-10)


def test_neither_factors_nor_sides_depend_on_the_gauge_or_on_transposing(rng):
    W, one = weight(rng, (60, 32)), update(rng, (60, 32), 5.0)
    G = rng.standard_normal((3, 3))
    turned = replace(one, B=one.B @ G, A=np.linalg.solve(G, one.A))
    flipped = replace(one, B=one.A.T, A=one.B.T)
    a, b = (intruder_dimensions(u, W) for u in (one, turned))
    c = intruder_dimensions(flipped, W.T)
    for side, other in (("input", "output"), ("output", "input")):
        assert_close(a.sides[side].max_cosine, b.sides[side].max_cosine, rtol=ORACLE)
        assert_close(a.sides[side].max_cosine, c.sides[other].max_cosine, rtol=ORACLE)
        assert a.sides[side].chance_maximum == c.sides[other].chance_maximum


def test_epsilon_is_the_cosine_below_which_a_direction_is_an_intruder(rng):
    W, one = weight(rng, (40, 40)), update(rng, (40, 40), 3.0)
    cosines = intruder_dimensions(one, W).sides["output"].max_cosine
    counts = [intruder_dimensions(one, W, epsilon=e).count("output") for e in (0.3, 0.7, 0.95)]
    assert counts == [int((cosines < e).sum()) for e in (0.3, 0.7, 0.95)]
    assert len(set(counts)) > 1


def test_a_large_weight_is_held_against_the_update_in_its_own_coordinates(rng):
    shape = (1000, 900)
    W, one = weight(rng, shape), update(rng, shape, 4.0)
    found = intruder_dimensions(one, W, k=5)
    exact = reference.largest_cosines(W, one.delta_weight(), 5)
    for side in SIDES:
        assert_close(found.sides[side].max_cosine, exact[side], rtol=ORACLE)


def test_an_untrained_update_changes_nothing(rng):
    W = weight(rng, (40, 30))
    one = LowRankUpdate(name="m", A=rng.standard_normal((2, 30)), B=np.zeros((40, 2)), scale=1.0)
    found = intruder_dimensions(one, W, k=4)
    assert_close(found.drift, np.zeros(4), atol=1e-12)
    assert found.count("input") == found.count("output") == 0


def test_w_may_be_narrower_than_k_and_zero(rng):
    one = update(rng, (5, 3), 1.0, rank=2)
    found = intruder_dimensions(one, np.zeros((5, 3)))
    assert len(found.S) == 3
    assert np.isnan(found.drift).all()
    assert found.count("output") == 3  # W has no direction that anything could be like


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"W": np.ones((7, 30))}, IncompatibleError, r"'m' in run updates .*\(40, 30\).*\(7, 30\)"),
        ({"scale": None}, ScaleError, r"'m' in run .*Pass scale="),
        ({"k": 0}, InputError, "k = 0"),
        ({"epsilon": 0.0}, InputError, "epsilon = 0.0"),
        ({"W": np.full((40, 30), np.nan)}, BaseWeightError, "not finite"),
    ],
)
def test_wrong_input_is_refused(rng, change, error, words):
    one = replace(
        low_rank_update(rng, 40, 30, name="m", label="run"), scale=change.get("scale", 1.0)
    )
    W = change.get("W", np.ones((40, 30)))
    others = {key: value for key, value in change.items() if key in ("k", "epsilon")}
    with pytest.raises(error, match=words):
        intruder_dimensions(one, W, **others)


def test_the_svd_of_another_weight_is_refused(rng):
    one = update(rng, (40, 30))
    with pytest.raises(IncompatibleError, match=r"SVD given is of \(30, 30\)"):
        intruder_dimensions(one, np.ones((40, 30)), weight=weight_svd(np.ones((30, 30))))


def test_the_chance_maximum_is_that_of_random_directions(rng):
    for n, d in ((64, 64), (64, 256), (200, 200)):
        one = update(rng, (d, n))
        z = rng.standard_normal((4000, d))
        largest = np.abs(z[:, :n]).max(axis=1) / np.linalg.norm(z, axis=1)
        found = intruder_dimensions(one, weight(rng, (d, n)), k=1)
        assert found.sides["output"].chance_maximum == pytest.approx(np.median(largest), rel=0.02)
