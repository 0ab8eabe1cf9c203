"""Spectra of updates: planted values, invariances, ranks, and what happens where there are none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
from factories import low_rank_update, orthonormal, planted_update
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOAT32, IDENTITY, ORACLE, assert_close

from lora_analysis.adapter import DenseUpdate, LowRankUpdate
from lora_analysis.errors import DegenerateSubspaceError, InputError
from lora_analysis.spectra import (
    SIDES,
    Spectrum,
    check_side,
    singular_values,
    spectrum,
    stacked_spectra,
)

sizes = st.integers(1, 10)


def planted(rng, values, **options):
    values = np.array(values, dtype=np.float64)
    k = len(values)
    return planted_update(orthonormal(rng, 24, k), values, orthonormal(rng, 20, k), **options)


def regauged(update, G):
    """The same ΔW from other factors: (A, B) → (GA, BG⁻¹)."""
    return replace(update, A=G @ update.A, B=update.B @ np.linalg.inv(G))


# --- values and vectors -----------------------------------------------------------------------


@given(
    d_out=sizes,
    d_in=sizes,
    rank=st.integers(1, 12),
    scale=st.sampled_from([2.0, -0.5, 1e-6]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_spectrum_equals_the_dense_svd_of_the_update(*, d_out, d_in, rank, scale, dtype, seed):
    update = low_rank_update(
        np.random.default_rng(seed), d_out, d_in, rank, scale=scale, dtype=dtype
    )
    found = spectrum(update)
    k = min(rank, d_out, d_in)
    norm = abs(scale) * np.linalg.norm(update.B, 2) * np.linalg.norm(update.A, 2)
    assert (found.U.shape, found.S.shape, found.V.shape) == ((d_out, k), (k,), (d_in, k))
    assert found.shape == (d_out, d_in)
    assert found.rank == rank
    dense = reference.delta(update.A, update.B, scale)
    assert_close(found.S, reference.dense_svd(dense, k)[1], atol=ORACLE * norm)
    assert_close((found.U * found.S) @ found.V.T, dense, atol=IDENTITY * norm)
    assert_close(singular_values(update), found.S, atol=1e-14 * norm)
    assert found.norm == pytest.approx(np.linalg.norm(dense), rel=IDENTITY)


def test_planted_values_and_directions_are_found(rng):
    U, V = orthonormal(rng, 24, 3), orthonormal(rng, 20, 3)
    found = spectrum(planted_update(U, np.array([4.0, 2.0, 1.0]), V, scale=0.5))
    assert_close(found.S, [2, 1, 0.5], rtol=IDENTITY)
    assert_close(np.abs(np.diagonal(found.U.T @ U)), 1, rtol=IDENTITY)
    assert_close(np.abs(np.diagonal(found.V.T @ V)), 1, rtol=IDENTITY)
    assert found.numerical_rank == 3
    assert_close(found.gaps, [0.5, 0.5, 1], rtol=IDENTITY)


def test_the_scale_multiplies_the_values_and_leaves_the_directions(rng):
    update = low_rank_update(rng, scale=2.0)
    one, six = spectrum(update), spectrum(replace(update, scale=6.0))
    assert_close(six.S, 3 * one.S, rtol=IDENTITY)
    np.testing.assert_array_equal(six.V, one.V)
    assert six.numerical_rank == one.numerical_rank
    assert six.effective_rank == pytest.approx(one.effective_rank)


def test_a_negative_scale_turns_one_side_and_keeps_the_sign_convention(rng):
    update = low_rank_update(rng, scale=-3.0)
    found = spectrum(update)
    assert (found.S > 0).all()
    assert_close((found.U * found.S) @ found.V.T, update.delta_weight())
    moved = spectrum(replace(update, B=-update.B, scale=3.0))
    assert_close(found.U, moved.U, atol=IDENTITY)
    assert_close(found.V, moved.V, atol=IDENTITY)


def test_an_unknown_scale_leaves_values_in_its_units(rng):
    update = low_rank_update(rng, scale=None)
    found = spectrum(update)
    assert found.in_units_of_scale
    np.testing.assert_array_equal(found.S, spectrum(replace(update, scale=1.0)).S)
    assert_close(singular_values(update), found.S, rtol=1e-13)
    assert not spectrum(replace(update, scale=1.0)).in_units_of_scale


def test_delta_does_not_depend_on_how_it_is_split_into_factors(rng):
    update = low_rank_update(rng)
    same = regauged(update, rng.standard_normal((4, 4)))
    assert_close(spectrum(same).S, spectrum(update).S, rtol=ORACLE)
    assert_close(spectrum(same).U, spectrum(update).U, atol=ORACLE)
    assert_close(spectrum(same).V, spectrum(update).V, atol=ORACLE)


def test_transposing_the_update_swaps_its_sides(rng):
    update = low_rank_update(rng)
    turned = spectrum(replace(update, A=update.B.T, B=update.A.T))
    found = spectrum(update)
    assert_close(turned.S, found.S, rtol=IDENTITY)
    assert_close(np.abs(turned.U), np.abs(found.V), atol=ORACLE)
    assert_close(np.abs(turned.V), np.abs(found.U), atol=ORACLE)


def test_factor_spectra_are_those_of_one_factor_alone(rng):
    update = low_rank_update(rng)
    a, b = spectrum(update, of="A"), spectrum(update, of="B")
    _, values, right = reference.dense_svd(update.A, 4)
    assert_close(a.S, values, rtol=IDENTITY)
    assert_close(np.abs(np.diagonal(a.V.T @ right)), 1, rtol=IDENTITY)
    left, values, _ = reference.dense_svd(update.B, 4)
    assert_close(b.S, values, rtol=IDENTITY)
    assert_close(np.abs(np.diagonal(b.U.T @ left)), 1, rtol=IDENTITY)
    assert (a.U, b.V) == (None, None)
    assert (a.of, b.of) == ("A", "B")
    assert a.numerical_rank == b.numerical_rank == 4


@pytest.mark.parametrize("shape", [(24, 20, 20), (6, 9, 6), (9, 6, 6), (1, 8, 1), (8, 1, 1)])
def test_a_dense_update_of_the_same_delta_has_the_same_spectrum(rng, shape):
    d_out, d_in, rank = shape
    update = low_rank_update(rng, d_out, d_in, rank)
    dense = spectrum(DenseUpdate(name=update.name, delta=update.delta_weight(), label="full"))
    found = spectrum(update)
    assert dense.numerical_rank == found.numerical_rank
    assert_close(dense.S, found.S, atol=ORACLE * found.S[0])
    assert_close(dense.U, found.U, atol=1e-6)  # the last gaps may be small
    assert_close(dense.V, found.V, atol=1e-6)
    assert_close(
        singular_values(DenseUpdate(name="q", delta=update.delta_weight())), dense.S, rtol=ORACLE
    )


def test_a_dense_update_of_low_rank_is_found_to_be_one(rng):
    update = low_rank_update(rng, rank=3)
    dense = spectrum(DenseUpdate(name="q", delta=update.delta_weight()))
    assert dense.numerical_rank == 3
    assert dense.rank == 20
    assert_close(dense.vectors("input"), spectrum(update).V, atol=ORACLE)


def test_a_spectrum_is_given_back_as_it_is_and_read_only(rng):
    found = spectrum(low_rank_update(rng))
    assert spectrum(found) is found
    for array in (found.U, found.S, found.V, found.basis("input", 2)):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


# --- ranks ------------------------------------------------------------------------------------


def test_equal_values_give_every_measure_of_rank_their_count(rng):
    found = spectrum(planted(rng, [3.0] * 5, scale=1e-200))
    for measure in ("effective_rank", "effective_rank_energy", "stable_rank"):
        assert getattr(found, measure) == pytest.approx(5)
    assert found.participation_ratio == pytest.approx(5)
    assert [found.energy_rank(share) for share in (0.2, 0.21, 0.9, 1.0)] == [1, 2, 5, 5]


def test_ranks_of_a_planted_spectrum_equal_their_formulas(rng):
    values = [4.0, 2.0, 1.0]
    found = spectrum(planted(rng, values, scale=-0.1))
    assert found.effective_rank == pytest.approx(reference.entropy_rank(values))
    assert found.effective_rank_energy == pytest.approx(reference.entropy_rank([16, 4, 1]))
    assert found.stable_rank == pytest.approx(21 / 16)
    assert found.participation_ratio == pytest.approx(21**2 / (256 + 16 + 1))
    assert found.norm == pytest.approx(0.1 * np.sqrt(21))
    # 16/21 = .762, 20/21 = .952
    assert [found.energy_rank(share) for share in (0.76, 0.77, 0.95, 0.96, 1)] == [1, 2, 2, 3, 3]


def test_an_energy_share_that_falls_on_a_step_is_not_lost_to_rounding():
    # 0.55 · 100 is 55.00000000000001.
    flat = Spectrum(
        name="q", U=np.eye(100), S=np.ones(100), V=np.eye(100),
        of="delta", numerical_rank=100, rank=100, shape=(100, 100),
    )  # fmt: skip
    assert [flat.energy_rank(k / 100) for k in range(1, 101)] == list(range(1, 101))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_an_energy_share_outside_zero_to_one_is_refused(rng, share):
    with pytest.raises(InputError, match=r"\(0, 1\]"):
        spectrum(low_rank_update(rng)).energy_rank(share)


@pytest.mark.parametrize("scale", [2.0, 1e-30, -1e30])
def test_the_numerical_rank_counts_independent_directions_whatever_the_scale(rng, scale):
    full = low_rank_update(rng, rank=6, scale=scale)
    B = full.B.copy()
    B[:, 4:] = B[:, :4] @ rng.standard_normal((4, 2))
    assert spectrum(full).numerical_rank == 6
    assert spectrum(replace(full, B=B)).numerical_rank == 4
    assert spectrum(replace(full, B=B), of="B").numerical_rank == 4
    assert spectrum(replace(full, B=B), of="A").numerical_rank == 6


def test_a_product_may_have_a_lower_rank_than_either_factor(rng):
    # B reads three rows of A, of which two are equal.
    A = orthonormal(rng, 20, 4).T
    A[1] = A[0]
    B = np.zeros((24, 4))
    B[:, :3] = orthonormal(rng, 24, 3)
    update = LowRankUpdate(name="q", A=A, B=B, scale=1.0)
    assert spectrum(update).numerical_rank == 2
    assert spectrum(update, of="A").numerical_rank == 3
    assert spectrum(update, of="B").numerical_rank == 3


def test_half_precision_storage_does_not_lower_the_numerical_rank(rng):
    # A cut at eps(bfloat16)·d would exceed one and call every such file untrained.
    update = planted(rng, [1.0, 1e-3, 1e-6, 1e-9])
    assert spectrum(replace(update, stored_dtype="bfloat16")).numerical_rank == 4


def test_a_direction_below_the_arithmetic_error_does_not_count(rng):
    G = orthonormal(rng, 3, 3)  # a rotation hides the grading from the columns
    update = regauged(planted(rng, [1.0, 1e-8, 1e-16]), G)
    assert spectrum(update).numerical_rank == 2


def test_more_rank_than_dimension_ends_at_the_dimension(rng):
    update = low_rank_update(rng, 4, 3, 7)
    found = spectrum(update)
    assert found.numerical_rank == 3
    assert found.rank == 7
    assert_close((found.U * found.S) @ found.V.T, update.delta_weight())
    assert spectrum(update, of="A").V.shape == (3, 3)
    assert spectrum(update, of="B").U.shape == (4, 4)


@pytest.mark.parametrize(("d_out", "d_in"), [(1, 6), (6, 1), (1, 1)])
def test_vectors_are_updates_too(rng, d_out, d_in):
    update = low_rank_update(rng, d_out, d_in, 2)
    found = spectrum(update)
    assert found.numerical_rank == 1
    assert found.S[0] == pytest.approx(np.linalg.norm(update.delta_weight()))
    assert found.effective_rank == pytest.approx(1)


@pytest.mark.parametrize(
    ("size_b", "size_a", "dtype"),
    [
        (1e-160, 1.0, np.float64),
        (1.0, 1e-300, np.float64),
        (1e150, 1e150, np.float64),
        (1e200, 1e-200, np.float64),
        (1e30, 1e30, np.float32),  # a norm taken in single precision would overflow
        (1e-30, 1e-30, np.float32),
        (1e-40, 1.0, np.float32),  # subnormal in single precision
    ],
)
def test_extreme_sizes_neither_overflow_nor_vanish(rng, size_b, size_a, dtype):
    G = low_rank_update(rng)
    update = replace(
        G, A=(G.A * size_a).astype(dtype), B=(G.B * size_b).astype(dtype), stored_dtype=""
    )
    found, plain = spectrum(update), spectrum(G)
    tolerance = 1e-3 if size_b == 1e-40 else FLOAT32 if dtype == np.float32 else IDENTITY
    assert_close(found.S / size_b / size_a, plain.S, rtol=tolerance)
    assert_close(singular_values(update), found.S, rtol=IDENTITY)
    assert found.numerical_rank == 4
    assert found.norm / size_b / size_a == pytest.approx(plain.norm, rel=tolerance)
    for measure in (
        "effective_rank", "effective_rank_energy", "stable_rank", "participation_ratio",
    ):  # fmt: skip
        assert getattr(found, measure) == pytest.approx(getattr(plain, measure), rel=tolerance)
    assert found.energy_rank(0.9) == plain.energy_rank(0.9)


# --- untrained --------------------------------------------------------------------------------


def untrained_updates():
    rng = np.random.default_rng(5)
    update = low_rank_update(rng)
    A, B = update.A.copy(), update.B.copy()
    A[::2], B[:, 1::2] = 0, 0  # both factors are non-zero, their product is not
    rotation = orthonormal(rng, 4, 4)
    return {
        "B = 0": replace(update, B=0 * update.B),
        "A = 0": replace(update, A=0 * update.A),
        "both zero": replace(update, A=0 * update.A, B=0 * update.B),
        "scale 0": replace(update, scale=0.0),
        "orthogonal": replace(update, A=A, B=B),
        "orthogonal, rotated": replace(update, A=rotation @ A, B=B @ rotation.T),
        "orthogonal, tiny": replace(update, A=1e-150 * A, B=1e-150 * B),
        "dense": DenseUpdate(name="layers.0.q_proj", delta=np.zeros((24, 20)), label="adapter"),
    }


@pytest.mark.parametrize("kind", untrained_updates())
def test_an_untrained_update_has_rank_zero_and_no_directions(kind):
    found = spectrum(untrained_updates()[kind])
    assert found.untrained
    assert found.numerical_rank == 0
    assert found.vectors("input").shape == (20, 0)
    assert found.vectors("output").shape == (24, 0)
    assert found.gaps.size == found.degenerate.size == found.nearly_degenerate.size == 0
    assert found.effective_rank == found.effective_rank_energy == found.stable_rank == 0
    assert found.participation_ratio == found.energy_rank(0.9) == 0
    assert found.norm <= 1e-12
    with pytest.raises(DegenerateSubspaceError, match=r"Top-1 input .*'layers.0.q_proj' in adapt"):
        found.basis("input", 1)


def test_a_trained_factor_is_not_untrained_because_the_other_is_zero(rng):
    update = replace(low_rank_update(rng), B=np.zeros((24, 4)))
    assert spectrum(update, of="A").numerical_rank == 4
    assert spectrum(update, of="B").untrained


# --- degenerate directions --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "gap", "degenerate"),
    [
        ("bfloat16", 2.0**-7.5, True),
        ("bfloat16", 2.0**-6.5, False),
        ("float16", 2.0**-10.5, True),
        ("float16", 2.0**-9.5, False),
        ("float32", 2.0**-23.5, True),
        ("float32", 2.0**-22.5, False),
        ("float8_e4m3fn", 0.1, True),
        ("something new", 2.0**-22.5, False),
    ],
)
def test_a_gap_below_the_stored_type_leaves_the_subspace_undefined(rng, dtype, gap, degenerate):
    update = replace(planted(rng, [1.0, 1.0 - gap, 0.3]), stored_dtype=dtype)
    found = spectrum(update)
    assert found.degenerate.tolist() == [degenerate, False, False]
    assert found.nearly_degenerate.tolist() == [gap < 0.05, False, False]
    found.basis("output", 2)
    if degenerate:
        with pytest.raises(DegenerateSubspaceError, match=f"sigma_1 and sigma_2 .*{dtype}"):
            found.basis("output", 1)
    else:
        assert found.basis("output", 1).shape == (24, 1)


def test_equal_values_leave_every_cut_between_them_undefined(rng):
    for rotation in (np.eye(4), orthonormal(rng, 4, 4)):  # equal to a few ulp, not to the bit
        found = spectrum(regauged(planted(rng, [3.0, 1.0, 1.0, 0.5]), rotation))
        assert found.degenerate.tolist() == [False, True, False, False]
    assert spectrum(planted(rng, [2.0, 2.0])).degenerate.tolist() == [True, False]


def test_a_soft_cut_is_drawn_and_not_refused(rng):
    found = spectrum(planted(rng, [1.0, 0.96, 0.9]))
    assert found.nearly_degenerate.tolist() == [True, False, False]
    assert not found.degenerate.any()
    assert found.basis("input", 1).shape == (20, 1)


def test_a_basis_spans_the_leading_directions(rng):
    U, V = orthonormal(rng, 24, 3), orthonormal(rng, 20, 3)
    found = spectrum(planted_update(U, np.array([3.0, 2.0, 1.0]), V))
    for side, planted_basis in (("input", V), ("output", U)):
        basis = found.basis(side, 2)
        assert_close(basis @ basis.T, planted_basis[:, :2] @ planted_basis[:, :2].T, atol=IDENTITY)


# --- errors -----------------------------------------------------------------------------------


def rank_two():
    rng = np.random.default_rng(3)
    return regauged(planted(rng, [1.0, 0.5, 3e-17], label="r8-s0"), orthonormal(rng, 3, 3))


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (
            lambda: spectrum(rank_two()).basis("input", 3),
            DegenerateSubspaceError,
            ["Top-3 input", "'layers.0.q_proj' in r8-s0", "numerical rank is 2", "sigma_3 is",
             "e-17 x sigma_1", "Use k <= 2"],
        ),
        (
            lambda: spectrum(rank_two()).basis("output", 9),
            DegenerateSubspaceError,
            ["Top-9 output", "numerical rank is 2", "Use k <= 2"],
        ),
        (lambda: spectrum(rank_two()).basis("input", 0), InputError, ["k >= 1", "k = 0"]),
        (lambda: spectrum(rank_two(), of="C"), InputError, ["'delta', 'A' or 'B'", "'C'"]),
        (
            lambda: spectrum(spectrum(rank_two()), of="A"),
            InputError,
            ["factor 'delta'", "asked for 'A'"],
        ),
        (
            lambda: spectrum(DenseUpdate(name="q", delta=np.eye(2)), of="B"),
            InputError,
            ["'q' is a dense update", "factor B"],
        ),
        (
            lambda: spectrum(rank_two(), of="A").vectors("output"),
            InputError,
            ["of='A' has no output side", "side='input'"],
        ),
        (
            lambda: spectrum(rank_two(), of="B").vectors("input"),
            InputError,
            ["of='B' has no input side", "side='output'"],
        ),
        (lambda: check_side("left", "delta"), InputError, ["'input' or 'output'", "'left'"]),
        (lambda: check_side("input", "C"), InputError, ["'delta', 'A' or 'B'", "'C'"]),
    ],
)  # fmt: skip
def test_errors_say_what_was_asked_and_what_was_found(ask, error, words):
    with pytest.raises(error) as caught:
        ask()
    for word in words:
        assert word in str(caught.value)


def test_a_spectrum_can_be_built_by_hand():
    found = Spectrum(
        name="q", U=np.eye(3, 1), S=np.array([2.0]), V=np.eye(4, 1),
        of="delta", numerical_rank=1, rank=1, shape=(3, 4),
    )  # fmt: skip
    assert found.norm == 2
    assert found.basis("input", 1).shape == (4, 1)


# --- rounding of the stored type ------------------------------------------------------------


def test_the_resolution_is_its_formula(rng):
    update = low_rank_update(rng, 24, 20, 4)
    kappa = sum(np.linalg.cond(m / np.linalg.norm(m, axis=0)) for m in (update.B, update.A.T))
    for dtype, eps in (("bfloat16", 2.0**-7), ("float16", 2.0**-10), ("float32", 2.0**-23)):
        found = spectrum(replace(update, stored_dtype=dtype))
        assert_close(found.rounding_error, 0.5 * eps * 2 * kappa, rtol=ORACLE)
        assert not found.below_precision


def test_rounding_moves_no_singular_value_by_more_than_the_resolution(rng):
    import torch

    for condition in (1.0, 5.0, 30.0):
        turn = [orthonormal(rng, 4, 4) for _ in range(2)]
        s = np.geomspace(1, 1 / condition, 4)
        B, A = (orthonormal(rng, 64, 4) * s) @ turn[0], turn[1] @ orthonormal(rng, 48, 4).T
        halves = [torch.from_numpy(m).bfloat16().double().numpy() for m in (B, A)]
        exact, stored = (
            LowRankUpdate("m", a, b, 1.0, stored_dtype="bfloat16") for b, a in ((B, A), halves)
        )
        moved = np.max(np.abs(spectrum(stored).S / spectrum(exact).S - 1))
        assert moved <= spectrum(stored).rounding_error


def test_a_rank_above_a_dimension_leaves_what_there_is_resolved(rng):
    # A head of six classes: B has dependent columns.
    update = replace(low_rank_update(rng, 6, 40, 8), stored_dtype="float32")
    found = spectrum(update)
    assert found.numerical_rank == 6
    assert found.rounding_error < 1e-4
    B, A = update.B.astype(np.float32), update.A.astype(np.float32)
    moved = spectrum(replace(update, B=B, A=A)).S / found.S - 1
    assert 0 < np.max(np.abs(moved)) <= found.rounding_error


def test_nearly_dependent_columns_are_not_resolved_by_a_coarse_type(rng):
    update = low_rank_update(rng, 24, 20, 3)
    B = update.B.copy()
    B[:, 1] = B[:, 0] + 1e-4 * B[:, 1]
    coarse = spectrum(replace(update, B=B, stored_dtype="bfloat16"))
    assert coarse.below_precision
    assert not spectrum(replace(update, B=B, stored_dtype="float32")).below_precision


def test_there_is_no_resolution_without_factors_or_without_training(rng):
    update = low_rank_update(rng, 24, 20, 3)
    for one in (DenseUpdate("m", update.delta_weight()), replace(update, B=0 * update.B)):
        assert np.isnan(spectrum(one).rounding_error)
        assert not spectrum(one).below_precision


# --- whole shapes at once ---------------------------------------------------------------------


def devices():
    import torch

    reason = "no CUDA device"
    cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)
    return ["cpu", pytest.param("cuda", marks=cuda)]


def mixed_updates(rng):
    """Updates of several shapes and ranks, among them hard ones, not in order."""
    plain = [low_rank_update(rng, *shape) for shape in ((24, 20, 4), (20, 24, 2), (24, 20, 4))]
    zero = replace(plain[0], B=0 * plain[0].B)
    deficient = replace(plain[0], B=plain[0].B[:, [0, 0, 1, 1]])
    graded = replace(plain[0], B=plain[0].B * np.geomspace(1, 1e-10, 4))
    wide = low_rank_update(rng, 3, 20, 5)
    negative = replace(plain[1], scale=-0.5)
    extreme = replace(plain[2], B=1e200 * plain[2].B, A=1e-190 * plain[2].A)
    dense = DenseUpdate("m", plain[0].delta_weight())
    return [plain[0], wide, zero, plain[1], deficient, dense, graded, negative, extreme, plain[2]]


@pytest.mark.parametrize("device", devices())
def test_stacked_spectra_on_a_device_are_those_of_one_update_each(rng, device):
    updates = mixed_updates(rng)
    for one, found in zip(updates, stacked_spectra(updates, device=device), strict=True):
        expected = spectrum(one)
        n = expected.numerical_rank
        assert (found.numerical_rank, found.name, found.shape) == (n, one.name, one.shape)
        assert_close(found.S[:n], expected.S[:n], rtol=ORACLE)
        for side in SIDES:
            both = found.vectors(side), expected.vectors(side)
            assert_close(both[0], both[1], atol=1e-8)
        if expected.factor_condition < 1e12:
            assert_close(found.rounding_error, expected.rounding_error, rtol=1e-6)


@pytest.mark.parametrize("device", devices())
def test_stacked_spectra_in_single_precision_have_its_error_and_no_more(rng, device):
    updates = mixed_updates(rng)[:5]
    for one, found in zip(
        updates, stacked_spectra(updates, device=device, dtype="float32"), strict=True
    ):
        expected = spectrum(one)
        size = 2 * np.linalg.norm(one.B, 2) * np.linalg.norm(one.A, 2)
        assert found.numerical_rank == expected.numerical_rank
        assert_close(found.S, expected.S, atol=1e-6 * size + 1e-300)


def test_without_a_device_spectra_come_one_by_one(rng):
    updates = mixed_updates(rng)
    for found, one in zip(stacked_spectra(updates), updates, strict=True):
        np.testing.assert_array_equal(found.S, spectrum(one).S)
