"""A folder with everything that documents call by name: adapters, runs, a base, a fine-tune."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lora_analysis import Adapter, LowRankUpdate, write_adapter
from lora_analysis.adapter import Provenance

WIDTH, LAYERS = 64, 2
MODULES = [f"model.layers.{at}.self_attn.{kind}_proj" for at in range(LAYERS) for kind in "qv"]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": LAYERS,
}


def make_workspace(folder: Path) -> Path:
    """Fill a folder: a tiny llama, LoRAs of three tasks and two seeds."""
    rng = np.random.default_rng(0)
    weights = {f"{name}.weight": _normal(rng, WIDTH, WIDTH) for name in MODULES}
    _write_model(folder / "path/to/model", weights)
    tuned = {name: W + 0.1 * _normal(rng, WIDTH, WIDTH) for name, W in weights.items()}
    _write_model(folder / "tuned", tuned)
    cells = [(task, 8, seed) for task in ("a", "b", "c") for seed in (0, 1)] + [("a", 4, 1)]
    for task, rank, seed in cells:
        _write_run(folder / f"runs/{task}-r{rank}-s{seed}", task, rank, seed)
    for name, seed in (("adapter", 0), ("path/to/adapter", 0), ("adapter-a", 0), ("adapter-b", 1)):
        _write_run(folder / name, "a", 8, seed)
    return folder


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _write_model(folder: Path, weights: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


def _write_run(folder: Path, task: str, rank: int, seed: int) -> None:
    """Write an adapter: a direction its task learned on both sides, over an A of its own seed."""
    updates = {}
    for at, name in enumerate(MODULES):
        learned = np.random.default_rng([ord(task), at])
        own = np.random.default_rng([rank, seed, at])
        A, B = _normal(own, rank, WIDTH), 0.1 * _normal(own, WIDTH, rank)
        A[0] += 8 * _normal(learned, WIDTH)
        B[:, 0] += _normal(learned, WIDTH)
        updates[name] = LowRankUpdate(name=name, A=A, B=B, scale=8 / rank, alpha=8)
    config = {
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "path/to/model",
        "task_type": "CAUSAL_LM",
    }
    adapter = Adapter(updates, label=folder.name, provenance=Provenance(rank=rank), config=config)
    write_adapter(adapter, folder)
    (folder / "manifest.json").write_text(json.dumps({"task": task, "seed": seed}))
