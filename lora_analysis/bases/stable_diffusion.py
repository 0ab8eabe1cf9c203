"""Stable Diffusion's U-Net: names in its authors' checkpoints, and in diffusers.

The authors number the blocks in one row: two ResNets (and attentions) and one resampler make
three of them a level on the way down and on the way up. True for SD 1, SD 2 and SDXL.
"""

from __future__ import annotations

import re
from typing import Final

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
    """Return diffusers' name of a module that has the authors'; other names stay as they are."""
    for ours, theirs in _SINGLE.items():
        if name == theirs or name.endswith(f".{theirs}"):
            return name.removesuffix(theirs) + ours
    match = _AUTHORS.fullmatch(name)
    if match is None:
        return name
    before, way, block, place, rest = match.groups()
    at = int(block)
    if way == "middle":
        # There the number of the part comes first, and no second one.
        inside = rest if place is None else f"{place}.{rest}"
        kind = "attentions.0" if at == 1 else f"resnets.{at // 2}"
        return f"{before}mid_block.{kind}.{_ours(kind, inside)}"
    level, at = divmod(at - (way == "input"), _PER_LEVEL)
    blocks = f"{before}{'down' if way == 'input' else 'up'}_blocks.{level}"
    if way == "input" and at == _PER_LEVEL - 1:
        return f"{blocks}.downsamplers.0.conv"
    if way == "output" and rest == "conv":  # behind the attention, where the level has one
        return f"{blocks}.upsamplers.0.conv"
    kind = "resnets" if place == "0" else "attentions"
    return f"{blocks}.{kind}.{at}.{_ours(kind, rest)}"


def authors_name(name: str) -> str:
    """Return the authors' name of a module that has diffusers'; other names stay as they are."""
    for ours, theirs in _SINGLE.items():
        if name == ours or name.endswith(f".{ours}"):
            return name.removesuffix(ours) + theirs
    match = _DIFFUSERS.fullmatch(name)
    if match is None:
        return name
    before, way, level, kind, number, rest = match.groups()
    at, first = int(number), _PER_LEVEL * int(level or 0)
    inside = _RESNET.get(rest, rest) if kind == "resnets" else rest
    if way == "mid_block":
        return f"{before}middle_block.{2 * at if kind == 'resnets' else 1}.{inside}"
    if kind == "downsamplers":
        return f"{before}input_blocks.{first + _PER_LEVEL}.0.op"
    if kind == "upsamplers":
        return f"{before}output_blocks.{first + _PER_LEVEL - 1}.2.conv"
    place = 0 if kind == "resnets" else 1
    if way == "down_blocks":
        return f"{before}input_blocks.{first + 1 + at}.{place}.{inside}"
    return f"{before}output_blocks.{first + at}.{place}.{inside}"


def _ours(kind: str, inside: str) -> str:
    """Return diffusers' name of what is inside a block."""
    ours = {theirs: name for name, theirs in _RESNET.items()}
    return ours.get(inside, inside) if kind.startswith("resnets") else inside
