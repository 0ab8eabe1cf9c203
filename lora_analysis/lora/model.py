"""What is done to a model: LoRA layers in, one active or none, merged and unmerged."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, SupportsIndex

import torch
from torch import nn

from lora_analysis.errors import InputError, TargetError
from lora_analysis.lora.experts import ExpertLayer, expert_factors, expert_parameters
from lora_analysis.lora.kinds import QuantisedLoraLayer
from lora_analysis.lora.layers import LoraLayer, TrainedModule, Wrapper
from lora_analysis.lora.parts import Part, rows_of_parts, start_of_parts
from lora_analysis.lora.targets import base_modules, target_modules, trained_modules
from lora_analysis.patterns import ModulePatterns, natural_key, near_names


def add_lora(
    model: nn.Module,
    *,
    rank: SupportsIndex,
    alpha: float,
    targets: str | Iterable[str],
    seed: SupportsIndex,
    use_rslora: bool = False,
    dropout: float = 0.0,
    rank_pattern: Mapping[str, SupportsIndex] = MappingProxyType({}),
    alpha_pattern: Mapping[str, float] = MappingProxyType({}),
    parts: Mapping[str, Sequence[str]] = MappingProxyType({}),
    target_parameters: Iterable[str] = (),
    name: str = "default",
    trainable: str | Iterable[str] = (),
) -> list[str]:
    """Put a new, active adapter into ``model``, in place, and freeze everything else.

    B starts at zero, so the model computes what it did; A from :func:`initial_factor`, which
    depends on the module's name, the rank and the seed alone (of an embedding, A is zero and B
    is drawn). Optimizers take ``p for p in model.parameters() if p.requires_grad``.

    Parameters
    ----------
    rank, alpha
        The update is multiplied by ``alpha / rank``, with ``use_rslora`` by ``alpha / √rank``.
    targets
        As PEFT's ``target_modules``: a list of names or their last segments, each of which must
        name a module; or a string, a regular expression for the whole name.
    seed
        Of the initial factors.
    dropout
        Share of the inputs of each adapted layer that the factors do not see in training mode.
    rank_pattern, alpha_pattern
        Rank or alpha of single modules over ``rank`` and ``alpha``, in PEFT's rule: the first
        pattern that matches a module's name or its last segments.
    parts
        Of fused modules by pattern, which parts to adapt, ``{"c_attn": ["q", "v"]}``, each with
        ``rank`` and a start of its own; a module that no pattern matches is adapted whole. Which
        rows these are, the model's family says.
    target_parameters
        Stacks of experts ``[E, out, in]`` by name or its last segments, as PEFT's field of that
        name: every expert gets factors of its own. The targets may then be empty.
    name
        Of the adapter; a second one under another name leaves the first there, inactive.
    trainable
        Ends of the names of modules to train in full, as PEFT's ``modules_to_save``: a fresh
        classification head. Each adapter trains a copy of its own. A string is one such end.

    Returns
    -------
    list of str
        The adapted modules, in natural order; of experts their module and parameter.

    Raises
    ------
    TargetError
        A target, pattern or ``trainable`` entry names nothing, or a module that cannot be adapted.
    InputError
        ``rank`` is no positive integer, ``seed`` no integer, ``alpha`` no positive number,
        ``dropout`` no share below 1, or the name is taken.
    """
    rank = _integer(rank, "rank must be a positive integer", least=1)
    ranks = {
        key: _integer(r, f"rank of '{key}' must be a positive integer", least=1)
        for key, r in rank_pattern.items()
    }
    seed = _integer(seed, "seed must be an integer")
    for value in (alpha, *alpha_pattern.values()):
        if not (math.isfinite(value) and value > 0):
            message = f"alpha must be a positive number, found {value!r}."
            raise InputError(message)
    if not 0 <= dropout < 1:
        message = f"dropout must be a share below 1, found {dropout!r}."
        raise InputError(message)
    targets = targets if isinstance(targets, str) else list(targets)
    trainable = [trainable] if isinstance(trainable, str) else list(trainable)
    modules = base_modules(model)
    trained = trained_modules(modules, trainable)
    stacks = expert_parameters(modules, target_parameters := list(target_parameters))
    if stacks and dropout:
        message = "The factors of experts know no dropout: their inputs are not seen apart."
        raise InputError(message)
    kinds = target_modules(modules, targets, trained) if targets or not stacks else {}
    names = [*kinds, *(f"{module}.{one}" for module, found in stacks.items() for one in found)]
    _check_patterns((*ranks, *alpha_pattern, *parts), names)
    config = {
        "target_modules": targets,
        "modules_to_save": trainable or None,
        "use_rslora": use_rslora,
        "lora_dropout": dropout,
        **({"target_parameters": target_parameters} if stacks else {}),
    }

    ranks_by_pattern, alphas_by_pattern = ModulePatterns(ranks), ModulePatterns(alpha_pattern)

    def kept(module: str) -> tuple[int, dict[str, Any]]:
        """Return a module's rank and what its factors hold besides."""
        own_rank = ranks_by_pattern.value(module, rank)
        own_alpha = alphas_by_pattern.value(module, alpha)
        scale = own_alpha / (math.sqrt(own_rank) if use_rslora else own_rank)
        held = {"scale": scale, "alpha": own_alpha, "dropout": dropout, "config": config}
        return own_rank, held

    factors: dict[str, nn.Module] = {}
    for module, kind in kinds.items():
        layer = unwrapped(modules[module])
        own_rank, held = kept(module)
        rows = rows_of_parts(model, module, kind, layer, parts)
        if rows is None:
            start = kind.start(layer, module, own_rank, seed)
        else:
            held["parts"] = [Part(part, own, own_rank) for part, own in rows.items()]
            start = start_of_parts(module, kind.shape(layer), held["parts"], seed)
        factors[module] = kind.factors(layer, *start, module, seed=seed, **held)
    for module, found in stacks.items():
        layer = unwrapped(modules[module])
        factors[module] = expert_factors(module, layer, found, seed=seed, kept=kept)
    copies = {module: copy.deepcopy(unwrapped(modules[module])) for module in trained}
    attach(model, name, {**kinds, **dict.fromkeys(stacks, ExpertLayer)}, factors, copies)
    return sorted(names, key=natural_key)


def _check_patterns(patterns: Iterable[str], modules: Iterable[str]) -> None:
    """Raise for a pattern that matches no adapted module: it would be without effect, silently."""
    names = list(modules)
    for pattern in patterns:
        matching = ModulePatterns({pattern: True})
        if not any(matching.value(name, False) for name in names):
            near = ", ".join(near_names(pattern, names)) or "none"
            message = f"No adapted module matches the pattern '{pattern}'. Near names: {near}."
            raise TargetError(message)


def _integer(value: SupportsIndex, wanted: str, *, least: float = -math.inf) -> int:
    """Return the integer, numpy's too, as Python's own; truth values are none."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        message = f"{wanted}, found {value!r}."
        raise InputError(message)
    return number


def attach(
    model: nn.Module,
    name: str,
    kinds: Mapping[str, type[Wrapper]],
    factors: Mapping[str, nn.Module],
    copies: Mapping[str, nn.Module],
) -> None:
    """Put an adapter's factors and trained copies in, active and the only ones to train."""
    modules = base_modules(model)
    both = [module for module in copies if isinstance(modules[module], LoraLayer | ExpertLayer)]
    if both:
        message = f"'{both[0]}' has LoRA factors of another adapter; it cannot be trained in full."
        raise TargetError(message)
    if any(name in wrapper.adapters for _, wrapper in wrappers(model)):
        message = f"The model has an adapter '{name}' already; give the new one another name."
        raise InputError(message)
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        message = f"An adapter cannot be called {name!r}: torch allows no dot and no method's name."
        raise InputError(message)
    model.requires_grad_(False)
    QuantisedLoraLayer.keep_gradients(model)
    for module, part in (*factors.items(), *copies.items()):
        wrapper = modules[module]
        if not isinstance(wrapper, Wrapper):
            wrapper = kinds.get(module, TrainedModule)(wrapper)
            model.set_submodule(module, wrapper)
        wrapper.adapters[name] = part.requires_grad_(True)
    set_active(model, name)


def set_active(model: nn.Module, name: str | None) -> None:
    """Let one adapter act, by name, or with None the base model alone; nothing else changes.

    Trained heads are switched with their adapter. Which parameters take gradients stays: those of
    the adapter added last.

    Raises
    ------
    InputError
        The model has no adapter of this name, or no LoRA layers at all.
    """
    found = list(wrappers(model))
    names = dict.fromkeys(key for _, wrapper in found for key in wrapper.adapters)
    if name not in (None, *names) or not found:
        message = (
            f"The model has no adapter {name!r}; it has {', '.join(map(repr, names)) or 'none'}. "
            "Add one with add_lora, or unmerge the one that is merged."
        )
        raise InputError(message)
    for _, wrapper in found:
        wrapper.active = name if name and name in wrapper.adapters else None


@dataclass(frozen=True, slots=True, eq=False)
class MergeHandle:
    """What :func:`unmerge_lora` puts back, every original W, and the types it was merged in."""

    model: nn.Module
    layers: Mapping[str, Wrapper]
    weights: Mapping[str, Mapping[str, nn.Parameter]]
    dtypes: Mapping[str, torch.dtype]


def merge_lora(model: nn.Module) -> MergeHandle:
    """Add the active adapter to the frozen weights and take the LoRA layers out, in place.

    The model then has the modules, the parameter names and the forward cost of its base. Only
    this call merges: ``eval()`` and ``train()`` change nothing. The original W stay in the handle
    and are what unmerging puts back, bit for bit: until the handle is let go, the adapted weights
    take their memory twice. A weight tied to another is merged on its own, the other stays.

    Raises
    ------
    InputError
        The model has no LoRA layers: none were added, or it is merged already.
    """
    layers = dict(wrappers(model))
    if not layers:
        message = "The model has no LoRA layers: none were added, or they are merged already."
        raise InputError(message)
    lora = {n: one for n, one in layers.items() if isinstance(one, LoraLayer | ExpertLayer)}
    merged = {name: layer.merged_parameters() for name, layer in lora.items()}
    weights = {
        name: _exchange(layer.base_layer, merged[name], merged=True) for name, layer in lora.items()
    }
    for name, wrapper in layers.items():
        model.set_submodule(name, wrapper.bare)
    dtypes = {name: _first(layer.bare).dtype for name, layer in layers.items()}
    return MergeHandle(model, layers, weights, dtypes)


def unmerge_lora(handle: MergeHandle) -> None:
    """Put the LoRA layers and the original weights, the very tensors, back into the model.

    Raises
    ------
    InputError
        The model is unmerged already, its layers were replaced since, or it was converted to
        another type: the tensors put back would not have it.
    """
    model = handle.model
    modules = base_modules(model)
    changed = [name for name, layer in handle.layers.items() if modules.get(name) is not layer.bare]
    if changed:
        message = (
            f"'{changed[0]}' (of {len(changed)} modules) is not the layer that was merged. "
            "Is the model unmerged already, or was an adapter added to the merged one?"
        )
        raise InputError(message)
    for name, layer in handle.layers.items():
        found, merged = (str(t)[6:] for t in (_first(layer.bare).dtype, handle.dtypes[name]))
        if found != merged:
            message = (
                f"'{name}' is {found} now and was merged as {merged}, the type of what unmerging "
                f"puts back. Convert the model to {merged} first (what was rounded in between "
                "stays rounded), or unmerge before converting it."
            )
            raise InputError(message)
    for name, layer in handle.layers.items():
        device = _first(layer.bare).device
        if name in handle.weights:
            _exchange(layer.base_layer, handle.weights[name], merged=False)
        model.set_submodule(name, layer.train(layer.bare.training).to(device))


def _exchange(
    layer: Any, values: Mapping[str, nn.Parameter], *, merged: bool
) -> dict[str, nn.Parameter]:
    """Give the layer other weights, and note whose they are; return the old ones."""
    old = {name: getattr(layer, name) for name in values}
    for name, value in values.items():
        setattr(layer, name, value)
    layer.merged = merged
    return old


def _first(module: nn.Module) -> nn.Parameter:
    """Return a module's first parameter, whose type and device stand for the module's."""
    return next(module.parameters())


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and value of every parameter that takes gradients."""
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers are trained, and how many the base model has without adapters."""
    added = {id(value) for _, layer in wrappers(model) for value in layer.adapters.parameters()}
    base = sum(value.numel() for value in model.parameters() if id(value) not in added)
    return sum(value.numel() for _, value in trainable_parameters(model)), base


def wrappers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """Yield the wrapped modules by their name in the base model."""
    return ((n, layer) for n, layer in base_modules(model).items() if isinstance(layer, Wrapper))


def unwrapped(module: nn.Module) -> Any:
    """Return the base model's own module."""
    return module.base_layer if isinstance(module, Wrapper) else module
