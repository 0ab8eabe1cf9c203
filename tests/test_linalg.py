"""Array kernels against closed forms, invariances and their slow twins."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from factories import orthonormal
from hypothesis import given
from hypothesis import strategies as st
from reference import IDENTITY, ORACLE, assert_close

from lora_analysis import linalg

sizes = st.integers(1, 12)


def gaussian_factors(rng, d_out, d_in, rank):
    return rng.standard_normal((d_out, rank)), rng.standard_normal((rank, d_in))


# --- the SVD of a product ---------------------------------------------------------------------


@given(d_out=sizes, d_in=sizes, rank=st.integers(1, 14), seed=st.integers(0, 2**32 - 1))
def test_factored_svd_equals_the_dense_svd_for_every_shape(d_out, d_in, rank, seed):
    B, A = gaussian_factors(np.random.default_rng(seed), d_out, d_in, rank)
    svd = linalg.factored_svd(B, A)
    k = min(rank, d_out, d_in)
    norm = np.linalg.norm(B, 2) * np.linalg.norm(A, 2)
    assert (svd.U.shape, svd.S.shape, svd.V.shape) == ((d_out, k), (k,), (d_in, k))
    assert_close(svd.S, reference.dense_svd(B @ A, k)[1], atol=ORACLE * norm)
    assert_close((svd.U * svd.S) @ svd.V.T, B @ A, atol=IDENTITY * norm)
    assert_close(svd.U.T @ svd.U, np.eye(k), atol=IDENTITY)
    assert_close(svd.V.T @ svd.V, np.eye(k), atol=IDENTITY)
    assert (np.diff(svd.S) <= 0).all()
    assert_close([svd.B_norm, svd.A_norm], [np.linalg.norm(m, 2) for m in (B, A)])


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(520, 530, 520), (512, 600, 700)])
def test_a_product_of_more_terms_than_rows_has_the_same_spectrum(rng, d_out, d_in, rank):
    B, A = gaussian_factors(rng, d_out, d_in, rank)
    svd = linalg.factored_svd(B, A)
    slow = linalg.factored._householder_svd(B, A, vectors=False)
    norm = svd.B_norm * svd.A_norm
    assert_close(svd.S, slow.S, atol=ORACLE * norm)
    assert_close(linalg.factored_singular_values(B, A), svd.S, atol=ORACLE * norm)
    assert_close((svd.U * svd.S) @ svd.V.T, B @ A, atol=IDENTITY * norm)
    assert_close(svd[3:], slow[3:], rtol=1e-9)


@pytest.mark.parametrize("vectors", [True, 3, False])
def test_the_svd_of_a_kronecker_product_is_that_of_its_parts(rng, vectors):
    M, N = (gaussian_factors(rng, *shape) for shape in ((4, 5, 3), (6, 7, 2)))
    svd = linalg.kronecker_svd(
        *(linalg.factored_svd(B, A, vectors=bool(vectors)) for B, A in (M, N)), vectors=vectors
    )
    slow = linalg.factored_svd(np.kron(M[0], N[0]), np.kron(M[1], N[1]), vectors=vectors)
    for values, expected in zip(svd, slow, strict=True):
        if expected is None:
            assert values is None
        else:
            assert_close(values, expected, rtol=1e-9, atol=IDENTITY)


def test_factored_svd_finds_planted_directions(rng):
    U, V = orthonormal(rng, 30, 4), orthonormal(rng, 20, 4)
    values = np.array([5.0, 3.0, 2.0, 0.1])
    svd = linalg.factored_svd(U * values, V.T)
    assert_close(svd.S, values, rtol=IDENTITY)
    assert_close(np.abs(np.diagonal(svd.U.T @ U)), 1, atol=IDENTITY)
    assert_close(np.diagonal(svd.U.T @ U), np.diagonal(svd.V.T @ V), atol=IDENTITY)


def test_the_largest_entry_of_each_left_vector_is_positive(rng):
    svd = linalg.factored_svd(*gaussian_factors(rng, 9, 7, 5))
    rows = np.argmax(np.abs(svd.U), axis=0)
    assert (svd.U[rows, np.arange(5)] > 0).all()


def test_the_values_alone_equal_those_that_come_with_vectors(rng):
    B, A = gaussian_factors(rng, 30, 20, 6)
    assert_close(linalg.factored_singular_values(B, A), linalg.factored_svd(B, A).S, rtol=1e-14)


def test_a_stack_gives_what_its_members_give(rng):
    B, A = rng.standard_normal((3, 2, 9, 4)), rng.standard_normal((3, 2, 4, 7))
    B *= 10.0 ** np.arange(-150, 150, 50).reshape(3, 2, 1, 1)
    stack = linalg.factored_svd(B, A)
    values = linalg.factored_singular_values(B, A)
    for index in np.ndindex(3, 2):
        one = linalg.factored_svd(B[index], A[index])
        assert_close(values[index], one.S, rtol=1e-13)
        for stacked, single in zip(stack, one, strict=True):
            assert_close(stacked[index], single, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rank", [4, 16])
def test_the_absolute_error_of_ill_conditioned_factors_keeps_its_bound(rng, rank):
    # Condition 1e8 turned by random rotations: nothing is graded by column.
    grade = np.logspace(0, -8, rank)
    B = (orthonormal(rng, 40, rank) * grade) @ orthonormal(rng, rank, rank).T
    A = (orthonormal(rng, 30, rank) * grade[::-1]) @ orthonormal(rng, rank, rank).T
    exact = reference.exact_singular_values(B, A.T)
    bound = 1e-15 * np.linalg.norm(B, 2) * np.linalg.norm(A, 2)
    assert np.abs(linalg.factored_svd(B, A.T).S - exact).max() <= bound
    dense = reference.dense_svd(B @ A.T, rank)[1]
    assert_close(linalg.factored_svd(B, A.T).S, dense, atol=ORACLE)


@pytest.mark.parametrize("condition", [8, 12, 30])
@pytest.mark.parametrize("order", ["falling", "rising", "mixed", "opposed"])
def test_column_graded_factors_keep_every_value_to_full_relative_accuracy(rng, condition, order):
    rank = 12
    grade = np.logspace(0, -condition, rank)
    B, A = gaussian_factors(rng, 40, 30, rank)
    turned = {"falling": grade, "rising": grade[::-1], "mixed": rng.permutation(grade)}
    if order == "opposed":  # B falls faster than A rises: their product decides
        B, A = B * grade, A / np.sqrt(grade)[:, None]
    else:
        B = B * turned[order]
    exact = reference.exact_singular_values(B, A, digits=120)
    assert_close(linalg.factored_svd(B, A).S, exact, rtol=1e-12)
    assert_close(linalg.factored_singular_values(B, A), exact, rtol=1e-12)


@pytest.mark.parametrize("rising", [False, True])
def test_column_graded_factors_keep_their_directions_too(rng, rising):
    B, A = gaussian_factors(rng, 20, 16, 5)
    grade = np.logspace(0, -12, 5)
    B = B * (grade[::-1] if rising else grade)
    U, _, V = reference.exact_svd(B, A, 5)
    svd = linalg.factored_svd(B, A)
    assert_close(np.abs(svd.U.T @ U), np.eye(5), atol=1e-13)
    assert_close(np.abs(svd.V.T @ V), np.eye(5), atol=1e-13)


def test_large_cores_keep_graded_values_too(rng):
    # Above 25 LAPACK divides and conquers, which promises absolute accuracy only.
    B, A = gaussian_factors(rng, 40, 36, 30)
    B = B * rng.permutation(np.logspace(0, -10, 30))
    exact = reference.exact_singular_values(B, A, digits=50)
    assert_close(linalg.factored_svd(B, A).S, exact, rtol=1e-12)


def test_rank_deficient_factors_leave_values_below_the_arithmetic_error(rng):
    B, A = gaussian_factors(rng, 30, 20, 5)
    B[:, 3:] = B[:, :3] @ rng.standard_normal((3, 2))
    svd = linalg.factored_svd(B, A)
    dense = reference.dense_svd(B @ A, 5)[1]
    assert_close(svd.S, dense, atol=ORACLE)
    assert (svd.S[3:] <= 1e-15 * svd.B_norm * svd.A_norm).all()
    assert_close(svd.U.T @ svd.U, np.eye(5), atol=IDENTITY)


@pytest.mark.parametrize("zero", ["B", "A", "both"])
def test_a_zero_factor_gives_zero_values_and_orthonormal_columns(rng, zero):
    B, A = gaussian_factors(rng, 6, 5, 3)
    svd = linalg.factored_svd(B * (zero == "A"), A * (zero == "B"))
    np.testing.assert_array_equal(svd.S, 0)
    assert_close(svd.U.T @ svd.U, np.eye(3), atol=IDENTITY)


@pytest.mark.parametrize(
    ("power_b", "power_a"), [(-1000, 0), (-500, -500), (500, 500), (900, -900)]
)
def test_extreme_powers_of_two_change_nothing_but_the_size(rng, power_b, power_a):
    B, A = gaussian_factors(rng, 9, 7, 4)
    plain, extreme = (
        linalg.factored_svd(B, A),
        linalg.factored_svd(np.ldexp(B, power_b), np.ldexp(A, power_a)),
    )
    assert_close(extreme.S, np.ldexp(plain.S, power_b + power_a), rtol=1e-13)
    assert_close(extreme.V, plain.V, atol=1e-13)
    assert_close(
        linalg.factored_singular_values(np.ldexp(B, power_b), np.ldexp(A, power_a)),
        np.ldexp(linalg.factored_singular_values(B, A), power_b + power_a),
        rtol=1e-13,
    )


def conditioned(rng, condition, r=6):
    """Factors of rank r, both of one condition that no scaling of columns removes."""
    s = np.geomspace(1, 1 / condition, r)
    turn = [orthonormal(rng, r, r) for _ in range(2)]
    return (orthonormal(rng, 40, r) * s) @ turn[0], turn[1] @ (
        s[:, None] * orthonormal(rng, 30, r).T
    )


@pytest.mark.parametrize("condition", [1.0, 10.0, 90.0, 110.0, 1e4, 9e5, 2e6, 1e8])
def test_every_route_keeps_small_singular_values_and_orthonormal_vectors(rng, condition):
    # One Gram matrix, two, or Householder's QR: which is taken depends on the condition.
    B, A = conditioned(rng, condition)
    exact = reference.exact_singular_values(B, A)
    bound = 1e-11 + 1e-15 * condition
    svd = linalg.factored_svd(B, A)
    assert_close(svd.S, exact, rtol=bound)
    assert_close(linalg.factored_singular_values(B, A), exact, rtol=bound)
    assert_close((svd.U * svd.S) @ svd.V.T, B @ A, atol=1e-14)
    for basis in (svd.U, svd.V):
        assert_close(basis.T @ basis, np.eye(6), atol=1e-11)
    for found, factor in ((svd.B_condition, B), (svd.A_condition, A.T)):
        assert_close(found, np.linalg.cond(factor / np.linalg.norm(factor, axis=0)), rtol=1e-4)


def test_the_condition_leaves_scale_and_zero_columns_out(rng):
    B, A = gaussian_factors(rng, 30, 20, 4)
    plain = linalg.factored_svd(B, A)
    scaled = linalg.factored_svd(B * [1e8, 1.0, 1e-8, 3.0], A)
    assert_close(scaled.B_condition, plain.B_condition, rtol=1e-9)
    zeroed = linalg.factored_svd(B * [1.0, 0.0, 1.0, 1.0], A)
    kept = B[:, [0, 2, 3]]
    expected = np.linalg.cond(kept / np.linalg.norm(kept, axis=0))
    assert_close(zeroed.B_condition, expected, rtol=1e-9)
    assert linalg.factored_svd(B[:2], A).B_condition > 1e15  # four columns of a plane


def test_single_precision_factors_are_computed_in_double(rng):
    B, A = (m.astype(np.float32) for m in gaussian_factors(rng, 30, 20, 4))
    expected = reference.dense_svd(B.astype(np.float64) @ A.astype(np.float64), 4)[1]
    assert_close(linalg.factored_svd(B, A).S, expected, rtol=1e-13)


# --- overlaps of orthonormal bases ------------------------------------------------------------


@given(
    dimension=st.integers(1, 10),
    i=st.integers(1, 10),
    j=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_overlap_grid_equals_the_definition_cell_by_cell(dimension, i, j, seed):
    rng = np.random.default_rng(seed)
    U = orthonormal(rng, dimension, min(i, dimension))
    V = orthonormal(rng, dimension, min(j, dimension))
    grid = linalg.overlap_grid(U.T @ V)
    assert_close(grid, reference.similarity(U, V), atol=IDENTITY)
    assert_close(linalg.overlap_grid(V.T @ U), grid.T, atol=IDENTITY)
    assert (grid >= 0).all()
    assert (grid <= 1).all()
    total = grid * np.minimum.outer(np.arange(1, U.shape[1] + 1), np.arange(1, V.shape[1] + 1))
    assert (np.diff(total, axis=0) >= -IDENTITY).all()
    assert (np.diff(total, axis=1) >= -IDENTITY).all()


def test_overlap_grid_of_planted_subspaces(rng):
    # u₁ is shared, u₂ makes 60° with its partner, u₃ is orthogonal to everything.
    frame = orthonormal(rng, 20, 5)
    U = frame[:, :3]
    V = np.column_stack([frame[:, 0], 0.5 * frame[:, 1] + np.sqrt(0.75) * frame[:, 3], frame[:, 4]])
    expected = [[1, 1, 1], [1, 1.25 / 2, 1.25 / 2], [1, 1.25 / 2, 1.25 / 3]]
    assert_close(linalg.overlap_grid(U.T @ V), expected, atol=IDENTITY)


def test_overlap_grid_never_exceeds_one_for_one_basis_against_itself(rng):
    U = orthonormal(rng, 200, 64)
    grid = linalg.overlap_grid(U.T @ U)
    assert grid.max() <= 1.0
    assert_close(grid, 1, atol=IDENTITY)


# --- principal angles -------------------------------------------------------------------------


def bases_at(rng, angles, dimension):
    """Two orthonormal bases, freely rotated within their spans, with exactly these angles."""
    k = len(angles)
    frame = orthonormal(rng, dimension, 2 * k)
    turned = frame[:, :k] * np.cos(angles) + frame[:, k:] * np.sin(angles)
    return frame[:, :k] @ orthonormal(rng, k, k), turned @ orthonormal(rng, k, k)


@pytest.mark.parametrize(
    "angles",
    [
        [1e-10, 1e-8, 1e-4, 0.3, np.pi / 2 - 1e-9],
        [1e-8, np.pi / 2],  # where a route through cosines alone returns 0 for the first
        [np.pi / 4, np.pi / 4, np.pi / 4],
        [0.0, 0.0, 1.0],
        [np.pi / 2],
    ],
)
def test_planted_principal_angles_are_found_to_the_last_digits(rng, angles):
    U, V = bases_at(rng, np.array(angles), 30)
    found = linalg.principal_angles(U, V)
    assert_close(found, angles, atol=3e-15)
    assert_close(found, reference.exact_principal_angles(U, V), atol=3e-15)


@pytest.mark.parametrize(("i", "j"), [(2, 5), (5, 2), (1, 1), (4, 4), (1, 6), (6, 6)])
def test_principal_angles_equal_multiple_precision_for_unequal_dimensions(rng, i, j):
    U, V = orthonormal(rng, 8, i), orthonormal(rng, 8, j)
    found = linalg.principal_angles(U, V)
    assert found.shape == (min(i, j),)
    assert (np.diff(found) >= 0).all()
    # Where i + j > d the spans must meet; the exact angle of the rounded bases is itself ~1e-16.
    assert_close(found, reference.exact_principal_angles(U, V), atol=3e-15)


def test_similarity_is_one_minus_the_squared_projection_distance_over_p(rng):
    U, V = orthonormal(rng, 15, 3), orthonormal(rng, 15, 4)
    angles = linalg.principal_angles(U, V)
    squared_distance = 3 - np.sum(np.cos(angles) ** 2)
    phi = linalg.overlap_grid(U.T @ V)[-1, -1]
    assert phi == pytest.approx(1 - squared_distance / 3, abs=IDENTITY)
    assert phi == pytest.approx(np.mean(np.cos(angles) ** 2), abs=IDENTITY)


# --- random frames ----------------------------------------------------------------------------


def test_haar_frames_are_orthonormal_and_uniform_in_sign(rng):
    frames = np.array([linalg.haar_frame(rng, 6, 3) for _ in range(4000)])
    assert_close(frames[0].T @ frames[0], np.eye(3), atol=IDENTITY)
    for column in range(3):  # bare LAPACK columns lean to one side in their first rows
        reference.assert_mean(frames[:, column, column], 0.0)
    reference.assert_mean(frames[:, 2, 1] ** 2, 1 / 6)
    reference.assert_mean(frames[:, 0, 0] ** 4, 3 / (6 * 8))
