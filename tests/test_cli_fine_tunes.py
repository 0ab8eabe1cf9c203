"""Full fine-tunes as sources of every command: numbers of a dense twin, unchanged weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import orthonormal
from reference import basis_energy, cosine, dense_svd, energy_overlap, similarity
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from test_cli import call, document

from lora_analysis import as_adapter, find_adapters, read_adapter, study, subspace_similarity
from lora_analysis.errors import UnknownFormatError
from lora_analysis.studies import Study

WIDTH, RANK = 40, 4
SHAPES = {
    f"model.layers.{i}.{name}": shape
    for i in range(2)
    for name, shape in {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "mlp.up_proj": (56, WIDTH),
        "mlp.down_proj": (WIDTH, 56),
    }.items()
}
TARGETS = [name for name in SHAPES if "down" not in name]
UNCHANGED = "model.layers.1.mlp.up_proj"
ALPHA = 8


Capture = pytest.CaptureFixture[str]


def phi(U: np.ndarray, V: np.ndarray) -> float:
    return float(similarity(U, V)[-1, -1])


def json_of(capsys: Capture, *arguments: object) -> dict[str, Any]:
    code, out, err = call(capsys, *arguments, "--format", "json")
    assert code == 0, err
    return document(out)


@dataclass(frozen=True)
class Models:
    """Paths of a base, a LoRA and two fine-tunes of one task; W and all ΔW in float64."""

    base: Path
    lora: Path
    sft: Path
    rl: Path
    W: dict[str, np.ndarray]
    deltas: dict[str, dict[str, np.ndarray]]


def save(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


@pytest.fixture
def models(rng: np.random.Generator, tmp_path: Path) -> Models:
    base = {
        f"{name}.weight": (rng.standard_normal(shape) / 6).astype(np.float32)
        for name, shape in SHAPES.items()
    } | {"model.norm.weight": np.ones(WIDTH, np.float32)}
    A = {n: rng.standard_normal((RANK, SHAPES[n][1])).astype(np.float32) for n in SHAPES}
    B = {n: rng.standard_normal((SHAPES[n][0], RANK)).astype(np.float32) / 40 for n in SHAPES}
    factors = {}
    for name in TARGETS:
        factors[f"base_model.model.{name}.lora_A.weight"] = A[name]
        factors[f"base_model.model.{name}.lora_B.weight"] = B[name]
    lora = tmp_path / "turn"
    lora.mkdir()
    save_file(factors, lora / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "up_proj"], "base_model_name_or_path": "org/tiny",
    }  # fmt: skip
    (lora / "adapter_config.json").write_text(json.dumps(config))
    deltas = {"turn": {n: ALPHA / RANK * (B[n].astype(float) @ A[n]) for n in TARGETS}}
    paths = {}
    for label, noise in (("sft", 0.02), ("rl", 0.005)):
        tuned = dict(base)
        for name, shape in SHAPES.items():
            if name != UNCHANGED:
                step = B[name] @ A[name] + noise * rng.standard_normal(shape)
                tuned[f"{name}.weight"] = base[f"{name}.weight"] + step.astype(np.float32)
        tuned["model.norm.weight"] = base["model.norm.weight"] * np.float32(1.25)
        paths[label] = save(tmp_path / label, tuned)
        deltas[label] = {
            n: tuned[f"{n}.weight"].astype(float) - base[f"{n}.weight"] for n in SHAPES
        }
    W = {n: base[f"{n}.weight"].astype(float) for n in SHAPES}
    return Models(save(tmp_path / "base", base), lora, paths["sft"], paths["rl"], W, deltas)


def test_compare_of_a_lora_and_a_fine_tune_has_the_numbers_of_dense_matrices(
    models: Models, capsys: Capture
) -> None:
    result = json_of(capsys, "compare", models.lora, models.sft, "--base", models.base)
    rows = {(row["module"], row["side"]): row for row in result["modules"]}
    assert set(rows) == {(n, s) for n in TARGETS if n != UNCHANGED for s in ("input", "output")}
    for (name, side), row in rows.items():
        lora, full = models.deltas["turn"][name], models.deltas["sft"][name]
        (U, _, V), (X, _, Y) = dense_svd(lora, RANK), dense_svd(full, RANK)
        first, second = (V, Y) if side == "input" else (U, X)
        assert (row["rank_a"], row["rank_b"]) == (RANK, RANK)
        assert row["phi_1_1"] == pytest.approx(phi(first[:, :1], second[:, :1]), abs=1e-6)
        assert row["phi_r_r"] == pytest.approx(phi(first, second), abs=1e-6)
        assert row["chance_r_r"] == pytest.approx(RANK / row["dimension"])
        assert row["omega"] == pytest.approx(energy_overlap(lora, full, side), abs=1e-6)
        assert row["signed_cosine"] == pytest.approx(cosine(lora, full), abs=1e-6)
        size = np.linalg.norm(models.W[name])
        assert row["relative_a"] == pytest.approx(np.linalg.norm(lora) / size, rel=1e-6)
        assert row["relative_b"] == pytest.approx(np.linalg.norm(full) / size, rel=1e-6)


def test_two_fine_tunes_are_compared_in_their_first_directions(
    models: Models, capsys: Capture
) -> None:
    result = json_of(capsys, "compare", models.sft, models.rl, "--base", models.base)
    row = next(row for row in result["modules"] if row["side"] == "output")
    one, two = (models.deltas[label][row["module"]] for label in ("sft", "rl"))
    U, X = (dense_svd(delta, 16)[0] for delta in (one, two))
    assert row["rank_a"] == row["rank_b"] == 16
    assert row["phi_r_r"] == pytest.approx(phi(U, X), abs=1e-6)
    assert row["omega"] == pytest.approx(energy_overlap(one, two, "output"), abs=1e-6)


def test_amplify_of_a_fine_tune_has_the_numbers_of_dense_matrices(
    models: Models, capsys: Capture
) -> None:
    result = json_of(capsys, "amplify", models.sft, "--base", models.base)
    assert result["left_out"] == [
        {"module": UNCHANGED, "code": "unchanged", "reason": "ΔW is zero"}
    ]
    assert {row["module"] for row in result["modules"]} == set(SHAPES) - {UNCHANGED}
    for row in result["modules"]:
        delta, W = models.deltas["sft"][row["module"]], models.W[row["module"]]
        U, S, V = dense_svd(delta, row["k"])
        projected = np.linalg.norm(U.T @ W @ V)
        assert row["projected"] == pytest.approx(projected, rel=1e-6)
        factor = np.linalg.norm(S) / projected
        assert row["amplification_factor"] == pytest.approx(factor, rel=1e-6)
        random = np.linalg.norm(W) * row["k"] / np.sqrt(W.size)
        assert row["enrichment"] == pytest.approx(projected / random, rel=1e-6)
        relative = np.linalg.norm(delta) / np.linalg.norm(W)
        assert row["relative_norm"] == pytest.approx(relative, rel=1e-6)


def test_a_report_shows_how_every_source_moved_w(
    models: Models, tmp_path: Path, capsys: Capture
) -> None:
    sources = models.lora, models.sft, models.rl
    out = tmp_path / "out"
    options = ["--base", models.base, "--spectrum", "-o", out, "--figures", "", "--as", "md"]
    assert call(capsys, "report", *sources, *options)[0] == 0
    results = json.loads((out / "results.json").read_text())
    rows = {(r["adapter"], r["module_type"], r["side"]): r for r in results["weight_changes"]}
    assert {key[0] for key in rows} == {"turn", "sft", "rl"}
    for (label, kind, side), row in rows.items():
        assert all(value is not None for value in row.values())
        assert row["k"] == RANK or (kind == "down_proj" and row["k"] == 16)
        deltas = {n: d for n, d in models.deltas[label].items() if n.endswith(kind) and d.any()}
        k = int(row["k"])
        moved = [moved_weight(models.W[n], delta, side, k) for n, delta in deltas.items()]
        for column in moved[0]:
            median = np.median([values[column] for values in moved])
            assert row[column] == pytest.approx(median, abs=1e-6), column
        assert 0 < row["noise_in_bfloat16"] <= 1
    report = (out / "report.md").read_text()
    assert "How W moved" in report
    assert "| up\\_proj | sft | output | 1 of 2 |" in report
    assert "unchanged from" in report


def moved_weight(W: np.ndarray, delta: np.ndarray, side: str, k: int) -> dict[str, float]:
    """Return the columns of the table from dense matrices."""
    (U, S, V), (X, T, Y) = dense_svd(W, 10), dense_svd(W + delta, 10)
    before, after = (V, Y) if side == "input" else (U, X)
    energy = basis_energy(W, delta)[0][side]
    half = [torch.from_numpy(M.astype(np.float32)).bfloat16() for M in (W, W + delta)]
    return {
        "relative_change": np.linalg.norm(delta) / np.linalg.norm(W),
        "mean_drift": float(np.mean(np.abs(T / S - 1))),
        "top_overlap": phi(before, after),
        "leading_energy": energy[:k].sum(),
        "trailing_energy": energy[-k:].sum(),
        "changed_in_bfloat16": float((half[0] != half[1]).float().mean()),
    }


@pytest.mark.parametrize("verb", ["inspect", "compare", "amplify", "heatmap", "report"])
def test_every_command_takes_a_fine_tune_and_lists_what_is_unchanged(
    models: Models, tmp_path: Path, verb: str, capsys: Capture
) -> None:
    sources = [models.sft] if verb in ("inspect", "amplify") else [models.lora, models.sft]
    output = {"heatmap": ["-o", tmp_path / "h.svg"], "report": ["-o", tmp_path / "r"]}
    arguments = [verb, *sources, "--base", models.base, *output.get(verb, ())]
    arguments += ["--figures", ""] if verb == "report" else []
    result = json_of(capsys, *arguments)  # which refuses NaN
    if verb == "report":
        result = json.loads((tmp_path / "r" / "results.json").read_text())
    fields = {finding["code"]: finding["fields"] for finding in findings_in(result)}
    assert fields["unchanged-weights"]["modules"] == [UNCHANGED]
    assert fields["unchanged-weights"]["of"] == len(SHAPES)
    assert fields["other-tensors-differ"]["tensors"] == ["model.norm.weight"]
    assert fields["other-tensors-differ"]["relative_changes"] == pytest.approx([0.25])


def findings_in(value: Any) -> list[dict[str, Any]]:
    """Return every finding anywhere in a document."""
    if isinstance(value, dict):
        inner = [finding for item in value.values() for finding in findings_in(item)]
        return [value, *inner] if {"code", "fields"} <= value.keys() else inner
    return [f for item in value for f in findings_in(item)] if isinstance(value, list) else []


@pytest.mark.parametrize("verb", ["inspect", "compare", "heatmap", "report", "resize", "convert"])
def test_without_a_base_the_error_names_the_way(
    models: Models, tmp_path: Path, verb: str, capsys: Capture
) -> None:
    more = {"compare": [models.lora], "heatmap": [models.lora, "-o", tmp_path / "h.svg"],
            "report": ["-o", tmp_path / "r"], "resize": ["-o", tmp_path / "s", "--rank", "1"],
            "convert": ["-o", tmp_path / "c", "--to", "kohya"]}  # fmt: skip
    for source in (models.sft, models.sft / "model.safetensors"):
        code, _, err = call(capsys, verb, source, *more.get(verb, ()))
        assert code == 3
        assert "this is a model, not an adapter" in err
        assert "--base" in err


def test_the_base_itself_is_no_fine_tune(models: Models, tmp_path: Path, capsys: Capture) -> None:
    code, _, err = call(capsys, "inspect", models.base, "--base", models.base)
    assert code == 3
    assert "Is it the base itself?" in err
    # In a folder of sources it is passed over.
    refs = find_adapters(tmp_path, base=models.base)
    assert [ref.label for ref in refs] == ["rl", "sft", "turn"]
    assert [ref.label for ref in find_adapters(tmp_path)] == ["turn"]


def test_sources_of_python_are_read_the_same_way(models: Models, tmp_path: Path) -> None:
    result = study([read_adapter(models.lora), models.sft], base=models.base)
    assert set(result.adapters) == {"sft", "turn"}
    assert set(result.runs["base_model"]) == {"org/tiny"}  # the name that the LoRA has for it
    with pytest.raises(UnknownFormatError, match="give that with base="):
        read_adapter(models.sft)
    update = as_adapter(str(models.sft), base=models.base)[TARGETS[0]]
    assert np.abs(update.delta_weight() - models.deltas["sft"][TARGETS[0]]).max() < 1e-7
    result.save(tmp_path / "study")
    again = Study.load(tmp_path / "study")
    assert again.grid("turn", "sft", TARGETS[0]).values.shape == (RANK, RANK)
    assert not again.adapters["sft"][UNCHANGED].delta_weight().any()


def test_a_live_model_is_a_fine_tune_of_another(rng: np.random.Generator) -> None:
    from lora_models import tiny_model

    base, tuned = tiny_model(), tiny_model()
    step = torch.randn(3, 8)
    with torch.no_grad():
        tuned.head[2].weight += step
    adapter = as_adapter(tuned, base=base, label="live")
    assert adapter.label == "live"
    assert np.abs(adapter["head.2"].delta_weight() - step.numpy()).max() < 1e-6


def test_a_grid_of_k_directions_is_the_corner_of_the_whole_one(models: Models) -> None:
    full = as_adapter(models.sft, base=models.base)[TARGETS[0]]
    lora = read_adapter(models.lora)[TARGETS[0]]
    whole, corner = (subspace_similarity(full, lora, k=k).values for k in (None, 2))
    assert corner.shape == (2, 2)
    assert np.abs(corner - whole[:2, :2]).max() < 1e-6


def test_a_fine_tune_in_half_precision_states_its_rounding(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    W = {f"layers.{i}.q_proj.weight": torch.randn(16, 12, generator=generator) for i in range(2)}
    tuned = {name: M.bfloat16() for name, M in W.items()}
    name = "layers.0.q_proj.weight"
    tuned[name] = (W[name] + 0.3).bfloat16()
    for folder, tensors in (("base", W), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text('{"model_type": "llama"}')
        save_torch_file(tensors, tmp_path / folder / "model.safetensors")
    adapter = read_adapter(tmp_path / "tuned", base=tmp_path / "base")
    findings = {finding.code: finding.fields for finding in adapter.provenance.findings}
    assert findings["unchanged-weights"]["modules"] == ["layers.1.q_proj"]
    assert findings["difference-of-types"]["modules"] == ["layers.0.q_proj"]
    rounding = (W[name].bfloat16().float() - W[name]).norm() / W[name].norm()
    assert findings["difference-of-types"]["rounding"] == pytest.approx(float(rounding), rel=0.2)


def test_weights_of_the_base_that_a_fine_tune_lacks_are_named(models: Models) -> None:
    path = models.sft / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"{TARGETS[0]}.weight"]
    tensors[f"{TARGETS[1]}.weight"] = np.ones((3, 5), np.float32)
    path.unlink()
    save_file(tensors, path)
    findings = read_adapter(models.sft, base=models.base).provenance.findings
    fields = {finding.code: finding.fields for finding in findings}
    assert fields["missing-weights"]["modules"] == [TARGETS[0]]
    assert fields["weights-without-counterpart"]["modules"] == [TARGETS[1]]


def test_a_sharded_fine_tune_is_read(models: Models, tmp_path: Path, capsys: Capture) -> None:
    tensors = list(load_file(models.sft / "model.safetensors").items())
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = {}
    for i, part in enumerate((tensors[:3], tensors[3:])):
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        save_file(dict(part), folder / shard)
        names |= dict.fromkeys(dict(part), shard)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    result = json_of(capsys, "compare", folder, models.sft, "--base", models.base)
    assert all(row["signed_cosine"] == pytest.approx(1) for row in result["modules"])
    assert result["pair"]["pair_class"] == "near-duplicate"


def test_a_dense_update_in_a_low_rank_space_has_no_directions_beyond_it(
    rng: np.random.Generator,
) -> None:
    from lora_analysis import spectrum
    from lora_analysis.adapter import DenseUpdate

    U, V = orthonormal(rng, 900, 3), orthonormal(rng, 800, 3)
    values = spectrum(DenseUpdate("q", (U * [3.0, 2.0, 1.0]) @ V.T))
    assert values.numerical_rank == 3
    assert np.abs(values.S[:3] - [3, 2, 1]).max() < 1e-12
    assert phi(values.vectors("output"), U) == pytest.approx(1, abs=1e-10)
