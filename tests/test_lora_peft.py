"""PEFT as the oracle: what is trained here it loads, what it trained is loaded here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_analysis.formats import read_adapter, write_adapter
from lora_analysis.lora import (
    add_lora,
    extract_adapter,
    load_adapter_into,
    merge_lora,
    set_active,
    unmerge_lora,
)

pytestmark = [
    # PEFT, transformers and what they import warn of their own affairs.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # One set of patterns serves every family below, so some match nothing.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

TOKENS = torch.arange(20).reshape(2, 10) % 30 + 3
SMALL = {"vocab_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 20}
    return RobertaForSequenceClassification(RobertaConfig(**SMALL, **sizes, num_labels=3))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**SMALL, **sizes))


FAMILIES: dict[str, tuple[Any, list[str], str, list[str]]] = {
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"], "CAUSAL_LM", []),
    "roberta": (roberta, ["query", "value", "dense"], "SEQ_CLS", ["classifier"]),
    "llama": (llama, ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM", []),
}


def base_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = FAMILIES[family][0]()
    with torch.no_grad():  # as after pretraining: larger weights, biases that are not zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits  # type: ignore[no-any-return]


def train(model: nn.Module) -> None:
    """Take three large steps on whatever takes gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        predicted = model(TOKENS).logits.flatten(0, -2)
        labels = torch.arange(len(predicted)) % predicted.shape[-1]
        loss = nn.functional.cross_entropy(predicted, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_is_trained_here_and_gives_the_same_logits(
    family: str, use_rslora: bool, tmp_path: Path
) -> None:
    from peft import PeftModel

    _, targets, task, head = FAMILIES[family]
    model = base_of(family)
    names = add_lora(
        model, rank=4, alpha=6, targets=targets, seed=3, use_rslora=use_rslora, trainable=head
    )
    assert not any("classifier" in name for name in names)  # trained in full, head and all in it
    train(model)
    expected = logits(model)
    assert (expected - logits(base_of(family))).abs().max() > 0.1
    adapter = extract_adapter(model, config={"task_type": task})
    write_adapter(adapter, tmp_path / "adapter")
    foreign = PeftModel.from_pretrained(base_of(family), tmp_path / "adapter")
    assert foreign.peft_config["default"].task_type == task
    close(logits(foreign), expected)
    merge_lora(model)
    close(logits(model), expected)
    if not head:
        close(logits(foreign.merge_and_unload()), logits(model))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r".*\.1\..*": 5, "value": 2, "v_proj": 2, "c_fc": 3},
        "alpha_pattern": {"query": 7, "q_proj": 7, r"h\.0\.attn\.c_attn": 9},
    },
    "rslora and patterns": {
        "use_rslora": True,
        "rank_pattern": {"query": 2, "q_proj": 2, "c_proj": 2},
        "alpha_pattern": {r".*\.1\..*": 3},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_trained_is_loaded_here_and_gives_the_same_logits(
    family: str, variant: str, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    _, targets, task, head = FAMILIES[family]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        task_type=task,
        modules_to_save=list(head) or None,
        **VARIANTS[variant],
    )
    foreign = get_peft_model(base_of(family), config)
    train(foreign)
    expected = logits(foreign)
    foreign.save_pretrained(tmp_path)
    model = base_of(family)
    base = logits(model)
    assert (expected - base).abs().max() > 0.1
    adapter = read_adapter(tmp_path)
    assert load_adapter_into(model, adapter) == list(adapter)
    close(logits(model), expected)
    unmerge_lora(merge_lora(model))
    close(logits(model), expected)
    set_active(model, None)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_base_in_half_precision_factors_and_outputs_are_as_with_peft(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = base_of("llama").to(dtype)
    add_lora(model, rank=4, alpha=6, targets=["q_proj", "v_proj"], seed=3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(".B"):
                value.normal_(std=0.3)
    write_adapter(extract_adapter(model), tmp_path / "adapter")
    foreign = PeftModel.from_pretrained(base_of("llama").to(dtype), tmp_path / "adapter")
    kinds = {n.split(".")[-3]: p.dtype for n, p in foreign.named_parameters() if ".lora_" in n}
    assert set(kinds.values()) == {torch.float32}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    close(logits(foreign).float(), logits(model).float())


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_choose_the_modules_that_peft_chooses(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    make, targets, _, head = FAMILIES[family]
    for rule in (targets, rf".*\.1\..*({'|'.join(targets)})"):
        foreign = get_peft_model(
            make(), LoraConfig(target_modules=copy.copy(rule), modules_to_save=list(head) or None)
        )
        theirs = {
            n.removeprefix("base_model.model.")
            for n, m in foreign.named_modules()
            if hasattr(m, "lora_A")
        }
        ours = add_lora(make(), rank=2, alpha=2, targets=rule, seed=0, trainable=head)
        assert set(ours) == theirs
        assert len(ours) > 1


def test_the_start_has_the_distribution_of_pefts() -> None:
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(400, 3))
    foreign = get_peft_model(copy.deepcopy(base), LoraConfig(r=64, target_modules=["0"]))
    add_lora(base, rank=64, alpha=1, targets=["0"], seed=0)
    theirs = foreign.base_model.model[0].lora_A["default"].weight.detach()
    ours = base[0].adapters["default"].A.detach()
    assert float(ours.max()) == pytest.approx(float(theirs.max()), rel=1e-3)
    assert float(ours.min()) == pytest.approx(float(theirs.min()), rel=1e-3)
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.02)
