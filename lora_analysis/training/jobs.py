"""Training runs as the jobs of an executor, and the choice of the executor."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_analysis.errors import InUseError, named_errors
from lora_analysis.execution import available_workers
from lora_analysis.execution.protocol import EventHandler, SerialExecutor
from lora_analysis.training.config import RunConfig
from lora_analysis.training.events import RunEvent
from lora_analysis.training.runs import train_run

if TYPE_CHECKING:
    from lora_analysis.execution.protocol import Executor
    from lora_analysis.training.plan import ExecutionOptions

# A worker lost on another machine holds the lock of its run's folder until its silence is noticed.
_PATIENCE = 150.0  # seconds
# Each worker needs about 350 MB: two of them and the caller stay below 1.5 GB.
MAX_DEFAULT_WORKERS = 4
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One run of a sweep, to be trained into ``folder / name`` by any worker."""

    name: str
    config: RunConfig
    folder: Path
    device: str
    force: bool = False
    trackers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"'{self.name}'"


def train_job(job: TrainingJob, send_event: EventHandler) -> None:
    """Train a run, after waiting a while for a process that still uses its folder."""

    def send_renamed(event: RunEvent) -> None:
        send_event(replace(event, label=job.name))

    folder = job.folder / job.name
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            with named_errors(str(folder)):
                train_run(
                    job.config,
                    folder,
                    device=job.device,
                    trackers=job.trackers,
                    on_event=send_renamed,
                    force=job.force,
                )
        except InUseError:
            if time.monotonic() > end:
                raise
            time.sleep(1.0)
        else:
            return


def choose_executor(options: ExecutionOptions, runs: int) -> Executor:
    """Return the executor for a number of runs.

    Processes share the CPU with one thread each, or have one GPU each; more workers than GPUs
    share these evenly.

    Raises
    ------
    InputError
        The device is not on this machine.
    MissingExtraError
        The executor is Ray, which is not installed.
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
    from lora_analysis.training.devices import resolve_device

    device = resolve_device(options.device)
    gpus: list[str] = []
    if device.type == "cuda" and device.index is None:
        import torch

        count = torch.cuda.device_count()
        visible = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
        gpus = visible[:count] if visible else [str(index) for index in range(count)]
    cpus = min(available_workers(), MAX_DEFAULT_WORKERS) if device.type == "cpu" else 1
    workers = min(options.workers or len(gpus) or cpus, runs)
    if workers == 1 and options.executor == "auto":
        return SerialExecutor()
    from lora_analysis.execution.processes import ProcessExecutor

    return ProcessExecutor(
        workers,
        threads=max(1, available_workers() // workers) if gpus else 1,
        environments=[{VISIBLE: gpu} for gpu in gpus],
    )
