"""What the loop trains on: arrays of examples and their targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_analysis.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Examples ``(n, ...)`` and their targets ``(n, ...)``.

    Raises
    ------
    InputError
        The two differ in length, or there is no example.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]

    def __post_init__(self) -> None:
        if not 0 < len(self.inputs) == len(self.targets):
            message = (
                f"A split needs as many targets as inputs, and one at least; "
                f"found {len(self.inputs)} inputs and {len(self.targets)} targets."
            )
            raise InputError(message)

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, slots=True, eq=False)
class TaskData:
    """What a task trains on, and what it is tested on."""

    train: Split
    test: Split
