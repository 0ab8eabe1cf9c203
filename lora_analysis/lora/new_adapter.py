"""A new adapter for a model: settings checked, modules matched, factors initialized."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from lora_analysis.bases.fused import ModelLayout, rows_of_part
from lora_analysis.errors import InputError, TargetError
from lora_analysis.lora.composite_weights import (
    ExpertLayer,
    FusedFactors,
    Part,
    stores_transposed,
    target_stacks,
)
from lora_analysis.lora.core import (
    Adapted,
    LoraFactors,
    LoraLayer,
    TrainedModule,
    add_adapter,
    base_modules,
    factor_dtype,
    initial_factor,
    unwrap,
)
from lora_analysis.lora.layer_kinds import keep_gradients, target_modules, trained_modules
from lora_analysis.patterns import ModulePatterns, natural_key, near_names, pattern_value


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

    B starts at zero, so the model's output does not change; A is that of :func:`initial_factor`,
    which depends on the module's name, the rank and the seed alone (for an embedding, A is zero
    and B is drawn). Optimizers take ``p for p in model.parameters() if p.requires_grad``.

    Parameters
    ----------
    rank, alpha
        The update is scaled by ``alpha / rank``, with ``use_rslora`` by ``alpha / √rank``.
    targets
        As PEFT's ``target_modules``: a list of names or their last segments, each of which must
        name a module; or a string, a regular expression for the whole name.
    seed
        Seed for the initial factors.
    dropout
        Probability with which an input of an adapted layer is hidden from the factors in training
        mode.
    rank_pattern, alpha_pattern
        Rank or alpha of single modules instead of ``rank`` and ``alpha``, by PEFT's rule: the
        first pattern that matches a module's name or its last segments.
    parts
        Parts of fused modules to adapt, by pattern, ``{"c_attn": ["q", "v"]}``. Each part has
        ``rank`` and initial factors of its own; a module that no pattern matches is adapted whole.
        The rows of a part follow from the model's family.
    target_parameters
        Stacks of experts ``[E, out, in]`` by name or its last segments, as PEFT's field of that
        name: every expert gets its own factors. The targets may then be empty.
    name
        Name of the adapter; a second adapter with another name leaves the first in the model,
        inactive.
    trainable
        Ends of the names of modules to train in full, as PEFT's ``modules_to_save``: a new
        classification head. Each adapter trains its own copy. A string is one such end.

    Returns
    -------
    list of str
        The adapted modules, in natural order; for experts their module and parameter.

    Raises
    ------
    TargetError
        A target, pattern or ``trainable`` entry names nothing, or a module that cannot be adapted.
    InputError
        ``rank`` is not a positive integer, ``seed`` not an integer, ``alpha`` not a positive
        number, ``dropout`` not in [0, 1), or the name is taken.
    """
    rank = _integer(rank, "rank must be a positive integer", least=1)
    ranks = {
        key: _integer(value, f"rank of '{key}' must be a positive integer", least=1)
        for key, value in rank_pattern.items()
    }
    seed = _integer(seed, "seed must be an integer")
    for value in (alpha, *alpha_pattern.values()):
        if not (math.isfinite(value) and value > 0):
            message = f"alpha must be a positive number, found {value!r}."
            raise InputError(message)
    if not 0 <= dropout < 1:
        message = f"dropout must be at least 0 and below 1, found {dropout!r}."
        raise InputError(message)
    targets = targets if isinstance(targets, str) else list(targets)
    trainable = [trainable] if isinstance(trainable, str) else list(trainable)
    target_parameters = list(target_parameters)

    modules = base_modules(model)
    trained = trained_modules(modules, trainable)
    stacks = target_stacks(modules, target_parameters)
    if stacks and dropout:
        message = (
            "Dropout is not supported for expert parameters: their inputs are not accessible "
            "separately."
        )
        raise InputError(message)
    kinds = target_modules(modules, targets, trained) if targets or not stacks else {}
    names = [*kinds, *(f"{module}.{key}" for module, keys in stacks.items() for key in keys)]
    _check_patterns((*ranks, *alpha_pattern, *parts), names)

    config = {
        "target_modules": targets,
        "modules_to_save": trainable or None,
        "use_rslora": use_rslora,
        "lora_dropout": dropout,
        **({"target_parameters": target_parameters} if stacks else {}),
    }
    rank_rules, alpha_rules = ModulePatterns(ranks), ModulePatterns(alpha_pattern)

    def settings(module: str) -> tuple[int, dict[str, Any]]:
        """Return a module's rank and the other fields of its factors."""
        r, alpha_of_module = rank_rules.value(module, rank), alpha_rules.value(module, alpha)
        s = alpha_of_module / (math.sqrt(r) if use_rslora else r)
        return r, {"scale": s, "alpha": alpha_of_module, "dropout": dropout, "config": config}

    adapted = _initial_layers(model, modules, kinds, stacks, parts, seed=seed, settings=settings)
    for module in trained:
        adapted[module] = TrainedModule, copy.deepcopy(unwrap(modules[module]))
    add_adapter(model, name, adapted)
    keep_gradients(model)
    return sorted(names, key=natural_key)


def _initial_layers(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    kinds: Mapping[str, type[LoraLayer]],
    stacks: Mapping[str, Sequence[str]],
    parts: Mapping[str, Sequence[str]],
    *,
    seed: int,
    settings: Callable[[str], tuple[int, dict[str, Any]]],
) -> dict[str, Adapted]:
    """Return the initial factors of layers, whole or in parts, and of stacks of experts.

    Raises
    ------
    TargetError
        A module has no such part, or the layout of its rows is unknown for the model's family.
    """
    config: Any = getattr(model, "config", None)
    config_fields: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    layout = ModelLayout(getattr(config, "model_type", None), config_fields)
    adapted: dict[str, Adapted] = {}
    for module, kind in kinds.items():
        layer = unwrap(modules[module])
        d_out, d_in = shape = kind.shape(layer)
        r, fields = settings(module)
        fused = []
        for part in pattern_value(module, parts, ()):
            runs = rows_of_part(module, part, shape, None, layout)
            if part in ("gate", "up") and "gate" not in module.rpartition(".")[2]:
                runs = f"its rows are q, k and v, not {part}"
            if isinstance(runs, str):
                message = f"Cannot adapt the part '{part}' of '{module}': {runs}."
                raise TargetError(message)
            rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
            fused.append(Part(part, rows, r))
        if fused:  # each part has an A of its own, by its name
            starts = [initial_factor(f"{module}.{part.name}", r, seed, d_in) for part in fused]
            A, B = torch.cat(starts), torch.zeros(d_out, r * len(fused))
            fields |= {"factors_type": FusedFactors, "parts": fused}
        else:
            A, B = kind.initial_factors(shape, module, r, seed)
        adapted[module] = kind, kind.make_factors(layer, A, B, module, seed=seed, **fields)
    for module, names in stacks.items():
        layer, factors = unwrap(modules[module]), nn.ModuleDict()
        for name in names:
            W: Tensor = getattr(layer, name)
            experts, *sizes = W.shape
            d_out, d_in = reversed(sizes) if stores_transposed(layer) else sizes
            r, fields = settings(f"{module}.{name}")
            starts = [initial_factor(f"{module}.{e}.{name}", r, seed, d_in) for e in range(experts)]
            A = torch.stack(starts).to(W.device, factor_dtype(W))
            B = torch.zeros(experts, d_out, r, device=W.device, dtype=factor_dtype(W))
            factors[name] = LoraFactors(A, B, seed=seed, **fields)
        adapted[module] = ExpertLayer, factors
    return adapted


def _check_patterns(patterns: Iterable[str], modules: Sequence[str]) -> None:
    """Raise if a pattern matches no adapted module: it would have no effect, silently."""
    for pattern in patterns:
        rule = ModulePatterns({pattern: True})
        if not any(rule.value(name, False) for name in modules):
            near = ", ".join(near_names(pattern, modules)) or "none"
            message = f"No adapted module matches the pattern '{pattern}'. Near names: {near}."
            raise TargetError(message)


def _integer(value: SupportsIndex, requirement: str, *, least: float = -math.inf) -> int:
    """Return an integer, also numpy's, as a Python int; booleans are refused."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        message = f"{requirement}, found {value!r}."
        raise InputError(message)
    return number
