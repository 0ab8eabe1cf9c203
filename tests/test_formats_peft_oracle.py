"""PEFT itself as the oracle: what it saves reads back, what is written it loads."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from test_formats_peft import adapters

from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.formats import find_adapters, read_adapter, write_adapter
from lora_analysis.formats.sanity_checks import check_updates

pytestmark = [
    pytest.mark.slow,
    # Importing PEFT and building tiny models touches code that warns of its own affairs.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def gpt2() -> tuple[Any, list[str], str]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
    return GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"], "CAUSAL_LM"


def roberta() -> tuple[Any, list[str], str]:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        vocab_size=40,
        max_position_embeddings=20,
        num_labels=3,
    )
    return RobertaForSequenceClassification(config), ["query", "value"], "SEQ_CLS"


def llama() -> tuple[Any, list[str], str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=24,
        num_hidden_layers=12,  # two digits: layers.1 is not layers.11
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        vocab_size=40,
    )
    return LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM"


MODELS: dict[str, Callable[[], tuple[Any, list[str], str]]] = {
    "gpt2": gpt2,
    "roberta": roberta,
    "llama": llama,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r"(h|layer|layers)\.1\..*": 6, "value": 2, "v_proj": 2, "c_fc": 5},
        "alpha_pattern": {"query": 7, r"layers\.1\.self_attn\.q_proj": 9, r"0\.mlp\.c_fc": 11},
    },
    "rslora and patterns": {
        "use_rslora": True,
        "rank_pattern": {"query": 2, "q_proj": 2, "c_proj": 2},
        "alpha_pattern": {r".*\.1\..*": 3},
    },
    "gaussian": {"init_lora_weights": "gaussian"},
    "one layer": {"layers_to_transform": [1]},
    "without a layer": {"exclude_modules": r".*\.0\..*"},
}


def peft_model(family: str, variant: dict[str, Any], name: str = "default") -> Any:
    """A tiny model with a PEFT adapter whose B is random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model, targets, task = MODELS[family]()
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=targets, task_type=task, lora_dropout=0.0, **variant
    )
    with warnings.catch_warnings():
        # One set of patterns serves three families: some keys match nothing in each.
        warnings.filterwarnings("ignore", "The following .*_pattern keys did not match")
        wrapped = get_peft_model(model, config, adapter_name=name)
    randomize(wrapped)
    return wrapped


def randomize(model: Any) -> None:
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter)


def peft_deltas(model: Any, adapter: str = "default") -> dict[str, np.ndarray]:
    """PEFT's own ΔW per module, ``(d_out, d_in)``."""
    deltas = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and adapter in module.lora_A:
            delta = module.get_delta_weight(adapter).detach().double()
            conv1d = type(module.get_base_layer()).__name__ == "Conv1D"
            deltas[name] = (delta.T if conv1d else delta).numpy()
    return deltas


def assert_same_updates(adapter: Adapter, wanted: dict[str, np.ndarray]) -> None:
    assert set(adapter) == set(wanted)
    for name, delta in wanted.items():
        update = adapter[name]
        assert update.shape == delta.shape
        np.testing.assert_allclose(
            update.delta_weight(), delta, rtol=1e-5, atol=1e-5 * np.abs(delta).max()
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_what_peft_saves_reads_back_with_its_own_delta_weight(
    tmp_path: Path, family: str, variant: str
) -> None:
    model = peft_model(family, VARIANTS[variant])
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert_same_updates(adapter, peft_deltas(model))
    assert set(adapter.provenance.scale_origin.values()) == {"config"}
    assert adapter.provenance.findings == ()
    layouts = {update.layout for update in adapter.values() if isinstance(update, LowRankUpdate)}
    assert layouts == ({"conv1d"} if family == "gpt2" else {"linear"})
    if family == "roberta":
        head = model.base_model.model.classifier.modules_to_save["default"].state_dict()
        assert set(adapter.saved_modules) == {f"classifier.{name}" for name in head}
        for name, tensor in head.items():
            np.testing.assert_array_equal(adapter.saved_modules[f"classifier.{name}"], tensor)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_what_is_written_loads_in_peft_with_the_same_logits(
    tmp_path: Path, family: str, variant: str
) -> None:
    from peft import PeftModel

    model = peft_model(family, VARIANTS[variant]).eval()
    model.save_pretrained(tmp_path / "peft")
    written = write_adapter(read_adapter(tmp_path / "peft"), tmp_path / "ours")
    torch.manual_seed(3)
    loaded = PeftModel.from_pretrained(MODELS[family]()[0], str(written)).eval()
    assert_same_updates(read_adapter(written), peft_deltas(loaded))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


@given(adapter=adapters())
def test_patterns_that_are_written_mean_the_same_to_peft(
    tmp_path_factory: pytest.TempPathFactory, adapter: Adapter
) -> None:
    from peft.utils.other import get_pattern_key

    folder = write_adapter(adapter, tmp_path_factory.mktemp("patterns"))
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, update in adapter.items():
        stated = {
            key: config[f"{key}_pattern"].get(
                get_pattern_key(config[f"{key}_pattern"].keys(), name), default
            )
            for key, default in (("rank", config["r"]), ("alpha", config["lora_alpha"]))
        }
        assert isinstance(update, LowRankUpdate)
        assert stated["rank"] == update.rank
        divisor = update.rank**0.5 if config["use_rslora"] else update.rank
        assert stated["alpha"] / divisor == pytest.approx(update.scale, rel=1e-12)


def test_a_state_dict_dump_of_two_adapters_is_read_by_name(tmp_path: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    model = peft_model("llama", {}, name="one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    randomize(model)
    dump = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    path = tmp_path / "dump.safetensors"
    save_file(dump, path, metadata={"format": "pt"})
    found = find_adapters(path)
    assert [ref.source for ref in found] == [f"{path}#one", f"{path}#two"]
    assert_same_updates(read_adapter(found[0], alpha=10), peft_deltas(model, "one"))
    assert_same_updates(read_adapter(f"{path}#two", alpha=6), peft_deltas(model, "two"))


def test_named_adapters_that_peft_saves_in_sub_folders_are_found(tmp_path: Path) -> None:
    model = peft_model("llama", {}, name="french")
    model.save_pretrained(tmp_path)
    (found,) = find_adapters(tmp_path)
    assert found.path == tmp_path / "french"
    assert_same_updates(read_adapter(tmp_path), peft_deltas(model, "french"))


def test_an_attention_of_torch_reads_in_both_its_projections(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    model = get_peft_model(Block(), LoraConfig(r=3, target_modules=["attention"]))
    randomize(model)
    model.save_pretrained(tmp_path)
    layer = model.base_model.model.attention
    wanted = {
        "attention": layer.get_delta_weight("default").detach().double().numpy(),
        "attention.out_proj": layer.base_layer.out_proj.get_delta_weight("default")
        .detach()
        .double()
        .numpy(),
    }
    assert wanted["attention"].shape == (36, 12)
    assert_same_updates(read_adapter(tmp_path), wanted)


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"init_lora_weights": "pissa_niter_4"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
    ],
)
def test_variants_whose_update_is_another_are_refused_by_name(
    tmp_path: Path, variant: dict[str, Any], told: str
) -> None:
    from lora_analysis.errors import UnsupportedMethodError

    peft_model("llama", variant).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedMethodError, match=told) as caught:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)


def other_configs() -> dict[str, Callable[[], Any]]:
    import peft

    one = {"target_modules": ["q_proj"]}
    return {
        "OFT": lambda: peft.OFTConfig(**one),
        "VERA": lambda: peft.VeraConfig(**one),
        "IA3": lambda: peft.IA3Config(feedforward_modules=[], **one),
        "HRA": lambda: peft.HRAConfig(**one),
        "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=4, **one),
        "RANDLORA": lambda: peft.RandLoraConfig(**one),
        "MISS": lambda: peft.MissConfig(r=4, **one),
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(
            num_virtual_tokens=3, task_type="CAUSAL_LM"
        ),
    }


@pytest.mark.parametrize(
    "method",
    [
        "FOURIERFT",
        "HRA",
        "IA3",
        "MISS",
        "OFT",
        "PROMPT_TUNING",
        "RANDLORA",
        "VERA",
    ],
)
def test_other_methods_are_refused_by_their_config_and_by_their_keys(
    tmp_path: Path, method: str
) -> None:
    from peft import get_peft_model

    from lora_analysis.errors import InputError, UnsupportedMethodError

    model = get_peft_model(llama()[0], other_configs()[method]())
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedMethodError, match=f"peft_type is '{method}'"):
        read_adapter(tmp_path)
    # A config that lies must not help: the keys are another method's.
    config = tmp_path / "adapter_config.json"
    config.write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    with pytest.raises(InputError) as caught:
        read_adapter(tmp_path)
    assert "adapter_model.safetensors" in str(caught.value)


def test_biases_and_replaced_tokens_are_reported(tmp_path: Path) -> None:
    model = peft_model(
        "roberta", {"bias": "lora_only", "lora_bias": True, "trainable_token_indices": [1, 2]}
    )
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert_same_updates(adapter, peft_deltas(model))
    told = " ".join(map(str, adapter.provenance.findings))
    assert "lora_bias" in told
    assert "biases of the base" in told
    assert "replaced token embeddings" in told
    assert all(name.startswith("classifier.") for name in adapter.saved_modules)


def test_biases_trained_throughout_are_not_taken_for_saved_modules(tmp_path: Path) -> None:
    model = peft_model("roberta", {"bias": "all"})
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert any("biases of the base" in finding for finding in map(str, adapter.provenance.findings))
    assert all(name.startswith("classifier.") for name in adapter.saved_modules)


def test_adapters_that_peft_has_just_saved_are_healthy(tmp_path: Path) -> None:
    import peft

    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "emb": torch.nn.Embedding(50, 16),
            "conv": torch.nn.Conv2d(4, 16, 3),
            **{f"lin{i}": torch.nn.Linear(16, 16) for i in range(6)},
        }
    )
    for trained in (False, True):
        config = peft.LoraConfig(
            r=4, target_modules=["emb", "conv", *(f"lin{i}" for i in range(6))],
            init_lora_weights=not trained,
        )  # fmt: skip
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        wrapped.save_pretrained(tmp_path / str(trained))
        assert check_updates(read_adapter(tmp_path / str(trained)).values()) == ()
