"""Adapter files of image models by the layouts their trainers document, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

Tensors = dict[str, np.ndarray]


def stored(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata))
    return path


def normal(rng: np.random.Generator, *shape: int, dtype: type = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def kohya_linear(
    rng: np.random.Generator,
    module: str,
    d_out: int = 6,
    d_in: int = 5,
    rank: int = 2,
    *,
    alpha: float | None = 1.0,
) -> Tensors:
    """A Linear as sd-scripts saves it (``networks/lora.py``, ``LoRAModule``)."""
    tensors = {
        f"{module}.lora_down.weight": normal(rng, rank, d_in),
        f"{module}.lora_up.weight": normal(rng, d_out, rank),
    }
    if alpha is not None:
        tensors[f"{module}.alpha"] = np.array(alpha, np.float32)
    return tensors


def kohya_conv(
    rng: np.random.Generator, module: str, kernel: int = 3, *, rank: int = 2, alpha: float = 1.0
) -> Tensors:
    """A Conv2d of 5 to 6 channels as sd-scripts and LyCORIS save it."""
    return {
        f"{module}.lora_down.weight": normal(rng, rank, 5, kernel, kernel),
        f"{module}.lora_up.weight": normal(rng, 6, rank, 1, 1),
        f"{module}.alpha": np.array(alpha, np.float32),
    }


def kohya_tucker(rng: np.random.Generator, module: str, *, rank: int = 2) -> Tensors:
    """A Conv2d with a Tucker core as LyCORIS saves it (``modules/locon.py``)."""
    return {
        f"{module}.lora_down.weight": normal(rng, rank, 5, 1, 1),
        f"{module}.lora_mid.weight": normal(rng, rank, rank, 3, 3),
        f"{module}.lora_up.weight": normal(rng, 6, rank, 1, 1),
        f"{module}.alpha": np.array(1.0, np.float32),
    }


def lora_pair(
    rng: np.random.Generator,
    a: str,
    b: str,
    shape: tuple[int, int] = (6, 5),
    rank: int = 2,
) -> Tensors:
    """The two factors of a Linear under any keys, A's first."""
    return {a: normal(rng, rank, shape[1]), b: normal(rng, shape[0], rank)}
