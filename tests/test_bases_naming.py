"""Names of running models against the names in their files, and parts of what files fuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save

from lora_analysis.bases import BaseWeights, open_base
from lora_analysis.errors import BaseWeightError

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
SMALL = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40}


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def tiny(family: str) -> torch.nn.Module:  # noqa: PLR0912
    """A model of the family, small and random, as transformers builds it."""
    t = transformers
    plain = without(TEXT, "num_key_value_heads")
    torch.manual_seed(0)
    match family:
        case "mamba":
            return t.MambaForCausalLM(
                t.MambaConfig(
                    hidden_size=16, num_hidden_layers=2, vocab_size=40, state_size=4,
                    time_step_rank=3,
                )
            )  # fmt: skip
        case "rwkv":
            return t.RwkvForCausalLM(
                t.RwkvConfig(hidden_size=16, num_hidden_layers=2, vocab_size=40, context_length=8)
            )
        case "vit":
            return t.ViTForImageClassification(t.ViTConfig(**VISION))
        case "dinov2":
            return t.Dinov2Model(t.Dinov2Config(**without(VISION, "intermediate_size")))
        case "bert":
            return t.BertForMaskedLM(t.BertConfig(**plain))
        case "distilbert":
            return t.DistilBertModel(
                t.DistilBertConfig(dim=16, hidden_dim=24, n_heads=4, n_layers=2)
            )
        case "gpt2":
            return t.GPT2LMHeadModel(t.GPT2Config(**SMALL))
        case "gpt_neox":
            return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**plain))
        case "bloom":
            return t.BloomForCausalLM(
                t.BloomConfig(hidden_size=16, n_layer=2, n_head=4, vocab_size=40)
            )
        case "falcon":
            return t.FalconForCausalLM(
                t.FalconConfig(**plain, new_decoder_architecture=True, num_kv_heads=2)
            )
        case "llama":
            return t.LlamaForCausalLM(t.LlamaConfig(**TEXT))
        case "phi3":
            return t.Phi3ForCausalLM(t.Phi3Config(**TEXT))
        case "mixtral":
            return t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_local_experts=3))
        case "qwen2_moe":
            return t.Qwen2MoeForCausalLM(
                t.Qwen2MoeConfig(
                    **TEXT,
                    num_experts=3,
                    moe_intermediate_size=8,
                    shared_expert_intermediate_size=12,
                )
            )
        case "t5":
            return t.T5ForConditionalGeneration(
                t.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=40)
            )
        case "llava":
            return t.LlavaForConditionalGeneration(
                t.LlavaConfig(
                    vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**TEXT)
                )
            )
        case "qwen2_vl":
            text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1]}}
            vision = {
                "depth": 1,
                "embed_dim": 16,
                "num_heads": 4,
                "hidden_size": 16,
                "mlp_ratio": 2,
            }
            return t.Qwen2VLForConditionalGeneration(
                t.Qwen2VLConfig(text_config=text, vision_config=vision)
            )
    raise AssertionError(family)


def adapted(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every weight an adapter can have, by its module's name, as ``(d_out, d_in)``."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            weights[name] = module.weight
        elif type(module).__name__ == "Conv1D":
            weights[name] = module.weight.T
        elif isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
            weights[name] = module.weight.flatten(1)
    for name, parameter in model.named_parameters():
        if ".experts." in name and parameter.ndim == 3:
            weights |= {f"{name}[{at}]": one for at, one in enumerate(parameter)}
    return {name: weight.detach() for name, weight in weights.items()}


FAMILIES = (
    "vit", "dinov2", "bert", "distilbert", "gpt2", "gpt_neox", "bloom", "falcon", "llama", "phi3",
    "mixtral", "qwen2_moe", "t5", "llava", "qwen2_vl", "mamba",
    "rwkv",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_of_a_running_model_is_found_in_its_file(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    base = open_base(tmp_path)
    wanted = adapted(model)
    assert len(wanted) > 4
    for name, weight in wanted.items():
        for spelling in (name, f"base_model.model.{name}"):
            found = base.weight(spelling, shape=tuple(weight.shape))
            np.testing.assert_array_equal(found.array(), weight, err_msg=spelling)


@pytest.mark.parametrize("family", ["vit", "gpt2", "bert"])
def test_the_prefix_of_the_head_may_be_missing_on_either_side(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "body")
    inner = {name: w for name, w in adapted(model.base_model).items() if "." in name}
    for name, weight in inner.items():
        whole = open_base(tmp_path / "whole").weight(name, shape=tuple(weight.shape))
        np.testing.assert_array_equal(whole.array(), weight, err_msg=name)
    prefix = model.base_model_prefix
    for name, weight in inner.items():
        body = open_base(tmp_path / "body").weight(f"{prefix}.{name}", shape=tuple(weight.shape))
        np.testing.assert_array_equal(body.array(), weight, err_msg=name)


def test_old_names_of_a_vit_are_found_where_new_ones_are_stored(rng: np.random.Generator) -> None:
    W = rng.standard_normal((4, 4))
    pairs = {
        "vit.layers.1.attention.q_proj": "vit.encoder.layer.1.attention.attention.query",
        "vit.layers.1.attention.o_proj": "vit.encoder.layer.1.attention.output.dense",
        "vit.layers.1.mlp.fc1": "vit.encoder.layer.1.intermediate.dense",
        "vit.layers.1.mlp.fc2": "vit.encoder.layer.1.output.dense",
    }
    stored, asked = list(pairs.values()), list(pairs)
    old = open_base({name: W + at for at, name in enumerate(stored)})
    for at, name in enumerate(asked):
        np.testing.assert_allclose(old.weight(name).array(), W + at, rtol=1e-6)
    new = open_base({asked[0]: W})
    np.testing.assert_allclose(new.weight(stored[0]).array(), W, rtol=1e-6)


def fused(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> BaseWeights:
    (folder / "model.safetensors").write_bytes(save(tensors))
    (folder / "config.json").write_text(json.dumps(config))
    return open_base(folder)


def parts_by_the_model(family: str, model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """q, k and v of ``x``, ``(positions, heads·rows)``, as the model's own code splits them."""
    n, h = len(x), 4
    if family == "bloom":
        own = model.transformer.h[0].self_attention
        q, k, v = own._reshape(own.query_key_value(x[None]))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    elif family == "falcon":
        own = model.transformer.h[0].self_attention
        q, k, v = own._split_heads(own.query_key_value(x[None]))
        # It repeats k and v for every query of their group.
        group = h // own.num_kv_heads
        k, v = k[:, :, ::group], v[:, :, ::group]
    else:
        own = model.gpt_neox.layers[0].attention
        q, k, v = own.query_key_value(x[None]).view(1, n, h, -1).chunk(3, dim=-1)
    return {name: part.reshape(n, -1) for name, part in zip("qkv", (q, k, v), strict=True)}


@pytest.mark.parametrize("family", ["bloom", "falcon", "gpt_neox"])
def test_interleaved_parts_are_those_the_model_computes_with(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    for name, parameter in model.named_parameters():
        if name.endswith("query_key_value.bias"):
            torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path)
    base = open_base(tmp_path)
    home = next(name for name, _ in model.named_modules() if name.endswith("query_key_value"))
    x = torch.randn(5, 16)
    for part, wanted in parts_by_the_model(family, model, x).items():
        shape = (wanted.shape[1], 16)
        for name in (f"{home}.{part}", home.replace("query_key_value", f"{part}_proj")):
            W = base.weight(name, shape=shape).array()
            np.testing.assert_allclose(x.numpy() @ W.T, wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "home", "module", "rows"),
    [
        ({"model_type": "phi3"}, "l.0.a.qkv_proj", "l.0.a.q_proj", range(8)),
        ({"model_type": "phi3"}, "l.0.a.qkv_proj", "l.0.a.k_proj", range(8, 12)),
        ({"model_type": "phi3"}, "l.0.a.qkv_proj", "l.0.a.v_proj", range(12, 16)),
        ({"model_type": "phi3"}, "l.0.m.gate_up_proj", "l.0.m.gate_proj", range(8)),
        ({"model_type": "phi3"}, "l.0.m.gate_up_proj", "l.0.m.up_proj", range(8, 16)),
        ({"model_type": "baichuan"}, "l.0.a.W_pack", "l.0.a.k_proj", range(8, 12)),
        (
            {"model_type": "chatglm"},
            "l.0.a.query_key_value",
            "l.0.a.query_key_value.k",
            range(8, 12),
        ),
        (
            {"model_type": "falcon", "n_head": 4, "multi_query": True},
            "l.0.a.query_key_value",
            "l.0.a.query_key_value.v",
            range(14, 16),
        ),
        (
            {"model_type": "gpt_bigcode", "n_head": 4, "multi_query": True},
            "h.0.c_attn",
            "h.0.c_attn.k",
            range(12, 14),
        ),
    ],
)
def test_blocks_are_cut_by_the_shape_of_the_update(  # noqa: PLR0917
    tmp_path: Path,
    rng: np.random.Generator,
    config: dict[str, Any],
    home: str,
    module: str,
    rows: range,
) -> None:
    W = rng.standard_normal((16, 6)).astype(np.float32)
    base = fused(tmp_path, {f"{home}.weight": W}, **config)
    weight = base.weight(module, shape=(len(rows), 6))
    np.testing.assert_array_equal(weight.array(), W[list(rows)])
    assert home in weight.name


@pytest.mark.parametrize("part", "qkv")
def test_gpt2s_blocks_are_columns_of_what_is_stored(
    tmp_path: Path, rng: np.random.Generator, part: str
) -> None:
    W = rng.standard_normal((6, 18)).astype(np.float32)
    base = fused(tmp_path, {"h.0.attn.c_attn.weight": W}, model_type="gpt2")
    weight = base.weight(f"transformer.h.0.attn.c_attn.{part}", shape=(6, 6))
    at = "qkv".index(part)
    np.testing.assert_array_equal(weight.array(), W.T[6 * at : 6 * at + 6])
    assert weight.transposed


def test_a_fused_module_is_put_together_from_what_the_file_splits(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    parts = {
        f"l.0.a.{p}_proj.weight": rng.standard_normal((n, 6))
        for p, n in zip("qkv", (8, 4, 4), strict=True)
    }
    parts |= {f"l.0.m.{p}_proj.weight": rng.standard_normal((5, 6)) for p in ("gate", "up")}
    base = fused(tmp_path, parts, model_type="llama")
    values = [value.astype(np.float32) for value in parts.values()]
    np.testing.assert_array_equal(
        base.weight("l.0.a.qkv_proj", shape=(16, 6)).array(), np.vstack(values[:3])
    )
    np.testing.assert_array_equal(base.weight("l.0.m.gate_up_proj").array(), np.vstack(values[3:]))
    with pytest.raises(BaseWeightError, match=r"shape \(16, 6\).*update has \(18, 6\)"):
        base.weight("l.0.a.qkv_proj", shape=(18, 6))


@pytest.mark.parametrize(
    ("config", "home", "module", "shape", "told"),
    [
        ({"model_type": "new"}, "query_key_value", "q_proj", (6, 6), "family 'new'.*not known"),
        ({"model_type": "codegen"}, "qkv_proj", "q_proj", (6, 6), "CodeGen"),
        ({"model_type": "bloom"}, "query_key_value", "q_proj", (6, 6), "no number of heads"),
        ({"model_type": "bloom", "n_head": 5}, "query_key_value", "q_proj", (6, 6), "18 rows"),
        ({"model_type": "phi3"}, "qkv_proj", "q_proj", (5, 6), r"no division of its 18 rows"),
        ({"model_type": "phi3"}, "qkv_proj", "q_proj", (4, 6), r"no division of its 18 rows"),
        ({"model_type": "phi3"}, "qkv_proj", "q_proj", None, "without an update's shape"),
        ({"model_type": "phi3"}, "qkv_proj", "q_proj", (6, 7), r"no tensor of shape \(6, 7\)"),
    ],
)
def test_rows_that_are_not_known_are_an_error_in_one_line(  # noqa: PLR0917
    tmp_path: Path,
    config: dict[str, Any],
    home: str,
    module: str,
    shape: tuple[int, int] | None,
    told: str,
) -> None:
    base = fused(tmp_path, {f"l.0.{home}.weight": np.zeros((18, 6), np.float32)}, **config)
    with pytest.raises(BaseWeightError, match=told) as caught:
        base.weight(f"l.0.{module}", shape=shape)
    assert "\n" not in str(caught.value)
    assert f"'l.0.{module}'" in str(caught.value)


def test_gate_and_up_of_gpt_oss_alternate_row_by_row(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    stack = rng.standard_normal((2, 6, 8)).astype(np.float32)  # (expert, in, 2·width)
    base = fused(tmp_path, {"l.0.mlp.experts.gate_up_proj": stack}, model_type="gpt_oss")
    whole = base.weight("l.0.mlp.experts.gate_up_proj[1]", shape=(8, 6))
    np.testing.assert_array_equal(whole.array(), stack[1].T)
    up = base.weight("l.0.mlp.experts.1.up_proj", shape=(4, 6))
    np.testing.assert_array_equal(up.array(), stack[1].T[1::2])


def test_experts_of_an_old_adapter_are_cut_out_of_a_stack(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    stack = rng.standard_normal((3, 8, 6)).astype(np.float32)
    base = fused(tmp_path, {"l.0.mlp.experts.gate_up_proj": stack}, model_type="mixtral")
    for name, rows in {"w1": slice(0, 4), "w3": slice(4, 8)}.items():
        weight = base.weight(f"l.0.block_sparse_moe.experts.2.{name}", shape=(4, 6))
        np.testing.assert_array_equal(weight.array(), stack[2, rows])


NUMBERED = (
    "model.visual.merger.mlp.0", "model.visual.merger.mlp.2", "model.mm_projector.2",
    "model.layers.0.mlp.experts.down_projs.3", "model.layers.0.mlp.experts.3.down_proj",
    "model.layers.0.mlp.shared.down_projs.3", "model.layers.0.experts.gate.1",
)  # fmt: skip


def test_modules_whose_own_name_ends_in_a_number_are_found_as_they_are_named(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    weights = {name: rng.standard_normal((8, 6)).astype(np.float32) for name in NUMBERED}
    tensors = {f"{name}.weight": W for name, W in weights.items()}
    base = fused(tmp_path, tensors, model_type="qwen2_vl")
    for name, W in weights.items():
        for spelling in (name, f"base_model.model.{name}", name.removeprefix("model.")):
            np.testing.assert_array_equal(base.weight(spelling, shape=(8, 6)).array(), W)


def test_a_module_of_a_list_stands_before_a_matrix_of_a_stack(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    stack = rng.standard_normal((3, 8, 6)).astype(np.float32)
    own = rng.standard_normal((8, 6)).astype(np.float32)
    path = "l.0.mlp.experts.down_proj"
    base = fused(tmp_path, {path: stack, f"{path}.1.weight": own}, model_type="llama")
    np.testing.assert_array_equal(base.weight(f"{path}.1", shape=(8, 6)).array(), own)
    np.testing.assert_array_equal(base.weight(f"{path}.2", shape=(8, 6)).array(), stack[2])


FLUX = {
    "transformer_blocks.3.attn.to_k": ("double_blocks.3.img_attn.qkv", slice(6, 12)),
    "transformer_blocks.3.attn.add_v_proj": ("double_blocks.3.txt_attn.qkv", slice(12, 18)),
    "transformer_blocks.3.attn.to_out.0": ("double_blocks.3.img_attn.proj", slice(0, 18)),
    "transformer_blocks.3.ff_context.net.2": ("double_blocks.3.txt_mlp.2", slice(0, 18)),
    "single_transformer_blocks.7.attn.to_q": ("single_blocks.7.linear1", slice(0, 6)),
    "single_transformer_blocks.7.proj_mlp": ("single_blocks.7.linear1", slice(18, 42)),
    "single_transformer_blocks.7.proj_out": ("single_blocks.7.linear2", slice(0, 18)),
    "x_embedder": ("img_in", slice(0, 18)),
    "time_text_embed.guidance_embedder.linear_2": ("guidance_in.out_layer", slice(0, 18)),
}


@pytest.mark.parametrize("module", FLUX)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_flux_modules_are_rows_of_the_authors_tensors(
    rng: np.random.Generator, module: str, prefix: str
) -> None:
    arrays = {
        stored: rng.standard_normal((42 if stored.endswith("linear1") else 18, 6))
        for stored, _ in FLUX.values()
    }
    base = open_base(arrays)
    stored, rows = FLUX[module]
    wanted = arrays[stored][rows]
    weight = base.weight(prefix + module, shape=wanted.shape)
    np.testing.assert_allclose(weight.array(), wanted, rtol=1e-6)
    assert weight.name.startswith(stored)


def test_flux_in_diffusers_parts_serves_an_adapter_of_the_authors_names(
    rng: np.random.Generator,
) -> None:
    names = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
    parts = {
        f"single_transformer_blocks.2.{name}": rng.standard_normal((n, 6))
        for name, n in zip(names, (6, 6, 6, 24), strict=True)
    }
    weight = open_base(parts).weight("diffusion_model.single_blocks.2.linear1", shape=(42, 6))
    np.testing.assert_allclose(weight.array(), np.vstack(list(parts.values())), rtol=1e-6)


def test_flux_last_modulation_has_its_halves_the_other_way_round(rng: np.random.Generator) -> None:
    W = rng.standard_normal((12, 6))
    base = open_base({"final_layer.adaLN_modulation.1": W, "double_blocks.0.img_attn.proj": W})
    weight = base.weight("norm_out.linear", shape=(12, 6))
    np.testing.assert_allclose(weight.array(), np.vstack([W[6:], W[:6]]), rtol=1e-6)


SD = {
    "down_blocks.0.attentions.1.blocks.0.attn1.to_q": "input_blocks.2.1.blocks.0.attn1.to_q",
    "down_blocks.2.resnets.0.time_emb_proj": "input_blocks.7.0.emb_layers.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.1.attentions.2.proj_out": "output_blocks.5.1.proj_out",
    "up_blocks.0.resnets.1.conv_shortcut": "output_blocks.1.0.skip_connection",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.2.upsamplers.0.conv": "output_blocks.8.2.conv",
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_2": "time_embed.2",
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("module", SD)
def test_unet_modules_are_found_in_a_checkpoint_of_one_file(module: str, flat: bool) -> None:
    arrays = {
        f"model.diffusion_model.{name}": np.full((2, 3), at, float)
        for at, name in enumerate(SD.values())
    }
    asked = "lora_unet_" + module.replace(".", "_") if flat else f"unet.{module}"
    weight = open_base(arrays).weight(asked, shape=(2, 3))
    assert weight.name == f"model.diffusion_model.{SD[module]}.weight"


@pytest.mark.parametrize("module", [name for name in SD if "up_blocks.0.upsamplers" not in name])
def test_authors_names_are_found_in_diffusers_files(module: str) -> None:
    base = open_base({name: np.full((2, 3), at, float) for at, name in enumerate(SD)})
    for asked in (SD[module], "lora_unet_" + SD[module].replace(".", "_")):
        assert base.weight(asked, shape=(2, 3)).name == f"{module}.weight"


def test_a_flattened_name_finds_a_module_of_its_own_spelling() -> None:
    arrays = {"unet.down.0.to_out.0": np.ones((2, 3)), "unet.down.0.to_out.1": np.ones((2, 3))}
    assert open_base(arrays).weight("lora_unet_down_0_to_out_1").name.endswith("to_out.1.weight")


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens", "transformer.wte", "shared", "word_embeddings", "backbone.embeddings",
        "transformer.tokens_embed", "tok_embeddings",
    ],
)  # fmt: skip
def test_a_head_that_is_absent_is_the_embedding(
    tmp_path: Path, rng: np.random.Generator, config: dict[str, Any], name: str
) -> None:
    W = rng.standard_normal((9, 4)).astype(np.float32)
    base = fused(tmp_path, {f"{name}.weight": W}, model_type="llama", **config)
    np.testing.assert_array_equal(base.weight("lm_head", shape=(9, 4)).array(), W)


def test_a_head_that_is_not_tied_is_missing(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": np.zeros((9, 4), np.float32)}
    base = fused(tmp_path, tensors, model_type="llama", tie_word_embeddings=False)
    with pytest.raises(BaseWeightError, match="no weight belongs to 'lm_head'"):
        base.weight("lm_head", shape=(9, 4))


def test_an_embedding_meets_its_update_either_way_round(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    W = rng.standard_normal((9, 4)).astype(np.float32)
    base = fused(tmp_path, {"model.embed_tokens.weight": W}, model_type="llama")
    np.testing.assert_array_equal(base.weight("model.embed_tokens", shape=(4, 9)).array(), W.T)
    np.testing.assert_array_equal(base.weight("model.embed_tokens", shape=(9, 4)).array(), W)
    with pytest.raises(BaseWeightError, match=r"\(5, 9\)"):
        base.weight("model.embed_tokens", shape=(5, 9))


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 3), (6, 4, 1, 1), (6, 2, 3, 3, 2)])
def test_a_kernel_is_a_matrix_with_a_row_per_output(
    tmp_path: Path, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    W = rng.standard_normal(shape).astype(np.float32)
    base = fused(tmp_path, {"conv.weight": W}, model_type="resnet")
    flat = W.reshape(6, -1)
    np.testing.assert_array_equal(base.weight("conv", shape=flat.shape).array(), flat)
    live = open_base({"conv": W}).weight("conv", shape=flat.shape)
    np.testing.assert_array_equal(live.array(), flat)
    with pytest.raises(BaseWeightError, match=r"of shape \(6, 5\)"):
        base.weight("conv", shape=(6, 5))


WITH_PARTS = {
    "language": "model.language_model.layers.0.self_attn.q_proj",
    "vision": "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    "mtp": "mtp.layers.0.self_attn.q_proj",
    "wrapped": "model._orig_mod.lm_body.0.proj",
}


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("layers.0.self_attn.q_proj", "language"),
        ("model.layers.0.self_attn.q_proj", "language"),
        ("language_model.model.layers.0.self_attn.q_proj", "language"),
        ("module.base_model.model.model.layers.0.self_attn.q_proj.base_layer", "language"),
        ("vision_tower.encoder.layers.0.self_attn.q_proj.linear", "vision"),
        ("model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", "vision"),
        ("model.mtp.layers.0.self_attn.q_proj", "mtp"),
        ("model.lm_body.0.proj", "wrapped"),
    ],
)
def test_a_part_of_a_model_is_found_whatever_the_class_in_front(module: str, part: str) -> None:
    weights = {
        f"{name}.weight": np.full((4, 4), index, np.float32)
        for index, name in enumerate(WITH_PARTS.values())
    }
    base = open_base(weights)
    weight = base.weight(module, shape=(4, 4), transposed=False)
    assert weight.array()[0, 0] == list(WITH_PARTS).index(part)


@pytest.mark.parametrize("module", ["layers.0.q_proj", "model.layers.0.q_proj"])
def test_the_mtp_head_does_not_stand_in_for_a_layer_that_is_missing(module: str) -> None:
    base = open_base({"mtp.layers.0.q_proj.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(BaseWeightError, match="no weight belongs"):
        base.weight(module, shape=(4, 4), transposed=False)
