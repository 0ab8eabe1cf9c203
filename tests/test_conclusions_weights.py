"""Findings about ΔW next to W: controls of the enrichment, trends over ranks, directions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from factories import low_rank_update, orthonormal, planted_update
from test_conclusions_overlaps import of_code
from test_studies import sweep  # noqa: F401  (a fixture)

from lora_analysis.adapter import Adapter, Provenance
from lora_analysis.bases import open_base
from lora_analysis.finding import Finding
from lora_analysis.finding.templates import fill
from lora_analysis.report.tables import cell
from lora_analysis.studies import Study, study

D_OUT, D_IN = 32, 28
NAMES = [f"layers.{i}.q_proj" for i in range(3)]
CONTROLS = ("enrichment-specific", "enrichment-not-specific", "enrichment-untested")


@pytest.fixture
def weights(rng: np.random.Generator) -> dict[str, Any]:
    """Weights with a falling spectrum, as trained ones have."""
    spectrum = 0.8 ** np.arange(D_IN)
    return {n: (orthonormal(rng, D_OUT, D_IN) * spectrum) @ orthonormal(rng, D_IN, D_IN).T
            for n in NAMES}  # fmt: skip


def random_adapter(
    rng: np.random.Generator, task: str | None, seed: int | None, *, rank: int = 2
) -> Adapter:
    """An adapter with random directions."""
    label = f"{task}-r{rank}-s{seed}"
    updates = {n: low_rank_update(rng, D_OUT, D_IN, rank, name=n, label=label) for n in NAMES}
    provenance = Provenance(task=task, seed=seed, rank=rank)
    return Adapter(updates, label=label, provenance=provenance)


def through(
    rng: np.random.Generator, weights: dict[str, Any], task: str, seed: int, *, rank: int = 2
) -> Adapter:
    """An adapter whose directions are random ones that passed through the weight."""
    label = f"{task}-r{rank}-s{seed}"
    updates = {}
    for name, W in weights.items():
        U = np.linalg.qr(W @ rng.standard_normal((D_IN, rank)))[0]
        V = np.linalg.qr(W.T @ rng.standard_normal((D_OUT, rank)))[0]
        values = np.linspace(2, 1, rank)
        updates[name] = planted_update(U, values, V, name=name, label=label)
    provenance = Provenance(task=task, seed=seed, rank=rank)
    return Adapter(updates, label=label, provenance=provenance)


def copied(weights: dict[str, Any], task: str, seed: int, *, rank: int = 2) -> Adapter:
    """An adapter whose directions are the strongest ones of the weight, pair by pair."""
    label = f"{task}-r{rank}-s{seed}"
    updates = {}
    for name, W in weights.items():
        U, _, Vt = np.linalg.svd(W)
        values = np.linspace(2, 1, rank)
        updates[name] = planted_update(U[:, :rank], values, Vt[:rank].T, name=name, label=label)
    return Adapter(updates, label=label, provenance=Provenance(task=task, seed=seed, rank=rank))


def analyzed(
    adapters: list[Adapter], weights: dict[str, Any], reference: list[Adapter] | None = None
) -> Study:
    base = open_base({f"{name}.weight": W for name, W in weights.items()})
    return study(adapters, base=base, reference=reference or [], draws=0)


def controls_of(result: Study) -> Finding:
    (finding,) = (finding for code in CONTROLS for finding in of_code(result, code))
    return finding


# --- controls ---------------------------------------------------------------------------------


def test_a_study_crosses_unrelated_adapters_and_has_the_dense_numbers(
    rng: np.random.Generator, weights: dict[str, Any]
) -> None:
    ours = [random_adapter(rng, "a", 0), random_adapter(rng, "a", 1)]
    others = [random_adapter(rng, "b", 2), random_adapter(rng, "c", 0)]
    reference = [random_adapter(rng, "z", 9, rank=1)]
    result = analyzed([*ours, *others], weights, reference)
    # Not the same task, not the same seed; reference adapters have no rows of their own.
    assert result.amplification("a-r2-s0", NAMES[0]).crossed.partners == ("b-r2-s2", "z-r1-s9")  # type: ignore[union-attr]
    assert set(result.amplifications["adapter"]) == {one.label for one in (*ours, *others)}
    adapters = {one.label: one for one in (*ours, *others, *reference)}
    for row in result.amplifications.to_dict("records"):
        partners = result.amplification(row["adapter"], row["module"]).crossed.partners  # type: ignore[union-attr]
        W = weights[row["module"]].astype(np.float32).astype(np.float64)
        k, values = row["k"], []
        u, _, vt = np.linalg.svd(adapters[row["adapter"]][row["module"]].delta_weight())
        for partner in partners:
            update = adapters[partner][row["module"]]
            if update.rank < k:
                continue
            pu, _, pvt = np.linalg.svd(update.delta_weight())
            values += [np.linalg.norm(u[:, :k].T @ W @ pvt[:k].T),
                       np.linalg.norm(pu[:, :k].T @ W @ vt[:k].T)]  # fmt: skip
        expected = np.median(values) / (np.linalg.norm(W) * k / np.sqrt(D_OUT * D_IN))
        assert row["enrichment_crossed"] == pytest.approx(expected, rel=1e-9)
        assert row["enrichment_through_weight"] > 2


def test_adapters_without_labels_are_crossed_with_the_reference_alone(
    rng: np.random.Generator, weights: dict[str, Any]
) -> None:
    # Names that no common pattern matches.
    ours = [random_adapter(rng, None, seed).with_label(f"adapter {seed}") for seed in (0, 1)]
    result = analyzed(ours, weights)
    assert result.amplification(ours[0].label, NAMES[0]).crossed.partners == ()  # type: ignore[union-attr]
    assert result.amplifications["enrichment_crossed"].isna().all()
    assert result.amplifications["enrichment_through_weight"].notna().all()
    result = analyzed(ours, weights, [random_adapter(rng, "z", 2)])
    assert result.amplification(ours[0].label, NAMES[0]).crossed.partners == ("z-r2-s2",)  # type: ignore[union-attr]


def test_no_enrichment_is_specific_with_too_few_unrelated_adapters(
    rng: np.random.Generator, weights: dict[str, Any]
) -> None:
    reference = [through(rng, weights, f"z{i}", 10 + i) for i in range(9)]
    finding = controls_of(analyzed([copied(weights, "a", 0)], weights, reference))
    assert finding.code == "enrichment-untested"
    assert finding.severity == "limit"
    assert (finding.fields["values"], finding.fields["needed"]) == (18, 19)
    assert "at least 19 crossed values per run" in finding.text
    assert "the most is 18" in finding.text
    alone = controls_of(analyzed([copied(weights, "a", 0)], weights))
    assert alone.fields["values"] == 0
    assert alone.fields["runs"][0]["crossed"] is None
    assert ", crossed " not in alone.text
    assert "through W" in alone.text


def test_what_the_geometry_of_the_base_gives_is_not_specific(
    rng: np.random.Generator, weights: dict[str, Any]
) -> None:
    ours = [through(rng, weights, "a", seed) for seed in range(3)]
    reference = [through(rng, weights, f"z{i}", 10 + i) for i in range(12)]
    result = analyzed(ours, weights, reference)
    finding = controls_of(result)
    assert finding.code == "enrichment-not-specific"
    (rank,) = finding.fields["ranks"]
    assert rank["enrichment"] > 3  # far above random directions
    assert rank["low"] < rank["enrichment"] < rank["high"]
    full = result.amplifications[result.amplifications["at_rank"]]
    for name in ("enrichment", "enrichment_crossed", "enrichment_through_weight"):
        assert rank[name] == pytest.approx(full[name].median())
    for run in finding.fields["runs"]:
        assert run["values"] == 24
        assert run["p"] > 0.05
        assert run["low"] <= run["crossed"] <= run["high"]
    assert "exceeds the crossed values in none of 3 runs" in finding.text


def test_directions_that_the_base_pairs_are_specific(
    rng: np.random.Generator, weights: dict[str, Any]
) -> None:
    ours = [copied(weights, "a", 0), through(rng, weights, "b", 1)]
    reference = [through(rng, weights, f"z{i}", 10 + i) for i in range(12)]
    finding = controls_of(analyzed(ours, weights, reference))
    assert finding.code == "enrichment-specific"
    assert finding.fields["adapters"] == ["a-r2-s0"]
    assert (finding.fields["specific"], finding.fields["tested"]) == (1, 2)
    assert finding.fields["runs"][0]["p"] == 1 / 27  # 12 reference adapters and one other task
    assert "in 1 of 2 runs (p ≤ 0.05 each; about 0.10 would by chance): a-r2-s0." in finding.text


def test_the_geometry_sentence_needs_directions_through_the_weight_that_reach_as_far(
    rng: np.random.Generator, weights: dict[str, Any]
) -> None:
    sentence = "The base's geometry alone gives"
    weak = controls_of(analyzed([random_adapter(rng, "a", 0)], weights))
    assert f"{sentence} {weak.fields['geometry'][0]:.2f} times random" in weak.text
    strong = controls_of(analyzed([copied(weights, "a", 0)], weights))
    assert strong.fields["geometry"] is None
    assert sentence not in strong.text


def test_controls_change_nothing_without_a_base(rng: np.random.Generator) -> None:
    result = study([random_adapter(rng, "a", 0), random_adapter(rng, "b", 1)])
    assert result.amplifications.empty
    assert not [code for code in CONTROLS if of_code(result, code)]


def test_earlier_checkpoints_are_in_no_result_about_the_weights(
    rng: np.random.Generator, weights: dict[str, Any]
) -> None:
    steps = []
    for step in (10, 20):
        plain = random_adapter(rng, "a", 0)
        provenance = Provenance(task="a", seed=0, rank=2, step=step)
        steps.append(Adapter(dict(plain), label=f"a-{step}", provenance=provenance))
    result = analyzed(steps, weights)
    assert [run["adapter"] for run in controls_of(result).fields["runs"]] == ["a-20"]
    last = result.amplifications.query("adapter == 'a-20' and at_rank")["enrichment"].median()
    (finding,) = of_code(result, "amplification")
    assert finding.fields["ranks"][0]["enrichment"] == pytest.approx(last)


# --- trends and counts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 2.5], "rises from 1.00 to 2.50"),
        ([1.0, 1.0, 2.5], "rises from 1.00 to 2.50"),
        ([5.7, 4.4, 1.66], "falls from 5.70 to 1.66"),
        ([1.0, 4.0, 2.0], "does not change in one direction (between 1.00 and 4.00)"),
        ([1.0, 0.5, 1.0], "does not change in one direction (between 0.50 and 1.00)"),
        ([1.001, 1.002], "stays at 1.00"),
    ],
)
def test_a_trend_has_the_sign_of_its_numbers(values: list[float], text: str) -> None:
    assert fill("{values:trend}", {"values": values}) == text


def test_an_enrichment_that_rises_with_the_rank_is_said_to_rise(
    rng: np.random.Generator, weights: dict[str, Any]
) -> None:
    ours = [random_adapter(rng, "a", seed, rank=2) for seed in range(2)]
    ours += [copied(weights, "a", seed, rank=6) for seed in range(2)]
    (finding,) = of_code(analyzed(ours, weights), "amplification-at-equal-k")
    low, high = finding.fields["enrichments"]
    assert low < high
    assert f"the enrichment at full rank rises from {low:.2f} to {high:.2f}" in finding.text
    assert "the first 2 directions alone rises from" in finding.text
    assert "fall" not in finding.text
    assert "because" not in finding.text


def test_a_median_of_counts_is_not_rounded_to_an_integer(rng: np.random.Generator) -> None:
    # One module holds 90 % of its energy in 2 directions, the other in 3: 2.5 in all places.
    label = "a"
    values = {"layers.0.q_proj": [1.0, 1.0], "layers.1.q_proj": [1.0, 1.0, 1.0]}
    updates = {
        name: planted_update(
            orthonormal(rng, D_OUT, len(s)), np.array(s), orthonormal(rng, D_IN, len(s)),
            name=name, label=label,
        )
        for name, s in values.items()
    }  # fmt: skip
    updates["layers.0.q_proj"] = planted_update(
        orthonormal(rng, D_OUT, 3), np.array([1.0, 1.0, 0.1]), orthonormal(rng, D_IN, 3),
        name="layers.0.q_proj", label=label,
    )  # fmt: skip
    result = study([Adapter(updates, label=label, provenance=Provenance(rank=3))])
    (finding,) = of_code(result, "directions-by-energy")
    assert "rank 3: 2.5 (2.25 to 2.75)" in finding.text
    assert cell(result.spectra["energy_rank_90"].median()) == "2.5"
    assert [cell(value) for value in (2.0, 1e5 + 0.5, 2.25, np.nan)] == [
        "2",
        "100000.5",
        "2.25",
        "–",
    ]
