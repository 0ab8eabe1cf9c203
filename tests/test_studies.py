from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference
from factories import adapter, low_rank_update, orthonormal

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.bases import open_base
from lora_analysis.chance import benjamini_hochberg
from lora_analysis.conclusions import findings
from lora_analysis.errors import BaseWeightError, InputError, SourceError
from lora_analysis.studies import Relation, relation, study

NAMES = ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj")


def planted_adapter(
    rng: np.random.Generator,
    *,
    task: str,
    rank: int,
    seed: int,
    output: dict[str, np.ndarray],
    share: dict[str, np.ndarray] | None = None,
) -> Adapter:
    """An adapter whose first output direction is the task's; A is the seed's where shared."""
    label = f"{task}-r{rank}-s{seed}"
    updates = {}
    for name in NAMES:
        A = share[name] if share else rng.standard_normal((rank, 40))
        noise = rng.standard_normal((48, rank)) * 0.02
        B = noise + output[name][:, :1] @ rng.standard_normal((1, rank))
        updates[name] = LowRankUpdate(name=name, A=A, B=B, scale=2.0, label=label)
    return Adapter(updates, label=label, provenance=Provenance(rank=rank, seed=seed, task=task))


@pytest.fixture(scope="session")
def sweep() -> list[Adapter]:
    """Two tasks × two seeds at rank 4 (one seed, one A), and rank 8 on the first task."""
    rng = np.random.default_rng(7)
    directions = {
        task: {name: orthonormal(rng, 48, 1) for name in NAMES} for task in ("turn", "flip")
    }
    start = {seed: {name: rng.standard_normal((4, 40)) for name in NAMES} for seed in (0, 1)}
    cells = [(task, seed) for task in ("turn", "flip") for seed in (0, 1)]
    made = [
        planted_adapter(
            rng, task=task, rank=4, seed=seed, output=directions[task], share=start[seed]
        )
        for task, seed in cells
    ]
    made.append(planted_adapter(rng, task="turn", rank=8, seed=0, output=directions["turn"]))
    return made


def test_relations_come_from_task_rank_and_seed(sweep: list[Adapter]) -> None:
    turn0, turn1, flip0, flip1, turn8 = sweep
    assert relation(turn0, turn1) == "same task, different seed"
    assert relation(turn0, turn8) == "same task, different rank"
    assert relation(turn1, turn8) == "same task, different rank and seed"
    assert relation(turn0, flip0) == Relation.SHARED_SEED
    assert relation(turn0, flip1) == Relation.OTHER_TASK
    assert relation(flip0, turn8) == "different task, different rank, same seed"
    unknown = Adapter(dict(turn0), label="x", provenance=Provenance(rank=4, seed=0))
    assert relation(turn0, unknown) == "unknown"


def test_every_pair_and_module_has_a_row_per_side(sweep: list[Adapter]) -> None:
    result = study(sweep)
    assert len(result.pairs) == 10
    assert len(result.similarities) == 10 * len(NAMES) * 2
    assert len(result.spectra) == 5 * len(NAMES)
    assert list(result.runs["adapter"]) == [one.label for one in sweep]


def test_rows_equal_the_brute_force_numbers(sweep: list[Adapter]) -> None:
    result = study(sweep)
    a, b = sweep[0], sweep[4]
    for name in NAMES:
        deltas = [one[name].delta_weight() for one in (a, b)]
        table = result.similarities
        rows = table[(table["a"] == a.label) & (table["b"] == b.label) & (table["module"] == name)]
        for row in rows.to_dict("records"):
            bases = [
                np.linalg.svd(d if row["side"] == "output" else d.T)[0][:, :k]
                for d, k in zip(deltas, (4, 8), strict=True)
            ]
            grid = reference.similarity(*bases)
            assert row["phi_1_1"] == pytest.approx(grid[0, 0], abs=1e-9)
            assert row["phi_r_r"] == pytest.approx(grid[3, 7], abs=1e-9)
            inner = np.vdot(*deltas) / np.prod([np.linalg.norm(d) for d in deltas])
            assert row["signed_cosine"] == pytest.approx(inner, abs=1e-9)


def test_the_total_cosine_is_that_of_all_modules_stacked(sweep: list[Adapter]) -> None:
    result = study(sweep[:2])
    flat = [np.concatenate([one[n].delta_weight().ravel() for n in NAMES]) for one in sweep[:2]]
    expected = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert result.pairs["total_cosine"][0] == pytest.approx(expected, abs=1e-10)


def test_a_shared_seed_is_found_and_left_out_of_both_populations(sweep: list[Adapter]) -> None:
    result = study(sweep)
    starts = result.pairs.set_index(["a", "b"])["initialization"]
    assert starts["turn-r4-s0", "flip-r4-s0"] == "shared initialization"
    assert starts["turn-r4-s0", "flip-r4-s1"] == "independent"
    shared = result.select(Relation.SHARED_SEED, "input")
    assert shared["shared_init"].all()
    for side in ("input", "output"):
        assert set(result.select(Relation.SHARED_SEED, side)["population"]) == {""}
        assert set(result.population("unrelated", side)["relation"]) == {
            "different task, different seed"
        }
        assert set(result.population("replicate", side)["relation"]) == {
            "same task, different seed", "same task, different rank and seed",
        }  # fmt: skip


def test_a_population_holds_usable_modules_of_pairs_of_one_kind(sweep: list[Adapter]) -> None:
    result = study(sweep)
    for name in ("replicate", "unrelated"):
        for side in ("input", "output"):
            rows = result.population(name, side)
            pairs = result.pairs[result.pairs[f"population_{side}"] == name]
            assert len(rows) == len(pairs) * len(NAMES)
            assert rows["usable"].all()
            assert set(rows["side"]) == {side}


def test_p_values_are_numbers_with_a_floor_and_a_flag(sweep: list[Adapter]) -> None:
    rows = study(sweep).similarities
    assert rows["p_omega"].between(1e-4, 1).all()
    assert (rows["p_is_bound"] == (rows["p_omega"] <= 1e-4)).all()
    assert rows["p_is_bound"].any()
    for _, of_pair in rows.groupby(["a", "b", "side"]):
        expected = benjamini_hochberg(of_pair["p_omega"].to_numpy())
        assert of_pair["q_omega"].to_numpy() == pytest.approx(expected)


def test_an_untrained_adapter_is_named_and_compared_with_nothing(
    rng: np.random.Generator,
) -> None:
    trained = adapter(rng, label="trained")
    empty = Adapter(
        {
            name: LowRankUpdate(name=name, A=one.A, B=np.zeros_like(one.B), scale=1.0)
            for name, one in trained.items()
        },
        label="empty",
    )
    result = study([trained, empty])
    assert result.similarities.empty
    texts = [one.text for one in findings(result)]
    assert any(text.startswith("empty is untrained: ΔW is zero in all 4 modules") for text in texts)


def test_a_module_that_cannot_be_read_drops_its_adapter_and_keeps_the_rest(
    rng: np.random.Generator,
) -> None:
    def broken() -> LowRankUpdate:
        message = "file.safetensors: 'layers.1.v_proj' holds 3 non-finite values."
        raise InputError(message)

    good = [adapter(rng, label="one"), adapter(rng, label="two")]
    bad = Adapter({**dict(adapter(rng)), "layers.1.v_proj": broken}, label="bad")
    result = study([*good, bad])
    assert list(result.adapters) == ["one", "two"]
    assert not result.spectra["adapter"].eq("bad").any()
    assert len(result.pairs) == 1
    assert [one.source for one in result.failures] == ["bad"]
    assert "layers.1.v_proj" in findings(result)[0].text


def test_no_adapter_left_is_an_error_that_says_why(rng: np.random.Generator) -> None:
    def broken() -> LowRankUpdate:
        message = "it is damaged"
        raise InputError(message)

    with pytest.raises(SourceError, match="it is damaged"):
        study([Adapter({"q": broken}, label="bad")])


def test_modules_of_other_shapes_are_counted_not_compared(rng: np.random.Generator) -> None:
    small, large = adapter(rng, label="small"), adapter(rng, label="large", d_out=30)
    result = study([small, large])
    assert result.pairs["mismatched_modules"][0] == 4
    assert result.similarities.empty
    assert any("adapt different" in one.text for one in findings(result))


def test_adapters_with_nothing_in_common_are_said_to_be_so(rng: np.random.Generator) -> None:
    one = Adapter({"a.q": low_rank_update(rng, name="a.q")}, label="one")
    two = Adapter({"b.q": low_rank_update(rng, d_in=18, name="b.q")}, label="two")
    texts = [finding.text for finding in findings(study([one, two]))]
    assert "one and two adapt no module in common: nothing can be compared." in texts
    name = "lora_unet_a_q"
    kohya = Adapter({name: low_rank_update(rng, name=name)}, label="kohya")
    result = study([one, kohya])
    assert result.pairs["modules"].item() == 1
    assert "names-matched" in [finding.code for finding in findings(result)]


def test_equal_labels_are_made_unique(rng: np.random.Generator) -> None:
    result = study([adapter(rng, label="same"), adapter(rng, label="same")])
    assert list(result.adapters) == ["same", "same (2)"]
    assert result.pairs["b"][0] == "same (2)"


def test_modules_are_chosen_by_suffix_and_an_empty_choice_is_refused(
    rng: np.random.Generator,
) -> None:
    result = study([adapter(rng)], modules=["q_proj"])
    assert set(result.spectra["module_type"]) == {"q_proj"}
    with pytest.raises(InputError, match=r"No module matches 'nothing'.*4: layers.0.q_proj"):
        study([adapter(rng)], modules="nothing")


def test_amplification_equals_the_dense_formula_for_every_k(rng: np.random.Generator) -> None:
    one = adapter(rng, label="one")
    weights = {f"{name}.weight": rng.standard_normal(one[name].shape) for name in one}
    result = study([one], base=open_base(weights), draws=2)
    for row in result.amplifications.to_dict("records"):
        W = weights[f"{row['module']}.weight"].astype(np.float32).astype(np.float64)
        u, s, vt = np.linalg.svd(one[row["module"]].delta_weight())
        k = row["k"]
        projected = np.linalg.norm(u[:, :k].T @ W @ vt[:k].T)
        assert row["projected"] == pytest.approx(projected, rel=1e-9)
        assert row["amplification_factor"] == pytest.approx(
            np.linalg.norm(s[:k]) / projected, rel=1e-9
        )
        top = np.linalg.svd(W, compute_uv=False)[:k]
        assert row["projected_weight"] == pytest.approx(np.linalg.norm(top), rel=1e-9)
    assert result.amplification("one", "layers.0.q_proj").label == "one"


def test_an_unknown_scale_keeps_similarity_and_leaves_out_amplification(
    rng: np.random.Generator,
) -> None:
    plain = adapter(rng)
    unscaled = Adapter(
        {n: LowRankUpdate(name=n, A=u.A, B=u.B, scale=None) for n, u in plain.items()}, label="x"
    )
    weights = {f"{name}.weight": rng.standard_normal((24, 20)) for name in plain}
    result = study([plain, unscaled], base=open_base(weights))
    assert set(result.amplifications["adapter"]) == {"adapter"}
    assert len(result.similarities) == 8
    assert not result.runs.set_index("adapter")["scale_known"]["x"]


@pytest.mark.real
def test_the_published_rank_comparison_of_four_real_adapters(real_adapters: Path) -> None:
    from lora_analysis.formats import read_adapter

    ranks = [
        read_adapter(
            real_adapters / "sam-ring" / f"lora_rank{r}.safetensors",
            pair=("w_a_{name}", "w_b_{name}"),
            scale=1.0,
        )
        for r in (8, 16)
    ]
    table = study(ranks).similarities
    means = table.groupby("side")["phi_1_1"].mean()
    assert len(table) == 48
    assert means["input"] == pytest.approx(0.284, abs=5e-4)
    assert means["output"] == pytest.approx(0.785, abs=5e-4)
    assert table["chance_1_1"].unique() == pytest.approx([1 / 768])


def test_a_reference_is_not_compared_with_the_base(
    sweep: list[Adapter], rng: np.random.Generator
) -> None:
    weights = {f"{name}.weight": rng.standard_normal((48, 40)) for name in NAMES}
    result = study(sweep[:1], reference=sweep[3:4], base=open_base(weights), draws=0)
    assert set(result.amplifications["adapter"]) == {"turn-r4-s0"}


def test_an_unknown_rank_does_not_hide_another_task_and_seed(sweep: list[Adapter]) -> None:
    a, b = (
        Adapter(dict(one), label="x", provenance=Provenance(task=task, seed=seed))
        for one, task, seed in ((sweep[0], "turn", 0), (sweep[3], "flip", 1))
    )
    assert relation(a, b) == Relation.OTHER_TASK
    other = Adapter(dict(b), label="y", provenance=Provenance(task="turn", seed=1))
    assert relation(a, other) == "unknown"


def test_adapters_of_two_bases_are_no_reference_for_each_other(sweep: list[Adapter]) -> None:
    a, b = (
        Adapter({}, label="x", provenance=Provenance(task=task, seed=seed, rank=4, base_model=base))
        for task, seed, base in (("turn", 0, "gpt2"), ("flip", 1, "llama"))
    )
    assert relation(a, b) == Relation.OTHER_BASE


def test_a_module_without_a_base_weight_is_a_finding_and_the_rest_goes_on(
    rng: np.random.Generator,
) -> None:
    one = adapter(rng, label="one")
    weights = {f"{name}.weight": rng.standard_normal((24, 20)) for name in list(one)[:3]}
    result = study([one], base=open_base(weights), draws=0)
    assert set(result.amplifications["module"]) == set(list(one)[:3])
    assert list(result.unmatched) == ["layers.1.v_proj"]
    assert any("layers.1.v_proj" in o.text for o in findings(result) if o.severity == "limit")
    with pytest.raises(BaseWeightError):
        study([one], base=open_base({"other.weight": np.ones((24, 20))}), draws=0)


def test_adapters_without_a_module_are_refused() -> None:
    with pytest.raises(SourceError, match="no module in any"):
        study([Adapter({}, label="empty")])


# --- W's whole spectra ------------------------------------------------------------------------


def test_changes_are_those_of_each_adapter_held_against_w_alone(
    rng: np.random.Generator, sweep: list[Adapter]
) -> None:
    weights = {f"{name}.weight": rng.standard_normal((48, 40)) for name in NAMES}
    result = study(sweep[:2], base=open_base(weights), draws=0, weight_spectra=True)
    assert len(result.changes) == 2 * len(NAMES) * 2
    for one in sweep[:2]:
        rows = result.changes[result.changes["adapter"] == one.label]
        for name in NAMES:
            W = weights[f"{name}.weight"].astype(np.float32).astype(float)
            D = one[name].delta_weight()
            shares, off = reference.basis_energy(W, D)
            cosines = reference.largest_cosines(W, D, 10)
            for side in ("input", "output"):
                (row,) = rows[(rows["module"] == name) & (rows["side"] == side)].to_dict("records")
                assert row["k"] == 4
                assert row["leading_energy"] == pytest.approx(shares[side][:4].sum())
                assert row["trailing_energy"] == pytest.approx(shares[side][-4:].sum())
                assert row["off_principal"] == pytest.approx(off[3])
                assert row["intruders"] == int((cosines[side] < 0.5).sum())
                assert row["smallest_cosine"] == pytest.approx(cosines[side].min())
                turn = reference.vector_changes(W, D)[side][1]
                assert row["direction_change"] == pytest.approx(turn.mean())


def test_whole_spectra_are_left_alone_unless_asked_for(
    rng: np.random.Generator, sweep: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lora_analysis.studies.module_analysis.weight_svd", lambda _: pytest.fail("not asked")
    )
    weights = {f"{name}.weight": rng.standard_normal((48, 40)) for name in NAMES}
    result = study(sweep[:2], base=open_base(weights), draws=0)
    assert result.changes.empty
    assert "intruders" in result.changes


def test_updates_of_one_weight_under_two_names_are_both_held_against_it(
    rng: np.random.Generator,
) -> None:
    W = rng.standard_normal((24, 20))
    plain = low_rank_update(rng, name="layers.0.q")
    shared = LowRankUpdate(
        "layers.1.q", plain.A, plain.B, plain.scale, base_name="layers.0.q", label="adapter"
    )
    one = Adapter({"layers.0.q": plain, "layers.1.q": shared}, label="adapter")
    other = Adapter({"layers.1.q": low_rank_update(rng, name="layers.1.q")}, label="plain")
    base = open_base({"layers.0.q": W, "layers.1.q": rng.standard_normal((24, 20))})
    table = study([one, other], base=base).amplifications
    full = table[table["at_rank"] & (table["adapter"] == "adapter")].set_index("module")
    columns = ["projected", "weight_norm", "enrichment"]
    np.testing.assert_allclose(full.loc["layers.0.q", columns], full.loc["layers.1.q", columns])
    own = table[table["at_rank"] & (table["adapter"] == "plain")]
    assert own["weight_norm"].item() != full["weight_norm"].iloc[0]
