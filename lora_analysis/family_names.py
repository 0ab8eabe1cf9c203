"""Module names of model families that differ between the running model and its file.

A family rewrites the names in the file and the name that is looked up into one spelling. It applies
only if its mark occurs, so that no rule affects another family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final

from lora_analysis.names import is_flattened

Rewrite = Callable[[str], str]


@dataclass(frozen=True)
class Family:
    """A family with differing names; ``mark`` matches a name that only this family has."""

    mark: re.Pattern[str]
    rewrite: Rewrite

    def has_mark(self, name: str) -> bool:
        """Return True if only this family has a name, with or without its dots."""
        mark = self.mark if "." in name else _without_dots(self.mark.pattern)
        return mark.search(name) is not None


def _rules(*pairs: tuple[str, str]) -> Rewrite:
    dotted = [(re.compile(pattern), replacement) for pattern, replacement in pairs]
    flat = [(_without_dots(pattern), text.replace(".", "_")) for pattern, text in pairs]

    def rewrite(name: str) -> str:
        for pattern, replacement in dotted if "." in name else flat:
            name = pattern.sub(replacement, name)
        return name

    return rewrite


@cache
def _without_dots(pattern: str) -> re.Pattern[str]:
    """Return the pattern for names as kohya writes them, with underscores for dots."""
    return re.compile(pattern.replace(r"\.", "_"))


# ViT and similar models before and since transformers 5.
_VIT = _rules(
    (r"(?:^|(?<=\.))encoder\.layer\.(\d+)\.", r"layers.\1."),
    (r"(?<=\.)attention\.attention\.(query|key|value)$", r"attention.\1"),
    (r"(?<=\.)attention\.query$", "attention.q_proj"),
    (r"(?<=\.)attention\.key$", "attention.k_proj"),
    (r"(?<=\.)attention\.value$", "attention.v_proj"),
    (r"(?<=\.)attention\.output\.dense$", "attention.o_proj"),
    (r"(?<=\.)intermediate\.dense$", "mlp.fc1"),
    (r"(layers\.\d+)\.output\.dense$", r"\1.mlp.fc2"),
)

# Mixtral's experts, which the running model stacks under different names.
_MIXTRAL = _rules(
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"(\.experts(?:\.\d+)?)\.w1$", r"\1.gate_proj"),
    (r"(\.experts(?:\.\d+)?)\.w3$", r"\1.up_proj"),
    (r"(\.experts(?:\.\d+)?)\.w2$", r"\1.down_proj"),
)

# FLUX: layers of its authors' blocks, and diffusers' names of them. Projections that diffusers has
# apart are joined under names that start with ``to_qkv`` and ``add_qkv``.
FLUX_DOUBLE: Final = {
    "img_attn.qkv": "attn.to_qkv",
    "txt_attn.qkv": "attn.add_qkv_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
}
FLUX_SINGLE: Final = {
    "linear1": "attn.to_qkv_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}
FLUX_TOP: Final = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.shift_scale",
}
_FLUX = _rules(
    (r"(?:^|(?<=\.))double_blocks\.(\d+)\.", r"transformer_blocks.\1."),
    (r"(?:^|(?<=\.))single_blocks\.(\d+)\.", r"single_transformer_blocks.\1."),
    *((rf"(?<=\.){re.escape(a)}$", d) for a, d in (FLUX_DOUBLE | FLUX_SINGLE).items()),
    *((rf"(?:^|(?<=\.)){re.escape(a)}$", d) for a, d in FLUX_TOP.items()),
)

# Z-Image and Lumina in their authors' spelling, rewritten to that of diffusers.
_LUMINA: Final = _rules(
    (r"(?<=\.)attention\.qkv$", "attention.to_qkv"),
    (r"(?<=\.)attention\.out$", "attention.to_out.0"),
)

# Wan in its authors' spelling, rewritten to that of diffusers.
_WAN: Final = _rules(
    (r"(?<=\.)self_attn\.(q|k|v)$", r"attn1.to_\1"),
    (r"(?<=\.)self_attn\.o$", "attn1.to_out.0"),
    (r"(?<=\.)cross_attn\.(q|k|v)$", r"attn2.to_\1"),
    (r"(?<=\.)cross_attn\.o$", "attn2.to_out.0"),
    (r"(?<=\.)cross_attn\.(k|v)_img$", r"attn2.add_\1_proj"),
    (r"(blocks\.\d+)\.ffn\.0$", r"\1.ffn.net.0.proj"),
    (r"(blocks\.\d+)\.ffn\.2$", r"\1.ffn.net.2"),
    (r"(?:^|(?<=\.))text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
    (r"(?:^|(?<=\.))text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
    (r"(?:^|(?<=\.))time_embedding\.0$", "condition_embedder.time_embedder.linear_1"),
    (r"(?:^|(?<=\.))time_embedding\.2$", "condition_embedder.time_embedder.linear_2"),
    (r"(?:^|(?<=\.))time_projection\.1$", "condition_embedder.time_proj"),
    (r"(?:^|(?<=\.))head\.head$", "proj_out"),
)

# Text encoders inside a Stable Diffusion checkpoint of one file.
_TEXT_ENCODERS = _rules(
    (r"^cond_stage_model\.transformer\.", "text_encoder."),
    (r"^conditioner\.embedders\.0\.transformer\.", "text_encoder."),
    (
        r"^(?:conditioner\.embedders\.1|cond_stage_model)\.model\.transformer\.resblocks\.(\d+)\.",
        r"text_encoder_2.text_model.encoder.layers.\1.",
    ),
    (r"(text_encoder_2\..*)\.attn$", r"\1.self_attn.qkv_proj"),
    (r"(text_encoder_2\..*)\.attn\.out_proj$", r"\1.self_attn.out_proj"),
    (r"(text_encoder_2\..*)\.mlp\.c_fc$", r"\1.mlp.fc1"),
    (r"(text_encoder_2\..*)\.mlp\.c_proj$", r"\1.mlp.fc2"),
)

# Stable Diffusion's U-Net in its authors' checkpoints and in diffusers. The authors number blocks
# consecutively: on the way down and on the way up, two ResNets (with attentions) and one resampler
# make three per level. True for SD 1, SD 2 and SDXL.
_RESNET: Final = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SINGLE: Final = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_PER_LEVEL: Final = 3
_DIFFUSERS: Final = re.compile(
    r"(|.*\.)(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?"
    r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_AUTHORS: Final = re.compile(
    r"(|.*\.)(input|output|middle)_blocks?\.(\d{1,9})\.(?:(\d{1,9})\.)?(.+)"
)


def diffusers_name(name: str) -> str:
    """Return diffusers' name for an authors' name of a module; other names are unchanged."""
    for ours, theirs in _SINGLE.items():
        if name == theirs or name.endswith(f".{theirs}"):
            return name.removesuffix(theirs) + ours
    match = _AUTHORS.fullmatch(name)
    if match is None:
        return name
    before, way, block, part, rest = match.groups()
    if way == "middle":
        # The middle block has only one number, that of the part.
        number = int(block)
        inside = rest if part is None else f"{part}.{rest}"
        kind = "attentions.0" if number == 1 else f"resnets.{number // 2}"
        return f"{before}mid_block.{kind}.{_diffusers_inside(kind, inside)}"
    level, number = divmod(int(block) - (way == "input"), _PER_LEVEL)
    blocks = f"{before}{'down' if way == 'input' else 'up'}_blocks.{level}"
    if way == "input" and number == _PER_LEVEL - 1:
        return f"{blocks}.downsamplers.0.conv"
    if way == "output" and rest == "conv":  # after the attention, if the level has one
        return f"{blocks}.upsamplers.0.conv"
    kind = "resnets" if part == "0" else "attentions"
    return f"{blocks}.{kind}.{number}.{_diffusers_inside(kind, rest)}"


def authors_name(name: str) -> str:
    """Return the authors' name for diffusers' name of a module; other names are unchanged."""
    for ours, theirs in _SINGLE.items():
        if name == ours or name.endswith(f".{ours}"):
            return name.removesuffix(ours) + theirs
    match = _DIFFUSERS.fullmatch(name)
    if match is None:
        return name
    before, way, level, kind, digits, rest = match.groups()
    number, first = int(digits), _PER_LEVEL * int(level or 0)
    inside = _RESNET.get(rest, rest) if kind == "resnets" else rest
    if way == "mid_block":
        return f"{before}middle_block.{2 * number if kind == 'resnets' else 1}.{inside}"
    if kind == "downsamplers":
        return f"{before}input_blocks.{first + _PER_LEVEL}.0.op"
    if kind == "upsamplers":
        return f"{before}output_blocks.{first + _PER_LEVEL - 1}.2.conv"
    part = 0 if kind == "resnets" else 1
    if way == "down_blocks":
        return f"{before}input_blocks.{first + 1 + number}.{part}.{inside}"
    return f"{before}output_blocks.{first + number}.{part}.{inside}"


def _diffusers_inside(kind: str, inside: str) -> str:
    """Return diffusers' name for the part of a name inside a block."""
    ours = {theirs: name for name, theirs in _RESNET.items()}
    return ours.get(inside, inside) if kind.startswith("resnets") else inside


FAMILIES: Final = (
    Family(re.compile(r"attention\.attention\.(query|key|value)$"), _VIT),
    Family(re.compile(r"\.block_sparse_moe\.|\.experts\.\d+\.w[123]$"), _MIXTRAL),
    Family(re.compile(r"(^|\.)embed_out$"), _rules((r"(^|\.)embed_out$", r"\1lm_head"))),
    Family(re.compile(r"(^|\.)(double|single)_blocks\.\d"), _FLUX),
    Family(re.compile(r"(^|\.)blocks\.\d+\.(self|cross)_attn\.(q|k|v|o|[kv]_img)$"), _WAN),
    Family(re.compile(r"(layers|refiner)\.\d+\.attention\.(qkv|out)$"), _LUMINA),
    Family(
        re.compile(r"(^|\.)((input|output|middle)_blocks?|time_embed|label_emb)\.\d"),
        diffusers_name,
    ),
    Family(re.compile(r"^(cond_stage_model|conditioner\.embedders)\."), _TEXT_ENCODERS),
)

# Rewrites whose results a flattened name may come from, in addition to the name in the file.
SPELLINGS: Final = (*(family.rewrite for family in FAMILIES), authors_name)


def spellings_of(names: Iterable[str]) -> list[Rewrite]:
    """Return the rewrites of the families whose marks occur among names."""
    names = list(names)
    families = [family for family in FAMILIES if any(map(family.has_mark, names))]
    flat = [authors_name] if any(map(is_flattened, names)) else []
    return [*(family.rewrite for family in families), *flat]
