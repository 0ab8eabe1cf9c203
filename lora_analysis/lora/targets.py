"""Which modules of a model are adapted, by the names they have in the base model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from lora_analysis.errors import TargetError
from lora_analysis.lora.kinds import KINDS, QuantisedLoraLayer
from lora_analysis.lora.layers import Conv1DLoraLayer, LoraLayer, Wrapper
from lora_analysis.patterns import (
    NO_TYPE,
    matches_target,
    module_type,
    natural_key,
    near_names,
    pattern_budget,
)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by its name in the base model, the model itself as ``""``.

    A wrapper stands for what it wraps, and is not entered.
    """

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for leaf, child in module._modules.items():
            if child is not None:
                yield prefix + leaf, child
                if not isinstance(child, Wrapper):
                    yield from walk(child, f"{prefix}{leaf}.")

    return {"": model, **dict(walk(model, ""))}


def trained_modules(modules: Mapping[str, nn.Module], trainable: Collection[str]) -> list[str]:
    """Return the modules whose names end in an entry of ``trainable``, the outermost ones.

    PEFT's rule for ``modules_to_save``: the end of the name, not of a segment.
    """
    found: list[str] = []
    for entry in trainable:
        matched = [
            n for n in modules if entry and n.endswith(entry) and _has_parameters(modules[n])
        ]
        if not matched:
            message = f"No module to train ends in {entry!r}. {_near(entry, modules)}"
            raise TargetError(message)
        found += matched
    outermost = sorted({name for name in found if not inside(name, found)}, key=natural_key)
    for name in outermost:
        if twin := _twin(name, modules):
            message = f"Cannot train '{name}' alone: it is the same module as '{twin}'."
            raise TargetError(message)
    return outermost


def target_modules(
    modules: Mapping[str, nn.Module], targets: str | Sequence[str], trained: Collection[str]
) -> dict[str, type[LoraLayer]]:
    """Return the targeted modules in natural order, each with its kind of LoRA layer.

    Modules trained in full, and those inside of one, are no targets.
    """
    names = [n for n in modules if n and n not in trained and not inside(n, trained)]
    if not targets:
        message = f"No targets were given. {_near('', modules)}"
        raise TargetError(message)
    matched: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        rule = targets if isinstance(targets, str) else [target]
        with pattern_budget():
            found = {name for name in names if matches_target(name, rule)}
        if not found:
            message = f"No module is named by the target {target!r}. {_near(target, modules)} " + (
                "A string is a regular expression for the whole name; pass a list for endings."
                if isinstance(targets, str)
                else "An entry is a module's name, or its last segments."
            )
            raise TargetError(message)
        matched |= found
    return {name: kind_of(name, modules) for name in sorted(matched, key=natural_key)}


def linear_layers_of_blocks(model: nn.Module, trainable: Collection[str] = ()) -> list[str]:
    """Return every linear layer inside of a repeated block, MLP included, in natural order.

    A block is a member of a list of modules, so that embeddings and heads are outside. Those
    inside of a module to be ``trainable`` in full are left out.

    Raises
    ------
    TargetError
        The model has none.
    """
    modules = base_modules(model)
    trained = trained_modules(modules, trainable)
    found = [
        name
        for name, module in modules.items()
        if _kind(module) in (LoraLayer, Conv1DLoraLayer, QuantisedLoraLayer)
        and any(part.isdecimal() for part in name.split("."))
        and name not in trained
        and not inside(name, trained)
        and not _obstacle(name, modules)
    ]
    if not found:
        message = f"The model has no linear layer inside of a block. {_near('', modules)}"
        raise TargetError(message)
    return sorted(found, key=natural_key)


def kind_of(name: str, modules: Mapping[str, nn.Module]) -> type[LoraLayer]:
    """Return the kind of LoRA layer that fits the module; raise TargetError if none can."""
    if name not in modules:
        message = f"The model has no module '{name}'. {_near(name, modules)}"
        raise TargetError(message)
    kind = _kind(modules[name])
    reason = _obstacle(name, modules)
    if kind is None or reason:
        message = f"Cannot adapt '{name}': {reason}. {_near(name, modules)}"
        raise TargetError(message)
    return kind


def inside(name: str, owners: Collection[str]) -> bool:
    """Return whether the name lies below one of the owners."""
    return any(name.startswith(f"{owner}.") for owner in owners)


def _obstacle(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Say why a LoRA layer in this place cannot be, or would not be called."""
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
            f"a {type(layer).__name__} is no Linear, Conv1D, Embedding or convolution with a "
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
    if isinstance(layer, Wrapper):
        return type(layer) if isinstance(layer, LoraLayer) else None
    return next((kind for kind in KINDS if kind.accepts(layer)), None)


def _twin(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return another name of the same module."""
    return next((n for n, other in modules.items() if other is modules[name] and n != name), None)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _near(wanted: str, modules: Mapping[str, nn.Module]) -> str:
    """List near names, or where nothing is near the endings that can be adapted."""
    near = [name for name in near_names(wanted, modules) if name != wanted]
    if near:
        return f"Near names: {', '.join(near)}."
    found = {name: module_type(name) for name in modules if not _obstacle(name, modules)}
    endings = dict.fromkeys(name if kind == NO_TYPE else kind for name, kind in found.items())
    return f"Modules that can be adapted end in: {', '.join(list(endings)[:8]) or 'none found'}."
