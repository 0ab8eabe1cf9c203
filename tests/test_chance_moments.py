"""Moments of random energies by zonal polynomials, and the distribution that is given three."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close
from scipy import stats

from lora_analysis import chance
from lora_analysis.chance.moments import (
    energy_sums,
    matched_cdf,
    matched_p_value,
    matched_quantile,
    overlap_moments,
    projected_moments,
)

spectra = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12)


def raw(distribution):
    return np.array([distribution.moment(order) for order in (1, 2, 3)])


def assert_moments(sample, expected):
    for order in (1, 2, 3):
        reference.assert_mean(sample**order, expected[order - 1])


@pytest.mark.parametrize(
    ("d", "s", "t"), [(2, [2, 1], [3]), (3, [3, 2, 1], [2, 1]), (7, [2, 1], [1] * 5)]
)
def test_moments_of_a_rotated_trace_equal_a_simulation(rng, d, s, t):
    s, t = np.array(s, dtype=float), np.array(t, dtype=float)
    gram = reference.haar_stack(rng, 40_000, d, len(t))[:, : len(s)]
    trace = np.einsum("a,nab,b->n", s**2, gram**2, t**2) / (np.sum(s**2) * np.sum(t**2))
    assert_moments(trace, overlap_moments(d, energy_sums(s), energy_sums(t)))


@pytest.mark.parametrize(("m", "n", "k"), [(2, 3, 1), (6, 5, 1), (6, 5, 3), (1, 4, 1), (4, 4, 4)])
def test_moments_of_a_projected_weight_equal_a_simulation(rng, m, n, k):
    values = np.array([3.0, 2.0, 1.0, 0.5])[: min(m, n)]
    U, V = (reference.haar_stack(rng, 40_000, d, k)[:, : len(values)] for d in (m, n))
    energy = np.sum((np.swapaxes(U * values[:, None], 1, 2) @ V) ** 2, axis=(1, 2))
    found = projected_moments((m, n), energy_sums(values), k)
    if k == m == n:
        assert_close(found, 1)
    else:
        assert_moments(energy / np.sum(values**2), found)


@given(s=spectra, t=spectra, extra=st.integers(0, 40))
def test_second_moments_equal_the_variances_found_another_way(s, t, extra):
    d = max(len(s), len(t)) + extra
    one, two = energy_sums(s), energy_sums(t)
    mean, second, _ = overlap_moments(d, one, two)
    pr = 1 / one[1], 1 / two[1]
    scale = np.sqrt(pr[0] * pr[1])  # from shares of energy to ω
    variance = chance.energy_overlap_variance(d, pr)
    assert_close((second - mean**2) * scale**2, variance, atol=1e-13)
    assert_close(mean * scale, chance.energy_overlap_mean(d, pr))
    k = 1 + extra % d
    mean, second, _ = projected_moments((d, d + 3), one, k)
    variance = chance.projected_energy_variance(1.0, float(one[1]), (d, d + 3), k)
    assert_close(second - mean**2, variance, atol=1e-13)


@given(
    d=st.integers(16, 5000),
    s=spectra,
    t=spectra,
    level=st.floats(0.001, 0.999),
    k=st.integers(1, 16),
)
def test_three_moments_always_make_a_distribution(d, s, t, level, k):
    one, two = energy_sums(s), energy_sums(t)
    for moments in (overlap_moments(d, one, two), projected_moments((d, 2 * d), one, k)):
        value = matched_quantile(moments, level)
        assert value >= 0
        if moments[1] > moments[0] ** 2 * (1 + 1e-12) and value > 1e-100:
            assert_close(matched_cdf(moments, value), level, rtol=1e-5)
            assert_close(matched_p_value(moments, value), 1 - level, rtol=1e-5)


@pytest.mark.parametrize(
    "distribution",
    [
        stats.beta(0.5, 3.0),
        stats.beta(30.0, 200.0, scale=1e-3),
        stats.gamma(2.5, scale=7.0),
        stats.betaprime(1.5, 9.0, scale=0.2),
    ],
)
def test_beta_gamma_and_beta_prime_are_given_back_by_their_moments(distribution):
    x = distribution.ppf([0.01, 0.3, 0.9, 0.999])
    moments = raw(distribution)
    assert_close(matched_p_value(moments, x), distribution.sf(x), rtol=1e-6)
    assert_close(matched_cdf(moments, x), distribution.cdf(x), rtol=1e-6)
    assert_close(matched_quantile(moments, [0.01, 0.3, 0.9, 0.999]), x, rtol=1e-6)


def test_a_matched_distribution_that_does_not_vary_or_is_not_known():
    constant = np.array([0.5, 0.25, 0.125])
    assert matched_p_value(constant, 0.5) == matched_cdf(constant, 0.5) == 1
    assert matched_quantile(constant, 0.9) == 0.5
    assert np.isnan(matched_p_value(np.full(3, np.nan), 0.5))
    assert matched_p_value(raw(stats.beta(1, 2)), [-1.0, 2.0]).tolist() == [1, 0]


def test_energy_sums_know_no_scale_and_ignore_what_fills_up():
    plain = energy_sums([3.0, 1.0])
    assert_close(plain, [1, (81 + 1) / 100, (729 + 1) / 1000])
    for scale in (1e-200, 1e200):
        assert_close(energy_sums([3 * scale, scale, 0.0]), plain)
    assert np.isnan(energy_sums([0.0, 0.0])).all()
    assert energy_sums(np.ones((4, 2))).shape == (3, 4)
