"""What determines a run, as values: nothing that shapes the result is implicit."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_analysis.errors import InputError

# Part of every key: raised when the same configuration would give other weights.
RUN_VERSION = 1


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How the loop optimises; the defaults are the demo's.

    Parameters
    ----------
    steps, batch_size
        Optimiser steps, and examples in each.
    lr
        Peak learning rate of AdamW, reached after ``warmup`` steps; it then falls to zero along
        half a cosine.
    weight_decay, beta2
        AdamW's decoupled weight decay and second momentum (the first is 0.9).
    clip
        Largest norm of the gradient over all trained parameters.
    data_seed
        Seed of the order of the examples (and of their augmentation), apart from that of the
        weights.
    evaluations
        How often the test split is looked at during training, evenly spaced, the end included.

    Raises
    ------
    InputError
        A number is out of its range.
    """

    steps: int = 240
    batch_size: int = 32
    lr: float = 3e-3
    warmup: int = 20
    weight_decay: float = 0.01
    beta2: float = 0.999
    clip: float = 1.0
    data_seed: int = 0
    evaluations: int = 3

    def __post_init__(self) -> None:
        _check("steps", self.steps, self.steps >= 1, "at least 1")
        _check("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        _check("lr", self.lr, 0 < self.lr < math.inf, "a positive number")
        _check("warmup", self.warmup, self.warmup >= 0, "at least 0")
        _check("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0")
        _check("beta2", self.beta2, 0 <= self.beta2 < 1, "in [0, 1)")
        _check("clip", self.clip, self.clip > 0, "positive")
        _check("data_seed", self.data_seed, 0 <= self.data_seed < 2**63, "from 0 to 2^63 - 1")
        _check("evaluations", self.evaluations, self.evaluations >= 1, "at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Return every field, as manifests hold them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One adapter to train: which task, what LoRA, which seeds, and how the loop optimises.

    Parameters
    ----------
    task
        Name of the task, for example ``"rotate"``.
    rank
        Columns of B in every adapted module.
    seed
        Seed of the initial A, of which each module has its own generator, seeded by (module
        name, rank, seed). The order of the data has a seed of its own, ``loop.data_seed``.
    alpha
        The scale is ``alpha / rank`` (``alpha / sqrt(rank)`` with ``use_rslora``). Kept fixed
        over ranks, as in the LoRA paper; so the scale and the effective step differ with rank.
    targets
        Modules to adapt, by suffix; the query and value projections are the paper's preset.
    loop
        How the loop optimises.

    Raises
    ------
    InputError
        A number is out of its range, or there is no target.
    """

    task: str
    rank: int
    seed: int
    alpha: float = 8.0
    use_rslora: bool = False
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    loop: LoopOptions = field(default_factory=LoopOptions)

    def __post_init__(self) -> None:
        _check("rank", self.rank, self.rank >= 1, "at least 1")
        _check("seed", self.seed, 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        _check("alpha", self.alpha, 0 < self.alpha < math.inf, "a positive number")
        _check("targets", self.targets, len(self.targets) > 0, "at least one module name")

    @property
    def name(self) -> str:
        """Folder name and label, for example ``rotate-r8-s0``; ``-d1`` where the data differ."""
        data = self.loop.data_seed
        return f"{self.task}-r{self.rank}-s{self.seed}" + (f"-d{data}" if data != self.seed else "")

    def to_dict(self) -> dict[str, Any]:
        """Return every field, as the manifest holds them."""
        return {**asdict(self), "targets": list(self.targets)}

    def key(self, base_sha256: str) -> str:
        """Return the hash of all that determines the run: every field, and the base's weights."""
        facts = {"version": RUN_VERSION, "base_sha256": base_sha256, "config": self.to_dict()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check(role: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        message = f"{role} must be {wanted}, found {value!r}."
        raise InputError(message)
