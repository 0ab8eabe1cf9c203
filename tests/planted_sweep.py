"""A small sweep whose tasks have output directions of their own, as a fixture of many tests."""

from __future__ import annotations

import numpy as np
import pytest
from factories import orthonormal

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance

NAMES = ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj")


def planted_adapter(
    rng: np.random.Generator,
    *,
    task: str,
    rank: int,
    seed: int,
    output: dict[str, np.ndarray],
    share: dict[str, np.ndarray] | None = None,
) -> Adapter:
    """An adapter whose first output direction is the task's; A is the seed's where shared."""
    label = f"{task}-r{rank}-s{seed}"
    updates = {}
    for name in NAMES:
        A = share[name] if share else rng.standard_normal((rank, 40))
        noise = rng.standard_normal((48, rank)) * 0.02
        B = noise + output[name][:, :1] @ rng.standard_normal((1, rank))
        updates[name] = LowRankUpdate(name=name, A=A, B=B, scale=2.0, label=label)
    return Adapter(updates, label=label, provenance=Provenance(rank=rank, seed=seed, task=task))


@pytest.fixture(scope="session")
def sweep() -> list[Adapter]:
    """Two tasks × two seeds at rank 4 (one seed, one A), and rank 8 on the first task."""
    rng = np.random.default_rng(7)
    directions = {
        task: {name: orthonormal(rng, 48, 1) for name in NAMES} for task in ("turn", "flip")
    }
    start = {seed: {name: rng.standard_normal((4, 40)) for name in NAMES} for seed in (0, 1)}
    cells = [(task, seed) for task in ("turn", "flip") for seed in (0, 1)]
    made = [
        planted_adapter(
            rng, task=task, rank=4, seed=seed, output=directions[task], share=start[seed]
        )
        for task, seed in cells
    ]
    made.append(planted_adapter(rng, task="turn", rank=8, seed=0, output=directions["turn"]))
    return made
