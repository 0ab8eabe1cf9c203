"""Where a run computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

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
    if name in ("auto", "cuda") and there[0] == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # of several processes, each has its own
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


def gpu_memory() -> int:
    """Return the bytes of GPU memory this process held at most; 0 where it uses no GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads inside the block; None leaves it as it is.

    The order of a sum depends on the number of threads: with one, a run gives the same bits
    whether it shares the machine with other runs or not. Small models gain little from two.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """Let torch use one CPU thread inside the block."""
    return cpu_threads(1)
