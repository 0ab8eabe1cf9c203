"""One small base in every storage, and an adapter to hold against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf_bases import q4_k, write_gguf
from quantized_bases import awq, bitsandbytes_4bit, bitsandbytes_int8, fp8_blocks, gptq, write_base
from safetensors.numpy import save_file

_RNG = np.random.default_rng(5)
_W = _RNG.standard_normal((64, 256)).astype(np.float32)
_GGUF = "blk.0.ffn_down.weight"


def adapter_of(folder: Path) -> Path:
    """An adapter of one module, called q here and ffn_down in GGUF's words."""
    factors = {"A": _RNG.standard_normal((2, 256)), "B": _RNG.standard_normal((64, 2))}
    save_file(
        {
            f"base_model.model.{name}.lora_{role}.weight": one.astype(np.float32)
            for name in ("q", "model.layers.0.mlp.down_proj")
            for role, one in factors.items()
        },
        folder / "adapter_model.safetensors",
    )
    return folder


def _stored(make: Callable[[], Any], **quantization: Any) -> Callable[[Path], Path]:
    return lambda folder: write_base(folder, make()[0], **quantization)


def _torch(folder: Path) -> Path:
    torch.save({"q.weight": torch.from_numpy(_W)}, folder / "pytorch_model.bin")
    return folder


def _sharded(folder: Path) -> Path:
    names = ("model-1.safetensors", "model-2.safetensors")
    for name, key in zip(names, ("q.weight", "other.weight"), strict=True):
        save_file({key: _W}, folder / name)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"q.weight": "model-1.safetensors", "other.weight": "model-2.safetensors"}}'
    )
    return folder


def _gguf(kind: str, raw: np.ndarray | None = None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tensor = _W if raw is None else raw
        return write_gguf(folder / "m.gguf", {_GGUF: tensor}, kind=kind, raw=raw is not None)

    return make


BASES: dict[str, Callable[[Path], Path]] = {
    "base float": _stored(lambda: ({"q.weight": torch.from_numpy(_W).bfloat16()},)),
    "base sharded": _sharded,
    "base torch": _torch,
    "base nf4": _stored(
        lambda: bitsandbytes_4bit(torch.from_numpy(_W), "nf4", nested=True),
        quant_method="bitsandbytes",
    ),
    "base int8": _stored(
        lambda: bitsandbytes_int8(torch.from_numpy(_W)), quant_method="bitsandbytes"
    ),
    "base gptq": _stored(
        lambda: gptq(_W, bits=4, group=32), quant_method="gptq", bits=4, group_size=32
    ),
    "base awq": _stored(lambda: awq(_W, group=32), quant_method="awq", bits=4, group_size=32),
    "base fp8": _stored(lambda: fp8_blocks(torch.from_numpy(_W), (32, 32)), quant_method="fp8"),
    "base q8_0": _gguf("Q8_0"),
    "base q4_k": _gguf("Q4_K", q4_k(_W)),
}
