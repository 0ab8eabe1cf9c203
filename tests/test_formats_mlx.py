"""Adapters of mlx-lm: every layer, both meanings of the scale, and mlx-lm's own fused weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.effective import effective_update
from lora_analysis.errors import MalformedFileError, UnsupportedMethodError
from lora_analysis.formats import find_adapters, read_adapter

NEW = {"num_layers": 4, "fine_tune_type": "lora"}
PARAMETERS = {"rank": 2, "alpha": 16, "scale": 10.0, "dropout": 0.0}
Q = "model.layers.3.self_attn.q_proj"
EXPERTS = "model.layers.3.mlp.switch_mlp.up_proj"


def matrix(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture
def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A linear layer, an embedding and three experts, by the layout of mlx-lm's tuner/lora.py."""
    return {
        f"{Q}.lora_a": matrix(rng, 6, 2),
        f"{Q}.lora_b": matrix(rng, 2, 5),
        "model.embed_tokens.lora_a": matrix(rng, 20, 2),
        "model.embed_tokens.lora_b": matrix(rng, 2, 6),
        f"{EXPERTS}.lora_a": matrix(rng, 3, 2, 6),
        f"{EXPERTS}.lora_b": matrix(rng, 3, 7, 2),
    }


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Callable[..., Path]:
    """A folder as mlx-lm leaves it; the fields are those of adapter_config.json."""

    def make(**fields: object) -> Path:
        place = tmp_path / "run"
        place.mkdir(exist_ok=True)
        save_file(tensors, place / "adapters.safetensors")
        config = {"model": "mlx-community/Some-4bit", "lora_parameters": PARAMETERS} | fields
        (place / "adapter_config.json").write_text(json.dumps(config))
        return place

    return make


def test_every_kind_of_layer_is_turned_as_it_must_be(
    folder: Callable[..., Path], tensors: dict[str, np.ndarray]
) -> None:
    adapter = read_adapter(folder(**NEW))
    experts = [f"model.layers.3.mlp.experts.{e}.up_proj" for e in range(3)]
    assert list(adapter) == ["model.embed_tokens", *experts, Q]
    a, b = (tensors[f"{Q}.lora_{role}"].astype(float) for role in "ab")
    np.testing.assert_allclose(adapter[Q].delta_weight(), 10 * (a @ b).T)
    table = adapter["model.embed_tokens"]
    assert isinstance(table, LowRankUpdate)
    assert table.layout == "embedding"
    a, b = (tensors[f"model.embed_tokens.lora_{role}"].astype(float) for role in "ab")
    np.testing.assert_allclose(table.delta_weight().T, 10 * a @ b)
    a, b = (tensors[f"{EXPERTS}.lora_{role}"].astype(float) for role in "ab")
    np.testing.assert_allclose(adapter[experts[2]].delta_weight(), 10 * b[2] @ a[2])
    assert adapter.provenance.format == "mlx"
    assert adapter.provenance.base_model == "mlx-community/Some-4bit"
    assert set(adapter.provenance.scale_origin.values()) == {"config"}
    assert adapter.provenance.findings == ()


def test_an_older_configuration_may_mean_another_scale_and_that_is_said(
    folder: Callable[..., Path],
) -> None:
    place = folder(lora_layers=4)
    adapter = read_adapter(place)
    assert adapter[Q].scale == 10.0  # type: ignore[union-attr]
    (finding,) = map(str, adapter.provenance.findings)
    assert "up to 0.14 applied scale·alpha/rank, here 80" in finding
    mine = read_adapter(place, scale=80)
    assert mine.provenance.findings == ()
    assert set(mine.provenance.scale_origin.values()) == {"caller"}


def test_without_a_configuration_the_scale_is_not_known(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    path = tmp_path / "adapters.npz"
    np.savez(path, **tensors)  # type: ignore[arg-type]
    adapter = read_adapter(path)
    assert adapter[Q].scale is None  # type: ignore[union-attr]
    assert "no adapter_config.json" in adapter.provenance.findings[0].text
    assert read_adapter(tmp_path, scale=2)[Q].shape == (5, 6)


def test_checkpoints_beside_the_final_adapter_are_found_and_read(
    folder: Callable[..., Path], tensors: dict[str, np.ndarray]
) -> None:
    place = folder(**NEW)
    for step in ("0000900", "0000100"):
        save_file(tensors, place / f"{step}_adapters.safetensors")
    found = find_adapters(place)
    steps = ["run/0000100_adapters", "run/0000900_adapters"]
    assert [one.label for one in found] == ["run", *steps]
    assert read_adapter(found[1])[Q].scale == 10.0  # type: ignore[union-attr]
    assert read_adapter(place).label == read_adapter(place / "adapter_config.json").label == "run"


def test_dora_keeps_its_norms_of_a_matrix_and_says_so(
    folder: Callable[..., Path], tensors: dict[str, np.ndarray], rng: np.random.Generator
) -> None:
    tensors[f"{Q}.m"] = np.abs(matrix(rng, 5)) + 1
    tensors["model.embed_tokens.m"] = np.abs(matrix(rng, 20)) + 1
    adapter = read_adapter(folder(**(NEW | {"fine_tune_type": "dora"})))
    update = adapter[Q]
    assert isinstance(update, LowRankUpdate)
    assert update.variant == "DoRA"
    weight = matrix(rng, 5, 6).astype(np.float64)
    moved = weight + update.delta_weight()
    wanted = tensors[f"{Q}.m"][:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(effective_update(update, weight).delta_weight(), wanted - weight)
    assert adapter["model.embed_tokens"].variant == "DoRA by entries"  # type: ignore[union-attr]
    assert "DoRA in 2 of 5 modules" in adapter.provenance.findings[0].text


def test_what_is_no_lora_or_damaged_is_refused(
    folder: Callable[..., Path], tensors: dict[str, np.ndarray]
) -> None:
    whole = {"model.layers.3.self_attn.q_proj.weight": tensors.pop(f"{Q}.lora_a")}
    with pytest.raises(MalformedFileError, match=r"has '.*lora_b' but no '.*q_proj.lora_a'"):
        read_adapter(folder(**NEW))
    tensors.pop(f"{Q}.lora_b")
    tensors[f"{EXPERTS}.lora_b"] = tensors[f"{EXPERTS}.lora_b"][:2].copy()
    with pytest.raises(MalformedFileError, match=r"a stack of experts needs \(E, r, in\)"):
        read_adapter(folder(**NEW))
    tensors.clear()
    tensors.update(whole)
    with pytest.raises(UnsupportedMethodError, match="fine_tune_type is 'full'"):
        read_adapter(folder(num_layers=4, fine_tune_type="full"))
    with pytest.raises(MalformedFileError, match="no LoRA factors found"):
        read_adapter(folder(**NEW))


@pytest.mark.real
def test_a_real_adapter_reads_as_its_tensors_say(real_adapters: Path) -> None:
    from safetensors.numpy import load_file

    folder = real_adapters / "qwen2.5-mlx"
    assert [one.label for one in find_adapters(folder)] == [
        "qwen2.5-mlx",
        "qwen2.5-mlx/0000100_adapters",
    ]
    for path in ("adapters.safetensors", "0000100_adapters.safetensors"):
        adapter, stored = read_adapter(folder / path), load_file(folder / path)
        assert len(adapter) == 8
        for name, update in adapter.items():
            a, b = (stored[f"{name}.lora_{role}"].astype(float) for role in "ab")
            np.testing.assert_allclose(update.delta_weight(), 10 * (a @ b).T)


def test_every_layer_agrees_with_what_mlx_lm_fuses(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    nn = pytest.importorskip("mlx.nn")
    layers = pytest.importorskip("mlx_lm.tuner.lora")
    dora = pytest.importorskip("mlx_lm.tuner.dora")
    switch = pytest.importorskip("mlx_lm.models.switch_layers")
    bases = {
        "q_proj": (nn.Linear(6, 5, bias=False), layers.LoRALinear),
        "embed_tokens": (nn.Embedding(20, 6), layers.LoRAEmbedding),
        "mlp.switch_mlp.up_proj": (
            switch.SwitchLinear(6, 7, 3, bias=False),
            layers.LoRASwitchLinear,
        ),
        "o_proj": (nn.Linear(6, 5, bias=False), dora.DoRALinear),
    }
    mx.random.seed(0)
    stored, fused = {}, {}
    for name, (base, kind) in bases.items():
        layer = kind.from_base(base, r=2, scale=3.0)
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
        own = [key for key in ("lora_a", "lora_b", "m") if key in layer]
        stored |= {f"{name}.{key}": layer[key] for key in own}
        fused[name] = np.array(layer.fuse().weight) - np.array(base.weight)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), stored)
    config = NEW | {"lora_parameters": {"rank": 2, "scale": 3.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(tmp_path)
    for name, update in adapter.items():
        expert = name.split(".")[2] if "experts" in name else None
        delta = fused["mlp.switch_mlp.up_proj"][int(expert)] if expert else fused.get(name)
        whole = update
        if name == "o_proj":
            assert isinstance(update, LowRankUpdate)
            whole = effective_update(update, np.array(bases[name][0].weight))
        ours = whole.delta_weight()
        np.testing.assert_allclose(ours.T if name == "embed_tokens" else ours, delta, atol=1e-5)
