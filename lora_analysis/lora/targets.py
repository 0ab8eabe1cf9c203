"""Which modules of a model are adapted, by the names they have in the base model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from lora_analysis.errors import TargetError
from lora_analysis.lora.core import AdaptedModule, LoraLayer, base_modules
from lora_analysis.lora.layer_kinds import LAYER_KINDS, Conv1DLoraLayer, QuantizedLoraLayer
from lora_analysis.patterns import (
    NO_TYPE,
    matches_target,
    module_type,
    natural_key,
    near_names,
    pattern_budget,
)


def trained_modules(modules: Mapping[str, nn.Module], trainable: Collection[str]) -> list[str]:
    """Return the modules whose names end in an entry of ``trainable``, the outermost ones.

    PEFT's rule for ``modules_to_save``: the end of the name, not of a segment.
    """
    names: list[str] = []
    for entry in trainable:
        matches = [
            name
            for name, module in modules.items()
            if entry and name.endswith(entry) and next(module.parameters(), None) is not None
        ]
        if not matches:
            message = f"No module to train ends in {entry!r}. {_hint(entry, modules)}"
            raise TargetError(message)
        names += matches
    outermost = sorted({name for name in names if not is_inside(name, names)}, key=natural_key)
    for name in outermost:
        if twin := _twin(name, modules):
            message = f"Cannot train '{name}' alone: it is the same module as '{twin}'."
            raise TargetError(message)
    return outermost


def target_modules(
    modules: Mapping[str, nn.Module], targets: str | Sequence[str], trained: Collection[str]
) -> dict[str, type[LoraLayer]]:
    """Return the targeted modules in natural order, each with its kind of LoRA layer.

    Modules trained in full, and modules inside them, are not targets.
    """
    names = [n for n in modules if n and n not in trained and not is_inside(n, trained)]
    if not targets:
        message = f"No targets were given. {_hint('', modules)}"
        raise TargetError(message)
    targeted: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        rule = targets if isinstance(targets, str) else [target]
        with pattern_budget():
            matches = {name for name in names if matches_target(name, rule)}
        if not matches:
            message = f"No module is named by the target {target!r}. {_hint(target, modules)} " + (
                "A string is a regular expression for the whole name; pass a list for endings."
                if isinstance(targets, str)
                else "An entry is a module's name, or its last segments."
            )
            raise TargetError(message)
        targeted |= matches
    return {name: kind_of(name, modules) for name in sorted(targeted, key=natural_key)}


def linear_layers_of_blocks(model: nn.Module, trainable: Collection[str] = ()) -> list[str]:
    """Return every linear layer inside a repeated block, MLP included, in natural order.

    A block is a member of a list of modules, which excludes embeddings and heads. Layers inside
    a module to be ``trainable`` in full are excluded too.

    Raises
    ------
    TargetError
        The model has none.
    """
    modules = base_modules(model)
    trained = trained_modules(modules, trainable)
    names = [
        name
        for name, module in modules.items()
        if _kind(module) in (LoraLayer, Conv1DLoraLayer, QuantizedLoraLayer)
        and any(segment.isdecimal() for segment in name.split("."))
        and name not in trained
        and not is_inside(name, trained)
        and not _obstacle(name, modules)
    ]
    if not names:
        message = f"The model has no linear layer inside of a block. {_hint('', modules)}"
        raise TargetError(message)
    return sorted(names, key=natural_key)


def kind_of(name: str, modules: Mapping[str, nn.Module]) -> type[LoraLayer]:
    """Return the kind of LoRA layer that fits the module; raise TargetError if there is none."""
    if name not in modules:
        message = f"The model has no module '{name}'. {_hint(name, modules)}"
        raise TargetError(message)
    kind = _kind(modules[name])
    reason = _obstacle(name, modules)
    if kind is None or reason:
        message = f"Cannot adapt '{name}': {reason}. {_hint(name, modules)}"
        raise TargetError(message)
    return kind


def is_inside(name: str, owners: Collection[str]) -> bool:
    """Return True if the module is inside one of the owners."""
    return any(name.startswith(f"{owner}.") for owner in owners)


def _obstacle(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the reason why a LoRA layer would not fit, or never be called; None without one."""
    layer, parent = modules[name], modules[name.rpartition(".")[0]]
    if isinstance(layer, nn.MultiheadAttention):
        return (
            "MultiheadAttention keeps q, k and v in one parameter and calls no layer for them; "
            "use an attention with a Linear for each"
        )
    if getattr(layer, "groups", 1) != 1:
        return f"a {type(layer).__name__} in {layer.groups} groups has no matrix to factor"
    if _kind(layer) is None:
        return (
            f"a {type(layer).__name__} is not a Linear, Conv1D, Embedding or convolution with a "
            "plain weight"
        )
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads its weight and never calls it, so LoRA would do nothing"
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "TransformerEncoderLayer's fast path reads its weight and does not call it; turn that "
            "off with torch.backends.mha.set_fastpath_enabled(False)"
        )
    if twin := _twin(name, modules):
        return f"it is the same module as '{twin}', and both names would have to change"
    return None


def _kind(layer: nn.Module) -> type[LoraLayer] | None:
    if isinstance(layer, AdaptedModule):
        return type(layer) if isinstance(layer, LoraLayer) else None
    return next((kind for kind in LAYER_KINDS if kind.accepts(layer)), None)


def _twin(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return another name of the same module."""
    return next((n for n, other in modules.items() if other is modules[name] and n != name), None)


def _hint(target: str, modules: Mapping[str, nn.Module]) -> str:
    """Return a sentence with near names, or without any the endings that can be adapted."""
    near = [name for name in near_names(target, modules) if name != target]
    if near:
        return f"Near names: {', '.join(near)}."
    types = {name: module_type(name) for name in modules if not _obstacle(name, modules)}
    endings = dict.fromkeys(name if kind == NO_TYPE else kind for name, kind in types.items())
    return f"Modules that can be adapted end in: {', '.join(list(endings)[:8]) or 'none found'}."
