"""Factors of some parts of a fused weight: q and v of a joint projection, and not its k.

As loralib's ``MergedLinear``: each part has factors of its own, and the rows of the others stay.
As one update of the whole weight, A is those of the parts below each other and B has a block of
columns per part, zero outside of its rows; PEFT loads it as that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_analysis.bases.fused import Family, rows_of_part
from lora_analysis.errors import TargetError
from lora_analysis.lora.layers import Factors
from lora_analysis.patterns import pattern_value

if TYPE_CHECKING:
    from lora_analysis.lora.layers import LoraLayer


class PartFactors(Factors):
    """Factors of g parts of a weight, of r each: A ``(g·r, d_in)``, and a B per part.

    ``B`` is what they make together, ``(d_out, g·r)``: what is trained is its blocks alone.
    """

    def __init__(self, A: Tensor, B: Tensor, *, rows: Sequence[Tensor], **kept: Any) -> None:
        super().__init__(A, torch.empty(0), **kept)
        del self.B
        rank = len(A) // len(rows)
        self.shape = B.shape
        for part, own in enumerate(rows):
            block = B[own, part * rank : (part + 1) * rank]
            self.register_parameter(f"B{part}", nn.Parameter(block.clone()))
            self.register_buffer(f"rows{part}", own.to(B.device), persistent=False)
        self.parts = len(rows)

    def __getattr__(self, name: str) -> Any:
        if name == "B":
            return self._whole()
        return super().__getattr__(name)

    def _whole(self) -> Tensor:
        """Return B of the whole weight, through which gradients reach the blocks."""
        columns = []
        for part in range(self.parts):
            block, rows = getattr(self, f"B{part}"), getattr(self, f"rows{part}")
            empty = block.new_zeros(self.shape[0], block.shape[1])
            columns.append(empty.index_copy(0, rows, block))
        return torch.cat(columns, dim=1)  # (d_out, g·r)


def rows_of_parts(
    model: nn.Module,
    module: str,
    kind: type[LoraLayer],
    layer: nn.Module,
    parts: Mapping[str, Sequence[str]],
) -> list[Tensor] | None:
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
    found = []
    for part in wanted:
        runs = rows_of_part(module, part, kind.shape(layer), None, family)
        if part in ("gate", "up") and "gate" not in module.rpartition(".")[2]:
            runs = f"its rows are q, k and v, not {part}"
        if isinstance(runs, str):
            message = f"Cannot adapt the part '{part}' of '{module}': {runs}."
            raise TargetError(message)
        found.append(torch.cat([torch.arange(run.start, run.stop) for run in runs]))
    return found
