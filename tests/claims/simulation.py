"""Adapters of known relation: strangers, strangers on one base, and runs of one task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance


@dataclass(frozen=True, slots=True)
class Setting:
    """What all adapters of a simulated base have in common.

    Attributes
    ----------
    modules, dimension
        Number of modules, and the length of the shorter side of their weights.
    geometry
        Share of an update's energy, at strength 1, in the leading directions of the base: what
        makes unrelated adapters alike. It grows with the strength.
    shared
        Share of the energy that runs of one task have in common; 0 for strangers.
    decay
        Range of the ratio of successive singular values.
    """

    modules: int = 8
    dimension: int = 48
    geometry: float = 0.0
    shared: float = 0.0
    decay: tuple[float, float] = (0.6, 0.9)


class Base:
    """A base model: leading directions that every update falls into, module by module."""

    def __init__(self, rng: np.random.Generator, setting: Setting) -> None:
        self.rng, self.setting = rng, setting
        self.names = [
            f"model.layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj" for i in range(setting.modules)
        ]
        self.shapes = [
            (setting.dimension + 16 * (i % 2), setting.dimension) for i in range(setting.modules)
        ]
        self._leading = self._directions(4)
        self._common: dict[object, list[tuple[np.ndarray, np.ndarray]]] = {}

    def _directions(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [
            (_orthonormal(self.rng, d_out, count), _orthonormal(self.rng, d_in, count))
            for d_out, d_in in self.shapes
        ]

    def adapter(
        self,
        task: str | None,
        seed: int | None,
        *,
        rank: int = 8,
        strength: float = 1.0,
        label: str | None = None,
    ) -> Adapter:
        """Train an adapter: its own directions, its task's, and the base's."""
        updates = {}
        for key in (task, (task, seed)):
            if key not in self._common:
                self._common[key] = self._directions(2)
        label = label or f"{task}-r{rank}-s{seed}"
        for i, name in enumerate(self.names):
            d_out, d_in = self.shapes[i]
            decay = self.rng.uniform(*self.setting.decay)
            values = decay ** np.arange(rank)
            U, V = _orthonormal(self.rng, d_out, rank), _orthonormal(self.rng, d_in, rank)
            total = (U * values) @ V.T / np.linalg.norm(values)
            if seed is not None:  # ranks of one task and seed saw their data in one order
                total = _mixed(total, self._common[task, seed][i], 0.5, self.rng)
            if self.setting.shared:
                total = _mixed(total, self._common[task][i], self.setting.shared, self.rng)
            if self.setting.geometry:
                share = min(self.setting.geometry * strength, 0.9)
                total = _mixed(total, self._leading[i], share, self.rng)
            updates[name] = _factored(strength * total, rank, name, label, self.rng)
        return Adapter(
            updates,
            label=label,
            provenance=Provenance(rank=rank, task=task, seed=seed, base_model="acme/base-1b"),
        )

    def study(
        self,
        tasks: Sequence[str],
        seeds: int,
        *,
        ranks: Sequence[int] = (8,),
        strengths: Sequence[float] = (),
        crossed: bool = True,
    ) -> list[Adapter]:
        """Train tasks × seeds × ranks; seeds recur over tasks if the design is crossed."""
        strengths = strengths if len(strengths) else [1.0] * len(tasks)
        return [
            self.adapter(
                task, seed if crossed else 100 * t + seed, rank=rank, strength=strengths[t]
            )
            for t, task in enumerate(tasks)
            for seed in range(seeds)
            for rank in ranks
        ]

    def strangers(self, strengths: Sequence[float], *, rank: int = 8) -> Iterator[Adapter]:
        """Train adapters of as many tasks."""
        for i, strength in enumerate(strengths):
            yield self.adapter(f"task{i}", 1000 + i, rank=rank, strength=strength)


def _orthonormal(rng: np.random.Generator, dimension: int, count: int) -> np.ndarray:
    q, r = np.linalg.qr(rng.standard_normal((dimension, count)))
    return q * np.sign(np.diag(r))


def _mixed(
    update: np.ndarray,
    directions: tuple[np.ndarray, np.ndarray],
    share: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the update with a share of its energy in given directions, of random weights."""
    U, V = directions
    weights = rng.standard_normal(U.shape[1]) * 0.5 ** np.arange(U.shape[1])
    common = (U * weights) @ V.T / np.linalg.norm(weights)
    return np.sqrt(1 - share) * update + np.sqrt(share) * common


def _factored(
    matrix: np.ndarray, rank: int, name: str, label: str, rng: np.random.Generator
) -> LowRankUpdate:
    """Return the best approximation of a rank in a random gauge, as training leaves it."""
    U, s, Vt = np.linalg.svd(matrix, full_matrices=False)
    gauge = rng.standard_normal((rank, rank)) + 2 * np.eye(rank)
    B = (U[:, :rank] * s[:rank]) @ np.linalg.inv(gauge)
    return LowRankUpdate(name=name, A=gauge @ Vt[:rank], B=B, scale=1.0, label=label)
