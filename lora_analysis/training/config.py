"""Configuration of a run: every field that determines its result, its key, and the paper's presets.

The presets are the hyperparameters of the LoRA paper (arXiv 2106.09685 v2, Tables 9 to 12) by name.
All numbers are those of the tables, also where the authors' scripts (microsoft/LoRA, examples/NLU
and examples/NLG) differ: alpha of RoBERTa base (16 in the scripts); rank, alpha and warmup of
DeBERTa (16, 32, in steps); learning rates, batches, lengths or epochs of RoBERTa large on SST-2,
CoLA and STS-B and of DeBERTa on CoLA and RTE. The scripts give what the tables do not: RoBERTa's
weight decay, and no clipping for GPT-2. What neither gives (AdamW's betas) has the loop's
defaults. The batch size is that of the table for any number of processes.

Two parts of the paper's method are left out: dropout of the inputs of DeBERTa's classifier, which
belongs to the base model, and training MRPC, RTE and STS-B (except RoBERTa's runs marked †) from
the adapter of MNLI. Targets are the query and value projections, under the names of each family.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, Final, Literal

from lora_analysis.errors import InputError
from lora_analysis.patterns import near_names
from lora_analysis.training.options import (
    DIGITS,
    BaseOptions,
    DataOptions,
    LoopOptions,
    Objective,
    check,
    check_choice,
    check_key,
    override,
    parse_fields,
    parse_options,
)

# Part of every key: increased when the same configuration would give other weights.
RUN_VERSION = 3

ALL_LINEAR = "all-linear"
# Defaults of the loop for models of transformers.
TRANSFORMERS_LOOP: Mapping[str, Any] = MappingProxyType(
    {"epochs": 3, "batch_size": 16, "lr": 2e-4, "schedule": "linear", "warmup_ratio": 0.06}
)
Pattern = tuple[tuple[str, float], ...]
Parts = tuple[tuple[str, tuple[str, ...]], ...]
_GLUE: Final = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")

# Per task in the order above: batch size, epochs, learning rate, maximum length.
_ROBERTA_BASE: Final = (
    (16, 30, 5e-4, 512), (16, 60, 5e-4, 512), (16, 30, 4e-4, 512), (32, 80, 4e-4, 512),
    (32, 25, 4e-4, 512), (16, 25, 5e-4, 512), (32, 80, 5e-4, 512), (16, 40, 4e-4, 512),
)  # fmt: skip
_ROBERTA_LARGE: Final = (
    (4, 10, 3e-4, 128), (4, 10, 4e-4, 128), (4, 20, 3e-4, 512), (4, 20, 2e-4, 128),
    (4, 10, 2e-4, 512), (4, 20, 3e-4, 512), (8, 20, 4e-4, 512), (8, 30, 2e-4, 512),
)  # fmt: skip
# The same and weight decay.
_DEBERTA_XXL: Final = (
    (8, 5, 1e-4, 256, 0.0), (8, 16, 6e-5, 128, 0.01), (32, 30, 2e-4, 128, 0.01),
    (4, 10, 1e-4, 64, 0.0), (6, 8, 1e-4, 512, 0.01), (8, 11, 1e-4, 320, 0.01),
    (4, 11, 2e-4, 320, 0.01), (4, 10, 2e-4, 128, 0.1),
)  # fmt: skip
_ROBERTA_DECAY: Final = 0.1  # only in the scripts
# Batches of 128 sequences of 384 tokens (WikiSQL) for the table's 250,000 warmup tokens.
_GPT3_WARMUP: Final = 5
# Weight decay, dropout, label smoothing.
_GPT2: Final = {"e2e": (0.01, 0.1, 0.1), "webnlg": (0.01, 0.1, 0.1), "dart": (0.0, 0.0, 0.0)}


@dataclass(frozen=True, slots=True)
class Seeds:
    """Seeds of a run: initial factors (and a new head), order of the data, dropout."""

    init: int
    data: int
    dropout: int


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One adapter to train: base model, data, LoRA, seeds and training loop.

    Parameters
    ----------
    task
        Name of the task. For the digits it selects the variation (``"rotate"``); for a data file
        it is only a label.
    rank
        Rank of every adapted module.
    seed
        Seed of the initial A (each module has its own generator, seeded by module name, rank and
        seed) and of a new classification head.
    alpha
        The scale is ``alpha / rank`` (``alpha / sqrt(rank)`` with ``use_rslora``). The same for
        all ranks, as in the LoRA paper; so the scale and the effective step differ with rank.
    targets
        Modules to adapt, by suffix (the default is the paper's choice: query and value
        projections), or ``"all-linear"``: every linear layer of the blocks; any other string is a
        regular expression for the whole name.
    data_seed, dropout_seed
        Seeds of the order of the examples and of dropout; None takes ``seed``. See ``seeds``.
    method
        ``"lora"``, or ``"full"``: all weights are trained with the same loop.
    dropout
        Dropout probability of the inputs of the LoRA factors.
    rank_pattern, alpha_pattern
        Rank or alpha of single modules by pattern (PEFT's rule) instead of ``rank`` and
        ``alpha``. A mapping, or pairs.
    parts
        Parts of fused modules to adapt, by pattern: ``{"c_attn": ["q", "v"]}``.
    target_parameters
        Expert parameters to adapt in addition, by suffix: ``"experts.down_proj"``.
    trainable
        Modules to train in full, by suffix. A new classification head is always trained.
    objective
        Training objective. ``"auto"``: for the digits their classes; otherwise by the columns of
        the data: classification if there is a label, else a causal language model.
    base, data, loop
        Base model, data, and training loop.

    Raises
    ------
    InputError
        A number is out of range, or there is no target.
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
        has_target = len(self.targets) + len(self.target_parameters) > 0
        check("targets", self.targets, has_target, "at least one module name")
        check("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        check_choice("method", self.method, Literal["lora", "full"])
        check_choice("objective", self.objective, Objective)
        ranks = [rank for _, rank in self.rank_pattern]
        check("rank_pattern", ranks, all(r >= 1 and r == int(r) for r in ranks), "whole numbers")
        alphas = [alpha for _, alpha in self.alpha_pattern]
        check("alpha_pattern", alphas, all(0 < a < math.inf for a in alphas), "positive numbers")

    @property
    def seeds(self) -> Seeds:
        """All three seeds; those that are None follow ``seed``."""
        data, dropout = self.data_seed, self.dropout_seed
        return Seeds(
            self.seed,
            self.seed if data is None else data,
            self.seed if dropout is None else dropout,
        )

    @property
    def name(self) -> str:
        """Folder name and label: ``rotate-r8-s0``; ``-d1`` or ``-p1`` if those seeds differ."""
        seeds = self.seeds
        size = f"r{self.rank}" if self.method == "lora" else "full"
        data = f"-d{seeds.data}" if seeds.data != seeds.init else ""
        dropout = f"-p{seeds.dropout}" if seeds.dropout != seeds.init else ""
        return f"{self.task}-{size}-s{seeds.init}{data}{dropout}"

    def to_dict(self) -> dict[str, Any]:
        """Return every field in the form of JSON and TOML: the three seeds as one table."""
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
        """Return the configuration for a table; missing fields keep their defaults.

        Parameters
        ----------
        table
            In the form of :meth:`to_dict`. ``seed`` is one number for all three or a table of
            ``init``, ``data`` and ``dropout``; ``base``, ``data`` and ``loop`` are tables. By
            default the task is named after the data file, ``rank`` is 8 and ``seed`` 0. For bases
            other than the digits' model, the default targets are all linear layers and the
            defaults of the loop are those of `TRANSFORMERS_LOOP`.

        Raises
        ------
        InputError
            A key is unknown (the message has near names), or a value has the wrong type or is out
            of range.
        """
        given = dict(table)
        if isinstance(given.get("seed"), Mapping):
            seeds = given["seed"]
            for key in seeds:
                check_key(key, [field.name for field in fields(Seeds)], "seed")
            given |= {"seed": seeds.get("init", 0)}
            given |= {"data_seed": seeds.get("data"), "dropout_seed": seeds.get("dropout")}
        base = parse_options(BaseOptions, given.pop("base", {}), "base")
        data = parse_options(DataOptions, given.pop("data", {}), "data")
        options: dict[str, Any] = {"task": PurePath(data.source).stem, "rank": 8, "seed": 0}
        loop = given.pop("loop", {})
        if base.source != DIGITS and isinstance(loop, Mapping):
            options["targets"] = ALL_LINEAR
            loop = override(TRANSFORMERS_LOOP, loop)
        return cls(
            **parse_fields(cls, options | given, ""),
            base=base,
            data=data,
            loop=parse_options(LoopOptions, loop, "loop"),
        )

    def key(self, inputs: Mapping[str, str]) -> str:
        """Return a hash of all that determines the run: fields, version, content of the inputs.

        Parameters
        ----------
        inputs
            Hashes of the files of base and data by role. Their paths are not part of the key, nor
            are the fields that do not change the result (``checkpoint_every``, ``allow_pickle``).
        """
        config = self.to_dict()
        for part, names in (("base", ("source", "allow_pickle")), ("data", ("source", "test"))):
            for name in names:
                del config[part][name]
        del config["loop"]["checkpoint_every"]
        facts = {"version": RUN_VERSION, "inputs": dict(inputs), "config": config}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _pairs(pattern: object) -> tuple[tuple[str, Any], ...]:
    """Return the pairs of a pattern that is a mapping or pairs."""
    pairs: Any = pattern.items() if isinstance(pattern, Mapping) else pattern
    try:
        return tuple((str(key), value) for key, value in pairs)
    except (TypeError, ValueError) as error:
        message = f"A pattern must be a table of module names to numbers, found {pattern!r}."
        raise InputError(message) from error


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        f"{base}-{task}": {
            "rank": 8,
            "alpha": alpha,
            "targets": list(targets),
            "data": {"max_length": length},
            "loop": {
                "batch_size": batch,
                "epochs": epochs,
                "lr": lr,
                "schedule": "linear",
                "warmup_ratio": warmup,
                "weight_decay": decay[0] if decay else _ROBERTA_DECAY,
            },
        }
        for base, alpha, warmup, targets, rows in (
            ("roberta-base", 8, 0.06, ("query", "value"), _ROBERTA_BASE),
            ("roberta-large", 16, 0.06, ("query", "value"), _ROBERTA_LARGE),
            ("deberta-xxl", 8, 0.1, ("query_proj", "value_proj"), _DEBERTA_XXL),
        )
        for task, (batch, epochs, lr, length, *decay) in zip(_GLUE, rows, strict=True)
    }
    | {
        f"gpt2-{task}": {
            "rank": 4,
            "alpha": 32.0,
            "dropout": dropout,
            "targets": ["c_attn"],
            "parts": {"c_attn": ["q", "v"]},
            "loop": {
                "batch_size": 8,
                "epochs": 5,
                "lr": 2e-4,
                "schedule": "linear",
                "warmup_steps": 500,
                "weight_decay": decay,
                "label_smoothing": smoothing,
                "max_grad_norm": None,
            },
        }
        for task, (decay, dropout, smoothing) in _GPT2.items()
    }
    | {
        "gpt3": {
            "targets": ["q_proj", "v_proj"],
            "loop": {
                "batch_size": 128,
                "epochs": 2,
                "lr": 2e-4,
                "schedule": "linear",
                "warmup_steps": _GPT3_WARMUP,
                "weight_decay": 0.1,
            },
        }
    }
)


def get_preset(name: str) -> dict[str, Any]:
    """Return the fields of a preset, for `RunConfig.from_dict`.

    Raises
    ------
    InputError
        There is no such preset.
    """
    if name not in PRESETS:
        near = ", ".join(near_names(name, PRESETS) or PRESETS)
        message = f"There is no preset '{name}'. Near names: {near}."
        raise InputError(message)
    return {key: dict(v) if isinstance(v, Mapping) else v for key, v in PRESETS[name].items()}


def merge_tables(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables merged field by field; later ones override earlier ones."""
    result: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            earlier = result.get(key)
            if isinstance(value, Mapping) and isinstance(earlier, Mapping):
                result[key] = override(earlier, value)
            else:
                result[key] = dict(value) if isinstance(value, Mapping) else value
    return result
