"""A base small enough to adapt in a fraction of a second, on the real digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_analysis.training.config import RunConfig
from lora_analysis.training.digits_vit import DigitsViT, VitConfig, write_base
from lora_analysis.training.options import BaseOptions, LoopOptions
from lora_analysis.training.pretrain import initialize

TINY = VitConfig(width=16, depth=2, heads=2, mlp_width=16)
SHORT = LoopOptions(steps=4, batch_size=16, warmup_steps=1, evaluations=2)


def write_tiny_base(folder: Path, *, seed: int = 5) -> Path:
    model = DigitsViT(TINY)
    initialize(model, seed)
    return write_base(model, folder, {"seed": seed})


def on(base: Path, config: RunConfig) -> RunConfig:
    """The same run on the base of that folder."""
    return replace(config, base=BaseOptions(source=str(base)))
