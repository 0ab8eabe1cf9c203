"""From p-values to conclusions: multiple tests, ranks among references, jackknife."""

from __future__ import annotations

import numpy as np
import pytest
from reference import assert_close

from lora_analysis import chance
from lora_analysis.errors import InputError


def looped_q_values(p):
    """Benjamini–Hochberg as it is written down: the smallest level at which each is called."""
    p = list(p)
    found = []
    for value in p:
        levels = [other * len(p) / sum(x <= other for x in p) for other in p if other >= value]
        found.append(min(1.0, *levels))
    return np.array(found)


def test_q_values_equal_the_step_up_procedure(rng):
    p = rng.random(40) ** 3
    assert_close(chance.benjamini_hochberg(p), looped_q_values(p))
    assert_close(
        chance.benjamini_hochberg([0.01, 0.04, 0.03, 0.5]), [0.04, 0.16 / 3, 0.16 / 3, 0.5]
    )


def test_missing_p_values_stay_missing_and_do_not_count():
    q = chance.benjamini_hochberg([0.01, np.nan, 0.04, 0.03, 0.5])
    assert np.isnan(q[1])
    assert_close(q[[0, 2, 3, 4]], chance.benjamini_hochberg([0.01, 0.04, 0.03, 0.5]))
    assert chance.benjamini_hochberg([]).size == 0


def test_the_false_discovery_rate_is_held():
    rng = np.random.default_rng(5)
    false = []
    for _ in range(400):
        p = np.append(rng.random(80), rng.random(20) * 1e-3)
        called = chance.benjamini_hochberg(p) <= 0.1
        false.append(called[:80].sum() / max(called.sum(), 1))
    assert 0.06 <= np.mean(false) <= 0.1


def test_holm_rejects_what_the_step_down_procedure_rejects(rng):
    assert_close(chance.holm([0.01, 0.04, 0.03, 0.5]), [0.04, 0.09, 0.09, 0.5])
    p = rng.random(12) ** 3
    adjusted = chance.holm(p)
    for level in (0.01, 0.05, 0.2, 0.7):
        rejected = np.zeros(12, dtype=bool)
        for step, index in enumerate(np.argsort(p)):
            if p[index] > level / (12 - step):
                break
            rejected[index] = True
        np.testing.assert_array_equal(adjusted <= level, rejected)
    with_gap = chance.holm([0.01, np.nan, 0.04, 0.03, 0.5])
    assert_close(with_gap, [0.04, np.nan, 0.09, 0.09, 0.5])
    assert chance.holm([]).size == 0


def symmetric(n, pairs):
    """A symmetric matrix with these values above the diagonal, NaN on it."""
    matrix = np.full((n, n), np.nan)
    matrix[np.triu_indices(n, 1)] = pairs
    return np.where(np.isnan(matrix), matrix.T, matrix)


def test_the_rank_test_counts_pairs_and_ties_against_the_tested_pair():
    best = chance.rank_test(symmetric(4, [0.9, 0.1, 0.2, 0.3, 0.4, 0.5]))
    assert (best.rank, best.pairs) == (1, 6)
    assert_close([best.p_value, best.smallest_p_value], 1 / 6)
    second = chance.rank_test(symmetric(4, [0.5, 0.1, 0.2, 0.9, 0.4, 0.3]))
    assert_close([second.rank, second.p_value], [2, 2 / 6])
    tied = chance.rank_test(symmetric(4, [0.3, 0.1, 0.2, 0.1 + 0.2, 0.4, 0.0]))
    assert tied.rank == 3
    assert chance.rank_test(np.full((5, 5), 0.2)).p_value == 1


@pytest.mark.parametrize(
    ("references", "smallest"), [(2, 0.17), (3, 0.1), (4, 0.067), (5, 0.048), (8, 0.022)]
)
def test_the_smallest_p_value_of_the_rank_test_follows_from_the_references(references, smallest):
    n = references + 2
    result = chance.rank_test(symmetric(n, np.arange(n * (n - 1) // 2)[::-1]))
    assert result.p_value == result.smallest_p_value == pytest.approx(smallest, abs=5e-3)


def test_the_rank_test_is_exact_for_exchangeable_adapters(rng):
    p = []
    for _ in range(2000):
        vectors = rng.standard_normal((7, 6))
        p.append(chance.rank_test(np.abs(vectors @ vectors.T)).p_value)
    assert_close(
        [np.mean(np.array(p) <= level) for level in (1 / 21, 1 / 3)], [1 / 21, 1 / 3], atol=0.03
    )


def test_no_undefined_value_reaches_the_rank_test():
    values = symmetric(4, [0.9, 0.1, np.nan, 0.3, 0.4, 0.5])
    with pytest.raises(InputError, match=r"adapters 0 and 3 is undefined"):
        chance.rank_test(values)
    for shape in ((2, 2), (3, 4), (3,)):
        with pytest.raises(InputError, match="at least one reference"):
            chance.rank_test(np.ones(shape))


def test_the_jackknife_error_of_a_mean_is_its_standard_error(rng):
    x = rng.standard_normal(9)
    value, error = chance.jackknife(lambda runs: x[runs].mean(), 9)
    assert_close([value, error], [x.mean(), x.std(ddof=1) / 3])
    assert chance.jackknife(lambda runs: x[runs].mean(), 2)[1] is None


def test_small_p_values_are_reported_as_such():
    p = [3e-7, chance.P_FLOOR, 1.01e-4, 0.00123, 0.5, float("nan")]
    assert [chance.p_value_text(value) for value in p] == [
        *("< 1e-4", "< 1e-4", "0.0001", "0.0012", "0.5", "")
    ]
    assert chance.p_is_bound(p).tolist() == [True, True, False, False, False, False]
    assert_close([chance.monte_carlo_p_value([1, 2, 3], x) for x in (2.5, 3, 9)], [0.5, 0.5, 0.25])
    assert np.isnan(chance.monte_carlo_p_value([1, 2, 3], np.nan))
