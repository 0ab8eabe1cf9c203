"""Live models as bases: the frozen weight is read, whatever is attached to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lora_analysis.bases import memory_source, open_base
from lora_analysis.errors import BaseWeightError
from lora_analysis.lora import add_lora, merge_lora, unmerge_lora


class Conv1D(torch.nn.Module):
    """As transformers has it: the weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = torch.nn.Parameter(torch.randn(nx, nf))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3), Conv1D(3, 3)])
        self.attention = torch.nn.MultiheadAttention(4, 2)
        self.norm = torch.nn.LayerNorm(3)


def test_a_live_module_says_itself_how_its_weight_lies() -> None:
    model = Model()
    base = open_base(model)
    assert base.label == "Model"
    linear, conv = base.weight("layers.0"), base.weight("layers.1")
    assert (linear.transposed, conv.transposed) == (False, True)
    np.testing.assert_array_equal(linear.array(), model.layers[0].weight.detach())
    np.testing.assert_array_equal(conv.array(), model.layers[1].weight.detach().T)
    fused = base.weight("attention", shape=(12, 4))
    np.testing.assert_array_equal(fused.array(), model.attention.in_proj_weight.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_widened_block_by_block(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_source, "BLOCK_ELEMENTS", 10)
    model = torch.nn.Sequential(torch.nn.Linear(4, 7, bias=False)).to(dtype)
    weight = open_base(model).weight("0")
    assert weight.stored_dtype == str(dtype).removeprefix("torch.")
    assert sum(1 for _ in weight.blocks()) == 4
    np.testing.assert_array_equal(weight.array(), model[0].weight.detach().float())


def test_a_one_dimensional_weight_is_no_base_matrix() -> None:
    with pytest.raises(BaseWeightError, match=r"no tensor that is a matrix.*'norm\.weight' \(3,\)"):
        open_base(Model()).weight("norm")


def test_integer_and_empty_parameters_are_refused() -> None:
    model = Model()
    packed = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)
    model.layers[0].weight = packed
    with pytest.raises(BaseWeightError, match="stored as uint8"):
        open_base(model).weight("layers.0")
    with pytest.raises(BaseWeightError, match="meta device"):
        open_base(Model().to("meta")).weight("layers.0")


def test_what_is_no_source_at_all_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        open_base(3)


@pytest.fixture(scope="module")
def wrapped() -> Any:
    """A tiny Llama and a PEFT adapter on it, active and not merged."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        vocab_size=10,
    )
    return peft.get_peft_model(
        LlamaForCausalLM(config),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_under_an_adapter_the_frozen_weight_is_read(wrapped: Any) -> None:
    name = "model.layers.0.self_attn.q_proj"
    layer = wrapped.base_model.model.get_submodule(name)
    frozen = layer.base_layer.weight.detach().clone().numpy()
    for model in (wrapped, wrapped.base_model.model):
        base = open_base(model)
        weight = base.weight(name, shape=(8, 8))
        assert weight.name.endswith("q_proj.base_layer.weight")
        np.testing.assert_array_equal(weight.array(), frozen)
    assert open_base(wrapped).model_type == "llama"
    wrapped.merge_adapter()
    try:
        with pytest.raises(BaseWeightError, match="merged"):
            open_base(wrapped).weight(name)
    finally:
        wrapped.unmerge_adapter()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_gpt2_reads_the_same_live_and_from_disk(tmp_path: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10, n_positions=8))
    model.save_pretrained(tmp_path)
    for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        name = f"transformer.h.0.{module}"
        live = open_base(model).weight(name)
        stored = open_base(tmp_path).weight(name)
        assert live.transposed
        assert stored.transposed
        np.testing.assert_array_equal(live.array(), stored.array())
        wanted = model.get_submodule(name).weight.detach().T
        np.testing.assert_array_equal(stored.array(), wanted)


def test_a_base_opened_before_a_merge_or_an_unmerge_says_that_it_is_out_of_date() -> None:
    model = Model()
    frozen = model.layers[0].weight.detach().clone()
    before = open_base(model)
    add_lora(model, rank=1, alpha=1, targets=["layers.0", "layers.1"], seed=0)
    np.testing.assert_array_equal(before.weight("layers.0").array(), frozen)
    assert before.weight("layers.1").transposed
    wrapped = open_base(model)
    handle = merge_lora(model)
    with pytest.raises(BaseWeightError, match=r"'layers\.0\.base_layer\.weight'.*Open .* again"):
        wrapped.weight("layers.0")
    with pytest.raises(BaseWeightError, match="Unmerge"):
        open_base(model).weight("layers.0")
    merged = open_base(model)
    unmerge_lora(handle)
    with pytest.raises(BaseWeightError, match=r"'layers\.0\.weight'.*Open .* again"):
        merged.weight("layers.0")
    np.testing.assert_array_equal(before.weight("layers.0").array(), frozen)
    np.testing.assert_array_equal(open_base(model).weight("layers.0").array(), frozen)
