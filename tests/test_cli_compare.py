"""``compare``: the conclusion first, then the modules, in 80 columns and in JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import (
    RUN_NAMES,
    adapter,
    directions,
    low_rank_update,
    planted_run,
    reference_runs,
)
from safetensors.numpy import save_file
from test_cli import call, document, spoil

from lora_analysis import read_adapter, subspace_similarity
from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.conclusions import Conclusion
from lora_analysis.formats import write_adapter
from lora_analysis.studies.table_rows import SIMILARITY_COLUMNS


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are folded only in the tests that give a width."""
    monkeypatch.delenv("COLUMNS", raising=False)


def written(folder: Path, adapters: Sequence[Adapter]) -> list[Path]:
    """Write adapters into folders that are named after them."""
    return [write_adapter(adapter, folder / adapter.label) for adapter in adapters]


def pair_of_task(rng: np.random.Generator, **kwargs: Any) -> list[Adapter]:
    shared = directions(rng)
    return [planted_run(rng, f"turn-s{seed}", shared, **kwargs) for seed in range(2)]


def with_references(
    folder: Path, rng: np.random.Generator, pair: list[Adapter], count: int
) -> list[object]:
    """Return the arguments of a comparison with references."""
    references = written(folder, reference_runs(rng, count))
    return ["compare", *written(folder, pair), *(f"--reference={path}" for path in references)]


def lines_of(out: str, start: str) -> str:
    """Return a fact with its continuation lines, joined."""
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"{start}  "))
    indent = " " * (len(lines[first]) - len(lines[first].removeprefix(start).lstrip()))
    block = [lines[first].removeprefix(start)]
    for line in lines[first + 1 :]:
        if not line.startswith(indent):
            break
        block.append(line)
    return " ".join(" ".join(block).split())


def copied(rng: np.random.Generator) -> list[Adapter]:
    run = planted_run(rng, "a")
    return [run, Adapter(dict(run), label="b", provenance=run.provenance)]


def from_one_start(rng: np.random.Generator) -> list[Adapter]:
    run = planted_run(rng, "a")
    updates = {
        name: replace(update, B=rng.standard_normal(update.B.shape))  # type: ignore[union-attr, type-var]
        for name, update in run.items()
    }
    return [run, Adapter(updates, label="b", provenance=run.provenance)]


def on_two_bases(rng: np.random.Generator) -> list[Adapter]:
    return [
        planted_run(rng, label, base_model=base)
        for label, base in (("a", "org/one"), ("b", "org/two"))
    ]


@pytest.mark.parametrize(
    ("make", "references", "output", "input_side"),
    [
        (pair_of_task, 0,
         "more alike than random subspaces in 6 of 6 modules (q < 0.05). Median ω 0.",
         "more alike than random subspaces in 6 of 6 modules (q < 0.05). Median ω 0."),
        (lambda rng: [planted_run(rng, label) for label in "ab"], 0,
         "not distinguishable from random subspaces: 0 of 6 modules exceed them (q < 0.05). "
         "Median ω 0.",
         "not distinguishable from random subspaces: 0 of 6 modules exceed them (q < 0.05)."),
        (pair_of_task, 2, "too few references for a test: 2 of the five tasks needed. T 0.",
         "too few references for a test: 2 of the five tasks needed. T 0."),
        (pair_of_task, 5, "more alike than unrelated adapters. T 0.",
         "more alike than unrelated adapters. T 0."),
        (lambda rng: [planted_run(rng, label) for label in "ab"], 6,
         "not distinguishable from unrelated adapters. T ",
         "inconclusive: tested only if the output side shows a difference."),
        (lambda rng: pair_of_task(rng, factor=2.0), 5,
         "inconclusive: trained more strongly than every reference.",
         "inconclusive: trained more strongly than every reference."),
        (copied, 0, "near-duplicate: one sample, not two. T 1.00; random 0.",
         "near-duplicate: one sample, not two. T 1.00; random 0."),
        (from_one_start, 0, "more alike than random subspaces in 1 of 6 modules (q < 0.05). ",
         "inconclusive: shared initialization. T 0."),
        (on_two_bases, 0, "inconclusive: different base models. T ",
         "inconclusive: different base models. T "),
    ],
    ids=["random", "not random", "few references", "related", "unrelated", "stronger", "copy",
         "start", "bases"],
)  # fmt: skip
def test_the_first_lines_are_one_conclusion_per_side(  # noqa: PLR0917 - parameters and fixtures
    make: Any,
    references: int,
    output: str,
    input_side: str,
    rng: np.random.Generator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = with_references(tmp_path, rng, make(rng), references)
    code, out, err = call(capsys, *arguments, "--label", "none")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith("Output side  ")
    assert lines_of(out, "Output side").startswith(output)
    assert lines_of(out, "Input side").startswith(input_side)
    assert lines_of(out, "Cosine").endswith("(signed; median over 6 modules; random 0).")
    assert "nan" not in out
    # The same in JSON: sentence, conclusion and values.
    found = document(call(capsys, *arguments, "--label", "none", "--format", "json")[1])
    stated = [finding for finding in found["findings"] if "conclusion" in finding["fields"]]
    for finding, comparison, side in zip(
        stated, found["comparisons"], ("output", "input"), strict=True
    ):
        assert comparison == finding["fields"]
        assert comparison["side"] == side
        assert comparison["conclusion"] in set(Conclusion)
        claim = lines_of(out, f"{side} side".capitalize()).partition(".")[0]
        assert claim.partition(":")[0] in finding["text"]


@pytest.mark.slow
def test_the_next_step_is_what_a_test_needs(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = pair_of_task(rng)
    arguments = with_references(tmp_path, rng, pair, 5)
    alone = call(capsys, *arguments[:3])[1]
    assert "Pass five adapters of other tasks for a test at 5 %" in lines_of(alone, "Next step")
    few = call(capsys, *arguments[:5])[1]
    assert "at 5 % needs 3 more adapters of another task each" in lines_of(few, "Next step")
    assert "References  task0 and task1 (one per task)" in few
    assert "Next step" not in call(capsys, *arguments)[1]
    copies = written(tmp_path, copied(rng))
    assert "Next step" not in call(capsys, "compare", *copies)[1]


def test_a_reference_file_gives_a_level(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = written(tmp_path, pair_of_task(rng))
    strangers = written(tmp_path, reference_runs(rng, 6))
    file = tmp_path / "base.reference.json"
    assert call(capsys, "reference", *strangers, "-o", file)[0] == 0
    _, out, _ = call(capsys, "compare", *pair, "--reference", file)
    assert "unrelated pairs 0.0" in lines_of(out, "Output side")
    assert lines_of(out, "Next step").endswith("(--reference).")
    strong = [
        write_adapter(run, tmp_path / "strong" / run.label) for run in pair_of_task(rng, factor=9.0)
    ]
    _, out, _ = call(capsys, "compare", *strong, "--reference", file)
    assert "The reference file has no level for turn-s0 and turn-s1" in lines_of(out, "Next step")


def test_references_that_cannot_serve_are_named(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = directions(rng)
    pair = written(tmp_path, [planted_run(rng, f"turn-s{s}", shared) for s in range(2)])
    same_task, same_seed = written(
        tmp_path, [planted_run(rng, "turn-s5", shared), planted_run(rng, "flip-s1")]
    )
    code, out, err = call(capsys, "compare", *pair, "--reference", same_task)
    assert (code, out) == (3, "")
    assert "turn-s5 has the task of turn-s0 and turn-s1" in err
    code, out, _ = call(capsys, "compare", *pair, "--reference", same_seed)
    assert code == 0
    assert "Refused as references: flip-s1 for turn-s1 (same seed)." in out


def test_a_bad_reference_among_good_ones_is_named_and_ends_with_code_4(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = written(tmp_path, [adapter(rng, label=label) for label in ("small", "large")])
    good, nan = written(tmp_path, [adapter(rng, label=label) for label in ("good", "nan")])
    spoil(nan, "layers.0.q_proj.lora_A")
    (tmp_path / "bad.safetensors").write_bytes(b"abc")
    for bad in (tmp_path / "bad.safetensors", nan):
        code, out, err = call(capsys, "compare", *pair, "--reference", good, "--reference", bad)
        assert code == 4
        assert bad.stem in err
        assert "Input side" in out
    code, _, err = call(capsys, "compare", pair[0], nan)
    assert code == 3
    assert "non-finite" in err


# --- modules ------------------------------------------------------------------------------------


@pytest.fixture
def layers(rng: np.random.Generator, tmp_path: Path) -> list[Path]:
    """Two adapters of 60 modules whose norms grow with the layer."""
    adapters = []
    for label in ("first", "second"):
        names = [f"base.model.layers.{n}.self_attention.{k}_proj" for n in range(30) for k in "qv"]
        updates = {}
        for i, name in enumerate(names):
            update = low_rank_update(rng, name=name)
            norm = np.linalg.norm(update.delta_weight())
            updates[name] = replace(update, B=update.B * (i + 1) / norm)
        adapters.append(Adapter(updates, label=label))
    return written(tmp_path, adapters)


def modules_of(out: str) -> list[str]:
    """Return the first column of the table of modules."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("module "))
    end = next(i for i, line in enumerate(lines) if line.startswith("median "))
    return [line.split()[0] for line in lines[start + 1 : end]]


def test_the_modules_at_both_ends_of_the_order_are_shown(
    layers: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call(capsys, "compare", *layers, "--top", 2)
    assert "first and last 2 of 60 modules, by ‖ΔW‖" in out
    assert "names without 'base.model.layers.'" in out
    assert modules_of(out) == [
        "29.self_attention.v_proj", "29.self_attention.q_proj", "…",
        "0.self_attention.v_proj", "0.self_attention.q_proj",
    ]  # fmt: skip
    assert "q_proj (30)" in out
    _, every, _ = call(capsys, "compare", *layers, "--all")
    assert len(modules_of(every)) == 60
    assert "q_proj (30)" not in every
    for text in (out, every):
        assert max(map(len, text.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sort", "column"),
    [("omega", "omega"), ("excess", "excess_omega"), ("cosine", "signed_cosine"), ("norm", None)],
)
def test_modules_are_sorted(
    sort: str, column: str | None, layers: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(call(capsys, "compare", *layers, "--format", "json")[1])
    rows = [row for row in found["modules"] if row["side"] == "output"]
    rows.sort(key=lambda row: -(row[column] if column else max(row["norm_a"], row["norm_b"])))
    out = call(capsys, "compare", *layers, "--all", "--sort", sort)[1]
    assert modules_of(out) == [row["module"] for row in rows]
    out = call(capsys, "compare", *layers, "--all", "--sort", "module")[1]
    assert modules_of(out) == [row["module"] for row in found["modules"]][::2]


def test_a_base_gives_the_relative_change(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = written(tmp_path, pair_of_task(rng))
    weights = {
        f"{name}.weight": (i + 1) * rng.standard_normal((96, 80))
        for i, name in enumerate(RUN_NAMES)
    }
    base = tmp_path / "base.safetensors"
    save_file({name: W.astype(np.float32) for name, W in weights.items()}, base)
    _, out, err = call(capsys, "compare", *pair, "--base", base)
    assert err == ""
    assert "all modules, by ‖ΔW‖/‖W‖" in out
    assert modules_of(out) == list(RUN_NAMES)
    assert "enrichment" not in out  # amplify's question
    found = document(call(capsys, "compare", *pair, "--base", base, "--format", "json")[1])
    for row in found["modules"]:
        W = weights[f"{row['module']}.weight"].astype(np.float32)
        expected = row["norm_a"] / np.linalg.norm(W.astype(np.float64))
        assert row["relative_a"] == pytest.approx(expected, rel=1e-6)
    code, _, err = call(capsys, "compare", *pair, "--sort", "relative")
    assert code == 2
    assert "pass --base" in err
    part = {name: W.astype(np.float32) for name, W in list(weights.items())[1:]}
    save_file(part, base)
    code, out, _ = call(capsys, "compare", *pair, "--base", base)
    assert code == 4
    assert f"Not compared: {RUN_NAMES[0]} (" in out


def test_modules_that_do_not_count_are_marked_and_named(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = [
        Adapter({**dict(run), "score": low_rank_update(rng, 1, 80, name="score")}, label=run.label)
        for run in pair_of_task(rng)
    ]
    pair = written(tmp_path, heads)
    _, out, _ = call(capsys, "compare", *pair)
    row = next(line.split() for line in out.splitlines() if line.startswith("score"))
    assert row[3].endswith("*")
    assert "1 module on the output side cannot be used in all pairs: score (too few" in out
    assert "* not usable in all pairs" in out
    assert "in 6 of 6 modules" in lines_of(out, "Output side")
    assert "of 7 modules" in lines_of(out, "Input side")
    found = document(call(capsys, "compare", *pair, "--format", "json")[1])
    assert found["left_out"] == [
        {
            "module": "score",
            "code": "not-usable",
            "side": "output",
            "reason": "too few dimensions: random subspaces already overlap",
        }
    ]


def test_modules_of_one_adapter_alone_are_named(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = pair_of_task(rng)
    updates = {name: update for name, update in second.items() if name != RUN_NAMES[2]}
    pair = written(tmp_path, [first, Adapter(updates, label="short")])
    code, out, _ = call(capsys, "compare", *pair)
    assert code == 0
    assert f"Not compared: {RUN_NAMES[2]} (only turn-s0 adapts it)" in out


@pytest.mark.parametrize("kind", ["start", "space"])
def test_input_sides_that_were_not_learned_are_marked(
    kind: str, rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = adapter(rng, rank=8, d_in=120, d_out=110, label="first")
    updates = {}
    for name, update in first.items():
        assert isinstance(update, LowRankUpdate)
        turn = np.linalg.qr(rng.standard_normal((8, 8)))[0]
        A = update.A if kind == "start" else turn @ update.A
        updates[name] = LowRankUpdate(name, A, rng.standard_normal(update.B.shape), 2.0)
    pair = written(tmp_path, [first, Adapter(updates, label="second")])
    _, out, _ = call(capsys, "compare", *pair)
    assert out.count("†") == 5
    assert "† A has a shared initialization: this overlap was not learned." in out
    assert lines_of(out, "Input side").startswith("inconclusive: shared initialization")


def test_degenerate_directions_have_no_angle(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [planted_run(rng, label, values=(2.0, 2.0, 1.0)) for label in "ab"]
    _, out, _ = call(capsys, "compare", *written(tmp_path, pair))
    assert [line.split()[-3:-1] for line in out.splitlines() if line.startswith("layers.")] == [
        ["–", "–"]
    ] * len(RUN_NAMES)


# --- the document, and what is refused ------------------------------------------------------------


def test_json_has_all_columns_of_the_modules_and_equals_the_library(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = written(tmp_path, [adapter(rng, rank=rank, label=f"r{rank}") for rank in (2, 5)])
    reference = written(tmp_path, [adapter(rng, label="other")])
    words = ("compare", *pair, "--reference", *reference, "--format", "json")
    found = document(call(capsys, *words)[1])
    assert found["reference"] == ["other"]
    assert found["pair"]["a"] == "r2"
    a, b = map(read_adapter, pair)
    assert len(found["modules"]) == 8
    norms = ("norm_a", "norm_b", "relative_a", "relative_b")
    for row in found["modules"]:
        assert row.keys() == {*SIMILARITY_COLUMNS, "block", *norms}
        grid = subspace_similarity(a[row["module"]], b[row["module"]], side=row["side"])
        assert row["phi_1_1"] == pytest.approx(grid.at(1, 1), abs=1e-12)
        assert row["phi_r_r"] == pytest.approx(grid.at(2, 5), abs=1e-12)
        delta = a[row["module"]].delta_weight()
        assert row["norm_a"] == pytest.approx(np.linalg.norm(delta))
        assert row["relative_a"] is None
    totals = {row["adapter"]: row["norm"] for row in found["adapters"]}
    rows = [row for row in found["modules"] if row["side"] == "output"]
    assert totals["r5"] == pytest.approx(np.linalg.norm([row["norm_b"] for row in rows]))
    quiet = call(capsys, "compare", *pair, "--format", "quiet")[1]
    omega = document(call(capsys, "compare", *pair, "--format", "json")[1])["comparisons"][0][
        "omega"
    ]
    assert float(quiet) == pytest.approx(omega, abs=5e-4)


def test_labels_of_the_two_adapters_can_be_given(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = written(tmp_path, [planted_run(rng, label) for label in ("final", "last")])
    words = ("--task", "turn", "--seed", 0, "--seed", 1)
    _, out, _ = call(capsys, "compare", *pair, *words)
    assert "final (task turn, rank 4, seed 0, 6 modules, ‖ΔW‖ " in out
    assert "replicate (same task, different seed); initialization: independent" in out


def test_no_common_module_is_refused_with_both_lists_of_names(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, right = (
        Adapter({f"{side}.{n}.q": low_rank_update(rng, name=f"{side}.{n}.q") for n in range(8)},
                label=side)
        for side in ("left", "right")
    )  # fmt: skip
    pair = written(tmp_path, [left, right])
    code, out, err = call(capsys, "compare", *pair)
    assert (code, out) == (3, "")
    assert "left and right adapt no module in common." in err
    assert "left adapts 8 modules: 'left.0.q'" in err
    assert "right adapts 8 modules: 'right.0.q'" in err
    assert "and 2 more" in err
    assert "--prefix OLD=NEW" in err
    assert call(capsys, "compare", *pair, "--prefix", "left=right")[0] == 0


def test_other_shapes_in_all_modules_are_refused(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = written(tmp_path, [adapter(rng, label="a"), adapter(rng, label="b", d_in=30)])
    code, out, err = call(capsys, "compare", *pair)
    assert (code, out) == (3, "")
    assert "different shapes in all 4 common modules" in err


def test_an_untrained_adapter_is_a_finding(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = adapter(rng, label="trained")
    updates = {name: replace(u, B=0 * u.B) for name, u in trained.items()}  # type: ignore[union-attr, type-var]
    pair = written(tmp_path, [trained, Adapter(updates, label="empty")])
    code, out, _ = call(capsys, "compare", *pair)
    assert code == 0
    assert "empty is untrained" in out
    assert lines_of(out, "Output side") == "inconclusive: no module is usable in all pairs."
    found = document(call(capsys, "compare", *pair, "--format", "json")[1])
    assert {row["code"] for row in found["left_out"]} == {"untrained"}
    assert json.dumps(found)
