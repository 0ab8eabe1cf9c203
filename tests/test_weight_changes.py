"""Magnitude and direction of W's vectors, before and after."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
from factories import low_rank_update
from reference import assert_close

from lora_analysis import open_base
from lora_analysis.adapter import DenseUpdate
from lora_analysis.errors import IncompatibleError, ScaleError
from lora_analysis.spectra import SIDES
from lora_analysis.weight_changes import magnitude_direction


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_every_vector_changes_as_it_does_dense(rng, size):
    W, one = rng.standard_normal((24, 20)), replace(low_rank_update(rng), scale=size)
    exact = reference.vector_changes(W, one.delta_weight())
    for other in (one, DenseUpdate(name=one.name, delta=one.delta_weight())):
        found = magnitude_direction(other, W)
        for side in SIDES:
            magnitude, direction = exact[side]
            assert_close(found[side].magnitude, magnitude, rtol=1e-9)
            assert_close(found[side].direction, direction, rtol=1e-9, atol=1e-14)
            assert found[side].mean_magnitude == pytest.approx(np.abs(magnitude).mean())
            assert found[side].mean_direction == pytest.approx(direction.mean(), abs=1e-13)
            expected = np.corrcoef(np.abs(magnitude), direction)[0, 1]
            assert found[side].correlation == pytest.approx(expected)


def test_a_tiny_turn_keeps_its_digits():
    W = np.diag([1.0, 2.0])
    delta = np.array([[0.0, 1e-9], [0.0, 0.0]])
    found = magnitude_direction(DenseUpdate(name="m", delta=delta), W)["output"]
    assert_close(found.direction, [0.5e-18, 0.0], rtol=1e-8)
    assert_close(found.magnitude, [0.5e-18, 0.0], rtol=1e-8)


def test_growing_alone_turns_nothing_and_reversing_turns_all(rng):
    W = rng.standard_normal((6, 5))
    grown = magnitude_direction(DenseUpdate(name="m", delta=0.5 * W), W)
    turned = magnitude_direction(DenseUpdate(name="m", delta=-3 * W), W)
    for side, axis in (("output", 1), ("input", 0)):
        lengths = np.linalg.norm(W, axis=axis)
        assert_close(grown[side].magnitude, 0.5 * lengths)
        assert_close(grown[side].direction, np.zeros_like(lengths), atol=1e-15)
        assert np.isnan(grown[side].correlation) or grown[side].mean_direction < 1e-15
        assert_close(turned[side].magnitude, lengths)
        assert_close(turned[side].direction, np.full_like(lengths, 2.0))


def test_a_vector_that_is_zero_has_no_direction(rng):
    W = rng.standard_normal((4, 3))
    W[1] = 0
    found = magnitude_direction(DenseUpdate(name="m", delta=np.ones((4, 3))), W)["output"]
    assert np.isnan(found.direction).tolist() == [False, True, False, False]
    assert found.magnitude[1] == pytest.approx(np.sqrt(3))
    assert np.isfinite(found.mean_direction)


def test_a_weight_read_in_blocks_gives_the_same(rng):
    W, one = rng.standard_normal((24, 20)).astype(np.float32), low_rank_update(rng)
    lazy = open_base({"layers.0.q_proj": W}).weight("layers.0.q_proj")
    for side in SIDES:
        a, b = (magnitude_direction(one, w)[side] for w in (W, lazy))
        assert_close(a.magnitude, b.magnitude)
        assert_close(a.direction, b.direction)


def test_wrong_input_is_refused(rng):
    one = low_rank_update(rng)
    with pytest.raises(IncompatibleError, match=r"\(24, 20\).*\(3, 3\)"):
        magnitude_direction(one, np.ones((3, 3)))
    with pytest.raises(ScaleError, match="Pass scale="):
        magnitude_direction(replace(one, scale=None), np.ones((24, 20)))
