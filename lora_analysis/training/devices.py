"""Where a run computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora_analysis.errors import InputError


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device of that name, checked to be there.

    Parameters
    ----------
    name
        ``"auto"`` takes the first of cuda, mps and cpu that this machine has; otherwise a name as
        torch writes it (``"cpu"``, ``"cuda:1"``).

    Raises
    ------
    InputError
        torch knows no such device, or this machine has none.
    """
    there = available_devices()
    if name == "auto":
        return torch.device(there[0])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        message = f"There is no device '{name}'. Use auto, {', '.join(there)}."
        raise InputError(message) from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in there or (device.index or 0) >= count:
        message = f"The device '{name}' is not on this machine. Use auto, {', '.join(there)}."
        raise InputError(message)
    return device


def available_devices() -> list[str]:
    """Return the kinds of device this machine has, fastest first."""
    kinds = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    return [kind for kind, there in kinds.items() if there] + ["cpu"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one CPU thread inside the block.

    The order of a sum depends on the number of threads: with one, a run gives the same bits
    whether it shares the machine with other runs or not. Models this small gain little from two.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
