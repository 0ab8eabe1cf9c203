"""Adapters and updates from objects in memory; PEFT's own files and numbers are the oracle."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import adapter as random_adapter
from factories import low_rank_update
from safetensors.numpy import load_file
from test_formats_peft_oracle import MODELS, VARIANTS, assert_same_updates, peft_deltas, peft_model

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate
from lora_analysis.bases import as_weight, open_base
from lora_analysis.effective import effective_adapter
from lora_analysis.errors import (
    BaseWeightError,
    InputError,
    UnknownFormatError,
    UnsupportedMethodError,
)
from lora_analysis.formats import as_adapter, as_update, read_adapter, write_adapter
from lora_analysis.lora import add_lora, extract_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]


def saved(model: Any, folder: Path, name: str = "default") -> Adapter:
    """Return the adapter that PEFT saves."""
    model.save_pretrained(folder, selected_adapters=[name])
    return read_adapter(folder if name == "default" else folder / name)


def assert_same_adapter(live: Adapter, stored: Adapter) -> None:
    assert list(live) == list(stored)
    for name in stored:
        a, b = live[name], stored[name]
        assert isinstance(a, LowRankUpdate)
        assert isinstance(b, LowRankUpdate)
        for field in ("scale", "alpha", "layout", "kernel", "variant", "base_name", "stored_dtype"):
            assert getattr(a, field) == getattr(b, field), (name, field)
        np.testing.assert_array_equal(a.A, b.A)
        np.testing.assert_array_equal(a.B, b.B)
        assert (a.magnitude is None) == (b.magnitude is None)
        if a.magnitude is not None and b.magnitude is not None:
            np.testing.assert_array_equal(a.magnitude, b.magnitude)
    assert [f.code for f in live.provenance.findings] == [
        f.code for f in stored.provenance.findings
    ]
    assert dict(live.provenance.scale_origin) == dict(stored.provenance.scale_origin)
    assert live.provenance.rank == stored.provenance.rank
    assert live.provenance.base_model == stored.provenance.base_model
    assert set(live.saved_modules) == set(stored.saved_modules)
    for name, value in stored.saved_modules.items():
        np.testing.assert_array_equal(live.saved_modules[name], value)
    assert set(live.side_tensors) == set(stored.side_tensors)
    for name, tensor in stored.side_tensors.items():
        np.testing.assert_array_equal(live.side_tensors[name].read(), tensor.read())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_a_live_peft_model_is_the_adapter_that_peft_saves(
    tmp_path: Path, family: str, variant: str
) -> None:
    model = peft_model(family, VARIANTS[variant])
    live = as_adapter(model)
    assert_same_updates(live, peft_deltas(model))
    assert_same_adapter(live, saved(model, tmp_path))


def conv_model() -> torch.nn.Module:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(11, 6)
            self.conv = torch.nn.Conv2d(3, 5, 3)
            self.lin = torch.nn.Linear(6, 7)

    torch.manual_seed(0)
    return Net()


def with_peft(model: Any, name: str = "default", **config: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, **config), adapter_name=name)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key or "lora_embedding_A" in key or "magnitude" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return wrapped


@pytest.mark.parametrize("use_dora", [False, True])
def test_embeddings_convolutions_and_dora_are_those_of_the_file(
    tmp_path: Path, use_dora: bool
) -> None:
    targets = ["embed", "conv", "lin"]
    model = with_peft(conv_model(), target_modules=targets, use_dora=use_dora)
    live = as_adapter(model)
    assert_same_adapter(live, saved(model, tmp_path))
    assert {live[name].layout for name in live} == {"embedding", "conv", "linear"}


def test_the_effective_update_of_live_dora_is_what_merging_adds() -> None:
    model = with_peft(conv_model(), target_modules=["conv", "lin"], use_dora=True)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key:
                parameter.mul_(1.3)
    effective = effective_adapter(model)
    before = {
        "lin": model.base_model.model.lin.base_layer.weight.detach().clone(),
        "conv": model.base_model.model.conv.base_layer.weight.detach().clone(),
    }
    merged = copy.deepcopy(model).merge_and_unload()
    for name, W in before.items():
        delta = (getattr(merged, name).weight.detach() - W).double().flatten(1)
        np.testing.assert_allclose(effective[name].delta_weight(), delta, atol=1e-6)


@pytest.mark.parametrize(("family", "bias"), [("gpt2", "all"), ("roberta", "lora_only")])
def test_heads_and_biases_are_those_of_the_file(tmp_path: Path, family: str, bias: str) -> None:
    base, targets, task = MODELS[family]()
    model = with_peft(base, target_modules=targets, task_type=task, bias=bias)
    assert_same_adapter(as_adapter(model), saved(model, tmp_path))


def test_new_tokens_and_biases_of_factors_are_those_of_the_file(tmp_path: Path) -> None:
    model = with_peft(
        MODELS["llama"]()[0],
        target_modules=["q_proj", "v_proj"],
        trainable_token_indices={"embed_tokens": [1, 3]},
        lora_bias=True,
    )
    assert_same_adapter(as_adapter(model), saved(model, tmp_path))


def test_expert_parameters_are_split_as_those_of_the_file(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model = with_peft(
        MixtralForCausalLM(config),
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    live = as_adapter(model)
    assert len(live) == 1 + 2 * 3
    assert_same_adapter(live, saved(model, tmp_path))


def test_adalora_is_pruned_as_in_the_file(tmp_path: Path) -> None:
    from peft import AdaLoraConfig, get_peft_model

    torch.manual_seed(0)
    base = MODELS["llama"]()[0]
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "v_proj"], lora_alpha=8
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key or "lora_E" in key:
                parameter.copy_(torch.randn_like(parameter))
    assert_same_adapter(as_adapter(model), saved(model, tmp_path / "whole"))
    keep = [True, False, True, False]
    names = [key for key, _ in model.base_model.model.named_parameters() if "lora_E" in key]
    model.peft_config["default"].rank_pattern = dict.fromkeys(names, keep)
    live = as_adapter(model)
    assert {live[name].rank for name in live} == {2}
    assert_same_adapter(live, saved(model, tmp_path / "pruned"))


def test_the_adapter_is_chosen_by_name_or_by_what_is_active(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = peft_model("llama", {}, name="first")
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
    assert as_adapter(model).label == "first"
    second = as_adapter(model, adapter_name="second")
    assert second.label == "second"
    assert_same_adapter(second, saved(model, tmp_path, "second"))
    model.set_adapter("second")
    assert len(as_adapter(model)) == len(second)
    with pytest.raises(InputError, match=r"no adapter 'third'; it has \['first', 'second'\]"):
        as_adapter(model, adapter_name="third")
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(InputError, match="Pass adapter_name="):
        as_adapter(model)


def test_a_model_with_injected_layers_gives_the_same_adapter() -> None:
    from peft import LoraConfig

    torch.manual_seed(1)
    model = MODELS["llama"]()[0]
    wrapped = copy.deepcopy(model)
    model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
    live = as_adapter(model)
    assert list(live) == list(as_adapter(with_peft(wrapped, target_modules=["q_proj"])))
    assert live.label == "LlamaForCausalLM"


def test_wrappers_around_a_model_change_nothing() -> None:
    from peft import LoraConfig

    model = peft_model("llama", {})
    wrapper = torch.nn.Module()
    wrapper.policy = model
    injected = MODELS["llama"]()[0]
    injected.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    for wrapped, plain in (
        (wrapper, model),
        (torch.nn.DataParallel(model), model),
        (torch.nn.DataParallel(injected), injected),
        (torch.compile(injected), injected),
    ):
        live = as_adapter(wrapped)
        assert_same_adapter(live, as_adapter(plain))
        assert live.label == "LlamaForCausalLM"


def test_layers_of_loralib_are_read_from_their_state_dict() -> None:
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 3)})
    model["q_proj"].lora_A = torch.nn.Parameter(torch.ones(2, 4))
    model["q_proj"].lora_B = torch.nn.Parameter(torch.ones(3, 2))
    model["q_proj"].scaling = 0.5
    with pytest.raises(InputError, match=r"Pass model\.state_dict\(\) with alpha= or scale="):
        as_adapter(model)
    assert list(as_adapter(model.state_dict(), scale=0.5)) == ["q_proj"]


def test_a_scale_that_was_changed_in_the_layers_is_the_one_that_counts() -> None:
    model = peft_model("llama", {})
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["default"] *= 0.5
    live = as_adapter(model)
    assert_same_updates(live, peft_deltas(model))
    assert set(live.provenance.scale_origin.values()) == {"model"}
    assert as_adapter(model, alpha=12)[next(iter(live))].known_scale() == 3.0


def test_an_adapter_does_not_follow_the_training_that_goes_on() -> None:
    model = peft_model("llama", {})
    live = as_adapter(model)
    before = {name: live[name].delta_weight() for name in live}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for name, delta in before.items():
        np.testing.assert_array_equal(live[name].delta_weight(), delta)
    restored = pickle.loads(pickle.dumps(live))
    assert_same_adapter(restored, live)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_of_every_type_are_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model = peft_model("roberta", {}).to(dtype)
    live = as_adapter(model)
    assert_same_adapter(live, saved(model, tmp_path))
    assert live[next(iter(live))].stored_dtype == str(dtype).removeprefix("torch.")


def test_what_a_live_adapter_writes_peft_would_have_saved(tmp_path: Path) -> None:
    model = peft_model("roberta", {})
    model.save_pretrained(tmp_path / "peft")
    write_adapter(as_adapter(model), tmp_path / "own")
    stored, written = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "own")
    )
    assert stored.keys() == written.keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(written[name], value)


def test_extracting_from_a_peft_model_reads_its_adapter() -> None:
    model = peft_model("llama", {})
    assert_same_adapter(extract_adapter(model), as_adapter(model))


def test_own_layers_are_read_like_those_of_peft() -> None:
    model = MODELS["llama"]()[0]
    add_lora(model, rank=2, alpha=4, targets=["q_proj"], seed=0, name="mine")
    live = as_adapter(model)
    assert live.label == "mine"
    assert list(live) == list(extract_adapter(model))
    layer = model.get_submodule(next(iter(live)))
    np.testing.assert_array_equal(as_update(layer).A, live[next(iter(live))].A)


def test_a_quantized_base_is_not_needed() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32)
    base = torch.nn.ModuleDict({"q_proj": layer})
    base.load_state_dict({"q_proj.weight": torch.randn(32, 64)})
    base = base.to("cpu")  # quantizes
    assert base["q_proj"].weight.dtype == torch.uint8
    base.is_loaded_in_4bit = True
    model = with_peft(base, target_modules=["q_proj"])
    assert type(model.base_model.model["q_proj"]).__name__ == "Linear4bit"
    assert_same_updates(as_adapter(model), peft_deltas(model))
    with pytest.raises(BaseWeightError, match="belongs to a quantized weight"):
        as_weight(model.base_model.model["q_proj"])


def test_a_merged_adapter_is_refused() -> None:
    model = peft_model("llama", {})
    model.merge_adapter()
    with pytest.raises(InputError, match=r"merged into the weight\. Unmerge it first"):
        as_adapter(model)
    model.unmerge_adapter()
    assert len(as_adapter(model))
    with pytest.raises(InputError, match="has no adapter: none was added, or it is merged"):
        as_adapter(model.merge_and_unload())


def sharded(parameter: torch.nn.Parameter, kind: str) -> Any:
    if kind == "meta":
        return torch.nn.Parameter(parameter.to("meta"))
    values = torch.empty(0) if kind in ("ds_id", "fsdp") else parameter.detach()
    tensor = torch.nn.Parameter(values)
    if kind == "ds_id":
        tensor.ds_id = 3
    elif kind == "full_tensor":
        tensor.full_tensor = lambda: parameter
    return tensor


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("meta", "is on the meta device and holds no values.*Load it without offloading"),
        ("full_tensor", r"sharded over several processes \(DTensor\)"),
        ("ds_id", "partitioned by DeepSpeed ZeRO-3. Call this inside"),
        ("fsdp", "FullyShardedDataParallel.summon_full_params"),
    ],
)
def test_tensors_without_their_values_are_refused_with_advice(kind: str, advice: str) -> None:
    model = peft_model("llama", {})
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = sharded(layer.lora_A["default"].weight, kind)
    with pytest.raises(InputError, match=f"layers.0.self_attn.q_proj.lora_A.*{advice}"):
        as_adapter(model)


def test_other_methods_are_refused_by_name() -> None:
    from peft import IA3Config, PromptTuningConfig, get_peft_model

    ia3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for config, name in ((ia3, "IA3"), (prompt, "PROMPT_TUNING")):
        model = get_peft_model(MODELS["llama"]()[0], config)
        with pytest.raises(UnsupportedMethodError, match=name):
            as_adapter(model)


def test_a_state_dict_goes_through_the_formats_of_files(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random_adapter(rng)
    for format in ("peft", "kohya", "loralib"):
        path = write_adapter(source, tmp_path / format / "a.safetensors", format=format)
        file = path if path.is_file() else path / "adapter_model.safetensors"
        stored = read_adapter(file, scale=0.5)
        # Configurations in the working folder belong to other adapters.
        monkeypatch.chdir(file.parent)
        tensors = {name: torch.from_numpy(value) for name, value in load_file(file).items()}
        live = as_adapter(tensors, scale=0.5, label="state")
        assert list(live) == list(stored)
        assert live.provenance.format == format
        assert live.provenance.path is None
        assert live.label == "state"
        for name in stored:
            np.testing.assert_array_equal(live[name].delta_weight(), stored[name].delta_weight())


def test_a_state_dict_of_peft_with_names_holds_several_adapters(rng: np.random.Generator) -> None:
    tensors = {
        f"base_model.model.q.lora_{role}.{name}.weight": rng.standard_normal(shape)
        for name in ("one", "two")
        for role, shape in (("A", (2, 5)), ("B", (4, 2)))
    }
    assert as_adapter(tensors, adapter_name="two", alpha=4)["q"].known_scale() == 2.0
    with pytest.raises(InputError, match="Several adapters"):
        as_adapter(tensors)
    bare = {"q.down": np.ones((2, 5)), "q.up": np.ones((4, 2))}
    with pytest.raises(UnknownFormatError, match=r"No format is recognized.*'q.down'"):
        as_adapter(bare)
    assert len(as_adapter(bare, pair=("{name}.down", "{name}.up"), scale=1.0)) == 1


def test_a_mapping_of_updates_or_factors_is_an_adapter(rng: np.random.Generator) -> None:
    update = low_rank_update(rng)
    A, B = torch.randn(2, 5, requires_grad=True), torch.randn(4, 2).bfloat16()
    adapter = as_adapter({"q": update, "k": (A, B, 0.5), "v": (A, B)}, label="mine")
    assert (adapter["q"].A == update.A).all()
    assert adapter["k"].known_scale() == 0.5
    assert adapter["k"].stored_dtype == "float32"
    with pytest.raises(InputError, match="scale of 'v' in mine is not known"):
        adapter["v"].delta_weight()
    with pytest.raises(InputError, match="'v' of the mapping: No update can be made of a str"):
        as_adapter({"v": "q"})


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
)
def test_factors_of_every_torch_type_make_an_update(dtype: torch.dtype) -> None:
    A, B = torch.randn(2, 5).to(dtype), torch.randn(4, 2).to(dtype)
    update = as_update((A, B, 2.0), name="q")
    expected = 2 * (B.double() @ A.double())
    np.testing.assert_allclose(update.delta_weight(), expected, rtol=1e-15)
    assert update.stored_dtype == str(dtype).removeprefix("torch.")
    A.fill_(0)
    assert update.delta_weight().any()


def test_a_matrix_is_a_dense_update() -> None:
    dense = as_update(torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True), name="q")
    assert isinstance(dense, DenseUpdate)
    assert (dense.shape, dense.stored_dtype, dense.name) == ((3, 2), "bfloat16", "q")
    assert as_update(dense) is dense


def test_a_layer_of_peft_is_an_update() -> None:
    model = with_peft(conv_model(), target_modules=["conv", "embed"])
    live = as_adapter(model)
    for name in live:
        update = as_update(getattr(model.base_model.model, name), name=name)
        assert (update.layout, update.scale) == (live[name].layout, live[name].scale)
        np.testing.assert_array_equal(update.delta_weight(), live[name].delta_weight())


@pytest.mark.parametrize("source", [3, None, [1, 2, 3], np.ones(3), "path", object()])
def test_what_is_no_update_is_refused_with_what_is(source: object) -> None:
    with pytest.raises(
        InputError, match=r"No update can be made of .* Accepted: an update, factors"
    ):
        as_update(source)


@pytest.mark.parametrize("source", [3, None, np.ones((3, 3)), object()])
def test_what_is_no_adapter_is_refused_with_what_is(source: object) -> None:
    with pytest.raises(InputError, match=r"No adapter can be read from a .* Accepted: an Adapter"):
        as_adapter(source)
    with pytest.raises(InputError, match="no option kernels"):
        as_adapter(source, kernels=3)


def test_an_adapter_and_a_path_are_read_as_ever(tmp_path: Path, rng: np.random.Generator) -> None:
    source = random_adapter(rng)
    assert as_adapter(source) is source
    path = write_adapter(source, tmp_path / "a")
    for form in (path, str(path)):
        assert list(as_adapter(form)) == list(source)
    assert as_adapter(path, label="other").label == "other"


def test_the_base_of_a_live_model_is_the_model() -> None:
    model = peft_model("llama", {})
    base, live = open_base(model), as_adapter(model)
    for name in live:
        assert base.weight(name, shape=live[name].shape).shape == live[name].shape
