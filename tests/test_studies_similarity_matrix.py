from __future__ import annotations

import itertools
from dataclasses import replace
from math import comb

import numpy as np
import pandas as pd
import pytest
from factories import adapter
from test_studies import sweep  # noqa: F401  (a fixture)

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate, Provenance
from lora_analysis.conclusions import findings
from lora_analysis.errors import InputError
from lora_analysis.pairwise import pairwise
from lora_analysis.studies import Relation, study
from lora_analysis.studies.relations import choose_blocks
from lora_analysis.studies.similarity_matrix import BlockedContribution


def test_the_similarity_matrix_is_the_mean_of_the_tables(sweep: list[Adapter]) -> None:  # noqa: F811
    result = study(sweep)
    similarity_matrix = result.similarity_matrix
    assert similarity_matrix is not None
    assert similarity_matrix.kinds == ("all", "q_proj", "v_proj")
    assert list(similarity_matrix.modules) == [4, 2, 2]
    table = result.similarities
    for side in ("output", "input"):
        for kind in similarity_matrix.kinds:
            rows = table[table["side"] == side]
            if kind != "all":
                rows = rows[rows["module_type"] == kind]
            if side == "input":
                rows = rows[~rows["shared_init"]]
            above = (rows["omega"] - rows["chance_omega"]) / (1 - rows["chance_omega"])
            means = above.groupby([rows["a"], rows["b"]]).mean()
            matrix = similarity_matrix.matrix(side, kind)
            for i, a in enumerate(similarity_matrix.labels):
                for j, b in enumerate(similarity_matrix.labels[i + 1 :], i + 1):
                    expected = means.get((a, b), np.nan)
                    assert matrix[i, j] == pytest.approx(expected, abs=1e-12, nan_ok=True)
                    assert matrix[j, i] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_the_cosine_of_the_similarity_matrix_is_that_of_all_modules(sweep: list[Adapter]) -> None:  # noqa: F811
    similarity_matrix = study(sweep).similarity_matrix
    assert similarity_matrix is not None
    expected = pairwise(sweep).total_cosine
    np.testing.assert_allclose(similarity_matrix.matrix("cosine"), expected, atol=1e-12)
    only = pairwise(sweep, modules="q_proj").total_cosine
    np.testing.assert_allclose(similarity_matrix.matrix("cosine", "q_proj"), only, atol=1e-12)


def test_the_order_puts_tasks_side_by_side(sweep: list[Adapter]) -> None:  # noqa: F811
    similarity_matrix = study(sweep).similarity_matrix
    assert similarity_matrix is not None
    tasks = [similarity_matrix.labels[at].split("-")[0] for at in similarity_matrix.order()]
    assert sum(a != b for a, b in itertools.pairwise(tasks)) == 1
    assert similarity_matrix.linkage().shape == (4, 4)


def test_a_quantity_that_is_not_there_is_refused(sweep: list[Adapter]) -> None:  # noqa: F811
    similarity_matrix = study(sweep[:2]).similarity_matrix
    assert similarity_matrix is not None
    with pytest.raises(InputError, match="'k_proj'"):
        similarity_matrix.matrix("output", "k_proj")


def scaled(one: Adapter, label: str, factor: float, **facts: object) -> Adapter:
    updates = {
        name: LowRankUpdate(name=name, A=u.A, B=u.B * factor, scale=u.scale)  # type: ignore[union-attr]
        for name, u in one.items()
    }
    return Adapter(updates, label=label, provenance=Provenance(rank=4, **facts))  # type: ignore[arg-type]


def test_doubles_untrained_and_diverged_adapters_are_named(rng: np.random.Generator) -> None:
    first = adapter(rng, label="first")
    made = [
        first,
        scaled(first, "double", 1.5),
        scaled(first, "empty", 0.0),
        adapter(rng, label="x"),
        adapter(rng, label="y"),
        scaled(adapter(rng), "huge", 100.0),
    ]
    result = study(made)
    assert result.similarity_matrix is not None
    assert result.similarity_matrix.duplicates() == [("first", "double")]
    assert result.similarity_matrix.shared_inits() == [("first", "double", "empty")]
    assert result.similarity_matrix.untrained() == ["empty"]
    texts = {finding.code: finding.text for finding in findings(result)}
    assert texts["near-duplicates"].startswith("first and double: near-duplicates")
    assert texts["diverged"].startswith("huge has probably diverged")
    assert texts["untrained-adapter"].startswith("empty is untrained")


def test_beyond_a_number_the_tables_hold_a_choice_and_the_similarity_matrix_all(
    rng: np.random.Generator,
) -> None:
    made = [
        Adapter(
            dict(adapter(rng, modules=1, rank=2)),
            label=f"{task}-{seed}",
            provenance=Provenance(rank=2, task=task, seed=seed),
        )
        for task in ("a", "b")
        for seed in range(6)
    ]
    # Two seeds of one task next to two other seeds of the other.
    assert choose_blocks(made, 20) == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 6, 7]]
    few, every = study(made, max_pairs=20), study(made)
    assert len(few.pairs) == 18
    assert few.fully_compared == ("a-0", "a-1", "b-2", "b-3")
    assert set(few.pairs["a"]) | set(few.pairs["b"]) == set(few.adapters)
    assert few.similarity_matrix is not None
    assert every.similarity_matrix is not None
    for what in ("output", "input", "cosine"):
        np.testing.assert_array_equal(
            few.similarity_matrix.matrix(what), every.similarity_matrix.matrix(what)
        )
    text = next(one.text for one in findings(few) if one.code == "sampled-pairs")
    assert text.startswith("18 of 66 pairs of the 12 adapters are compared")
    assert "Tests use the 4 adapters" in text
    columns = ["phi_1_1", "phi_r_r", "omega", "signed_cosine", "smallest_angle", "shared_init"]
    both = few.similarities.merge(every.similarities, on=["a", "b", "module", "side"])
    for name in columns:
        assert (both[f"{name}_x"] == both[f"{name}_y"]).all()


@pytest.mark.slow
def test_a_study_of_200_adapters_compares_every_one_and_all_kinds_of_pairs(
    rng: np.random.Generator,
) -> None:
    made = [
        Adapter(
            dict(adapter(rng, modules=1, rank=rank, d_out=12, d_in=12)),
            label=f"{task}-r{rank}-s{seed}",
            provenance=Provenance(rank=rank, task=task, seed=seed),
        )
        for task in "abcde"
        for rank in (1, 2)
        for seed in range(20)
    ]
    result = study(made)
    assert 700 < len(result.pairs) <= 780
    assert set(result.pairs["a"]) | set(result.pairs["b"]) == set(result.adapters)
    assert not result.pairs.duplicated(["a", "b"]).any()
    # Every adapter has a replicate, and an unrelated adapter.
    for relation in (Relation.OTHER_SEED, Relation.OTHER_TASK):
        rows = result.pairs[result.pairs["relation"] == relation]
        assert len(set(rows["a"]) | set(rows["b"])) == 200, relation
    compared = result.runs[result.runs["adapter"].isin(result.fully_compared)]
    assert compared.groupby(["task", "rank"]).size().min() >= 2
    assert compared["seed"].nunique() >= 18
    again = study(made[:50], max_pairs=100).pairs[["a", "b"]]
    assert again.equals(study(made[:50], max_pairs=100).pairs[["a", "b"]])


@pytest.mark.parametrize("tasks", [1, 3, 100])
@pytest.mark.parametrize("count", [3, 4, 5, 7, 12, 41, 42, 100])
@pytest.mark.parametrize("max_pairs", [1, 2, 3, 10, 60, 200, 780])
def test_blocks_hold_every_adapter_once_within_the_maximum(
    count: int, max_pairs: int, tasks: int
) -> None:
    facts = [Provenance(task=str(n % tasks), seed=n, rank=1) for n in range(count)]
    adapters = [Adapter({}, label=str(n), provenance=fact) for n, fact in enumerate(facts)]
    blocks = choose_blocks(adapters, max_pairs)
    chosen = [index for block in blocks for index in block]
    assert len(set(chosen)) == len(chosen)
    total = sum(comb(len(block), 2) for block in blocks)
    assert total <= max_pairs
    assert len(blocks[0]) == max(map(len, blocks))
    assert min(map(len, blocks)) >= 2
    assert comb(len(blocks[0]) + 4, 2) >= min(comb(count, 2), max_pairs) / 4
    # Twos, and a three for each task with an odd number of adapters.
    if 3 * max_pairs // 4 >= count // 2 + 2 * tasks or max_pairs >= comb(count, 2):
        assert len(chosen) == count
        assert total >= min(comb(count, 2), max_pairs) / 3


def test_many_adapters_are_added_up_block_by_block_to_the_same_similarity_matrix(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def low_rank(name: str, rank: int, d_out: int = 12) -> LowRankUpdate:
        A, B = rng.standard_normal((rank, 16)), rng.standard_normal((d_out, rank))
        return LowRankUpdate(name=name, A=A, B=B, scale=1.0)

    made = []
    for n in range(14):
        updates = {name: low_rank(name, 1 + n % 4) for name in ("a.q_proj", "b.q_proj", "c.v_proj")}
        if n == 3:
            updates["b.q_proj"] = low_rank("b.q_proj", 2, d_out=9)  # of another shape
        if n in (5, 6):  # untrained, from the start of others
            start = made[n - 4]["a.q_proj"]
            assert isinstance(start, LowRankUpdate)
            B = np.zeros((12, len(start.A)))
            updates["a.q_proj"] = LowRankUpdate(name="a.q_proj", A=start.A, B=B, scale=1.0)
        if n in (8, 12):  # a shared start
            start = made[n - 8]["a.q_proj"]
            assert isinstance(start, LowRankUpdate)
            B = rng.standard_normal((12, len(start.A)))
            updates["a.q_proj"] = LowRankUpdate(name="a.q_proj", A=start.A, B=B, scale=1.0)
        if n == 9:
            del updates["c.v_proj"]
        made.append(Adapter(updates, label=str(n)))
    whole = study(made, max_pairs=10)
    monkeypatch.setattr("lora_analysis.studies.similarity_matrix.MOST_AT_ONCE", 6)
    monkeypatch.setattr("lora_analysis.studies.similarity_matrix._ROWS", 4)
    monkeypatch.setattr("lora_analysis.studies.pair_products._AT_ONCE", 8)
    monkeypatch.setattr("lora_analysis.studies.pair_products._ROWS", 5)
    blocks = study(made, max_pairs=10)
    assert whole.similarity_matrix is not None
    assert blocks.similarity_matrix is not None
    assert blocks.similarity_matrix.kinds == ("all",)
    assert list(blocks.similarity_matrix.modules) == [whole.similarity_matrix.modules[0]]
    for what in ("output", "input", "cosine"):
        expected = whole.similarity_matrix.matrix(what)
        assert np.isfinite(expected).any()
        np.testing.assert_allclose(blocks.similarity_matrix.matrix(what), expected, atol=1e-12)
    np.testing.assert_array_equal(blocks.similarity_matrix.shared, whole.similarity_matrix.shared)
    assert whole.similarity_matrix.shared[1, 5] == pytest.approx(1 / 3)
    np.testing.assert_allclose(blocks.similarity_matrix.norms, whole.similarity_matrix.norms)
    pd.testing.assert_frame_equal(blocks.pairs, whole.pairs)
    pd.testing.assert_frame_equal(blocks.similarities, whole.similarities)


def test_an_embedding_and_a_dense_update_are_not_added_up_in_blocks(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_analysis.studies.similarity_matrix.MOST_AT_ONCE", 1)
    made = [adapter(rng, label=str(n)) for n in range(3)]
    updates = [one[next(iter(one))] for one in made]
    assert BlockedContribution.fits(updates)
    assert not BlockedContribution.fits([*updates[:2], replace(updates[2], layout="embedding")])  # type: ignore[type-var]
    assert not BlockedContribution.fits([*updates[:2], DenseUpdate("x", np.ones((2, 2)))])
