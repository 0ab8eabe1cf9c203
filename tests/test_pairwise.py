"""Every pair at once: the same numbers as pair by pair, whatever ranks and gaps there are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from factories import adapter, low_rank_update, orthonormal
from reference import IDENTITY, assert_close

from lora_analysis.adapter import Adapter, DenseUpdate
from lora_analysis.errors import IncompatibleError, InputError
from lora_analysis.init_evidence import module_init, weaker_half_excess
from lora_analysis.pairwise import module_pairs, pair_angles, pairwise
from lora_analysis.similarity import (
    energy_overlap,
    principal_angles,
    signed_cosine,
    subspace_similarity,
)
from lora_analysis.spectra import SIDES, spectrum
from lora_analysis.studies import pair_products


@pytest.fixture
def updates(rng):
    """Ranks 1 to 6, untrained, rank-deficient, extreme, related, of one module."""
    plain = [low_rank_update(rng, rank=r) for r in (3, 1, 6, 3)]
    untrained = replace(plain[0], B=0 * plain[0].B)
    deficient = replace(plain[2], B=plain[2].B[:, [0, 0, 1, 2, 2, 3]])
    huge, tiny = (replace(plain[1], B=size * plain[3].B[:, :1]) for size in (1e150, 1e-150))
    related = replace(plain[0], A=plain[0].A + 0.1 * plain[3].A)
    return [untrained, *plain, deficient, untrained, huge, tiny, related]


@pytest.mark.parametrize("rows", [1, 4, 1024])
def test_every_pair_has_the_numbers_of_that_pair_alone(monkeypatch, updates, rows):
    monkeypatch.setattr(pair_products, "_ROWS", rows)
    monkeypatch.setattr(pair_products, "_AT_ONCE", 0 if rows < 1024 else 1024)
    spectra = [spectrum(one) for one in updates]
    found = module_pairs(spectra, updates)
    for i, a in enumerate(spectra):
        for j, b in enumerate(spectra):
            if a.untrained or b.untrained:
                assert np.isnan(found.cosine[i, j])
                assert all(np.isnan(found.sides[side].omega[i, j]) for side in SIDES)
                continue
            assert_close(found.cosine[i, j], signed_cosine(a, b), atol=IDENTITY)
            for side in SIDES:
                grid, values = subspace_similarity(a, b, side=side), found.sides[side]
                assert_close(values.phi_1_1[i, j], grid.at(1, 1), atol=IDENTITY)
                assert_close(values.phi_r_r[i, j], grid.values[-1, -1], atol=IDENTITY)
                assert_close(values.excess_r_r[i, j], grid.excess[-1, -1], atol=IDENTITY)
                assert_close(values.omega[i, j], energy_overlap(a, b, side=side), atol=IDENTITY)
                assert (values.chance_r_r[i, j], values.dimension) == (
                    grid.chance[-1, -1],
                    grid.dimension,
                )
            init = module_init(updates[i], updates[j])
            assert found.init.row_cosine[i, j] == pytest.approx(init.row_cosine, abs=1e-12)
            assert found.init.shared[i, j] == init.shared


def test_the_order_of_the_updates_only_permutes_the_numbers(rng, updates):
    order = rng.permutation(len(updates))
    plain = module_pairs([spectrum(one) for one in updates])
    turned = module_pairs([spectrum(updates[at]) for at in order])
    assert plain.init is None
    assert_close(turned.cosine, plain.cosine[np.ix_(order, order)], atol=1e-12)
    for side in SIDES:
        one, two = turned.sides[side].omega, plain.sides[side].omega[np.ix_(order, order)]
        assert_close(one, two, atol=1e-12)


def test_dense_updates_pair_with_low_rank_ones(rng):
    one, two = low_rank_update(rng), low_rank_update(rng)
    dense = DenseUpdate(two.name, two.delta_weight())
    found = module_pairs([spectrum(one), spectrum(dense)], [one, dense])
    assert_close(found.cosine[0, 1], signed_cosine(one, two))
    assert np.isnan(found.init.row_cosine[0, 1])
    assert found.init.shared.tolist() == [[True, False], [False, False]]


def test_updates_of_different_weights_are_refused(rng):
    one, two = low_rank_update(rng, 24, 20), low_rank_update(rng, 20, 24)
    with pytest.raises(IncompatibleError, match=r"'layers\.0\.q_proj' have shapes"):
        module_pairs([spectrum(one), spectrum(two)])


@pytest.mark.parametrize("side", SIDES)
def test_angles_of_every_pair_are_those_of_the_pair_alone(rng, updates, side):
    near = replace(updates[1], A=updates[1].A + 1e-9 * updates[4].A)
    spectra = [spectrum(one) for one in (*updates, near)]
    smallest, largest, weaker, leading = pair_angles(spectra, side)
    for i, a in enumerate(spectra):
        for j, b in enumerate(spectra):
            if a.untrained or b.untrained:
                assert np.isnan(smallest[i, j])
                continue
            ranks = a.numerical_rank, b.numerical_rank
            angles = principal_angles(a, b, side=side, k=ranks)
            expected = [angles[0], angles[-1]]
            assert_close([smallest[i, j], largest[i, j]], expected, rtol=1e-9, atol=1e-14)
            if i != j:
                n = min(ranks)
                first = principal_angles(a, b, side=side, k=(n, n))
                assert_close(leading[i, j], np.mean(np.cos(first) ** 2), rtol=1e-9)
                excess = weaker_half_excess(np.cos(angles), ranks, 20 if side == "input" else 24)
                np.testing.assert_allclose(weaker[i, j], excess, atol=IDENTITY)  # NaN alike


# --- from the factors alone -------------------------------------------------------------------


@pytest.fixture
def conditioned(rng):
    """Well-conditioned updates of several ranks, one with a numerical rank below its own."""
    plain = [low_rank_update(rng, rank=r) for r in (3, 1, 4, 3)]
    graded = replace(plain[2], B=plain[2].B * [1.0, 1e-18, 1.0, 1e-20])
    related = replace(plain[0], A=plain[0].A + 0.1 * plain[3].A)
    near = replace(plain[0], A=plain[0].A + 1e-9 * plain[3].A)
    return [*plain, graded, related, near]


def test_products_of_factors_give_what_vectors_give(conditioned):
    products = pair_products.module_products(conditioned, vectors=False)
    slow = pair_products.module_products(conditioned, vectors=True)
    assert all(s.U is None and s.V is None for s in products.spectra)
    for fast, other in zip(products.spectra, slow.spectra, strict=True):
        assert fast.numerical_rank == other.numerical_rank
        assert_close(fast.S, other.S, rtol=1e-12)
        assert_close(fast.factor_condition, other.factor_condition, rtol=1e-9)
    assert [s.numerical_rank for s in slow.spectra] == [3, 1, 4, 3, 2, 3, 3]
    pairs, expected = (module_pairs(p, conditioned) for p in (products, slow))
    assert_close(pairs.cosine, expected.cosine, atol=1e-12)
    for name in ("row_cosine", "cross_cosine", "z", "other_cosine", "shared"):
        values = (getattr(result.init, name) for result in (pairs, expected))
        np.testing.assert_allclose(*values, rtol=1e-9, atol=1e-12)  # NaN alike
    for side in SIDES:
        for name in ("phi_1_1", "phi_r_r", "omega"):
            values = (getattr(result.sides[side], name) for result in (pairs, expected))
            np.testing.assert_allclose(*values, atol=1e-12)
        angles = pair_angles(products, side, conditioned), pair_angles(slow, side)
        for fast, other in zip(*angles, strict=True):
            np.testing.assert_allclose(fast, other, rtol=1e-9, atol=1e-12)
        some = products.selected([2, 5])
        grid = subspace_similarity(conditioned[2], conditioned[5], side=side).values
        assert_close(some.overlap_grid(0, 1, side), grid, atol=1e-12)
        assert_close(products.overlap_grid(2, 5, side), grid, atol=1e-12)
        assert_close(slow.overlap_grid(2, 5, side), grid, atol=1e-12)


def test_products_that_would_lose_digits_come_from_vectors(rng, updates):
    one, two = low_rank_update(rng, rank=3), low_rank_update(rng, rank=3)
    nearly_dependent = replace(two, B=two.B + 1e5 * two.B[:, :1])
    wide = low_rank_update(rng, rank=30)  # more directions than dimensions
    for group in (updates, [one, nearly_dependent], [one, wide]):
        products = pair_products.module_products(group, vectors=False)
        assert products.factors is None
        assert all(s.U is not None for s in products.spectra)


# --- whole adapters ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_adapters_are_compared_module_by_module(rng, workers):
    adapters = [adapter(rng, rank=r, label=f"a{k}") for k, r in enumerate((2, 4, 3))]
    seen = []
    found = pairwise(adapters, workers=workers, progress=lambda *step: seen.append(step))
    assert found.labels == ("a0", "a1", "a2")
    assert found.modules == tuple(adapters[0])
    assert found.omega.shape == (2, 4, 3, 3)
    assert seen[-1] == ("modules", 4, 4)
    for m, name in enumerate(found.modules):
        one, two = adapters[0][name], adapters[2][name]
        for s, side in enumerate(SIDES):
            assert_close(found.omega[s, m, 0, 2], energy_overlap(one, two, side=side))
        assert_close(found.cosine[m, 0, 2], signed_cosine(one, two))
    deltas = [
        np.concatenate([one[name].delta_weight().ravel() for name in one]) for one in adapters
    ]
    expected = deltas[0] @ deltas[1] / (np.linalg.norm(deltas[0]) * np.linalg.norm(deltas[1]))
    assert_close(found.total_cosine[0, 1], expected)
    assert_close(found.median("omega", "output"), np.median(found.omega[1], axis=0))


def test_missing_untrained_and_other_shaped_modules_are_left_out_and_no_more(rng):
    whole = adapter(rng, modules=3, label="whole")
    names = list(whole)
    part = {name: low_rank_update(rng, name=name) for name in names[:-1]}
    part[names[0]] = replace(part[names[0]], B=0 * part[names[0]].B)
    part[names[1]] = low_rank_update(rng, 10, 20, name=names[1])
    found = pairwise([whole, Adapter(part, label="part")])
    assert np.isnan(found.cosine[:, 0, 1]).tolist() == [True, True, False, False, False, True]
    rest = names[2:-1]
    deltas = [
        np.concatenate([one[name].delta_weight().ravel() for name in rest]) for one in (whole, part)
    ]
    expected = deltas[0] @ deltas[1] / (np.linalg.norm(deltas[0]) * np.linalg.norm(deltas[1]))
    assert_close(found.total_cosine[0, 1], expected)


def test_a_shared_initialization_is_excluded_from_the_input_side_median(rng):
    one = adapter(rng, modules=2, label="one")
    two = adapter(rng, modules=2, label="two")
    names = list(one)
    mixed = {
        name: replace(two[name], A=one[name].A) if name in names[:3] else two[name]
        for name in names
    }
    found = pairwise([one, Adapter(mixed, label="mixed")])
    assert found.shared_init[:, 0, 1].tolist() == [True, True, True, False]
    assert_close(found.median("omega", "input")[0, 1], found.omega[0, 3, 0, 1])
    every = pairwise([one, Adapter({n: mixed[n] for n in names[:3]}, label="same")])
    assert np.isnan(every.median("omega", "input")[0, 1])


def test_modules_are_chosen_by_pattern(rng):
    adapters = [adapter(rng, label=label) for label in "ab"]
    assert pairwise(adapters, modules="v_proj").modules == ("layers.0.v_proj", "layers.1.v_proj")
    with pytest.raises(InputError, match="matches 'k_proj'"):
        pairwise(adapters, modules="k_proj")
    with pytest.raises(InputError, match="at least two adapters, got 1"):
        pairwise(adapters[:1])


def test_large_dense_updates_have_the_values_of_all_singular_vectors(rng, monkeypatch):
    monkeypatch.setattr(pair_products, "_LARGE_DENSE", 64)
    d_out, d_in = 288, 300
    learned = orthonormal(rng, d_out, 3) @ orthonormal(rng, d_in, 3).T
    noise = rng.standard_normal((2, d_out, d_in)).astype(np.float32)
    updates = [
        low_rank_update(rng, d_out, d_in, 4),
        DenseUpdate("m", 0.01 * noise[0] + learned),
        DenseUpdate("m", np.zeros((d_out, d_in), np.float32)),
        DenseUpdate("m", 0.02 * noise[1] - learned),
        low_rank_update(rng, d_out, d_in, 9),
    ]
    whole = pair_products.module_products(updates, vectors=True, all_dense_vectors=True)
    part = pair_products.module_products(updates, vectors=True)
    assert set(part.deltas) == {1, 3}
    expected, partial = (pair_products.module_pairs(p, updates) for p in (whole, part))
    assert_close(partial.cosine, expected.cosine, atol=1e-12)
    assert_close(partial.norms, expected.norms, rtol=1e-12)
    for side in SIDES:
        for name in ("phi_1_1", "phi_r_r", "omega", "chance_r_r", "chance_omega"):
            values = (getattr(pairs.sides[side], name) for pairs in (partial, expected))
            assert_close(*values, atol=1e-10)
        for values in zip(
            pair_products.pair_angles(part, side, updates),
            pair_products.pair_angles(whole, side, updates),
            strict=True,
        ):
            assert_close(*values, atol=1e-6)
    for one, other in zip(part.spectra, whole.spectra, strict=True):
        if not one.untrained:
            assert_close(one.effective_rank, other.effective_rank, rtol=1e-9)
            assert one.energy_rank(0.9) == other.energy_rank(0.9)
    some = pair_products.module_pairs(part.selected([3, 4]), [updates[3], updates[4]])
    assert_close(some.cosine, expected.cosine[3:, 3:], atol=1e-12)
