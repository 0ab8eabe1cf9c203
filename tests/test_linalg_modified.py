"""The leading SVD of a diagonal matrix plus one of low rank."""

from __future__ import annotations

import numpy as np
import pytest
from factories import orthonormal
from reference import assert_close

from lora_analysis.linalg import modified
from lora_analysis.linalg.modified import modified_svd

N, RANK, K = 900, 4, 6
SPECTRA = {
    "flat": np.sort(np.abs(np.random.default_rng(0).standard_normal(N)))[::-1] + 5.0,
    "falling": 1.0 / np.arange(1, N + 1),
    "deficient": np.r_[np.linspace(3, 1, 20), np.zeros(N - 20)],
    "tied": np.r_[np.full(3, 2.0), np.linspace(1.9, 0.1, N - 3)],
}


def problem(rng, values, size, m):
    P = orthonormal(rng, m, RANK) * np.linspace(1, 0.3, RANK) * size
    return P, orthonormal(rng, len(values), RANK)


def formed(values, P, Q):
    dense = P @ Q.T
    dense[np.arange(len(values)), np.arange(len(values))] += values
    return dense


@pytest.fixture
def _no_way_out(monkeypatch):
    """Fail where the whole matrix is decomposed after all: then nothing else was tested."""

    def refuse(*_):
        pytest.fail("no certificate was found")

    monkeypatch.setattr(modified, "_dense_svd", refuse)


@pytest.mark.usefixtures("_no_way_out")
@pytest.mark.parametrize("start", ["projected", "counted"])
@pytest.mark.parametrize("size", [1e-4, 0.3, 40.0])
@pytest.mark.parametrize("kind", sorted(SPECTRA))
def test_the_leading_triplets_are_those_of_the_dense_matrix(monkeypatch, rng, kind, size, start):
    m = N + RANK  # four rows that the diagonal does not have
    if start == "counted":  # the other is tried first, and may fail
        monkeypatch.setattr(modified, "_STARTS", (start,))
    values = SPECTRA[kind]
    P, Q = problem(rng, values, size * values[0], m)
    dense = formed(values, P, Q)
    found = modified_svd(values, P, Q, K)
    assert_close(found.S, np.linalg.svd(dense, compute_uv=False)[:K], rtol=1e-12)
    scale = found.S[0]
    assert_close(dense @ found.V, found.U * found.S, atol=1e-12 * scale)
    assert_close(dense.T @ found.U, found.V * found.S, atol=1e-11 * scale)
    for vectors in (found.U, found.V):
        assert_close(vectors.T @ vectors, np.eye(K), atol=1e-10)


@pytest.mark.usefixtures("_no_way_out")
def test_a_direction_far_down_the_diagonal_is_not_missed(rng):
    # What grows above all others has no part in the leading entries of the diagonal.
    values = SPECTRA["flat"]
    P, Q = np.zeros((N, 1)), np.zeros((N, 1))
    P[700], Q[700] = 100.0, 1.0
    found = modified_svd(values, P, Q, K)
    assert_close(found.S, np.r_[100 + values[700], values[: K - 1]])
    assert abs(found.U[700, 0]) == pytest.approx(1)


def test_hundreds_of_equal_values_are_any_directions_of_theirs(rng):
    values = np.ones(N)
    P, Q = problem(rng, values, 0.1, N)
    found, dense = modified_svd(values, P, Q, K), formed(values, P, Q)
    assert_close(found.S, np.linalg.svd(dense, compute_uv=False)[:K], rtol=1e-12)
    assert_close(dense.T @ found.U, found.V * found.S, atol=1e-11)


def test_what_has_no_certificate_is_decomposed_whole(rng, monkeypatch):
    values = SPECTRA["flat"]
    P, Q = problem(rng, values, 2.0, N)
    exact = np.linalg.svd(formed(values, P, Q), compute_uv=False)
    monkeypatch.setattr(modified, "_STARTS", ("counted",))
    monkeypatch.setattr(modified._Modified, "_bisect", lambda _, count: np.full(count, 1e-3))
    monkeypatch.setattr(modified, "_REFINEMENTS", 3)  # near the wrong end, and too few
    assert_close(modified_svd(values, P, Q, K).S, exact[:K], rtol=1e-9)


@pytest.mark.parametrize("n", [1, 5, 30])
def test_small_matrices_take_the_dense_way(rng, n):
    values = np.linspace(2, 1, n)
    P, Q = rng.standard_normal((n + 2, 3)), rng.standard_normal((n, 3))
    found = modified_svd(values, P, Q, n)
    assert_close(found.U * found.S @ found.V.T, formed(values, P, Q), atol=1e-12)


def test_zero_plus_zero_is_zero():
    found = modified_svd(np.zeros(N), np.zeros((N, 1)), np.zeros((N, 1)), 3)
    assert_close(found.S, np.zeros(3), atol=0.0, rtol=0.0)


def test_counts_above_a_number_are_exact(rng):
    values = SPECTRA["falling"]
    P, Q = problem(rng, values, 0.5, N)
    exact = np.linalg.svd(formed(values, P, Q), compute_uv=False) ** 2
    counted = modified._problem(values, P, Q)
    for shift in (1e-5, 1e-3, 0.02, 0.3, 2.0):
        assert counted.count_above(shift) == int(np.sum(exact > shift))


def test_the_certificate_refuses_other_pairs_and_inexact_ones(rng):
    values = SPECTRA["falling"]
    P, Q = problem(rng, values, 0.5, N)
    V, S = np.linalg.svd(formed(values, P, Q))[2].T, np.linalg.svd(formed(values, P, Q))[1]
    counted = modified._problem(values, P, Q)
    assert counted.are_leading(V[:, :K], S[:K] ** 2)
    assert not counted.are_leading(V[:, 1 : K + 1], S[1 : K + 1] ** 2)  # the first one is missing
    assert not counted.are_leading(V[:, : K - 1], np.r_[S[: K - 2], S[K]] ** 2)
    assert not counted.are_leading(V[:, :K] + 1e-6, S[:K] ** 2)
