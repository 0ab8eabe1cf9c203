"""What determines a run, as values: nothing that shapes the result is implicit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, Literal

from lora_analysis.errors import InputError
from lora_analysis.training.options import (
    DIGITS,
    BaseOptions,
    DataOptions,
    LoopOptions,
    Objective,
    check,
    check_choice,
    checked_fields,
    from_table,
    laid_over,
    refuse_unknown,
)

# Part of every key: raised when the same configuration would give other weights.
RUN_VERSION = 3

ALL_LINEAR = "all-linear"
# Of the loop where a model of transformers is trained and a table does not say otherwise.
TRANSFORMERS_LOOP: Mapping[str, Any] = MappingProxyType(
    {"epochs": 3, "batch_size": 16, "lr": 2e-4, "schedule": "linear", "warmup_ratio": 0.06}
)
Pattern = tuple[tuple[str, float], ...]
Parts = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Seeds:
    """The three streams of a run: initial factors (and a new head), order of data, dropout."""

    init: int
    data: int
    dropout: int


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One adapter to train: on which base and data, what LoRA, which seeds, and how.

    Parameters
    ----------
    task
        Name of the task. Of the digits it chooses the variation (``"rotate"``); of a file it is
        a label alone.
    rank
        Columns of B in every adapted module.
    seed
        Seed of the initial A, of which each module has its own generator, seeded by (module
        name, rank, seed); and of a fresh head.
    alpha
        The scale is ``alpha / rank`` (``alpha / sqrt(rank)`` with ``use_rslora``). Kept fixed
        over ranks, as in the LoRA paper; so the scale and the effective step differ with rank.
    targets
        Modules to adapt, by suffix (the query and value projections are the paper's preset), or
        ``"all-linear"``: every linear layer of the blocks; any other string is a regular
        expression for the whole name.
    data_seed, dropout_seed
        Seeds of the order of the examples and of dropout; None follows ``seed``. See ``seeds``.
    method
        ``"lora"``, or ``"full"``: all weights are trained with the same loop.
    dropout
        Share of the adapted layers' inputs that the factors do not see at a step.
    rank_pattern, alpha_pattern
        Rank or alpha of modules by pattern, in PEFT's rule, over ``rank`` and ``alpha``. Given as
        a mapping or as pairs.
    parts
        Of fused modules by pattern, the parts to adapt: ``{"c_attn": ["q", "v"]}``.
    target_parameters
        Stacks of experts to adapt besides, by the ends of their names: ``"experts.down_proj"``.
    trainable
        Ends of the names of modules to train in full. A fresh classification head is trained
        without being named.
    objective
        What the model is trained for. ``"auto"``: on the digits their classes; else by the
        columns of the data, a label means classification, and text alone a causal language model.
    base, data, loop
        The frozen model, what is trained on, and how the loop optimizes.

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
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    data_seed: int | None = None
    dropout_seed: int | None = None
    method: Literal["lora", "full"] = "lora"
    dropout: float = 0.0
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()
    parts: Parts = ()
    target_parameters: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    objective: Objective = "auto"
    base: BaseOptions = field(default_factory=BaseOptions)
    data: DataOptions = field(default_factory=DataOptions)
    loop: LoopOptions = field(default_factory=LoopOptions)

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, _pairs(getattr(self, name)))
        parts = tuple((key, tuple(names)) for key, names in _pairs(self.parts))
        object.__setattr__(self, "parts", parts)
        check("task", self.task, bool(self.task), "a name")
        check("rank", self.rank, self.rank >= 1, "at least 1")
        check("seed", self.seed, 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        for role in ("data_seed", "dropout_seed"):
            value = getattr(self, role)
            check(role, value, value is None or 0 <= value < 2**63, "from 0 to 2^63 - 1")
        check("alpha", self.alpha, 0 < self.alpha < math.inf, "a positive number")
        some = len(self.targets) + len(self.target_parameters) > 0
        check("targets", self.targets, some, "at least one module name")
        check("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        check_choice("method", self.method, Literal["lora", "full"])
        check_choice("objective", self.objective, Objective)
        ranks = [rank for _, rank in self.rank_pattern]
        check("rank_pattern", ranks, all(r >= 1 and r == int(r) for r in ranks), "whole numbers")
        alphas = [alpha for _, alpha in self.alpha_pattern]
        check("alpha_pattern", alphas, all(0 < a < math.inf for a in alphas), "positive numbers")

    @property
    def seeds(self) -> Seeds:
        """The seeds of the three streams, those that were not given following ``seed``."""
        data, dropout = self.data_seed, self.dropout_seed
        return Seeds(
            self.seed,
            self.seed if data is None else data,
            self.seed if dropout is None else dropout,
        )

    @property
    def name(self) -> str:
        """Folder name and label: ``rotate-r8-s0``; ``-d1``, ``-p1`` where other seeds differ."""
        seeds = self.seeds
        size = f"r{self.rank}" if self.method == "lora" else "full"
        data = f"-d{seeds.data}" if seeds.data != seeds.init else ""
        dropout = f"-p{seeds.dropout}" if seeds.dropout != seeds.init else ""
        return f"{self.task}-{size}-s{seeds.init}{data}{dropout}"

    def to_dict(self) -> dict[str, Any]:
        """Return every field, as JSON and TOML have them: the three seeds as one table."""
        values = {**asdict(self), "loop": self.loop.to_dict(), "seed": asdict(self.seeds)}
        for name in ("data_seed", "dropout_seed"):
            del values[name]
        for name in ("rank_pattern", "alpha_pattern"):
            values[name] = dict(getattr(self, name))
        values["parts"] = {key: list(names) for key, names in self.parts}
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        lists = {name: list(getattr(self, name)) for name in ("target_parameters", "trainable")}
        return {**values, "targets": targets, **lists}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> RunConfig:
        """Return the run that a table describes; fields that it leaves out keep their defaults.

        Parameters
        ----------
        table
            As :meth:`to_dict` gives it. ``seed`` is one number for all three streams or a table
            of ``init``, ``data`` and ``dropout``; ``base``, ``data`` and ``loop`` are tables. The
            task is named after the data file where it is not given, and ``rank`` is 8, ``seed`` 0.
            On another base than the digits', targets are all linear layers and the loop's defaults
            those of `TRANSFORMERS_LOOP`.

        Raises
        ------
        InputError
            A key is unknown (the nearest names are given), or a value of another type than its
            field, or out of range.
        """
        given = dict(table)
        if isinstance(given.get("seed"), Mapping):
            given |= _seeds(given["seed"])
        base = from_table(BaseOptions, given.pop("base", {}), "base")
        data = from_table(DataOptions, given.pop("data", {}), "data")
        plain: dict[str, Any] = {"task": PurePath(data.source).stem, "rank": 8, "seed": 0}
        options = given.pop("loop", {})
        if base.source != DIGITS and isinstance(options, Mapping):
            plain["targets"] = ALL_LINEAR
            options = laid_over(TRANSFORMERS_LOOP, options)
        loop = from_table(LoopOptions, options, "loop")
        plain |= given
        return cls(**checked_fields(cls, plain, ""), base=base, data=data, loop=loop)

    def key(self, inputs: Mapping[str, str]) -> str:
        """Return the hash of all that determines the run: fields, version, content of the inputs.

        Parameters
        ----------
        inputs
            Hashes of the base's and the data's files by role. Where these lie is not part of the
            key, nor is how often the run saves checkpoints, nor whether pickles are read.
        """
        config = self.to_dict()
        for part, names in (("base", ("source", "allow_pickle")), ("data", ("source", "test"))):
            for name in names:
                del config[part][name]
        del config["loop"]["checkpoint_every"]
        facts = {"version": RUN_VERSION, "inputs": dict(inputs), "config": config}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _pairs(pattern: object) -> tuple[tuple[str, Any], ...]:
    """Return a pattern's pairs, of a mapping or of pairs as they are."""
    pairs: Any = pattern.items() if isinstance(pattern, Mapping) else pattern
    try:
        return tuple((str(key), value) for key, value in pairs)
    except (TypeError, ValueError) as error:
        message = f"A pattern must be a table of module names to numbers, found {pattern!r}."
        raise InputError(message) from error


def _seeds(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the three fields of a table of seeds."""
    for key in table:
        refuse_unknown(key, {one.name: one for one in fields(Seeds)}, "seed")
    streams = {"data_seed": "data", "dropout_seed": "dropout"}
    return {"seed": table.get("init", 0)} | {n: table.get(key) for n, key in streams.items()}
