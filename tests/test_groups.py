"""What a group shares: against dense vectors, on planted sets, and nothing on random ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
from factories import adapter, group_analysis, low_rank_update
from reference import IDENTITY, assert_close, assert_mean
from scipy.stats import mannwhitneyu

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate, Provenance, Update
from lora_analysis.errors import InputError
from lora_analysis.studies import SharedPart, Study, study
from lora_analysis.studies.group_analysis import _rank_sum_p_value, _sign_flip_p_value
from lora_analysis.studies.group_shares import (
    PARTS,
    ModuleShares,
    group_sizes,
    group_splits,
    module_shares,
)
from lora_analysis.studies.pair_classes import ModuleExclusion

Rng = np.random.Generator
NAMES = [f"layers.{i}.{kind}_proj" for i in range(2) for kind in "qv"]


def mixed(rng: Rng, update: LowRankUpdate) -> LowRankUpdate:
    """The same update by other factors: nothing of it can be read from single rows."""
    mix = rng.standard_normal((update.rank, update.rank)) + 2 * np.eye(update.rank)
    return replace(update, A=mix @ update.A, B=update.B @ np.linalg.inv(mix))


def planted(
    rng: Rng,
    count: int,
    kind: str,
    *,
    share: float = 0.33,
    shape: tuple[int, int] = (64, 56),
    ranks: Sequence[int] = (3,),
    common_rank: int = 2,
    names: Sequence[str] = tuple(NAMES),
    **provenance: object,
) -> list[Adapter]:
    """Adapters with a common part that holds a share of the energy: added, or of random sign.

    The sizes of the updates differ by orders of magnitude.
    """
    common = {
        name: (
            rng.standard_normal((shape[0], common_rank)),
            rng.standard_normal((common_rank, shape[1])),
        )
        for name in names
    }
    members = []
    for i in range(count):
        sign = {"mean": 1.0, "signs": rng.choice([-1.0, 1.0]), "nothing": 0.0}[kind]
        rank = ranks[i % len(ranks)]
        updates = {}
        for name in names:
            left, right = common[name]
            B, A = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
            rest = np.sqrt(1 - share) if sign else 1.0
            B = rest * B / np.linalg.norm(B @ A)
            if sign:
                common_B = sign * np.sqrt(share) * left / np.linalg.norm(left @ right)
                B, A = np.hstack([common_B, B]), np.vstack([right, A])
            update = LowRankUpdate(name=name, A=A, B=B, scale=10.0 ** rng.uniform(-3, 3))
            updates[name] = mixed(rng, update)
        label = f"{kind}{i}"
        members.append(Adapter(updates, label=label, provenance=Provenance(**provenance)))  # type: ignore[arg-type]
    return members


def shares_of(updates: Sequence[Update], count: int, k: int) -> ModuleShares:
    adapters = [Adapter({"q": update}, label=str(i)) for i, update in enumerate(updates)]
    shares = module_shares(adapters, count, group_splits(count), k, "q")
    assert isinstance(shares, ModuleShares)
    return shares


# --- against dense vectors --------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True], ids=["few directions", "more than dimensions"])
@pytest.mark.parametrize("k", [1, 3])
def test_shares_equal_those_of_dense_vectors(rng: Rng, k: int, dense: bool) -> None:
    count = 5
    updates: list[Update] = [
        low_rank_update(rng, 24, 20, rank, scale=scale, name="q")
        for rank, scale in zip((2, 3, 4, 1, 3, 4), (1.0, -2.0, 1e6, 1e-6, 0.5, 3.0), strict=True)
    ]
    if dense:
        updates[1] = DenseUpdate("q", rng.standard_normal((24, 20)))
        updates[5] = DenseUpdate("q", rng.standard_normal((24, 20)))
    shares = shares_of(updates, count, k)
    deltas = [update.delta_weight() for update in updates]
    unit = np.stack([d.ravel() / np.linalg.norm(d) for d in deltas])
    assert_close(shares.cosines, (unit @ unit.T)[:count, :count], atol=IDENTITY)
    expected = np.zeros_like(shares.shares)
    counts = np.zeros(shares.shares.shape[1:])
    for split in group_splits(count):
        for member in (*split.outside, 5):
            values = reference.group_shares(deltas, split.basis, member, k)
            expected[:, split.size, member] += values
            counts[split.size, member] += 1
    assert_close(shares.shares, expected / counts, atol=IDENTITY)
    assert (counts[-1, :count] == 1).all()  # each member is left out once
    eigenvalues = np.linalg.eigvalsh((unit @ unit.T)[:count, :count])[::-1]
    assert shares.explained is not None
    assert_close(shares.explained, np.cumsum(eigenvalues) / count, atol=IDENTITY)


def test_a_member_without_the_module_is_in_no_basis_of_it(rng: Rng) -> None:
    members = [adapter(rng, label=str(i), d_out=40, d_in=40, rank=2) for i in range(6)]
    less = Adapter({n: u for n, u in members[2].items() if n != NAMES[0]}, label="less")
    untrained = Adapter(
        {n: replace(u, B=0 * u.B) if n == NAMES[0] else u for n, u in members[4].items()},
        label="untrained here",
    )
    given = [*members[:2], less, members[3], untrained, members[5]]
    shares = module_shares(given, 6, group_splits(6), 2, NAMES[0])
    assert isinstance(shares, ModuleShares)
    present = [0, 1, 3, 5]
    assert np.isnan(shares.shares[:, :, [2, 4]]).all()
    deltas = [members[i][NAMES[0]].delta_weight() for i in range(6)]
    for i in present:
        basis = [j for j in present if j != i]
        expected = reference.group_shares(deltas, basis, i, 2)
        assert_close(shares.shares[:, -1, i], expected, atol=IDENTITY)
    assert shares.explained is None
    analysis = group_analysis(given)
    assert set(analysis.modules) == set(NAMES)
    assert not np.isnan(analysis.shares).any()


def test_scales_and_factors_of_a_member_do_not_matter(rng: Rng) -> None:
    updates = [low_rank_update(rng, 24, 20, 3, name="q") for _ in range(5)]
    other = [mixed(rng, replace(u, scale=10.0**i, A=u.A)) for i, u in enumerate(updates)]
    assert_close(shares_of(other, 5, 2).shares, shares_of(updates, 5, 2).shares, atol=1e-9)
    unknown = [replace(update, scale=None) for update in updates]
    assert_close(shares_of(unknown, 5, 2).shares, shares_of(updates, 5, 2).shares, atol=1e-12)


def test_flipping_one_sign_changes_the_mean_and_nothing_else(rng: Rng) -> None:
    updates = [low_rank_update(rng, 24, 20, 3, name="q") for _ in range(5)]
    flipped = [replace(updates[0], scale=-2.0), *updates[1:]]
    first, second = (shares_of(u, 5, 2).shares for u in (updates, flipped))
    blind = [PARTS.index(part) for part in ("matrices", "directions", "input", "output")]
    assert_close(first[blind], second[blind], atol=IDENTITY)
    mean = PARTS.index("mean")
    assert_close(first[mean, -1, 0], -second[mean, -1, 0], atol=IDENTITY)
    assert np.abs(first[mean, -1, 1] - second[mean, -1, 1]) > 1e-6


@pytest.mark.parametrize("count", [3, 8, 16, 17, 40])
def test_every_member_is_outside_once_at_the_largest_size(count: int) -> None:
    sizes, splits = group_sizes(count), group_splits(count)
    assert sizes == tuple(sorted(set(sizes)))
    for split in splits:
        assert len(split.basis) == len(set(split.basis)) == sizes[split.size]
        assert not set(split.basis) & set(split.outside)
    last = [split.outside for split in splits if split.size == len(sizes) - 1]
    assert sorted(np.concatenate(last)) == list(range(count))
    assert sizes[-1] == count - 1 if count <= 16 else sizes[-1] >= 0.85 * count


# --- both nulls -------------------------------------------------------------------------------


@pytest.mark.slow
def test_random_directions_have_the_stated_mean_and_at_most_the_stated_variance(rng: Rng) -> None:
    draws, k, spectrum = 300, 2, np.array([3.0, 1.0, 0.5])
    left_out = [split for split in group_splits(4) if split.size == 1]
    samples = []
    of_module: ModuleShares | ModuleExclusion | None = None
    for _ in range(draws):
        updates = [
            LowRankUpdate(
                "q",
                A=np.linalg.qr(rng.standard_normal((16, 3)))[0].T,
                B=np.linalg.qr(rng.standard_normal((20, 3)))[0] * spectrum,
                scale=1.0,
            )
            for _ in range(4)
        ]
        adapters = [Adapter({"q": update}, label=str(i)) for i, update in enumerate(updates)]
        of_module = module_shares(adapters, 4, left_out, k, "q")
        assert isinstance(of_module, ModuleShares)
        samples.append(of_module.shares[:, -1, 0])
    assert isinstance(of_module, ModuleShares)
    for p, part in enumerate(PARTS):
        values = np.array(samples)[:, p]
        assert_mean(values, of_module.chance[p, -1])
        assert values.var() <= 1.25 * of_module.variance[p], part
    exact = [PARTS.index(part) for part in ("directions", "input", "output")]
    assert_close(np.array(samples)[:, exact].var(axis=0), of_module.variance[exact], rtol=0.35)


def test_the_public_values_of_a_hundred_random_models_are_met(rng: Rng) -> None:
    # "100 randomly initialized ViTs: top-1 explained .0104, top-16 .1649, equal to their null":
    # leading matrices of 100 random ones, none left out. Both values together belong to vectors of
    # about 235,000 numbers (both would be .0100 and .1600 without end, .0105 and .1662 at 147,000).
    updates = [low_rank_update(rng, 484, 484, 4, name="q") for _ in range(100)]
    shares = shares_of(updates, 100, 4)
    for explained in (shares.explained, shares.explained_chance):
        assert explained is not None
        assert explained[0] == pytest.approx(0.0104, abs=5e-5)
        assert explained[15] == pytest.approx(0.1649, abs=1e-4)
    # Left out, the same matrices hold nothing: the explained energy was that of the members.
    members = np.nanmean(shares.shares[:, -1], axis=-1)
    assert abs(members[PARTS.index("mean")]) < 1e-5
    assert_close(members[1:], shares.chance[1:, -1], rtol=0.3)


def test_sign_flips_are_counted_exactly(rng: Rng) -> None:
    values = rng.standard_normal((7, 30)) + 0.15
    cosines = np.corrcoef(values) + 0.05
    sums = [
        sum(e[i] * e[j] * cosines[i, j] for i, j in itertools.combinations(range(7), 2))
        for e in itertools.product([1, -1], repeat=7)
    ]
    expected = np.mean(np.array(sums) >= sums[0] - 1e-12)
    assert _sign_flip_p_value(cosines) == pytest.approx(expected)
    assert _sign_flip_p_value(np.full((6, 6), 0.5)) == 1 / 32
    # Beyond the exact range the same number within the error of 10,000 draws.
    many = np.corrcoef(rng.standard_normal((15, 20)) + 0.1)
    assert 1e-4 <= _sign_flip_p_value(many) <= 1.0
    assert _sign_flip_p_value(np.full((20, 20), 0.5)) == pytest.approx(1e-4)


@pytest.mark.parametrize("counts", [(6, 3), (8, 4), (20, 1)])
def test_the_rank_sum_test_is_exact(rng: Rng, counts: tuple[int, int]) -> None:
    for shift in (-1.0, 0.0, 0.7, 9.0):
        members, others = rng.standard_normal(counts[0]) + shift, rng.standard_normal(counts[1])
        expected = mannwhitneyu(members, others, alternative="greater", method="exact").pvalue
        assert _rank_sum_p_value(members, others) == pytest.approx(expected)


# --- conclusions ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [8, 20])
@pytest.mark.parametrize("ranks", [(3,), (1, 4, 6)], ids=["equal ranks", "unequal ranks"])
def test_a_planted_mean_is_called_a_mean(rng: Rng, count: int, ranks: Sequence[int]) -> None:
    analysis = group_analysis(planted(rng, count, "mean", ranks=ranks))
    assert analysis.conclusion is SharedPart.MEAN
    assert analysis.rho == pytest.approx(0.33, abs=0.01)
    assert analysis.rho_interval[0] < 0.33 < analysis.rho_interval[1] + 0.005
    shares = dict(zip(PARTS, analysis.shares, strict=True))
    assert_close(shares["mean"], analysis.expected_mean, atol=0.01)
    assert np.sqrt(shares["mean"][-1]) == pytest.approx(0.51 if count == 8 else 0.55, abs=0.04)
    assert shares["matrices_beyond_mean"][-1] < 0.005
    assert shares["directions"][-1] == pytest.approx(0.33, abs=0.05)
    assert str(analysis).startswith(f"{count} adapters share a mean.")


@pytest.mark.parametrize("count", [8, 20])
def test_planted_random_signs_are_called_a_subspace(rng: Rng, count: int) -> None:
    analysis = group_analysis(planted(rng, count, "signs"))
    assert analysis.conclusion is SharedPart.SUBSPACE
    shares = dict(zip(PARTS, analysis.shares[:, -1], strict=True))
    assert abs(shares["mean"]) < 0.06
    assert 0.15 < shares["matrices_beyond_mean"] < 0.3
    assert shares["directions"] == pytest.approx(0.33, abs=0.05)
    assert analysis.p_values["mean"] > 0.05 > analysis.p_values["directions"]


@pytest.mark.parametrize(("kind", "expected"), [("mean", "mean"), ("signs", "subspace")])
@pytest.mark.parametrize("labeled", [False, True])
def test_a_part_that_was_stacked_onto_the_factors_is_not_taken_for_one_training(
    rng: Rng, kind: str, expected: str, labeled: bool
) -> None:
    d_out, d_in = 96, 88
    common = {n: (rng.standard_normal((d_out, 3)), rng.standard_normal((3, d_in))) for n in NAMES}
    members = []
    for i in range(8):
        updates = {}
        for name, (B, A) in common.items():
            sign = rng.choice([-1, 1]) if kind == "signs" else 1
            stacked = np.hstack([0.7 * sign * B, rng.standard_normal((d_out, 3))])
            below = np.vstack([A, rng.standard_normal((3, d_in))])
            updates[name] = LowRankUpdate(name, A=below, B=stacked, scale=1.0)
        facts = {"task": f"t{i}", "seed": i} if labeled else {}
        source = Provenance(rank=6, base_model="org/model", **facts)  # type: ignore[arg-type]
        members.append(Adapter(updates, label=f"a{i}", provenance=source))
    analysis = group_analysis(members)
    assert (analysis.conclusion, len(analysis.labels)) == (expected, 8)
    assert "parts of both factors" in analysis.finding.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "signs", "nothing"])
def test_a_hundred_planted_adapters_are_told_apart(rng: Rng, kind: str) -> None:
    analysis = group_analysis(planted(rng, 100, kind, names=NAMES[:1], shape=(256, 256)))
    expected = {"mean": "mean", "signs": "subspace", "nothing": "nothing"}[kind]
    assert analysis.conclusion == expected
    mean = analysis.shares[PARTS.index("mean"), -1]
    assert np.sqrt(abs(mean)) == pytest.approx(0.57 if kind == "mean" else 0.0, abs=0.1)


def test_full_fine_tunes_are_told_apart(rng: Rng) -> None:
    def tuned(kind: str) -> list[Adapter]:
        return [
            Adapter(
                {n: DenseUpdate(n, u.delta_weight()) for n, u in member.items()}, label=member.label
            )
            for member in planted(rng, 8, kind, shape=(40, 32))
        ]

    assert group_analysis(tuned("mean"), k=4).conclusion is SharedPart.MEAN
    assert group_analysis(tuned("signs"), k=4).conclusion is SharedPart.SUBSPACE
    assert group_analysis(tuned("nothing"), k=4).conclusion is SharedPart.NOTHING


def test_a_common_output_side_alone_is_a_subspace_of_that_side(rng: Rng) -> None:
    left = np.linalg.qr(rng.standard_normal((64, 2)))[0]
    members = []
    for i in range(8):
        updates = {
            name: mixed(
                rng,
                LowRankUpdate(
                    name,
                    A=rng.standard_normal((4, 56)),
                    B=np.hstack([left, rng.standard_normal((64, 2)) / 8]),
                    scale=1.0,
                ),
            )
            for name in NAMES
        }
        members.append(Adapter(updates, label=str(i)))
    analysis = group_analysis(members)
    assert analysis.conclusion is SharedPart.SUBSPACE
    assert analysis.finding.fields["side"] == "output"
    assert "on the output side" in str(analysis)


def test_random_sets_share_nothing(rng: Rng) -> None:
    conclusions = []
    for draw in range(6):
        shape = ((24, 20), (64, 48))[draw % 2]
        rank = (1, 2, 4)[draw % 3]
        size = {"shape": shape, "ranks": (rank,), "names": NAMES[:2]}
        members = planted(rng, 6 + draw % 4, "nothing", **size)  # type: ignore[arg-type]
        conclusions.append(group_analysis(members).conclusion)
    assert not {SharedPart.MEAN, SharedPart.SUBSPACE} & set(conclusions)
    assert conclusions.count(SharedPart.NOTHING) >= 4


def test_too_few_adapters_are_undecided(rng: Rng) -> None:
    analysis = group_analysis(planted(rng, 5, "mean"))
    assert analysis.conclusion is SharedPart.UNDECIDED
    assert np.isnan(list(analysis.p_values.values())).all()
    assert "fewer than 6" in str(analysis)


@pytest.mark.slow
def test_what_other_groups_share_too_is_not_concluded(rng: Rng) -> None:
    together = planted(rng, 14, "signs")
    members, others = together[:10], together[10:]
    assert group_analysis(members).conclusion is SharedPart.SUBSPACE
    analysis = group_analysis(members, others)
    assert analysis.others == tuple(other.label for other in others)
    assert analysis.conclusion in (SharedPart.NOTHING, SharedPart.UNDECIDED)
    strangers = planted(rng, 4, "nothing")
    assert group_analysis(members, strangers).conclusion is SharedPart.SUBSPACE
    assert group_analysis(members, strangers[:1]).conclusion is SharedPart.SUBSPACE
    assert "too few for a test" in str(group_analysis(members, strangers[:1]))


# --- which adapters ---------------------------------------------------------------------------


def test_copies_and_shared_initializations_are_removed_by_name(rng: Rng) -> None:
    members = planted(rng, 8, "mean")
    copy = Adapter(
        {n: mixed(rng, replace(u, scale=3 * u.scale)) for n, u in members[1].items()}, label="copy"
    )
    same_init = Adapter(
        {n: replace(u, B=rng.standard_normal(u.B.shape)) for n, u in members[2].items()},
        label="same init",
    )
    analysis = group_analysis([*members, copy, same_init])
    assert analysis.labels == tuple(member.label for member in members)
    assert analysis.removed == {
        "copy": ("near-duplicate", "mean1"),
        "same init": ("shared initialization", "mean2"),
    }
    assert analysis.to_dict()["removed"][0]["reason"] == "near-duplicate with mean1"
    assert "Removed: 1 (near-duplicate), 1 (shared initialization)." in str(analysis)
    every = group_analysis([*members, copy, same_init], remove_related=False)
    assert len(every.labels) == 10
    assert not every.removed


def test_adapters_of_one_initialization_are_a_group_on_the_output_side(rng: Rng) -> None:
    (first,) = planted(rng, 1, "nothing", ranks=(4,))
    members = [
        Adapter(
            {n: replace(u, B=rng.standard_normal(u.B.shape)) for n, u in first.items()},
            label=str(i),
        )
        for i in range(8)
    ]
    analysis = group_analysis(members)
    assert analysis.shared_init
    assert len(analysis.labels) == 8
    assert analysis.conclusion is SharedPart.NOTHING
    assert analysis.shares[PARTS.index("input"), -1] > 0.99
    assert np.isnan(analysis.p_values["input"])
    assert "the input side is excluded from the conclusion" in str(analysis)
    # With six others there is no need for them.
    more = group_analysis([*planted(rng, 6, "nothing", ranks=(4,)), *members])
    assert not more.shared_init
    assert len(more.labels) == 7


def test_a_study_takes_one_task_and_others_of_each_other_task(rng: Rng) -> None:
    base = {"base_model": "acme/base-1b"}
    members = planted(rng, 8, "mean", task="a", **base)
    members = [m.with_provenance(seed=i) for i, m in enumerate(members)]
    others = [
        made.with_provenance(seed=20 + i, task=task).with_label(f"{task}{i}")
        for task in ("b", "c", "d")
        for i, made in enumerate(planted(rng, 2, "nothing", **base))
    ]
    foreign = planted(rng, 1, "nothing", base_model="acme/other-2b")[0].with_label("foreign")
    untrained = Adapter(
        {n: replace(u, B=0 * u.B) for n, u in members[0].items()}, label="untrained",
        provenance=members[0].provenance,
    )  # fmt: skip
    result = study([*members, *others, foreign, untrained])
    labels = [*(m.label for m in members), "untrained"]
    analysis = result.group_analysis(labels)
    assert analysis.others == ("b0", "c0", "d0")
    assert analysis.tasks == ("a",)
    assert analysis.removed == {"untrained": ("untrained", None)}
    assert analysis.conclusion is SharedPart.MEAN
    everyone = result.group_analysis()
    assert everyone.removed == {
        "foreign": ("different base", None),
        "untrained": ("untrained", None),
    }
    assert everyone.tasks == ("a", "b", "c", "d")
    assert "of 4 tasks" in str(everyone)


def test_a_saved_study_gives_the_same_analysis(rng: Rng, tmp_path: Path) -> None:
    from lora_analysis.formats import read_adapter, write_adapter

    paths = [
        write_adapter(m, tmp_path / m.label) for m in planted(rng, 6, "signs", names=NAMES[:2])
    ]
    result = study([read_adapter(path) for path in paths])
    loaded = Study.load(result.save(tmp_path / "study"))
    first, second = result.group_analysis(), loaded.group_analysis(workers=1)
    np.testing.assert_array_equal(first.shares, second.shares)
    assert first.finding == second.finding


def test_modules_are_chosen_evenly_by_type_and_left_out_by_name(rng: Rng) -> None:
    names = [f"layers.{i}.{kind}_proj" for i in range(6) for kind in "qv"]
    members = [
        Adapter(
            {
                **{n: low_rank_update(rng, 32, 24, 2, name=n) for n in names},
                "head": low_rank_update(rng, 3, 24, 2, name="head"),
            },
            label=str(i),
        )
        for i in range(4)
    ]
    analysis = group_analysis(members, modules_per_type=2)
    assert analysis.modules == tuple(f"layers.{i}.{kind}_proj" for i in (1, 4) for kind in "qv")
    assert analysis.left_out == {"head": ModuleExclusion.NO_ROOM}
    table = analysis.to_frame()
    assert list(dict.fromkeys(table["module_type"])) == ["all", "q_proj", "v_proj"]
    assert len(table) == 3 * len(PARTS)
    q_and_v = table[table["module_type"] != "all"].groupby("part")["share"].mean()
    every = table[table["module_type"] == "all"].set_index("part")["share"]
    assert_close(q_and_v[list(PARTS)].to_numpy(), every[list(PARTS)].to_numpy())


Refused = Callable[[Study], object]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.group_analysis(["a0", "a1"]), "at least three independent adapters"),
        (lambda s: s.group_analysis(["a0", "a1", "nobody"]), "no adapter 'nobody'"),
        (lambda s: s.group_analysis(k=0), "k >= 1"),
        (lambda s: s.group_analysis(k=9), "36 dimensions on both sides"),
        (lambda s: s.group_analysis(modules="nothing"), "No module matches"),
    ],
)
def test_groups_that_cannot_be_analyzed_are_refused(rng: Rng, call: Refused, message: str) -> None:
    result = study([adapter(rng, label=f"a{i}", rank=2) for i in range(3)])
    with pytest.raises(InputError, match=message):
        call(result)
