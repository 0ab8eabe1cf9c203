"""Modules that are called one thing when a model runs and another in its file, family by family.

A family rewrites names, those of the file and the one that is looked for alike, so that both meet
in one spelling. It takes part only where its mark occurs, so that no rule touches another family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final

from lora_analysis.bases.stable_diffusion import authors_name, diffusers_name
from lora_analysis.names import is_flattened

Rewrite = Callable[[str], str]


@dataclass(frozen=True)
class Family:
    """Names that differ: ``mark`` finds a name that only this family has."""

    mark: re.Pattern[str]
    rewrite: Rewrite

    def has_mark(self, name: str) -> bool:
        """Return True if a name, with or without its dots, is one of this family alone."""
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
    """Return the pattern for names that kohya wrote, whose dots are underscores."""
    return re.compile(pattern.replace(r"\.", "_"))


# ViT and its kin before and since transformers 5.
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

# Mixtral's experts, which the running model stacks under other names.
_MIXTRAL = _rules(
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"(\.experts(?:\.\d+)?)\.w1$", r"\1.gate_proj"),
    (r"(\.experts(?:\.\d+)?)\.w3$", r"\1.up_proj"),
    (r"(\.experts(?:\.\d+)?)\.w2$", r"\1.down_proj"),
)

# FLUX in its authors' spelling, brought to that of diffusers.
_FLUX = _rules(
    (r"(?:^|(?<=\.))double_blocks\.(\d+)\.", r"transformer_blocks.\1."),
    (r"(?:^|(?<=\.))single_blocks\.(\d+)\.", r"single_transformer_blocks.\1."),
    (r"(?<=\.)img_attn\.qkv$", "attn.to_qkv"),
    (r"(?<=\.)txt_attn\.qkv$", "attn.add_qkv_proj"),
    (r"(?<=\.)img_attn\.proj$", "attn.to_out.0"),
    (r"(?<=\.)txt_attn\.proj$", "attn.to_add_out"),
    (r"(?<=\.)img_mlp\.0$", "ff.net.0.proj"),
    (r"(?<=\.)img_mlp\.2$", "ff.net.2"),
    (r"(?<=\.)txt_mlp\.0$", "ff_context.net.0.proj"),
    (r"(?<=\.)txt_mlp\.2$", "ff_context.net.2"),
    (r"(?<=\.)img_mod\.lin$", "norm1.linear"),
    (r"(?<=\.)txt_mod\.lin$", "norm1_context.linear"),
    (r"(?<=\.)modulation\.lin$", "norm.linear"),
    (r"(?<=\.)linear1$", "attn.to_qkv_mlp"),
    (r"(?<=\.)linear2$", "proj_out"),
    (r"(?:^|(?<=\.))img_in$", "x_embedder"),
    (r"(?:^|(?<=\.))txt_in$", "context_embedder"),
    (r"(?:^|(?<=\.))time_in\.in_layer$", "time_text_embed.timestep_embedder.linear_1"),
    (r"(?:^|(?<=\.))time_in\.out_layer$", "time_text_embed.timestep_embedder.linear_2"),
    (r"(?:^|(?<=\.))vector_in\.in_layer$", "time_text_embed.text_embedder.linear_1"),
    (r"(?:^|(?<=\.))vector_in\.out_layer$", "time_text_embed.text_embedder.linear_2"),
    (r"(?:^|(?<=\.))guidance_in\.in_layer$", "time_text_embed.guidance_embedder.linear_1"),
    (r"(?:^|(?<=\.))guidance_in\.out_layer$", "time_text_embed.guidance_embedder.linear_2"),
    (r"(?:^|(?<=\.))final_layer\.linear$", "proj_out"),
    (r"(?:^|(?<=\.))final_layer\.adaLN_modulation\.1$", "norm_out.shift_scale"),
)

# Z-Image and Lumina in their authors' spelling, brought to that of diffusers.
_LUMINA: Final = _rules(
    (r"(?<=\.)attention\.qkv$", "attention.to_qkv"),
    (r"(?<=\.)attention\.out$", "attention.to_out.0"),
)

# Wan in its authors' spelling, brought to that of diffusers.
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

# Names that a flattened one may come from, beside that in the file.
SPELLINGS: Final = (*(family.rewrite for family in FAMILIES), authors_name)


def spellings_of(names: Iterable[str]) -> list[Rewrite]:
    """Return the rewrites of the families that take part among names, by their marks."""
    every = list(names)
    taking_part = [family for family in FAMILIES if any(map(family.has_mark, every))]
    flat = [authors_name] if any(map(is_flattened, every)) else []
    return [*(family.rewrite for family in taking_part), *flat]
