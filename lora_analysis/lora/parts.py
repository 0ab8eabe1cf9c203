"""Factors of some parts of a fused weight: q and v of a joint projection, and not its k.

As loralib's ``MergedLinear``: each part has factors of its own, and the rows of the others stay.
The model computes with them as one update of the whole weight: A is those of the parts below each
other and B has a block of columns per part, zero outside of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_analysis.bases.fused import Family, rows_of_part
from lora_analysis.errors import TargetError
from lora_analysis.formats.fused_parts import indices_of, runs_of
from lora_analysis.lora.layers import Factors, initial_factor
from lora_analysis.patterns import pattern_value

if TYPE_CHECKING:
    from lora_analysis.lora.layers import LoraLayer


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One part of a fused weight: its name, which rows it has, and its rank."""

    name: str
    rows: Tensor
    rank: int


class PartFactors(Factors):
    """Factors of parts of a weight: A ``(Σr, d_in)``, those of the parts below each other.

    ``B`` is what they make together, ``(d_out, Σr)``: what is trained is a block for each part.
    """

    def __init__(self, A: Tensor, B: Tensor, *, parts: Sequence[Part], **kept: Any) -> None:
        super().__init__(A, torch.empty(0), **kept)
        del self.B
        self.shape = B.shape
        self.parts = tuple(parts)
        for at, (part, columns) in enumerate(self.columns()):
            block = B[part.rows.to(B.device), columns]
            self.register_parameter(f"B{at}", nn.Parameter(block.clone()))
            self.register_buffer(f"rows{at}", part.rows.to(B.device), persistent=False)

    def columns(self) -> Iterator[tuple[Part, slice]]:
        """Yield the parts, each with its rows of A and columns of B."""
        start = 0
        for part in self.parts:
            yield part, slice(start, start + part.rank)
            start += part.rank

    def of_parts(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, A ``(r, d_in)`` and B ``(its rows, r)`` of each part."""
        for at, (part, own) in enumerate(self.columns()):
            yield part.name, self.A[own], getattr(self, f"B{at}")

    def stated(self) -> dict[str, Any]:
        """Return what an adapter's config says of the weight, see `formats.fused_parts`."""
        runs = {part.name: runs_of(part.rows.tolist()) for part in self.parts}
        return {"rows": self.shape[0], "parts": runs}

    def __getattr__(self, name: str) -> Any:
        if name == "B":
            return self._whole()
        return super().__getattr__(name)

    def _whole(self) -> Tensor:
        """Return B of the whole weight, through which gradients reach the blocks."""
        columns = []
        for at in range(len(self.parts)):
            block, rows = getattr(self, f"B{at}"), getattr(self, f"rows{at}")
            empty = block.new_zeros(self.shape[0], block.shape[1])
            columns.append(empty.index_copy(0, rows, block))
        return torch.cat(columns, dim=1)  # (d_out, Σr)


def rows_of_parts(
    model: nn.Module,
    module: str,
    kind: type[LoraLayer],
    layer: nn.Module,
    parts: Mapping[str, Sequence[str]],
) -> dict[str, Tensor] | None:
    """Return the rows of each part that is adapted of a module; None where it is taken whole.

    Raises
    ------
    TargetError
        The module has no such part, or how its rows lie is not known of the model's family.
    """
    wanted = pattern_value(module, parts, ())
    if not wanted:
        return None
    config: Any = getattr(model, "config", None)
    stated: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    family = Family(getattr(config, "model_type", None), stated)
    found = {}
    for part in wanted:
        runs = rows_of_part(module, part, kind.shape(layer), None, family)
        if part in ("gate", "up") and "gate" not in module.rpartition(".")[2]:
            runs = f"its rows are q, k and v, not {part}"
        if isinstance(runs, str):
            message = f"Cannot adapt the part '{part}' of '{module}': {runs}."
            raise TargetError(message)
        found[part] = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    return found


def start_of_parts(
    module: str, shape: tuple[int, int], parts: Sequence[Part], seed: int
) -> tuple[Tensor, Tensor]:
    """Return the A and B from which training starts: each part's own A by its name, and B = 0."""
    d_out, d_in = shape
    starts = [initial_factor(f"{module}.{part.name}", part.rank, seed, d_in) for part in parts]
    return torch.cat(starts), torch.zeros(d_out, sum(part.rank for part in parts))


def stated_parts(stated: Mapping[str, Any]) -> list[Part]:
    """Return the parts that the config of a joined adapter states of a weight."""
    ranks = stated["ranks"]
    rows = {part: torch.tensor(indices_of(runs)) for part, runs in stated["parts"].items()}
    return [Part(part, own, ranks[part]) for part, own in rows.items()]
