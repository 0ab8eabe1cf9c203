"""Controls of the enrichment: crossed and through-W numbers, and the rank of one run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from factories import low_rank_update, orthonormal, planted_update
from reference import IDENTITY, ORACLE, assert_close
from test_amplify import D_IN, D_OUT, halved, streamed

from lora_analysis.amplify import (
    amplification,
    amplifications,
    controls,
    run_enrichments,
    streaming,
)
from lora_analysis.errors import DegenerateSubspaceError, IncompatibleError
from lora_analysis.spectra import spectrum


def dense_enrichment(U, W, V):
    """‖UᵀWV‖ over its random root mean square, from dense products."""
    rms = np.linalg.norm(W) * np.sqrt(U.shape[1] * V.shape[1] / W.size)
    return np.linalg.norm(U.T @ W @ V) / rms


# --- crossed directions -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["array", "tiles", "transposed tiles"])
def test_crossed_values_are_the_dense_products(rng, way):
    updates = [low_rank_update(rng, rank=rank, label=f"u{rank}") for rank in (3, 5)]
    partners = [low_rank_update(rng, rank=rank, label=f"p{rank}", scale=None) for rank in (2, 6)]
    W = rng.standard_normal((D_OUT, D_IN)).astype(np.float32)
    weight = W if way == "array" else streamed(W, transposed=way == "transposed tiles")
    pairs = [(0, 2), (3, 0), (0, 1), (1, 3)]
    first, second = amplifications(updates, weight, partners=partners, unrelated=pairs)
    assert first.crossed.partners == ("u5", "p2", "p6")
    assert second.crossed.partners == ("u3", "p6")
    spectra = {s.label: s for s in map(spectrum, [*updates, *partners])}
    dense = W.astype(np.float64)
    for result in (first, second):
        for row, partner in enumerate(result.crossed.partners):
            a, b = spectra[result.label], spectra[partner]
            for k in result.k:
                values = result.crossed.output[row, k - 1], result.crossed.input[row, k - 1]
                if k > b.numerical_rank:
                    assert np.isnan(values).all()
                    continue
                expected = (
                    dense_enrichment(a.U[:, :k], dense, b.V[:, :k]),
                    dense_enrichment(b.U[:, :k], dense, a.V[:, :k]),
                )
                assert_close(values, expected, rtol=1e-10)


def test_controls_change_no_other_number(rng):
    update, other = low_rank_update(rng), low_rank_update(rng, rank=2, label="other")
    W = rng.standard_normal((D_OUT, D_IN))
    plain = amplification(update, W, one_sided=True)
    controlled = amplification(update, W, one_sided=True, unrelated=[other], through_weight=2)
    for name in ("core", "enrichment", "input_enrichment", "output_enrichment"):
        np.testing.assert_array_equal(getattr(controlled, name), getattr(plain, name))
    np.testing.assert_array_equal(controlled.random.norms, plain.random.norms)
    assert plain.crossed is None
    assert plain.enrichment_through_weight is None


def test_an_update_crossed_with_itself_has_its_own_enrichment(rng):
    update, W = low_rank_update(rng), rng.standard_normal((D_OUT, D_IN))
    result = amplification(update, W, unrelated=[replace(update, scale=-2.0)])
    for values in (result.crossed.output[0], result.crossed.input[0], result.crossed.median):
        assert_close(values, result.enrichment, rtol=IDENTITY)


def test_with_a_multiple_of_the_identity_only_the_angle_between_both_updates_counts(rng):
    # UᵀcIV = c·UᵀV: orthogonal directions give 0, equal ones c√k against an rms of c·k/√d.
    basis = orthonormal(rng, D_IN, 6)
    first = planted_update(basis[:, :2], np.array([2.0, 1.0]), basis[:, 2:4])
    second = planted_update(basis[:, 4:6], np.array([2.0, 1.0]), basis[:, :2])
    result = amplification(first, 3 * np.eye(D_IN), unrelated=[second])
    assert_close(result.enrichment, 0, atol=IDENTITY)
    k = result.k
    assert_close(result.crossed.output[0], np.sqrt(k) * np.sqrt(D_IN) / k, rtol=IDENTITY)
    assert_close(result.crossed.input[0], 0, atol=IDENTITY)


def test_crossed_values_do_not_change_with_the_factors_and_follow_rotations_of_both_spaces(rng):
    update, other = low_rank_update(rng), low_rank_update(rng, rank=3)
    W = rng.standard_normal((D_OUT, D_IN))
    expected = amplification(update, W, unrelated=[other]).crossed
    G = rng.standard_normal((3, 3))
    split = replace(other, A=G @ other.A, B=other.B @ np.linalg.inv(G), scale=7.0)
    P, Q = orthonormal(rng, D_OUT, D_OUT), orthonormal(rng, D_IN, D_IN)
    turned, turned_other = (replace(u, A=u.A @ Q, B=P @ u.B) for u in (update, split))
    result = amplification(turned, 2 * P @ W @ Q, unrelated=[turned_other]).crossed
    assert_close(result.output, expected.output, rtol=ORACLE)
    swapped = amplification(other, W, unrelated=[update]).crossed
    assert_close(swapped.output, expected.input[:, :3], rtol=IDENTITY)
    assert_close(swapped.input, expected.output[:, :3], rtol=IDENTITY)


def test_of_many_directions_only_the_leading_ones_are_crossed(rng, monkeypatch):
    monkeypatch.setattr(controls, "MOST_CROSSED_COLUMNS", 9)
    updates = [low_rank_update(rng, rank=rank, label=str(rank)) for rank in (6, 2, 5)]
    W = rng.standard_normal((D_OUT, D_IN))
    results = amplifications(updates, W, unrelated=[(0, 2), (0, 1)])
    whole = amplification(updates[0], W, unrelated=[updates[1], updates[2]]).crossed
    output = results[0].crossed.output
    np.testing.assert_array_equal(np.isnan(output).sum(axis=1), [4, 3])  # of k = 1…6
    assert_close(output[1, :3], whole.output[1, :3], rtol=IDENTITY)
    assert results[1].crossed.partners == ("6",)


@pytest.mark.parametrize(
    ("partner", "error"),
    [
        (lambda u: replace(u, B=0 * u.B), DegenerateSubspaceError),
        (lambda u: replace(u, B=u.B[:4]), IncompatibleError),
    ],
)
def test_partners_without_directions_of_this_weight_are_refused(rng, partner, error):
    update = low_rank_update(rng)
    with pytest.raises(error):
        amplification(update, np.ones((D_OUT, D_IN)), unrelated=[partner(update)])


# --- through W --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["array", "tiles", "transposed tiles"])
def test_directions_through_the_weight_are_those_of_dense_products(rng, way):
    update = low_rank_update(rng, rank=3)
    W = rng.standard_normal((D_OUT, D_IN)).astype(np.float32)
    weight = W if way == "array" else streamed(W, transposed=way == "transposed tiles")
    result = amplification(update, weight, seed=5, through_weight=4)
    draws = np.random.default_rng([5, 1])
    G, H = draws.standard_normal((D_IN, 12)), draws.standard_normal((D_OUT, 12))
    W = W.astype(np.float64)
    for k in result.k:
        expected = []
        for draw in range(4):
            columns = slice(3 * draw, 3 * draw + k)
            U = np.linalg.svd(W @ G[:, columns], full_matrices=False)[0]
            V = np.linalg.svd(W.T @ H[:, columns], full_matrices=False)[0]
            expected.append(dense_enrichment(U, W, V))
        assert_close(result.enrichment_through_weight[k - 1], np.mean(expected), rtol=1e-10)


def test_a_flat_weight_adds_nothing_to_directions_through_it(rng):
    # For W = cI the directions stay random ones: the mean square of the enrichment is 1.
    update = low_rank_update(rng, 40, 40, rank=4)
    through = amplification(update, 3 * np.eye(40), through_weight=400).enrichment_through_weight
    assert_close(through[-1], 1, atol=0.03)


def test_a_weight_of_one_direction_gives_all_of_its_norm(rng):
    u, v = orthonormal(rng, D_OUT, 1), orthonormal(rng, D_IN, 1)
    update = low_rank_update(rng, rank=2)
    through = amplification(update, 5 * u @ v.T, through_weight=2).enrichment_through_weight
    k = np.arange(1, 3)
    assert_close(through, np.sqrt(D_OUT * D_IN) / k, rtol=ORACLE)


def test_through_the_weight_is_undefined_for_a_zero_weight_and_beyond_the_most(rng, monkeypatch):
    update, other = low_rank_update(rng), low_rank_update(rng)
    nothing = amplification(update, np.zeros((D_OUT, D_IN)), unrelated=[other], through_weight=1)
    assert np.isnan(nothing.enrichment_through_weight).all()
    assert np.isnan(nothing.crossed.median).all()
    (run,) = run_enrichments([nothing])
    assert np.isnan([run.enrichment, run.through_weight, run.p]).all()
    assert not run.specific
    monkeypatch.setattr(controls, "MOST_THROUGH_WEIGHT", 2)
    W = rng.standard_normal((D_OUT, D_IN))
    through = amplification(update, W, through_weight=1).enrichment_through_weight
    np.testing.assert_array_equal(np.isnan(through), [False, False, True, True])


def test_half_precision_weights_keep_six_digits_in_both_controls(rng, monkeypatch):
    monkeypatch.setattr(streaming, "_SMALL", 0)
    update, other = (low_rank_update(rng, 300, 200, rank=4) for _ in range(2))
    weight, exact = halved(rng.standard_normal((300, 200)))
    kwargs = {"unrelated": [other], "through_weight": 2}
    result = amplification(update, weight, **kwargs)
    expected = amplification(update, exact.astype(np.float64), **kwargs)
    assert result.precision == "float32"
    assert_close(result.enrichment_through_weight, expected.enrichment_through_weight, rtol=1e-6)
    assert_close(result.crossed.median, expected.crossed.median, rtol=1e-6)


# --- one run over its modules -----------------------------------------------------------------


def run_of(rng, W, *, partners, own=None, modules=3, rank=2):
    """Amplifications of one adapter over modules, with random partners unless ``own`` is given."""
    results = []
    for module in range(modules):
        update = own or low_rank_update(rng, *W.shape, rank=rank)
        others = [low_rank_update(rng, *W.shape, rank=rank, label=f"p{i}") for i in range(partners)]
        named = replace(update, name=f"m{module}", label="run")
        results.append(amplification(named, W, draws=0, unrelated=others))
    return results


def test_a_run_is_ranked_among_crossed_values_of_the_same_k_and_modules(rng):
    W = rng.standard_normal((D_OUT, D_IN)) * np.linspace(3, 0.1, D_IN)
    results = run_of(rng, W, partners=4)
    short = replace(results[2], crossed=results[2].crossed.select({"p0", "p3"}))
    (run,) = run_enrichments([*results[:2], short])
    assert (run.label, run.modules, len(run.crossed)) == ("run", 3, 8)
    assert run.enrichment == pytest.approx(np.median([r.enrichment[-1] for r in results]))
    two = np.median([r.crossed.output[1, -1] for r in results[:2]])
    assert run.crossed[2] == pytest.approx(two)
    assert run.matched[2] == pytest.approx(np.median([r.enrichment[-1] for r in results[:2]]))
    three = np.median([r.crossed.input[3, -1] for r in results])
    assert run.crossed[7] == pytest.approx(three)
    above = sum(value >= own for value, own in zip(run.crossed, run.matched, strict=True))
    assert run.p == (1 + above) / 9
    assert run.smallest_p == 1 / 9
    assert run.range_crossed == (min(run.crossed), max(run.crossed))


def test_partners_of_a_lower_rank_are_compared_at_their_rank(rng):
    W = rng.standard_normal((D_OUT, D_IN))
    result = amplification(
        low_rank_update(rng, rank=4), W, unrelated=[low_rank_update(rng, rank=2)]
    )
    (run,) = run_enrichments([result])
    assert run.matched == (result.enrichment[1],) * 2
    assert run.crossed == (result.crossed.output[0, 1], result.crossed.input[0, 1])


def test_only_directions_beyond_enough_crossed_values_are_specific(rng):
    W = rng.standard_normal((D_OUT, D_IN))
    U, S, Vt = np.linalg.svd(W)
    top = planted_update(U[:, :2], S[:2], Vt[:2].T)
    (run,) = run_enrichments(run_of(rng, W, partners=10, own=top))
    assert run.p == 1 / 21
    assert run.testable
    assert run.specific
    (few,) = run_enrichments(run_of(rng, W, partners=9, own=top))
    assert few.p > 0.05
    assert not few.testable
    assert not few.specific


def test_equal_values_count_against_a_run(rng):
    # With as many directions as W has, every enrichment is 1 up to rounding.
    W = rng.standard_normal((3, 3))
    (run,) = run_enrichments(run_of(rng, W, partners=12, rank=3))
    assert run.p == 1


@pytest.mark.slow
def test_runs_by_chance_reach_significance_as_often_as_stated(rng):
    W = rng.standard_normal((D_OUT, D_IN)) * np.linspace(3, 0.1, D_IN)
    specific = [
        run_enrichments(run_of(rng, W, partners=10, modules=1))[0].specific for _ in range(200)
    ]
    assert np.mean(specific) <= 0.09  # 0.05 and 2.6 standard errors
