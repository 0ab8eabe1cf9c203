from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
from factories import adapter, low_rank_update, orthonormal, planted_update
from safetensors.numpy import save_file

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.bases import open_base
from lora_analysis.conclusions import findings, level, number
from lora_analysis.errors import BaseWeightError, InputError, SourceError
from lora_analysis.report.pair_tables import verdicts_table
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
    assert relation(turn0, flip1) == Relation.REFERENCE
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


def test_a_shared_seed_is_found_and_kept_out_of_the_input_side(sweep: list[Adapter]) -> None:
    result = study(sweep)
    starts = result.pairs.set_index(["a", "b"])["initialization"]
    assert starts["turn-r4-s0", "flip-r4-s0"] == "shared initialization"
    assert starts["turn-r4-s0", "flip-r4-s1"] == "independent"
    shared = result.select(Relation.SHARED_SEED, "input")
    assert shared["shared_init"].all()
    assert level(shared) is None
    assert level(result.select(Relation.SHARED_SEED, "output")) is not None


def test_findings_tell_the_planted_story(sweep: list[Adapter]) -> None:
    said = findings(study(sweep))
    by_topic = {}
    for one in said:
        by_topic.setdefault(one.topic, []).append(one)
    seeds = by_topic["seeds"][0]
    assert "share their first output direction" in seeds.text
    assert seeds.values["verdict_output"] == "share"
    ranks = by_topic["ranks"][0]
    start = "Rank 4 and rank 8 on the same task with other seeds share their first output"
    assert ranks.text.startswith(start)
    assert ranks.values["phi_1_1_output"] > 0.9
    assert ranks.values["reference_output"] < 0.3
    shared = by_topic["shared seed"][0]
    assert shared.kind == "artifact"
    assert shared.values["input"] > 0.9 > shared.values["input_reference"]
    assert [one.topic for one in said].index("reference") < [one.topic for one in said].index(
        "ranks"
    )


def test_without_a_reference_there_is_no_verdict(rng: np.random.Generator) -> None:
    said = findings(study([adapter(rng, label="a"), adapter(rng, label="b")]))
    texts = " ".join(one.text for one in said)
    assert "no reference" in texts
    assert "no verdict on the output side (no reference)" in texts
    assert "share" not in next(one.text for one in said if one.topic == "pairs")


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
    assert [finding.code for finding in findings(result) if finding.code] == ["names-matched"]


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


def test_ill_defined_first_directions_do_not_count(rng: np.random.Generator) -> None:
    equal = np.array([1.0, 1.0, 0.5, 0.2])
    updates = [
        planted_update(orthonormal(rng, 24, 4), values, orthonormal(rng, 20, 4))
        for values in (equal, np.array([4.0, 2.0, 1.0, 0.5]))
    ]
    result = study([Adapter({"q": one}, label=str(at)) for at, one in enumerate(updates)])
    assert set(result.similarities["degeneracy_1_1"]) == {"degenerate"}
    assert level(result.similarities) is None
    text = next(one.text for one in findings(result) if one.topic == "pairs")
    assert "no first direction is well defined" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.613, "0.61"), (0.0394, "0.039"), (0.0013, "0.0013"), (1.5e-7, "1.5e-07"),
     (12.34, "12.3"), (3.14159, "3.14"), (float("nan"), "–"), (12345.0, "1.2e+04")],
)  # fmt: skip
def test_numbers_in_sentences_keep_two_digits_that_matter(value: float, text: str) -> None:
    assert number(value) == text


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


def test_comparisons_without_a_verdict_are_summed_up_in_one_sentence(
    rng: np.random.Generator,
) -> None:
    result = study([adapter(rng, label=f"a{n}") for n in range(3)])
    said = findings(result)
    (one,) = (one for one in said if one.topic == "no verdict")
    assert not [one for one in said if one.topic == "pairs"]
    assert [part.values["subject"] for part in one.parts] == ["a0 and a1", "a0 and a2", "a1 and a2"]
    assert one.text.startswith("3 comparisons have no verdict (no reference). Their medians of")
    table = result.similarities[result.similarities["degeneracy_1_1"] == ""]
    # The two sides differ in dimension here: what is told is how far φ lies above chance.
    assert "φ(1,1) above chance" in one.text
    excess = (table["phi_1_1"] - table["chance_1_1"]) / (1 - table["chance_1_1"])
    medians = excess.groupby([table["side"], table["a"], table["b"]]).median()
    for side in ("output", "input"):
        assert one.values[f"lowest_{side}"] == pytest.approx(medians[side].min())
        assert one.values[f"highest_{side}"] == pytest.approx(medians[side].max())
    shown = verdicts_table(said)
    assert shown is not None
    assert len(shown.rows) == 3 * 2
    assert {row[2] for row in shown.rows} == {"no verdict"}


def relabeled(adapters: list[Adapter]) -> list[Adapter]:
    """The same adapters as strangers publish them: no task, no seed."""
    return [
        Adapter(dict(one), label=one.label, provenance=Provenance(rank=one.provenance.rank))
        for one in adapters
    ]


def test_adapters_named_as_reference_make_a_verdict_possible(sweep: list[Adapter]) -> None:
    turn0, turn1, flip0, flip1, _ = relabeled(sweep)
    alone = findings(study([turn0, turn1]))
    assert "no verdict on the output side (no reference)" in next(
        o.text for o in alone if o.topic == "pairs"
    )
    result = study([turn0, turn1], reference=[flip1])
    assert result.reference == ("flip-r4-s1",)
    assert set(result.pairs["relation"]) == {"unknown", Relation.REFERENCE}
    assert len(result.pairs) == 3
    said = next(one for one in findings(result) if one.topic == "pairs")
    assert "a reference of 2 pairs is too small" in said.text
    result = study([turn0, turn1], reference=[flip0, flip1])
    said = next(one for one in findings(result) if one.topic == "pairs")
    assert said.text.startswith("turn-r4-s0 and turn-r4-s1 share their first output direction")


def test_a_reference_is_not_held_against_the_base(
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
    assert relation(a, b) == Relation.REFERENCE
    other = Adapter(dict(b), label="y", provenance=Provenance(task="turn", seed=1))
    assert relation(a, other) == "unknown"


def test_adapters_of_two_bases_are_no_reference_for_each_other(sweep: list[Adapter]) -> None:
    a, b = (
        Adapter({}, label="x", provenance=Provenance(task=task, seed=seed, rank=4, base_model=base))
        for task, seed, base in (("turn", 0, "gpt2"), ("flip", 1, "llama"))
    )
    assert relation(a, b) == Relation.OTHER_BASE


def test_one_run_twice_counts_in_no_result(sweep: list[Adapter], rng: np.random.Generator) -> None:
    first = relabeled(sweep)[0]
    later = Adapter(
        {
            name: LowRankUpdate(name=name, A=one.A + 0.01, B=one.B * 1.1, scale=one.scale)
            for name, one in first.items()
        },
        label="later",
        provenance=first.provenance,
    )
    result = study([first, later])
    assert result.pairs["initialization"][0] == "same training run"
    assert level(result.similarities) is None
    said = findings(result)
    assert "pairs" not in {one.topic for one in said}
    assert any("They are one sample, not two" in one.text for one in said)


def test_untrained_adapters_of_known_tasks_do_not_break_the_findings(
    sweep: list[Adapter],
) -> None:
    empty = [
        Adapter(
            {
                n: LowRankUpdate(name=n, A=u.A, B=np.zeros_like(u.B), scale=1.0)
                for n, u in o.items()
            },
            label=o.label,
            provenance=o.provenance,
        )
        for o in (sweep[0], sweep[2])
    ]
    texts = [one.text for one in findings(study(empty))]
    assert sum("is untrained" in text for text in texts) == 2


def test_modules_of_other_dimensions_are_averaged_above_chance(rng: np.random.Generator) -> None:
    def mixed(label: str) -> Adapter:
        shapes = {"a.q": (48, 40), "a.up": (200, 40)}
        return Adapter(
            {n: low_rank_update(rng, *shape, 3, name=n) for n, shape in shapes.items()},
            label=label,
        )

    result = study([mixed("one"), mixed("two")])
    output = result.similarities.query("side == 'output'")
    found = level(output)
    assert found is not None
    assert found.above_chance
    excess = (output["phi_1_1"] - output["chance_1_1"]) / (1 - output["chance_1_1"])
    assert found.median == pytest.approx(excess.median())
    assert not level(result.similarities.query("side == 'input'")).above_chance
    text = next(one.text for one in findings(result) if one.topic == "pairs")
    assert "φ(1,1) above chance" in text


def test_a_module_without_a_base_weight_is_a_finding_and_the_rest_goes_on(
    rng: np.random.Generator,
) -> None:
    one = adapter(rng, label="one")
    weights = {f"{name}.weight": rng.standard_normal((24, 20)) for name in list(one)[:3]}
    result = study([one], base=open_base(weights), draws=0)
    assert set(result.amplifications["module"]) == set(list(one)[:3])
    assert list(result.unmatched) == ["layers.1.v_proj"]
    assert any("layers.1.v_proj" in o.text for o in findings(result) if o.kind == "limit")
    with pytest.raises(BaseWeightError):
        study([one], base=open_base({"other.weight": np.ones((24, 20))}), draws=0)


def test_adapters_without_a_module_are_refused() -> None:
    with pytest.raises(SourceError, match="no module in any"):
        study([Adapter({}, label="empty")])


def test_unrelated_adapters_are_never_said_to_share_a_direction(rng: np.random.Generator) -> None:
    verdicts = []
    for at in range(20):
        made = [adapter(rng, label=f"{at}-{k}", modules=4) for k in range(5)]
        result = study(made[:2], reference=made[2:])
        said = next(one for one in findings(result) if one.topic == "pairs")
        verdicts += [said.values["verdict_output"], said.values["verdict_input"]]
    assert "share" not in verdicts
    assert verdicts.count("no more") >= 36


def test_ranks_are_held_against_w_at_equal_k_and_on_equal_tasks(
    sweep: list[Adapter], rng: np.random.Generator
) -> None:
    weights = {f"{name}.weight": rng.standard_normal((48, 40)) for name in NAMES}
    result = study(sweep, base=open_base(weights), draws=0)
    full, equal = (one for one in findings(result) if one.topic == "amplification")
    table = result.amplifications
    turn = table[table["adapter"].str.startswith("turn")]  # flip was trained at rank 4 only
    rank8 = turn["adapter"] == "turn-r8-s0"
    own = turn[~rank8 & turn["at_rank"]]["enrichment"].median()
    assert full.values["enrichment_rank_4"] == pytest.approx(own)
    assert equal.values["enrichment_k4_rank_8"] == pytest.approx(
        turn[rank8 & (turn["k"] == 4)]["enrichment"].median()
    )


def test_several_base_models_are_named(rng: np.random.Generator) -> None:
    made = [
        Adapter(dict(adapter(rng)), label=base, provenance=Provenance(base_model=base))
        for base in ("org/one", "org/two")
    ]
    text = next(one.text for one in findings(study(made)) if one.topic == "several bases")
    assert "org/one (1 adapter), org/two (1 adapter)" in text
    assert "1 pair across them not compared" in text


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


def on_base(one: Adapter, base: str, label: str, **fields: object) -> Adapter:
    provenance = replace(one.provenance, base_model=base, **fields)
    return Adapter(dict(one), label=label, provenance=provenance)


def test_unrelated_adapters_of_another_base_set_no_reference(sweep: list[Adapter]) -> None:
    ours = [on_base(one, "first", one.label) for one in sweep]
    # On the other base, every task writes the same directions: unrelated pairs agree there.
    alike = [
        on_base(one, "second", f"{task}{seed}", task=task, seed=seed)
        for task in ("a", "b")
        for one, seed in zip(sweep[:2], (5, 6), strict=True)
    ]
    topics = ("seeds", "ranks", "runs", "shared seed", "largest")
    alone = [[one for one in findings(study(some)) if one.topic in topics]
             for some in (ours, alike)]  # fmt: skip
    mixed = findings(study([*ours, *alike]))
    texts = {one.text for one in mixed}
    assert {one.topic for one in alone[0]} == set(topics)
    for own, base in zip(alone, ("first", "second"), strict=True):
        # What is said of each base is what is said where it is alone: nothing is pooled.
        for one in own:
            assert one.text not in texts
            assert one.text in {text.replace(f" on {base}", "") for text in texts}
    references = [one for one in mixed if one.topic == "reference"]
    assert [one.values["base"] for one in references] == ["first", "second"]
    first, second = (one.values["phi_1_1_output"] for one in references)
    assert isinstance(first, float)
    assert isinstance(second, float)
    assert first < 0.2
    assert second > 0.8


def test_the_reference_is_of_the_types_of_module_that_a_pair_has(rng: np.random.Generator) -> None:
    """Unrelated adapters agree in ``up``: a pair that adapts ``q_proj`` alone is not held to it."""

    def graded(name: str, label: str) -> LowRankUpdate:
        one = low_rank_update(rng, 40, 40, 2, name=name, label=label)
        return replace(one, B=one.B * [5, 1])  # so that its first direction is well defined

    shared = graded("layers.0.up", "")

    def made(label: str, names: list[str]) -> Adapter:
        updates = {name: graded(name, label) for name in names}
        if "layers.0.up" in updates:
            updates["layers.0.up"] = replace(shared, label=label)
        return Adapter(updates, label=label)

    both = ["layers.0.q_proj", "layers.0.up"]
    pair = [made("a", both[:1]), made("b", both)]
    others = [made(f"other{i}", both) for i in range(3)]
    result = study(pair, reference=others)
    said = next(one for one in findings(result) if one.topic == "pairs")
    rows = result.select(Relation.REFERENCE, "output")
    assert rows["phi_1_1"].max() == pytest.approx(1)
    own = rows.loc[rows["module_type"] == "q_proj", "phi_1_1"]
    assert said.values["reference_output"] == pytest.approx(own.median())
    elsewhere = study([made("a", ["layers.0.k_proj"]), made("b", ["layers.0.k_proj"])],
                      reference=others)  # fmt: skip
    said = next(one for one in findings(elsewhere) if one.topic == "pairs")
    assert said.values["reason_output"] == "no reference"


def test_what_is_held_against_the_reference_is_on_its_scale(rng: np.random.Generator) -> None:
    """Adapters of square modules against a reference that has others: both above chance."""
    shapes = {"layers.0.q_proj": (40, 40), "layers.0.v_proj": (40, 40), "layers.0.up": (80, 60)}

    def made(label: str, names: list[str]) -> Adapter:
        updates = {
            name: low_rank_update(rng, *shapes[name], rank=2, name=name, label=label)
            for name in names
        }
        return Adapter(updates, label=label)

    square = list(shapes)[:2]
    pair = [made("a", list(shapes)), made("b", square)]
    others = [made(f"other{i}", list(shapes)) for i in range(3)]
    result = study(pair, reference=others)
    said = next(one for one in findings(result) if one.topic == "pairs")
    rows = result.select("unknown", "output")
    expected = ((rows["phi_1_1"] - 1 / 40) / (1 - 1 / 40)).median()
    assert said.values["phi_1_1_output"] == pytest.approx(expected, abs=1e-12)
    assert said.values["above_chance_output"] is True
    assert said.values["above_chance_input"] is True


def test_an_adapter_of_another_base_is_not_held_against_this_one(
    sweep: list[Adapter], tmp_path: Path, rng: np.random.Generator
) -> None:
    weights = {f"{name}.weight": rng.standard_normal((48, 40)) for name in NAMES}
    place = tmp_path / "first-awq"
    place.mkdir()
    save_file(weights, place / "model.safetensors")
    ours = on_base(sweep[0], "somebody/First", "ours")
    theirs = on_base(sweep[1], "somebody/first-instruct", "theirs")
    result = study([ours, theirs, sweep[2]], base=open_base(place))
    assert set(result.amplifications["adapter"]) == {"ours", sweep[2].label}
    said = [one.text for one in findings(result) if one.topic == "other base"]
    assert said == ["theirs names another base than first-awq: not held against it."]
    # Where all name one base, it may lie on this disk under another name: held, and said.
    alone = study([theirs], base=open_base(place))
    assert set(alone.amplifications["adapter"]) == {"theirs"}
    (one,) = (one for one in findings(alone) if one.topic == "other base")
    assert "somebody/first-instruct" in one.text
    assert not [one for one in findings(study([ours], base=open_base(place)))
                if one.topic == "other base"]  # fmt: skip
    shutil.copytree(place, tmp_path / "model")  # a name that says nothing contradicts none
    nothing = study([theirs], base=open_base(tmp_path / "model"))
    assert "other base" not in {one.topic for one in findings(nothing)}
    unnamed = study([ours, theirs], base=open_base(weights))  # arrays have no name
    assert set(unnamed.amplifications["adapter"]) == {"ours", "theirs"}
