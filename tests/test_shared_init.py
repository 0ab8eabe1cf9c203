"""Shared initializations: simulated pairs of every kind, and adapters that others trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
from factories import adapter, low_rank_update, orthonormal
from reference import IDENTITY, STANDARD_ERRORS, assert_close
from safetensors.numpy import load_file

from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.chance import weaker_half_mean
from lora_analysis.errors import IncompatibleError
from lora_analysis.init_evidence import (
    InitRows,
    ModuleInit,
    init_evidence,
    module_init,
    weaker_half_excess,
)
from lora_analysis.linalg import haar_frame
from lora_analysis.shared_init import classify_init, drift
from lora_analysis.similarity import subspace_similarity
from lora_analysis.spectra import spectrum
from lora_analysis.studies import study

D = 64
MODULES = 8


def common_inits(one, two):
    return [module_init(a, b) for a, b in zip(one, two, strict=True)]


def kaiming(rng, rank, columns):
    bound = 1 / np.sqrt(columns)
    return rng.uniform(-bound, bound, (rank, columns))


def trained(rng, A, drift=0.2, name="q"):
    """An update after training from A: every row turned a little, B learned on its own."""
    moved = A + drift * np.abs(A).mean() * rng.standard_normal(A.shape)
    return LowRankUpdate(name=name, A=moved, B=rng.standard_normal((D, len(A))), scale=1.0)


def pairs(rng, r1=4, r2=4, shared=MODULES, drift=0.2):
    """Two adapters of 8 modules of which the first ``shared`` start from the same rows."""
    one, two = [], []
    for index in range(MODULES):
        A1 = kaiming(rng, r1, D)
        A2 = kaiming(rng, r2, D)
        if index < shared:
            n = min(r1, r2)
            A2[:n] = A1[:n]
        one.append(trained(rng, A1, drift, f"layers.{index}.q_proj"))
        two.append(trained(rng, A2, drift, f"layers.{index}.q_proj"))
    return one, two


def full_similarity(one, two):
    grids = [subspace_similarity(a, b).values for a, b in zip(one, two, strict=True)]
    return [grid[-1, -1] for grid in grids if grid.size]


def classified(one, two):
    return classify_init(common_inits(one, two), full_similarity(one, two))


# --- the evidence -----------------------------------------------------------------------------


@pytest.mark.parametrize(("r1", "r2"), [(4, 4), (2, 6), (6, 2), (1, 3), (3, 1), (1, 2)])
def test_the_evidence_equals_loops_over_rows(rng, r1, r2):
    one, two = low_rank_update(rng, rank=r1), low_rank_update(rng, rank=r2)
    A = two.A.copy()
    n = min(r1, r2)
    A[:n] += one.A[:n]
    two = replace(two, A=A)
    found = module_init(one, two)
    c, q, z = reference.start(one.A, two.A)
    assert found.row_cosine == pytest.approx(c, rel=IDENTITY)
    assert found.cross_cosine == pytest.approx(q, rel=IDENTITY)
    assert found.z == pytest.approx(z, rel=IDENTITY)
    columns = [reference.cosine(one.B[:, k], two.B[:, k]) for k in range(n)]
    assert found.other_cosine == pytest.approx(np.mean(columns), rel=IDENTITY)
    assert (found.module, found.ranks) == ("layers.0.q_proj", (r1, r2))


def test_orthogonal_rows_are_compared_with_random_rows(rng):
    # Without cross-correlation q is 0; the floor 1/√d keeps z finite.
    A = orthonormal(rng, 20, 4).T
    one = low_rank_update(rng)
    found = module_init(replace(one, A=A), replace(one, A=A))
    assert found.cross_cosine == pytest.approx(0, abs=IDENTITY)
    assert found.z == pytest.approx(2 * np.sqrt(20))
    assert found.shared


def test_the_evidence_does_not_depend_on_the_size_of_rows_or_on_the_order_of_the_pair(rng):
    one, two = (side[0] for side in pairs(rng))
    plain = module_init(one, two)
    sized = module_init(replace(one, A=one.A * [[1e-3], [1], [50], [7]], scale=-3.0), two)
    back = module_init(two, one)
    for found in (sized, back):
        assert found.row_cosine == pytest.approx(plain.row_cosine)
        assert found.z == pytest.approx(plain.z)
        assert found.shared == plain.shared


@pytest.mark.parametrize(
    ("c", "q", "n", "shared"),
    [
        (0.21, 0.01, 4, False),  # z = 2 · .21 / (1/√64) = 3.4
        (0.32, 0.01, 4, True),  # z = 5.1
        (0.30, 0.01, 4, False),  # z = 4.8 asks for c ≥ .5
        (0.55, 0.01, 1, True),  # z = 4.4
        (0.49, 0.01, 1, False),  # z = 3.9
        (0.19, 0.01, 16, False),  # z = 6.1, but c is too small
        (0.60, 0.40, 4, False),  # strongly correlated rows explain c: z = 3
    ],
)
def test_the_rule_needs_both_a_cosine_and_a_distance_from_the_noise(c, q, n, shared):
    # Rows with exactly these cosines: row k of the second makes c with row k of the first, and
    # q with the others up to sign.
    one = np.eye(n, D) if n > 1 else np.eye(2, D)[:1]
    two = np.full((max(n, 2), len(one)), q)
    np.fill_diagonal(two, c)
    rest = np.sqrt(1 - np.sum(two**2, axis=1))
    A2 = np.hstack([two, np.zeros((len(two), D - len(one) - len(two))), np.diag(rest)])
    found = module_init(
        LowRankUpdate(name="q", A=one, B=np.ones((3, len(one))), scale=1.0),
        LowRankUpdate(name="q", A=A2, B=np.ones((3, len(A2))), scale=1.0),
    )
    assert found.row_cosine == pytest.approx(c)
    assert found.cross_cosine == pytest.approx(q)
    assert found.shared == shared


def test_an_untrained_b_and_zero_rows_do_not_prevent_the_test(rng):
    one, two = (side[0] for side in pairs(rng))
    found = module_init(replace(one, B=0 * one.B), two)
    assert found.shared
    assert found.other_cosine == 0
    A = one.A.copy()
    A[2] = 0
    assert module_init(replace(one, A=A), two).row_cosine == pytest.approx(
        module_init(one, two).row_cosine * 3 / 4, rel=0.1
    )


def test_updates_of_different_output_width_have_no_matching_columns(rng):
    one, two = (side[0] for side in pairs(rng))
    found = module_init(one, replace(two, B=two.B[: D // 2]))
    assert found.shared
    assert found.other_cosine == 0


# --- conclusions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("r1", "r2"), [(4, 4), (8, 16), (2, 8), (1, 4)])
def test_independent_initializations_are_classified_as_independent(rng, r1, r2):
    found = classified(*pairs(rng, r1, r2, shared=0))
    assert (found.kind, found.modules, found.compared) == ("independent", (), MODULES)
    assert found.other_cosine is None
    assert not found.contaminates_input


@pytest.mark.parametrize("drift", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("r1", "r2"), [(4, 4), (8, 16), (16, 4), (2, 8)])
def test_the_same_initial_rows_are_found_through_training_and_other_ranks(rng, r1, r2, drift):
    found = classified(*pairs(rng, r1, r2, drift=drift))
    assert found.kind == "shared initialization"
    assert found.modules == tuple(f"layers.{k}.q_proj" for k in range(MODULES))
    assert abs(found.other_cosine) < 0.4
    assert found.contaminates_input


def test_some_shared_modules_make_a_pair_partly_shared_and_are_listed(rng):
    found = classified(*pairs(rng, shared=3))
    assert found.kind == "partly shared"
    assert found.modules == ("layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj")
    assert found.compared == MODULES
    assert not found.contaminates_input


@pytest.mark.parametrize(
    ("shared", "kind"),
    [(3, "partly shared"), (4, "shared initialization"), (7, "shared initialization")],
)
def test_half_of_the_modules_make_the_whole_pair_shared(rng, shared, kind):
    found = classified(*pairs(rng, shared=shared))
    assert (found.kind, found.share, found.sign) == (kind, shared / MODULES, 1)
    assert not found.other_agrees
    assert found.contaminates_input == (kind == "shared initialization")


@pytest.mark.parametrize(("of_a", "of_b"), [(-1, 1), (1, -1), (-1, -1)])
def test_negated_factors_do_not_hide_a_shared_initialization(rng, of_a, of_b):
    one, two = pairs(rng)

    def negated(updates):
        return [replace(u, A=of_a * u.A, B=of_b * u.B) for u in updates]

    found = classified(one, negated(two))
    assert (found.kind, found.share, found.sign) == ("shared initialization", 1, of_a)
    copy = classified(one, negated(one))
    assert (copy.kind, copy.sign) == ("same training run", of_a)
    assert copy.other_cosine == pytest.approx(of_a * of_b)  # the sign of ΔW


def test_an_agreeing_second_factor_means_the_same_training_run(rng):
    one, _ = pairs(rng)
    later = [
        replace(u, A=u.A + 0.01 * rng.standard_normal(u.A.shape), B=2 * u.B + 0.5) for u in one
    ]
    found = classified(one, later)
    assert found.kind == "same training run"
    assert found.other_cosine > 0.8
    assert found.contaminates_input


def test_a_resized_copy_shares_its_space_though_not_its_rows(rng):
    one, _ = pairs(rng)
    resized = []
    for update in one:
        turn = orthonormal(rng, 4, 4)
        resized.append(replace(update, A=turn @ update.A, B=update.B @ turn.T))
    found = classified(one, resized)
    assert found.kind == "same input space"
    assert found.contaminates_input
    assert found.row_space == pytest.approx(1)
    smaller = [replace(u, A=u.A[:2], B=u.B[:, :2]) for u in resized]  # cut after the rotation
    assert classified(one, smaller).kind == "same input space"
    # Below rank 4 there is nothing but φ to recognize it by.
    without = classify_init(common_inits(one, smaller))
    assert (without.kind, without.row_space) == ("independent", None)


def test_correlated_rows_alone_are_no_shared_initialization(rng):
    # Training pulls every row towards one common direction: c is large, but so is q.
    common = rng.standard_normal(D)
    one, two = (
        [replace(u, A=u.A + np.outer(rng.standard_normal(4), common)) for u in side]
        for side in pairs(rng, shared=0)
    )
    inits = common_inits(one, two)
    assert max(abs(init.row_cosine) for init in inits) > 0.5
    assert classify_init(inits).kind == "independent"


# --- row spaces ---------------------------------------------------------------------------------


def spans_at(rng, cosines, r2, columns=D):
    """Two matrices whose row spaces have these cosines, in random bases of these spaces."""
    n = len(cosines)
    frame = orthonormal(rng, columns, n + r2)
    second = frame[:, n:].copy()
    second[:, :n] = frame[:, :n] * cosines + second[:, :n] * np.sqrt(1 - np.square(cosines))
    return rng.standard_normal((n, n)) @ frame[:, :n].T, rng.standard_normal((r2, r2)) @ second.T


def with_rows(rng, A, name="q"):
    return LowRankUpdate(name=name, A=A, B=rng.standard_normal((D, len(A))), scale=1.0)


@pytest.mark.parametrize("r2", [5, 8, 20])
def test_the_weaker_half_of_the_angles_is_measured_as_excess_over_random_spans(rng, r2):
    cosines = np.array([1.0, 0.9, 0.8, 0.6, 0.3])
    one, two = (with_rows(rng, A) for A in spans_at(rng, cosines, r2))
    chance = weaker_half_mean(D, 5, r2)
    expected = (np.mean([0.6**2, 0.3**2]) - chance) / (1 - chance)
    for found in (module_init(one, two), module_init(two, one)):
        assert found.row_space == pytest.approx(expected)
        assert found.other_space == pytest.approx(0, abs=0.2)


def test_the_weaker_half_is_not_measured_where_random_spans_agree(rng):
    for r1, r2, defined in [(4, 4, True), (3, 8, False), (8, 24, True), (8, 25, False)]:
        one, two = (low_rank_update(rng, 400, D, rank=r) for r in (r1, r2))
        found = module_init(one, two)
        assert (found.row_space is not None) == defined
        assert (found.other_space is not None) == (min(r1, r2) >= 4)


def test_rows_that_depend_on_each_other_count_once(rng):
    A = orthonormal(rng, D, 5).T
    one, two = with_rows(rng, np.vstack([A, A[:3], 0 * A[:1]])), with_rows(rng, A)
    assert module_init(one, two).row_space == pytest.approx(1)


@pytest.mark.parametrize(("d", "i", "j"), [(16, 4, 4), (64, 5, 20), (64, 16, 16), (192, 8, 64)])
def test_the_weaker_half_of_random_subspaces_has_the_stated_mean(rng, d, i, j):
    cosines = []
    for _ in range(300):
        frames = haar_frame(rng, d, i), haar_frame(rng, d, j)
        cosines.append(np.linalg.svd(frames[0].T @ frames[1], compute_uv=False))
    weaker = np.sort(np.square(cosines), axis=1)[:, : i // 2].mean(axis=1)
    error = STANDARD_ERRORS * weaker.std() / np.sqrt(len(weaker))
    assert weaker.mean() == pytest.approx(weaker_half_mean(d, i, j), abs=error + 0.006)
    excess = weaker_half_excess(np.array(cosines), (i, j), d)
    assert excess.mean() == pytest.approx(0, abs=2 * error + 0.012)


def row_space_pair(values, *, flagged=0, other_space=None):
    return [
        ModuleInit(
            module=f"m{k}",
            ranks=(8, 8),
            row_cosine=0.8 if k < flagged else 0.0,
            cross_cosine=0.1,
            z=20.0 if k < flagged else 0.0,
            other_cosine=0.0,
            shared=k < flagged,
            row_space=value,
            other_space=other_space,
        )
        for k, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "flagged", "kinds"),
    [
        ([0.31, 0.3, 0.0], 0, ["same input space"] * 3),
        ([0.29, 0.1, None], 0, ["undecided", "same input space", "independent"]),
        ([0.2] * 5, 2, ["undecided", "same input space", "partly shared"]),
        ([0.9] * 5, 3, ["shared initialization"] * 3),
        ([0.09] * 5, 0, ["independent"] * 3),
        ([0.09] * 5, 2, ["partly shared"] * 3),
        ([None] * 2, 0, ["independent"] * 3),
    ],
)
def test_row_spaces_that_agree_in_part_need_the_tasks(values, flagged, kinds):
    found = classify_init(row_space_pair(values, flagged=flagged))
    for differ, kind in zip((None, True, False), kinds, strict=True):
        decided = found.for_tasks(differ=differ)
        assert decided.kind == kind
        assert decided.contaminates_input == (kind not in ("independent", "partly shared"))
        assert decided.modules == tuple(f"m{k}" for k in range(flagged))
    numbers = [value for value in values if value is not None]
    assert found.row_space == (np.median(numbers) if numbers else None)


@pytest.mark.parametrize(
    ("row_space", "other_space", "kinds"),
    [
        (0.2, 0.1, ["undecided", "same input space", "independent"]),
        (0.2, 0.39, ["undecided", "same input space", "independent"]),
        (0.2, 0.41, ["independent"] * 3),
        (0.5, 0.6, ["same input space"] * 3),
        (0.5, 0.71, ["same input space", "same input space", "independent"]),
        (0.95, 1.0, ["same input space"] * 3),  # a copy
    ],
)
def test_spans_that_agree_more_on_the_output_side_were_learned(row_space, other_space, kinds):
    found = classify_init(row_space_pair([row_space] * 3, other_space=other_space))
    assert (found.row_space, found.other_space) == (row_space, other_space)
    assert found.other_agrees == (found.kind == "same input space")
    assert [found.for_tasks(differ=differ).kind for differ in (None, True, False)] == kinds


def singular_vectors(update):
    """The same ΔW with the rows that a resize by SVD leaves."""
    values = spectrum(update)
    root = np.sqrt(values.S)
    B, A = values.vectors("output") * root, (values.vectors("input") * root).T
    return replace(update, A=A, B=B, scale=1.0)


def test_singular_vectors_that_agree_by_learning_are_no_shared_initialization(rng):
    """Two runs on one task, stored by SVD: leading rows agree, in the order of the values."""
    learned = [orthonormal(rng, D, 2) for _ in range(2)]
    one, two = (
        singular_vectors(
            LowRankUpdate(
                name="q",
                A=np.vstack([learned[0].T * [[9], [6]], 0.4 * orthonormal(rng, D, 2).T]),
                B=np.hstack([learned[1], orthonormal(rng, D, 2)]),
                scale=1.0,
            )
        )
        for _ in range(2)
    )
    found = module_init(one, two)
    assert found.row_cosine > 0.4
    assert found.z > 5
    assert not found.shared
    rotation = orthonormal(rng, 4, 4)
    trained_rows = replace(two, A=rotation @ two.A, B=two.B @ rotation.T)
    assert not module_init(one, trained_rows).shared
    later = singular_vectors(replace(one, A=one.A + 0.01 * rng.standard_normal(one.A.shape)))
    assert module_init(one, later).shared  # of one run


def test_a_few_learned_rows_with_a_negative_sign_are_no_negated_copy(rng):
    one, two = pairs(rng, 2, 2, drift=0.0)
    turned = [replace(u, A=-u.A) if k < 3 else u for k, u in enumerate(two)]
    assert not module_init(one[0], replace(two[0], A=-two[0].A + 0.01)).shared
    found = classified(one, turned)
    assert found.sign == 1
    assert found.modules == tuple(u.name for u in two[3:])
    negated = classified(one, [replace(u, A=0.01 - u.A) for u in two])
    assert (negated.kind, negated.share, negated.sign) == ("shared initialization", 1, -1)


def test_rows_in_another_order_share_their_space(rng):
    one, two = pairs(rng, 8, 8)
    turned = [replace(u, A=u.A[::-1], B=u.B[:, ::-1]) for u in two]
    found = classified(one, turned)
    assert (found.kind, found.modules) == ("same input space", ())
    assert found.row_space > 0.8
    assert found.other_space < 0.2


def test_a_start_from_the_base_in_both_factors_shows_in_both_spaces(rng):
    """PiSSA: factors that start from one W agree by row and column, up to signs by space."""
    one, two, flipped = [], [], []
    for index in range(MODULES):
        start = orthonormal(rng, D, 8), orthonormal(rng, D, 8).T
        for side in (one, two):
            B, A = (m + 0.02 * rng.standard_normal(m.shape) for m in start)
            side.append(LowRankUpdate(name=f"m{index}", A=A, B=B, scale=1.0))
        signs = np.tile([-1.0, 1.0], 4)  # as another SVD may return them
        flipped.append(replace(two[-1], A=signs[:, None] * two[-1].A, B=two[-1].B * signs))
    by_rows = classified(one, two)
    assert (by_rows.kind, by_rows.share) == ("same training run", 1)
    assert by_rows.other_cosine > 0.9
    assert by_rows.other_agrees
    by_space = classified(one, flipped)
    assert by_space.kind == "same input space"
    assert min(by_space.row_space, by_space.other_space) > 0.9
    assert by_space.other_agrees


def test_a_study_sees_a_resized_copy_by_its_row_space(rng):
    first, second = (adapter(rng, rank=8, d_in=40, label=label) for label in "ab")
    resized = {}
    for name, update in second.items():  # its own B on the mixed rows of the first
        resized[name] = replace(update, A=orthonormal(rng, 8, 8) @ first[name].A)
    result = study([first, second, Adapter(resized, label="c")])
    kinds = result.pairs.set_index(["a", "b"])["initialization"]
    assert kinds.to_dict() == {
        ("a", "b"): "independent", ("a", "c"): "same input space", ("b", "c"): "independent"
    }  # fmt: skip


# --- rank one ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unclear", "other", "kind"),
    [
        (0.98, 0.97, "same training run"),  # drawn together by training: q is as large as c there
        (0.98, 0.1, "partly shared"),  # B was learned apart: the rest may be learned too
        (0.3, 0.97, "partly shared"),
    ],
)
def test_modules_whose_rows_were_drawn_together_do_not_hide_one_run(unclear, other, kind):
    starts = [
        ModuleInit("layers.0.q", (2, 2), 0.97, 0.08, 18.0, other, shared=True),
        ModuleInit("layers.1.q", (2, 2), unclear, 0.6, 2.2, other, shared=False),
        ModuleInit("layers.2.q", (2, 2), unclear, 0.6, 2.2, other, shared=False),
    ]
    found = classify_init(starts)
    assert found.kind == kind
    assert len(found.modules) == (3 if kind == "same training run" else 1)


def rank_one(cosines, other=0.0):
    return [
        ModuleInit(f"layers.{k}.q_proj", (1, 1), c, None, None, other, shared=False)
        for k, c in enumerate(cosines)
    ]


def test_a_single_rank_one_module_is_inconclusive(rng):
    found = module_init(low_rank_update(rng, rank=1), low_rank_update(rng, rank=1))
    assert (found.cross_cosine, found.z, found.shared) == (None, None, False)


@pytest.mark.parametrize(
    ("cosines", "other", "kind"),
    [
        ([0.9] * 3, 0.1, "shared initialization"),
        ([-0.95] * 3, 0.1, "shared initialization"),
        ([0.9] * 6, 0.7, "same training run"),
        ([-0.9] * 6, 0.7, "same training run"),  # −ΔW
        ([0.9] * 6 + [0.89], 0.1, "inconclusive"),
        ([0.9] * 2, 0.1, "inconclusive"),
        ([0.9] * 6 + [-0.9], 0.1, "inconclusive"),
        ([0.8] * 20, 0.1, "inconclusive"),
        ([0.0] * 20, 0.1, "inconclusive"),
    ],
)
def test_rank_one_pairs_are_judged_by_all_modules_with_one_sign(cosines, other, kind):
    found = classify_init(rank_one(cosines, other))
    assert found.kind == kind
    assert found.compared == len(cosines)
    assert len(found.modules) == (len(cosines) if kind != "inconclusive" else 0)
    assert found.sign == (np.sign(cosines[0]) if kind != "inconclusive" else 0)


def test_simulated_rank_one_pairs(rng):
    assert classified(*pairs(rng, 1, 1)).kind == "shared initialization"
    assert classified(*pairs(rng, 1, 1, shared=0)).kind == "inconclusive"


def test_rank_one_modules_among_others_are_passed_over(rng):
    inits = common_inits(*pairs(rng))
    found = classify_init([*inits, *rank_one([0.99, 0.0])])
    assert found.kind == "shared initialization"
    assert found.compared == MODULES


# --- which modules are compared ---------------------------------------------------------------


def test_nothing_to_compare_is_not_applicable():
    found = classify_init([])
    assert (found.kind, found.modules, found.compared) == ("not applicable", (), 0)


# --- adapters that others trained -------------------------------------------------------------


def sam_ring(folder, name):
    tensors = load_file(folder / "sam-ring" / f"{name}.safetensors")
    return [
        LowRankUpdate(
            name=f"{k:03d}", A=tensors[f"w_a_{k:03d}"], B=tensors[f"w_b_{k:03d}"], scale=1.0
        )
        for k in range(24)
    ]


def qwen(folder, name):
    tensors = load_file(folder / "qwen2.5-peft" / name / "adapter_model.safetensors")
    return [
        LowRankUpdate(name=key, A=tensors[key], B=tensors[key.replace("_A", "_B")], scale=2.0)
        for key in sorted(tensors)
        if "lora_A" in key
    ]


@pytest.mark.real
@pytest.mark.parametrize("name", ["checkpoint-23", "checkpoint-46"])
def test_checkpoints_of_one_run_are_called_the_same_run(real_adapters, name):
    found = classified(qwen(real_adapters, name), qwen(real_adapters, "final"))
    assert found.kind == "same training run"
    assert len(found.modules) == found.compared == 48


@pytest.mark.real
@pytest.mark.parametrize(("one", "two"), [(8, 16), (2, 4), (4, 16)])
def test_separate_trainings_are_called_independent(real_adapters, one, two):
    found = classified(
        sam_ring(real_adapters, f"lora_rank{one}"), sam_ring(real_adapters, f"lora_rank{two}")
    )
    assert (found.kind, found.compared) == ("independent", 24)


@pytest.mark.real
def test_the_initialization_of_an_untrained_adapter_is_compared(real_adapters):
    untrained = sam_ring(real_adapters, "untrained")
    assert all(spectrum(update).untrained for update in untrained)
    assert classified(untrained, sam_ring(real_adapters, "lora_rank4")).kind == "independent"


@pytest.mark.real
@pytest.mark.parametrize(("side", "expected"), [("input", 0.284), ("output", 0.785)])
def test_rank_8_and_16_of_one_task_agree_in_their_first_direction(real_adapters, side, expected):
    grids = [
        subspace_similarity(a, b, side=side)
        for a, b in zip(
            sam_ring(real_adapters, "lora_rank8"),
            sam_ring(real_adapters, "lora_rank16"),
            strict=True,
        )
    ]
    assert np.mean([grid.at(1, 1) for grid in grids]) == pytest.approx(expected, abs=1e-3)
    assert np.mean([grid.chance[0, 0] for grid in grids]) == pytest.approx(0.0013, abs=1e-4)
    dense = reference.similarity(
        *(
            reference.dense_svd(update.delta_weight(), 4)[2 if side == "input" else 0]
            for update in (
                sam_ring(real_adapters, "lora_rank8")[5],
                sam_ring(real_adapters, "lora_rank16")[5],
            )
        )
    )
    assert_close(grids[5].values[:4, :4], dense, atol=reference.ORACLE)


def test_a_file_against_itself_shares_every_module(rng):
    # Correlated rows alone would hide it: z compares with other rows of the same factors.
    common = rng.standard_normal(D)
    learned = [
        replace(u, A=u.A + 3 * np.outer(rng.standard_normal(4), common)) for u in pairs(rng)[0]
    ]
    found = classify_init(common_inits(learned, learned))
    assert found.kind == "same training run"
    assert len(found.modules) == MODULES


# --- every pair at once -----------------------------------------------------------------------


def test_the_evidence_for_many_is_that_for_each_pair(rng):
    updates = [low_rank_update(rng, rank=r) for r in (3, 5, 1, 3, 1)]
    updates[3] = replace(updates[3], A=updates[0].A + 0.1 * updates[3].A)
    updates.append(replace(updates[1], B=0 * updates[1].B))
    found = init_evidence(updates)
    for i, one in enumerate(updates):
        for j, two in enumerate(updates):
            c, q, z = reference.start(one.A, two.A) if {one.rank, two.rank} != {1} else (None,) * 3
            if c is not None:
                values = (found.row_cosine[i, j], found.cross_cosine[i, j], found.z[i, j])
                assert_close(values, (c, q, z), rtol=1e-9)
            n = min(one.rank, two.rank)
            columns = [
                one.B[:, k]
                @ two.B[:, k]
                / (np.linalg.norm(one.B[:, k]) * np.linalg.norm(two.B[:, k]))
                if two.B.any() and one.B.any()
                else 0.0
                for k in range(n)
            ]
            assert_close(found.other_cosine[i, j], np.mean(columns), atol=1e-12)
    assert found.shared[0, 3]
    assert found.shared[1, 5]
    assert not found.shared[0, 1]


def test_pairs_compared_in_blocks_are_flagged_alike(rng):
    one, two = (side[0] for side in pairs(rng, 6, 8))
    updates = [
        one,
        replace(two, A=-two.A),
        singular_vectors(one),
        singular_vectors(replace(one, A=one.A + 1e-4 * rng.standard_normal(one.A.shape))),
        low_rank_update(rng, D, D, 2),
        low_rank_update(rng, D, D, 1),
        replace(two, B=0 * two.B),
    ]
    found = init_evidence(updates).shared
    everything = np.arange(len(updates))
    assert InitRows(updates).shared(everything, everything).tolist() == found.tolist()
    assert found[0, 1]
    assert found[2, 3]
    assert not found[0, 2]


def test_the_evidence_can_be_asked_of_the_other_factor(rng):
    one, two = low_rank_update(rng, 20, 20, 4), low_rank_update(rng, 20, 20, 4)
    turned = [replace(u, A=u.B.T, B=u.A.T) for u in (one, two)]
    for name in ("row_cosine", "cross_cosine", "z", "other_cosine"):
        assert_close(
            getattr(init_evidence([one, two], factor="B"), name),
            getattr(init_evidence(turned), name),
        )


# --- drift ------------------------------------------------------------------------------------


def test_shrinking_is_radial_and_turning_is_angular(rng):
    update = low_rank_update(rng, rank=3)
    shrunk = drift(replace(update, A=0.9 * update.A), update.A)
    assert_close([shrunk.angular, shrunk.row_angular], 0, atol=1e-15)
    assert_close(shrunk.radial, -0.1)
    turn = rng.standard_normal(update.A.shape)
    turn -= (
        update.A
        * np.sum(turn * update.A, axis=1, keepdims=True)
        / np.sum(update.A**2, axis=1, keepdims=True)
    )
    turn *= np.linalg.norm(update.A, axis=1, keepdims=True) / np.linalg.norm(
        turn, axis=1, keepdims=True
    )
    for angle in (1e-6, 0.3, 2.0):
        moved = drift(replace(update, A=np.cos(angle) * update.A + np.sin(angle) * turn), update.A)
        expected = 2 * np.sin(angle / 2) ** 2
        assert_close([moved.angular, moved.row_angular], expected, rtol=1e-6)
        assert_close(moved.radial, 0, atol=1e-12)


def test_an_initial_factor_of_a_different_shape_is_refused(rng):
    update = low_rank_update(rng, rank=3)
    with pytest.raises(IncompatibleError, match=r"initial A .* is \(2, 20\), the trained one"):
        drift(update, update.A[:2])


@pytest.mark.parametrize("random", ["A", "B"])
def test_embeddings_are_compared_by_the_factor_that_is_drawn(rng, random):
    """PEFT draws an embedding's B, mlx-lm its A; the other starts at zero and is learned."""
    first = kaiming(rng, 4, D)
    one, two = (trained(rng, first) for _ in range(2))
    if random == "B":
        one, two = (replace(update, A=update.B.T, B=update.A.T) for update in (one, two))
    one, two = (replace(update, layout="embedding") for update in (one, two))
    found = module_init(one, two)
    assert found.shared
    assert found.row_cosine > 0.9
    assert abs(found.other_cosine) < 0.4
    other = trained(rng, kaiming(rng, 4, D))
    assert not module_init(one, replace(other, layout="embedding")).shared
    for signs in ([-1, 1, -1, 1], [1, 1, 1, 1]):  # mixed signs leave the space alone
        mixed = np.diag(signs)
        changed = replace(two, A=mixed @ two.A, B=two.B @ mixed)
        found = module_init(one, changed)
        assert found.row_space > 0.8
        assert found.other_space < 0.4
