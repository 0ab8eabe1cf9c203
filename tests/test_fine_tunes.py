"""Full fine-tunes: their update, and the best LoRA of it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import orthonormal
from reference import assert_close, dense_svd
from safetensors.numpy import load_file, save_file

from lora_analysis import (
    approximate_fine_tune,
    open_base,
    read_adapter,
    read_fine_tune,
    write_adapter,
)
from lora_analysis.adapter import DenseUpdate
from lora_analysis.errors import BaseWeightError, InputError
from lora_analysis.similarity import subspace_similarity

WEIGHTS = {
    "model.embed_tokens": (11, 8),
    "model.layers.0.q_proj": (8, 8),
    "model.layers.0.up_proj": (12, 8),
    "model.layers.1.q_proj": (8, 8),
}
FAMILY = {"model_type": "llama"}


def save(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = FAMILY) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in tensors.items()},
        folder / "model.safetensors",
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def models(rng: np.random.Generator, tmp_path: Path) -> dict[str, Any]:
    """A base and its fine-tune: one weight left alone, one norm changed, one head added."""
    base = {f"{n}.weight": rng.standard_normal(s) for n, s in WEIGHTS.items()}
    base |= {"model.norm.weight": np.ones(8), "model.layers.0.norm.weight": np.ones(8)}
    deltas = {n: rng.standard_normal(s) for n, s in WEIGHTS.items() if n != "model.layers.1.q_proj"}
    tuned = dict(base)
    for name, delta in deltas.items():
        tuned[f"{name}.weight"] = base[f"{name}.weight"] + delta
    tuned["model.norm.weight"] = np.full(8, 2.0)
    tuned["score.weight"] = rng.standard_normal((3, 8))
    return {
        "base": save(tmp_path / "base", base),
        "tuned": save(tmp_path / "tuned", tuned),
        "deltas": deltas,
        "tensors": (tuned, base),
    }


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("vit.embed", "linear"),
        ("embed_out", "linear"),
        ("gpt_neox.embed_in", "embedding"),
        ("bert.embeddings.word_embeddings", "embedding"),
        ("text_model.embeddings.position_embedding", "embedding"),
        ("transformer.wte", "embedding"),
    ],
)
def test_a_table_is_told_from_a_projection_by_its_whole_name(
    tmp_path: Path, rng: np.random.Generator, name: str, layout: str
) -> None:
    old, new = (rng.standard_normal((6, 4)).astype(np.float32) for _ in range(2))
    for place, tensor in (("base", old), ("tuned", new)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({f"{name}.weight": tensor}, tmp_path / place / "model.safetensors")
    one = read_fine_tune(tmp_path / "tuned", tmp_path / "base")[name]
    assert one.layout == layout
    delta = new - old
    assert_close(one.delta_weight(), delta.T if layout == "embedding" else delta, atol=1e-6)


def test_the_update_of_a_fine_tune_is_the_difference_of_the_weights(
    models: dict[str, Any],
) -> None:
    update = read_fine_tune(models["tuned"], models["base"])
    assert list(update) == list(WEIGHTS)
    for name, delta in models["deltas"].items():
        one = update[name]
        assert isinstance(one, DenseUpdate)
        table = name == "model.embed_tokens"
        assert one.layout == ("embedding" if table else "linear")
        assert_close(one.delta_weight(), delta.T if table else delta, atol=1e-6)
    assert update.label == "tuned"
    assert update.provenance.base_model == str(models["base"])


def test_what_is_not_part_of_the_update_is_said(models: dict[str, Any]) -> None:
    identical, lost, others = map(
        str, read_fine_tune(models["tuned"], models["base"]).provenance.findings
    )
    assert "1 of 5 weights are unchanged from base, so their update is zero" in identical
    assert "'model.layers.1.q_proj'" in identical
    assert "1 of 5 weights are left out, since base has no counterpart" in lost
    assert "no weight belongs to 'score'" in lost
    assert others.startswith("1 tensors that are not matrices")
    assert "'model.norm.weight'" in others


def test_a_model_with_a_prefix_is_held_against_one_without(
    models: dict[str, Any], tmp_path: Path
) -> None:
    _, base = models["tensors"]
    bare = {name.removeprefix("model."): tensor for name, tensor in base.items()}
    update = read_fine_tune(models["tuned"], save(tmp_path / "bare", bare))
    assert list(update) == list(WEIGHTS)


def test_a_fine_tune_is_compared_like_any_adapter(models: dict[str, Any]) -> None:
    full = read_fine_tune(models["tuned"], models["base"])
    small = approximate_fine_tune(models["tuned"], models["base"], rank=3).adapter
    name = "model.layers.0.up_proj"
    grid = subspace_similarity(full[name], small[name])
    assert_close(np.diag(grid.values)[:3], 1.0, atol=1e-6)


def test_a_fine_tune_saved_without_its_config_is_of_its_bases_family(
    models: dict[str, Any],
) -> None:
    (models["tuned"] / "config.json").unlink()
    assert list(read_fine_tune(models["tuned"], models["base"])) == list(WEIGHTS)


def test_models_in_memory_are_taken_too(rng: np.random.Generator) -> None:
    base = {"layers.0.q": rng.standard_normal((6, 5)), "layers.1.q": rng.standard_normal((6, 5))}
    tuned = base | {"layers.1.q": base["layers.1.q"] + 1.0}
    update = read_fine_tune(open_base(tuned), base, label="mine")
    assert list(update) == ["layers.0.q", "layers.1.q"]
    assert not update["layers.0.q"].delta_weight().any()
    assert_close(update["layers.1.q"].delta_weight(), np.ones((6, 5)), atol=1e-6)


def test_a_live_model_of_conv1d_is_turned(rng: np.random.Generator) -> None:
    import torch
    from lora_models import tiny_model

    base, tuned = tiny_model(), tiny_model()
    step = torch.randn(10, 8)
    with torch.no_grad():
        tuned.layers[3].c_proj.weight += step
        tuned.layers[3].norm.bias += 1
    update = read_fine_tune(tuned, base)
    module = update["layers.3.c_proj"]
    assert isinstance(module, DenseUpdate)
    assert module.layout == "conv1d"
    assert not any(update[name].delta_weight().any() for name in update if name != module.name)
    assert_close(module.delta_weight(), step.numpy().T, atol=1e-6)
    assert "'layers.3.norm.bias'" in update.provenance.findings[-1].text


def test_what_cannot_be_compared_is_refused(
    models: dict[str, Any], rng: np.random.Generator, tmp_path: Path
) -> None:
    _, base = models["tensors"]
    unknown = save(tmp_path / "unknown", base, config=None)
    nameless = save(tmp_path / "nameless", models["tensors"][0], config=None)
    other = save(tmp_path / "other", {"h.0.fc.weight": rng.standard_normal((4, 4))})
    only = save(tmp_path / "only", {"a.bias": np.ones(3)})
    table: list[tuple[Any, type[InputError], str]] = [
        (
            lambda: read_fine_tune(models["base"], models["base"]),
            InputError,
            "Is it the base itself",
        ),
        (lambda: read_fine_tune(nameless, unknown), BaseWeightError, "Pass transposed="),
        (lambda: read_fine_tune(other, models["base"]), BaseWeightError, "no weight belongs to"),
        (lambda: read_fine_tune(only, models["base"]), InputError, "holds no weight matrix"),
        (
            lambda: read_fine_tune(models["tuned"], models["base"], modules="k_proj"),
            InputError,
            "no weight named 'k_proj'",
        ),
    ]
    for call, kind, said in table:
        with pytest.raises(kind, match=said):
            call()


def test_one_matrix_is_held_at_a_time(rng: np.random.Generator, tmp_path: Path) -> None:
    size = (1500, 1000)
    base = {f"layers.{i}.q_proj.weight": rng.standard_normal(size) for i in range(6)}
    tuned = {name: tensor + 0.1 for name, tensor in base.items()}
    paths = [save(tmp_path / name, t) for name, t in (("base", base), ("tuned", tuned))]
    del base, tuned
    tracemalloc.start()
    update = read_fine_tune(paths[1], paths[0])
    held = tracemalloc.get_traced_memory()[1]
    for name in update:
        _ = update[name]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    matrix, tile = 4 * 1500 * 1000, 4 * 2**20
    assert held < 3 * tile + 2**20
    assert peak < 2 * matrix + 2 * tile + 2**20  # the last one is let go after the next is made


# --- approximate_fine_tune ----------------------------------------------------------------------


def test_extract_gives_the_truncated_svd_of_each_difference(models: dict[str, Any]) -> None:
    found = approximate_fine_tune(models["tuned"], models["base"], rank=2)
    for one in found.modules:
        delta = models["deltas"][one.module]
        delta = delta.T if one.module == "model.embed_tokens" else delta
        U, S, V = dense_svd(delta, 8)
        small = found.adapter[one.module].delta_weight()
        assert_close(small, (U[:, :2] * S[:2]) @ V[:, :2].T, atol=1e-5)
        assert one.error == pytest.approx(np.linalg.norm(S[2:]) / np.linalg.norm(S), rel=1e-5)
        assert one.given_parameters == delta.size


def test_a_planted_lora_is_found_whole(rng: np.random.Generator, tmp_path: Path) -> None:
    W = rng.standard_normal((40, 30))
    delta = orthonormal(rng, 40, 3) @ np.diag([3.0, 2.0, 1.0]) @ orthonormal(rng, 30, 3).T
    name = "layers.0.q_proj"
    found = approximate_fine_tune({name: W + delta}, {name: W}, rank=3, modules="q_proj")
    assert found.error < 1e-6
    assert_close(found.adapter[name].delta_weight(), delta, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_extracted_lora_of_full_rank_has_the_logits_of_the_fine_tune(
    family: str, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from test_formats_peft_oracle import MODELS

    def fresh() -> Any:
        torch.manual_seed(3)
        model, _, _ = MODELS[family]()
        return model.eval()

    # GPT-2's table is tied to its head, which a layer around the table alone would not change.
    kinds = ("attn", "mlp") if family == "gpt2" else ("attn", "mlp", "embed_tokens")
    base, tuned = fresh(), fresh()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.ndim == 2 and any(kind in name for kind in kinds):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    modules = rf".*({'|'.join(kinds)}).*"
    found = approximate_fine_tune(
        tmp_path / "tuned", tmp_path / "base", energy=1.0, modules=modules
    )
    write_adapter(found.adapter, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(fresh(), str(tmp_path / "lora")).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)
        assert (loaded(ids).logits - base(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize(("kernel", "inputs"), [((3, 3), 4), ((1, 1), 6), ((5,), 2)])
def test_convolutions_are_part_of_a_fine_tune(
    rng: np.random.Generator, tmp_path: Path, kernel: tuple[int, ...], inputs: int
) -> None:
    shape = (6, inputs, *kernel)
    base = {"conv.weight": rng.standard_normal(shape).astype(np.float32)}
    step = rng.standard_normal(shape).astype(np.float32)
    places = [tmp_path / name for name in ("base.safetensors", "tuned.safetensors")]
    for place, tensor in zip(
        places, (base["conv.weight"], base["conv.weight"] + step), strict=True
    ):
        save_file({"conv.weight": tensor}, place)
    update = read_fine_tune(places[1], places[0])
    one = update["conv"]
    assert isinstance(one, DenseUpdate)
    assert (one.layout, one.kernel) == ("conv", kernel)
    assert_close(one.delta_weight(), step.reshape(6, -1), atol=1e-6)
    small = approximate_fine_tune(places[1], places[0], rank=2).adapter
    folder = write_adapter(small, tmp_path / "lora")
    back = read_adapter(folder)["conv"]
    U, S, V = np.linalg.svd(step.reshape(6, -1).astype(float), full_matrices=False)
    assert_close(back.delta_weight(), (U[:, :2] * S[:2]) @ V[:2], atol=1e-5)
    assert load_file(folder / "adapter_model.safetensors")[
        "base_model.model.conv.lora_A.weight"
    ].shape == (2, inputs, *kernel)
