"""Stable Diffusion's U-Net: diffusers' names brought to those of the authors' checkpoints.

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
_BLOCK: Final = re.compile(
    r"(?P<before>^|.*\.)(?P<way>down|up)_blocks\.(?P<level>\d+)\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<at>\d+)\.(?P<rest>.+)"
)
# The up-sampler stands behind the attention, at 2, or, where its level has none, at 1.
_UPSAMPLER: Final = re.compile(r"(.*output_blocks\.\d+\.)[12]\.conv")
_MIDDLE: Final = re.compile(
    r"(?P<before>^|.*\.)mid_block\.(?P<kind>resnets|attentions)\.(?P<at>\d+)\.(?P<rest>.+)"
)


def compvis_name(name: str) -> str:
    """Return the authors' name of a module of the U-Net; other names stay as they are."""
    if match := _BLOCK.fullmatch(name):
        return match["before"] + _block(match)
    if match := _MIDDLE.fullmatch(name):
        place = 2 * int(match["at"]) if match["kind"] == "resnets" else 1
        return f"{match['before']}middle_block.{place}.{_inside(match)}"
    if upsampler := _UPSAMPLER.fullmatch(name):
        return f"{upsampler[1]}up.conv"
    for ours, theirs in _SINGLE.items():
        if name == ours or name.endswith(f".{ours}"):
            return name.removesuffix(ours) + theirs
    return name


def _block(match: re.Match[str]) -> str:
    level, at, kind = int(match["level"]), int(match["at"]), match["kind"]
    if match["way"] == "down":
        if kind == "downsamplers":
            return f"input_blocks.{3 * level + 3}.0.op"
        place = 0 if kind == "resnets" else 1
        return f"input_blocks.{3 * level + 1 + at}.{place}.{_inside(match)}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.up.conv"
    place = 0 if kind == "resnets" else 1
    return f"output_blocks.{3 * level + at}.{place}.{_inside(match)}"


def _inside(match: re.Match[str]) -> str:
    rest = match["rest"]
    return _RESNET.get(rest, rest) if match["kind"] == "resnets" else rest
