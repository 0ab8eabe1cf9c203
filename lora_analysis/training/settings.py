"""From a configuration to what a loop takes: a model with its LoRA layers, and a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_analysis.errors import InputError
from lora_analysis.lora import add_lora, trainable_parameters
from lora_analysis.lora.targets import linear_layers_of_blocks
from lora_analysis.storage.documents import read_json_object
from lora_analysis.training.config import ALL_LINEAR
from lora_analysis.training.files import CONFIG_NAME, MODEL_TYPE
from lora_analysis.training.inputs import base_place
from lora_analysis.training.options import DIGITS
from lora_analysis.training.parallel import shard_frozen

if TYPE_CHECKING:
    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.tasks import Task


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What a run trains, where, and on what: all that could be missing or wrong.

    ``modules`` are the adapted ones; ``fields`` what the adapter's file says of itself, in PEFT's
    words; ``facts`` what the manifest does; ``notes`` sentences for whoever watches; ``save``
    writes the whole model into a folder and returns the files' names.
    """

    model: nn.Module
    modules: list[str]
    device: torch.device
    task: Task
    fields: Mapping[str, Any]
    save: Callable[[Path], list[str]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A base and a task that fit each other, before anything is adapted.

    ``fresh`` are the modules that the base's files do not hold, a classification head say.
    """

    model: nn.Module
    task: Task
    fields: Mapping[str, Any]
    save: Callable[[Path], list[str]]
    fresh: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def prepare(config: RunConfig, place: torch.device, *, sharded: bool = False) -> Setting:
    """Return a run's model, adapted and in its place, and its task.

    With ``sharded`` the frozen weights are spread over the processes of a `torchrun`.

    Raises
    ------
    InputError
        The task, the base or the data do not exist, or do not fit each other; or weights are to
        be spread that are trained.
    TargetError
        The targets name no module of the base.
    MissingExtraError
        The base or the data need a package that is not installed.
    """
    ready = _digits(config) if _is_digits(config) else _transformers(config, place)
    model = ready.model
    trainable = [*config.trainable, *ready.fresh]
    modules: list[str] = []
    if config.method == "full":
        model.requires_grad_(True)
    else:
        modules = add_lora(
            model,
            rank=config.rank,
            alpha=config.alpha,
            targets=_targets(config, model, trainable),
            seed=config.seed,
            use_rslora=config.use_rslora,
            dropout=config.dropout,
            rank_pattern={key: int(rank) for key, rank in config.rank_pattern},
            alpha_pattern=dict(config.alpha_pattern),
            parts=dict(config.parts),
            target_parameters=config.target_parameters,
            trainable=trainable,
        )
    _use_less_memory(config, model)
    if sharded:
        if config.method == "full":
            message = "Only frozen weights are spread over processes; method 'full' trains them."
            raise InputError(message)
        shard_frozen(model, place)
    elif config.base.quantized is None:
        model.to(place)
    else:  # what is quantized was put in its place when it was read
        for _, parameter in trainable_parameters(model):
            parameter.data = parameter.data.to(place)
    return Setting(
        model,
        modules,
        place,
        ready.task,
        ready.fields,
        ready.save,
        ready.facts,
        ready.notes,
    )


def _targets(config: RunConfig, model: nn.Module, trainable: list[str]) -> str | list[str]:
    """Return the targets as `add_lora` takes them."""
    if config.targets == ALL_LINEAR:
        return linear_layers_of_blocks(model, trainable)
    return config.targets if isinstance(config.targets, str) else list(config.targets)


def _use_less_memory(config: RunConfig, model: nn.Module) -> None:
    """Turn on what the loop's options ask of the model itself."""
    if config.loop.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            message = f"{type(model).__name__} cannot recompute its activations (checkpointing)."
            raise InputError(message)
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.loop.compile:
        model.compile()


def _is_digits(config: RunConfig) -> bool:
    """Say whether the base is one of the package's own vision transformers."""
    source = config.base.source
    if source == DIGITS:
        return True
    stated = Path(source) / CONFIG_NAME
    return stated.is_file() and read_json_object(stated).get("model_type") == MODEL_TYPE


def _digits(config: RunConfig) -> Prepared:
    from lora_analysis.training.base import read_base, write_weights
    from lora_analysis.training.digits import digits_task
    from lora_analysis.training.tasks import ArrayTask

    if config.data.source != DIGITS or config.objective not in ("auto", "image-classification"):
        message = (
            f"The base '{config.base.source}' classifies the digits and takes no other data, found "
            f"data '{config.data.source}' with objective '{config.objective}'. Name a base of "
            "transformers for it."
        )
        raise InputError(message)
    data = digits_task(config.task)
    model = read_base(base_place(config.base))

    def save(folder: Path) -> list[str]:
        return write_weights(model, folder, dtype=torch.float32)

    return Prepared(
        model,
        ArrayTask(data),
        {"base_model_name_or_path": MODEL_TYPE},
        save,
    )


def _transformers(config: RunConfig, device: torch.device) -> Prepared:
    from lora_analysis.training.pretrained import prepare_pretrained

    return prepare_pretrained(config, device)
