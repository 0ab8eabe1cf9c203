"""φ, angles, ω and the signed cosine: planted subspaces, invariances, slow twins."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import reference
from factories import low_rank_update, orthonormal, planted_update
from hypothesis import given
from hypothesis import strategies as st
from reference import IDENTITY, ORACLE, assert_close

from lora_analysis import chance
from lora_analysis.adapter import DenseUpdate, LowRankUpdate
from lora_analysis.errors import DegenerateSubspaceError, IncompatibleError, InputError
from lora_analysis.similarity import (
    chordal_distance,
    energy_overlap,
    principal_angles,
    signed_cosine,
    subspace_similarity,
)
from lora_analysis.spectra import SIDES, spectrum

D_OUT, D_IN = 24, 20


def pair(rng, r1=3, r2=5):
    """Two updates of one module that share some of their directions on both sides."""
    one = low_rank_update(rng, D_OUT, D_IN, r1, label="one")
    two = low_rank_update(rng, D_OUT, D_IN, r2, label="two", scale=0.7)
    n = min(r1, r2)
    A, B = two.A.copy(), two.B.copy()
    A[:n] += one.A[:n]
    B[:, :n] += one.B[:, :n]
    return one, replace(two, A=A, B=B)


def regauged(update, rng):
    G = rng.standard_normal((update.rank, update.rank))
    return replace(update, A=G @ update.A, B=update.B @ np.linalg.inv(G))


def turned(update):
    return replace(update, A=update.B.T, B=update.A.T)


def dense_basis(update, side):
    U, _, V = reference.dense_svd(update.delta_weight(), min(update.rank, *update.shape))
    return V if side == "input" else U


# --- φ: closed forms --------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_similarity_of_planted_subspaces_is_known_cell_by_cell(rng, side):
    # First directions at 30°, second ones at 60° in a plane of their own, third ones orthogonal.
    frame, other = orthonormal(rng, 20, 6), orthonormal(rng, 20, 6)
    cosines, sines = np.array([np.sqrt(0.75), 0.5, 0.0]), np.array([0.5, np.sqrt(0.75), 1.0])
    near = frame[:, :3] * cosines + frame[:, 3:] * sines
    values = np.array([5.0, 3.0, 1.0])
    one = planted_update(other[:, :3], values, frame[:, :3])
    two = planted_update(other[:, 3:], values, near)
    if side == "output":
        one, two = turned(one), turned(two)
    found = subspace_similarity(one, two, side=side)
    expected = [[0.75, 0.75, 0.75], [0.75, 0.5, 0.5], [0.75, 0.5, 1 / 3]]
    assert_close(found.values, expected, atol=IDENTITY)
    away = subspace_similarity(one, two, side="output" if side == "input" else "input")
    assert_close(away.values, 0, atol=IDENTITY)


def test_similarity_is_one_where_the_smaller_subspace_lies_inside_the_larger(rng):
    U, V = orthonormal(rng, D_OUT, 4), orthonormal(rng, D_IN, 4)
    large = planted_update(U, np.array([4.0, 3.0, 2.0, 1.0]), V)
    # The strongest direction of the small one is the weakest of the large one.
    small = planted_update(U[:, [3, 0]], np.array([2.0, 1.0]), V[:, [3, 0]])
    found = subspace_similarity(small, large)
    assert_close(found.values, [[0, 0, 0, 1], [1, 0.5, 0.5, 1]], atol=IDENTITY)


def test_an_update_agrees_fully_with_itself_and_not_at_all_with_its_complement(rng):
    update = low_rank_update(rng)
    assert_close(subspace_similarity(update, update).values, 1, atol=IDENTITY)
    null = np.linalg.qr(np.hstack([update.A.T, rng.standard_normal((D_IN, 6))]))[0][:, 4:]
    other = replace(update, A=null[:, :4].T)
    assert_close(subspace_similarity(update, other, side="input").values, 0, atol=IDENTITY)
    assert_close(subspace_similarity(update, other).values[-1, -1], 1, atol=IDENTITY)


# --- φ: slow twin -----------------------------------------------------------------------------


@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    r1=st.integers(1, 6),
    r2=st.integers(1, 6),
    side=st.sampled_from(SIDES),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_similarity_equals_the_definition_on_the_dense_svd(
    *, d_out, d_in, r1, r2, side, dtype, seed
):
    rng = np.random.default_rng(seed)
    one = low_rank_update(rng, d_out, d_in, r1, dtype=dtype)
    two = low_rank_update(rng, d_out, d_in, r2, dtype=dtype)
    found = subspace_similarity(one, two, side=side)
    slow = reference.similarity(dense_basis(one, side), dense_basis(two, side))
    assert_close(found.values, slow, atol=1e-7)  # tiny gaps occur among so many
    assert found.dimension == (d_in if side == "input" else d_out)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["random", "graded", "rank-deficient", "wide"])
def test_similarity_equals_the_oracle_on_hard_factors(rng, side, kind):
    one, two = pair(rng)
    if kind == "graded":  # condition 1e8, falling by the product of both factors
        grade = np.logspace(0, -4, one.rank)
        one = replace(one, A=one.A * grade[:, None], B=one.B * grade)
    if kind == "rank-deficient":
        B = two.B.copy()
        B[:, 3:] = B[:, :3] @ rng.standard_normal((3, 2))
        two = replace(two, B=B)
    if kind == "wide":
        one = low_rank_update(rng, D_OUT, D_IN, 30)
    found = subspace_similarity(one, two, side=side)
    k1, k2 = found.values.shape
    assert (k1, k2) == ({"wide": 20}.get(kind, 3), {"rank-deficient": 3}.get(kind, 5))
    if kind == "graded":
        first = reference.exact_svd(one.B, one.A, k1)[2 if side == "input" else 0]
    else:
        first = dense_basis(one, side)[:, :k1]
    slow = reference.similarity(first, dense_basis(two, side)[:, :k2])
    assert_close(found.values, slow, atol=ORACLE)


def test_factor_similarity_is_that_of_each_factors_own_vectors(rng):
    one, two = pair(rng)
    paper = subspace_similarity(one, two, of="A")
    slow = reference.similarity(reference.dense_svd(one.A, 3)[2], reference.dense_svd(two.A, 5)[2])
    assert_close(paper.values, slow, atol=ORACLE)
    out = subspace_similarity(one, two, of="B", side="output")
    slow = reference.similarity(reference.dense_svd(one.B, 3)[0], reference.dense_svd(two.B, 5)[0])
    assert_close(out.values, slow, atol=ORACLE)
    assert (paper.of, paper.side, out.of, out.side) == ("A", "input", "B", "output")


@pytest.mark.parametrize("side", SIDES)
def test_a_dense_update_is_compared_like_its_factors(rng, side):
    one, two = pair(rng)
    full = DenseUpdate(name=one.name, delta=one.delta_weight())
    for measure in (energy_overlap, lambda a, b, side: subspace_similarity(a, b, side=side).values):
        assert_close(measure(full, two, side=side), measure(one, two, side=side), atol=ORACLE)
    assert signed_cosine(full, two) == pytest.approx(signed_cosine(one, two), abs=ORACLE)


# --- φ: invariances ---------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_similarity_of_delta_is_unchanged_by_another_split_into_factors(rng, side):
    one, two = pair(rng)
    found = subspace_similarity(one, two, side=side).values
    again = subspace_similarity(regauged(one, rng), regauged(two, rng), side=side).values
    assert_close(again, found, atol=ORACLE)


def test_similarity_of_one_factor_depends_on_the_split_except_at_full_rank(rng):
    one, two = pair(rng, 4, 4)
    moved = regauged(one, rng)
    for side, of in (("input", "A"), ("output", "B")):
        before = subspace_similarity(one, two, side=side, of=of)
        after = subspace_similarity(moved, two, side=side, of=of)
        assert abs(after.at(1, 1) - before.at(1, 1)) > 0.01
        assert after.at(4, 4) == pytest.approx(before.at(4, 4), abs=ORACLE)
        assert before.at(4, 4) == pytest.approx(
            subspace_similarity(one, two, side=side).at(4, 4), abs=ORACLE
        )


@pytest.mark.parametrize(("side", "of"), [("input", "A"), ("input", "delta"), ("output", "B")])
def test_swapping_the_updates_transposes_the_grid(rng, side, of):
    one, two = pair(rng)
    there = subspace_similarity(one, two, side=side, of=of)
    back = subspace_similarity(two, one, side=side, of=of)
    assert_close(back.values, there.values.T, atol=1e-14)
    np.testing.assert_array_equal(back.chance, there.chance.T)
    assert there.labels == ("one", "two")
    assert back.labels == ("two", "one")


def test_transposing_both_updates_swaps_the_sides(rng):
    one, two = pair(rng)
    for side, other in (SIDES, SIDES[::-1]):
        assert_close(
            subspace_similarity(turned(one), turned(two), side=side).values,
            subspace_similarity(one, two, side=other).values,
            atol=ORACLE,
        )
    assert energy_overlap(turned(one), turned(two), side="input") == pytest.approx(
        energy_overlap(one, two, side="output")
    )
    assert signed_cosine(turned(one), turned(two)) == pytest.approx(signed_cosine(one, two))


@pytest.mark.parametrize("scale", [1e-150, -4.0, 1e6, None])
def test_the_scale_changes_neither_similarity_nor_overlap(rng, scale):
    one, two = pair(rng)
    scaled = replace(one, scale=scale)
    for side in SIDES:
        assert_close(
            subspace_similarity(scaled, two, side=side).values,
            subspace_similarity(one, two, side=side).values,
            atol=1e-14,
        )
        assert energy_overlap(scaled, two, side=side) == pytest.approx(
            energy_overlap(one, two, side=side), rel=IDENTITY
        )
    sign = -1 if scale == -4.0 else 1
    assert signed_cosine(scaled, two) == pytest.approx(sign * signed_cosine(one, two))


def test_rotating_both_input_spaces_alike_changes_nothing(rng):
    one, two = pair(rng)
    Q = orthonormal(rng, D_IN, D_IN)
    assert_close(
        subspace_similarity(replace(one, A=one.A @ Q), replace(two, A=two.A @ Q)).values,
        subspace_similarity(one, two).values,
        atol=ORACLE,
    )


def test_the_shared_squared_cosines_never_fall_as_either_subspace_grows(rng):
    grid = subspace_similarity(*pair(rng, 6, 8)).values
    total = grid * np.minimum.outer(np.arange(1, 7), np.arange(1, 9))
    assert (np.diff(total, axis=0) >= -1e-14).all()
    assert (np.diff(total, axis=1) >= -1e-14).all()


# --- what a grid carries ----------------------------------------------------------------------


def test_a_grid_carries_its_chance_and_excess(rng):
    found = subspace_similarity(*pair(rng), side="output")
    expected = [[max(i, j) / D_OUT for j in range(1, 6)] for i in range(1, 4)]
    assert_close(found.chance, expected, rtol=IDENTITY)
    assert_close(found.excess, chance.excess(found.values, found.chance))
    assert found.dimension == D_OUT
    assert found.at(2, 5) == found.values[1, 4]
    for array in (found.values, found.chance):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 0


def test_random_updates_agree_as_much_as_chance_says(rng):
    one = spectrum(low_rank_update(rng, 40, 30, 2))
    sample = np.array(
        [
            subspace_similarity(one, low_rank_update(rng, 40, 30, 3), side=side).values[-1, -1]
            - chance.similarity_mean(dimension, 2, 3)
            for _ in range(400)
            for side, dimension in (("input", 30), ("output", 40))
        ]
    )
    reference.assert_mean(sample, 0.0)


def test_a_grid_marks_undefined_and_soft_cuts_of_either_axis(rng):
    V = orthonormal(rng, D_IN, 3)
    U = orthonormal(rng, D_OUT, 3)
    one = planted_update(U, np.array([1.0, 1.0, 0.5]), V)
    two = planted_update(U, np.array([1.0, 0.5, 0.49]), V)
    found = subspace_similarity(one, two)
    marks = [[found.degeneracy(i, j) for j in (1, 2, 3)] for i in (1, 2, 3)]
    assert marks == [
        ["degenerate"] * 3,
        ["", "nearly degenerate", ""],
        ["", "nearly degenerate", ""],
    ]


def test_an_untrained_update_gives_an_empty_grid_and_no_numbers(rng):
    one, two = pair(rng)
    zero = replace(one, B=0 * one.B)
    assert subspace_similarity(zero, two).values.shape == (0, 5)
    assert subspace_similarity(two, zero, side="output").values.shape == (5, 0)
    assert subspace_similarity(zero, zero).excess.shape == (0, 0)
    assert subspace_similarity(zero, two, of="A").values.shape == (3, 5)  # A is what it was
    assert np.isnan(energy_overlap(zero, two))
    assert np.isnan(signed_cosine(two, zero))


def test_a_precomputed_spectrum_gives_the_same_numbers(rng):
    one, two = pair(rng)
    s, t = spectrum(one), spectrum(two)
    np.testing.assert_array_equal(
        subspace_similarity(s, two).values, subspace_similarity(one, t).values
    )
    assert energy_overlap(s, t) == energy_overlap(one, two)
    assert signed_cosine(s, two) == signed_cosine(one, t)
    np.testing.assert_array_equal(
        principal_angles(s, t, side="input", k=2), principal_angles(one, two, side="input", k=2)
    )


# --- angles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("k", [1, 3, (2, 5), (3, 1), np.int64(2)])
def test_principal_angles_equal_multiple_precision_and_give_similarity(rng, side, k):
    one, two = pair(rng)
    i, j = k if isinstance(k, tuple) else (k, k)
    found = principal_angles(one, two, side=side, k=k)
    exact = reference.exact_principal_angles(
        spectrum(one).basis(side, i), spectrum(two).basis(side, j)
    )
    assert_close(found, exact, atol=3e-15)
    phi = subspace_similarity(one, two, side=side).at(i, j)
    assert phi == pytest.approx(np.mean(np.cos(found) ** 2), abs=IDENTITY)


@pytest.mark.parametrize("angle", [1e-10, 1e-6, 0.5, np.pi / 2 - 1e-8])
def test_a_planted_angle_survives_the_spectrum(rng, angle):
    frame, U = orthonormal(rng, D_IN, 3), orthonormal(rng, D_OUT, 2)
    near = np.column_stack([frame[:, 0], np.cos(angle) * frame[:, 1] + np.sin(angle) * frame[:, 2]])
    values = np.array([3.0, 1.0])
    one, two = planted_update(U, values, frame[:, :2]), planted_update(U, values, near)
    found = principal_angles(one, two, side="input", k=2)
    assert_close(found, [0, angle], atol=1e-14)


# --- energy-weighted overlap and signed cosine ------------------------------------------------


def test_the_default_side_is_output_and_input_for_the_vectors_of_a(rng):
    one, two = pair(rng)
    assert subspace_similarity(one, two).side == "output"
    assert subspace_similarity(one, two, of="B").side == "output"
    assert subspace_similarity(one, two, of="A").side == "input"
    assert energy_overlap(one, two) == energy_overlap(one, two, side="output")
    with pytest.raises(InputError, match="A spans input directions only"):
        subspace_similarity(one, two, of="A", side="output")


def test_energy_overlap_of_planted_updates_is_known(rng):
    U, V = orthonormal(rng, D_OUT, 4), orthonormal(rng, D_IN, 4)
    one = planted_update(U[:, :2], np.array([2.0, 1.0]), V[:, :2])
    same = replace(one, scale=-7.0)
    swapped = planted_update(U[:, :2], np.array([2.0, 1.0]), V[:, [1, 0]])
    apart = planted_update(U[:, :2], np.array([2.0, 1.0]), V[:, 2:])
    assert energy_overlap(one, same) == pytest.approx(1)
    assert energy_overlap(one, swapped, side="input") == pytest.approx(8 / 17)  # 2·(4·1)/(16 + 1)
    assert energy_overlap(one, swapped) == pytest.approx(1)
    assert energy_overlap(one, apart, side="input") == pytest.approx(0, abs=IDENTITY)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("condition", [0, 4])
def test_energy_overlap_equals_the_cosine_of_the_dense_products(rng, side, condition):
    one, two = pair(rng)
    one = replace(one, B=one.B * np.logspace(0, -condition, 3))
    slow = reference.energy_overlap(one.delta_weight(), two.delta_weight(), side)
    assert energy_overlap(one, two, side=side) == pytest.approx(slow, abs=ORACLE)
    assert energy_overlap(two, one, side=side) == pytest.approx(slow, abs=ORACLE)
    assert energy_overlap(regauged(one, rng), two, side=side) == pytest.approx(slow, abs=ORACLE)


def test_energy_overlap_has_no_trouble_with_equal_values(rng):
    # Any basis of a degenerate space gives the same number.
    U, V = orthonormal(rng, D_OUT, 3), orthonormal(rng, D_IN, 3)
    one, two = planted_update(U, np.ones(3), V), low_rank_update(rng)
    turn = orthonormal(rng, 3, 3)
    same = planted_update(U @ turn, np.ones(3), V @ turn)
    assert energy_overlap(same, two) == pytest.approx(energy_overlap(one, two), abs=IDENTITY)


def test_signed_cosine_equals_the_dense_cosine(rng):
    one, two = pair(rng)
    slow = reference.cosine(one.delta_weight(), two.delta_weight())
    assert signed_cosine(one, two) == pytest.approx(slow, abs=ORACLE)
    assert signed_cosine(regauged(one, rng), two) == pytest.approx(slow, abs=ORACLE)
    assert signed_cosine(one, one) == pytest.approx(1)
    assert signed_cosine(one, replace(one, B=-one.B)) == pytest.approx(-1)


def test_signed_cosine_of_strangers_has_mean_zero_and_the_variance_of_the_shape(rng):
    one = spectrum(low_rank_update(rng, 8, 6, 2))
    sample = np.array([signed_cosine(one, low_rank_update(rng, 8, 6, 3)) for _ in range(1500)])
    reference.assert_mean(sample, 0.0)
    reference.assert_variance(sample, 1 / 48)


# --- errors -----------------------------------------------------------------------------------


def update_of(d_out, d_in, label, rank=3, name="layers.0.q_proj"):
    rng = np.random.default_rng(d_out)
    return low_rank_update(rng, d_out, d_in, rank, label=label, name=name)


def rank_two_of_four(label):
    A = np.eye(4, D_IN)
    B = np.zeros((D_OUT, 4))
    B[0, 0], B[1, 1] = 2, 1
    return LowRankUpdate(name="layers.3.v_proj", A=A, B=B, scale=1.0, label=label)


WIDE, NARROW = update_of(24, 1024, "r64-s0"), update_of(24, 768, "r8-s0")


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (
            lambda: subspace_similarity(NARROW, WIDE, side="input"),
            IncompatibleError,
            ["input side of 'layers.0.q_proj'", "r8-s0 has 768", "r64-s0 has 1024", "same base"],
        ),
        (
            lambda: energy_overlap(NARROW, WIDE, side="input"),
            IncompatibleError,
            ["input", "768", "1024"],
        ),
        (
            lambda: signed_cosine(update_of(8, 9, "a"), update_of(7, 9, "b")),
            IncompatibleError,
            ["output side", "a has 8", "b has 7"],
        ),
        (
            lambda: principal_angles(NARROW, WIDE, side="input", k=1),
            IncompatibleError,
            ["input side", "768", "1024"],
        ),
        (
            lambda: principal_angles(NARROW, NARROW, side="input", k=4),
            DegenerateSubspaceError,
            ["Top-4 input", "r8-s0", "numerical rank is 3", "Use k <= 3"],
        ),
        (
            lambda: principal_angles(
                rank_two_of_four("one"), rank_two_of_four("two"), side="output", k=(2, 3)
            ),
            DegenerateSubspaceError,
            ["Top-3 output", "'layers.3.v_proj' in two", "numerical rank is 2", "sigma_3 is 0e+00"],
        ),
        (
            lambda: subspace_similarity(rank_two_of_four("one"), NARROW, side="output").at(3, 1),
            DegenerateSubspaceError,
            ["φ(3, 1) of 'layers.3.v_proj'", "one and r8-s0", "(2, 3)"],
        ),
        (
            lambda: subspace_similarity(NARROW, NARROW).at(0, 1),
            DegenerateSubspaceError,
            ["φ(0, 1)"],
        ),
        (
            lambda: subspace_similarity(NARROW, WIDE, of="A", side="output"),
            InputError,
            ["of='A' has no output side"],
        ),
        (lambda: subspace_similarity(NARROW, WIDE, side="left"), InputError, ["side", "'left'"]),
        (
            lambda: energy_overlap(spectrum(NARROW, of="A"), NARROW),
            InputError,
            ["factor 'A'", "asked for 'delta'"],
        ),
    ],
)
def test_errors_say_what_was_asked_and_what_was_found(ask, error, words):
    with pytest.raises(error) as caught:
        ask()
    for word in words:
        assert word in str(caught.value)


def test_updates_of_different_output_width_share_an_input_side(rng):
    one, two = update_of(8, 9, "a"), update_of(7, 9, "b")
    assert subspace_similarity(one, two, side="input").values.shape == (3, 3)
    assert 0 <= energy_overlap(one, two, side="input") <= 1


# --- chordal distance -------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_the_chordal_distance_is_what_similarity_leaves(rng, side):
    one, two = pair(rng)
    for k in (1, 3, (2, 4)):
        i, j = k if isinstance(k, tuple) else (k, k)
        phi = subspace_similarity(one, two, side=side).at(i, j)
        expected = np.sqrt(min(i, j) * (1 - phi))
        assert_close(chordal_distance(one, two, side=side, k=k), expected)


def test_the_chordal_distance_of_nearly_equal_subspaces_keeps_its_digits(rng):
    basis = orthonormal(rng, D_IN, 3)
    tilted = basis[:, :2].copy()
    tilted[:, 1] = np.cos(1e-10) * basis[:, 1] + np.sin(1e-10) * basis[:, 2]
    U = orthonormal(rng, D_OUT, 2)
    one, two = (planted_update(U, np.array([2.0, 1.0]), V) for V in (basis[:, :2], tilted))
    assert_close(chordal_distance(one, two, side="input", k=2), 1e-10, rtol=1e-5)


@pytest.mark.parametrize(("i", "j"), [(2, 5), (5, 2), (12, 11)])
def test_angles_of_near_duplicates_beside_right_angles_are_exact(rng, i, j):
    # A shared direction, one 1e-10 off, the rest at right angles; where i + j > d, some met again.
    frame = orthonormal(rng, D_IN, D_IN)
    V = frame[:, :i]
    W = frame[:, np.r_[0, 1, i + 1 : D_IN, 2:i][:j]]
    W[:, 1] = np.cos(1e-10) * frame[:, 1] + np.sin(1e-10) * frame[:, i]
    U = orthonormal(rng, D_OUT, 20)
    one, two = (
        planted_update(U[:, : b.shape[1]], np.linspace(5, 1, b.shape[1]), b) for b in (V, W)
    )
    found = principal_angles(one, two, side="input", k=(i, j))
    bases = [spectrum(u).basis("input", k) for u, k in ((one, i), (two, j))]
    # Products of orthonormal columns round by d·u per entry, so by d·u·√(ij) in norm at most; the
    # angles' singular values move by no more, twice: by their product's rounding and their SVD's.
    bound = 2 * D_IN * 2.0**-53 * np.sqrt(i * j)
    assert_close(found, reference.exact_principal_angles(*bases), atol=bound)
    assert found[0] <= bound
    assert np.abs(found - 1e-10).min() < 2 * bound  # the bases were computed too


# --- extreme norms, and what is only paid for if asked ----------------------------------------


@pytest.mark.parametrize(("up", "down"), [(1e200, 1e-200), (1e-200, 1e-200), (1e200, 1e200)])
def test_norms_near_the_ends_of_the_number_range_change_nothing(rng, up, down):
    one, two = pair(rng)
    far = (
        replace(one, B=one.B * np.sqrt(up), A=one.A * np.sqrt(up)),
        replace(two, B=two.B * down),
    )
    for side in SIDES:
        assert_close(energy_overlap(*far, side=side), energy_overlap(one, two, side=side))
        assert_close(
            subspace_similarity(*far, side=side).values,
            subspace_similarity(one, two, side=side).values,
            atol=IDENTITY,
        )
        assert_close(
            chordal_distance(*far, side=side, k=2), chordal_distance(one, two, side=side, k=2)
        )
    assert_close(signed_cosine(*far), signed_cosine(one, two))
    assert_close(signed_cosine(far[0], far[0]), 1)


def test_a_comparison_loads_scipy_only_where_p_values_are_asked_for():
    code = (
        "import sys, numpy as np\n"
        "from lora_analysis.similarity import random_similarity\n"
        "grid = random_similarity(20, (2, 3)); grid.excess\n"
        "assert 'scipy' not in sys.modules\n"
        "grid.p_value\n"
        "assert 'scipy.special' in sys.modules and 'scipy.stats' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
