"""From a configuration to what a loop trains: a model with LoRA layers, and its task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from lora_analysis.errors import InputError, require_package
from lora_analysis.lora import add_lora, trainable_parameters
from lora_analysis.lora.layer_kinds import QuantizedLoraLayer, linear_layers_of_blocks
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.source_names import existing_path
from lora_analysis.training.config import ALL_LINEAR
from lora_analysis.training.devices import shard_frozen
from lora_analysis.training.inputs import (
    CONFIG_NAME,
    EXTRAS,
    LOCAL,
    MODEL_TYPE,
    base_path,
)
from lora_analysis.training.options import DIGITS, MINILM

if TYPE_CHECKING:
    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.examples import Examples
    from lora_analysis.training.tasks import Task

# Classes of transformers by objective.
_MODEL_CLASSES: Final[Mapping[str, str]] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
# PEFT's task_type by objective.
_TASK_TYPES: Final = {
    "causal-lm": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
}
_DROPOUTS: Final = (
    "attention_dropout", "attention_probs_dropout_prob", "attn_dropout", "attn_pdrop", "dropout",
    "dropout_rate", "embd_pdrop", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop",
)  # fmt: skip
_TOKENIZERS: Final = (
    "tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "spm.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
_HUB_NAME: Final = {MINILM: "sentence-transformers/all-MiniLM-L6-v2"}


@dataclass(frozen=True, slots=True, eq=False)
class RunSetup:
    """Model and task of a run.

    ``fresh`` are modules that the base's files do not contain, for example a classification head;
    ``modules`` the adapted ones. ``fields`` go into the adapter's config, under PEFT's names,
    ``facts`` into the manifest; ``notes`` are sentences for the user. ``save`` writes the whole
    model into a folder and returns the names of the files.
    """

    model: nn.Module
    task: Task
    device: torch.device
    fields: Mapping[str, Any]
    save: Callable[[Path], list[str]]
    fresh: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


def set_up_run(config: RunConfig, device: torch.device, *, sharded: bool = False) -> RunSetup:
    """Return the adapted model of a run, on its device, and its task.

    With ``sharded`` the frozen weights are sharded over the processes of ``torchrun``.

    Raises
    ------
    InputError
        The task, the base or the data do not exist, or do not fit each other; or trained weights
        would be sharded.
    TargetError
        The targets name no module of the base.
    MissingExtraError
        The base or the data need a package that is not installed.
    """
    file = Path(config.base.source) / CONFIG_NAME
    is_digits = config.base.source == DIGITS or (
        file.is_file() and read_json_object(file).get("model_type") == MODEL_TYPE
    )
    setup = _load_digits(config, device) if is_digits else _load_pretrained(config, device)
    model = setup.model
    modules: list[str] = []
    if config.method == "full":
        model.requires_grad_(True)
    else:
        trainable = [*config.trainable, *setup.fresh]
        targets = config.targets if isinstance(config.targets, str) else list(config.targets)
        if targets == ALL_LINEAR:
            targets = linear_layers_of_blocks(model, trainable)
        modules = add_lora(
            model,
            rank=config.rank,
            alpha=config.alpha,
            targets=targets,
            seed=config.seed,
            use_rslora=config.use_rslora,
            dropout=config.dropout,
            rank_pattern={key: int(rank) for key, rank in config.rank_pattern},
            alpha_pattern=dict(config.alpha_pattern),
            parts=dict(config.parts),
            target_parameters=config.target_parameters,
            trainable=trainable,
        )
    if config.loop.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            message = f"{type(model).__name__} cannot recompute its activations (checkpointing)."
            raise InputError(message)
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.loop.compile:
        model.compile()
    if sharded:
        if config.method == "full":
            message = "Only frozen weights can be sharded; method 'full' trains all of them."
            raise InputError(message)
        shard_frozen(model, device)
    elif config.base.quantized is None:
        model.to(device)
    else:  # quantized weights are on the device since they were read
        for _, parameter in trainable_parameters(model):
            parameter.data = parameter.data.to(device)
    return replace(setup, modules=tuple(modules))


def _load_digits(config: RunConfig, device: torch.device) -> RunSetup:
    from lora_analysis.training.demo_data import digits_task
    from lora_analysis.training.digits_vit import read_base, write_weights
    from lora_analysis.training.tasks import ArrayTask

    if config.data.source != DIGITS or config.objective not in ("auto", "image-classification"):
        message = (
            f"The base '{config.base.source}' classifies the digits and takes no other data, found "
            f"data '{config.data.source}' with objective '{config.objective}'. Name a base of "
            "transformers for it."
        )
        raise InputError(message)
    data = digits_task(config.task)
    model = read_base(base_path(config.base))
    return RunSetup(
        model,
        ArrayTask(data),
        device,
        {"base_model_name_or_path": MODEL_TYPE},
        lambda folder: write_weights(model, folder, dtype=torch.float32),
    )


def _load_pretrained(config: RunConfig, device: torch.device) -> RunSetup:
    """Return a model of transformers and the task for it.

    Raises
    ------
    InputError
        The base or the data cannot be used for the objective.
    MissingExtraError
        transformers, or a package for the data, is not installed.
    """
    extra = EXTRAS.get(config.base.source, "train")
    require_package("transformers", extra, f"The base model '{config.base.source}'")
    from lora_analysis.training.examples import read_examples
    from lora_analysis.training.tasks import image_task, text_task

    folder = base_path(config.base)
    examples = read_examples(config)
    with _quiet_transformers():
        task: Task
        if examples.objective == "image-classification":
            task, notes = image_task(examples, folder)
            tokenizer = None
        else:
            tokenizer = _load_tokenizer(folder)
            task, notes = text_task(examples, tokenizer, config.data.max_length)
        model, fresh = _load_model(config, folder, examples, device)
    if tokenizer is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    source = config.base.source
    local = existing_path(source)
    fields = {
        "base_model_name_or_path": _HUB_NAME.get(source)
        or str(local.absolute() if local else source),
        "task_type": _TASK_TYPES.get(examples.objective),
    }

    def save(target: Path) -> list[str]:
        model.save_pretrained(target)
        files = (*target.glob("*config.json"), *target.glob("model*.safetensors*"))
        return sorted(path.name for path in files)

    return RunSetup(
        model,
        task,
        device,
        fields,
        save,
        tuple(fresh),
        {"data": examples.facts()},
        (*examples.notes, *notes),
    )


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # Without these files, some families' tokenizers are empty and give no tokens for any text.
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        message = (
            f"{folder} has no tokenizer. The folder of the base must contain it as saved by "
            "transformers: tokenizer.json, tokenizer_config.json."
        )
        raise InputError(message)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, KeyError) as error:
        message = f"{folder}: its tokenizer cannot be read: {_first_line(error)}"
        raise InputError(message) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        message = f"{folder}: its tokenizer has neither a padding nor an end-of-text token."
        raise InputError(message)
    return tokenizer


def _load_model(
    config: RunConfig, folder: Path, examples: Examples, device: torch.device
) -> tuple[Any, list[str]]:
    """Return the model and the modules missing from its files, initialized with the run's seed."""
    import transformers

    model_class = getattr(transformers, _MODEL_CLASSES[examples.objective])
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.base.dtype),
        "output_loading_info": True,
        "use_safetensors": None if config.base.allow_pickle else True,
        **LOCAL,
    }
    if config.base.quantized is not None:
        require_package("bitsandbytes", "quantized", "A quantized base")
        quantization: dict[str, Any] = {"load_in_8bit": True}
        if config.base.quantized == "nf4":
            quantization = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": getattr(torch, config.base.dtype),
            }
        make_config: Any = transformers.BitsAndBytesConfig
        options |= {"quantization_config": make_config(**quantization), "device_map": {"": device}}
    if "classification" in examples.objective or examples.objective == "regression":
        options["num_labels"] = max(1, len(examples.labels))
        options["ignore_mismatched_sizes"] = True  # a head for another number of classes
    if config.base.dropout is not None:
        fields = transformers.AutoConfig.from_pretrained(folder, **LOCAL).to_dict()
        options |= {name: config.base.dropout for name in _DROPOUTS if name in fields}

    def load() -> tuple[Any, list[str]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model, info = model_class.from_pretrained(folder, **options)
        missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        return model, _find_fresh_modules(model, missing)

    try:
        model, fresh = load()
        parts = (layer for name in fresh for layer in model.get_submodule(name).modules())
        if any(map(QuantizedLoraLayer.accepts, parts)):  # a new module must not be quantized
            plain = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
            options["quantization_config"].llm_int8_skip_modules = [*fresh, *plain]
            model, fresh = load()
    except (OSError, ValueError, KeyError) as error:
        message = f"{folder}: cannot load a model for {examples.objective}: {_first_line(error)}"
        raise InputError(message) from error
    if examples.labels:
        model.config.id2label = dict(enumerate(examples.labels))
        model.config.label2id = {name: index for index, name in enumerate(examples.labels)}
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    return model, fresh


def _find_fresh_modules(model: nn.Module, missing: set[str]) -> list[str]:
    """Return the outermost modules whose parameters are all missing from the base's files."""
    names = [name for name, _ in model.named_parameters()]

    def is_missing(module: str) -> bool:
        return all(name in missing for name in names if name.startswith(f"{module}."))

    modules: set[str] = set()
    for key in sorted(missing & set(names)):
        owner = key.rpartition(".")[0]
        while "." in owner and is_missing(owner.rpartition(".")[0]):
            owner = owner.rpartition(".")[0]
        modules.add(owner)
    return sorted(modules)


def _first_line(error: Exception) -> str:
    if "trust_remote_code" in str(error):  # transformers advises an option that is not offered
        return "it needs its own code (auto_map), and code from a base's folder is never run."
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings about a newly initialized head; the run's notes report it."""
    import transformers

    log: Any = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()
