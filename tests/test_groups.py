"""A group's shared basis and union: held out, against chance, and by dense SVDs in loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
from factories import adapter, low_rank_update, orthonormal, planted_update
from reference import IDENTITY, assert_close, assert_mean, assert_variance

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate
from lora_analysis.errors import DegenerateSubspaceError, IncompatibleError, InputError
from lora_analysis.formats import read_adapter
from lora_analysis.groups import group_similarity, shared_basis, union_subspace
from lora_analysis.spectra import SIDES, spectrum


@pytest.fixture
def updates(rng):
    """Ranks 2 to 5, sizes from 1e-100 to 1e100, one untrained, one that resembles another."""
    plain = [low_rank_update(rng, rank=r) for r in (3, 2, 5)]
    untrained = replace(plain[0], B=0 * plain[0].B)
    large, small = (replace(plain[1], B=f * plain[2].B[:, :2]) for f in (1e100, 1e-100))
    related = replace(plain[0], A=plain[0].A + 0.3 * rng.standard_normal((3, 20)))
    return [plain[0], untrained, *plain[1:], large, small, related]


def turned(rng, update):
    """The same update by other factors."""
    mix = rng.standard_normal((update.rank, update.rank))
    return replace(update, A=mix @ update.A, B=update.B @ np.linalg.inv(mix))


def members(rng, count, d_out=24, d_in=20, rank=3):
    return [low_rank_update(rng, d_out, d_in, rank) for _ in range(count)]


# --- shared basis -----------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_shares_equal_those_of_dense_svds(updates, side):
    spectra = [spectrum(one) for one in updates]
    found = shared_basis(spectra, side)
    kept = [at for at, one in enumerate(spectra) if not one.untrained]
    deltas = [one.delta_weight() for one in updates]
    deltas[1] = np.ones_like(deltas[1])  # of no member: only its place is needed
    most = len(found.eigenvalues)
    for at in kept:
        assert_close(
            found.in_sample[at],
            reference.shared_shares(deltas, side, at, kept, most),
            atol=IDENTITY,
        )
        others = [other for other in kept if other != at]
        there = int(np.isfinite(found.held_out.values[at]).sum())
        expected = reference.shared_shares(deltas, side, at, others, there)
        assert_close(found.held_out.values[at, :there], expected, atol=IDENTITY)
    assert np.isnan(found.in_sample[1]).all()
    assert np.isnan(found.held_out.values[1]).all()
    assert_close(found.basis.T @ found.basis, np.eye(most), atol=IDENTITY)
    unit = reference.on_side([deltas[at] for at in kept], side)
    for column in range(most):
        energy = sum(np.linalg.norm(one @ found.basis[:, column]) ** 2 for one in unit)
        assert_close(found.eigenvalues[column], energy, atol=IDENTITY)
    assert_close(found.explained, np.cumsum(found.eigenvalues) / len(kept), atol=IDENTITY)


@pytest.mark.parametrize("side", SIDES)
def test_a_planted_common_subspace_is_explained_to_its_share_exactly(rng, side):
    # Two common directions hold 0.8 of every member, one direction of its own the rest.
    d, count, share = 40, 5, 0.8
    frame = orthonormal(rng, d, 2 + count)
    values = np.sqrt([share / 2 + 0.1, share / 2 - 0.1, 1 - share])
    made = []
    for at in range(count):
        shared, other = frame[:, [0, 1, 2 + at]], orthonormal(rng, 30, 3)
        pair = (other, shared) if side == "input" else (shared, other)
        made.append(planted_update(pair[0], 10.0**at * values, pair[1]))
    found = shared_basis([spectrum(one) for one in made], side, k=2)
    assert_close(found.held_out.values[:, 1], np.full(count, share))
    assert_close(found.held_out.values[:, 0], np.full(count, share / 2 + 0.1))
    assert_close(found.in_sample[:, 1], np.full(count, share))
    assert_close(found.held_out.chance, [1 / d, 2 / d])
    assert (found.held_out.p_value[:, 1] <= 1e-4).all()
    # Beyond the common directions the others' own ones say nothing about a member.
    every = shared_basis([spectrum(one) for one in made], side)
    assert every.in_sample.shape == (count, 2 + count)
    assert_close(every.in_sample[:, -1], np.ones(count))
    assert_close(every.held_out.values[:, -2], np.full(count, share))
    assert np.isnan(every.held_out.values[:, -1]).all()


def test_unrelated_members_look_alike_in_sample_and_not_held_out(rng):
    frame = orthonormal(rng, 40, 6)
    made = [
        planted_update(orthonormal(rng, 30, 2), np.array([2.0, 1.0]), frame[:, 2 * at : 2 * at + 2])
        for at in range(3)
    ]
    found = shared_basis([spectrum(one) for one in made], "input")
    assert_close(found.in_sample[:, -1], np.ones(3))
    assert_close(found.held_out.values[:, :4], np.zeros((3, 4)), atol=1e-20)
    assert found.degenerate.tolist() == [True, True, False, True, True, False]
    assert found.held_out_degenerate[0].tolist() == [True, False, True, False, False, False]


@pytest.mark.parametrize("k", [1, 2, 3, 6, 10])
def test_the_leading_k_are_the_first_k_of_all(rng, k):
    frame = orthonormal(rng, 40, 8)
    tied = [
        planted_update(orthonormal(rng, 30, 2), np.array([2.0, 1.0]), frame[:, 2 * at : 2 * at + 2])
        for at in range(4)
    ]
    made = [*tied, *(low_rank_update(rng, 30, 40, 5) for _ in range(3))]
    spectra = [spectrum(one) for one in made]
    every, found = shared_basis(spectra, "input"), shared_basis(spectra, "input", k=k)
    assert_close(found.eigenvalues, every.eigenvalues[:k])
    assert found.degenerate.tolist() == every.degenerate[:k].tolist()
    assert found.held_out_degenerate.tolist() == every.held_out_degenerate[:, :k].tolist()
    assert_close(found.held_out.values[:, k - 1], every.held_out.values[:, k - 1], atol=IDENTITY)
    only = [spectrum(one) for one in tied]
    assert shared_basis(only, "input", k=2).degenerate.tolist() == [True, True]


@pytest.mark.parametrize("side", SIDES)
def test_shares_do_not_depend_on_factors_order_or_size(rng, updates, side):
    plain = shared_basis([spectrum(one) for one in updates], side, k=4)
    order = rng.permutation(len(updates))
    other = [replace(turned(rng, updates[at]), scale=-3.0 * (at + 1)) for at in order]
    found = shared_basis([spectrum(one) for one in other], side, k=4)
    assert_close(found.in_sample, plain.in_sample[order], atol=1e-8)
    assert_close(found.held_out.values, plain.held_out.values[order], atol=1e-8)
    assert_close(found.held_out.p_value, plain.held_out.p_value[order], atol=1e-7)


def test_transposed_updates_swap_their_sides(rng):
    made = members(rng, 4)
    flipped = [LowRankUpdate(name=m.name, A=m.B.T, B=m.A.T, scale=m.scale) for m in made]
    one = shared_basis([spectrum(m) for m in made], "input")
    two = shared_basis([spectrum(m) for m in flipped], "output")
    assert_close(one.held_out.values, two.held_out.values, atol=IDENTITY)


def test_more_directions_than_dimensions_explain_everything(rng):
    made = members(rng, 5, 24, 6, 3)
    found = shared_basis([spectrum(one) for one in made], "input")
    assert found.basis.shape == (6, 6)
    assert_close(found.held_out.values[:, -1], np.ones(5))
    assert_close(found.held_out.chance[-1], 1.0)
    assert_close(found.held_out.p_value[:, -1], np.ones(5))
    assert np.isnan(found.held_out.excess[:, -1]).all()  # nothing can exceed a chance of 1


def test_graded_members_keep_the_stated_accuracy(rng):
    # σ from 1 to 1e-3 of each member: λ₁/λ_k up to 1e6 and an error of 1e-15·1e6 at most.
    made = [
        planted_update(orthonormal(rng, 30, 4), np.logspace(0, -3, 4), orthonormal(rng, 24, 4))
        for _ in range(4)
    ]
    found = shared_basis([spectrum(one) for one in made], "input")
    deltas = [one.delta_weight() for one in made]
    for at in range(4):
        others = [other for other in range(4) if other != at]
        expected = reference.shared_shares(deltas, "input", at, others, 12)
        assert_close(found.held_out.values[at, :12], expected, atol=1e-9)


def test_held_out_shares_of_random_members_have_the_stated_null():
    rng = np.random.default_rng(5)
    d, k, count = 24, 3, 3
    values = np.array([3.0, 2.0, 1.0])
    shares, p = [], []
    for _ in range(1500):
        made = [
            planted_update(orthonormal(rng, 10, 3), values, reference.haar_stack(rng, 1, d, 3)[0])
            for _ in range(count)
        ]
        held_out = shared_basis([spectrum(one) for one in made], "input", k=k).held_out
        shares.append(held_out.values[0, k - 1])
        p.append(held_out.p_value[0, k - 1])
    assert_mean(np.array(shares), k / d)
    assert_variance(np.array(shares), held_out.variance[0, k - 1])
    below = np.mean(np.array(shares) <= held_out.quantile(0.9)[0, k - 1])
    assert abs(below - 0.9) <= 5 * np.sqrt(0.09 / 1500)
    levels = np.linspace(0.05, 0.95, 19)
    found = np.array([np.mean(np.array(p) <= level) for level in levels])
    assert np.abs(found - levels).max() <= 0.04 + 1.63 / np.sqrt(1500)  # its error, and K–S at 1 %


def test_dense_and_low_rank_members_share_a_basis(rng):
    made = members(rng, 3)
    mixed = [DenseUpdate(made[0].name, made[0].delta_weight()), *made[1:]]
    one = shared_basis([spectrum(m) for m in made], "output", k=3, updates=made)
    two = shared_basis([spectrum(m) for m in mixed], "output", k=3, updates=mixed)
    assert_close(two.held_out.values, one.held_out.values, atol=IDENTITY)
    assert not two.shared_init.any()


def test_members_with_one_initial_a_are_marked_and_others_are_not(rng):
    one, two, three = (low_rank_update(rng, 64, 64, 4) for _ in range(3))
    copy = replace(two, A=one.A + 0.05 * rng.standard_normal(one.A.shape))
    frozen = replace(three, B=0 * three.B)
    made = [one, copy, three, frozen]
    found = shared_basis([spectrum(m) for m in made], "input", k=8, updates=made)
    # The untrained member has the third one's A, and is in no basis.
    assert found.shared_init.tolist() == [True, True, False, False]
    assert found.held_out.values[0, -1] > 0.9
    assert shared_basis([spectrum(m) for m in made], "input").shared_init is None


def test_what_is_no_group_is_refused(rng, updates):
    spectra = [spectrum(one) for one in updates]
    with pytest.raises(InputError, match=r"two trained updates of 'layers.*2 given, 1 of"):
        shared_basis(spectra[:2], "input")
    with pytest.raises(InputError, match="two trained updates: 0 given"):
        union_subspace([], "input", k=1)
    other = spectrum(low_rank_update(rng, 20, 24))
    with pytest.raises(IncompatibleError, match=r"have shapes \[\(20, 24\), \(24, 20\)\]"):
        shared_basis([spectra[0], other], "input")
    bare = spectrum(updates[0], vectors=False)
    with pytest.raises(InputError, match="vectors=False"):
        shared_basis([bare, spectra[2]], "output")
    with pytest.raises(InputError, match="k >= 1 directions, got k = 0"):
        shared_basis(spectra, "input", k=0)
    with pytest.raises(DegenerateSubspaceError, match=r"2 trained members resolve 5\. Use k <= 5"):
        shared_basis([spectra[0], spectra[2]], "input", k=6)
    with pytest.raises(InputError, match="There are 2 spectra and 1 updates"):
        shared_basis([spectra[0], spectra[2]], "input", updates=updates[:1])
    with pytest.raises(InputError, match="side must be"):
        shared_basis(spectra, "left")


# --- union ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("k", [1, 2])
def test_unions_equal_those_of_dense_svds(updates, side, k):
    spectra = [spectrum(one) for one in updates]
    found = union_subspace(spectra, side, k=k)
    kept = [at for at, one in enumerate(spectra) if not one.untrained]
    deltas = [one.delta_weight() for one in updates]
    deltas[1] = np.ones_like(deltas[1])
    for at in kept:
        share, dimension = reference.union_share(deltas, side, at, kept, k)
        assert_close(found.energy[at], share, atol=IDENTITY)
        assert found.dimension == dimension
        others = [other for other in kept if other != at]
        share, dimension = reference.union_share(deltas, side, at, others, k)
        assert_close(found.held_out.values[at], share, atol=IDENTITY)
        assert found.held_out.directions[at] == dimension
    d = found.held_out.dimension
    assert_close(found.held_out.chance[kept], found.held_out.directions[kept] / d)
    assert np.isnan(found.energy[1])
    assert np.isnan(found.held_out.p_value[1])
    assert_close(found.basis.T @ found.basis, np.eye(found.dimension), atol=IDENTITY)


def test_orthogonal_members_span_as_many_directions_as_they_have_and_equal_ones_k(rng):
    frame = orthonormal(rng, 40, 9)
    values = np.array([3.0, 2.0, 1.0])
    apart = [
        planted_update(orthonormal(rng, 30, 3), values, frame[:, 3 * at : 3 * at + 3])
        for at in range(3)
    ]
    found = union_subspace([spectrum(one) for one in apart], "input", k=2)
    assert found.dimension == 6
    assert_close(found.energy, np.full(3, 13 / 14))
    assert_close(found.held_out.values, np.zeros(3), atol=1e-20)
    assert found.held_out.directions.tolist() == [4, 4, 4]
    same = union_subspace([spectrum(apart[0])] * 3, "input", k=2)
    assert same.dimension == 2
    assert_close(same.held_out.values, np.full(3, 13 / 14))
    assert (same.held_out.p_value < 1e-3).all()


def test_a_union_of_random_members_holds_what_chance_says():
    rng = np.random.default_rng(11)
    shares = []
    for _ in range(600):
        made = [
            planted_update(orthonormal(rng, 8, 2), np.array([2.0, 1.0]), orthonormal(rng, 20, 2))
            for _ in range(3)
        ]
        held_out = union_subspace([spectrum(one) for one in made], "input", k=2).held_out
        shares.append(held_out.values[0])
    assert_mean(np.array(shares), held_out.chance[0])
    assert_variance(np.array(shares), held_out.variance[0])


def test_a_k_that_a_member_does_not_define_is_refused(rng):
    made = members(rng, 2, rank=3)
    tied = planted_update(orthonormal(rng, 24, 2), np.array([1.0, 1.0]), orthonormal(rng, 20, 2))
    spectra = [spectrum(one) for one in made]
    with pytest.raises(DegenerateSubspaceError, match="numerical rank is 3"):
        union_subspace(spectra, "input", k=4)
    with pytest.raises(DegenerateSubspaceError, match="sigma_1 and sigma_2 differ"):
        union_subspace([*spectra, spectrum(tied)], "input", k=1)
    with pytest.raises(InputError, match="k >= 1"):
        union_subspace(spectra, "input", k=0)


# --- whole adapters ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_adapters_are_grouped_module_by_module(rng, workers):
    group = [adapter(rng, rank=r, label=f"a{r}") for r in (2, 4, 3)]
    seen = []
    found = group_similarity(group, workers=workers, progress=lambda *step: seen.append(step))
    assert found.labels == ("a2", "a4", "a3")
    assert found.modules == tuple(group[0])
    assert found.directions.tolist() == [2] * 4
    assert found.dimensions.tolist() == [[20] * 4, [24] * 4]
    assert seen[-1] == ("modules", 4, 4)
    for m, name in enumerate(found.modules):
        spectra = [spectrum(one[name]) for one in group]
        for s, side in enumerate(SIDES):
            expected = shared_basis(spectra, side, k=2)
            assert_close(found.held_out[s, m], expected.held_out.values[:, 1])
            assert_close(found.in_sample[s, m], expected.in_sample[:, 1])
            assert_close(found.excess[s, m], expected.held_out.excess[:, 1])
    together = apart = 0.0
    for m, name in enumerate(found.modules):
        deltas = [one[name].delta_weight() for one in group]
        pairs = [(deltas[i], deltas[j]) for i in range(3) for j in range(i)]
        inner = sum(np.sum(a * b) for a, b in pairs)
        sizes = sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in pairs)
        assert_close(found.cosine[m], inner / sizes)
        together, apart = together + inner, apart + sizes
    assert_close(found.total_cosine, together / apart)
    assert_close(found.quartiles()[1], np.median(found.excess[1], axis=0))
    quarter = found.quartiles("held_out", "input")[0]
    assert_close(quarter, np.quantile(found.held_out[0], 0.25, axis=0))


def test_input_shares_with_a_shared_initialization_are_marked_and_excluded(rng):
    one, two, three = (adapter(rng, modules=2, label=label) for label in "abc")
    names = list(one)
    mixed = {n: replace(two[n], A=one[n].A) if n in names[:3] else two[n] for n in names}
    found = group_similarity([one, Adapter(mixed, label="mixed"), three])
    assert found.shared_init.tolist() == [[True, True, False]] * 3 + [[False] * 3]
    assert_close(found.quartiles("held_out", "input")[1, :2], found.held_out[0, 3, :2])
    assert_close(found.quartiles("held_out")[1], np.median(found.held_out[1], axis=0))
    part = group_similarity([one, Adapter({n: mixed[n] for n in names[:3]}, label="part"), three])
    assert np.isnan(part.quartiles("held_out", "input")[:, 1]).all()
    assert np.isfinite(part.quartiles("held_out", "output")).all()


def test_what_a_module_lacks_is_left_out_and_no_more(rng):
    whole, other = adapter(rng, modules=3, label="whole"), adapter(rng, modules=3, label="other")
    names = list(whole)
    part = {name: low_rank_update(rng, name=name) for name in names[:-1]}
    part[names[0]] = replace(part[names[0]], B=0 * part[names[0]].B)
    part[names[1]] = low_rank_update(rng, 10, 20, name=names[1])
    short = Adapter(part, label="part")
    found = group_similarity([whole, other, short])
    missing = np.isnan(found.held_out[1, :, 2])
    assert missing.tolist() == [True, True, False, False, False, True]
    assert np.isfinite(found.held_out[:, :, :2]).all()
    alone = group_similarity([whole, short])
    assert alone.directions.tolist() == [0, 0, 4, 4, 4, 0]
    assert np.isnan(alone.cosine).tolist() == [True, True, False, False, False, True]
    assert np.isfinite(alone.total_cosine)
    wide = group_similarity([whole, other], k=5)
    assert np.isnan(wide.held_out).all()  # the other one has four directions
    assert np.isfinite(wide.in_sample).all()


def test_an_unknown_scale_leaves_shares_and_takes_the_cosine(rng):
    group = [adapter(rng, label=label) for label in "ab"]
    name = next(iter(group[0]))
    updates = dict(group[0]) | {name: replace(group[0][name], scale=None)}
    found = group_similarity([Adapter(updates, label="a"), group[1]])
    plain = group_similarity(group)
    assert_close(found.held_out, plain.held_out)
    assert np.isnan(found.cosine).tolist() == [True, False, False, False]
    assert np.isnan(found.total_cosine)


def test_adapters_that_are_no_group_are_refused(rng):
    group = [adapter(rng, label=label) for label in "ab"]
    with pytest.raises(InputError, match="at least two adapters, got 1"):
        group_similarity(group[:1])
    with pytest.raises(InputError, match="matches 'k_proj'"):
        group_similarity(group, modules="k_proj")
    with pytest.raises(InputError, match="k >= 1"):
        group_similarity(group, k=0)
    names = list(group[0])
    halves = [Adapter({n: group[0][n] for n in names[i::2]}, label=str(i)) for i in range(2)]
    with pytest.raises(InputError, match="none of the 4 modules of the 2 adapters"):
        group_similarity(halves)


@pytest.mark.real
def test_checkpoints_of_one_run_share_their_basis_and_their_initialization(real_adapters):
    folder = real_adapters / "qwen2.5-peft"
    run = [read_adapter(folder / name) for name in ("checkpoint-23", "checkpoint-46", "final")]
    found = group_similarity(run)
    assert found.shared_init.all()
    assert np.isnan(found.quartiles(side="input")).all()
    assert (found.quartiles("held_out")[0] > 0.85).all()
    assert found.total_cosine > 0.9
    m = len(found.modules) // 2
    deltas = [one[found.modules[m]].delta_weight() for one in run]
    k = int(found.directions[m])
    for s, side in enumerate(SIDES):
        for at in range(3):
            others = [other for other in range(3) if other != at]
            expected = reference.shared_shares(deltas, side, at, others, k)[-1]
            assert_close(found.held_out[s, m, at], expected, rtol=reference.FLOAT32)
