"""ΔW's energy in W's own basis."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
from factories import low_rank_update, orthonormal, planted_update
from reference import assert_close, assert_mean

from lora_analysis import LowRankUpdate
from lora_analysis.adapter import DenseUpdate
from lora_analysis.amplify import weight_basis_energy
from lora_analysis.errors import DegenerateSubspaceError, IncompatibleError
from lora_analysis.spectra import SIDES, weight_svd

SHAPES = [(24, 24), (40, 24), (24, 40)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_share_equals_the_dense_one(rng, shape):
    W, one = rng.standard_normal(shape), low_rank_update(rng, *shape)
    found = weight_basis_energy(one, weight_svd(W))
    sides, off = reference.basis_energy(W, one.delta_weight())
    for side in SIDES:
        own = found.sides[side]
        assert_close(own.share, sides[side], atol=1e-12)
        assert_close(own.leading, np.cumsum(sides[side]), atol=1e-12)
        assert_close(own.trailing[:3], [sides[side][-k:].sum() for k in (1, 2, 3)], atol=1e-12)
        assert own.outside == pytest.approx(1 - sides[side].sum(), abs=1e-12)
    assert_close(found.off_principal, off, atol=1e-12)


def test_long_sums_are_cumulated_in_blocks(rng, monkeypatch):
    W, one = rng.standard_normal((30, 30)), low_rank_update(rng, 30, 30)
    monkeypatch.setattr("lora_analysis.amplify.basis._BLOCK", 7 * 16)
    found = weight_basis_energy(one, weight_svd(W)).off_principal
    assert_close(found, reference.basis_energy(W, one.delta_weight())[1], atol=1e-12)


def test_an_update_along_w_s_third_direction_lies_there_alone(rng):
    U, V = orthonormal(rng, 30, 20), orthonormal(rng, 20, 20)
    W = U * np.linspace(5, 1, 20) @ V.T
    found = weight_basis_energy(planted_update(U[:, 2:3], np.ones(1), V[:, 2:3]), weight_svd(W))
    for side in SIDES:
        assert_close(found.sides[side].leading, np.r_[0, 0, np.ones(18)], atol=1e-12)
        assert_close(found.sides[side].trailing, np.r_[np.zeros(17), np.ones(3)], atol=1e-12)
    assert_close(found.off_principal, np.r_[1, 1, np.zeros(18)], atol=1e-12)


def test_neither_gauge_nor_scale_nor_being_dense_matters(rng):
    svd = weight_svd(rng.standard_normal((24, 20)))
    one = low_rank_update(rng)
    G = rng.standard_normal((4, 4))
    same = [
        replace(one, B=one.B @ G, A=np.linalg.solve(G, one.A)),
        replace(one, scale=-0.3),
        replace(one, scale=None),
        DenseUpdate(name=one.name, delta=one.delta_weight()),
    ]
    expected = weight_basis_energy(one, svd)
    for other in same:
        found = weight_basis_energy(other, svd)
        assert_close(found.off_principal, expected.off_principal, atol=1e-10)
        for side in SIDES:
            assert_close(found.sides[side].share, expected.sides[side].share, atol=1e-10)


@pytest.mark.slow
def test_random_updates_hold_k_of_d_on_average_and_stay_below_the_band(rng):
    svd = weight_svd(rng.standard_normal((48, 32)))
    values = np.array([3.0, 1.0, 0.5])
    k, drawn = 8, {side: [] for side in SIDES}
    p, off = {side: [] for side in SIDES}, []
    for _ in range(1500):
        U, V = (reference.haar_stack(rng, 1, d, 3)[0] for d in (48, 32))
        found = weight_basis_energy(planted_update(U, values, V), svd)
        off.append(found.off_principal[k - 1])
        for side in SIDES:
            drawn[side].append(found.sides[side].leading[k - 1])
            p[side].append(found.p_value(side)[k - 1])
    for side, d in (("input", 32), ("output", 48)):
        assert_mean(np.array(drawn[side]), k / d)
        above = np.mean(np.array(drawn[side]) > found.band(side, 0.95)[k - 1])
        assert above == pytest.approx(0.05, abs=0.02)
        levels = np.array([0.05, 0.2, 0.5])
        shares = (np.array(p[side])[:, None] <= levels).mean(axis=0)
        assert_close(shares, levels, atol=0.04)
    assert_mean(np.array(off), found.chance_off_principal[k - 1])


@pytest.mark.parametrize(
    ("B", "shape", "error", "words"),
    [
        (1.0, (24, 21), IncompatibleError, r"\(24, 20\), the SVD given is of \(24, 21\)"),
        (0.0, (24, 20), DegenerateSubspaceError, "untrained"),
    ],
)
def test_wrong_input_is_refused(rng, B, shape, error, words):
    one = LowRankUpdate(name="m", A=np.eye(2, 20), B=B * np.eye(24, 2), scale=1.0)
    with pytest.raises(error, match=words):
        weight_basis_energy(one, weight_svd(rng.standard_normal(shape)))
