"""From a model's LoRA layers to an `Adapter` in memory, and from any `Adapter` into a model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.errors import (
    IncompatibleError,
    InputError,
    TargetError,
    UnsupportedMethodError,
)
from lora_analysis.formats.fused_parts import FUSED_PARTS, join_parts
from lora_analysis.lora.experts import (
    ExpertLayer,
    expert_members,
    expert_update,
    loaded_experts,
)
from lora_analysis.lora.layers import (
    Factors,
    LoraLayer,
    Wrapper,
    generator_of,
    initial_factor,
)
from lora_analysis.lora.model import attach, unwrapped, wrappers
from lora_analysis.lora.parts import PartFactors, stated_parts
from lora_analysis.lora.targets import base_modules, inside, kind_of
from lora_analysis.patterns import natural_key, near_names
from lora_analysis.storage.adapter_fields import refuse_more_than_factors

if TYPE_CHECKING:
    from numpy.typing import NDArray


def extract_adapter(
    model: nn.Module,
    *,
    label: str = "adapter",
    config: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Adapter:
    """Return a model's adapter as a value: copies on the CPU, whatever becomes of the model.

    Of a fused module adapted in parts, each part is an update of its own, ``c_attn.q``.

    Parameters
    ----------
    label
        Of the adapter, for tables and messages.
    config
        Fields in the words of PEFT's ``adapter_config.json`` (``task_type``, …), over those that
        are known: targets, modules trained in full, rsLoRA, and the base model where a
        transformers config names it.
    name
        Which adapter; None takes the only one.

    Raises
    ------
    InputError
        The model has no such adapter, or several; or a factor holds non-finite numbers.
    """
    name = name or _only_adapter(model)
    factors: dict[str, Factors] = {}
    updates: dict[str, LowRankUpdate] = {}
    saved: dict[str, NDArray[Any]] = {}
    fused: dict[str, Any] = {}
    for module, layer in wrappers(model):
        if name not in layer.adapters:
            continue
        part = layer.adapters[name]
        if isinstance(layer, ExpertLayer):
            for own, place, expert, held in layer.updates(module, name):
                factors[own] = held
                updates[own] = expert_update(own, place, expert, held, label)
        elif isinstance(layer, LoraLayer):
            factors[module] = part = cast("Factors", part)
            updates |= {one.name: one for one in _updates(module, layer, part, label)}
            if isinstance(part, PartFactors):
                fused[module] = part.stated()
        else:
            saved |= {f"{module}.{key}": _to_numpy(t) for key, t in part.state_dict().items()}
    if not factors:
        message = f"The model has no adapter {name!r}."
        raise InputError(message)
    first = next(iter(factors.values()))
    base = getattr(getattr(model, "config", None), "name_or_path", None)
    fields = {"base_model_name_or_path": base or None} | dict(first.config) | dict(config or {})
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
            seed=first.seed,
        ),
        saved_modules=saved,
        config=fields,
    )


def _updates(
    module: str, layer: LoraLayer, factors: Factors, label: str
) -> Iterator[LowRankUpdate]:
    """Yield the updates that a module's factors are: one, or one for each part."""
    pairs: Iterable[tuple[str, Tensor, Tensor]] = [(module, factors.A, factors.B)]
    if isinstance(factors, PartFactors):
        pairs = ((f"{module}.{part}", A, B) for part, A, B in factors.of_parts())
    for name, A, B in pairs:
        yield LowRankUpdate(
            name,
            _to_numpy(A),
            _to_numpy(B),
            factors.scale,
            alpha=factors.alpha,
            stored_dtype=str(A.dtype).removeprefix("torch."),
            layout=layer.layout,
            kernel=layer.kernel,
            label=label,
        )


def load_adapter_into(
    model: nn.Module, adapter: Adapter, *, name: str = "default", trainable: bool = False
) -> list[str]:
    """Put an adapter into ``model``, in place and active: its factors, scales and trained modules.

    Each module gets its own rank and scale. The model is frozen as a whole; with ``trainable``,
    the adapter takes gradients and its training can go on.

    Returns
    -------
    list of str
        The adapted modules, in natural order; of experts their module and parameter.

    Raises
    ------
    TargetError
        The adapter adapts or trains a module that the model does not have, or not as a layer that
        can be adapted.
    IncompatibleError
        A factor or a trained tensor does not fit the module's shape, or a stack of experts is not
        adapted whole.
    ScaleError
        The scale of a module is not known.
    UnsupportedMethodError
        More than factors and whole modules was trained (biases, single tokens), or an update is
        not ``s·B·A`` on the weight of its module (DoRA, replicated layers).
    InputError
        An update is dense, or the name is taken.
    """
    refuse_more_than_factors(
        adapter.config,
        adapter.label,
        "which is not loaded: the model would not compute what it did. Its factors can be "
        "analyzed all the same.",
    )
    adapter = join_parts(adapter)
    modules = base_modules(model)
    stacks, plain = expert_members(adapter)
    kinds: dict[str, type[Wrapper]] = dict.fromkeys(stacks, ExpertLayer)
    config = dict(adapter.config) or {"target_modules": list(adapter)}
    fused = config.pop(FUSED_PARTS, {})
    seed = adapter.provenance.seed
    factors: dict[str, nn.Module] = {
        module: loaded_experts(module, modules, members, seed=seed, config=config)
        for module, members in stacks.items()
    }
    for module, update in plain.items():
        _refuse_other_updates(update, adapter)
        kinds[module] = kind = kind_of(module, modules)
        factors[module] = kind.factors(
            unwrapped(modules[module]),
            torch.tensor(update.A),
            torch.tensor(update.B),
            f"{module}' of '{adapter.label}",
            scale=update.known_scale(),
            alpha=update.alpha,
            seed=seed,
            dropout=float(config.get("lora_dropout") or 0.0),
            config=config,
            **_parts_of(module, fused),
        )
    attach(model, name, kinds, factors, dict(_trained_copies(modules, adapter)))
    if not trainable:
        model.requires_grad_(False)
    held = {f"{module}.{name}" for module, found in stacks.items() for name in found}
    return sorted(held.union(plain), key=natural_key)


def _parts_of(module: str, fused: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a module's factors are told of its parts; nothing where it is adapted whole."""
    return {"parts": stated_parts(fused[module])} if module in fused else {}


def _refuse_other_updates(update: LowRankUpdate, adapter: Adapter) -> None:
    """Raise for an update that adding ``s·B·A`` to this module's weight would not be."""
    if update.variant:
        reason = f"of {update.variant}, whose update is more than s·B·A; see effective_update"
    elif update.base_name not in ("", update.name):
        reason = f"of the weight '{update.base_name}', not of the module of that name"
    else:
        return
    message = f"'{update.name}' in {adapter.label} is {reason}. It is not loaded."
    raise UnsupportedMethodError(message)


def initial_adapter(adapter: Adapter) -> Adapter:
    """Return what training started from: the same modules with their initial A, and B = 0.

    Of an embedding B is drawn, and A = 0.

    Made anew from (module, rank, seed), the way `add_lora` draws it: for adapters that this
    package trained, or of which ``provenance.seed`` is the seed of such a start. It is what
    `initialization.drift` and a control of φ between initial factors are held against.

    Raises
    ------
    InputError
        The adapter's seed is not known, or it holds a dense update.
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
    if update.layout == "embedding":
        d_out, rank = update.B.shape
        generator = generator_of(module, rank, seed)
        start = torch.empty(d_out, rank).normal_(generator=generator).numpy()
        return replace(update, A=np.zeros_like(update.A), B=start, stored_dtype="float32")
    start = initial_factor(module, update.rank, seed, update.shape[1]).numpy()
    return replace(update, A=start, B=np.zeros_like(update.B), stored_dtype="float32")


def _only_adapter(model: nn.Module) -> str:
    names = list(dict.fromkeys(key for _, layer in wrappers(model) for key in layer.adapters))
    if len(names) == 1:
        return names[0]
    message = (
        f"The model has several adapters; name= takes one of {names}."
        if names
        else "The model has no adapter: none was added, or it is merged. Unmerge it first."
    )
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
    owned: dict[str, dict[str, Tensor]] = {}
    for tensor, value in adapter.saved_modules.items():
        owner = _owner(tensor, modules, entries)
        if owner not in modules or owner in adapter or inside(owner, adapter):
            near = ", ".join(near_names(owner, modules)) or "none"
            message = (
                f"{adapter.label} trained '{tensor}', but the model has no such module beside the "
                f"adapted ones. Near names: {near}."
            )
            raise TargetError(message)
        owned.setdefault(owner, {})[tensor.removeprefix(f"{owner}.")] = torch.tensor(value)
    for owner in sorted(owned, key=natural_key):
        module = copy.deepcopy(unwrapped(modules[owner]))
        _put(module, owned[owner], f"{owner}' of '{adapter.label}")
        yield owner, module


def _owner(tensor: str, modules: Mapping[str, nn.Module], entries: Collection[str]) -> str:
    """Return the outermost module that ``modules_to_save`` names, else the one of the tensor."""
    segments = tensor.split(".")[:-1]
    paths = [".".join(segments[: end + 1]) for end in range(len(segments))]
    named = (path for path in paths if path in modules and path.endswith(tuple(entries)))
    return next(named, ".".join(segments))


def _put(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Copy tensors into a module, all of which it must have in the same shape."""
    own = module.state_dict()
    for key, value in tensors.items():
        found = tuple(own[key].shape) if key in own else "none"
        if found != tuple(value.shape):
            message = (
                f"'{name}' holds '{key}' of shape {tuple(value.shape)}, the model's has {found}. "
                "Was the adapter made for another base, or another number of classes?"
            )
            raise IncompatibleError(message)
    module.load_state_dict(dict(tensors), strict=False)
