"""LoRA on stacks of experts: parameters of three axes that no layer of their own calls."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.errors import IncompatibleError, InputError, TargetError
from lora_analysis.lora.layers import Factors, Wrapper, initial_factor
from lora_analysis.patterns import near_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_analysis.adapter import Adapter

# Updates of the experts of one stack, by number.
Members = dict[int, LowRankUpdate]
_MEMBER: Final = re.compile(r"(?P<module>.+)\.(?P<name>[^.]+)\[(?P<expert>\d+)\]")


class ExpertLayer(Wrapper):
    """A module of experts with low-rank adapters: ``W_e + s·B_e·A_e`` for every expert e.

    Of each adapted parameter A is ``(E, r, d_in)`` and B ``(E, d_out, r)``. The module computes
    with the sums in place of its parameters, which are made at every call.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the active adapter's parameters."""
        if self.active is None:
            return self.base_layer(*args, **kwargs)
        changed = {name: self._changed(name) for name in self._factors()}
        return torch.func.functional_call(self.base_layer, changed, args, kwargs)

    @torch.no_grad()
    def merged_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters with the active adapter's updates added; none without one."""
        names = () if self.active is None else self._factors()
        return {name: nn.Parameter(self._changed(name), requires_grad=False) for name in names}

    def _factors(self) -> Mapping[str, Factors]:
        held = cast("nn.ModuleDict", self.adapters[cast("str", self.active)])
        return cast("Mapping[str, Factors]", dict(held.items()))

    def _changed(self, name: str) -> Tensor:
        weight = cast("Tensor", getattr(self.base_layer, name))
        factors = self._factors()[name]
        delta = factors.scale * torch.bmm(factors.B, factors.A)  # (E, d_out, d_in)
        delta = delta.transpose(1, 2) if is_turned(self.base_layer) else delta
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    def updates(self, module: str, adapter: str) -> Iterator[tuple[str, str, int, Factors]]:
        """Yield (name of the update, name in the base, number of the expert, factors)."""
        for name, factors in cast("nn.ModuleDict", self.adapters[adapter]).items():
            for expert in range(len(cast("Factors", factors).A)):
                place = f"{module}.{name}[{expert}]"
                yield f"{module}.{expert}.{name}", place, expert, cast("Factors", factors)


def is_turned(experts: nn.Module) -> bool:
    """Say whether a module stores its experts as ``[E, in, out]``, as gpt-oss does."""
    return bool(getattr(experts, "is_transposed", False))


def expert_parameters(
    modules: Mapping[str, nn.Module], targets: Collection[str]
) -> dict[str, list[str]]:
    """Return the targeted parameters by their module, in the order in which it registers them.

    PEFT's rule for ``target_parameters``: a parameter's full name, or its last segments.

    Raises
    ------
    TargetError
        A target names no parameter, or one that is no stack of matrices.
    """
    held: dict[str, tuple[str, str]] = {}
    for module, layer in modules.items():
        bare = layer.base_layer if isinstance(layer, Wrapper) else layer
        for name in bare._parameters:
            held[f"{module}.{name}" if module else name] = (module, name)
    found: dict[str, list[str]] = {}
    matched: set[str] = set()
    for target in targets:
        named = [full for full in held if full == target or full.endswith(f".{target}")]
        if not named:
            near = ", ".join(near_names(target, held)) or "none"
            message = f"No parameter is named by the target {target!r}. Near names: {near}."
            raise TargetError(message)
        matched |= set(named)
    for full, (module, name) in held.items():
        if full in matched:
            _check_stack(modules[module], full, name)
            found.setdefault(module, []).append(name)
    return found


def _check_stack(layer: nn.Module, full: str, name: str) -> None:
    value = getattr(layer, name)
    if value.ndim != 3 or not value.is_floating_point():
        message = (
            f"Cannot adapt the parameter '{full}': its shape is {tuple(value.shape)}, and a stack "
            "of experts has three axes. A linear layer is named among the targets."
        )
        raise TargetError(message)


def expert_factors(
    module: str,
    layer: nn.Module,
    names: Collection[str],
    *,
    seed: int,
    kept: Callable[[str], tuple[int, dict[str, Any]]],
) -> nn.ModuleDict:
    """Return fresh factors of a module's stacks: per expert an A of its own, and B = 0.

    ``kept`` gives rank and the rest of what :class:`Factors` holds for a parameter's full name.
    """
    found = nn.ModuleDict()
    for name in names:
        weight = cast("Tensor", getattr(layer, name))
        experts, d_out, d_in = weight.shape
        if is_turned(layer):
            d_out, d_in = d_in, d_out
        rank, more = kept(f"{module}.{name}")
        starts = [initial_factor(f"{module}.{e}.{name}", rank, seed, d_in) for e in range(experts)]
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        A = torch.stack(starts).to(weight.device, dtype)
        B = torch.zeros(experts, d_out, rank, device=weight.device, dtype=dtype)
        found[name] = Factors(A, B, seed=seed, **more)
    return found


def expert_update(
    name: str, base_name: str, expert: int, factors: Factors, label: str
) -> LowRankUpdate:
    """Return one expert's update as a value: copies on the CPU."""
    A, B = (getattr(factors, role)[expert].detach().cpu() for role in "AB")
    return LowRankUpdate(
        name,
        A.numpy().copy(),
        B.numpy().copy(),
        factors.scale,
        alpha=factors.alpha,
        stored_dtype=str(factors.A.dtype).removeprefix("torch."),
        label=label,
        base_name=base_name,
    )


def expert_members(
    adapter: Adapter,
) -> tuple[dict[str, dict[str, Members]], dict[str, LowRankUpdate]]:
    """Return the updates of experts by module, parameter and number, and all others by name.

    Raises
    ------
    InputError
        An update is dense.
    """
    stacks: dict[str, dict[str, Members]] = {}
    others: dict[str, LowRankUpdate] = {}
    for name, update in adapter.items():
        if not isinstance(update, LowRankUpdate):
            message = f"'{name}' in {adapter.label} is a dense update, without factors to load."
            raise InputError(message)
        match = _MEMBER.fullmatch(update.base_name)
        if match is None or update.variant:
            others[name] = update
        else:
            found = stacks.setdefault(match["module"], {})
            found.setdefault(match["name"], {})[int(match["expert"])] = update
    return stacks, others


def loaded_experts(
    module: str,
    modules: Mapping[str, nn.Module],
    stacks: Mapping[str, Members],
    *,
    seed: int | None,
    config: Mapping[str, Any],
) -> nn.ModuleDict:
    """Return the factors of a module's stacks, put together from the updates of their experts.

    Raises
    ------
    TargetError
        The model has no such module or parameter, or it is no stack.
    IncompatibleError
        An expert is missing, does not fit, or differs from the others in rank or scale.
    """
    expert_parameters(modules, [f"{module}.{name}" for name in stacks])
    layer: Any = modules[module]
    bare = layer.base_layer if isinstance(layer, Wrapper) else layer
    found = nn.ModuleDict()
    for name in (name for name in bare._parameters if name in stacks):  # in the model's order
        weight: Tensor = getattr(bare, name)
        ordered = _ordered(f"{module}.{name}", weight, stacks[name], turned=is_turned(bare))
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        A, B = (
            torch.stack([torch.tensor(getattr(one, role)) for one in ordered]).to(
                weight.device, dtype
            )
            for role in "AB"
        )
        found[name] = Factors(
            A, B, scale=ordered[0].known_scale(), alpha=ordered[0].alpha, seed=seed, config=config
        )
    return found


def _ordered(full: str, weight: Tensor, members: Members, *, turned: bool) -> list[LowRankUpdate]:
    """Return the updates expert by expert; raise where they are not those of the whole stack."""
    count, *shape = weight.shape
    wanted = tuple(reversed(shape)) if turned else tuple(shape)
    found = {(one.rank, one.shape, one.known_scale()) for one in members.values()}
    if set(members) != set(range(count)) or len(found) > 1 or next(iter(found))[1] != wanted:
        label = next(iter(members.values())).label
        told = ", ".join(f"rank {r}, shape {s}, scale {scale:g}" for r, s, scale in sorted(found))
        message = (
            f"The model's '{full}' has {count} experts of shape (d_out, d_in) = {wanted}; {label} "
            f"adapts {len(members)} up to number {max(members)}, of {told}. They are loaded all "
            "together, with one rank and scale. Was the adapter made for another base?"
        )
        raise IncompatibleError(message)
    return [members[expert] for expert in range(count)]
