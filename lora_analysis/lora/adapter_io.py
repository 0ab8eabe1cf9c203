"""From a model's LoRA layers to an `Adapter` in memory, and from any `Adapter` into a model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.errors import (
    IncompatibleError,
    InputError,
    TargetError,
    UnsupportedMethodError,
)
from lora_analysis.formats import as_adapter
from lora_analysis.formats.fused_parts import FUSED_PARTS, indices_of, join_parts
from lora_analysis.formats.live import MODEL_READERS, ModelReader
from lora_analysis.formats.peft.adapter_config import refuse_more_than_factors
from lora_analysis.lora.composite_weights import (
    ExpertLayer,
    FusedFactors,
    Part,
    stores_transposed,
    target_stacks,
)
from lora_analysis.lora.core import (
    Adapted,
    AdaptedModule,
    LoraFactors,
    LoraLayer,
    TrainedModule,
    adapted_modules,
    add_adapter,
    base_modules,
    factor_dtype,
    unwrap,
)
from lora_analysis.lora.layer_kinds import EmbeddingLoraLayer, is_inside, keep_gradients, kind_of
from lora_analysis.patterns import natural_key, near_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Updates of the experts of one stack, by number.
_Experts = dict[int, LowRankUpdate]
_EXPERT: Final = re.compile(r"(?P<module>.+)\.(?P<parameter>[^.]+)\[(?P<expert>\d+)\]")


def extract_adapter(
    model: nn.Module,
    *,
    label: str = "adapter",
    config: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Adapter:
    """Return a model's adapter as a value: copies on the CPU, independent of the model.

    If a fused module is adapted in parts, each part is an update of its own, ``c_attn.q``. A model
    with PEFT's layers is read as by :func:`as_adapter`.

    Parameters
    ----------
    model
        A model with the layers of `add_lora`, or with those of PEFT.
    label
        Label of the adapter, for tables and messages.
    config
        Fields in the words of PEFT's ``adapter_config.json`` (``task_type``, …), which replace
        those that follow from the model: targets, modules trained in full, rsLoRA, and the base
        model if a transformers config names it.
    name
        Name of the adapter in the model; None takes the only one.

    Raises
    ------
    InputError
        The model has no such adapter, or several; or a factor holds non-finite numbers.
    """
    if not adapted_modules(model):
        adapter = as_adapter(model, adapter_name=name, label=label)
        return adapter.copy_with(config={**adapter.config, **(config or {})})
    name = name or _only_adapter_name(model)
    updates: dict[str, LowRankUpdate] = {}
    saved: dict[str, NDArray[Any]] = {}
    fused: dict[str, Any] = {}
    all_factors: list[LoraFactors] = []
    for module, layer in adapted_modules(model).items():
        if name not in layer.adapters:
            continue
        trained = layer.adapters[name]
        if isinstance(layer, TrainedModule):
            saved |= {f"{module}.{key}": _to_numpy(t) for key, t in trained.state_dict().items()}
            continue
        updates |= {update.name: update for update in _updates(module, layer, name, label)}
        all_factors += (part for part in trained.modules() if isinstance(part, LoraFactors))
        if isinstance(trained, FusedFactors):
            fused[module] = trained.config_entry()
    if not all_factors:
        message = f"The model has no adapter {name!r}."
        raise InputError(message)
    shared = all_factors[0]
    base = getattr(getattr(model, "config", None), "name_or_path", None)
    fields = {"base_model_name_or_path": base or None} | dict(shared.config) | dict(config or {})
    if fused:
        fields[FUSED_PARTS] = fused
    ranks = {update.rank for update in updates.values()}
    return Adapter(
        updates,
        label=label,
        provenance=Provenance(
            format="memory",
            scale_origin=dict.fromkeys(updates, "config"),
            base_model=fields["base_model_name_or_path"],
            rank=ranks.pop() if len(ranks) == 1 else None,
            seed=shared.seed,
        ),
        saved_modules=saved,
        config=fields,
    )


def _read_own(model: nn.Module, name: str | None, label: str | None) -> Adapter:
    """Return the adapter of a model with our layers, the active one by default."""
    if name is None:
        active = {layer.active for layer in adapted_modules(model).values()} - {None}
        name = active.pop() if len(active) == 1 else _only_adapter_name(model)
    base = getattr(getattr(model, "config", None), "name_or_path", None)
    default = (Path(base).name if base else type(model).__name__) if name == "default" else name
    return extract_adapter(model, label=label or str(default), name=name)


MODEL_READERS.append(ModelReader(lambda model: bool(adapted_modules(model)), _read_own))


def _updates(
    module: str, layer: AdaptedModule, adapter: str, label: str
) -> Iterator[LowRankUpdate]:
    """Yield the updates of an adapted module: one, or one for each part or expert."""
    if isinstance(layer, ExpertLayer):
        for name, base_name, expert, factors in layer.factors_of_experts(module, adapter):
            A, B = factors.A[expert], factors.B[expert]
            yield _update(name, A, B, factors, label=label, base_name=base_name)
        return
    factors = cast("LoraFactors", layer.adapters[adapter])
    shape: dict[str, Any] = {}
    if isinstance(layer, LoraLayer):
        shape = {"layout": layer.layout, "kernel": layer.kernel}
    if isinstance(factors, FusedFactors):
        for part, A, B in factors.factors_of_parts():
            yield _update(f"{module}.{part}", A, B, factors, label=label, **shape)
    else:
        yield _update(module, factors.A, factors.B, factors, label=label, **shape)


def _update(name: str, A: Tensor, B: Tensor, factors: LoraFactors, **fields: Any) -> LowRankUpdate:
    return LowRankUpdate(
        name,
        _to_numpy(A),
        _to_numpy(B),
        factors.scale,
        alpha=factors.alpha,
        stored_dtype=str(A.dtype).removeprefix("torch."),
        **fields,
    )


def load_adapter_into(
    model: nn.Module, adapter: Any, *, name: str = "default", trainable: bool = False
) -> list[str]:
    """Put an adapter into ``model``, in place and active: its factors, scales and trained modules.

    The adapter may have any form that :func:`as_adapter` takes.

    Each module gets the rank and scale it has in the adapter. The whole model is frozen; with
    ``trainable``, the adapter takes gradients and its training can continue.

    Returns
    -------
    list of str
        The adapted modules, in natural order; for experts their module and parameter.

    Raises
    ------
    TargetError
        The adapter adapts or trains a module that the model does not have, or not as a layer that
        can be adapted.
    IncompatibleError
        A factor or a trained tensor does not fit the module's shape, or a stack of experts is not
        adapted whole.
    ScaleError
        The scale of a module is unknown.
    UnsupportedMethodError
        More than factors and whole modules was trained (biases, single tokens), or an update is
        not ``s·B·A`` on the weight of its module (DoRA, replicated layers).
    InputError
        An update is dense, or the name is taken.
    """
    adapter = as_adapter(adapter)
    refuse_more_than_factors(
        adapter.config,
        adapter.label,
        "which is not loaded: the model would not compute what it did. Its factors can be "
        "analyzed all the same.",
    )
    adapter = join_parts(adapter)
    modules = base_modules(model)
    stacks, plain = _split_updates(adapter)
    config = dict(adapter.config) or {"target_modules": list(adapter)}
    fused = config.pop(FUSED_PARTS, {})
    seed = adapter.provenance.seed
    adapted: dict[str, Adapted] = {}
    for module, experts in stacks.items():
        stack = _stack_factors(module, modules, experts, seed=seed, config=config)
        adapted[module] = ExpertLayer, stack
    for module, update in plain.items():
        kind = kind_of(module, modules)
        fields: dict[str, Any] = {
            "scale": update.known_scale(),
            "alpha": update.alpha,
            "seed": seed,
            "dropout": float(config.get("lora_dropout") or 0.0),
            "config": config,
        }
        if module in fused:
            rows, ranks = fused[module]["parts"], fused[module]["ranks"]
            parts = [Part(n, torch.tensor(indices_of(runs)), ranks[n]) for n, runs in rows.items()]
            fields |= {"factors_type": FusedFactors, "parts": parts}
        A, B = torch.tensor(update.A), torch.tensor(update.B)
        subject = f"{module}' of '{adapter.label}"
        adapted[module] = (
            kind,
            kind.make_factors(unwrap(modules[module]), A, B, subject, **fields),
        )
    for module, trained in _trained_copies(modules, adapter):
        adapted[module] = TrainedModule, trained
    add_adapter(model, name, adapted)
    keep_gradients(model)
    if not trainable:
        model.requires_grad_(False)
    names = {f"{module}.{parameter}" for module, experts in stacks.items() for parameter in experts}
    return sorted(names.union(plain), key=natural_key)


def _split_updates(
    adapter: Adapter,
) -> tuple[dict[str, dict[str, _Experts]], dict[str, LowRankUpdate]]:
    """Return the updates of experts by module, parameter and number, and all others by name.

    Raises
    ------
    InputError
        An update is dense.
    UnsupportedMethodError
        An update is not ``s·B·A`` on the weight of its module.
    """
    stacks: dict[str, dict[str, _Experts]] = {}
    others: dict[str, LowRankUpdate] = {}
    for name, update in adapter.items():
        if not isinstance(update, LowRankUpdate):
            message = f"'{name}' in {adapter.label} is a dense update, without factors to load."
            raise InputError(message)
        match = _EXPERT.fullmatch(update.base_name)
        if match and not update.variant:
            parameters = stacks.setdefault(match["module"], {})
            parameters.setdefault(match["parameter"], {})[int(match["expert"])] = update
            continue
        if update.variant or update.base_name not in ("", update.name):
            reason = f"of the weight '{update.base_name}', not of the module of that name"
            if update.variant:
                reason = (
                    f"of {update.variant}, whose update is more than s·B·A; see effective_update"
                )
            message = f"'{update.name}' in {adapter.label} is {reason}. It is not loaded."
            raise UnsupportedMethodError(message)
        others[name] = update
    return stacks, others


def _stack_factors(
    module: str,
    modules: Mapping[str, nn.Module],
    stacks: Mapping[str, _Experts],
    *,
    seed: int | None,
    config: Mapping[str, Any],
) -> nn.ModuleDict:
    """Return the factors of a module's stacks, put together from the updates of their experts.

    Raises
    ------
    TargetError
        The model has no such module or parameter, or it is not a stack.
    IncompatibleError
        An expert is missing, does not fit, or differs from the others in rank or scale.
    """
    target_stacks(modules, [f"{module}.{name}" for name in stacks])
    layer = unwrap(modules[module])
    factors = nn.ModuleDict()
    for name in (name for name in layer._parameters if name in stacks):  # in the model's order
        W: Tensor = getattr(layer, name)
        count, *sizes = W.shape
        shape = tuple(reversed(sizes)) if stores_transposed(layer) else tuple(sizes)
        experts = stacks[name]
        kinds = {(update.rank, update.shape, update.known_scale()) for update in experts.values()}
        if set(experts) != set(range(count)) or len(kinds) > 1 or next(iter(kinds))[1] != shape:
            label = next(iter(experts.values())).label
            text = ", ".join(
                f"rank {r}, shape {s}, scale {scale:g}" for r, s, scale in sorted(kinds)
            )
            message = (
                f"The model's '{module}.{name}' has {count} experts of shape (d_out, d_in) = "
                f"{shape}; {label} adapts {len(experts)} up to number {max(experts)}, of {text}. "
                "They are loaded all together, with one rank and scale. Was the adapter made for "
                "another base?"
            )
            raise IncompatibleError(message)
        updates = [experts[expert] for expert in range(count)]
        A, B = (
            torch.stack([torch.tensor(getattr(update, role)) for update in updates]).to(
                W.device, factor_dtype(W)
            )
            for role in "AB"
        )
        factors[name] = LoraFactors(
            A, B, scale=updates[0].known_scale(), alpha=updates[0].alpha, seed=seed, config=config
        )
    return factors


def initial_adapter(adapter: Adapter) -> Adapter:
    """Return the adapter from which training started: the same modules, initial A, and B = 0.

    For an embedding, B is random and A = 0. The factors are computed from (module, rank, seed) as
    `add_lora` does: for adapters that this package trained, or whose ``provenance.seed`` is the
    seed of such an initialization. `shared_init.drift` and a control of φ between initial
    factors compare with it.

    Raises
    ------
    InputError
        The adapter's seed is unknown, or it has a dense update.
    """
    seed = adapter.provenance.seed
    if seed is None:
        message = (
            f"The seed of {adapter.label} is not known, so its initial A cannot be drawn again. "
            "It is known of adapters that this package trained."
        )
        raise InputError(message)
    return Adapter(
        {module: partial(_initial_update, adapter, module, seed) for module in adapter},
        label=f"{adapter.label} (initial)",
        provenance=adapter.provenance,
        config=adapter.config,
    )


def _initial_update(adapter: Adapter, module: str, seed: int) -> LowRankUpdate:
    update = adapter[module]
    if not isinstance(update, LowRankUpdate):
        message = f"'{module}' in {adapter.label} is a dense update, without an initial A."
        raise InputError(message)
    kind = EmbeddingLoraLayer if update.layout == "embedding" else LoraLayer
    A, B = kind.initial_factors(update.shape, module, update.rank, seed)
    return replace(update, A=A.numpy(), B=B.numpy(), stored_dtype="float32")


def _only_adapter_name(model: nn.Module) -> str:
    layers = adapted_modules(model).values()
    names = list(dict.fromkeys(name for layer in layers for name in layer.adapters))
    if len(names) == 1:
        return names[0]
    message = f"The model has several adapters; name= takes one of {names}."
    raise InputError(message)


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    """Return a copy on the CPU; numpy has no bfloat16, and float32 holds all of its values."""
    value = tensor.detach().to("cpu", copy=True)
    wide = value.float() if value.dtype == torch.bfloat16 else value
    return wide.numpy()


def _trained_copies(
    modules: Mapping[str, nn.Module], adapter: Adapter
) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module that was trained in full, as a copy that holds the adapter's tensors."""
    entries = tuple(adapter.config.get("modules_to_save") or ())
    tensors: dict[str, dict[str, Tensor]] = {}
    for tensor, value in adapter.saved_modules.items():
        # The outermost module that ``modules_to_save`` names, else the one of the tensor.
        segments = tensor.split(".")[:-1]
        paths = [".".join(segments[: end + 1]) for end in range(len(segments))]
        named = (path for path in paths if path in modules and path.endswith(tuple(entries)))
        owner = next(named, ".".join(segments))
        if owner not in modules or owner in adapter or is_inside(owner, adapter):
            near = ", ".join(near_names(owner, modules)) or "none"
            message = (
                f"{adapter.label} trained '{tensor}', but the model has no such module apart from "
                f"the adapted ones. Near names: {near}."
            )
            raise TargetError(message)
        tensors.setdefault(owner, {})[tensor.removeprefix(f"{owner}.")] = torch.tensor(value)
    for owner in sorted(tensors, key=natural_key):
        module = copy.deepcopy(unwrap(modules[owner]))
        state = module.state_dict()
        for key, values in tensors[owner].items():
            shape = tuple(state[key].shape) if key in state else "none"
            if shape != tuple(values.shape):
                message = (
                    f"'{owner}' of '{adapter.label}' holds '{key}' of shape "
                    f"{tuple(values.shape)}, the model's has {shape}. Was the adapter made for "
                    "another base, or another number of classes?"
                )
                raise IncompatibleError(message)
        module.load_state_dict(tensors[owner], strict=False)
        yield owner, module
