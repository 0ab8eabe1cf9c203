"""What a run says of itself in its manifest: what it is, how it came about, how it ended."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lora_analysis import __version__
from lora_analysis.training.schedules import steps_of_epoch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.settings import Setting

_PACKAGES = ("torch", "numpy", "scikit-learn", "transformers", "tokenizers", "bitsandbytes")


def identity(config: RunConfig, inputs: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return which run it is."""
    return {
        "name": config.name,
        "task": config.task,
        "rank": config.rank if config.method == "lora" else None,
        "seed": config.seed,
        "data_seed": config.seeds.data,
        "dropout_seed": config.seeds.dropout,
        "config": config.to_dict(),
        "inputs": dict(inputs),
        "key": key,
    }


def origin(setting: Setting) -> dict[str, Any]:
    """Return what was trained, where, and with which versions."""
    import torch

    return {
        "modules": setting.modules,
        "device": _describe(setting.device),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        **setting.facts,
    }


def final_metrics(path: Path, config: RunConfig, setting: Setting) -> dict[str, float]:
    """Return the figures that stand for a run, from the lines of its metrics.

    ``loss`` is the training loss, its mean over the last epoch; those of the test split are the
    base's before training, and the model's at the end.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    epoch = steps_of_epoch(config.loop, len(setting.task))
    losses = [line["loss"] for line in lines if "loss" in line][-epoch:]
    found: dict[str, float] = {}
    for name in ("accuracy", "correlation", "loss"):
        seen = [line[f"test_{name}"] for line in lines if f"test_{name}" in line]
        role = "test_loss" if name == "loss" else name
        if seen:
            found |= {f"base_{role}": seen[0], role: seen[-1]}
    return found | {"loss": sum(losses) / len(losses)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "lora-analysis": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _describe(device: torch.device) -> str:
    import torch

    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"
