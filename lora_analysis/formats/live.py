"""Adapters and updates from objects in memory: models, layers, state dictionaries, factors.

PEFT's layers are recognized by what they have (``lora_A[name]``, ``scaling[name]``), without
importing PEFT. Their tensors get the names that ``save_pretrained`` writes and go through the
reader of PEFT's files, so that a live adapter and the saved one are the same value. A state
dictionary goes through the formats of files. All numbers are copied: training can go on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate, Provenance
from lora_analysis.errors import InputError, UnknownFormatError
from lora_analysis.formats.load import load_adapter
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME, read_peft_config
from lora_analysis.formats.peft.reader import FORMAT as PEFT
from lora_analysis.formats.peft.tensor_keys import PREFIX
from lora_analysis.formats.registry import formats_for
from lora_analysis.formats.sources import AdapterFiles, AdapterRef
from lora_analysis.linalg import is_array, is_torch_module, to_numpy
from lora_analysis.names import match_names
from lora_analysis.results import ByModule
from lora_analysis.storage.tensors import MemoryTensors
from lora_analysis.text import join_names

if TYPE_CHECKING:
    from lora_analysis.adapter import Update

_ADAPTERS: Final = (
    "an Adapter, a path or hub name, a PeftModel or another torch module with LoRA layers, a state "
    "dictionary (name: array), or a mapping of module names to updates or (A, B, scale)"
)
_UPDATES: Final = (
    "an update, factors (A, B) or (A, B, scale), a matrix ΔW, or a layer with one LoRA adapter"
)
# What PEFT's wrappers of modules trained in full, and of single tokens, have in place of factors.
_IN_FULL: Final = frozenset({"modules_to_save", "token_adapter", "trainable_tokens_delta"})
# Wrappers of a whole model, and the attribute with the model.
_WRAPPERS: Final = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",
}
# Attributes with factors, of layers that do not name theirs.
_ROLES: Final = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
# The name of PEFT for an adapter whose user gave none.
_DEFAULT: Final = "default"


class ModelReader(NamedTuple):
    """How the adapter of a model with layers other than PEFT's is read.

    ``recognizes`` returns True for a model with such layers; ``read`` takes the model, the name of
    an adapter or None, and a label or None.
    """

    recognizes: Callable[[Any], bool]
    read: Callable[[Any, str | None, str | None], Adapter]


# Asked before PEFT's layers are looked for; ``lora`` adds its own.
MODEL_READERS: Final[list[ModelReader]] = []


def as_adapter(
    source: Any, *, adapter_name: str | None = None, label: str | None = None, **read_options: Any
) -> Adapter:
    """Return an adapter for anything that holds one; numbers of live objects are copied.

    Parameters
    ----------
    source
        An `Adapter`, which is returned as it is. A path, a hub name or an `AdapterRef`, as for
        :func:`read_adapter`. A ``PeftModel``, a transformers or diffusers model with
        ``add_adapter``, any other torch module with PEFT's LoRA layers, or a model with the layers
        of :func:`add_lora`: the same adapter as ``save_pretrained`` writes, with the scales that
        the layers apply. A state dictionary of numpy arrays or tensors, in the names of any format
        that is read. A mapping of module names to updates, or to factors ``(A, B)`` or
        ``(A, B, scale)``.
    adapter_name
        Name of the adapter, if the source has several; the active one of a model by default.
    label
        Short name for tables and figures. By default the adapter's name in the model, or the name
        of the model if that is ``"default"``.
    **read_options
        Options of :func:`read_adapter`, such as ``alpha`` or ``scale`` for a state dictionary
        that states none.

    Raises
    ------
    InputError
        The source is nothing that holds an adapter; the model has no such adapter, or it is merged;
        or a tensor does not hold its values in this process (offloaded or sharded). Errors of
        reading are those of :func:`read_adapter`.

    Notes
    -----
    DoRA's update depends on the base weight, in a live model as in a file: the result has the
    low-rank part and the magnitudes, and :func:`effective_adapter` computes the update, by default
    from the model itself.

    Examples
    --------
    >>> as_adapter({"q_proj": (np.eye(2, 4), np.eye(3, 2), 0.5)}, label="mine")
    <Adapter 'mine': 1 modules, memory>
    """
    if isinstance(source, Adapter):
        return source if label is None else source.with_label(label)
    unknown = read_options.keys() - {option.name for option in fields(ReadOptions)}
    if unknown:
        message = (
            f"as_adapter has no option {join_names(sorted(unknown))}. It takes the options of "
            "read_adapter, and adapter_name."
        )
        raise InputError(message)
    options = ReadOptions(label=label, **read_options)
    if isinstance(source, str | os.PathLike | AdapterRef):
        if adapter_name is not None:
            source = f"{source}#{adapter_name}"
        return load_adapter(source, options)
    if is_torch_module(source):
        return _read_model(source, adapter_name, options)
    if isinstance(source, Mapping):
        if source and all(is_array(value) for value in source.values()):
            return _read_state_dict(source, adapter_name, options)
        return _from_updates(source, options)
    message = f"No adapter can be read from a {type(source).__name__}. Accepted: {_ADAPTERS}."
    raise InputError(message)


def as_update(source: Any, *, name: str = "update", adapter_name: str | None = None) -> Update:
    """Return an update for anything that is one; numbers of tensors are copied.

    Parameters
    ----------
    source
        An update, which is returned as it is. Factors ``(A, B)`` or ``(A, B, scale)`` with A
        ``(r, d_in)`` and B ``(d_out, r)``: numpy arrays or tensors of any floating-point type, on
        any device; without a scale it is unknown. A matrix ΔW ``(d_out, d_in)``. A layer with a
        LoRA adapter, of PEFT or of :func:`add_lora`.
    name
        Name of the module, for tables and messages.
    adapter_name
        Name of the adapter of a layer; the active one by default.

    Raises
    ------
    InputError
        The source is none of these.

    Examples
    --------
    >>> as_update((np.eye(2, 4), np.eye(3, 2), 0.5)).shape
    (3, 4)
    """
    if isinstance(source, LowRankUpdate | DenseUpdate):
        return source
    if is_torch_module(source):
        # A layer alone has no name, which readers need.
        model = sys.modules["torch"].nn.ModuleDict({"layer": source})
        adapter = _read_model(model, adapter_name, ReadOptions())
        if len(adapter) > 1:
            message = (
                f"The {type(source).__name__} holds {len(adapter)} updates. Pass one of "
                "as_adapter(model), for example as_adapter(model)[name]."
            )
            raise InputError(message)
        return replace(next(iter(adapter.values())), name=name)
    if (
        isinstance(source, tuple | list)
        and len(source) in (2, 3)
        and all(map(is_array, source[:2]))
    ):
        scale = source[2] if len(source) == 3 else None
        A, B = source[:2]
        return LowRankUpdate(name, A, B, None if scale is None else float(scale))
    if is_array(source) and source.ndim == 2:
        return DenseUpdate(name, source)
    shape = f" of shape {tuple(source.shape)}" if is_array(source) else ""
    message = f"No update can be made of a {type(source).__name__}{shape}. Accepted: {_UPDATES}."
    raise InputError(message)


def read_factors(model: Any, *, adapter_name: str | None = None) -> Adapter:
    """Return the adapter of a live model as `as_adapter` does, without what was trained in full.

    Heads, biases and new tokens, which may be large, are not copied.
    """
    return _read_model(model, adapter_name, ReadOptions(), whole=False)


def is_adapter_like(source: object) -> bool:
    """Return True for what `as_adapter` takes, False for a single update, layer or spectrum."""
    if is_torch_module(source):
        is_added = {"adapters", "base_layer"} <= getattr(source, "_modules", {}).keys()
        return not (is_added or _is_peft_layer(source))  # a layer of `add_lora`, or of PEFT
    return isinstance(source, Adapter | str | os.PathLike | AdapterRef | Mapping)


def map_modules(
    function: Callable[..., Any], *sources: Any, **arguments: Any
) -> ByModule[Any] | None:
    """Return the results of a function for every module of adapters; None for single updates.

    Parameters
    ----------
    function
        Takes one update per source.
    *sources
        One or two adapters, in any form that `as_adapter` takes, or single updates.
    **arguments
        Further arguments of the function.

    Raises
    ------
    InputError
        One source is an adapter and the other one an update, or two adapters have no module in
        common.
    """
    are_adapters = [is_adapter_like(source) for source in sources]
    if not any(are_adapters):
        return None
    if not all(are_adapters):
        message = (
            "An adapter and a single update cannot be compared. Choose a module: adapter[name]."
        )
        raise InputError(message)
    adapters = unique_labels([as_adapter(source) for source in sources])
    first, *others = adapters
    names: dict[str, tuple[str, ...]] = {module: (module,) for module in first}
    for other in others:
        matched = match_names(first, other).pairs
        names = {module: (module, matched[module]) for module in first if module in matched}
        if not names:
            message = (
                f"{first.label} and {other.label} have no module in common: the first has "
                f"'{next(iter(first), '')}', the second '{next(iter(other), '')}'."
            )
            raise InputError(message)
    results = {
        module: function(
            *(adapter[key] for adapter, key in zip(adapters, keys, strict=True)), **arguments
        )
        for module, keys in names.items()
    }
    return ByModule(results, " and ".join(adapter.label for adapter in adapters))


def unique_labels(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters, with a number appended to labels that are already taken."""
    seen: dict[str, int] = {}
    result = []
    for adapter in adapters:
        seen[adapter.label] = count = seen.get(adapter.label, 0) + 1
        result.append(adapter if count == 1 else adapter.with_label(f"{adapter.label} ({count})"))
    return result


def _from_updates(source: Mapping[Any, Any], options: ReadOptions) -> Adapter:
    updates = {}
    for name, value in source.items():
        if not isinstance(name, str):
            message = f"Module names are strings, found {name!r}. Accepted: {_ADAPTERS}."
            raise InputError(message)
        try:
            updates[name] = as_update(value, name=name)
        except InputError as error:
            message = f"'{name}' of the mapping: {error}"
            raise InputError(message) from error
    if not updates:
        message = f"The mapping is empty. Accepted: {_ADAPTERS}."
        raise InputError(message)
    ranks = {update.rank for update in updates.values() if isinstance(update, LowRankUpdate)}
    return Adapter(
        updates,
        label=options.label or "adapter",
        provenance=Provenance(
            scale_origin=dict.fromkeys(updates, "caller"),
            rank=ranks.pop() if len(ranks) == 1 else None,
        ),
    )


def _read_state_dict(
    source: Mapping[str, Any], adapter_name: str | None, options: ReadOptions
) -> Adapter:
    label = options.label or "state dict"
    tensors = MemoryTensors(label, source)
    for format in formats_for(None, options):
        if format.recognizes(tensors, options):
            path = tensors.path
            files = AdapterFiles(path, path, tensors=tensors)
            return format.read(files, adapter_name, _with_label(options, label))
    first = ", ".join(f"'{name}' {value.shape}" for name, value in list(source.items())[:3])
    message = (
        f"No format is recognized by the names of the {len(source)} tensors: {first}. Pass pair= "
        "with the names of A and B, or a mapping of module names to (A, B, scale)."
    )
    raise UnknownFormatError(message)


def _with_label(options: ReadOptions, label: str) -> ReadOptions:
    return ReadOptions(**{**options.non_default(), "label": label})


def _is_peft_layer(module: Any) -> bool:
    """Return True for a layer of PEFT, of any method: it states where its adapters are."""
    roles = getattr(module, "adapter_layer_names", None)
    if isinstance(roles, tuple):
        return not _IN_FULL.issuperset(roles)
    return hasattr(module, "lora_A") and isinstance(getattr(module, "scaling", None), Mapping)


def _read_model(
    model: Any, adapter_name: str | None, options: ReadOptions, *, whole: bool = True
) -> Adapter:
    while wrapped := _WRAPPERS.get(type(model).__name__):
        model = getattr(model, wrapped)
    for reader in MODEL_READERS:
        if reader.recognizes(model):
            return reader.read(model, adapter_name, options.label)
    layers = {name: layer for name, layer in model.named_modules() if _is_peft_layer(layer)}
    owner = next((part for part in model.modules() if _peft_configs(part)), None)
    configs = _peft_configs(owner)
    if options.base is not None and not layers and not configs:
        from lora_analysis.bases import read_fine_tune

        return read_fine_tune(model, options.base, label=options.label)
    name = _choose(model, layers, configs, adapter_name)
    base = _base_of(model if owner is None else owner)
    config_path = Path(type(model).__name__, CONFIG_NAME)
    config = _config_document(configs.get(name), base, layers)
    if not layers:
        read_peft_config(config_path, config)  # other methods, such as prompts, have no layers
        raise _no_layers_error(model)
    tensors = dict(_factors(layers, name, config))
    if whole:
        tensors |= _full_tensors(model, layers, name, config)
    label = options.label or (name if name != _DEFAULT else _name_of(base))
    stored = MemoryTensors(f"{type(model).__name__} {name}", tensors)
    files = AdapterFiles(
        stored.path,
        stored.path,
        config_path,
        config,
        tensors=stored,
        scales=dict(_scales(layers, name)),
    )
    return PEFT.read(files, None, _with_label(options, label))


def _no_layers_error(model: Any) -> InputError:
    kind = type(model).__name__
    if any(name.endswith("lora_A") for name, _ in model.named_parameters()):
        return InputError(
            f"The LoRA layers of the {kind} are not PEFT's (loralib?). Pass model.state_dict() "
            "with alpha= or scale=."
        )
    return InputError(
        f"The {kind} has no adapter: none was added, or it is merged. Unmerge it first, or read "
        "the saved adapter."
    )


def _peft_configs(module: Any) -> Mapping[str, Any]:
    """Return the configurations of a module by adapter name, empty if it has none of PEFT's."""
    configs = getattr(module, "peft_config", None)
    return configs if isinstance(configs, Mapping) else {}


def _choose(
    model: Any, layers: Mapping[str, Any], configs: Mapping[str, Any], name: str | None
) -> str:
    """Return the name of the adapter: the caller's, the only one, or the active one."""
    in_layers = (key for layer in layers.values() for key in getattr(layer, "scaling", None) or ())
    names = list(dict.fromkeys((*configs, *in_layers)))
    if name is not None:
        if name in names:
            return str(name)
        message = f"The {type(model).__name__} has no adapter '{name}'; it has {names}."
        raise InputError(message)
    if len(names) == 1:
        return str(names[0])
    if not names:
        raise _no_layers_error(model)
    active = getattr(next(iter(layers.values()), None), "active_adapters", ())
    if isinstance(active, list) and len(active) == 1:
        return str(active[0])
    message = (
        f"The {type(model).__name__} has the adapters {names}, of which {list(active)} are active. "
        "Pass adapter_name=."
    )
    raise InputError(message)


def _base_of(owner: Any) -> Any:
    """Return the model that was adapted, which a PeftModel wraps twice."""
    get_base_model = getattr(owner, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else owner


def _name_of(base: Any) -> str:
    path = _base_path(base)
    return Path(path).name if path else type(base).__name__


def _base_path(base: Any) -> str | None:
    path = getattr(base, "name_or_path", None)
    path = path or getattr(getattr(base, "config", None), "name_or_path", None)
    return path if isinstance(path, str) and path else None


def _config_document(config: Any, base: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as ``adapter_config.json`` would state it."""
    if config is None:  # bare layers
        transposed = any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values())
        return {"peft_type": "LORA", "fan_in_fan_out": transposed}
    document = dict(config) if isinstance(config, Mapping) else config.to_dict()
    plain: dict[str, Any] = {key: _plain_value(value) for key, value in document.items()}
    if plain.get("base_model_name_or_path") is None:
        plain["base_model_name_or_path"] = _base_path(base)
    return plain


def _plain_value(value: Any) -> Any:
    """Return a value of a configuration as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain_value(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain_value(entry) for entry in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain_value(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _factors(
    layers: Mapping[str, Any], adapter: str, config: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield the factors of one adapter under the names that PEFT saves them with.

    Per role a layer has a parameter, or a module with parameters.

    Raises
    ------
    InputError
        The adapter is merged into the weights of a layer.
    """
    for path, layer in layers.items():
        name = _stored_name(path)
        if adapter in (getattr(layer, "merged_adapters", None) or ()):
            message = (
                f"'{name}': the adapter '{adapter}' is merged into the weight. "
                "Unmerge it first: model.unmerge_adapter()."
            )
            raise InputError(message)
        rows = _remaining_rows(name, adapter, config)
        for role in dict.fromkeys(getattr(layer, "adapter_layer_names", None) or _ROLES):
            container = getattr(layer, role, None)
            if container is None or adapter not in container:
                continue
            value = container[adapter]
            if is_array(value):
                yield f"{name}.{role}", _drop_pruned(value, role, rows)
                continue
            for key, parameter in value.named_parameters():
                # Files have the magnitude itself, which became a module later.
                suffix = "" if role == "lora_magnitude_vector" else f".{key}"
                yield f"{name}.{role}{suffix}", parameter


def _full_tensors(
    model: Any, layers: Mapping[str, Any], adapter: str, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return modules trained in full, new rows of embeddings, and biases."""
    tensors = {}
    for name, module in model.named_modules():
        copies: Any = getattr(module, "modules_to_save", None)
        if is_torch_module(copies) and adapter in copies:
            for key, value in copies[adapter].state_dict().items():
                tensors[f"{_stored_name(name)}.{key}"] = value
        tokens = getattr(getattr(module, "token_adapter", None), "trainable_tokens_delta", None)
        if tokens is not None and adapter in tokens and not module.token_adapter.tied_adapter:
            key = f"{_stored_name(name)}.token_adapter.trainable_tokens_delta"
            tensors[key] = tokens[adapter]
    mode = str(config.get("bias") or "none")
    if mode == "none":
        return tensors
    factors: set[int] = set()
    for layer in layers.values():
        for role in getattr(layer, "adapter_layer_names", ()):
            container: Any = getattr(layer, role, None)
            if is_torch_module(container):
                factors.update(map(id, container.parameters()))
    inside = tuple(f"{name}.base_layer.bias" for name in layers)
    for name, parameter in model.named_parameters():
        is_trained = name.endswith(".bias") if mode == "all" else name in inside
        if is_trained and id(parameter) not in factors and "modules_to_save" not in name:
            tensors[_stored_name(name)] = parameter
    return tensors


def _stored_name(name: str) -> str:
    """Return the name of a module with PEFT's prefix; wrappers around PEFT's model are left out."""
    return PREFIX + name.rpartition(PREFIX)[2]


def _remaining_rows(name: str, adapter: str, config: Mapping[str, Any]) -> Any:
    """Return which rows of a layer AdaLoRA has not pruned, None for all."""
    pattern = config.get("rank_pattern") if config.get("peft_type") == "ADALORA" else None
    for key, rows in pattern.items() if isinstance(pattern, dict) else ():
        plain = key.removesuffix(f".{adapter}").removesuffix(".lora_E").rpartition(PREFIX)[2]
        if plain == name.removeprefix(PREFIX) and isinstance(rows, list):
            return np.asarray(rows, bool)
    return None


def _drop_pruned(value: Any, role: str, rows: Any) -> Any:
    """Return a factor of AdaLoRA without the rows that were pruned; B has them as columns."""
    if rows is None or role not in ("lora_A", "lora_B", "lora_E"):
        return value
    array = to_numpy(value, role)
    return array[:, rows] if role == "lora_B" else array[rows]


def _scales(layers: Mapping[str, Any], adapter: str) -> Iterator[tuple[str, float]]:
    """Yield the scale that each layer applies, by the name of its tensor of A.

    AdaLoRA's is divided by a rank, which its reader knows.
    """
    for name, layer in layers.items():
        scale = (getattr(layer, "scaling", None) or {}).get(adapter)
        if scale is None or "lora_E" in getattr(layer, "adapter_layer_names", ()):
            continue
        for role in ("lora_A.weight", "lora_embedding_A"):
            yield f"{_stored_name(name)}.{role}", float(scale)
