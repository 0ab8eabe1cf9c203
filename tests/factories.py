"""Random values for tests. B is never zero here: an untrained update is made on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.studies import GroupAnalysis, study


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


RUN_NAMES = tuple(f"layers.{layer}.{kind}_proj" for layer in range(3) for kind in "qv")
RUN_VALUES = (4.0, 2.0, 1.0, 0.5)
Directions = dict[str, tuple[np.ndarray, np.ndarray]]


def directions(
    rng: np.random.Generator, names: Sequence[str] = RUN_NAMES, shape: tuple[int, int] = (96, 80)
) -> Directions:
    """A pair of left and right unit vectors per module, which runs of a task share."""
    return {
        name: (orthonormal(rng, shape[0], 1)[:, 0], orthonormal(rng, shape[1], 1)[:, 0])
        for name in names
    }


def planted_run(
    rng: np.random.Generator,
    label: str,
    shared: Directions | None = None,
    *,
    cosine: float = 0.95,
    values: Sequence[float] = RUN_VALUES,
    factor: float = 1.0,
    names: Sequence[str] = RUN_NAMES,
    shape: tuple[int, int] = (96, 80),
    **provenance: object,
) -> Adapter:
    """An adapter with given singular values whose first directions have a cosine with shared ones.

    The factors are mixed, so that their rows show nothing of the singular vectors.
    """
    rank = len(values)
    updates = {}
    for name in names:
        sides = [orthonormal(rng, dimension, rank) for dimension in shape]
        for side, first in zip(sides, shared[name] if shared else (), strict=False):
            rest = side[:, 0] - first * (first @ side[:, 0])
            side[:, 0] = cosine * first + np.sqrt(1 - cosine**2) * rest / np.linalg.norm(rest)
            side[:] = np.linalg.qr(side)[0]
        mix = rng.standard_normal((rank, rank)) + 2 * np.eye(rank)
        B = factor * sides[0] * np.asarray(values) @ np.linalg.inv(mix)
        updates[name] = LowRankUpdate(name=name, A=mix @ sides[1].T, B=B, scale=1.0, label=label)
    facts = {"rank": rank, **provenance}
    return Adapter(updates, label=label, provenance=Provenance(**facts))  # type: ignore[arg-type]


def reference_runs(rng: np.random.Generator, count: int, **kwargs: Any) -> list[Adapter]:
    """Unrelated runs of different tasks whose training strength has a range around 1."""
    factors = np.linspace(0.8, 1.25, count)
    decays = np.linspace(0.4, 0.6, count)
    return [
        planted_run(
            rng,
            f"task{i}",
            **{
                "values": 4 * decay ** np.arange(4),
                "factor": factor,
                "task": f"task{i}",
                "seed": 100 + i,
                **kwargs,
            },
        )
        for i, (factor, decay) in enumerate(zip(factors, decays, strict=True))
    ]


def group_analysis(
    members: Sequence[Adapter], others: Sequence[Adapter] = (), **options: Any
) -> GroupAnalysis:
    """What a group shares, next to adapters of other groups."""
    return study(members, reference=others).group_analysis(**options)
