"""A pretrained model of transformers and a user's data, made to fit each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from lora_analysis.errors import InputError, MissingExtraError
from lora_analysis.lora.layer_kinds import QuantizedLoraLayer
from lora_analysis.storage.paths import existing_path
from lora_analysis.training.examples import Examples, read_examples
from lora_analysis.training.inputs import LOCAL, base_place
from lora_analysis.training.options import MINILM
from lora_analysis.training.settings import Prepared
from lora_analysis.training.text import text_task

if TYPE_CHECKING:
    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.tasks import Task

_CLASSES: Final[Mapping[str, str]] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
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


def prepare_pretrained(config: RunConfig, device: torch.device) -> Prepared:
    """Return a pretrained model and the task of a run, unadapted.

    Raises
    ------
    InputError
        The base or the data cannot be used for the objective.
    MissingExtraError
        transformers, or what the data need, is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        message = (
            f"The base '{config.base.source}' is a model for transformers, which is not "
            "installed. Run: pip install 'lora-analysis[hf]'"
        )
        raise MissingExtraError(message) from error
    place = base_place(config.base)
    examples = read_examples(config)
    with _quietly(transformers):
        task: Task
        if examples.objective == "image-classification":
            from lora_analysis.training.images import image_task

            task, notes = image_task(examples, place)
            tokenizer = None
        else:
            tokenizer = _tokenizer(place)
            task, notes = text_task(examples, tokenizer, config.data.max_length)
        model, fresh = _model(config, place, examples, device)
    if tokenizer is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    fields = {
        "base_model_name_or_path": _stated_name(config),
        "task_type": _TASK_TYPES.get(examples.objective),
    }
    return Prepared(
        model,
        task,
        fields,
        lambda folder: _save(model, folder),
        tuple(fresh),
        {"data": examples.facts()},
        (*examples.notes, *notes),
    )


def _tokenizer(place: Path) -> Any:
    from transformers import AutoTokenizer

    # Without them, some families' tokenizers are made of nothing and turn every text into none.
    if not any((place / name).is_file() for name in _TOKENIZERS):
        message = (
            f"{place} holds no tokenizer. The base's folder must hold it as transformers saves it: "
            "tokenizer.json, tokenizer_config.json."
        )
        raise InputError(message)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **LOCAL)
    except (OSError, ValueError, KeyError) as error:
        message = f"{place}: its tokenizer cannot be read: {_first_line(error)}"
        raise InputError(message) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        message = f"{place}: its tokenizer has neither a padding token nor one that ends a text."
        raise InputError(message)
    return tokenizer


def _model(
    config: RunConfig, place: Path, examples: Examples, device: torch.device
) -> tuple[Any, list[str]]:
    """Return the model and the modules that its files do not hold, drawn from the run's seed."""
    import transformers

    kind = getattr(transformers, _CLASSES[examples.objective])
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.base.dtype),
        "output_loading_info": True,
        "use_safetensors": None if config.base.allow_pickle else True,
        **LOCAL,
        **_quantization(config, device),
    }
    labels = {"classification": len(examples.labels), "regression": 1}
    labels["image-classification"] = len(examples.labels)
    if examples.objective in labels:
        options["num_labels"] = labels[examples.objective]
        options["ignore_mismatched_sizes"] = True  # a head for another number of classes
    if config.base.dropout is not None:
        stated = transformers.AutoConfig.from_pretrained(place, **LOCAL).to_dict()
        options |= {name: config.base.dropout for name in _DROPOUTS if name in stated}

    def made() -> tuple[Any, list[str]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model, info = kind.from_pretrained(place, **options)
        missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        return model, fresh_modules(model, missing)

    try:
        model, fresh = made()
        parts = (layer for name in fresh for layer in model.get_submodule(name).modules())
        if any(map(QuantizedLoraLayer.accepts, parts)):  # there is nothing yet to quantize
            plain = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
            options["quantization_config"].llm_int8_skip_modules = [*fresh, *plain]
            model, fresh = made()
    except (OSError, ValueError, KeyError) as error:
        message = (
            f"{place}: no model for {examples.objective} can be made of it: {_first_line(error)}"
        )
        raise InputError(message) from error
    if examples.labels:
        model.config.id2label = dict(enumerate(examples.labels))
        model.config.label2id = {name: at for at, name in enumerate(examples.labels)}
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    return model, fresh


def fresh_modules(model: nn.Module, missing: set[str]) -> list[str]:
    """Return the outermost modules of which every parameter is missing from the base's files."""
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for key in sorted(missing & set(names)):
        owner = key.rpartition(".")[0]
        while "." in owner and _all_missing(owner.rpartition(".")[0], names, missing):
            owner = owner.rpartition(".")[0]
        found.add(owner)
    return sorted(found)


def _all_missing(module: str, names: list[str], missing: set[str]) -> bool:
    return all(name in missing for name in names if name.startswith(f"{module}."))


def _quantization(config: RunConfig, device: torch.device) -> dict[str, Any]:
    if config.base.quantized is None:
        return {}
    try:
        import bitsandbytes  # noqa: F401 - to say what is missing
    except ImportError as error:
        message = "A quantized base needs bitsandbytes. Run: pip install 'lora-analysis[quantized]'"
        raise MissingExtraError(message) from error
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    if config.base.quantized == "int8":
        chosen = make(load_in_8bit=True)
    else:
        chosen = make(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, config.base.dtype),
        )
    return {"quantization_config": chosen, "device_map": {"": device}}


def _stated_name(config: RunConfig) -> str:
    """Return what the adapter's file calls its base: a hub's id, or where it lies."""
    source = config.base.source
    if source in _HUB_NAME:
        return _HUB_NAME[source]
    found = existing_path(source)
    return str(found.absolute()) if found else source


def _save(model: Any, folder: Path) -> list[str]:
    model.save_pretrained(folder)
    written = (*folder.glob("*config.json"), *folder.glob("model*.safetensors*"))
    return sorted(path.name for path in written)


def _first_line(error: Exception) -> str:
    if "trust_remote_code" in str(error):  # what transformers advises is not to be had here
        return "it needs code of its own (auto_map), and code from a base's folder is never run."
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Keep off stderr what transformers says of a fresh head: the notes say it."""
    log = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()
