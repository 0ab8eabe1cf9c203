"""Several processes that train one model, each with a part of every batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of one training: this one's number among how many.

    What is trained is held whole by each of them, and its gradients are summed in one go: those
    of an adapter are a hundredth of the model's, so there is nothing to overlap.
    """

    rank: int = 0
    count: int = 1

    def total(self, number: int) -> int:
        """Return the sum of a number over the processes."""
        return int(self.summed(torch.tensor(float(number)))) if self.count > 1 else number

    def summed(self, value: Tensor) -> Tensor:
        """Return a tensor summed over the processes."""
        if self.count > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the processes, in place; what has none counts as zero."""
        if self.count == 1:
            return
        for parameter in (held := list(parameters)):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in held if p.grad is not None])
        torch.distributed.all_reduce(flat)
        parts = torch.split(flat, [parameter.numel() for parameter in held])
        for parameter, part in zip(held, parts, strict=True):
            parameter.grad = part.view_as(parameter)


ALONE = Processes()
