"""Many runs into one folder: what is finished is skipped, the rest trained by an executor."""

from __future__ import annotations

import hashlib
import json
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
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
)
from lora_analysis.execution.protocol import Executor, Outcome, Retried, Tell
from lora_analysis.execution.worker import end_if_imported_by_worker
from lora_analysis.finding import Finding
from lora_analysis.storage.atomic import remove_leftovers
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.limits import MAX_INDEX_BYTES
from lora_analysis.storage.locks import locked
from lora_analysis.storage.outputs import OutputFolder, output_folder
from lora_analysis.storage.records import read_record
from lora_analysis.text import plural
from lora_analysis.training.cells import RunCell, TrainCell
from lora_analysis.training.config import RunConfig
from lora_analysis.training.events import Progress, RunEvent
from lora_analysis.training.executors import choose_executor
from lora_analysis.training.files import write_json
from lora_analysis.training.inputs import input_paths
from lora_analysis.training.plan import ExecutionOptions
from lora_analysis.training.run_folders import FAILURE_NAME, RunState, changes, run_state

SWEEP_NAME = "sweep.json"
_LOCK_NAME = ".sweep.lock"  # runs have locks of their own
_KIND = "sweep"
_PATIENCE = 30.0  # seconds
_HEAD = 200  # bytes within which sweep.json names what wrote it

Runs = Mapping[str, RunConfig]
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RunFailure:
    """Why a run was given up, after how many attempts."""

    error: Exception
    attempts: int


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep left: the folders of the runs that are finished, and why others are not.

    ``findings`` are the notes of the runs, and the runs that were tried again.
    """

    folders: Mapping[str, Path]
    failures: Mapping[str, RunFailure] = field(default_factory=dict)
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
                f"{failure.error} Finished runs are kept: run again to go on."
            )
            raise _class_of(failure.error)(message) from failure.error
        return list(self.folders.values())


def _class_of(error: Exception) -> type[LoraAnalysisError]:
    """Return the error of this package that says of a sweep what an error says of a run."""
    named = named_error(error, "") or error
    kinds = InputError, OutputError, OutOfMemoryError, MissingExtraError
    return next((kind for kind in kinds if isinstance(named, kind)), LoraAnalysisError)


def demo_sweep() -> list[RunConfig]:
    """Return the demo's 13 runs: ranks, seeds and tasks apart from each other.

    Rank 8 on three tasks with three seeds: pairs of other tasks and other seeds are the reference,
    pairs of other tasks and one seed show what a shared start does. Ranks 4 and 64 with two seeds
    on one task: pairs over ranks, with and without a shared seed. The order of the data follows
    the seed.
    """
    cells = [(task, 8, seed) for task in ("rotate", "invert", "mirror") for seed in (0, 1, 2)]
    cells += [("rotate", rank, seed) for rank in (4, 64) for seed in (0, 1)]
    return [RunConfig(task=task, rank=rank, seed=seed) for task, rank, seed in cells]


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
    report: Report | None = None,
) -> SweepResult:
    """Train every run that is not finished yet, each into ``folder / name``.

    Runs that are done stay whatever happens to the others, so that an interrupted sweep goes on
    when it is called again. The result of a run depends neither on the executor nor on the number
    of workers. A run that fails is tried again once, unless what it was given is wrong; then it
    is reported, with ``failed.json`` in its folder, and the rest goes on. ``sweep.json`` holds
    every run with all of its options.

    Parameters
    ----------
    runs
        The runs by name; a sequence takes their own names, which must differ.
    folder
        Where their folders lie; made where it does not exist.
    device
        ``"auto"``, or a device as torch names it.
    workers
        Runs side by side; see `ExecutionOptions`. Worker processes import the caller's main
        module anew, so a script must guard its own start with ``if __name__ == "__main__"``.
    execution
        More about where to train, in place of ``device`` and ``workers``.
    executor
        Who trains; by default chosen from these.
    names
        Only these of the runs; others may be trained beside, by another process.
    force
        Whether runs of another configuration, which lie in the folder under the same name, are
        trained anew.
    progress
        Called in this process with every :class:`RunEvent` of every run.
    report
        Called with a sentence where a run is tried again or given up.

    Raises
    ------
    InputError
        Two runs have one name, ``workers`` is below 1, another sweep is at work in the folder, or
        finished runs would be replaced.
    """
    end_if_imported_by_worker()
    named = runs if isinstance(runs, Mapping) else _by_own_names(runs)
    chosen = named if names is None else {name: named[name] for name in names}
    chosen = named if chosen.keys() == named.keys() else chosen
    options = execution or ExecutionOptions(workers=workers, device=device)
    _check_folder(named, folder, force=force)
    folder.mkdir(parents=True, exist_ok=True)
    failures: dict[str, RunFailure] = {}
    findings: list[Finding] = []
    with locked(folder, _lock_name(named, chosen)):
        if chosen is named:
            remove_leftovers(folder)
        cells = _unfinished(chosen, folder, force=force, progress=progress)
        _write_resolved(named, folder, force=force)
        if cells:
            executor = executor or choose_executor(options, len(cells))
            watch = _watch(progress, report, findings)
            work = TrainCell(folder, options.device, force=force)
            with closing(executor.map(work, cells, tell=watch)) as outcomes:
                for outcome in outcomes:
                    _settle(outcome, folder, failures, report)
    folders = {name: folder / name for name in chosen if name not in failures}
    return SweepResult(folders, failures, tuple(findings))


def sweep_states(runs: Runs, folder: Path) -> dict[str, RunState]:
    """Return what the folder holds of every run, by name."""
    return {name: run_state(config, folder / name) for name, config in runs.items()}


def _by_own_names(configs: Sequence[RunConfig]) -> dict[str, RunConfig]:
    twice = [name for name, n in Counter(config.name for config in configs).items() if n > 1]
    if twice:
        message = (
            f"{len(twice)} of the runs share a folder name, '{twice[0]}' among them. "
            "Task, rank and seeds must tell the runs of one folder apart; or give them names."
        )
        raise InputError(message)
    return {config.name: config for config in configs}


def _lock_name(runs: Runs, chosen: Runs) -> str:
    """Return the file that keeps out a second sweep of the same runs, and no other."""
    if chosen is runs:
        return _LOCK_NAME
    return f"{_LOCK_NAME}-{hashlib.sha256(json.dumps(list(chosen)).encode()).hexdigest()[:12]}"


def _check_folder(runs: Runs, folder: Path, *, force: bool) -> None:
    """Raise if a sweep may not write into a folder: it holds other things, or is an input."""
    earlier = folder / SWEEP_NAME
    known = {*runs}
    if earlier.is_file() and read_record(folder, _KIND) is None:
        with earlier.open("rb") as stream:  # of a version that kept no record
            if b'"generator": "lora_analysis' in stream.read(_HEAD):
                known |= {path.name for path in folder.iterdir()}
    paths = {path for config in _distinct_inputs(runs) for path in input_paths(config)}
    OutputFolder(
        folder, kind=_KIND, verb="sweep", inputs=sorted(paths), force=force, ignored=known
    ).check()


def _distinct_inputs(runs: Runs) -> list[RunConfig]:
    """Return one run of each base and data."""
    return list({(config.base, config.data): config for config in runs.values()}.values())


def _write_resolved(runs: Runs, folder: Path, *, force: bool) -> None:
    """Write every run with all of its options beside the results, unless they are there."""
    document = {
        "schema_version": 1,
        "generator": f"lora_analysis {__version__}",
        "runs": {name: config.to_dict() for name, config in runs.items()},
    }
    path = folder / SWEEP_NAME
    try:
        written = path.is_file() and read_json_object(path, max_bytes=MAX_INDEX_BYTES) == document
    except InputError:
        written = False
    if not written:
        _write_locked(document, folder, force=force)


def _write_locked(document: dict[str, Any], folder: Path, *, force: bool) -> None:
    """Write the runs, waiting for other shards of the sweep that write the same."""
    end = time.monotonic() + _PATIENCE
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


def _unfinished(
    runs: Runs, folder: Path, *, force: bool, progress: Progress | None
) -> list[RunCell]:
    """Return the runs to train, having told of those that are finished."""
    states = sweep_states(runs, folder)
    changed = [name for name, state in states.items() if state == "changed"]
    if changed and not force:
        message = (
            f"{folder}: {plural(len(changed), 'run')} of another configuration, for example "
            f"'{changed[0]}': {changes(runs[changed[0]], folder / changed[0])}. Choose another "
            "folder, or pass --force (force=True in Python) to train them again."
        )
        raise OccupiedError(message)
    taken = [name for name, state in states.items() if state in ("edited", "occupied")]
    if taken and not force:
        message = (
            f"{folder / taken[0]} holds files that no run wrote, or that were edited since. Choose "
            "another folder, or pass --force (force=True in Python) to train it again."
        )
        raise OccupiedError(message)
    for name, state in states.items():
        if state == "finished" and progress is not None:
            total = runs[name].loop.steps
            progress(RunEvent(name, "skipped", total, total, state=state))
    return [RunCell(name, runs[name]) for name, state in states.items() if state != "finished"]


def _watch(progress: Progress | None, report: Report | None, findings: list[Finding]) -> Tell:
    """Return what takes the events of an executor: those of the runs, and its own.

    Notes and retries are reported, and added to ``findings``.
    """
    said: set[str] = set()

    def watch(event: Any) -> None:
        if isinstance(event, Retried):
            fields = {"run": event.cell.name, "error": str(event.error)}
            add(Finding("run-retried", fields))
            return
        if event.kind == "note" and event.note not in said:
            said.add(event.note)  # runs of one file have the same to say of it
            add(Finding("run-note", {"run": event.label, "text": event.note}))
        if progress is not None:
            progress(event)

    def add(finding: Finding) -> None:
        findings.append(finding)
        if report is not None:
            report(finding.text)

    return watch


def _settle(
    outcome: Outcome[RunCell, None],
    folder: Path,
    failures: dict[str, RunFailure],
    report: Report | None,
) -> None:
    """Note how a run ended, in its folder too."""
    name, place = outcome.cell.name, folder / outcome.cell.name
    note = place / FAILURE_NAME
    if outcome.error is None:
        with suppress(OSError):  # the run is finished all the same
            note.unlink(missing_ok=True)
        return
    failures[name] = RunFailure(outcome.error, outcome.attempts)
    if report is not None:
        times = "once" if outcome.attempts == 1 else f"{outcome.attempts} times"
        report(f"{name} failed {times} and is left out: {outcome.error}")
    facts = {
        "error": str(outcome.error),
        "kind": type(outcome.error).__name__,
        "attempts": outcome.attempts,
        "host": socket.gethostname(),
        "traceback": traceback.format_exception(outcome.error),
    }
    try:
        write_json(note, facts)
    except OSError as error:  # the disk that is full for one run may have room for another
        if report is not None:
            report(f"{name}: its failure could not be noted: {error}")
