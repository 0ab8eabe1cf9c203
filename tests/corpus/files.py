"""What the cases are made with: raw safetensors bytes, and a healthy adapter to damage."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MODULE = "base_model.model.layers.0.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Case:
    """One source: how it is made, what ``inspect`` must end with, and what must be said.

    ``said`` is part of what is printed, of an error or of a finding; ``arguments`` are further
    ones for the command.
    """

    name: str
    make: Callable[[Path], Path]
    code: int
    said: str = ""
    arguments: tuple[str, ...] = ()


def factors(*, rank: int = 2, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Two factors that are in order."""
    rng = np.random.default_rng(7)
    shapes = {A: (rank, 6), B: (5, rank)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def entries_of(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    codes = {"float32": "F32", "float16": "F16", "int32": "I32", "float64": "F64"}
    header, data = {}, b""
    for name, value in tensors.items():
        raw = value.tobytes()
        header[name] = {
            "dtype": codes[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return header, data


def packed(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file of any header and any data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def peft(folder: Path, weights: bytes | None = None, config: Any = CONFIG) -> Path:
    """A folder in PEFT's layout; ``config`` is an object or raw bytes, None for no file."""
    if weights is None:
        weights = packed(*entries_of(factors()))
    (folder / WEIGHTS).write_bytes(weights)
    if config is not None:
        raw = config if isinstance(config, bytes) else json.dumps(config).encode()
        (folder / "adapter_config.json").write_bytes(raw)
    return folder


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Path]:
    """A healthy adapter whose header was changed in place."""

    def make(folder: Path) -> Path:
        header, data = entries_of(factors())
        change(header)
        return peft(folder, packed(header, data))

    return make


def holding(**tensors: np.ndarray) -> Callable[[Path], Path]:
    """A healthy adapter with other arrays for A or B, or further tensors."""

    def make(folder: Path) -> Path:
        names = {"A": A, "B": B}
        stored = {**factors(), **{names.get(key, key): value for key, value in tensors.items()}}
        return peft(folder, packed(*entries_of(stored)))

    return make


def bytes_of(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """A healthy file whose bytes were changed."""
    return lambda folder: peft(folder, change(packed(*entries_of(factors()))))


def configured(config: Any) -> Callable[[Path], Path]:
    """Healthy weights beside a configuration: raw bytes, or fields changed."""
    if isinstance(config, bytes):
        return lambda folder: peft(folder, config=config)
    return lambda folder: peft(folder, config={**CONFIG, **config})


def many(names: Iterable[str]) -> Callable[[Path], Path]:
    """A header of scalars without end."""

    def make(folder: Path) -> Path:
        entry = '"%s":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        return peft(folder, packed(f"{{{','.join(entry % name for name in names)}}}".encode()))

    return make
