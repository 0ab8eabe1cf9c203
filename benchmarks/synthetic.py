"""Adapters and weights of real shapes with random content, made for one run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lora_analysis import LowRankUpdate

# (d_out, d_in) of the seven projections of one Llama-3.1-8B layer.
LLAMA_8B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def update(
    rng: np.random.Generator, shape: tuple[int, int], rank: int, *, name: str = "m", **fields: str
) -> LowRankUpdate:
    """Return a random update; the size of a trained one."""
    a = rng.uniform(-1, 1, (rank, shape[1])) / np.sqrt(shape[1])
    b = rng.standard_normal((shape[0], rank)) * 1e-3
    return LowRankUpdate(
        name=name, A=a.astype(np.float32), B=b.astype(np.float32), scale=2.0, **fields
    )


def roberta(rng: np.random.Generator) -> Iterator[LowRankUpdate]:
    """Yield the 24 updates of a RoBERTa-base query/value adapter, r = 8."""
    for layer in range(12):
        for kind in ("query", "value"):
            name = f"roberta.encoder.layer.{layer}.attention.self.{kind}"
            yield update(rng, (768, 768), 8, name=name)


def llama(rng: np.random.Generator) -> Iterator[LowRankUpdate]:
    """Yield the 224 updates of a Llama-3.1-8B adapter on all projections, r = 16, bfloat16."""
    for layer in range(32):
        for kind, shape in LLAMA_8B.items():
            yield update(
                rng, shape, 16, name=f"model.layers.{layer}.{kind}", stored_dtype="bfloat16"
            )


def large_llama(rng: np.random.Generator, modules: int) -> Iterator[LowRankUpdate]:
    """Yield some of the 560 updates of a Llama-70B-shaped adapter, 8192², r = 64, bfloat16."""
    for layer in range(modules):
        name = f"model.layers.{layer}.self_attn.q_proj"
        yield update(rng, (8192, 8192), 64, name=name, stored_dtype="bfloat16")


def lokr_file(path: Path, *, first: int = 64, second: int = 64, rank: int = 8) -> Path:
    """Write one LoKr module of ``(first·second)²``, the second matrix factored; return it."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    shapes = {"w1": (first, first), "w2_a": (second, rank), "w2_b": (rank, second)}
    tensors = {
        f"lora_unet_m.lokr_{name}": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, path)
    return path


def written(updates: Iterator[LowRankUpdate], folder: Path) -> Path:
    """Write an adapter as a PEFT folder in the updates' stored type; return it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors, rank = {}, 0
    for one in updates:
        dtype, rank = getattr(torch, one.stored_dtype), one.rank
        for role, factor in (("A", one.A), ("B", one.B)):
            key = f"base_model.model.{one.name}.lora_{role}.weight"
            tensors[key] = torch.from_numpy(factor.copy()).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def base_file(shapes: dict[str, tuple[int, int]], path: Path) -> Path:
    """Write a bfloat16 base of Gaussian weights as one safetensors file; return it."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": (0.02 * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def flat_weight(d: int, seed: int = 0) -> np.ndarray:
    """Return a Gaussian ``d × d`` weight, float32: the flattest spectrum there is."""
    return np.random.default_rng(seed).standard_normal((d, d), dtype=np.float32) * np.float32(0.02)
