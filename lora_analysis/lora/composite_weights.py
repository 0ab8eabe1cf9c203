"""LoRA on parts of a weight: the experts of a stack, or q and v of a fused projection.

A stack of experts is a parameter with three axes that belongs to no layer of its own; every expert
has its own factors. A fused projection is a joint weight of several parts, some of which are
adapted: q and v, and not k. As in loralib's ``MergedLinear``, each part has its own factors, and
the rows of other parts do not change. The model computes with them as one update of the whole
weight: A has those of the parts below each other, and B has a block of columns per part, zero
outside the part's rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_analysis.errors import TargetError
from lora_analysis.formats.fused_parts import runs_of
from lora_analysis.lora.core import AdaptedModule, LoraFactors, unwrap
from lora_analysis.patterns import near_names


class ExpertLayer(AdaptedModule):
    """A module of experts with low-rank adapters: ``W_e + s·B_e·A_e`` for every expert e.

    For each adapted parameter A is ``(E, r, d_in)`` and B ``(E, d_out, r)``. The module computes
    with these sums, formed at every call, in place of its parameters.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the active adapter's parameters."""
        if self.active is None:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, self._adapted_parameters(), args, kwargs)

    @torch.no_grad()
    def merged_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters with the active adapter's updates added; none without one."""
        if self.active is None:
            return {}
        return {
            name: nn.Parameter(value, requires_grad=False)
            for name, value in self._adapted_parameters().items()
        }

    def _adapted_parameters(self) -> dict[str, Tensor]:
        """Return the adapted parameters with the active adapter's updates added."""
        values = {}
        for name, factors in self._factors(cast("str", self.active)):
            W = cast("Tensor", getattr(self.base_layer, name))
            delta = factors.scale * torch.bmm(factors.B, factors.A)  # (E, d_out, d_in)
            delta = delta.transpose(1, 2) if stores_transposed(self.base_layer) else delta
            values[name] = (W.to(delta.dtype) + delta).to(W.dtype)
        return values

    def _factors(self, adapter: str) -> Iterator[tuple[str, LoraFactors]]:
        """Yield the adapted parameters with their factors."""
        for name, factors in cast("nn.ModuleDict", self.adapters[adapter]).items():
            yield name, cast("LoraFactors", factors)

    def factors_of_experts(
        self, module: str, adapter: str
    ) -> Iterator[tuple[str, str, int, LoraFactors]]:
        """Yield (name of the update, name in the base, number of the expert, factors)."""
        for name, factors in self._factors(adapter):
            for expert in range(len(factors.A)):
                yield f"{module}.{expert}.{name}", f"{module}.{name}[{expert}]", expert, factors


def stores_transposed(experts: nn.Module) -> bool:
    """Return True if a module stores its experts as ``[E, in, out]``, as gpt-oss does."""
    return bool(getattr(experts, "is_transposed", False))


def target_stacks(
    modules: Mapping[str, nn.Module], targets: Collection[str]
) -> dict[str, list[str]]:
    """Return the targeted parameters by their module, in the order in which it registers them.

    PEFT's rule for ``target_parameters``: a parameter's full name, or its last segments.

    Raises
    ------
    TargetError
        A target names no parameter, or one that is not a stack of matrices.
    """
    parameters: dict[str, tuple[str, str]] = {}
    for module, layer in modules.items():
        for name in unwrap(layer)._parameters:
            parameters[f"{module}.{name}" if module else name] = (module, name)
    matches: set[str] = set()
    for target in targets:
        named = [full for full in parameters if full == target or full.endswith(f".{target}")]
        if not named:
            near = ", ".join(near_names(target, parameters)) or "none"
            message = f"No parameter is named by the target {target!r}. Near names: {near}."
            raise TargetError(message)
        matches |= set(named)
    stacks: dict[str, list[str]] = {}
    for full, (module, name) in parameters.items():
        if full in matches:
            W: Tensor = getattr(modules[module], name)
            if W.ndim != 3 or not W.is_floating_point():
                message = (
                    f"Cannot adapt the parameter '{full}': its shape is {tuple(W.shape)}, and a "
                    "stack of experts has three axes. A linear layer is named among the targets."
                )
                raise TargetError(message)
            stacks.setdefault(module, []).append(name)
    return stacks


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One part of a fused weight: its name, its rows and its rank."""

    name: str
    rows: Tensor
    rank: int


class FusedFactors(LoraFactors):
    """Factors of parts of a weight: A ``(Σr, d_in)``, those of the parts below each other.

    ``B`` is the B of the whole weight, ``(d_out, Σr)``, put together from one trained block per
    part.
    """

    def __init__(self, A: Tensor, B: Tensor, *, parts: Sequence[Part], **fields: Any) -> None:
        super().__init__(A, torch.empty(0), **fields)
        del self.B
        self.shape = B.shape
        self.parts = tuple(parts)
        for i, (part, columns) in enumerate(self._columns()):
            block = B[part.rows.to(B.device), columns]
            self.register_parameter(f"B{i}", nn.Parameter(block.clone()))
            self.register_buffer(f"rows{i}", part.rows.to(B.device), persistent=False)

    def _columns(self) -> Iterator[tuple[Part, slice]]:
        """Yield the parts, each with its rows of A, which are its columns of B."""
        start = 0
        for part in self.parts:
            yield part, slice(start, start + part.rank)
            start += part.rank

    def factors_of_parts(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, A ``(r, d_in)`` and B ``(rows of the part, r)`` of each part."""
        for i, (part, columns) in enumerate(self._columns()):
            yield part.name, self.A[columns], getattr(self, f"B{i}")

    def config_entry(self) -> dict[str, Any]:
        """Return the entry of the weight in an adapter's config, see `formats.fused_parts`."""
        runs = {part.name: runs_of(part.rows.tolist()) for part in self.parts}
        return {"rows": self.shape[0], "parts": runs}

    def __getattr__(self, name: str) -> Any:
        if name != "B":
            return super().__getattr__(name)
        columns = []
        for i in range(len(self.parts)):
            block, rows = getattr(self, f"B{i}"), getattr(self, f"rows{i}")
            empty = block.new_zeros(self.shape[0], block.shape[1])
            columns.append(empty.index_copy(0, rows, block))  # gradients reach the block
        return torch.cat(columns, dim=1)  # (d_out, Σr)
