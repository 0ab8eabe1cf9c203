"""Noise of equal norm: as large as what it stands for, and without anything of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from factories import low_rank_update
from training_bases import write_tiny_base

from lora_analysis import DenseUpdate, read_adapter, read_fine_tune, write_adapter
from lora_analysis.adapter import Adapter
from lora_analysis.chance import similarity_mean
from lora_analysis.edit import noise_of_equal_norm
from lora_analysis.similarity import signed_cosine, subspace_similarity
from lora_analysis.spectra import singular_values


def tuned(rng: np.random.Generator) -> Adapter:
    """Dense updates with a planted direction ten times larger than the rest, and a low-rank one."""
    updates: dict[str, DenseUpdate | object] = {}
    for at, shape in enumerate([(60, 90), (90, 60), (80, 80)]):
        planted = 10 * np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1]))
        updates[f"layers.{at}"] = DenseUpdate(f"layers.{at}", planted + rng.standard_normal(shape))
    return Adapter(updates, label="tuned")  # type: ignore[arg-type]


def norm(delta: np.ndarray) -> float:
    return float(np.linalg.norm(delta))


def test_the_noise_has_the_norm_of_each_update_and_nothing_of_it(
    rng: np.random.Generator,
) -> None:
    adapter = tuned(rng)
    noise = noise_of_equal_norm(adapter, seed=3)
    assert noise.label == "tuned (noise)"
    assert "a control" in noise.provenance.findings[-1].text
    for name, update in adapter.items():
        own = noise[name].delta_weight()
        assert own.shape == update.shape
        assert norm(own) == pytest.approx(norm(update.delta_weight()), rel=1e-6)
        # The cosine of independent matrices is normal with variance 1/(d_out·d_in).
        assert abs(signed_cosine(noise[name], update)) < 5 / np.sqrt(own.size)


def test_the_spectrum_of_dense_noise_is_that_of_a_gaussian_matrix(
    rng: np.random.Generator,
) -> None:
    adapter = tuned(rng)
    for name, update in noise_of_equal_norm(adapter).items():
        m, n = update.shape
        sigma = norm(update.delta_weight()) / np.sqrt(m * n)
        S = singular_values(update)
        assert S[0] == pytest.approx(sigma * (np.sqrt(m) + np.sqrt(n)), rel=0.1)
        # E tr(GGᵀ)² = mn(m + n + 1), and E tr(GGᵀ) = mn.
        assert (S**4).sum() / (S**2).sum() ** 2 == pytest.approx((m + n + 1) / (m * n), rel=0.05)
        assert S[0] < singular_values(adapter[name])[0] / 3  # the planted direction is gone


def test_noise_of_two_seeds_agrees_as_chance_says(rng: np.random.Generator) -> None:
    adapter = tuned(rng)
    one, two = (noise_of_equal_norm(adapter, seed=seed) for seed in (0, 1))
    values = [
        subspace_similarity(one[name], two[name], side="input").values[7, 7] for name in adapter
    ]
    chance = [float(similarity_mean(adapter[name].shape[1], 8, 8)) for name in adapter]
    assert np.mean(values) == pytest.approx(np.mean(chance), abs=0.05)
    again = noise_of_equal_norm(Adapter({"layers.1": adapter["layers.1"]}, label="alone"), seed=1)
    assert (again["layers.1"].delta_weight() == two["layers.1"].delta_weight()).all()


@pytest.mark.parametrize("scale", [2.0, -0.5, None])
def test_low_rank_noise_keeps_rank_and_norm_and_can_be_written(
    scale: float | None, rng: np.random.Generator, tmp_path: Path
) -> None:
    update = low_rank_update(rng, name="layers.0.q_proj", rank=3, scale=scale)
    noise = noise_of_equal_norm(Adapter({update.name: update}, label="lora"))
    own = noise[update.name]
    assert own.rank == 3
    assert own.scale == scale  # type: ignore[union-attr]
    sizes = [np.linalg.norm(singular_values(one)) for one in (own, update)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)
    if scale is not None:
        assert norm(own.delta_weight()) == pytest.approx(norm(update.delta_weight()), rel=1e-6)
        again = read_adapter(write_adapter(noise, tmp_path / "noise"))
        np.testing.assert_allclose(
            again[update.name].delta_weight(), own.delta_weight(), rtol=1e-5, atol=1e-7
        )


def test_an_update_that_is_zero_stays_zero() -> None:
    zero = DenseUpdate("q", np.zeros((3, 4)))
    assert not noise_of_equal_norm(Adapter({"q": zero}, label="zero"))["q"].delta_weight().any()


def test_a_full_fine_tune_has_its_noise(tmp_path: Path) -> None:
    one, other = (write_tiny_base(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    change = read_fine_tune(other, one)
    noise = noise_of_equal_norm(change)
    assert list(noise) == list(change)
    assert noise.provenance.base_model == change.provenance.base_model
    for name, update in change.items():
        assert noise[name].layout == update.layout
        assert norm(noise[name].delta_weight()) == pytest.approx(
            norm(update.delta_weight()), rel=1e-6
        )
