"""The parts of a run's configuration: base, data, loop. Every field is stated, none is implied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from lora_analysis.errors import InputError
from lora_analysis.patterns import near_names

Objective = Literal[
    "auto", "causal-lm", "masked-lm", "classification", "regression", "image-classification"
]
DataFormat = Literal["auto", "jsonl", "csv", "tsv", "parquet", "text", "e2e", "glue", "datasets"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["float32", "bfloat16", "float16"]

DIGITS = "digits"  # the bundled base and its data
MINILM = "minilm"  # the sentence encoder that an extra installs
DOCSTRINGS = "docstrings"  # text of installed packages
T = TypeVar("T")
_RIVALS = {
    "steps": "epochs",
    "epochs": "steps",
    "warmup_steps": "warmup_ratio",
    "warmup_ratio": "warmup_steps",
}


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """Which frozen model is adapted.

    Parameters
    ----------
    source
        ``"digits"``, the bundled vision transformer; ``"minilm"``, the sentence encoder that the
        extra ``demo-text`` installs; else a local folder or an id on a hub, for transformers.
    revision
        Branch, tag or commit of a hub's repository.
    dtype
        Type in which the frozen weights are held. Factors are float32 whatever it is.
    quantized
        ``"nf4"`` or ``"int8"``: the frozen linear layers as bitsandbytes stores them (QLoRA).
    dropout
        Of the base model itself, over its configuration's own; None leaves that.
    allow_pickle
        Whether weights that a folder holds as a pickle alone (``pytorch_model.bin``) are read,
        their tensors alone.

    Raises
    ------
    InputError
        A value is none of those a field can have.
    """

    source: str = DIGITS
    revision: str | None = None
    dtype: Precision = "float32"
    quantized: Literal["nf4", "int8"] | None = None
    dropout: float | None = None
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        check("base.source", self.source, bool(self.source), "a folder or a name")
        check_choice("base.dtype", self.dtype, Precision)
        if self.quantized is not None:
            check_choice("base.quantized", self.quantized, Literal["nf4", "int8"])
        if self.dropout is not None:
            check("base.dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What is trained on, and what is tested on.

    Parameters
    ----------
    source
        ``"digits"`` or ``"docstrings"``, which are bundled with packages; else a file, or with
        format ``"datasets"`` the id of a data set.
    test
        A second file to test on. None holds ``test_share`` of the rows back, the same rows
        whatever the seeds.
    format
        How the file is read; ``"auto"`` goes by the end of its name.
    text, text_pair, label
        Columns of a classified or measured text, or of plain text for a language model. None
        takes the column of the commonest name that is there.
    prompt, completion
        Columns of a language model's task; the loss is then taken on completions alone.
    image
        Column with the paths of images, beside the file.
    max_length
        Tokens after which an example is cut.
    test_share
        Share of the rows that is held back where there is no file to test on.
    limit
        Rows to read at most; None reads all.

    Raises
    ------
    InputError
        A number is out of its range, or the format is not one.
    """

    source: str = DIGITS
    test: str | None = None
    format: DataFormat = "auto"
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    image: str | None = None
    max_length: int = 128
    test_share: float = 0.1
    limit: int | None = None

    def __post_init__(self) -> None:
        check("data.source", self.source, bool(self.source), "a file or a name")
        check_choice("data.format", self.format, DataFormat)
        check("data.max_length", self.max_length, self.max_length >= 1, "at least 1")
        check("data.test_share", self.test_share, 0 < self.test_share < 1, "between 0 and 1")
        check("data.limit", self.limit, self.limit is None or self.limit >= 2, "at least 2")


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How the loop optimizes; the defaults are the demo's.

    Parameters
    ----------
    steps, epochs
        Optimizer steps; or, where ``epochs`` is given, passes over the data, and ``steps`` says
        nothing.
    batch_size, gradient_accumulation_steps
        Examples in each backward pass, and how many of those make an optimizer step.
    lr
        Peak learning rate of AdamW.
    schedule
        How the rate falls after the warm-up: ``"cosine"``, half of one, to zero; ``"linear"``, to
        zero; ``"constant"``, not at all.
    warmup_steps, warmup_ratio
        Steps, or a share of all steps, in which the rate rises from zero. One of the two.
    weight_decay, beta1, beta2, epsilon
        Of AdamW.
    max_grad_norm
        Largest norm of the gradient over all trained parameters; None does not clip.
    label_smoothing
        Share of the target's probability that is spread over all classes or tokens.
    autocast
        ``"bfloat16"`` or ``"float16"``: matrix products in that type, factors and sums in float32.
    gradient_checkpointing
        Compute activations anew in the backward pass instead of keeping them.
    compile
        Compile the model with torch; pays on GPUs and long runs.
    evaluations
        How often the test split is looked at during training, evenly spaced, the end included.
    patience
        Evaluations without a better test loss after which training stops; None never stops early.
    trajectory
        Steps at which the adapter is saved besides, 0 for the start.
    checkpoint_every
        Steps between two checkpoints from which an interrupted run goes on; None for some twenty
        in a run, 0 for none. It does not shape the result.

    Raises
    ------
    InputError
        A number is out of its range, or two fields exclude each other.
    """

    steps: int = 240
    batch_size: int = 32
    lr: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    beta2: float = 0.999
    max_grad_norm: float | None = 1.0
    evaluations: int = 3
    epochs: float | None = None
    gradient_accumulation_steps: int = 1
    schedule: Schedule = "cosine"
    warmup_ratio: float | None = None
    beta1: float = 0.9
    epsilon: float = 1e-8
    label_smoothing: float = 0.0
    autocast: Literal["bfloat16", "float16"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    patience: int | None = None
    trajectory: tuple[int, ...] = ()
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "trajectory", tuple(sorted(set(self.trajectory))))
        check("steps", self.steps, self.steps >= 1, "at least 1")
        check("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        check("lr", self.lr, 0 < self.lr < math.inf, "a positive number")
        check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        check("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0")
        check("beta1", self.beta1, 0 <= self.beta1 < 1, "in [0, 1)")
        check("beta2", self.beta2, 0 <= self.beta2 < 1, "in [0, 1)")
        check("epsilon", self.epsilon, 0 < self.epsilon < math.inf, "a positive number")
        check(
            "max_grad_norm",
            self.max_grad_norm,
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "positive",
        )
        check("evaluations", self.evaluations, self.evaluations >= 1, "at least 1")
        self._check_more()

    def _check_more(self) -> None:
        epochs, ratio, every = self.epochs, self.warmup_ratio, self.checkpoint_every
        check("epochs", epochs, epochs is None or 0 < epochs < math.inf, "a positive number")
        check(
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            self.gradient_accumulation_steps >= 1,
            "at least 1",
        )
        check_choice("schedule", self.schedule, Schedule)
        check("warmup_ratio", ratio, ratio is None or 0 <= ratio <= 1, "in [0, 1]")
        check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in [0, 1)")
        if self.autocast is not None:
            check_choice("autocast", self.autocast, Literal["bfloat16", "float16"])
        check("patience", self.patience, self.patience is None or self.patience >= 1, "at least 1")
        check("trajectory", self.trajectory, min(self.trajectory, default=0) >= 0, "steps from 0")
        check("checkpoint_every", every, every is None or every >= 0, "at least 0")

    def to_dict(self) -> dict[str, Any]:
        """Return every field, as manifests hold them."""
        return {**asdict(self), "trajectory": list(self.trajectory)}


def from_table(kind: type[T], table: object, place: str) -> T:
    """Return the options that a table of fields gives; the others keep their defaults.

    Parameters
    ----------
    kind
        One of the option classes.
    table
        A mapping of field names to values, as TOML or JSON has it.
    place
        What to call the table in a message: ``"loop"``.

    Raises
    ------
    InputError
        The table is none, holds an unknown key (the nearest names are given), or a value of
        another type than its field, or out of range.
    """
    return kind(**checked_fields(kind, table, place))


def checked_fields(kind: type, table: object, place: str) -> dict[str, Any]:
    """Return the fields of a table by name, lists as tuples, or raise as `from_table` does."""
    if not isinstance(table, Mapping):
        message = f"{place} must be a table of options, found {table!r}."
        raise InputError(message)
    known = {field.name: str(field.type) for field in fields(kind)}
    found = {}
    for key, value in table.items():
        refuse_unknown(key, known, place)
        _check_type(f"{place}.{key}" if place else key, value, known[key])
        found[key] = _plain(value, known[key])
    return found


def _plain(value: Any, annotation: str) -> Any:
    """Return a value as its field has it: 8 and 8.0 must not make two keys of one run."""
    if isinstance(value, list):
        return tuple(value)
    if type(value) is int and "float" in annotation:
        return float(value)
    return value


def laid_over(held: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with later ones over them.

    ``steps`` and ``epochs`` exclude each other, as do ``warmup_steps`` and ``warmup_ratio``: the
    later one replaces the earlier one.
    """
    gone = {_RIVALS[key] for key in later if key in _RIVALS}
    return {key: value for key, value in held.items() if key not in gone} | dict(later)


def refuse_unknown(key: str, known: Mapping[str, object], place: str) -> None:
    """Raise for a key that is none of the known ones, with the nearest of these."""
    if key not in known:
        near = ", ".join(near_names(key, known)) or ", ".join(known)
        where = f" in {place}" if place else ""
        message = f"There is no option '{key}'{where}. Near names: {near}."
        raise InputError(message)


def check(role: str, value: object, holds: bool, wanted: str) -> None:
    """Raise unless a condition holds, naming the field."""
    if not holds:
        message = f"{role} must be {wanted}, found {value!r}."
        raise InputError(message)


def check_choice(role: str, value: object, choices: Any) -> None:
    """Raise unless the value is one of a Literal's."""
    check(role, value, value in get_args(choices), f"one of {', '.join(get_args(choices))}")


def _check_type(role: str, value: object, annotation: str) -> None:
    """Raise for a value that the annotation of its field does not allow: ``"int | None"``."""
    if value is None:
        check(role, value, "None" in annotation, "given")
    elif "Literal" in annotation:  # its words may name a type: "bfloat16" is none
        check(role, value, isinstance(value, str), "a string")
    elif annotation in ("Pattern", "Parts"):
        check(role, value, isinstance(value, Mapping | tuple), "a table of module names")
    elif "tuple" in annotation:
        plain = isinstance(value, str) and annotation.endswith("str")
        check(role, value, plain or isinstance(value, list | tuple), "a list")
    elif "bool" in annotation:
        check(role, value, isinstance(value, bool), "true or false")
    elif "float" in annotation:
        check(role, value, isinstance(value, int | float) and value is not True, "a number")
    elif "int" in annotation:
        check(role, value, isinstance(value, int) and not isinstance(value, bool), "an integer")
    else:
        check(role, value, isinstance(value, str), "a string")
