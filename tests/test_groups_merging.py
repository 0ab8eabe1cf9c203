"""How members add up: cosine, STI and SAR against dense matrices, closed forms and chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
from factories import low_rank_update, orthonormal, planted_update
from reference import IDENTITY, assert_close, assert_mean, assert_variance

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.errors import DegenerateSubspaceError, InputError, ScaleError
from lora_analysis.groups import interference
from lora_analysis.spectra import SIDES, spectrum


@pytest.fixture
def updates(rng):
    """Ranks 2 to 4, one untrained, one that opposes another, sizes a hundred times apart."""
    plain = [low_rank_update(rng, rank=r, scale=s) for r, s in ((3, 1.0), (2, 10.0), (4, 0.1))]
    untrained = replace(plain[0], B=0 * plain[0].B)
    against = replace(plain[1], B=-plain[1].B + 0.3 * rng.standard_normal((24, 2)))
    return [plain[0], untrained, *plain[1:], against]


def measured(updates, **options):
    return interference([spectrum(one) for one in updates], **options)


@pytest.mark.parametrize("k", [None, 1, 2])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_every_number_equals_that_of_dense_matrices(updates, k, epsilon):
    found = measured(updates, k=k, epsilon=epsilon)
    kept = [at for at in range(len(updates)) if at != 1]
    deltas = [updates[at].delta_weight() for at in kept]
    ranks = [updates[at].rank if k is None else k for at in kept]
    pairs = [(a, b) for i, a in enumerate(deltas) for b in deltas[:i]]
    sizes = sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in pairs)
    assert_close(found.cosine, sum(np.sum(a * b) for a, b in pairs) / sizes)
    squares = sum(np.linalg.norm(one) ** 2 for one in deltas)
    assert_close(found.norm_ratio, np.linalg.norm(sum(deltas)) ** 2 / squares)
    sti = reference.singular_task_interference(deltas, ranks)
    assert_close(found.sti, sti)
    total = sum(np.linalg.svd(d)[1][:r].sum() for d, r in zip(deltas, ranks, strict=True))
    assert_close(found.relative_sti, sti / total)
    for side, d in zip(SIDES, (20, 24), strict=True):
        values, count = reference.subspace_alignment(deltas, side, epsilon)
        one = found.alignment[side]
        assert one.directions == count
        assert_close(one.values[kept], values, atol=IDENTITY)
        assert_close(one.chance, np.sqrt(count / d))
        assert np.isnan(one.values[1])
        assert not one.degenerate


def test_orthogonal_members_do_not_interfere_and_equal_ones_do_in_full(rng):
    values = np.array([3.0, 2.0, 1.0])
    left, right = orthonormal(rng, 30, 9), orthonormal(rng, 40, 9)
    apart = [
        planted_update(left[:, at : at + 3], values + at / 10, right[:, at : at + 3])
        for at in (0, 3, 6)
    ]
    found = measured(apart, epsilon=1e-6)
    assert_close([found.cosine, found.norm_ratio, found.sti], [0, 1, 0], atol=1e-12)
    assert found.alignment["input"].directions == 9
    assert_close(found.alignment["input"].values, np.ones(3))

    same = measured([apart[0]] * 3)
    assert_close([same.cosine, same.norm_ratio], [1, 3])
    for side in SIDES:
        assert same.alignment[side].directions == 3
        assert_close(same.alignment[side].values, np.ones(3))
    # (J − I)² of three members has 2 on and 1 off its diagonal: 3·2 + 6·1 = 12 times Σσ.
    assert_close([same.sti, same.relative_sti], [12 * 6.0, 12 / 3])


def test_members_that_cancel_leave_no_direction_to_align_with(rng):
    one = low_rank_update(rng)
    found = measured([one, replace(one, scale=-one.scale)])
    assert_close([found.cosine, found.norm_ratio], [-1, 0], atol=1e-12)
    for side in SIDES:
        assert found.alignment[side].directions == 0
        assert np.isnan(found.alignment[side].values).all()


def test_overlap_on_one_side_alone_is_no_interference(rng):
    values = np.array([2.0, 1.0])
    left, right = orthonormal(rng, 30, 4), orthonormal(rng, 40, 2)
    pair = [planted_update(left[:, at : at + 2], values, right) for at in (0, 2)]
    found = measured(pair)
    assert_close([found.sti, found.cosine], [0, 0], atol=1e-12)
    assert_close(found.alignment["input"].values, np.ones(2))


def test_numbers_do_not_depend_on_factors_order_or_a_common_size(rng, updates):
    plain = measured(updates)
    order = rng.permutation(len(updates))
    mix = rng.standard_normal((4, 4)) + 4 * np.eye(4)
    other = []
    for at in order:
        one, r = updates[at], updates[at].rank
        turned = one.B @ np.linalg.inv(mix[:r, :r])
        other.append(replace(one, A=mix[:r, :r] @ one.A, B=1e80 * turned))
    found = measured(other)
    assert_close(
        [found.cosine, found.norm_ratio, found.relative_sti, found.sti / 1e80, found.cosine_spread],
        [plain.cosine, plain.norm_ratio, plain.relative_sti, plain.sti, plain.cosine_spread],
    )
    for side in SIDES:
        assert_close(
            found.alignment[side].values, plain.alignment[side].values[order], atol=IDENTITY
        )


def test_transposed_updates_swap_the_sides_of_the_alignment(rng):
    made = [low_rank_update(rng, rank=r) for r in (2, 3)]
    flipped = [LowRankUpdate(name=m.name, A=m.B.T, B=m.A.T, scale=m.scale) for m in made]
    one, two = measured(made), measured(flipped)
    assert_close(one.alignment["input"].values, two.alignment["output"].values, atol=IDENTITY)
    assert_close([one.sti, one.cosine], [two.sti, two.cosine])


def test_a_cut_between_equal_merged_values_is_told(rng):
    left, right = orthonormal(rng, 30, 4), orthonormal(rng, 40, 4)
    pair = [
        planted_update(left[:, at : at + 2], np.ones(2), right[:, at : at + 2]) for at in (0, 2)
    ]
    found = measured(pair, epsilon=0.6)
    assert found.alignment["output"].directions == 3
    assert found.alignment["output"].degenerate
    assert not measured(pair).alignment["output"].degenerate


def test_the_cosine_of_random_members_has_the_stated_spread():
    rng = np.random.default_rng(3)
    sizes = (1.0, 2.0, 5.0)
    cosines, ratios = [], []
    for _ in range(800):
        made = [
            planted_update(
                reference.haar_stack(rng, 1, 9, 2)[0],
                size * np.array([2.0, 1.0]),
                reference.haar_stack(rng, 1, 7, 2)[0],
            )
            for size in sizes
        ]
        found = measured(made)
        cosines.append(found.cosine)
        ratios.append(found.norm_ratio)
    assert_mean(np.array(cosines), 0.0)
    assert_variance(np.array(cosines), found.cosine_spread**2)
    assert_mean(np.array(ratios), 1.0)


def test_what_cannot_be_added_up_is_refused(rng, updates):
    unknown = replace(updates[0], scale=None, label="mine")
    with pytest.raises(ScaleError, match="that of mine is not known"):
        measured([unknown, updates[2]])
    # Untrained, it adds nothing whatever its scale.
    measured([replace(updates[1], scale=None), *updates[2:]])
    with pytest.raises(DegenerateSubspaceError, match="numerical rank is 2"):
        measured(updates, k=3)
    with pytest.raises(InputError, match="k >= 1"):
        measured(updates, k=0)
    for epsilon in (0.0, 1.0):
        with pytest.raises(InputError, match=r"in \(0, 1\)"):
            measured(updates, epsilon=epsilon)
    with pytest.raises(InputError, match="at least two trained updates"):
        measured(updates[:2])
