"""Which executor trains: from what was asked for, and what this machine has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lora_analysis.execution import available_workers
from lora_analysis.execution.serial import SerialExecutor

if TYPE_CHECKING:
    from lora_analysis.execution.protocol import Executor
    from lora_analysis.training.plan import ExecutionOptions

# Each worker holds some 350 MB: two of them and the caller stay below 1.5 GB.
MAX_DEFAULT_WORKERS = 4
VISIBLE = "CUDA_VISIBLE_DEVICES"


def choose_executor(options: ExecutionOptions, runs: int) -> Executor:
    """Return who trains this many runs.

    Processes share the CPU with one thread each, or have one GPU each; where there are more
    workers than GPUs, they share these evenly.

    Raises
    ------
    InputError
        The device is not on this machine.
    MissingExtraError
        Ray was asked for, and is not installed.
    """
    if options.executor == "serial":
        return SerialExecutor()
    if options.executor == "ray":
        from lora_analysis.execution.cluster import RayExecutor

        return RayExecutor(
            address=options.address,
            workers=options.workers,
            cpus=options.cpus,
            gpus=0 if options.device == "cpu" else options.gpus,
        )
    gpus = _gpus(options.device)
    limit = len(gpus) or _default_workers(options.device)
    workers = min(options.workers or limit, runs)
    if workers == 1 and options.executor == "auto":
        return SerialExecutor()
    from lora_analysis.execution.processes import ProcessExecutor

    return ProcessExecutor(
        workers,
        threads=max(1, available_workers() // workers) if gpus else 1,
        environments=[{VISIBLE: gpu} for gpu in gpus],
    )


def _gpus(device: str) -> list[str]:
    """Return CUDA's names of the GPUs that workers are to have one each of."""
    from lora_analysis.training.devices import resolve_device

    found = resolve_device(device)
    if found.type != "cuda" or found.index is not None:
        return []
    import torch

    count = torch.cuda.device_count()
    named = [one.strip() for one in os.environ.get(VISIBLE, "").split(",") if one.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def _default_workers(device: str) -> int:
    from lora_analysis.training.devices import resolve_device

    if resolve_device(device).type != "cpu":
        return 1
    return min(available_workers(), MAX_DEFAULT_WORKERS)
