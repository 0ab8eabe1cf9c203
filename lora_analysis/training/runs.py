"""One adapter, trained into a folder: metrics, adapter, and last of all the manifest."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_analysis.errors import DivergedError, OccupiedError
from lora_analysis.storage.atomic import remove_leftovers
from lora_analysis.storage.locks import locked
from lora_analysis.storage.outputs import OutputFolder
from lora_analysis.storage.records import RECORD_FOLDER, read_record
from lora_analysis.training.events import EventKind, Progress, RunEvent
from lora_analysis.training.files import MANIFEST_NAME, file_sha256, write_json
from lora_analysis.training.inputs import input_hashes, input_paths
from lora_analysis.training.manifests import final_metrics, identity, origin
from lora_analysis.training.run_folders import (
    ADAPTER_NAMES,
    CHECKPOINT_NAME,
    EARLIER_CHECKPOINT_NAME,
    FAILURE_NAME,
    KIND,
    METRICS_NAME,
    TRAJECTORY_NAME,
    RunState,
    changes,
    is_in_place,
    run_state,
    unfinished_names,
)

if TYPE_CHECKING:
    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.loop import StepMetrics, Training
    from lora_analysis.training.parallel import Processes
    from lora_analysis.training.settings import Setting


def train_run(
    config: RunConfig,
    folder: Path,
    *,
    device: str = "auto",
    threads: int | None = 1,
    trackers: tuple[str, ...] = (),
    sharded: bool = False,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Train one adapter into its folder, or find it there finished, or go on with it.

    The folder gets ``metrics.jsonl`` (one line per step), the adapter in PEFT's layout (with
    ``method="full"`` the model), below ``trajectory`` those of chosen steps, and last
    ``manifest.json``. An interrupted run goes on from its last checkpoint that is whole; damaged
    files of a finished run are trained anew. A run of another configuration, edited files and
    files of others are refused unless ``force`` is given; a finished run then stays until the new
    one has been trained and takes its place at once. One process at a time is in a folder. On a
    CPU, with one number of threads, the same configuration gives the same bits, interrupted or
    not.

    Parameters
    ----------
    config
        The run.
    folder
        The run's own folder; made where it does not exist.
    device
        ``"auto"`` (cuda, mps, cpu: the first there is), or a device as torch names it.
    threads
        CPU threads that torch may use: the order of sums depends on it. None leaves torch's own.
    trackers
        Programs that are told the metrics as well: ``"tensorboard"``, ``"trackio"``, ``"wandb"``.
    sharded
        Spread the frozen weights over the processes that ``torchrun`` started (FSDP2). Without
        it, each holds them whole. Either way each takes its part of every batch, and the first
        writes the files.
    progress
        Called with every :class:`RunEvent`, in the first process.
    force
        Whether a run of another configuration, edited files of this one, or files of others at
        the names that a run writes may be replaced.

    Returns
    -------
    Path
        ``folder``.

    Raises
    ------
    OccupiedError
        The folder holds something else and ``force`` is not given; or it is, or lies in, an
        input.
    InputError
        The task, the data, the base or the device do not exist, another process is training into
        the folder, or the training diverged.
    TargetError
        The targets name no module of the base.
    MissingExtraError
        The base or the data need a package that is not installed.
    """
    tell = progress or _ignore
    state = run_state(config, folder)
    if state == "finished":
        total = config.loop.steps
        tell(RunEvent(config.name, "skipped", total, total, state=state))
        return folder
    target = _checked_target(config, folder, state, force=force)
    from lora_analysis.training.devices import cpu_threads, resolve_device
    from lora_analysis.training.parallel import joined

    place = resolve_device(device)
    with cpu_threads(threads), joined(place) as processes:
        from lora_analysis.training.settings import prepare

        setting = prepare(config, place, sharded=sharded and processes.count > 1)
        if processes.is_first:
            target.make_folders()
        lock = locked(folder, f"{RECORD_FOLDER}/{KIND}.lock", target=folder)
        with lock if processes.is_first else nullcontext():
            if processes.is_first:
                remove_leftovers(folder, below=True)
                target.begin()
            processes.wait()
            run = _Run(config, target, setting, processes, tell=tell, trackers=trackers)
            run.complete(state)
            processes.wait()
    return folder


def _checked_target(
    config: RunConfig, folder: Path, state: RunState, *, force: bool
) -> OutputFolder:
    """Return the folder to write, having refused what may not be replaced."""
    if state == "changed" and not force:
        message = (
            f"{folder} holds a run of another configuration: {changes(config, folder)}. Choose "
            "another folder, or pass --force (force=True in Python) to train it again."
        )
        raise OccupiedError(message)
    inputs = input_hashes(config)
    facts = {"key": config.key(inputs), "config": config.to_dict(), "inputs": inputs}
    target = OutputFolder(
        folder,
        kind=KIND,
        verb="train",
        run=facts,
        inputs=input_paths(config),
        force=force,
        ignored=(FAILURE_NAME,),
        names=unfinished_names(config),
    )
    target.check()
    begun = read_record(folder, KIND)
    taken = [
        name
        for name in (MANIFEST_NAME, *ADAPTER_NAMES, *target.record.names)
        if (folder / name).exists()
    ]
    if not is_in_place(begun) and taken:
        # Something is to be replaced: the run works in the staging folder until it is complete.
        target.record = replace(target.record, names=())
    return target


class _Run:
    """A run in its folder, from the first file to the manifest."""

    def __init__(
        self,
        config: RunConfig,
        target: OutputFolder,
        setting: Setting,
        processes: Processes,
        *,
        tell: Progress,
        trackers: tuple[str, ...],
    ) -> None:
        from lora_analysis.training.loop import Training
        from lora_analysis.training.trackers import Trackers

        self.config = config
        self.target = target
        in_place = is_in_place(read_record(target.folder, KIND))
        # Where the run works: in its own folder, unless a finished run stays there meanwhile.
        self.folder = target.folder if in_place else target.staging
        if processes.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.setting = setting
        self.first = processes.is_first
        self.tell = tell if self.first else _ignore
        self.inputs = input_hashes(config)
        self.key = config.key(self.inputs)
        self.training: Training = Training(
            setting.model, setting.task, config.loop, seeds=config.seeds, processes=processes
        )
        self.total = self.training.options.steps
        self.trackers = Trackers(trackers if self.first else (), config, target.folder, self._note)
        self.before = 0.0  # seconds of the sessions before this one
        self.started = time.perf_counter()

    def complete(self, state: RunState) -> None:
        """Train from where the folder is to the end."""
        self._clear_or_go_on()
        self._event("started", state=state)
        for note in self.setting.notes:
            self._note(note)
        self._train()
        if not self.first:
            return
        self._finish()
        self.trackers.close()
        self._event("finished")

    def _finish(self) -> None:
        """Write what was trained and what is known of it, and put it in place at once."""
        in_place = self.folder == self.target.folder
        staging = self.target.staging
        if in_place:
            self.target.clear_staging()
        files = self._write_result(staging)
        facts = identity(self.config, self.inputs, self.key) | origin(self.setting)
        facts |= {
            "steps": self.training.step,
            # Beside steps on the way, the adapter is one of them: the last.
            **({"step": self.training.step} if self.config.loop.trajectory else {}),
            "metrics": final_metrics(self.folder / METRICS_NAME, self.config, self.setting),
            "seconds": round(self._seconds(), 2),
            "files": {METRICS_NAME: file_sha256(self.folder / METRICS_NAME)}
            | {name: file_sha256(staging / name) for name in files},
        }
        write_json(staging / MANIFEST_NAME, facts)
        if not in_place:
            for name in (CHECKPOINT_NAME, EARLIER_CHECKPOINT_NAME):
                (staging / name).unlink(missing_ok=True)
        standing = [
            name
            for name in unfinished_names(self.config)
            if in_place and (self.folder / name).is_file() and not name.startswith("checkpoint")
        ]
        self.target.commit(standing)

    def _clear_or_go_on(self) -> None:
        """Take up the last checkpoint that is whole and this run's; else begin anew."""
        from lora_analysis.training.checkpoints import checkpoint_facts, load_checkpoint

        metrics = self.folder / METRICS_NAME
        for name in (CHECKPOINT_NAME, EARLIER_CHECKPOINT_NAME):
            facts = checkpoint_facts(self.folder / name)
            if not facts or facts.get("key") != self.key:
                continue
            if _prefix_sha256(metrics, facts["metrics_bytes"]) != facts["metrics_sha256"]:
                continue
            if not load_checkpoint(self.training, self.folder / name):
                continue
            if self.first:
                with metrics.open("r+b") as stream:
                    stream.truncate(facts["metrics_bytes"])
            self.before = facts["seconds"]
            return
        if self.first:
            for name in unfinished_names(self.config):
                (self.folder / name).unlink(missing_ok=True)

    def _train(self) -> None:
        from lora_analysis.training.checkpoints import checkpoint_facts

        lines = self.folder / METRICS_NAME if self.first else Path(os.devnull)
        try:
            with lines.open("ab") as stream:
                for metrics in self.training:
                    if self.first:
                        stream.write(metrics.to_line())
                        stream.flush()
                    self._after_step(metrics, stream)
        except DivergedError as error:
            place = self.folder / CHECKPOINT_NAME
            saved = checkpoint_facts(place)
            last = f"that of step {saved['step']}, {place}" if saved else "none"
            message = f"{self.config.name}: {error} The last checkpoint: {last}."
            raise DivergedError(message) from error

    def _after_step(self, metrics: StepMetrics, stream: BinaryIO) -> None:
        """Save what this step is chosen for, and tell of it."""
        from lora_analysis.training.checkpoints import save_checkpoint
        from lora_analysis.training.schedules import is_checkpointed

        step = metrics.step
        if self.first and step in self.config.loop.trajectory:
            self._write_passing(step)
        if step and is_checkpointed(step, self.training.options):
            if self.first:
                os.fsync(stream.fileno())  # the checkpoint counts on the lines before it
            lines = self.folder / METRICS_NAME
            facts = {
                "key": self.key,
                "step": step,
                "metrics_bytes": stream.tell(),
                "metrics_sha256": _prefix_sha256(lines, stream.tell()) if self.first else None,
                "seconds": self._seconds(),
            }
            save_checkpoint(self.training, self.folder, facts)
        if not self.first:
            return
        self.trackers.log(metrics)
        self._event(
            "step",
            loss=metrics.loss,
            lr=metrics.lr,
            test_loss=metrics.test_loss,
            test_accuracy=metrics.test_accuracy,
        )

    def _write_result(self, folder: Path, **fields: Any) -> list[str]:
        """Write what was trained; return the names of its files."""
        from lora_analysis.formats.writing import write_adapter_files
        from lora_analysis.lora import extract_adapter

        if self.config.method == "full":
            return self.setting.save(folder)
        adapter = extract_adapter(
            self.setting.model, label=self.config.name, config={**self.setting.fields, **fields}
        )
        return write_adapter_files(adapter, folder)

    def _write_passing(self, step: int) -> None:
        """Write the adapter of a step on the way, with a manifest that says which."""
        place = self.folder / TRAJECTORY_NAME / f"{self.config.name}-step{step}"
        place.mkdir(parents=True, exist_ok=True)
        self._write_result(place)
        facts = identity(self.config, self.inputs, self.key)
        name = f"{self.config.name}-step{step}"
        write_json(place / MANIFEST_NAME, facts | {"name": name, "step": step})

    def _seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def _note(self, text: str) -> None:
        self._event("note", note=text)

    def _event(self, kind: EventKind, **fields: Any) -> None:
        self.tell(RunEvent(self.config.name, kind, self.training.step, self.total, **fields))


def _prefix_sha256(path: Path, size: int) -> str | None:
    """Return the hash of a file's first bytes; None if it has fewer."""
    if not path.is_file() or path.stat().st_size < size:
        return None
    with path.open("rb") as stream:
        return hashlib.sha256(stream.read(size)).hexdigest()


def _ignore(event: RunEvent) -> None:
    """Watch nothing."""
