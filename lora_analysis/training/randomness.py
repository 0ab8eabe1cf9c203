"""Random streams of a run: dropout and the order of examples, with states that can be saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from types import TracebackType


class DropoutStream:
    """State of torch's global generators for the dropout of a run.

    Dropout draws from the global generator and accepts no other. Inside of ``with stream:`` that
    generator is in the state of the stream; outside, in the caller's.

    Parameters
    ----------
    seed
        Seed of the stream.
    device
        Device of the model: on a GPU its generator is included.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self._states = {"cpu": torch.Generator().manual_seed(seed).get_state()}
        if self.device:
            self._states["cuda"] = torch.Generator(self.device).manual_seed(seed).get_state()
        self._caller_states: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        self._caller_states = self._current()
        self._set(self._states)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._states = self._current()
        self._set(self._caller_states)

    def state(self) -> dict[str, Tensor]:
        """Return the state of the stream, as bytes by device."""
        return dict(self._states)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state."""
        self._states = dict(state)

    def _current(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device:
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


class Order:
    """Endless iterator over batches of rows, shuffled again when fewer than a batch are left.

    Parameters
    ----------
    count
        Number of rows.
    size
        Rows per batch, at most all of them.
    seed
        Seed of the generator, from which augmentation draws as well.
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
        """Return the current order, the position in it, and the state of the generator."""
        return {
            "rows": self.rows,
            "position": torch.tensor(self.position),
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state."""
        self.rows = state["rows"]
        self.position = int(state["position"])
        self.generator.set_state(state["generator"])
