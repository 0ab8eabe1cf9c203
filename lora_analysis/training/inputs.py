"""What a run reads, and hashes of it: the part of its key that the configuration cannot know."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_analysis.training.files import base_folder, base_sha256
from lora_analysis.training.options import DIGITS

if TYPE_CHECKING:
    from lora_analysis.training.config import RunConfig


def run_key(config: RunConfig) -> str:
    """Return the hash of all that determines a run: its configuration, and what it reads."""
    return config.key(input_hashes(config))


def input_hashes(config: RunConfig) -> dict[str, str]:
    """Return the SHA-256 of a run's base and data by role."""
    return {"base": base_sha256(base_place(config.base.source)), "data": config.data.source}


def base_place(source: str) -> Path:
    """Return the folder of a base model on this machine."""
    return base_folder() if source == DIGITS else Path(source)
