"""A folder with everything that documents call by name: adapters, runs, a base, a fine-tune."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from image_files import kohya_sdxl
from safetensors.numpy import save_file
from tiny_models import write_model, write_reviews

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
    for name, seed, alpha in (("style", 1, 4.0), ("subject", 2, 4.0), ("old", 3, None)):
        _write_kohya(folder / f"{name}.safetensors", seed, alpha)
    kohya_sdxl(folder / "sdxl.safetensors", rank=4, width=8)
    (folder / "authors.toml").write_text('[ann]\nsources = ["adapter-a", "runs/b*"]\n')
    write_model(folder / "models/bert", "bert")
    write_reviews(folder / "reviews.csv")
    return folder


def _write_kohya(path: Path, seed: int, alpha: float | None) -> None:
    """Write a LoRA of Stable Diffusion's denoiser under kohya's keys."""
    rng = np.random.default_rng(seed)
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    tensors = {}
    for name in (f"{block}_{attn}_to_{kind}" for attn in ("attn1", "attn2") for kind in "qv"):
        tensors[f"{name}.lora_down.weight"] = _normal(rng, 8, WIDTH)
        tensors[f"{name}.lora_up.weight"] = _normal(rng, WIDTH, 8)
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _write_model(folder: Path, weights: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


def _write_run(folder: Path, task: str, rank: int, seed: int) -> None:
    """Write an adapter: three directions that its task learned, over an A of its own seed."""
    updates = {}
    for at, name in enumerate(MODULES):
        learned = np.random.default_rng([ord(task), at])
        own = np.random.default_rng([rank, seed, at])
        A, B = _normal(own, rank, WIDTH), 0.1 * _normal(own, WIDTH, rank)
        A[:3] += _normal(learned, 3, WIDTH)
        B[:, :3] += _normal(learned, WIDTH, 3) * np.array([1, 0.6, 0.4], np.float32)
        updates[name] = LowRankUpdate(name=name, A=A, B=B, scale=8 / rank, alpha=8)
    config = {
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "path/to/model",
        "task_type": "CAUSAL_LM",
    }
    adapter = Adapter(updates, label=folder.name, provenance=Provenance(rank=rank), config=config)
    write_adapter(adapter, folder)
    (folder / "manifest.json").write_text(json.dumps({"task": task, "seed": seed}))
