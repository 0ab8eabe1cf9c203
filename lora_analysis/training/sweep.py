"""Train many runs into one folder: finished ones are skipped, an executor trains the others.

`run_sweep` tells the story; a `TrainingJob` is one run of it, and `choose_executor` picks who works
on the jobs: this process, worker processes, or a Ray cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_analysis import __version__
from lora_analysis.errors import (
    InputError,
    InUseError,
    LoraAnalysisError,
    MissingExtraError,
    OccupiedError,
    OutOfMemoryError,
    OutputError,
    named_error,
    named_errors,
)
from lora_analysis.execution import available_workers
from lora_analysis.execution.processes import ProcessExecutor, end_if_imported_by_worker
from lora_analysis.execution.protocol import (
    EventHandler,
    Executor,
    Outcome,
    Retried,
    SerialExecutor,
)
from lora_analysis.finding import Failure, Finding
from lora_analysis.progress import Progress
from lora_analysis.storage.atomic import lock_folder, remove_leftovers
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.limits import MAX_INDEX_BYTES
from lora_analysis.storage.outputs import OutputFolder, output_folder
from lora_analysis.storage.records import read_record
from lora_analysis.text import plural
from lora_analysis.training.config import RunConfig
from lora_analysis.training.events import RunEvent, check_trackers
from lora_analysis.training.inputs import check_torch, input_paths, write_json
from lora_analysis.training.plan import ExecutionOptions
from lora_analysis.training.run_folders import (
    FAILURE_NAME,
    RunState,
    describe_changes,
    run_state,
)
from lora_analysis.training.runs import train_run

SWEEP_NAME = "sweep.json"
_LOCK_NAME = ".sweep.lock"  # runs have locks of their own
_KIND = "sweep"
# Seconds to wait for other shards that write the same `sweep.json`.
_FOLDER_PATIENCE = 30.0
# A worker lost on another machine holds the lock of its run's folder until its silence is noticed.
_RUN_PATIENCE = 150.0  # seconds
# Each worker needs about 350 MB: two of them and the caller stay below 1.5 GB.
MAX_DEFAULT_WORKERS = 4
VISIBLE = "CUDA_VISIBLE_DEVICES"
_HEAD_BYTES = 200  # of sweep.json, which contain the name of its generator

Runs = Mapping[str, RunConfig]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """Folders of the finished runs of a sweep, and failures, by name.

    ``findings`` are the notes of the runs, and retries.
    """

    folders: Mapping[str, Path]
    failures: Mapping[str, Failure] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def all_folders(self) -> list[Path]:
        """Return the folders of all runs.

        Raises
        ------
        LoraAnalysisError
            A run failed.
        """
        for name, failure in self.failures.items():
            total = len(self.folders) + len(self.failures)
            message = (
                f"{len(self.failures)} of {total} runs failed, '{name}' among them: "
                f"{failure.reason} Finished runs are kept: run again to continue."
            )
            # The class decides the exit code.
            error = failure.error
            named = (named_error(error, "") if error else None) or error
            classes = InputError, OutputError, OutOfMemoryError, MissingExtraError
            matches = (kind for kind in classes if isinstance(named, kind))
            raise next(matches, LoraAnalysisError)(message) from error
        return list(self.folders.values())


def demo_sweep() -> list[RunConfig]:
    """Return the demo's 13 runs, which vary rank, seed and task.

    Rank 8 on three tasks with three seeds: pairs of different tasks and seeds are the reference
    pairs, pairs of different tasks with the same seed show the effect of shared initialization.
    Ranks 4 and 64 with two seeds on one task: pairs over ranks, with and without a shared seed.
    The order of the data follows the seed.
    """
    jobs = [(task, 8, seed) for task in ("rotate", "invert", "mirror") for seed in (0, 1, 2)]
    jobs += [("rotate", rank, seed) for rank in (4, 64) for seed in (0, 1)]
    return [RunConfig(task=task, rank=rank, seed=seed) for task, rank, seed in jobs]


def run_sweep(
    runs: Runs | Sequence[RunConfig],
    folder: Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    execution: ExecutionOptions | None = None,
    executor: Executor | None = None,
    names: Sequence[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    on_event: Callable[[RunEvent], None] | None = None,
) -> SweepResult:
    """Train every run that is not finished yet, each into ``folder / name``.

    Finished runs stay in any case, so that an interrupted sweep continues when it is called
    again. The result of a run depends neither on the executor nor on the number of workers. A run
    that fails is tried again once, unless its input is wrong; then it is reported, with
    ``failed.json`` in its folder, and the rest goes on. ``sweep.json`` contains every run with
    all of its options.

    Parameters
    ----------
    runs
        Configurations by name; a sequence is named after the configurations, which must differ.
    folder
        Folder for the folders of the runs; created if it does not exist.
    device
        ``"auto"``, or a torch device name.
    workers
        Number of runs in parallel; see `ExecutionOptions`. Worker processes import the caller's
        main module, so a script must guard its entry with ``if __name__ == "__main__"``.
    execution
        Options on how and where to train, in place of ``device`` and ``workers``.
    executor
        Executor of the runs; by default chosen by the options.
    names
        Names of the runs to train; another process may train the others at the same time.
    force
        Whether to train runs again that are in the folder with another configuration.
    progress
        Called in this process with ("training steps", done, total) and ("adapters", done, total).
    on_event
        Called in this process with every :class:`RunEvent` of every run, notes that runs repeat
        only once, and with one for every run that is retried or fails.

    Raises
    ------
    InputError
        Two runs have the same name, ``workers`` is below 1, a tracker is unknown, another sweep
        uses the folder, or finished runs would be replaced.
    """
    end_if_imported_by_worker()
    runs = _named_runs(runs)
    chosen = runs if names is None else {name: runs[name] for name in names}
    is_whole = chosen.keys() == runs.keys()
    options = execution or ExecutionOptions(workers=workers, device=device)
    if options.executor != "ray":  # which trains elsewhere
        check_trackers(options.trackers)
    # Inputs that several runs share are checked once.
    inputs = {(config.base, config.data): config for config in runs.values()}.values()
    _check_folder(runs, folder, inputs, force=force)
    folder.mkdir(parents=True, exist_ok=True)
    events = _SweepEvents(len(chosen), progress, on_event)
    # Keeps out other sweeps of the same runs.
    with lock_folder(folder, _LOCK_NAME if is_whole else _lock_of_some(chosen)):
        if is_whole:
            remove_leftovers(folder)
        states = sweep_states(chosen, folder)
        if not force:
            _check_states(chosen, states, folder)
        for name in (name for name, state in states.items() if state == "finished"):
            total = chosen[name].loop.steps
            events.send(RunEvent(name, "skipped", total, total, state="finished"))
        jobs = [
            TrainingJob(name, chosen[name], folder, options.device, force, options.trackers)
            for name, state in states.items()
            if state != "finished"
        ]
        if jobs and executor is None and options.executor != "ray":
            for config in inputs:
                check_torch(config.base)
        _write_configs(runs, folder, force=force)
        if jobs:
            executor = executor or choose_executor(options, len(jobs))
            with closing(executor.map(train_job, jobs, on_event=events.receive)) as outcomes:
                for outcome in outcomes:
                    events.record_outcome(outcome)
    folders = {name: folder / name for name in chosen if name not in events.failures}
    return SweepResult(folders, events.failures, tuple(events.findings))


def _named_runs(runs: Runs | Sequence[RunConfig]) -> Runs:
    """Return the runs by name; raise if two of a sequence have the same name."""
    if isinstance(runs, Mapping):
        return runs
    counts = Counter(config.name for config in runs)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        message = (
            f"{len(repeated)} of the runs share a folder name, '{repeated[0]}' among them. "
            "Runs in one folder must differ in task, rank or seeds; or give them names."
        )
        raise InputError(message)
    return {config.name: config for config in runs}


def _lock_of_some(names: Iterable[str]) -> str:
    """Return the name of the lock of some runs of a sweep, which follows from their names."""
    return f"{_LOCK_NAME}-{hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:12]}"


def sweep_states(runs: Runs, folder: Path) -> dict[str, RunState]:
    """Return the state of every run's folder, by name."""
    return {name: run_state(config, folder / name) for name, config in runs.items()}


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One run of a sweep, to be trained into ``folder / name`` by any worker."""

    name: str
    config: RunConfig
    folder: Path
    device: str
    force: bool
    trackers: tuple[str, ...]

    def __str__(self) -> str:
        return f"'{self.name}'"


def train_job(job: TrainingJob, send_event: EventHandler) -> None:
    """Train a run, after waiting a while for a process that still uses its folder."""

    def send_renamed(event: RunEvent) -> None:
        send_event(replace(event, label=job.name))

    folder = job.folder / job.name
    end = time.monotonic() + _RUN_PATIENCE
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
    return ProcessExecutor(
        workers,
        threads=max(1, available_workers() // workers) if gpus else 1,
        environments=[{VISIBLE: gpu} for gpu in gpus],
    )


def _check_folder(runs: Runs, folder: Path, configs: Iterable[RunConfig], *, force: bool) -> None:
    """Raise if a sweep may not write into a folder: it has other files, or is an input."""
    earlier = folder / SWEEP_NAME
    ignored = {*runs}
    if earlier.is_file() and read_record(folder, _KIND) is None:
        with earlier.open("rb") as stream:  # of a version without records
            if b'"generator": "lora_analysis' in stream.read(_HEAD_BYTES):
                ignored |= {path.name for path in folder.iterdir()}
    paths = {path for config in configs for path in input_paths(config)}
    OutputFolder(
        folder, kind=_KIND, verb="sweep", inputs=sorted(paths), force=force, ignored=ignored
    ).check()


def _check_states(runs: Runs, states: Mapping[str, RunState], folder: Path) -> None:
    """Raise if training would replace a run of another configuration, or other files."""
    changed = [name for name, state in states.items() if state == "changed"]
    if changed:
        differences = describe_changes(runs[changed[0]], folder / changed[0])
        message = (
            f"{folder}: {plural(len(changed), 'run')} of another configuration, for example "
            f"'{changed[0]}': {differences}. Choose another folder, or pass --force (force=True in "
            "Python) to train them again."
        )
        raise OccupiedError(message)
    occupied = [name for name, state in states.items() if state in ("edited", "occupied")]
    if occupied:
        message = (
            f"{folder / occupied[0]} holds files that no run wrote, or that were edited since. "
            "Choose another folder, or pass --force (force=True in Python) to train it again."
        )
        raise OccupiedError(message)


def _write_configs(runs: Runs, folder: Path, *, force: bool) -> None:
    """Write every run with all of its options into ``sweep.json``, unless it is up to date.

    Waits for other shards of the sweep that write the same.
    """
    document = {
        "schema_version": 1,
        "generator": f"lora_analysis {__version__}",
        "runs": {name: config.to_dict() for name, config in runs.items()},
    }
    path = folder / SWEEP_NAME
    with suppress(InputError):
        if path.is_file() and read_json_object(path, max_bytes=MAX_INDEX_BYTES) == document:
            return
    end = time.monotonic() + _FOLDER_PATIENCE
    while True:
        try:
            with output_folder(
                folder, kind=_KIND, verb="sweep", force=force, shared=True
            ) as staging:
                write_json(staging / SWEEP_NAME, document)
        except InUseError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


class _SweepEvents:
    """Events of a sweep's runs and of its executor: forwarded, counted, and turned into findings.

    Parameters
    ----------
    runs
        Number of runs.
    progress, on_event
        See `run_sweep`.
    """

    def __init__(
        self,
        runs: int,
        progress: Progress | None,
        on_event: Callable[[RunEvent], None] | None,
    ) -> None:
        self.runs = runs
        self.progress = progress
        self.on_event = on_event
        self.findings: list[Finding] = []
        self.failures: dict[str, Failure] = {}
        self.steps: dict[str, tuple[int, int]] = {}  # done and total by run
        self.done: set[str] = set()

    def receive(self, event: Any) -> None:
        """Handle an event of the executor: a `RunEvent`, or `Retried`."""
        if isinstance(event, Retried):
            name, error = event.job.name, str(event.error)
            self.findings.append(Finding("run-retried", {"run": name, "error": error}))
            self.send(RunEvent(name, "retried", note=f"failed and is tried again: {error}"))
            return
        if event.kind == "note":
            if any(event.note == finding.fields.get("text") for finding in self.findings):
                return  # runs with the same data have the same notes
            self.findings.append(Finding("run-note", {"run": event.label, "text": event.note}))
        self.send(event)

    def send(self, event: RunEvent) -> None:
        """Forward an event to the caller, and count it for the progress."""
        if self.on_event is not None:
            self.on_event(event)
        if self.progress is None or event.kind in ("retried", "failed"):
            return
        self.steps[event.label] = event.step, event.total
        if event.kind in ("finished", "skipped"):
            self.done.add(event.label)
        done, total = map(sum, zip(*self.steps.values(), strict=True))
        # Runs that have not begun are assumed to be as long as this one.
        total += (self.runs - len(self.steps)) * event.total
        self.progress("training steps", done, total)
        self.progress("adapters", len(self.done), self.runs)

    def record_outcome(self, outcome: Outcome[TrainingJob, None]) -> None:
        """Record the failure of a run, also in its folder."""
        name, error = outcome.job.name, outcome.error
        path = outcome.job.folder / name / FAILURE_NAME
        if error is None:
            with suppress(OSError):  # the run is finished all the same
                path.unlink(missing_ok=True)
            return
        self.failures[name] = Failure(name, str(error), error, outcome.attempts)
        times = "once" if outcome.attempts == 1 else f"{outcome.attempts} times"
        self.send(RunEvent(name, "failed", note=f"failed {times} and is left out: {error}"))
        facts = {
            "error": str(error),
            "kind": type(error).__name__,
            "attempts": outcome.attempts,
            "host": socket.gethostname(),
            "traceback": traceback.format_exception(error),
        }
        try:
            write_json(path, facts)
        except OSError as full:  # a disk that is full for one run may have room for another
            note = f"the failure could not be written to {FAILURE_NAME}: {full}"
            self.send(RunEvent(name, "failed", note=note))
