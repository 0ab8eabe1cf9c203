"""The SVD of a dense matrix: its leading part and the whole, against LAPACK's."""

from __future__ import annotations

from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
from factories import orthonormal
from reference import ORACLE, assert_close
from scipy.linalg import block_diag
from threadpoolctl import threadpool_limits

from lora_analysis import linalg
from lora_analysis.linalg import dense, krylov


@pytest.fixture
def iterate(monkeypatch):
    """Let small matrices take the iteration that is made for large ones."""
    monkeypatch.setattr(dense, "_is_small", lambda *_: False)


def flat(rng, m, n):
    return rng.standard_normal((m, n))


def decaying(rng, m, n):
    k = min(m, n)
    return (orthonormal(rng, m, k) * np.arange(1, k + 1) ** -1.5) @ orthonormal(rng, n, k).T


def outlying(rng, m, n):
    """One value some forty times the others, as trained weights have them."""
    return rng.standard_normal((m, n)) + 100 * np.outer(
        orthonormal(rng, m, 1)[:, 0], orthonormal(rng, n, 1)[:, 0]
    ) * np.sqrt(n)


def deficient(rng, m, n):
    return rng.standard_normal((m, 7)) @ rng.standard_normal((7, n))


KINDS = [flat, decaying, outlying, deficient]
SHAPES = [(200, 150), (150, 200), (160, 160)]


def repeated(rng, m, n):
    k = min(m, n)
    values = np.repeat([3.0, 2.0, 1.0, 0.5], [10, 30, 100, k - 140])
    return (orthonormal(rng, m, k) * values) @ orthonormal(rng, n, k).T


@pytest.mark.parametrize("kind", [flat, decaying, repeated])
def test_leading_vectors_are_accurate_to_a_millionth_over_their_gap(rng, kind):
    k, W = 64, kind(rng, 900, 800).astype(np.float32)
    leading = linalg.leading_svd(W, k)
    u, s, vt = np.linalg.svd(W.astype(np.float64), full_matrices=False)
    assert_close(leading.S, s[:k], rtol=1e-6)
    gaps = np.minimum(np.append(np.inf, s[: k - 1] - s[1:k]), s[:k] - s[1 : k + 1]) / s[:k]
    clear = gaps > 1e-5  # vectors of equal values are arbitrary in their span
    for vectors, exact in ((leading.U, u[:, :k]), (leading.V, vt[:k].T)):
        signs = np.sign(np.sum(vectors * exact, axis=0))
        error = np.linalg.norm(vectors - signs * exact, axis=0)
        assert np.all(error[clear] * gaps[clear] < 1e-6)
        assert_close(vectors.T @ vectors, np.eye(k), atol=1e-10)
    if kind is repeated:  # the spans are determined
        assert_close(np.linalg.norm(leading.U[:, :40].T @ u[:, :40]) ** 2, 40.0, rtol=1e-6)


@pytest.mark.usefixtures("iterate")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_iteration_finds_the_leading_triplets(rng, kind, shape, dtype):
    W = kind(rng, *shape).astype(dtype)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    for k in (1, 5, 20):
        found = linalg.leading_svd(W, k)
        assert found.U.shape, found.V.shape == ((shape[0], k), (shape[1], k))
        assert_close(found.S, exact[:k], rtol=1e-8, atol=1e-12 * exact[0])
        assert_close(
            linalg.leading_singular_values(W, k), exact[:k], rtol=1e-8, atol=1e-12 * exact[0]
        )
        trained = 1e-6 * exact[0] < found.S
        for basis in (found.U[:, trained], found.V[:, trained]):
            assert_close(basis.T @ basis, np.eye(trained.sum()), atol=1e-10)
        residual = W.astype(np.float64) @ found.V - found.U * found.S
        assert_close(residual, 0, atol=1e-4 * exact[0])


@pytest.mark.usefixtures("iterate")
@pytest.mark.parametrize("shape", SHAPES)
def test_leading_values_of_special_matrices(shape):
    few = linalg.leading_singular_values
    np.testing.assert_array_equal(few(np.zeros(shape), 3), 0)
    assert_close(few(np.eye(*shape), 30), 1, rtol=1e-8)
    assert_close(few(np.ones(shape), 2), [np.sqrt(shape[0] * shape[1]), 0], atol=1e-6)
    pair = block_diag(2 * np.eye(2), np.zeros((shape[0] - 2, shape[1] - 2)))
    assert_close(few(pair, 3), [2, 2, 0], atol=1e-6)


@pytest.mark.usefixtures("iterate")
def test_a_value_that_occurs_more_often_than_a_block_is_wide_is_not_missed(rng):
    values = np.concatenate([np.full(40, 3.0), np.linspace(1, 0.1, 110)])
    W = (orthonormal(rng, 150, 150) * values) @ orthonormal(rng, 150, 150).T
    assert_close(linalg.leading_singular_values(W, 45), np.sort(values)[::-1][:45], rtol=1e-8)


@pytest.mark.usefixtures("iterate")
@pytest.mark.parametrize("power", [-900, -100, 100, 900])
def test_extreme_sizes_are_scaled_away(rng, power):
    W = rng.standard_normal((90, 80))
    found = linalg.leading_svd(np.ldexp(W, power), 4)
    assert_close(found.S, np.ldexp(np.linalg.svd(W, compute_uv=False)[:4], power), rtol=1e-8)
    whole = linalg.gram_svd(np.ldexp(W, power))
    assert_close(whole.S, np.ldexp(np.linalg.svd(W, compute_uv=False), power), rtol=1e-9)


@pytest.mark.usefixtures("iterate")
def test_what_does_not_converge_takes_the_full_svd(rng, monkeypatch):
    W = rng.standard_normal((120, 100))
    monkeypatch.setattr(krylov._Krylov, "has_converged", lambda _: False)
    exact = np.linalg.svd(W, compute_uv=False)[:3]
    assert_close(linalg.leading_svd(W, 3).S, exact, rtol=1e-12)
    assert linalg.krylov_svd(linalg.Operator(W.shape, W.dot, (W.T @ W).dot), 3, steps=30) is None


@pytest.mark.usefixtures("iterate")
def test_a_basis_that_fills_up_is_cut_back_and_goes_on(rng, monkeypatch):
    monkeypatch.setattr(krylov, "BASIS", 60)
    W = rng.standard_normal((400, 300))
    exact = np.linalg.svd(W, compute_uv=False)[:6]
    assert_close(linalg.leading_svd(W, 6).S, exact, rtol=1e-8)


def test_small_matrices_take_lapack(rng, monkeypatch):
    monkeypatch.setattr(dense, "krylov_svd", None)
    W = rng.standard_normal((30, 20))
    found, exact = linalg.leading_svd(W, 4), np.linalg.svd(W, full_matrices=False)
    np.testing.assert_array_equal(found.S, exact[1][:4])
    assert_close(linalg.leading_singular_values(W, 4), found.S, rtol=1e-13)


def test_an_operator_is_only_multiplied(rng):
    W, B, A = (
        rng.standard_normal((90, 70)),
        rng.standard_normal((90, 3)),
        rng.standard_normal((3, 70)),
    )

    def both(X):
        return W @ X + B @ (A @ X)

    def normal(X):
        return W.T @ both(X) + A.T @ (B.T @ both(X))

    found = linalg.krylov_svd(linalg.Operator((90, 70), both, normal), 5)
    exact = np.linalg.svd(W + B @ A, compute_uv=False)
    assert_close(found.S[:5], exact[:5], rtol=1e-8)
    assert found.U.shape[0] == 90


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(50, 30), (400, 300)])
@pytest.mark.parametrize("order", "CF")
def test_products_in_the_order_of_memory_are_the_products(rng, monkeypatch, order, shape, threads):
    monkeypatch.setattr(dense, "_TILE", 7 * max(shape))
    W, X = np.asarray(rng.standard_normal(shape), order=order), rng.standard_normal((shape[1], 4))
    operator = dense._operator(W)
    assert_close(operator.apply(X), W @ X)
    with threadpool_limits(threads, user_api="blas"):
        assert_close(operator.normal(X), W.T @ (W @ X), rtol=1e-12, atol=1e-11)


@pytest.fixture(params=[False, True], ids=["whole", "in pieces"])
def in_pieces(request, monkeypatch):
    """Products as on processors without and with AVX-512."""
    if request.param:
        names = {getattr(b, "architecture", "") for b in dense._blas().lib_controllers}
        monkeypatch.setattr(dense, "_WITH_SMALL_KERNELS", names)
    else:
        monkeypatch.setattr(dense, "_WITH_SMALL_KERNELS", set())


@pytest.mark.usefixtures("in_pieces")
def test_neighboring_numbers_alone_are_multiplied_in_pieces(rng):
    W = rng.standard_normal((6, 512))
    for block in (W, W[::2], np.asfortranarray(W), W[:, ::2]):
        X, Y = rng.standard_normal((block.shape[1], 3)), rng.standard_normal((len(block), 3))
        with threadpool_limits(1, user_api="blas"):
            assert_close(linalg.thin_product(block, X), block @ X, atol=1e-12)
            assert_close(linalg.thin_left_product(Y, block), Y.T @ block, atol=1e-12)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("r", [0, 1, 5, dense._FEW, dense._FEW + 1])
@pytest.mark.parametrize(
    ("m", "n"), list(product([0, 1, 40, 400], [1, 127, 128, (dense._GROUP + 1) * dense._DEPTH + 3]))
)
def test_thin_products_are_the_products(rng, m, n, r, dtype):
    block, X, Y = (rng.standard_normal(s).astype(dtype) for s in ((m, n), (n, r), (m, r)))
    wide = block.astype(np.float64)
    bound = 8 * np.finfo(dtype).eps
    several_runs_of_rows = patch.object(dense, "_WORK", 170 * dense._DEPTH)
    with threadpool_limits(1, user_api="blas"), several_runs_of_rows:
        right, left = linalg.thin_product(block, X), linalg.thin_left_product(Y, block)
    assert (right.dtype, left.dtype) == (np.float64, dtype)
    assert_close(right, wide @ X, atol=bound * np.sqrt(n) * 8)
    assert_close(left, Y.T @ wide, atol=bound * np.sqrt(m) * 8)


# --- the whole spectrum -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_svd_by_the_gram_matrix_is_lapacks(rng, kind, shape):
    W = kind(rng, *shape)
    found = linalg.gram_svd(W)
    exact = np.linalg.svd(W, compute_uv=False)
    assert_close(found.S, exact, rtol=ORACLE, atol=1e-13 * exact[0])
    assert (np.diff(found.S) <= 0).all()
    for basis in (found.U, found.V):
        assert_close(basis.T @ basis, np.eye(min(shape)), atol=1e-9)
    assert_close((found.U * found.S) @ found.V.T, W, atol=1e-12 * exact[0])


def test_graded_values_keep_their_digits_beside_a_large_one(rng):
    values = np.geomspace(1, 1e-10, 60)
    W = (orthonormal(rng, 80, 60) * values) @ orthonormal(rng, 60, 60).T
    found = linalg.gram_svd(W)
    assert_close(found.S, values, atol=4e-15)
    for basis in (found.U, found.V):
        assert_close(basis.T @ basis, np.eye(60), atol=1e-9)


def test_the_svd_of_zero_has_orthonormal_sides():
    found = linalg.gram_svd(np.zeros((6, 4)))
    np.testing.assert_array_equal(found.S, 0)
    for basis in (found.U, found.V):
        assert_close(basis.T @ basis, np.eye(4), atol=1e-12)


def test_the_cost_grows_with_the_cube_of_the_smaller_side():
    assert 10 < linalg.gram_seconds((4096, 4096)) < 60
    assert linalg.gram_seconds((8192, 1024)) == linalg.gram_seconds((1024, 8192))


@pytest.mark.slow
def test_large_weights_take_the_iteration_as_they_are(rng):
    for W in (flat(rng, 1200, 1000), decaying(rng, 1000, 1200)):
        exact = np.linalg.svd(W, compute_uv=False)
        for k in (1, 16):
            assert_close(linalg.leading_svd(W.astype(np.float32), k).S, exact[:k], rtol=1e-6)
            assert_close(linalg.leading_svd(W, k).S, exact[:k], rtol=1e-8)
