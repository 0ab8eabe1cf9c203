from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from factories import adapter, low_rank_update, orthonormal, planted_update
from hypothesis import given
from reference import assert_close, delta, dense_svd

from lora_analysis import linalg
from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate
from lora_analysis.edit import (
    drop_directions,
    error_by_parameters,
    keep_directions,
    project_out,
    ranks_within,
    resize_adapter,
    truncate,
    without_directions,
    without_subspace,
)
from lora_analysis.errors import (
    DegenerateSubspaceError,
    IncompatibleError,
    InputError,
    ScaleError,
    UnsupportedMethodError,
)
from lora_analysis.spectra import singular_values


def planted(
    rng: np.random.Generator, values: Any, *, d_out: int = 12, d_in: int = 9, **more: Any
) -> LowRankUpdate:
    values = np.asarray(values, dtype=float)
    U, V = orthonormal(rng, d_out, len(values)), orthonormal(rng, d_in, len(values))
    return planted_update(U, values, V, **more)


# --- truncate -----------------------------------------------------------------------------------


def test_a_planted_spectrum_loses_exactly_its_tail(rng: np.random.Generator) -> None:
    small, lost = truncate(planted(rng, [4.0, 3.0, 2.0, 1.0], scale=0.5), rank=2)
    assert small.rank == lost.rank == 2
    assert_close(lost.norm, 0.5 * np.sqrt(30))
    assert_close(lost.error_norm, 0.5 * np.sqrt(5))
    assert_close(lost.error, np.sqrt(5 / 30))


@pytest.mark.parametrize("scale", [2.0, -1.5, 1.0])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_the_result_is_the_truncated_svd_of_the_dense_update(
    rng: np.random.Generator, scale: float, rank: int
) -> None:
    update = low_rank_update(rng, scale=scale)
    whole = delta(update.A, update.B, scale)
    U, S, V = dense_svd(whole, rank)
    small, lost = truncate(update, rank=rank)
    assert_close(small.delta_weight(), (U * S) @ V.T, atol=1e-11)
    assert_close(np.linalg.norm(whole - small.delta_weight()), lost.error_norm, atol=1e-11)
    assert_close(lost.norm, np.linalg.norm(whole))


def test_no_other_update_of_the_rank_is_closer(rng: np.random.Generator) -> None:
    update = low_rank_update(rng)
    small, lost = truncate(update, rank=2)
    whole = update.delta_weight()
    for _ in range(200):
        step = rng.standard_normal() * 0.05
        other = (small.B + step * rng.standard_normal(small.B.shape)) @ small.A
        assert np.linalg.norm(whole - other) >= lost.error_norm


def test_factors_are_balanced_and_the_scale_is_folded(rng: np.random.Generator) -> None:
    small, _ = truncate(low_rank_update(rng, scale=3.0), rank=3)
    assert (small.scale, small.alpha) == (1.0, 3.0)
    assert_close(small.A @ small.A.T, small.B.T @ small.B, atol=1e-11)


def test_a_change_of_the_factors_changes_nothing(rng: np.random.Generator) -> None:
    update = low_rank_update(rng)
    turn = rng.standard_normal((4, 4)) + 3 * np.eye(4)
    other = LowRankUpdate(
        name="q", A=np.linalg.solve(turn, update.A), B=update.B @ turn, scale=update.scale
    )
    one, two = truncate(update, rank=2), truncate(other, rank=2)
    assert_close(one[0].delta_weight(), two[0].delta_weight(), atol=1e-10)
    assert_close(one[1].error, two[1].error)


def test_a_rank_beyond_the_numerical_one_does_not_pad(rng: np.random.Generator) -> None:
    thin = planted(rng, [2.0, 1.0])
    padded = LowRankUpdate(
        name="q", A=np.vstack([thin.A, thin.A]), B=np.hstack([thin.B, thin.B]), scale=1.0
    )
    small, lost = truncate(padded, rank=4)
    assert (small.rank, lost.rank, lost.given_rank) == (2, 2, 4)
    assert lost.error == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (16 / 30, 1), (0.54, 2), (0.9, 3), (1, 4)])
def test_an_energy_share_keeps_the_fewest_directions_that_hold_it(
    rng: np.random.Generator, energy: float, rank: int
) -> None:
    small, lost = truncate(planted(rng, [4.0, 3.0, 2.0, 1.0]), energy=energy)
    assert small.rank == rank
    assert 1 - lost.error**2 >= energy - 1e-12


def test_a_zero_update_becomes_one_of_rank_one(rng: np.random.Generator) -> None:
    update = LowRankUpdate(name="q", A=rng.standard_normal((3, 5)), B=np.zeros((7, 3)), scale=1.0)
    small, lost = truncate(update, rank=2)
    assert small.rank == 1
    assert not small.delta_weight().any()
    assert lost.error == 0.0


def test_an_unknown_scale_stays_unknown(rng: np.random.Generator) -> None:
    update = low_rank_update(rng, scale=None)
    small, lost = truncate(update, rank=2)
    assert small.scale is None
    assert small.alpha is None
    _, S, _ = dense_svd(update.B @ update.A, 4)
    assert_close(lost.error, np.linalg.norm(S[2:]) / np.linalg.norm(S))


def test_layout_kernel_and_magnitude_stay(rng: np.random.Generator) -> None:
    update = LowRankUpdate(
        name="conv",
        A=rng.standard_normal((3, 18)),
        B=rng.standard_normal((5, 3)),
        scale=1.0,
        layout="conv",
        kernel=(3, 3),
        variant="DoRA",
        magnitude=np.ones(5),
    )
    small, _ = truncate(update, rank=2)
    assert (small.layout, small.kernel, small.variant) == ("conv", (3, 3), "DoRA")
    assert small.magnitude is not None


def test_of_dora_the_errors_are_said_to_be_the_low_rank_parts(rng: np.random.Generator) -> None:
    one = low_rank_update(rng, name="q")
    dora = LowRankUpdate("q", one.A, one.B, 1.0, variant="DoRA", magnitude=np.ones(24))
    for update, said in ((one, False), (dora, True)):
        (finding,) = resize_adapter(
            Adapter({"q": update}, label="x"), rank=2
        ).adapter.provenance.findings
        assert ("low-rank part" in finding.text) == said


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_a_dense_update_is_cut_like_a_factored_one(
    rng: np.random.Generator, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    U, V = orthonormal(rng, shape[0], 20), orthonormal(rng, shape[1], 20)
    S = 0.8 ** np.arange(20)
    dense = DenseUpdate("q", (U * S) @ V.T)
    for limit in (768, 1):  # the whole spectrum, and its leading part alone
        monkeypatch.setattr(linalg, "DENSE_SVD_LIMIT", limit)
        small, lost = truncate(dense, rank=3)
        assert_close(small.delta_weight(), (U[:, :3] * S[:3]) @ V[:, :3].T, atol=1e-9)
        assert_close(lost.error_norm, np.linalg.norm(S[3:]), rtol=1e-8)
        assert_close(lost.norm, np.linalg.norm(S))
        assert lost.given_parameters == 1200
        by_energy, held = truncate(dense, energy=1 - float(np.sum(S[17:] ** 2) / np.sum(S**2)))
        assert by_energy.rank == 17
        assert_close(held.error_norm, np.linalg.norm(S[17:]), rtol=1e-7)


@pytest.mark.slow
def test_a_large_dense_update_takes_its_leading_part_alone(rng: np.random.Generator) -> None:
    U, V = orthonormal(rng, 900, 40), orthonormal(rng, 800, 40)
    S = np.linspace(4.0, 1.0, 40)
    dense = DenseUpdate("q", ((U * S) @ V.T).astype(np.float32))
    small, lost = truncate(dense, energy=0.9)
    held = np.cumsum(S**2) / np.sum(S**2)
    assert small.rank == int(np.searchsorted(held, 0.9)) + 1
    assert_close(lost.error, np.sqrt(1 - held[small.rank - 1]), rtol=1e-5)


# --- a whole adapter --------------------------------------------------------------------------


def unequal(rng: np.random.Generator) -> Adapter:
    """Modules of three shapes and strengths."""
    updates = {
        "layers.0.q": planted(rng, [5.0, 4.0, 0.1], d_out=12, d_in=8, name="layers.0.q"),
        "layers.0.v": planted(rng, [2.0, 1.9, 1.8], d_out=6, d_in=4, name="layers.0.v"),
        "layers.1.q": planted(rng, [0.5, 0.01], d_out=20, d_in=20, name="layers.1.q"),
    }
    return Adapter(updates, label="unequal", config={"use_rslora": True, "r": 3})


def test_the_total_error_is_that_of_all_modules_as_one_matrix(rng: np.random.Generator) -> None:
    source = unequal(rng)
    small = resize_adapter(source, rank=1)
    apart = [source[n].delta_weight() - small.adapter[n].delta_weight() for n in source]
    whole = [source[n].delta_weight() for n in source]
    expected = np.linalg.norm(np.concatenate([m.ravel() for m in apart])) / np.linalg.norm(
        np.concatenate([m.ravel() for m in whole])
    )
    assert_close(small.error, expected)
    assert small.parameters == 20 + 10 + 40
    assert small.given_parameters == 60 + 30 + 80
    assert dict(small.adapter.config) == {"use_rslora": True}
    assert f"relative error {expected:.3g}" in small.adapter.provenance.findings[-1].text


def best_by_trying(
    budget: int, values: dict[str, np.ndarray], costs: dict[str, int]
) -> tuple[float, dict[str, int]]:
    """The slow twin: every choice of ranks."""
    best: tuple[float, dict[str, int]] = (-1.0, {})
    for ranks in itertools.product(*(range(len(v) + 1) for v in values.values())):
        chosen = dict(zip(values, ranks, strict=True))
        if sum(costs[n] * r for n, r in chosen.items()) <= budget:
            held = sum(float(np.sum(values[n][:r] ** 2)) for n, r in chosen.items())
            best = max(best, (held, chosen), key=lambda one: one[0])
    return best


@given(seed=st.integers(0, 10_000), budget=st.integers(30, 300), equal=st.booleans())
def test_greedy_ranks_are_the_best_but_for_one_direction(
    seed: int, budget: int, equal: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = {n: -np.sort(-rng.exponential(size=rng.integers(1, 5))) for n in "abc"}
    costs = {n: 30 if equal else int(rng.integers(5, 31)) for n in "abc"}
    ranks = ranks_within(budget, values, costs)
    assert sum(costs[n] * r for n, r in ranks.items()) <= budget
    held = sum(float(np.sum(values[n][:r] ** 2)) for n, r in ranks.items())
    best, _ = best_by_trying(budget, values, costs)
    if equal:
        assert held == pytest.approx(best)
    passed_over = [float(v[ranks[n]] ** 2) for n, v in values.items() if ranks[n] < len(v)]
    assert best <= held + max(passed_over, default=0.0) + 1e-9


def test_two_cheap_directions_are_worth_more_than_a_stronger_dear_one() -> None:
    values = {"wide": np.array([1.0]), "narrow": np.array([0.9, 0.8])}
    ranks = ranks_within(100, values, {"wide": 100, "narrow": 50})
    assert ranks == {"wide": 0, "narrow": 2}


def test_a_budget_goes_where_the_energy_is(rng: np.random.Generator) -> None:
    small = resize_adapter(unequal(rng), budget=60)
    ranks = {one.module: one.rank for one in small.modules}
    assert ranks == {"layers.0.q": 2, "layers.0.v": 2, "layers.1.q": 0}
    assert small.parameters == 60
    assert list(small.adapter) == ["layers.0.q", "layers.0.v"]
    assert small.adapter.config["target_modules"] == ["layers.0.q", "layers.0.v"]
    assert small.modules[2].error == 1.0
    assert_close(small.error_norm, np.sqrt(0.1**2 + 1.8**2 + 0.5**2 + 0.01**2))
    assert "1 modules of which nothing was kept" in small.adapter.provenance.findings[-1].text


def test_progress_counts_the_modules(rng: np.random.Generator) -> None:
    seen: list[tuple[str, int, int]] = []
    resize_adapter(unequal(rng), budget=60, progress=lambda *step: seen.append(step))
    assert seen[2] == ("spectra", 3, 3)
    assert seen[-1] == ("modules", 3, 3)


# --- interventions ----------------------------------------------------------------------------


def test_keeping_and_dropping_are_two_halves_of_the_update(rng: np.random.Generator) -> None:
    update = low_rank_update(rng)
    kept, rest = keep_directions(update, [1, 3]), drop_directions(update, [3, 1])
    assert (kept.rank, rest.rank) == (2, 2)
    assert_close(kept.delta_weight() + rest.delta_weight(), update.delta_weight(), atol=1e-11)
    U, S, V = dense_svd(update.delta_weight(), 4)
    assert_close(rest.delta_weight(), (U[:, [1, 3]] * S[[1, 3]]) @ V[:, [1, 3]].T, atol=1e-11)


def test_keeping_the_top_k_is_resizing(rng: np.random.Generator) -> None:
    update = low_rank_update(rng)
    one, two = keep_directions(update, range(1, 3)), truncate(update, rank=2)[0]
    assert_close(one.delta_weight(), two.delta_weight(), atol=1e-12)


def test_dropping_everything_leaves_zero(rng: np.random.Generator) -> None:
    assert not drop_directions(low_rank_update(rng), range(1, 5)).delta_weight().any()


def test_projecting_out_is_what_the_formula_says(rng: np.random.Generator) -> None:
    update = low_rank_update(rng)
    P, Q = rng.standard_normal((24, 3)), rng.standard_normal((20, 2))
    left = np.eye(24) - P @ np.linalg.pinv(P)
    right = np.eye(20) - Q @ np.linalg.pinv(Q)
    whole = update.delta_weight()
    dense = DenseUpdate(update.name, whole)
    for one in (update, dense):
        both = project_out(one, output=P, input=Q)
        assert_close(both.delta_weight(), left @ whole @ right, atol=1e-11)
        assert_close(project_out(one, output=P).delta_weight(), left @ whole, atol=1e-11)
        assert_close(project_out(one, input=Q).delta_weight(), whole @ right, atol=1e-11)


def test_dependent_and_zero_columns_change_nothing(rng: np.random.Generator) -> None:
    update = low_rank_update(rng)
    P = rng.standard_normal((24, 2))
    more = np.hstack([P, P @ [[1.0], [2.0]], np.zeros((24, 1)), 1e-9 * P[:, :1]])
    one, two = project_out(update, output=P), project_out(update, output=more)
    assert_close(one.delta_weight(), two.delta_weight(), atol=1e-10)


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_nothing_of_the_others_subspace_is_left(rng: np.random.Generator, side: Any) -> None:
    one, other = adapter(rng, label="one"), adapter(rng, rank=3, label="other")
    rest = without_subspace(one, other, side=side)
    assert list(rest) == list(one)
    for name in one:
        U, _, V = dense_svd(other[name].delta_weight(), 3)
        remaining = rest[name].delta_weight()
        if side != "input":
            assert_close(U.T @ remaining, 0.0, atol=1e-12)
        if side != "output":
            assert_close(remaining @ V, 0.0, atol=1e-12)
        if side == "output":
            assert np.abs(remaining @ V).max() > 0.1
    assert "other projected out" in rest.provenance.findings[-1].text


def test_only_the_top_k_of_the_other_may_be_taken(rng: np.random.Generator) -> None:
    one, other = adapter(rng, label="one"), adapter(rng, rank=3, label="other")
    rest = without_subspace(one, other, side="output", k=1)
    name = next(iter(one))
    U, _, _ = dense_svd(other[name].delta_weight(), 3)
    assert_close(U[:, :1].T @ rest[name].delta_weight(), 0.0, atol=1e-12)
    assert np.abs(U[:, 1:].T @ rest[name].delta_weight()).max() > 0.1


def test_named_directions_of_named_modules_go_and_nothing_else(rng: np.random.Generator) -> None:
    one = adapter(rng)
    name, *others = one
    rest = without_directions(one, {name: [1]})
    assert rest[name].rank == 3
    for other in others:
        assert_close(rest[other].delta_weight(), one[other].delta_weight(), atol=0)


# --- errors -----------------------------------------------------------------------------------


def test_what_cannot_be_done_is_said(rng: np.random.Generator) -> None:
    update, whole = low_rank_update(rng), adapter(rng)
    tied = planted(rng, [2.0, 1.0, 1.0])
    part = LowRankUpdate(name="q", A=update.A, B=update.B, scale=1.0, variant="KaSA")
    unknown = {"q": low_rank_update(rng, name="q", scale=None)}
    partly = Adapter({**unknown, "v": low_rank_update(rng, name="v")}, label="p")
    zero = Adapter({"q": LowRankUpdate("q", np.eye(1, 3), np.zeros((3, 1)), 1.0)}, label="z")
    elsewhere = Adapter({"other": low_rank_update(rng, name="other")}, label="elsewhere")
    table: list[tuple[Any, type[InputError], str]] = [
        (lambda: truncate(update), InputError, "exactly one of rank, energy; got none"),
        (lambda: truncate(update, rank=1, energy=0.5), InputError, "got rank, energy"),
        (lambda: truncate(update, rank=0), InputError, "at least 1, got 0"),
        (lambda: truncate(update, energy=1.5), InputError, r"\(0, 1\], got 1.5"),
        (lambda: truncate(part, rank=1), UnsupportedMethodError, "a part of KaSA"),
        (lambda: resize_adapter(whole, budget=40), InputError, "the smallest takes 44"),
        (lambda: resize_adapter(zero, budget=40), InputError, "untrained"),
        (lambda: resize_adapter(partly, rank=1), ScaleError, "scale of 'q'"),
        (lambda: resize_adapter(partly, budget=50), ScaleError, "scale of 'q'"),
        (lambda: resize_adapter(whole, rank=1, dtype="int8"), InputError, "got 'int8'"),
        (lambda: resize_adapter(whole, rank=1, rank_for={"k": 2}), InputError, "no module"),
        (lambda: resize_adapter(whole, rank=1, rank_for={"q_proj": 0}), InputError, "at least 1"),
        (lambda: resize_adapter(whole, budget=9, rank_for={"q_proj": 1}), InputError, "a budget"),
        (lambda: resize_adapter(Adapter({}, label="e"), rank=1), InputError, "no modules"),
        (lambda: drop_directions(update, [5]), DegenerateSubspaceError, "numerical rank is 4"),
        (lambda: drop_directions(update, [0]), InputError, "counted from 1"),
        (lambda: drop_directions(tied, [2]), DegenerateSubspaceError, "2 and 3"),
        (lambda: project_out(update), InputError, "Give directions"),
        (lambda: project_out(update, output=np.eye(3)), IncompatibleError, r"\(24, n\)"),
        (lambda: project_out(update, input=np.full((20, 1), np.nan)), InputError, "non-finite"),
        (lambda: without_directions(whole, {"nope": [1]}), InputError, "no module 'nope'"),
        (lambda: without_directions(whole, {}), InputError, "none was named"),
        (lambda: without_subspace(whole, elsewhere), InputError, "no trained module in common"),
        (lambda: without_subspace(whole, whole, side="left"), InputError, "got 'left'"),  # type: ignore[arg-type]
    ]
    for call, kind, said in table:
        with pytest.raises(kind, match=said):
            call()


def test_coinciding_directions_may_go_together(rng: np.random.Generator) -> None:
    assert drop_directions(planted(rng, [2.0, 1.0, 1.0]), [2, 3]).rank == 1


def test_the_error_by_parameters_is_that_of_resized_adapters(rng: np.random.Generator) -> None:
    whole = adapter(rng, modules=2, rank=4)
    values = {name: singular_values(update) for name, update in whole.items()}
    costs = {name: sum(update.shape) for name, update in whole.items()}
    total = np.sqrt(sum(float(np.sum(s**2)) for s in values.values()))

    def error(ranks: dict[str, int]) -> float:
        lost = sum(
            np.linalg.norm(update.delta_weight() - dense_best(update.delta_weight(), ranks[name]))
            ** 2
            for name, update in whole.items()
        )
        return float(np.sqrt(lost) / total)

    def dense_best(delta: np.ndarray, rank: int) -> np.ndarray:
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ vt[:rank]

    parameters, errors = error_by_parameters(values, costs)
    for at in (0, 5, 9, 15):
        ranks = ranks_within(int(parameters[at]), values, costs)
        assert errors[at] == pytest.approx(error(ranks), abs=1e-7)
    parameters, errors = error_by_parameters(values, costs, uniform=True)
    assert list(parameters) == [k * sum(costs.values()) for k in (1, 2, 3, 4)]
    for k in (1, 2, 3, 4):
        expected = error(dict.fromkeys(whole, k))
        assert errors[k - 1] == pytest.approx(expected, abs=1e-7)


def test_an_untrained_adapter_has_no_error_by_parameters() -> None:
    with pytest.raises(InputError, match="untrained"):
        error_by_parameters({"q": np.zeros(2)}, {"q": 10})
