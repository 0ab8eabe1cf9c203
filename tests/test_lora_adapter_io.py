"""From a model to an `Adapter` and back, in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from factories import low_rank_update
from lora_models import TOKENS, adapted, fill, lora_layers, tiny_model
from torch import nn

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate, Provenance
from lora_analysis.errors import (
    IncompatibleError,
    InputError,
    LoraAnalysisError,
    ScaleError,
    TargetError,
    UnsupportedMethodError,
)
from lora_analysis.lora import (
    add_lora,
    extract_adapter,
    initial_adapter,
    load_adapter_into,
    merge_lora,
    parameter_counts,
    set_active,
)


def test_an_extracted_adapter_holds_factors_scale_layout_and_head() -> None:
    model = adapted()
    adapter = extract_adapter(model, label="r2-s7", config={"task_type": "SEQ_CLS"})
    assert list(adapter)[:3] == ["layers.0.c_proj", "layers.0.q_proj", "layers.1.c_proj"]
    assert len(adapter) == 22
    update = adapter["layers.10.c_proj"]
    factors = lora_layers(model)["layers.10.c_proj"].adapters["default"]
    assert isinstance(update, LowRankUpdate)
    np.testing.assert_array_equal(update.A, factors.A.detach().numpy())
    np.testing.assert_array_equal(update.B, factors.B.detach().numpy())
    assert (update.scale, update.alpha, update.layout) == (2.0, 4, "conv1d")
    assert (update.label, update.stored_dtype) == ("r2-s7", "float32")
    assert adapter["layers.10.q_proj"].layout == "linear"  # type: ignore[union-attr]
    assert sorted(adapter.saved_modules) == [
        "head.0.bias",
        "head.0.weight",
        "head.2.bias",
        "head.2.weight",
    ]
    trained = model.head.adapters["default"][0].weight
    np.testing.assert_array_equal(adapter.saved_modules["head.0.weight"], trained.detach().numpy())
    assert adapter.config == {
        "task_type": "SEQ_CLS",
        "target_modules": ["q_proj", "c_proj"],
        "modules_to_save": ["head"],
        "use_rslora": False,
        "lora_dropout": 0.0,
        "base_model_name_or_path": None,
    }
    provenance = adapter.provenance
    assert (provenance.format, provenance.rank, provenance.seed) == ("memory", 2, 7)
    assert set(provenance.scale_origin) == set(adapter)
    assert set(provenance.scale_origin.values()) == {"config"}


def test_an_extracted_adapter_does_not_change_with_the_model() -> None:
    model = adapted()
    adapter = extract_adapter(model)
    before = adapter["layers.0.q_proj"].delta_weight()
    head = adapter.saved_modules["head.0.bias"].copy()
    fill(model, seed=9)
    np.testing.assert_array_equal(adapter["layers.0.q_proj"].delta_weight(), before)
    np.testing.assert_array_equal(adapter.saved_modules["head.0.bias"], head)


@pytest.mark.parametrize("kind", ["q_proj", "c_proj"])
def test_the_updates_delta_weight_is_what_merging_adds(kind: str) -> None:
    model = adapted(dtype=torch.float64)
    name = f"layers.3.{kind}"
    before = model.get_submodule(name).base_layer.weight.clone()
    delta = extract_adapter(model)[name].delta_weight()
    merge_lora(model)
    added = (model.get_submodule(name).weight - before).detach().numpy()
    np.testing.assert_allclose(added.T if kind == "c_proj" else added, delta, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loaded_adapter_computes_what_the_extracted_one_did(dtype: torch.dtype) -> None:
    model, fresh = adapted(dtype=dtype), tiny_model().to(dtype)
    names = load_adapter_into(fresh, extract_adapter(model))
    assert names == list(lora_layers(model)) or sorted(names) == sorted(lora_layers(model))
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    assert parameter_counts(fresh)[0] == 0
    again = extract_adapter(fresh)
    assert again.config == extract_adapter(model).config
    assert again.provenance.seed == 7


def test_a_loaded_adapter_keeps_the_rank_and_scale_of_each_module(
    rng: np.random.Generator,
) -> None:
    updates = {
        name: low_rank_update(rng, 10, 8, rank, name=name, scale=scale)
        for name, rank, scale in [("layers.0.q_proj", 3, 0.7), ("layers.10.q_proj", 5, -2.0)]
    }
    model = tiny_model().double()
    load_adapter_into(model, Adapter(updates, label="pair"))
    set_active(model, "default")
    x = torch.randn(4, 8, dtype=torch.float64)
    for name, update in updates.items():
        layer = model.get_submodule(name)
        expected = layer.base_layer(x) + x @ torch.tensor(update.delta_weight()).T
        torch.testing.assert_close(layer(x), expected)
    assert extract_adapter(model).provenance.rank is None


def test_training_goes_on_from_a_loaded_adapter() -> None:
    model, fresh = adapted(), tiny_model()
    load_adapter_into(fresh, extract_adapter(model), trainable=True)
    assert parameter_counts(fresh) == parameter_counts(model)
    fresh(TOKENS).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in fresh.parameters())


def test_saved_tensors_find_their_module_without_a_config() -> None:
    adapter = extract_adapter(adapted())
    bare = Adapter(dict(adapter), label="bare", saved_modules=adapter.saved_modules)
    with_config, without = tiny_model(), tiny_model()
    load_adapter_into(with_config, adapter)
    load_adapter_into(without, bare)
    assert torch.equal(with_config(TOKENS), without(TOKENS))
    assert extract_adapter(without).saved_modules.keys() == adapter.saved_modules.keys()


def test_one_of_several_adapters_is_extracted_by_name() -> None:
    model = adapted()
    add_lora(model, rank=3, alpha=1, targets=["1.q_proj"], seed=0, name="second")
    assert list(extract_adapter(model, name="second")) == ["layers.1.q_proj"]
    assert extract_adapter(model, name="second").saved_modules == {}
    with pytest.raises(InputError, match=r"several adapters.*\['default', 'second'\]"):
        extract_adapter(model)
    with pytest.raises(InputError, match="no adapter 'third'"):
        extract_adapter(model, name="third")


def test_a_merged_or_plain_model_has_nothing_to_extract() -> None:
    model = adapted()
    merge_lora(model)
    for one in (model, tiny_model()):
        with pytest.raises(InputError, match="no adapter: none was added, or it is merged"):
            extract_adapter(one)


def adapter_of(*updates: Any, **more: Any) -> Adapter:
    return Adapter({u.name: u for u in updates}, label="given", **more)


def update_of(name: str, d_out: int, d_in: int, scale: float | None = 1.0) -> LowRankUpdate:
    return LowRankUpdate(name, np.ones((2, d_in)), np.ones((d_out, 2)), scale)


GOOD = update_of("layers.0.q_proj", 10, 8)


@pytest.mark.parametrize(
    ("adapter", "error", "words"),
    [
        (
            adapter_of(update_of("layers.0.qproj", 10, 8)),
            TargetError,
            "'layers.0.qproj'.*layers.0.q_proj",
        ),
        (adapter_of(update_of("layers.0.norm", 8, 8)), TargetError, "a LayerNorm is not a Linear"),
        (
            adapter_of(GOOD, update_of("layers.1.q_proj", 8, 10)),
            IncompatibleError,
            r"'layers.1.q_proj' of 'given'.*\(10, 8\).*A is \(2, 10\) and B \(8, 2\)",
        ),
        (adapter_of(update_of("layers.0.c_proj", 10, 8)), IncompatibleError, r"\(8, 10\)"),
        (adapter_of(update_of("layers.0.q_proj", 10, 8, None)), ScaleError, "'layers.0.q_proj'"),
        (adapter_of(DenseUpdate("layers.0.q_proj", np.ones((10, 8)))), InputError, "dense update"),
        (
            adapter_of(GOOD, saved_modules={"haed.0.weight": np.ones((8, 8))}),
            TargetError,
            "'haed.0.weight'.*Near names: head.0",
        ),
        (
            adapter_of(GOOD, saved_modules={"head.2.weight": np.ones((5, 8))}),
            IncompatibleError,
            r"'head.2' of 'given' holds 'weight' of shape \(5, 8\), the model's has \(3, 8\)",
        ),
        (
            adapter_of(GOOD, saved_modules={"head.2.scale": np.ones(3)}),
            IncompatibleError,
            r"'scale' of shape \(3,\), the model's has none",
        ),
        (
            adapter_of(GOOD, saved_modules={"layers.0.q_proj.weight": np.ones((10, 8))}),
            TargetError,
            "apart from the adapted ones",
        ),
        (adapter_of(GOOD, config={"bias": "all"}), UnsupportedMethodError, "bias = 'all'"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model_alone(
    adapter: Adapter, error: type[LoraAnalysisError], words: str
) -> None:
    model = tiny_model()
    before = list(model.state_dict())
    with pytest.raises(error, match=words):
        load_adapter_into(model, adapter)
    assert list(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_is_not_loaded_over_another() -> None:
    model = adapted()
    adapter = extract_adapter(model)
    with pytest.raises(InputError, match="has an adapter 'default' already"):
        load_adapter_into(model, adapter)
    expected = model(TOKENS)
    load_adapter_into(model, adapter, name="again")
    assert torch.equal(model(TOKENS), expected)


def test_a_transformers_config_names_the_base_model() -> None:
    model: Any = nn.ModuleDict({"q": nn.Linear(4, 4)})
    model.config = type("Config", (), {"name_or_path": "some/base"})()
    add_lora(model, rank=1, alpha=1, targets=["q"], seed=0)
    adapter = extract_adapter(model)
    assert adapter.config["base_model_name_or_path"] == "some/base"
    assert adapter.provenance == Provenance(
        scale_origin={"q": "config"}, base_model="some/base", rank=1, seed=0
    )


def test_the_initial_adapter_is_what_training_started_from() -> None:
    model = tiny_model()
    add_lora(model, rank=2, alpha=4, targets=["q_proj", "c_proj"], seed=7)
    fresh = extract_adapter(model)
    fill(model)
    start = initial_adapter(extract_adapter(model, label="trained"))
    assert (list(start), start.label) == (list(fresh), "trained (initial)")
    for module, update in fresh.items():
        np.testing.assert_array_equal(start[module].A, update.A)  # type: ignore[union-attr]
        np.testing.assert_array_equal(start[module].B, 0)  # type: ignore[union-attr]


def test_no_initial_adapter_without_a_seed_or_without_factors() -> None:
    update = low_rank_update(np.random.default_rng(0))
    with pytest.raises(InputError, match="seed of strange is not known"):
        initial_adapter(Adapter({update.name: update}, label="strange"))
    dense = DenseUpdate("m", np.ones((2, 3)))
    known = Adapter({"m": dense}, label="full", provenance=Provenance(seed=1))
    with pytest.raises(InputError, match="'m' in full is a dense update"):
        initial_adapter(known)["m"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"variant": "DoRA", "magnitude": np.ones(8)}, "DoRA.*effective_update"),
        ({"base_name": "layers.1.q_proj"}, "of the weight 'layers.1.q_proj'"),
    ],
)
def test_an_update_that_is_not_s_b_a_on_its_module_is_not_loaded(
    rng: np.random.Generator, fields: dict[str, Any], told: str
) -> None:
    model = tiny_model()
    name = "layers.0.q_proj"
    d_out, d_in = model.get_submodule(name).weight.shape
    fields = {key: np.ones(d_out) if key == "magnitude" else one for key, one in fields.items()}
    plain = low_rank_update(rng, d_out, d_in, 2, name=name)
    load_adapter_into(model, Adapter({name: plain}, label="plain"), name="plain")
    update = LowRankUpdate(name, plain.A, plain.B, 2.0, **fields)
    with pytest.raises(UnsupportedMethodError, match=told):
        load_adapter_into(model, Adapter({name: update}, label="other"), name="other")
