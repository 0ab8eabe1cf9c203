"""Layers of SDXL, Stable Diffusion 1.5 and FLUX as their loaders name them, for tests.

Written from the models' structure, not from the package: which blocks there are, and how they are
numbered by sd-scripts (``library/sdxl_original_unet.py``, ``networks/lora.py``,
``networks/lora_flux.py``), ComfyUI (``comfy/lora.py``: the path in the checkpoint behind
``lora_unet_``, with underscores) and diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

LINEARS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.0.proj")
CLIP = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")


class Layer(NamedTuple):
    """A layer's name in sd-scripts' files and its path in diffusers, component first."""

    kohya: str
    diffusers: str


def flat(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def _unet(pairs: list[tuple[str, str]]) -> list[Layer]:
    return [Layer(flat("lora_unet", kohya), f"unet.{diffusers}") for kohya, diffusers in pairs]


def sdxl_layers() -> list[Layer]:
    """Layers of SDXL: its U-Net in the authors' numbers, convolutions included, and both CLIPs."""
    places: list[tuple[str, str, int]] = []  # the authors', diffusers', transformer blocks
    for number, (block, index, depth) in enumerate(
        [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 2), (1, 1, 2), (1, 2, 0), (2, 0, 10), (2, 1, 10)]
    ):
        if depth:
            places.append(
                (f"input_blocks.{number + 1}.1", f"down_blocks.{block}.attentions.{index}", depth)
            )
    places.append(("middle_block.1", "mid_block.attentions.0", 10))
    for number in range(6):
        depth = 10 if number < 3 else 2
        diffusers = f"up_blocks.{number // 3}.attentions.{number % 3}"
        places.append((f"output_blocks.{number}.1", diffusers, depth))
    pairs = [(f"{a}.proj_in", f"{d}.proj_in") for a, d, _ in places]
    pairs += [
        (f"{a}.transformer_blocks.{t}.{linear}", f"{d}.transformer_blocks.{t}.{linear}")
        for a, d, depth in places
        for t in range(depth)
        for linear in LINEARS
    ]
    pairs += [
        ("input_blocks.1.0.in_layers.2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.8.0.emb_layers.1", "down_blocks.2.resnets.1.time_emb_proj"),
        ("middle_block.2.out_layers.3", "mid_block.resnets.1.conv2"),
        ("output_blocks.0.0.skip_connection", "up_blocks.0.resnets.0.conv_shortcut"),
        ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.8.0.in_layers.2", "up_blocks.2.resnets.2.conv1"),
    ]
    return _unet(pairs) + [
        Layer(flat(f"lora_te{i}", path), f"{encoder}.{path}")
        for i, encoder in ((1, "text_encoder"), (2, "text_encoder_2"))
        for path in (f"text_model.encoder.layers.{i}.{part}" for part in CLIP)
    ]


def sd15_layers() -> list[Layer]:
    """Layers of Stable Diffusion 1.5, which sd-scripts names as diffusers does."""
    places = [f"down_blocks.{b}.attentions.{i}" for b in range(3) for i in range(2)]
    places += ["mid_block.attentions.0"]
    places += [f"up_blocks.{b}.attentions.{i}" for b in range(1, 4) for i in range(3)]
    paths = [f"{place}.{layer}" for place in places for layer in ("proj_in", "proj_out")]
    paths += [f"{place}.transformer_blocks.0.{linear}" for place in places for linear in LINEARS]
    paths += ["down_blocks.0.resnets.1.conv2", "up_blocks.3.resnets.0.time_emb_proj"]
    return _unet([(path, path) for path in paths]) + [
        Layer(flat("lora_te", path), f"text_encoder.{path}")
        for path in (f"text_model.encoder.layers.11.{part}" for part in CLIP)
    ]


# Layers of a double and of a single block of FLUX that are one weight in both programs.
_FLUX_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
}
_FLUX_SINGLE = {"linear2": "proj_out", "modulation.lin": "norm.linear"}


def flux_layers(double: int = 2, single: int = 3) -> list[Layer]:
    """Layers of FLUX that are one weight in both programs, of some blocks."""
    pairs = [
        (f"double_blocks.{i}.{a}", f"transformer_blocks.{i}.{d}")
        for i in range(double)
        for a, d in _FLUX_DOUBLE.items()
    ]
    pairs += [
        (f"single_blocks.{i}.{a}", f"single_transformer_blocks.{i}.{d}")
        for i in range(single)
        for a, d in _FLUX_SINGLE.items()
    ]
    return [Layer(flat("lora_unet", a), f"transformer.{d}") for a, d in pairs] + [
        Layer(flat("lora_te1", path), f"text_encoder.{path}")
        for path in (f"text_model.encoder.layers.0.{part}" for part in CLIP)
    ]


def flux_fused(double: int = 2, single: int = 3) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield sd-scripts' names of FLUX's fused weights, and diffusers' parts with their shares."""
    for i in range(double):
        path = f"transformer.transformer_blocks.{i}.attn"
        for stream, parts in (
            ("img", ("to_q", "to_k", "to_v")),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            name = f"lora_unet_double_blocks_{i}_{stream}_attn_qkv"
            yield name, {f"{path}.{part}": 1 for part in parts}
    for i in range(single):
        path = f"transformer.single_transformer_blocks.{i}"
        qkv = {f"{path}.attn.{part}": 1 for part in ("to_q", "to_k", "to_v")}
        yield f"lora_unet_single_blocks_{i}_linear1", {**qkv, f"{path}.proj_mlp": 4}
