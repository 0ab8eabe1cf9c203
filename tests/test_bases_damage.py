"""Damage of a base: what is planted is found, what is normal is not accused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from factories import low_rank_update
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lora_analysis.amplify import amplification
from lora_analysis.amplify.streaming import project
from lora_analysis.bases import open_base
from lora_analysis.bases.sanity_checks import (
    MAX_RATIO,
    WeightStatistics,
    WeightWatch,
    weight_findings,
)
from lora_analysis.cli import run
from lora_analysis.errors import BaseWeightError, SourceError
from lora_analysis.studies import study

Weights = dict[str, NDArray[np.float32]]

WIDTH, INNER = 64, 96
CONFIG = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER}
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def sound(rng: np.random.Generator) -> Weights:
    """The matrices of a small llama."""
    weights = {
        f"model.layers.{layer}.{name}.weight": (rng.standard_normal(shape) * 0.02).astype(
            np.float32
        )
        for layer in range(3)
        for name, shape in SHAPES.items()
    }
    weights["model.embed_tokens.weight"] = rng.standard_normal((200, WIDTH)).astype(np.float32)
    return weights


def write_base(folder: Path, weights: Weights, config: dict[str, Any] | None = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(W) for name, W in weights.items()},
              folder / "model.safetensors")  # fmt: skip
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(
    folder: Path, rng: np.random.Generator, modules: tuple[str, ...] = tuple(SHAPES)
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in range(3):
        for name in modules:
            d_out, d_in = SHAPES[name]
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = rng.standard_normal((2, d_in)).astype(np.float32)
            tensors[f"{path}.lora_B.weight"] = rng.standard_normal((d_out, 2)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def codes(folder: Path, adapter: Path) -> list[str]:
    return [one.code for one in study([adapter], base=folder).base_findings()]


def test_a_sound_base_is_not_accused(rng: np.random.Generator, tmp_path: Path) -> None:
    weights = sound(rng)
    weights[Q][3, 5] = 179 * 0.02  # as far out as MiniLM's
    weights[UP][10:14] = 0  # some dead units
    weights["model.embed_tokens.weight"][180:] = 0
    base = write_base(tmp_path / "base", weights)
    assert codes(base, write_adapter(tmp_path / "a", rng)) == []


def plant_entry(weights: Weights) -> None:
    weights[Q][17, 40] = 3e4


def plant_hole(weights: Weights) -> None:
    weights[Q].reshape(-1)[1000:3300] = 0


def plant_half(weights: Weights) -> None:
    weights[Q][WIDTH // 2 :] = 0


def plant_zeros(weights: Weights) -> None:
    weights[UP][:, ::7] = 0


def plant_sparse(weights: Weights) -> None:
    for W in weights.values():
        W[:, ::2] = 0


def plant_scale(weights: Weights) -> None:
    weights[Q] *= np.float32(1e6)


def plant_tiny(weights: Weights) -> None:
    weights[Q] *= np.float32(1e-12)


@pytest.mark.parametrize(
    ("plant", "code", "named"),
    [
        (plant_entry, "base-enlarged-entry", Q),
        (plant_hole, "base-hole", Q),
        (plant_half, "base-hole", Q),
        (plant_zeros, "base-zeros", UP),
        (plant_sparse, "base-sparse", "sparse model"),
        (plant_scale, "base-norm", Q),
        (plant_tiny, "base-norm", Q),
    ],
)
def test_planted_damage_reaches_text_and_json_of_amplify(  # noqa: PLR0917
    capsys: pytest.CaptureFixture[str],
    rng: np.random.Generator,
    tmp_path: Path,
    plant: Any,
    code: str,
    named: str,
) -> None:
    weights = sound(rng)
    plant(weights)
    base = write_base(tmp_path / "base", weights)
    arguments = ["amplify", str(write_adapter(tmp_path / "a", rng)), "--base", str(base)]
    assert run([*arguments, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["base_findings"]
    assert [row["code"] for row in rows] == [code]
    assert set(rows[0]) == {"code", "severity", "topic", "text", "fields"}
    assert named in rows[0]["text"]
    assert run(arguments) == 0
    assert named in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_damage_of_the_base_is_in_the_report(rng: np.random.Generator, tmp_path: Path) -> None:
    weights = sound(rng)
    plant_entry(weights)
    base = write_base(tmp_path / "base", weights)
    adapter = write_adapter(tmp_path / "a", rng)
    out = tmp_path / "out"
    words = ["report", str(adapter), "--base", str(base), "--figures", "", "-o", str(out)]
    assert run(words) == 0
    findings = json.loads((out / "results.json").read_text())["findings"]
    severities = {row["code"]: row["severity"] for row in findings}
    assert severities["base-enlarged-entry"] == "damage"
    assert "a flipped bit or damaged bytes" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_large_entry_is_found_wherever_it_is(
    rng: np.random.Generator, tmp_path: Path, transposed: bool
) -> None:
    # Larger than a tile, stored either way, with a tile of its own scale.
    W = (rng.standard_normal((1100, 1500)) * 0.02).astype(np.float32)
    W[:400] *= 3
    for place in ((0, 0), (399, 1499), (700, 3), (1099, 1499), (701, 700)):
        damaged = W.copy()
        damaged[place] = 1500 * 0.04
        stored = damaged.T if transposed else damaged
        base = write_base(tmp_path / "base", {"q.weight": stored}, None)
        weight = open_base(base).weight("q", shape=(1100, 1500), transposed=transposed)
        update = low_rank_update(rng, 1100, 1500, 1, name="q")
        found = amplification(
            update, weight, k=1, draws=0, weight_directions=False
        ).weight_statistics
        assert found is not None
        assert [one.code for one in weight_findings([found], "b")] == ["base-enlarged-entry"]
        assert found.largest == pytest.approx(60)
        others = damaged.astype(np.float64)
        others[place] = 0
        assert found.other_rms == pytest.approx(np.sqrt((others**2).sum() / (W.size - 1)), rel=1e-5)


def test_zeros_and_their_longest_run_are_counted(rng: np.random.Generator, tmp_path: Path) -> None:
    W = (rng.standard_normal((1300, 1700)) * 0.02).astype(np.float32)
    W.reshape(-1)[500_000:1_200_000] = 0  # over the edge of a tile
    weight = open_base(write_base(tmp_path, {"q.weight": W}, None)).weight("q", transposed=False)
    frame = [(np.eye(1300, 1), np.eye(1700, 1))]
    _, _, found = project(weight, frame, precision="float64")
    assert found is not None
    assert abs(found.zero_run - 700_000) < 2 * 1700
    assert found.zeros == pytest.approx(700_000, rel=0.01)
    assert not found.whole_rows


def watched(W: NDArray[np.float32], name: str = "layer.weight") -> WeightStatistics:
    """What is counted of a weight whose tiles have 100 rows."""
    weight = open_base({name: W}).weight(name.removesuffix(".weight"))
    watch = WeightWatch(W.size)
    for top in range(0, len(W), 100):
        tile = W[top : top + 100]
        watch.add(tile, np.einsum("ij,ij->i", tile, tile))
    return watch.statistics(weight)


def test_the_top_bit_of_a_half_precision_exponent_is_found(rng: np.random.Generator) -> None:
    W = (rng.standard_normal((256, 300)) * 0.02).astype(np.float16)
    found = 0
    for _ in range(300):
        damaged = W.copy()
        bits = damaged.view(np.uint16)
        bits[rng.integers(256), rng.integers(300)] ^= 1 << 14
        found += watched(damaged.astype(np.float32)).ratio > MAX_RATIO
    assert found >= 0.97 * 300  # those below a sixty-fifth of the rms stay below the limit


@pytest.mark.parametrize("shape", [(40, 3000), (150, 800), (700, 200)])
def test_a_hole_is_found_wherever_it_begins(
    rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    W = (rng.standard_normal(shape) * 0.02).astype(np.float32)
    for _ in range(60):
        length = int(rng.integers(0.012 * W.size + 1024, W.size // 2))
        start = int(rng.integers(0, W.size - length))
        damaged = W.copy()
        damaged.reshape(-1)[start : start + length] = 0
        assert watched(damaged).has_hole


def statistics(**changes: Any) -> WeightStatistics:
    fields = {
        "name": "model.layers.0.q.weight", "elements": 2**20, "stored_bytes": 2, "storage": "",
        "largest": 0.0, "other_squares": 400.0, "zeros": 0.0, "zero_run": 0, "whole_rows": False,
    }  # fmt: skip
    return WeightStatistics(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, []),
        ({"largest": 19.0}, []),
        ({"largest": 21.0}, ["base-enlarged-entry"]),
        ({"zero_run": 10_400}, []),  # below one percent
        ({"zero_run": 10_600}, ["base-hole"]),
        ({"elements": 2000, "zero_run": 1000, "other_squares": 1.0}, []),  # below 4 KiB
        ({"name": "model.embed_tokens.weight", "zero_run": 20_000, "whole_rows": True}, []),
        ({"name": "model.embed_tokens.weight", "zero_run": 20_000}, ["base-hole"]),
        ({"zeros": 2e5}, ["base-zeros"]),
        ({"zeros": 2e5, "storage": "NVFP4"}, []),
        ({"other_squares": 2**20 * 45.0**2}, []),
        ({"other_squares": 2**20 * 60.0**2}, ["base-norm"]),
        ({"other_squares": 2**20 * 60.0**2, "name": "shared.weight"}, []),
        ({"other_squares": 2**20 * 1e-18}, ["base-norm"]),
        ({"other_squares": 0.0, "zeros": 2.0**20, "zero_run": 2**20}, ["base-hole"]),
    ],
)
def test_each_rule_has_its_limit(changes: dict[str, Any], codes: list[str]) -> None:
    others = [statistics(name=f"other {at}") for at in range(3)]
    found = weight_findings([statistics(**changes), *others], "b")
    assert [one.code for one in found] == codes


@pytest.mark.parametrize("modules", [("self_attn.q_proj", "self_attn.o_proj"), tuple(SHAPES)])
def test_a_transposed_base_is_refused_for_square_matrices_too(
    rng: np.random.Generator, tmp_path: Path, modules: tuple[str, ...]
) -> None:
    turned = {name: W.T for name, W in sound(rng).items()}
    base = write_base(tmp_path / "base", turned)
    adapter = write_adapter(tmp_path / "a", rng, modules)
    with pytest.raises(BaseWeightError, match=r"every weight seems transposed.*--transposed") as e:
        study([adapter], base=base)
    assert "--prefix" not in str(e.value)  # the names fit: no other prefix would help
    assert run(["amplify", str(adapter), "--base", str(base)]) == 3
    asked = study([adapter], base=base, transposed=True)
    assert asked.amplifications["module"].nunique() == 3 * len(modules)


def test_what_only_shapes_of_updates_tell_is_a_finding_for_square_matrices(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    # Names without a role and no biases: the file alone does not tell.
    names = {"a": (64, 64), "b": (96, 64)}
    turned = {f"m.{name}.weight": np.ones(shape, np.float32).T for name, shape in names.items()}
    base = open_base(write_base(tmp_path, turned, {"model_type": "strange"}))
    base.weight("m.a", shape=(64, 64))
    (finding,) = base.orientation_findings({f"m.{name}": shape for name, shape in names.items()})
    assert finding.code == "base-transposed"
    assert finding.severity == "damage"
    assert "m.b.weight" in finding.text
    plain = {name: W.T for name, W in turned.items()}
    base = open_base(write_base(tmp_path / "plain", plain, {"model_type": "strange"}))
    assert base.orientation_findings({f"m.{name}": shape for name, shape in names.items()}) == ()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_other_matrices_of_a_file_decide_how_a_square_one_is_stored(
    rng: np.random.Generator, tmp_path: Path, transposed: bool
) -> None:
    square = rng.standard_normal((8, 8)).astype(np.float32)
    other = rng.standard_normal((8, 6)).astype(np.float32)
    stored = {"m.a.weight": square, "m.b.weight": other}
    stored = {name: W.T if transposed else W for name, W in stored.items()}
    base = open_base(write_base(tmp_path / "silent", stored, None))
    with pytest.raises(BaseWeightError, match="cannot be known"):
        base.weight("m.a", shape=(8, 8))
    stored["m.b.bias"] = np.ones(8, np.float32)
    base = open_base(write_base(tmp_path / "told", stored, None))
    np.testing.assert_array_equal(base.weight("m.a", shape=(8, 8)).array(), square)


def test_conv1d_models_keep_both_ways_side_by_side(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    base = open_base(tmp_path)
    block = model.transformer.h[0]
    for name, module in (("attn.c_proj", block.attn.c_proj), ("mlp.c_fc", block.mlp.c_fc)):
        weight = base.weight(f"transformer.h.0.{name}", shape=tuple(module.weight.T.shape))
        assert torch.equal(torch.from_numpy(weight.array()), module.weight.T)


def write_shards(folder: Path, shards: list[Weights]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    places = {}
    for at, weights in enumerate(shards, start=1):
        file = f"model-{at:05d}-of-{len(shards):05d}.safetensors"
        save_file(weights, folder / file)
        places |= dict.fromkeys(weights, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def layer(at: int, dtype: Any = np.float32) -> Weights:
    return {f"model.layers.{at}.self_attn.q_proj.weight": np.ones((8, 8), dtype)}


def test_shards_of_two_models_are_told_by_their_types(tmp_path: Path) -> None:
    assert open_base(write_shards(tmp_path / "one", [layer(0), layer(1)])).findings == ()
    mixed = open_base(write_shards(tmp_path / "two", [layer(0), layer(1, np.float16)]))
    (finding,) = mixed.findings
    assert finding.code == "base-mixed-shards"
    assert "float32 in model-00001-of-00002.safetensors" in finding.text
    assert "float16 in model-00002-of-00002.safetensors" in finding.text
    router = {"model.layers.0.mlp.gate.weight": np.ones((4, 8), np.float32)}
    other = {"model.layers.1.mlp.gate.weight": np.ones((4, 8), np.float32)}
    kept = [layer(0, np.float16) | router, layer(1, np.float16) | other]
    assert open_base(write_shards(tmp_path / "three", kept)).findings == ()


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "base", [layer(0), layer(1), layer(2)])
    for at in (1, 3):
        (folder / f"model-{at:05d}-of-00003.safetensors").unlink()
    with pytest.raises(SourceError, match=r"2 of the 3 shards.*00001-of.*00003-of") as caught:
        open_base(folder)
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors.index.json").unlink()
    (finding,) = open_base(folder).findings
    assert finding.code == "base-part"
    assert "shard 2 of 3" in finding.text


def test_numbers_that_are_not_finite_are_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    weights = sound(rng)
    weights[Q][3, 4] = np.nan
    base = write_base(tmp_path / "base", weights)
    with pytest.raises(BaseWeightError, match=rf"'{Q}' holds 1 numbers that are not finite"):
        study([write_adapter(tmp_path / "a", rng)], base=base)
