"""The best LoRA of a full fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_analysis.bases import read_fine_tune
from lora_analysis.edit.resizing import Resized, resize_adapter
from lora_analysis.execution import available_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def approximate_fine_tune(
    tuned: Any,
    base: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    modules: str | Sequence[str] | None = None,
    transposed: bool | None = None,
    label: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Resized:
    """Return the best LoRA of a full fine-tune, and per module what it lacks of it.

    ``ΔW = W_tuned - W_base`` of every weight matrix, cut to its leading singular directions as by
    :func:`lora_analysis.resize_adapter`: no low-rank update of those ranks is closer. What is not
    a matrix (biases, norms) is not part of it and named in the findings.

    Parameters
    ----------
    tuned, base
        The two models: anything :func:`lora_analysis.open_base` takes.
    rank, energy, budget
        Exactly one of them, as for `resize_adapter`.
    modules, transposed, label
        As for :func:`lora_analysis.read_fine_tune`.
    progress
        Called with (what, done, total).

    Raises
    ------
    InputError
        As raised by `read_fine_tune` and `resize_adapter`.
    """
    update = read_fine_tune(
        tuned, base, modules=modules, transposed=transposed, label=label, progress=progress
    )
    return resize_adapter(
        update,
        rank=rank,
        energy=energy,
        budget=budget,
        progress=progress,
        workers=available_workers(),
    )
