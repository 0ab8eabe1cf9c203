"""Random values for tests. B is never zero here: an untrained update is made on purpose."""

from __future__ import annotations

import numpy as np

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance


def low_rank_update(
    rng: np.random.Generator,
    d_out: int = 24,
    d_in: int = 20,
    rank: int = 4,
    *,
    name: str = "layers.0.q_proj",
    scale: float | None = 2.0,
    dtype: type = np.float64,
    label: str = "adapter",
) -> LowRankUpdate:
    return LowRankUpdate(
        name=name,
        A=rng.standard_normal((rank, d_in)).astype(dtype),
        B=rng.standard_normal((d_out, rank)).astype(dtype),
        scale=scale,
        label=label,
    )


def orthonormal(rng: np.random.Generator, dimension: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((dimension, columns)))[0]


def planted_update(
    U: np.ndarray,
    values: np.ndarray,
    V: np.ndarray,
    *,
    name: str = "layers.0.q_proj",
    scale: float = 1.0,
    label: str = "planted",
) -> LowRankUpdate:
    """An update whose SVD is U·diag(values)·Vᵀ by construction (times the scale)."""
    return LowRankUpdate(name=name, A=V.T, B=U * values, scale=scale, label=label)


def adapter(
    rng: np.random.Generator,
    *,
    modules: int = 2,
    rank: int = 4,
    d_out: int = 24,
    d_in: int = 20,
    label: str = "adapter",
    **provenance: object,
) -> Adapter:
    names = [f"layers.{i}.{kind}_proj" for i in range(modules) for kind in "qv"]
    updates = {
        name: low_rank_update(rng, d_out, d_in, rank, name=name, label=label) for name in names
    }
    return Adapter(updates, label=label, provenance=Provenance(rank=rank, **provenance))
