"""The random streams of a run, each with a state of its own that can be saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from types import TracebackType


class DropoutStream:
    """torch's global generators, while a step computes, at a place of this stream's own.

    Dropout draws from the global generator and takes no other. Inside of ``with stream:`` that
    generator is at the stream's state; outside it is as the caller left it.

    Parameters
    ----------
    seed
        Of the stream.
    device
        Where the model computes: on a GPU its generator is kept too.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self._own = {"cpu": torch.Generator().manual_seed(seed).get_state()}
        if self.device:
            self._own["cuda"] = torch.Generator(self.device).manual_seed(seed).get_state()
        self._callers: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        self._callers = self._current()
        self._set(self._own)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._own = self._current()
        self._set(self._callers)

    def state(self) -> dict[str, Tensor]:
        """Return where the stream is, as bytes by device."""
        return dict(self._own)

    def go_to(self, state: dict[str, Tensor]) -> None:
        """Go on from a state that was saved."""
        self._own = dict(state)

    def _current(self) -> dict[str, Tensor]:
        found = {"cpu": torch.get_rng_state()}
        if self.device:
            found["cuda"] = torch.cuda.get_rng_state(self.device)
        return found

    def _set(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


class Order:
    """Row numbers without end: a new order whenever fewer than a batch are left.

    Parameters
    ----------
    count
        Rows there are.
    size
        Rows in a batch; a batch is never larger than the data.
    seed
        Of the generator, which augmentation draws from too.
    """

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.size = min(size, count)
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = torch.empty(0, dtype=torch.int64)
        self.position = 0
        self.count = count

    def __next__(self) -> Tensor:
        """Return the next batch's rows."""
        if self.position + self.size > len(self.rows):
            self.rows = torch.randperm(self.count, generator=self.generator)
            self.position = 0
        first = self.position
        self.position += self.size
        return self.rows[first : self.position]

    def state(self) -> dict[str, Tensor]:
        """Return the order that is being followed, the place in it, and the generator's state."""
        return {
            "rows": self.rows,
            "position": torch.tensor(self.position),
            "generator": self.generator.get_state(),
        }

    def go_to(self, state: dict[str, Tensor]) -> None:
        """Go on from a state that was saved."""
        self.rows = state["rows"]
        self.position = int(state["position"])
        self.generator.set_state(state["generator"])
