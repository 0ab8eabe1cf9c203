"""The nulls of ω, of the signed cosine and of energies in random directions, by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from factories import low_rank_update
from reference import assert_close
from scipy import stats

from lora_analysis import chance
from lora_analysis.chance import overlaps
from lora_analysis.chance.moments import Energies
from lora_analysis.similarity import energy_overlap, signed_cosine


def distance(p_values):
    """sup|F̂(p) − p|: how far a sample of p-values is from uniform."""
    return stats.kstest(p_values, "uniform").statistic


# --- overlaps weighted by energy --------------------------------------------------------------


def isotropic(rng, d_out, d_in, s):
    """An update with given singular values in uniform directions on both sides."""
    U, V = (reference.haar_stack(rng, 1, d, len(s))[0] for d in (d_out, d_in))
    one = low_rank_update(rng, d_out, d_in, len(s))
    return type(one)("m", V.T, U * s, 1.0)


SPECTRA = [([1.0], [1.0]), ([3.0, 1.0], [1.0]), ([1.0] * 4, [2.0, 1.0, 1.0, 0.5]), ([1.0] * 8,) * 2]
HARD = [
    ([1.0] * 2, [1.0]),
    ([3.0, 1.0], [3.0, 1.0]),
    ([5.0] + [1.0] * 7, [5.0] + [1.0] * 7),
    ([10.0] + [1.0] * 15, [1.0]),
    (0.8 ** np.arange(12), 1 / np.arange(1.0, 9)),
]


def participation(s):
    energy = np.square(s)
    return energy.sum() ** 2 / np.sum(energy**2)


def assert_calibrated(p, *, anywhere, below, least=0.0003):
    """The distribution function of p, everywhere and where it matters, and one in a thousand."""
    p = np.sort(p)
    off = np.abs(p - np.arange(1, p.size + 1) / p.size)
    assert off.max() <= anywhere
    assert off[p < 0.3].max() <= below
    assert least <= np.mean(p <= 0.001) <= 0.002


@pytest.mark.slow
@pytest.mark.parametrize(("s", "t"), SPECTRA)
def test_the_null_of_omega_and_of_the_signed_cosine_for_real_updates(rng, s, t):
    pairs = [(isotropic(rng, 32, 24, s), isotropic(rng, 32, 24, t)) for _ in range(500)]
    pr = participation(s), participation(t)
    for side, d in (("input", 24), ("output", 32)):
        omega = np.array([energy_overlap(a, b, side=side) for a, b in pairs])
        reference.assert_mean(omega, chance.energy_overlap_mean(d, pr))
        reference.assert_variance(omega, chance.energy_overlap_variance(d, pr))
        assert distance(chance.energy_overlap_p_value(d, (s, t), omega)) <= 0.08
        drawn = chance.energy_overlap_draws(d, (s, t), 4000, seed=1)
        assert stats.ks_2samp(drawn, omega).pvalue > 1e-3
    cosine = np.array([signed_cosine(a, b) for a, b in pairs])
    reference.assert_variance(cosine, 1 / (32 * 24))
    assert distance(chance.signed_cosine_p_value((32, 24), (s, t), cosine)) <= 0.06
    drawn = chance.signed_cosine_draws((32, 24), (s, t), 4000, seed=1)
    assert stats.ks_2samp(drawn, cosine).pvalue > 1e-3


@pytest.mark.parametrize("dimension", [24, 768])
@pytest.mark.parametrize(("s", "t"), SPECTRA + HARD)
def test_p_values_of_omega_are_calibrated_in_the_tail(dimension, s, t):
    omega = chance.energy_overlap_draws(dimension, (s, t), 30_000, seed=3)
    p = chance.energy_overlap_p_value(dimension, (s, t), omega)
    assert_calibrated(p, anywhere=0.16, below=0.045)
    if len(s) == len(t) == 1:
        assert distance(p) <= 0.01


def test_two_moments_alone_would_call_three_times_too_many_overlaps_significant():
    # What the third moment is for: one direction above a flat rest, against a falling spectrum.
    s, t, d = 1 / np.arange(1.0, 9), np.arange(1.0, 9) ** -0.5, 768
    omega = chance.energy_overlap_draws(d, (s, t), 40_000, seed=3)
    mean = chance.energy_overlap_mean(d, (participation(s), participation(t)))
    variance = chance.energy_overlap_variance(d, (participation(s), participation(t)))
    size = mean * (1 - mean) / variance - 1
    assert np.mean(stats.beta(mean * size, (1 - mean) * size).sf(omega) <= 0.001) > 0.003
    p = chance.energy_overlap_p_value(d, (s, t), omega)
    assert 0.0005 <= np.mean(p <= 0.001) <= 0.0015


def test_the_p_value_of_omega_takes_whole_stacks_of_spectra(rng):
    one, two, omega = rng.random((5, 4)), rng.random((5, 3)), rng.random(5) / 4
    two[2, 2] = 0  # a lower rank, filled up
    p = chance.energy_overlap_p_value(30, (one, two), omega)
    cosine_p = chance.signed_cosine_p_value((30, 20), (one, two), omega)
    bands = chance.energy_overlap_quantile(30, (one, two), 0.9)
    for at in range(5):
        pair = 1e200 * one[at], 1e-200 * two[at][two[at] > 0]
        assert_close(p[at], chance.energy_overlap_p_value(30, pair, omega[at]))
        assert_close(cosine_p[at], chance.signed_cosine_p_value((30, 20), pair, omega[at]))
        assert_close(chance.energy_overlap_p_value(30, pair, bands[at]), 0.1, rtol=1e-8)


def test_nothing_is_significant_where_nothing_varies_and_nan_stays():
    assert chance.energy_overlap_p_value(1, ([2.0], [3.0]), 1.0) == 1
    assert chance.energy_overlap_p_value(4, ([1.0] * 4, [3.0, 1.0]), 0.6) == 1  # all directions
    assert chance.energy_overlap_p_value(9, ([1.0], [1.0]), 1.0) == chance.P_FLOOR
    assert np.isnan(chance.energy_overlap_p_value(9, ([0.0], [1.0]), 0.5))
    assert np.isnan(chance.energy_overlap_p_value(9, ([1.0], [1.0]), np.nan))
    assert chance.signed_cosine_p_value((1, 1), ([1.0], [1.0]), -1.0) == 1
    assert np.isnan(chance.signed_cosine_p_value((1, 1), ([1.0], [1.0]), np.nan))
    assert np.isnan(chance.signed_cosine_p_value((8, 9), ([0.0], [1.0]), 0.5))
    assert np.isnan(chance.signed_cosine_p_value((8, 9), ([1.0], [1.0]), np.nan))


@pytest.mark.parametrize("shape", [(24, 32), (768, 96), (1, 20), (2, 500)])
@pytest.mark.parametrize(
    ("s", "t"), [([1.0], [1.0]), ([3.0, 1.0], [1.0]), HARD[3], ([2.0, 1.0, 0.5], [1.0] * 4)]
)
def test_p_values_of_the_signed_cosine_are_calibrated(shape, s, t):
    s, t = s[: min(shape)], t[: min(shape)]
    cosine = chance.signed_cosine_draws(shape, (s, t), 20_000, seed=5)
    reference.assert_mean(cosine, 0.0)
    reference.assert_variance(cosine, 1 / (shape[0] * shape[1]))
    # Read off a table: one p-value costs more than all that is tested with it.
    levels = np.sort(np.r_[np.linspace(0, 1, 400), 1 - np.geomspace(1, 1e-5, 100)])
    grid = np.quantile(np.abs(cosine), levels)
    table = np.log(chance.signed_cosine_p_value(shape, (s, t), grid))
    p = np.exp(np.interp(np.abs(cosine), grid, table))
    assert_calibrated(p, anywhere=0.06, below=0.015)
    if len(s) == len(t) == 1:
        assert distance(p) <= 0.013


def test_the_signed_cosine_of_one_row_and_column_is_a_beta_tail():
    c = np.array([0.0, 0.1, 0.5, 0.9])
    found = chance.signed_cosine_p_value((1, 12), ([1.0], [1.0]), c)
    exact = stats.beta(0.5, 5.5).sf(c**2)
    assert_close(found, np.maximum(exact, chance.P_FLOOR), atol=1e-12)


# --- energies of a fixed matrix ---------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("values", [np.linspace(1, 0.5, 12), [5.0, 2.0, 1.0, 0.5], [1.0]])
def test_the_null_of_enrichment_on_both_sides_and_on_one(rng, k, values):
    m, n, count = 20, 12, 6000
    W = np.zeros((m, n))
    W[range(len(values)), range(len(values))] = values
    t, u = np.sum(np.square(values)), np.sum(np.power(values, 4))
    U, V = reference.haar_stack(rng, count, m, k), reference.haar_stack(rng, count, n, k)
    both = np.sum((np.swapaxes(U, 1, 2) @ W @ V) ** 2, axis=(1, 2))
    mean = k * k * t / (m * n)
    reference.assert_mean(both, mean)
    variance = chance.projected_energy_variance(t, u, (m, n), k)
    reference.assert_variance(both, variance)
    rows = np.sum((np.swapaxes(U, 1, 2) @ W) ** 2, axis=(1, 2))
    reference.assert_mean(rows, k * t / m)
    one_sided = chance.one_sided_energy_variance(t, u, m, k)
    reference.assert_variance(rows, one_sided)
    columns = np.sum((W @ V) ** 2, axis=(1, 2))
    reference.assert_variance(columns, chance.one_sided_energy_variance(t, u, n, k))
    enrichment = np.sqrt(both / mean)
    p = chance.enrichment_p_value(enrichment, values, (m, n), k)
    assert distance(p) <= (0.03 if len(values) == 12 else 0.14)
    off = np.sort(p) - np.arange(1, count + 1) / count
    assert np.abs(off[np.sort(p) < 0.3]).max() <= 0.035
    one_p = chance.one_sided_energy_p_value(rows / (k * t / m), values, m, k)
    assert distance(one_p) <= 0.075
    assert distance(chance.energy_p_value(both, mean, variance)) <= 0.2
    drawn = chance.enrichment_draws(values, (m, n), k, 4000, seed=2)
    assert stats.ks_2samp(drawn, enrichment).pvalue > 1e-3


WEIGHTS = {
    "flat": np.linspace(1, 0.5, 60),
    "falling": 0.95 ** np.arange(60),
    "one stands out": np.r_[3.0, np.ones(11)],
    "rank 1": np.ones(1),
}


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_p_values_of_enrichment_are_calibrated_in_the_tail(k, weight):
    values = WEIGHTS[weight]
    enrichment = chance.enrichment_draws(values, (80, 60), k, 10_000, seed=4)
    p = chance.enrichment_p_value(enrichment, values, (80, 60), k)
    broad = len(values) == 60
    assert_calibrated(p, anywhere=0.02 if broad else 0.16, below=0.02 if broad else 0.04)


@pytest.mark.parametrize("k", [1, 3, 20, 35])
@pytest.mark.parametrize("s", [[1.0], [3.0, 1.0, 0.5], [1.0] * 6])
def test_p_values_and_bands_of_an_energy_share_hold_what_they_say(k, s):
    d = 40
    norms = [1.0, np.sqrt(participation(s) * k)]  # of ω, by which the draws are scaled
    share = chance.energy_overlap_draws(d, (s, [1.0] * k), 10_000, seed=6)
    share *= norms[1] / participation(s)
    reference.assert_mean(share, k / d)
    p = chance.one_sided_energy_p_value(share / (k / d), s, d, k)
    assert_calibrated(p, anywhere=0.06, below=0.025, least=0.0001)
    low, high = (chance.one_sided_energy_quantile(s, d, k, level) for level in (0.025, 0.975))
    # Near the whole space the band is wide on the safe side.
    assert_close(np.mean(share > high), 0.025, atol=0.005 if 2 * k <= d else 0.008)
    assert np.mean(share > high) <= 0.03
    assert np.mean(share < low) <= 0.03  # wide on the safe side where one direction dominates
    if len(s) == 1:
        exact = stats.beta(k / 2, (d - k) / 2).sf(share[:50])
        assert_close(p[:50], np.maximum(exact, chance.P_FLOOR), atol=1e-9)


SHARES = {
    "rank 1": [1.0],
    "flat": [1.0] * 6,
    "geometric": 0.8 ** np.arange(12),
    "one stands out": [5.0] + [1.0] * 7,
}


@pytest.mark.parametrize("d", [16, 64, 192])
@pytest.mark.parametrize("spectrum", SHARES)
def test_p_values_of_shares_near_the_whole_space_go_through_the_complement(d, spectrum):
    s = SHARES[spectrum]
    for k in (d - 1, d - 2, d - d // 4):
        # The share outside the k directions, by exact draws.
        rest = chance.energy_overlap_draws(d, (s, [1.0] * (d - k)), 10_000, seed=k)
        share = 1 - rest * np.sqrt((d - k) / participation(s))
        reference.assert_mean(share, k / d)
        p = chance.one_sided_energy_p_value(share / (k / d), s, d, k)
        assert np.mean(p <= 0.05) <= 0.06
        assert np.mean(p <= 0.001) <= 0.002
        low, high = (chance.one_sided_energy_quantile(s, d, k, level) for level in (0.025, 0.975))
        assert np.mean(share > high) <= 0.03
        assert np.mean(share < low) <= 0.035
        if spectrum in ("rank 1", "flat"):
            assert distance(p) <= 0.02
        t, u = 1.0, 1 / participation(s)
        variance = chance.one_sided_energy_variance(t, u, d, k)
        two_moments = chance.energy_p_value(share, k / d, variance, total=1.0)
        assert np.mean(two_moments <= 0.001) <= (0.0085 if d == 16 else 0.003)
        if spectrum == "rank 1":
            assert_close(
                two_moments, p, atol=1e-8
            )  # the Beta distribution of its mean and variance


@pytest.mark.parametrize(("rows", "columns"), [(15, 15), (15, 8), (12, 11), (12, 3), (15, 1)])
def test_overlaps_of_nearly_full_flat_spectra_are_measured_from_the_nearer_end(rows, columns):
    d, (s, t) = 16, ([1.0] * rows, [1.0] * columns)
    omega = chance.energy_overlap_draws(d, (s, t), 20_000, seed=1)
    p = chance.energy_overlap_p_value(d, (s, t), omega)
    assert distance(p) <= 0.02
    assert 0.0003 <= np.mean(p <= 0.001) <= 0.002
    # ω of flat spectra is φ·min/√(ranks), which another function knows.
    phi = omega * np.sqrt(rows * columns) / min(rows, columns)
    assert_close(p, chance.similarity_p_value(d, rows, columns, phi), atol=0.01)
    assert_close(chance.energy_overlap_p_value(d, (t, s), omega), p)
    band = chance.energy_overlap_quantile(d, (s, t), [0.1, 0.9])
    assert_close(chance.energy_overlap_p_value(d, (s, t), band), [0.9, 0.1], rtol=1e-8)


def test_a_dominated_update_is_not_significant_against_a_flat_one():
    for d in (16, 64):
        s, t = [5.0] + [1.0] * 7, [1.0] * (d - 1)
        omega = chance.energy_overlap_draws(d, (s, t), 4000, seed=1)
        p = chance.energy_overlap_p_value(d, (s, t), omega)
        assert np.mean(p <= 0.05) <= 0.06
        assert np.mean(p <= 0.001) <= 0.002


def test_p_values_of_all_pairs_are_those_of_each_pair(rng, monkeypatch):
    spectra = rng.random((6, 5)) + 0.1
    spectra[2, 3:] = 0  # a lower rank, filled up
    spectra[4] = 0  # untrained
    omega = rng.random((6, 6)) / 2
    omega = (omega + omega.T) / 2
    omega[0, 1] = omega[1, 0] = np.nan
    for d in (6, 30):  # 6: most spectra are nearly flat over more than half of the space
        monkeypatch.setattr(overlaps, "_PAIRS", 7)  # several blocks
        pairs = np.array(list(np.ndindex(6, 6)))
        a, b = (Energies.of_spectrum(spectra[index]) for index in pairs.T)
        p = chance.energy_overlap_p_values(np.full(36, d), a, b, omega.ravel()).reshape(6, 6)
        np.testing.assert_array_equal(p, p.T)
        for i, j in pairs:
            pair = chance.energy_overlap_p_value(d, (spectra[i], spectra[j]), omega[i, j])
            assert_close(p[i, j], pair)
        assert np.isnan(p[4]).all()
        assert np.isnan(p[0, 1])
    # Pairs of modules of different dimensions at once.
    both = [Energies(np.tile(e.sums, 2), np.tile(e.largest, 2)) for e in (a, b)]
    mixed = chance.energy_overlap_p_values(np.repeat([6, 30], 36), *both, np.tile(omega.ravel(), 2))
    assert_close(mixed[36:], p.ravel())
    assert not np.allclose(mixed[:36], p.ravel(), equal_nan=True)


@pytest.mark.parametrize("d", [64, 768])
@pytest.mark.parametrize(("s", "t"), [([1.0] * 8,) * 2, HARD[2], HARD[4]])
def test_false_discoveries_over_modules_are_as_rare_as_stated(d, s, t):
    omega = chance.energy_overlap_draws(d, (s, t), 24 * 1500, seed=9)
    p = chance.energy_overlap_p_value(d, (s, t), omega).reshape(-1, 24)
    rejected = [chance.benjamini_hochberg(modules).min() <= 0.05 for modules in p]
    assert 0.02 <= np.mean(rejected) <= 0.075  # standard error .006


def test_energies_of_all_directions_do_not_vary():
    assert chance.one_sided_energy_quantile([2.0, 1.0], 8, 8, 0.5) == pytest.approx(1)
    assert chance.one_sided_energy_p_value(1.0, [2.0, 1.0], 8, 8) == 1
    assert chance.enrichment_p_value(1.0, [2.0, 1.0], (2, 2), 2) == 1
    assert chance.energy_p_value(3.0, 3.0, 0.0) == chance.energy_p_value(3.0, 3.0, 0.0, 3.0) == 1
    assert np.isnan(chance.energy_p_value(np.nan, 3.0, 1.0))
    assert np.isnan(chance.one_sided_energy_p_value(np.nan, [2.0, 1.0], 8, 6))


def test_energies_take_every_k_at_once():
    k = np.array([1, 2, 5])
    values, ratio = [3.0, 2.0, 1.0], np.array([0.5, 1.0, 2.0])
    both = chance.enrichment_p_value(ratio, values, (20, 30), k)
    one = chance.one_sided_energy_p_value(ratio, values, 20, k)
    bands = chance.one_sided_energy_quantile(values, 20, k, 0.975)
    for at in range(3):
        assert_close(both[at], chance.enrichment_p_value(ratio[at], values, (20, 30), k[at]))
        assert_close(one[at], chance.one_sided_energy_p_value(ratio[at], values, 20, k[at]))
        assert_close(bands[at], chance.one_sided_energy_quantile(values, 20, k[at], 0.975))
