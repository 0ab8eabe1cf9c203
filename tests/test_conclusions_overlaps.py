"""Conclusions about pairs: reference, ranks, seeds, strangers, shared initializations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from factories import adapter, low_rank_update, orthonormal, planted_update
from test_studies import sweep  # noqa: F401  (a fixture)

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.conclusions import Conclusion, findings, summarize_overlaps
from lora_analysis.finding import Finding
from lora_analysis.report.pair_tables import conclusions_table
from lora_analysis.studies import Relation, Study, study


def of_code(result: Study | Sequence[Finding], code: str) -> list[Finding]:
    """Return the findings of one code."""
    every = findings(result) if isinstance(result, Study) else result
    return [finding for finding in every if finding.code == code]


def side_of(finding: Finding, side: str) -> dict[str, Any]:
    """Return the fields of one side of a finding."""
    (fields,) = (fields for fields in finding.fields["sides"] if fields["side"] == side)
    return dict(fields)


def unlabeled(adapters: list[Adapter]) -> list[Adapter]:
    """Return the adapters as strangers publish them: no task, no seed."""
    return [
        Adapter(dict(one), label=one.label, provenance=Provenance(rank=one.provenance.rank))
        for one in adapters
    ]


def on_base(one: Adapter, base: str, label: str, **fields: Any) -> Adapter:
    """Return the adapter as one of the given base model."""
    provenance = replace(one.provenance, base_model=base, **fields)
    return Adapter(dict(one), label=label, provenance=provenance)


def test_findings_tell_the_planted_story(sweep: list[Adapter]) -> None:  # noqa: F811
    every = findings(study(sweep))
    seeds = of_code(every, "overlap-of-seeds")[0]
    assert "output side more alike than unrelated adapters" in seeds.text
    assert side_of(seeds, "output")["conclusion"] == Conclusion.MORE_ALIKE
    ranks = of_code(every, "overlap-of-ranks")[0]
    start = "Rank 4 and rank 8 on the same task, different seeds: output side more alike than"
    assert ranks.text.startswith(start)
    output = side_of(ranks, "output")
    assert output["median"] > 0.9
    assert output["reference"] < 0.3
    (shared,) = of_code(every, "shared-seed")
    assert shared.severity == "artifact"
    side = side_of(shared, "input")
    assert side["phi_r_r"] > 0.9 > side["reference"]
    codes = [finding.code for finding in every]
    assert codes.index("reference-pairs") < codes.index("overlap-of-ranks")


def test_without_reference_pairs_a_comparison_is_inconclusive(rng: np.random.Generator) -> None:
    every = findings(study([adapter(rng, label="a"), adapter(rng, label="b")]))
    assert of_code(every, "no-reference-pairs")
    (pair,) = of_code(every, "overlap-of-pair")
    assert pair.text.startswith("a and b: output side inconclusive without reference pairs (median")
    assert {side["conclusion"] for side in pair.fields["sides"]} == {Conclusion.NO_REFERENCE}
    assert all(side["above_reference"] is None for side in pair.fields["sides"])


def test_inconclusive_comparisons_are_summed_up_in_one_finding(rng: np.random.Generator) -> None:
    result = study([adapter(rng, label=f"a{n}") for n in range(3)])
    every = findings(result)
    (finding,) = of_code(every, "overlaps-inconclusive")
    assert not of_code(every, "overlap-of-pair")
    compared = [part["compared"] for part in finding.fields["comparisons"]]
    assert compared == ["a0 and a1", "a0 and a2", "a1 and a2"]
    # The two sides differ in dimension here, so the excess takes the place of φ.
    start = "3 comparisons are inconclusive without reference pairs. Median φ(1,1) excess"
    assert finding.text.startswith(start)
    table = result.similarities[result.similarities["degeneracy_1_1"] == ""]
    excess = (table["phi_1_1"] - table["chance_1_1"]) / (1 - table["chance_1_1"])
    medians = excess.groupby([table["side"], table["a"], table["b"]]).median()
    for side in ("output", "input"):
        expected = [medians[side].min(), medians[side].max()]
        assert side_of(finding, side)["medians"] == pytest.approx(expected)
    shown = conclusions_table(every)
    assert shown is not None
    assert len(shown.rows) == 3 * 2
    assert {row[2] for row in shown.rows} == {"inconclusive without reference pairs"}


def test_adapters_named_as_reference_make_a_conclusion_possible(
    sweep: list[Adapter],  # noqa: F811
) -> None:
    turn0, turn1, flip0, flip1, _ = unlabeled(sweep)
    result = study([turn0, turn1], reference=[flip1])
    assert result.reference == ("flip-r4-s1",)
    assert set(result.pairs["relation"]) == {"unknown", Relation.REFERENCE}
    assert len(result.pairs) == 3
    (few,) = of_code(result, "overlap-of-pair")
    output = side_of(few, "output")
    assert output["conclusion"] == Conclusion.FEW_REFERENCE_PAIRS
    assert output["reference_pairs"] == 2
    (enough,) = of_code(study([turn0, turn1], reference=[flip0, flip1]), "overlap-of-pair")
    start = "turn-r4-s0 and turn-r4-s1: output side more alike than unrelated adapters"
    assert enough.text.startswith(start)


def test_unrelated_adapters_are_never_called_more_alike(rng: np.random.Generator) -> None:
    conclusions = []
    for at in range(20):
        made = [adapter(rng, label=f"{at}-{k}", modules=4) for k in range(5)]
        (pair,) = of_code(study(made[:2], reference=made[2:]), "overlap-of-pair")
        conclusions += [side["conclusion"] for side in pair.fields["sides"]]
    assert Conclusion.MORE_ALIKE not in conclusions
    assert conclusions.count(Conclusion.NOT_DISTINGUISHABLE) >= 36


def test_degenerate_first_directions_do_not_count(rng: np.random.Generator) -> None:
    equal = np.array([1.0, 1.0, 0.5, 0.2])
    updates = [
        planted_update(orthonormal(rng, 24, 4), values, orthonormal(rng, 20, 4))
        for values in (equal, np.array([4.0, 2.0, 1.0, 0.5]))
    ]
    result = study([Adapter({"q": one}, label=str(at)) for at, one in enumerate(updates)])
    assert set(result.similarities["degeneracy_1_1"]) == {"degenerate"}
    assert summarize_overlaps(result.similarities) is None
    (undefined,) = of_code(result, "overlap-undefined")
    assert undefined.text.startswith("0 and 1: φ(1,1) is undefined")
    (counted,) = of_code(result, "degenerate-directions")
    assert counted.fields == {
        "count": 1, "comparisons": 1, "degenerate": 1, "nearly_degenerate": 0,
    }  # fmt: skip


def test_one_run_twice_counts_in_no_result(
    sweep: list[Adapter],  # noqa: F811
    rng: np.random.Generator,
) -> None:
    first = unlabeled(sweep)[0]
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
    assert summarize_overlaps(result.similarities) is None
    every = findings(result)
    assert not of_code(every, "overlap-of-pair") + of_code(every, "overlap-undefined")
    (same,) = of_code(every, "same-run")
    assert "They are one sample, not two" in same.text


def test_many_pairs_with_a_shared_initialization_are_one_finding(rng: np.random.Generator) -> None:
    """Every A is that of the first; counts in the sentence are whole numbers."""
    first = adapter(rng, label="0")
    made = [first]
    for n in range(1, 5):
        updates = {
            name: replace(one, B=rng.standard_normal(one.B.shape))  # type: ignore[type-var]
            for name, one in first.items()
        }
        made.append(Adapter(updates, label=str(n)))
    (shared,) = of_code(study(made), "shared-initialization")
    assert shared.fields["pairs"] == 10
    assert shared.text.startswith(
        "10 pairs (medians), for example 0 and 1: shared initialization of A in all 4 modules"
    )


def test_modules_of_several_dimensions_are_summarized_by_their_excess(
    rng: np.random.Generator,
) -> None:
    def mixed(label: str) -> Adapter:
        shapes = {"a.q": (48, 40), "a.up": (200, 40)}
        return Adapter(
            {n: low_rank_update(rng, *shape, 3, name=n) for n, shape in shapes.items()},
            label=label,
        )

    result = study([mixed("one"), mixed("two")])
    output = result.similarities.query("side == 'output'")
    summary = summarize_overlaps(output)
    assert summary is not None
    assert summary.is_excess
    excess = (output["phi_1_1"] - output["chance_1_1"]) / (1 - output["chance_1_1"])
    assert summary.median == pytest.approx(excess.median())
    other = summarize_overlaps(result.similarities.query("side == 'input'"))
    assert other is not None
    assert not other.is_excess
    (pair,) = of_code(result, "overlap-of-pair")
    assert {side["quantity"] for side in pair.fields["sides"]} == {"φ(1,1) excess"}


def test_unrelated_adapters_of_another_base_set_no_reference(
    sweep: list[Adapter],  # noqa: F811
) -> None:
    ours = [on_base(one, "first", one.label) for one in sweep]
    # On the other base, every task writes the same directions: unrelated pairs agree there.
    alike = [
        on_base(one, "second", f"{task}{seed}", task=task, seed=seed)
        for task in ("a", "b")
        for one, seed in zip(sweep[:2], (5, 6), strict=True)
    ]
    codes = {"overlap-of-seeds", "overlap-of-ranks", "too-few-runs", "shared-seed",
             "largest-overlap"}  # fmt: skip
    alone = [[one for one in findings(study(some)) if one.code in codes]
             for some in (ours, alike)]  # fmt: skip
    mixed = findings(study([*ours, *alike]))
    assert {one.code for one in alone[0]} == codes
    for own, base in zip(alone, ("first", "second"), strict=True):
        # What is said of each base is what is said where it is alone: nothing is pooled.
        for one in own:
            assert one not in mixed
            assert Finding(one.code, {**one.fields, "base": base}) in mixed
    references = of_code(mixed, "reference-pairs")
    assert [one.fields["base"] for one in references] == ["first", "second"]
    first, second = (side_of(one, "output")["median"] for one in references)
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

    names = ["layers.0.q_proj", "layers.0.up"]
    pair = [made("a", names[:1]), made("b", names)]
    others = [made(f"other{i}", names) for i in range(3)]
    result = study(pair, reference=others)
    (finding,) = of_code(result, "overlap-of-pair")
    rows = result.select(Relation.REFERENCE, "output")
    assert rows["phi_1_1"].max() == pytest.approx(1)
    own = rows.loc[rows["module_type"] == "q_proj", "phi_1_1"]
    assert side_of(finding, "output")["reference"] == pytest.approx(own.median())
    elsewhere = study([made("a", ["layers.0.k_proj"]), made("b", ["layers.0.k_proj"])],
                      reference=others)  # fmt: skip
    (finding,) = of_code(elsewhere, "overlap-of-pair")
    assert side_of(finding, "output")["conclusion"] == Conclusion.NO_REFERENCE


def test_a_group_and_its_reference_are_on_one_scale(rng: np.random.Generator) -> None:
    """Adapters of square modules against a reference that has others: both as excess."""
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
    (finding,) = of_code(result, "overlap-of-pair")
    rows = result.select(Relation.UNKNOWN, "output")
    expected = ((rows["phi_1_1"] - 1 / 40) / (1 - 1 / 40)).median()
    assert side_of(finding, "output")["median"] == pytest.approx(expected, abs=1e-12)
    assert {side["quantity"] for side in finding.fields["sides"]} == {"φ(1,1) excess"}


def test_the_largest_of_many_stands_next_to_the_maximum_of_as_many_random_values(
    rng: np.random.Generator,
) -> None:
    result = study([adapter(rng, label=str(n)) for n in range(4)])
    (finding,) = of_code(result, "largest-overlap")
    rows = result.similarities[result.similarities["side"] == "output"]
    rows = rows[rows["degeneracy_1_1"] == ""]
    assert finding.fields["count"] == len(rows)
    assert finding.fields["phi_1_1"] == pytest.approx(rows["phi_1_1"].max())
    others = rng.standard_normal((400, len(rows), 24))
    lines = others[..., 0] ** 2 / (others**2).sum(axis=-1)
    expected = lines.max(axis=1).mean()
    assert finding.fields["expected_maximum"] == pytest.approx(expected, rel=0.05)
