"""LoRA on some parts of a fused projection: q and v of a joint weight, and not its k.

As in loralib's ``MergedLinear``, each part has its own factors, and the rows of other parts do not
change. The model computes with them as one update of the whole weight: A has those of the parts
below each other, and B has a block of columns per part, zero outside the part's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_analysis.bases.fused import Family, rows_of_part
from lora_analysis.errors import TargetError
from lora_analysis.formats.fused_parts import indices_of, runs_of
from lora_analysis.lora.core import LoraFactors, initial_factor
from lora_analysis.patterns import pattern_value


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


def rows_by_part(
    model: nn.Module,
    module: str,
    shape: tuple[int, int],
    patterns: Mapping[str, Sequence[str]],
) -> dict[str, Tensor]:
    """Return the rows of each part of a module to adapt; none if it is adapted whole.

    Raises
    ------
    TargetError
        The module has no such part, or the layout of its rows is unknown for the model's family.
    """
    config: Any = getattr(model, "config", None)
    fields: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    family = Family(getattr(config, "model_type", None), fields)
    rows = {}
    for part in pattern_value(module, patterns, ()):
        runs = rows_of_part(module, part, shape, None, family)
        if part in ("gate", "up") and "gate" not in module.rpartition(".")[2]:
            runs = f"its rows are q, k and v, not {part}"
        if isinstance(runs, str):
            message = f"Cannot adapt the part '{part}' of '{module}': {runs}."
            raise TargetError(message)
        rows[part] = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    return rows


def initial_fused_factors(
    module: str, shape: tuple[int, int], parts: Sequence[Part], seed: int
) -> tuple[Tensor, Tensor]:
    """Return the A and B from which training starts: each part's A by its name, and B = 0."""
    d_out, d_in = shape
    A = [initial_factor(f"{module}.{part.name}", part.rank, seed, d_in) for part in parts]
    return torch.cat(A), torch.zeros(d_out, sum(part.rank for part in parts))


def parts_from_config(entry: Mapping[str, Any]) -> list[Part]:
    """Return the parts of a weight from its entry in the config of an adapter with joined parts."""
    rows = {part: torch.tensor(indices_of(runs)) for part, runs in entry["parts"].items()}
    return [Part(part, indices, entry["ranks"][part]) for part, indices in rows.items()]
