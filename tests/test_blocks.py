"""Where modules are in their models: the numbers of blocks, and what groups by them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import image_files as files
import pytest

from lora_analysis import read_adapter
from lora_analysis.blocks import (
    choose_names,
    forward_order,
    group_modules,
    is_image,
    locate_module,
    short_names,
)

# diffusers' path and the original code's, from the tables by which diffusers converts checkpoints.
SPELLINGS = [
    ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2", "IN01"),
    ("down_blocks.0.resnets.1.time_emb_proj", "input_blocks.2.0.emb_layers.1", "IN02"),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op", "IN03"),
    ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in", "IN04"),
    ("down_blocks.1.attentions.1.proj_out", "input_blocks.5.1.proj_out", "IN05"),
    ("down_blocks.2.attentions.0.transformer_blocks.3.attn2.to_k",
     "input_blocks.7.1.transformer_blocks.3.attn2.to_k", "IN07"),
    ("down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
     "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj", "IN08"),
    ("down_blocks.3.resnets.1.conv2", "input_blocks.11.0.out_layers.3", "IN11"),
    ("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
     "middle_block.1.transformer_blocks.0.attn1.to_out.0", "MID"),
    ("mid_block.resnets.1.conv_shortcut", "middle_block.2.skip_connection", "MID"),
    ("up_blocks.0.resnets.2.conv1", "output_blocks.2.0.in_layers.2", "OUT02"),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv", "OUT02"),
    ("up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v",
     "output_blocks.5.1.transformer_blocks.0.attn2.to_v", "OUT05"),
    ("up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2",
     "output_blocks.11.1.transformer_blocks.0.ff.net.2", "OUT11"),
    ("conv_in", "input_blocks.0.0", "IN00"),
    ("conv_out", "out.2", ""),
    ("time_embedding.linear_1", "time_embed.0", ""),
    ("add_embedding.linear_2", "label_emb.0.2", ""),
]  # fmt: skip


@pytest.mark.parametrize(("diffusers", "original", "block"), SPELLINGS)
def test_all_spellings_of_a_unet_layer_have_one_location(
    diffusers: str, original: str, block: str
) -> None:
    names = [diffusers, f"unet.{diffusers}", f"base_model.model.{diffusers}"]
    names += ["lora_unet_" + path.replace(".", "_") for path in (diffusers, original)]
    names += [f"diffusion_model.{original}", f"model.diffusion_model.{original}"]
    locations = {locate_module(name) for name in names}
    assert len(locations) == 1
    (where,) = locations
    assert (where.component, where.block) == ("U-Net", block)


FLUX = [
    ("transformer_blocks.7.attn.to_q", "double_blocks.7.img_attn.qkv", "double 7", "img_attn"),
    ("transformer_blocks.7.attn.add_k_proj", "double_blocks.7.txt_attn.qkv", "double 7",
     "txt_attn"),
    ("transformer_blocks.0.attn.to_add_out", "double_blocks.0.txt_attn.proj", "double 0",
     "txt_attn"),
    ("transformer_blocks.18.ff.net.0.proj", "double_blocks.18.img_mlp.0", "double 18", "img_mlp"),
    ("transformer_blocks.18.ff_context.net.2", "double_blocks.18.txt_mlp.2", "double 18",
     "txt_mlp"),
    ("transformer_blocks.1.norm1_context.linear", "double_blocks.1.txt_mod.lin", "double 1",
     "txt_mod"),
    ("single_transformer_blocks.37.attn.to_v", "single_blocks.37.linear1", "single 37", "linear1"),
    ("single_transformer_blocks.37.proj_mlp", "single_blocks.37.linear1", "single 37", "linear1"),
    ("single_transformer_blocks.3.proj_out", "single_blocks.3.linear2", "single 3", "linear2"),
    ("single_transformer_blocks.3.norm.linear", "single_blocks.3.modulation.lin", "single 3",
     "modulation"),
    ("x_embedder", "img_in", "", "img_in"),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer", "", "guidance_in"),
]  # fmt: skip


@pytest.mark.parametrize(("diffusers", "original", "block", "part"), FLUX)
def test_all_spellings_of_a_flux_layer_are_in_one_block_and_part(
    diffusers: str, original: str, block: str, part: str
) -> None:
    names = [f"transformer.{diffusers}", "lora_transformer_" + diffusers.replace(".", "_")]
    names += ["lora_unet_" + original.replace(".", "_"), f"diffusion_model.{original}"]
    names += [f"base_model.model.{diffusers}"]
    assert {locate_module(name)[:4] for name in names} == {("transformer", block, None, part)}


def test_text_encoders_are_numbered_by_component_and_layer() -> None:
    names = {
        "text encoder 1": [
            "lora_te_text_model_encoder_layers_5_self_attn_q_proj",
            "lora_te1_text_model_encoder_layers_5_self_attn_q_proj",
            "text_encoder.text_model.encoder.layers.5.self_attn.q_proj",
        ],
        "text encoder 2": [
            "lora_te2_text_model_encoder_layers_5_self_attn_q_proj",
            "text_encoder_2.text_model.encoder.layers.5.self_attn.q_proj",
        ],
    }
    for component, spellings in names.items():
        locations = {locate_module(name)[:5] for name in spellings}
        assert locations == {(component, "layer 5", None, "self_attn", "self_attn.q_proj")}
    t5 = locate_module("lora_te3_encoder_block_4_layer_0_SelfAttention_q")
    assert t5[:5] == ("text encoder T5", "layer 4", None, "SelfAttention", "SelfAttention.q")


@pytest.mark.parametrize(
    ("name", "block", "part"),
    [
        ("model.layers.12.self_attn.q_proj", "layer 12", "q_proj"),
        ("transformer.h.3.attn.c_attn", "layer 3", "c_attn"),
        ("model.visual.blocks.2.attn.qkv", "layer 2", "qkv"),
        ("lm_head", "", "lm_head"),
        ("003", "layer 3", "no type"),
        ("unet.3", "layer 3", "unet"),
        ("out.2", "layer 2", "out"),
        ("proj_out", "", "proj_out"),
    ],
)
def test_other_models_have_layers_and_types(name: str, block: str, part: str) -> None:
    assert locate_module(name)[:5] == ("", block, None, part, part)


def test_a_unet_with_other_levels_has_no_blocks_of_stable_diffusion() -> None:
    # Three layers per level: the formula would give two places one number.
    assert locate_module("unet.down_blocks.0.attentions.2.proj_in").block == "layer 0"
    assert locate_module("lora_unet_blocks_7_cross_attn_k")[:5] == (
        "transformer", "layer 7", None, "cross_attn", "cross_attn.k",
    )  # fmt: skip


def test_factories_have_the_blocks_that_the_models_have(tmp_path: Path) -> None:
    sd15 = list(read_adapter(files.kohya_sd15(tmp_path / "a.safetensors", rank=1, width=2)))
    blocks = Counter(where.block for where in map(locate_module, sd15) if not where.number)
    assert len(sd15) == 264
    assert [name for name in group_modules(sd15) if "TE" not in name] == [
        *(f"IN{n:02}" for n in (1, 2, 4, 5, 7, 8)), "MID", *(f"OUT{n:02}" for n in range(3, 12)),
    ]  # fmt: skip
    assert blocks["IN08"] == 12
    kohya = read_adapter(files.kohya_sdxl(tmp_path / "b.safetensors", rank=1, width=2))
    diffusers = read_adapter(files.diffusers_sdxl(tmp_path / "c.safetensors", rank=1, width=2))
    assert len(kohya) == len(diffusers) == 986
    groups = group_modules(kohya)
    assert {title: len(names) for title, names in groups.items()} == {
        title: len(names) for title, names in group_modules(diffusers).items()
    }
    assert list(groups)[:11] == [
        "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{n:02}" for n in range(6)),
    ]  # fmt: skip
    assert sorted(short_names(kohya).values()) == sorted(short_names(diffusers).values())


def test_the_order_is_that_of_the_forward_pass_with_text_encoders_last() -> None:
    names = [
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
        "lora_te1_text_model_encoder_layers_10_mlp_fc1",
        "lora_te1_text_model_encoder_layers_2_mlp_fc1",
        "lora_unet_output_blocks_0_1_proj_in",
        "lora_unet_middle_block_1_proj_in",
        "lora_unet_input_blocks_4_1_proj_out",
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_q",
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_unet_input_blocks_4_0_in_layers_2",
        "lora_unet_time_embed_0",
    ]
    assert forward_order(names) == names[::-1]
    assert choose_names(names, None) == names[::-1]
    flux = ["transformer.single_transformer_blocks.0.proj_out",
            "transformer.transformer_blocks.10.attn.to_q",
            "transformer.transformer_blocks.9.attn.to_q"]  # fmt: skip
    assert forward_order(flux) == flux[::-1]
    language = ["model.layers.1.q", "lm_head", "model.layers.0.q"]
    assert not is_image(language)
    assert forward_order(language) == language


def test_short_names_are_unique_and_number_layers_where_a_block_has_several() -> None:
    names = [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_unet_output_blocks_9_1_transformer_blocks_0_attn1_to_q",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    ]
    titles = short_names(names)
    assert list(titles.values()) == [
        "IN04.0 attn1.to_q", "IN04.1 attn1.to_q", "IN04 proj_in", "OUT09 attn1.to_q",
        "TE1 layer 0 mlp.fc1", "TE2 layer 0 mlp.fc1",
    ]  # fmt: skip
    for name, title in titles.items():
        assert choose_names(names, title) == [name]
    same = ["model.layers.0.self_attn.q_proj", "model.layers.0.cross_attn.q_proj", "model.norm"]
    assert list(short_names(same).values()) == same
    assert short_names(["model.layers.4.q_proj", "003"]) == {
        "model.layers.4.q_proj": "q_proj, layer 4", "003": "003",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("IN04", 22), ("in04", 22), ("IN", 248), ("attn2", 280), ("IN07.3", 10), ("MID ff", 20),
        ("IN04 attn1.to_q", 2), ("text encoder", 264), ("text encoder 1", 72), ("TE2", 192),
        ("TE1 layer 3", 6), ("unet", 722), ("U-Net", 722), ("OUT06", 0), ("layer 40", 0),
        ("proj_in", 11), (["IN04", "MID"], 124), ("lora_unet_input_blocks_4_1_proj_in", 1),
        (".*attn2_to_k", 70),
    ],
)  # fmt: skip
def test_blocks_and_parts_select_modules(pattern: str | list[str], count: int) -> None:
    names = [f"lora_unet_{name}" for name in files.unet_modules(files.SDXL_BLOCKS)]
    names += [f"lora_te1_{name}" for name in files.clip_modules(12)]
    names += [f"lora_te2_{name}" for name in files.clip_modules(32)]
    assert len(choose_names(names, pattern)) == count


def test_the_end_of_a_name_counts_before_a_block_of_that_name() -> None:
    names = ["unet.mid_block.resnets.0.conv1", "unet.conv_in", "unet.mid_block.resnets.0.conv2"]
    assert choose_names(names, "conv1") == names[:1]
    assert choose_names(names, "conv") == [names[1], names[0], names[2]]


def test_long_sequences_of_blocks_are_joined_in_runs(tmp_path: Path) -> None:
    for factory in (files.kohya_flux, files.diffusers_flux):
        adapter = read_adapter(factory(tmp_path / "flux.safetensors", rank=1, width=2))
        groups = group_modules(adapter)
        denoiser = [title for title in groups if "TE" not in title]
        assert denoiser[:2] == ["double 0 to 2", "double 3 to 5"]
        assert denoiser[6:8] == ["double 18", "single 0 to 4"]
        assert denoiser[-1] == "single 35 to 37"
        assert sorted(name for names in groups.values() for name in names) == sorted(adapter)
    assert list(group_modules(["model.layers.0.q_proj", "model.layers.1.q_proj", "lm_head"])) == [
        "q_proj", "lm_head",
    ]  # fmt: skip
