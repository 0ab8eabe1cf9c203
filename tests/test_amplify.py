"""Amplification: W that shares ΔW's directions, invariances, and dense formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
from factories import low_rank_update, orthonormal, planted_update
from hypothesis import given
from hypothesis import strategies as st
from reference import IDENTITY, ORACLE, assert_close
from threadpoolctl import threadpool_limits

from lora_analysis.adapter import DenseUpdate
from lora_analysis.amplify import amplification, amplifications, measure, streaming
from lora_analysis.bases import Weight, open_base
from lora_analysis.errors import (
    BaseWeightError,
    DegenerateSubspaceError,
    IncompatibleError,
    InputError,
    ScaleError,
)
from lora_analysis.spectra import spectrum

D_OUT, D_IN = 24, 20


def streamed(W, *, rows=5, columns=7, transposed=False):
    """W as a base gives it: float32 tiles in one buffer that is overwritten at every step."""
    stored = np.asarray(W.T if transposed else W, dtype=np.float32)

    def tiles():
        buffer = np.empty(rows * columns, dtype=np.float32)
        for top in range(0, stored.shape[0], rows):
            for left in range(0, stored.shape[1], columns):
                part = stored[top : top + rows, left : left + columns]
                tile = buffer[: part.size].reshape(part.shape)
                tile[...] = part
                bottom, right = top + part.shape[0], left + part.shape[1]
                yield slice(top, bottom), slice(left, right), tile
        buffer[:] = np.nan

    return Weight("q.weight", W.shape, "float32", transposed, tiles)


# --- closed forms -----------------------------------------------------------------------------


def test_a_weight_that_shares_the_directions_gives_ratios_of_singular_values(rng):
    # The update's first direction is the weight's third, as the paper found: amplified, not copied.
    U, V = orthonormal(rng, D_OUT, 3), orthonormal(rng, D_IN, 3)
    W = (U * np.array([12.0, 4.0, 3.0])) @ V.T
    update = planted_update(U[:, [2, 1]], np.array([6.0, 2.5]), V[:, [2, 1]])
    found = amplification(update, W)
    assert_close(found.projected, [3, 5], rtol=IDENTITY)
    assert_close(found.weight_top, [12, np.sqrt(160)], rtol=IDENTITY)
    assert_close(found.amplification_factor, [2, 6.5 / 5], rtol=IDENTITY)
    assert_close(np.abs(found.core), np.diag([3, 4]), atol=IDENTITY)
    assert_close(found.S, [6, 2.5], rtol=IDENTITY)
    assert found.weight_norm == pytest.approx(13)
    assert found.relative_norm == pytest.approx(6.5 / 13)
    rms = 13 * np.array([1, 2]) / np.sqrt(D_OUT * D_IN)
    assert_close(found.random.rms, rms, rtol=IDENTITY)
    assert_close(found.enrichment, [3, 5] / rms, rtol=IDENTITY)
    assert_close(found.chance_factor, [6, 6.5] / rms, rtol=IDENTITY)
    np.testing.assert_array_equal(found.k, [1, 2])


def test_the_factor_is_the_chance_factor_over_the_enrichment(rng):
    found = amplification(low_rank_update(rng), rng.standard_normal((D_OUT, D_IN)))
    assert_close(found.amplification_factor * found.enrichment, found.chance_factor)


def test_the_update_itself_as_weight_is_amplified_once(rng):
    update = low_rank_update(rng)
    found = amplification(update, update.delta_weight())
    assert_close(found.amplification_factor, 1, rtol=IDENTITY)
    assert_close(found.projected, found.weight_top, rtol=IDENTITY)
    assert found.relative_norm == pytest.approx(1)


def test_a_weight_without_these_directions_gives_an_infinite_factor_and_no_enrichment(rng):
    update = planted_update(np.eye(D_OUT, 2), np.array([2.0, 1.0]), np.eye(D_IN, 2))
    W = np.zeros((D_OUT, D_IN))
    W[5:, 5:] = rng.standard_normal((D_OUT - 5, D_IN - 5))
    found = amplification(update, W)
    assert np.isposinf(found.amplification_factor).all()
    np.testing.assert_array_equal(found.enrichment, 0)
    nothing = amplification(update, np.zeros((D_OUT, D_IN)))
    assert nothing.weight_norm == 0
    assert nothing.relative_norm == np.inf
    assert np.isnan(nothing.enrichment).all()


# --- slow twin --------------------------------------------------------------------------------


@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    rank=st.integers(1, 6),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_amplification_equals_the_dense_formulas(d_out, d_in, rank, dtype, seed):
    rng = np.random.default_rng(seed)
    update = low_rank_update(rng, d_out, d_in, rank)
    W = rng.standard_normal((d_out, d_in)).astype(dtype)
    found = amplification(update, W, draws=1)
    n = min(rank, d_out, d_in)
    U, S, V = reference.dense_svd(update.delta_weight(), n)
    projected = reference.projected_norms(U, W.astype(np.float64), V)
    assert_close(found.projected, projected, atol=1e-7)
    assert_close(
        found.amplification_factor, [np.linalg.norm(S[:k]) for k in found.k] / found.projected
    )
    top = reference.dense_svd(W, n)[1]
    assert_close(found.weight_top, [np.linalg.norm(top[:k]) for k in found.k])
    assert found.weight_norm == pytest.approx(np.linalg.norm(W.astype(np.float64)))


@pytest.mark.parametrize("kind", ["random", "graded", "rank-deficient"])
def test_amplification_equals_the_oracle_on_hard_factors(rng, kind):
    update = low_rank_update(rng, rank=5)
    if kind == "graded":
        grade = np.logspace(0, -4, 5)
        update = replace(update, A=update.A * grade[:, None], B=update.B * grade)
    if kind == "rank-deficient":
        B = update.B.copy()
        B[:, 3:] = B[:, :3] @ rng.standard_normal((3, 2))
        update = replace(update, B=B)
    W = rng.standard_normal((D_OUT, D_IN))
    found = amplification(update, W)
    n = 3 if kind == "rank-deficient" else 5
    assert len(found.k) == n
    U, _, V = reference.exact_svd(update.B, update.A, n)
    assert_close(found.projected, reference.projected_norms(U, W, V), atol=ORACLE)
    assert_close(np.abs(found.core), np.abs(U.T @ W @ V), atol=ORACLE)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_in_tiles_gives_what_the_whole_array_gives(rng, transposed):
    update = low_rank_update(rng)
    W = rng.standard_normal((D_OUT, D_IN)).astype(np.float32)
    whole, tiled = (
        amplification(update, W),
        amplification(update, streamed(W, transposed=transposed)),
    )
    based = amplification(update, open_base({"q": W}).weight("q"))
    for found in (tiled, based):
        assert_close(found.core, whole.core, rtol=IDENTITY)
        assert_close(found.weight_top, whole.weight_top, rtol=IDENTITY)
        assert_close(found.random.mean, whole.random.mean, rtol=IDENTITY)
        assert found.weight_norm == pytest.approx(whole.weight_norm, rel=IDENTITY)


def test_a_large_array_is_taken_in_row_blocks(rng, monkeypatch):
    update, W = low_rank_update(rng), rng.standard_normal((D_OUT, D_IN))
    whole = amplification(update, W)
    for elements in (1, 3 * D_IN, 7 * D_IN):
        monkeypatch.setattr(streaming, "_TILE", elements)
        assert_close(amplification(update, W).core, whole.core, rtol=IDENTITY)


def test_a_dense_update_is_amplified_like_its_factors(rng):
    update, W = low_rank_update(rng), rng.standard_normal((D_OUT, D_IN))
    dense = amplification(DenseUpdate(name="q", delta=update.delta_weight()), W)
    assert_close(
        dense.amplification_factor, amplification(update, W).amplification_factor, rtol=ORACLE
    )


# --- invariances ------------------------------------------------------------------------------


def test_the_factor_grows_with_the_scale_and_the_enrichment_does_not(rng):
    update, W = low_rank_update(rng, scale=1.0), rng.standard_normal((D_OUT, D_IN))
    one, three = amplification(update, W), amplification(replace(update, scale=-3.0), W)
    assert_close(three.amplification_factor, 3 * one.amplification_factor)
    assert_close(three.chance_factor, 3 * one.chance_factor)
    assert_close(three.enrichment, one.enrichment)
    assert three.relative_norm == pytest.approx(3 * one.relative_norm)
    twice = amplification(update, 2 * W)
    assert_close(twice.amplification_factor, one.amplification_factor / 2)
    assert_close(twice.enrichment, one.enrichment)


def test_another_split_into_factors_changes_nothing(rng):
    update, W = low_rank_update(rng), rng.standard_normal((D_OUT, D_IN))
    G = rng.standard_normal((4, 4))
    same = replace(update, A=G @ update.A, B=update.B @ np.linalg.inv(G))
    assert_close(
        amplification(same, W).enrichment, amplification(update, W).enrichment, rtol=ORACLE
    )


def test_turning_both_spaces_of_update_and_weight_changes_nothing(rng):
    update, W = low_rank_update(rng), rng.standard_normal((D_OUT, D_IN))
    P, Q = orthonormal(rng, D_OUT, D_OUT), orthonormal(rng, D_IN, D_IN)
    turned = amplification(replace(update, A=update.A @ Q, B=P @ update.B), P @ W @ Q)
    found = amplification(update, W)
    assert_close(turned.projected, found.projected, rtol=ORACLE)
    assert_close(turned.weight_top, found.weight_top, rtol=ORACLE)


def test_transposing_update_and_weight_changes_nothing(rng):
    update, W = low_rank_update(rng), rng.standard_normal((D_OUT, D_IN))
    turned = amplification(replace(update, A=update.B.T, B=update.A.T), W.T)
    assert_close(turned.projected, amplification(update, W).projected, rtol=ORACLE)


def test_projections_grow_with_k_and_stay_below_the_weights_own(rng):
    found = amplification(low_rank_update(rng, rank=8), rng.standard_normal((D_OUT, D_IN)))
    assert (np.diff(found.projected) > 0).all()
    assert (found.projected <= found.weight_top).all()


# --- random directions ------------------------------------------------------------------------


def test_random_directions_have_the_exact_root_mean_square(rng):
    update = low_rank_update(rng, 12, 9, 3)
    W = rng.standard_normal((12, 9)) * np.linspace(3, 0.1, 9)
    found = amplification(update, W, draws=4000).random
    # Over many draws mean² + spread² is the mean square; its error follows from the spread.
    square = found.mean**2 + found.spread**2
    error = 2 * found.mean * found.spread / np.sqrt(4000)
    assert (np.abs(square - found.rms**2) <= reference.STANDARD_ERRORS * error).all()
    assert (found.mean < found.rms).all()


def test_the_mean_lies_below_the_root_mean_square_as_derived_for_a_flat_weight(rng):
    # 0.80 of it for one direction, 0.95 for two, 0.99 for four.
    update = low_rank_update(rng, 64, 64, 4)
    found = amplification(update, np.eye(64), draws=2000).random
    ratio = (found.mean / found.rms)[[0, 1, 3]]
    assert_close(ratio, [0.80, 0.95, 0.99], atol=0.04)


def test_random_directions_follow_the_seed_and_may_be_left_out(rng):
    update, W = low_rank_update(rng), rng.standard_normal((D_OUT, D_IN))
    one, again = (amplification(update, W, seed=3).random for _ in range(2))
    np.testing.assert_array_equal(one.mean, again.mean)
    assert one.draws == 16
    assert (amplification(update, W, seed=4).random.mean != one.mean).all()
    none = amplification(update, W, draws=0).random
    assert np.isnan(none.mean).all()
    assert np.isnan(none.spread).all()
    np.testing.assert_array_equal(none.rms, one.rms)


# --- choices ----------------------------------------------------------------------------------


def test_fewer_directions_are_the_leading_entries_of_all(rng):
    update, W = low_rank_update(rng), rng.standard_normal((D_OUT, D_IN))
    full, two = amplification(update, W), amplification(update, W, k=2)
    assert two.core.shape == (2, 2)
    for field in ("S", "projected", "amplification_factor", "enrichment", "chance_factor"):
        assert_close(getattr(two, field), getattr(full, field)[:2], rtol=IDENTITY)
    assert_close(two.weight_top, full.weight_top[:2], rtol=IDENTITY)
    assert two.relative_norm == full.relative_norm


def test_the_weights_own_directions_may_be_given_or_left_out(rng):
    update, W = low_rank_update(rng), rng.standard_normal((D_OUT, D_IN))
    values = np.linalg.svd(W, compute_uv=False)
    given_values = amplification(update, W, weight_values=values, weight_directions=False)
    assert_close(given_values.weight_top, amplification(update, W).weight_top, rtol=IDENTITY)
    assert amplification(update, W, weight_directions=False).weight_top is None


def test_a_precomputed_spectrum_gives_the_same_numbers(rng):
    update, W = low_rank_update(rng), rng.standard_normal((D_OUT, D_IN))
    np.testing.assert_array_equal(
        amplification(spectrum(update), W).core, amplification(update, W).core
    )


# --- errors -----------------------------------------------------------------------------------

UPDATE = low_rank_update(np.random.default_rng(1), label="r8-s0")
W = np.ones((D_OUT, D_IN))


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (
            lambda: amplification(UPDATE, W.T),
            IncompatibleError,
            ["'layers.0.q_proj' in r8-s0", "(24, 20)", "(20, 24)", "transposed"],
        ),
        (
            lambda: amplification(UPDATE, streamed(W[:4])),
            IncompatibleError,
            ["'q.weight' is (4, 20)"],
        ),
        (
            lambda: amplification(replace(UPDATE, scale=None), W),
            ScaleError,
            ["'layers.0.q_proj' in r8-s0", "scale", "alpha="],
        ),
        (
            lambda: amplification(replace(UPDATE, B=0 * UPDATE.B), W),
            DegenerateSubspaceError,
            ["'layers.0.q_proj' in r8-s0 is untrained"],
        ),
        (
            lambda: amplification(UPDATE, W, k=5),
            DegenerateSubspaceError,
            ["Top-5 input", "numerical rank is 4", "Use k <= 4"],
        ),
        (lambda: amplification(UPDATE, W, k=0), InputError, ["k >= 1", "k = 0"]),
        (
            lambda: amplification(spectrum(UPDATE, of="A"), W),
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


def test_a_weight_with_non_finite_values_is_refused_by_name(rng: np.random.Generator) -> None:
    W = rng.standard_normal((24, 20))
    W[3, 4] = np.nan
    with pytest.raises(BaseWeightError, match=r"'layers\.0\.q_proj' holds values that are not"):
        amplification(low_rank_update(rng), W)


def test_too_few_known_singular_values_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match="at least 4 values, found 2"):
        amplification(
            low_rank_update(rng), rng.standard_normal((24, 20)), weight_values=np.array([2.0, 1.0])
        )


# --- several updates, one side alone, half precision ------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_several_updates_in_one_pass_have_the_numbers_of_each_alone(rng, transposed):
    updates = [low_rank_update(rng, rank=r) for r in (3, 5, 1)]
    W = rng.standard_normal((D_OUT, D_IN)).astype(np.float32)
    weight = streamed(W, transposed=transposed)
    found = amplifications([updates[0], spectrum(updates[1]), updates[2]], weight, one_sided=True)
    for one, update in zip(found, updates, strict=True):
        alone = amplification(update, W, one_sided=True, draws=0)
        for name in ("core", "projected", "amplification_factor", "weight_top", "enrichment",
                     "input_enrichment", "output_enrichment"):  # fmt: skip
            assert_close(getattr(one, name), getattr(alone, name), rtol=ORACLE, atol=1e-12)
        assert one.random.norms.shape == (16, update.rank)
    assert amplifications([], W) == []


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (9, 1), (1, 9)])
def test_one_sided_enrichments_are_their_formulas(rng, shape):
    update, W = low_rank_update(rng, *shape, rank=3), rng.standard_normal(shape)
    found = amplification(update, W, one_sided=True)
    s, norm = spectrum(update), np.linalg.norm(W)
    for k in found.k:
        U, V = s.U[:, :k], s.V[:, :k]
        expected = np.linalg.norm(U.T @ W) / (norm * np.sqrt(k / shape[0]))
        assert_close(found.output_enrichment[k - 1], expected, rtol=ORACLE)
        expected = np.linalg.norm(W @ V) / (norm * np.sqrt(k / shape[1]))
        assert_close(found.input_enrichment[k - 1], expected, rtol=ORACLE)
    assert amplification(update, W).output_enrichment is None


@pytest.mark.slow
def test_one_sided_enrichments_have_a_mean_square_of_one(rng):
    W = rng.standard_normal((12, 10)) * np.linspace(3, 0.1, 10)
    squares = []
    for _ in range(2000):
        U, V = orthonormal(rng, 12, 2), orthonormal(rng, 10, 2)
        turn = np.where(rng.random(2) < 0.5, -1, 1)
        update = planted_update(U * turn, np.array([2.0, 1.0]), V)
        found = amplification(update, W, draws=0, weight_directions=False, one_sided=True)
        squares.append([found.input_enrichment[1] ** 2, found.output_enrichment[1] ** 2])
    for column in np.array(squares).T:
        reference.assert_mean(column, 1.0)


def test_the_p_value_counts_the_draws_at_least_as_large(rng):
    update, W = low_rank_update(rng), rng.standard_normal((D_OUT, D_IN))
    found = amplification(update, W, draws=99)
    expected = [
        (np.sum(found.random.norms[:, k] >= found.projected[k]) + 1) / 100 for k in range(4)
    ]
    assert_close(found.p_value, expected)
    assert_close(amplification(update, update.delta_weight(), draws=99).p_value, 0.01)
    assert np.isnan(amplification(update, W, draws=0).p_value).all()


@pytest.fixture
def half(monkeypatch):
    """Let small half-precision weights take the way of large ones."""
    monkeypatch.setattr(streaming, "_SMALL", 0)


def halved(W, **tiles):
    """A weight as bfloat16 holds it, in tiles, and its exact values."""
    bits = W.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    exact = bits.view(np.float32)
    return replace(streamed(exact, **tiles), stored_dtype="bfloat16"), exact


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("kind", ["flat", "outliers", "shared"])
def test_half_precision_weights_keep_six_digits_in_single_precision(rng, kind):
    shape = (300, 200)
    update = low_rank_update(rng, *shape, rank=4)
    W = rng.standard_normal(shape)
    if kind == "outliers":
        W[rng.integers(0, 300, 20), rng.integers(0, 200, 20)] = 500
    if kind == "shared":
        W += 0.2 * update.delta_weight()
    weight, exact = halved(W)
    found = amplification(update, weight, one_sided=True)
    expected = amplification(update, exact.astype(np.float64), one_sided=True)
    assert (found.precision, expected.precision) == ("float32", "float64")
    assert_close(found.weight_norm, expected.weight_norm, rtol=1e-7)
    for name in ("projected", "enrichment", "input_enrichment", "output_enrichment"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6)


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_projections_are_the_dense_products(rng, threads, transposed):
    weight, exact = halved(
        rng.standard_normal((100, 300)), rows=30, columns=300, transposed=transposed
    )
    exact = exact.astype(np.float64)
    U, V = rng.standard_normal((100, 5)), np.asfortranarray(rng.standard_normal((300, 5)))
    images, core = exact @ V, U.T @ exact @ V
    for precision, rtol in (("float32", 1e-6), ("float64", 1e-12)):
        with threadpool_limits(threads, user_api="blas"):
            (found,), norm, _ = streaming.project(
                weight, [(U, V)], precision=precision, one_sided=True
            )
        np.testing.assert_allclose(found.core, core, rtol=0, atol=rtol * np.linalg.norm(core))
        assert_close(found.input_squares, np.sum(images**2, axis=0), rtol=rtol)
        assert_close(found.output_squares, np.sum((U.T @ exact) ** 2, axis=1), rtol=rtol)
        assert_close(norm, np.linalg.norm(exact), rtol=rtol)


@pytest.mark.usefixtures("half")
def test_directions_that_the_weight_lacks_are_taken_in_double_precision(rng):
    update = low_rank_update(rng, 300, 200, rank=3)
    s = spectrum(update)
    W = rng.standard_normal((300, 200))
    W -= s.U @ (s.U.T @ W @ s.V) @ s.V.T  # nothing is left but the rounding of the stored type
    weight, exact = halved(W)
    other = low_rank_update(rng, 300, 200, rank=3)
    found, plain = amplifications([update, other], weight)
    assert (found.precision, plain.precision) == ("float64", "float32")
    expected = amplification(update, exact.astype(np.float64))
    assert_close(found.projected, expected.projected, rtol=ORACLE)


def test_precision_follows_the_stored_type_and_the_size(rng):
    small = rng.standard_normal((8, 8)).astype(np.float32)
    large = np.zeros((2048, 1024), dtype=np.float32)
    assert streaming.precision_for(large) == "float64"
    assert streaming.precision_for(replace(streamed(small), stored_dtype="bfloat16")) == "float64"
    weight = Weight("w", large.shape, "bfloat16", False, lambda: iter(()))
    assert streaming.precision_for(weight) == "float32"
    assert streaming.precision_for(replace(weight, stored_dtype="float32")) == "float64"


def test_a_dense_update_may_take_its_leading_directions_alone(rng, monkeypatch):
    update, W = low_rank_update(rng, rank=6), rng.standard_normal((D_OUT, D_IN))
    dense = DenseUpdate("q", update.delta_weight() + 1e-3 * rng.standard_normal((D_OUT, D_IN)))
    whole = amplification(dense, W)
    monkeypatch.setattr(measure, "spectrum", None)  # the whole spectrum is not asked for
    part = amplification(dense, W, k=3)
    assert_close(part.amplification_factor, whole.amplification_factor[:3], rtol=1e-7)
    assert_close(part.relative_norm, whole.relative_norm)
