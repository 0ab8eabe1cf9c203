"""Train one adapter into a folder: metrics, checkpoints, the adapter, and last its manifest."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_analysis import __version__
from lora_analysis.errors import DivergedError, OccupiedError
from lora_analysis.storage.atomic import lock_folder, remove_leftovers
from lora_analysis.storage.outputs import OutputFolder
from lora_analysis.storage.records import RECORD_FOLDER, read_record
from lora_analysis.training.events import EventKind, RunEvent, Trackers
from lora_analysis.training.inputs import (
    MANIFEST_NAME,
    check_torch,
    file_sha256,
    input_hashes,
    input_paths,
    write_json,
)
from lora_analysis.training.run_folders import (
    ADAPTER_NAMES,
    CHECKPOINT_NAME,
    EARLIER_CHECKPOINT_NAME,
    FAILURE_NAME,
    KIND,
    METRICS_NAME,
    TRAJECTORY_NAME,
    RunState,
    describe_changes,
    describe_run,
    is_in_place,
    run_state,
    summarize_metrics,
    unfinished_names,
)

if TYPE_CHECKING:
    from lora_analysis.progress import Progress
    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.devices import Processes
    from lora_analysis.training.loop import StepMetrics, Training
    from lora_analysis.training.run_setup import RunSetup

_CHECKPOINTS = 20  # in a run, if the options do not set their interval
# Packages whose versions a manifest has.
_PACKAGES = ("torch", "numpy", "scikit-learn", "transformers", "tokenizers", "bitsandbytes")


def train_run(
    config: RunConfig,
    folder: Path,
    *,
    device: str = "auto",
    threads: int | None = 1,
    trackers: tuple[str, ...] = (),
    sharded: bool = False,
    progress: Progress | None = None,
    on_event: Callable[[RunEvent], None] | None = None,
    force: bool = False,
) -> Path:
    """Train one adapter into its folder; skip it if it is finished, continue if interrupted.

    The folder gets ``metrics.jsonl`` (one line per step), the adapter in PEFT's format (with
    ``method="full"`` the model), adapters of chosen steps below ``trajectory``, and last
    ``manifest.json``. An interrupted run continues from its last intact checkpoint; a finished
    run with damaged files is trained again. A run of another configuration, edited files and
    other files are refused unless ``force`` is given; a finished run then stays until the new
    one is trained and replaces it at once. One process at a time writes into a folder. On a CPU,
    with a fixed number of threads, the same configuration gives the same bits, interrupted or
    not.

    Parameters
    ----------
    config
        Configuration of the run.
    folder
        Folder of the run; created if it does not exist.
    device
        ``"auto"`` (the first available of cuda, mps, cpu), or a torch device name.
    threads
        CPU threads of torch, on which the order of sums depends. None keeps torch's number.
    trackers
        Experiment trackers: ``"tensorboard"``, ``"trackio"``, ``"wandb"``.
    sharded
        Shard the frozen weights over the processes started by ``torchrun`` (FSDP2); otherwise
        each process holds all of them. Either way each takes a part of every batch, and the first
        writes the files.
    progress
        Called with ("training steps", done, total), in the first process.
    on_event
        Called with every :class:`RunEvent`, in the first process.
    force
        Whether to replace a run of another configuration, edited files, or other files with
        the names that a run writes.

    Returns
    -------
    Path
        ``folder``.

    Raises
    ------
    OccupiedError
        The folder contains something else and ``force`` is not given; or it is, or is inside of,
        an input.
    InputError
        The task, the data, the base or the device do not exist, another process is training into
        the folder, or the training diverged.
    TargetError
        The targets name no module of the base.
    MissingExtraError
        The base or the data need a package that is not installed.
    """

    def send(event: RunEvent) -> None:
        if on_event is not None:
            on_event(event)
        if progress is not None:
            progress("training steps", event.step, event.total)

    state = run_state(config, folder)
    if state == "finished":
        total = config.loop.steps
        send(RunEvent(config.name, "skipped", total, total, state=state))
        return folder
    target = _check_target(config, folder, state, force=force)
    check_torch(config.base)
    from lora_analysis.training.devices import cpu_threads, join_processes, resolve_device

    torch_device = resolve_device(device)
    with cpu_threads(threads), join_processes(torch_device) as processes:
        from lora_analysis.training.run_setup import set_up_run

        setup = set_up_run(config, torch_device, sharded=sharded and processes.count > 1)
        if processes.is_first:
            target.make_folders()
        lock = lock_folder(folder, f"{RECORD_FOLDER}/{KIND}.lock", target=folder)
        with lock if processes.is_first else nullcontext():
            if processes.is_first:
                remove_leftovers(folder, below=True)
                target.begin()
            processes.wait()
            run = _Run(config, target, setup, processes, on_event=send, trackers=trackers)
            run.complete(state)
            processes.wait()
    return folder


def _check_target(config: RunConfig, folder: Path, state: RunState, *, force: bool) -> OutputFolder:
    """Return the folder to write, or raise if it may not be replaced."""
    if state == "changed" and not force:
        message = (
            f"{folder} holds a run of another configuration: {describe_changes(config, folder)}. "
            "Choose another folder, or pass --force (force=True in Python) to train it again."
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
    names = (MANIFEST_NAME, *ADAPTER_NAMES, *target.record.names)
    if not is_in_place(read_record(folder, KIND)) and any((folder / n).exists() for n in names):
        # Files will be replaced: the run works in the staging folder until it is complete.
        target.record = replace(target.record, names=())
    return target


class _Run:
    """A run in its folder, from the first file to the manifest."""

    def __init__(
        self,
        config: RunConfig,
        target: OutputFolder,
        setup: RunSetup,
        processes: Processes,
        *,
        on_event: Callable[[RunEvent], None],
        trackers: tuple[str, ...],
    ) -> None:
        from lora_analysis.training.loop import Training

        self.config = config
        self.target = target
        in_place = is_in_place(read_record(target.folder, KIND))
        # The run works in its own folder, unless a finished run stays there meanwhile.
        self.folder = target.folder if in_place else target.staging
        if processes.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.setup = setup
        self.first = processes.is_first
        self.on_event = on_event
        self.inputs = input_hashes(config)
        self.key = config.key(self.inputs)
        self.training: Training = Training(
            setup.model, setup.task, config.loop, seeds=config.seeds, processes=processes
        )
        self.trackers = Trackers(trackers if self.first else (), config, target.folder, self._note)
        self.before = 0.0  # seconds before this run was interrupted
        self.started = time.perf_counter()

    def complete(self, state: RunState) -> None:
        """Train from the state of the folder to the end."""
        self._restore_or_clear()
        self._send("started", state=state)
        for note in self.setup.notes:
            self._note(note)
        lines = self.folder / METRICS_NAME if self.first else Path(os.devnull)
        try:
            with lines.open("ab") as stream:
                for metrics in self.training:
                    self._record_step(metrics, stream)
        except DivergedError as error:
            from lora_analysis.training.checkpoints import checkpoint_facts

            checkpoint = self.folder / CHECKPOINT_NAME
            facts = checkpoint_facts(checkpoint)
            last = f"that of step {facts['step']}, {checkpoint}" if facts else "none"
            message = f"{self.config.name}: {error} The last checkpoint: {last}."
            raise DivergedError(message) from error
        if self.first:
            self._finish()
            self.trackers.close()
            self._send("finished")

    def _restore_or_clear(self) -> None:
        """Restore the last intact checkpoint of this run; if there is none, remove its files."""
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

    def _record_step(self, metrics: StepMetrics, stream: BinaryIO) -> None:
        """Write the metrics of a step, save what is due after it, and report it."""
        from lora_analysis.training.checkpoints import save_checkpoint

        step = metrics.step
        if self.first:
            stream.write((json.dumps(metrics.to_dict()) + "\n").encode())
            stream.flush()
        if self.first and step in self.config.loop.trajectory:
            name = f"{self.config.name}-step{step}"
            folder = self.folder / TRAJECTORY_NAME / name
            folder.mkdir(parents=True, exist_ok=True)
            self._write_result(folder)
            run = describe_run(self.config, self.inputs, self.key)
            write_json(folder / MANIFEST_NAME, run | {"name": name, "step": step})
        total, every = self.training.options.steps, self.training.options.checkpoint_every
        if every is None:
            every = math.ceil(total / _CHECKPOINTS)
        if every and 0 < step < total and step % every == 0:
            if self.first:
                os.fsync(stream.fileno())  # the checkpoint relies on the lines before it
            lines = self.folder / METRICS_NAME
            facts = {
                "key": self.key,
                "step": step,
                "metrics_bytes": stream.tell(),
                "metrics_sha256": _prefix_sha256(lines, stream.tell()) if self.first else None,
                "seconds": self._seconds(),
            }
            save_checkpoint(self.training, self.folder, facts)
        if self.first:
            self.trackers.log(metrics)
            self._send(
                "step",
                loss=metrics.loss,
                lr=metrics.lr,
                test_loss=metrics.test_loss,
                test_accuracy=metrics.test_accuracy,
            )

    def _finish(self) -> None:
        """Write the result and its manifest, and move both into place at once."""
        import torch

        from lora_analysis.training.loop import steps_per_epoch

        in_place = self.folder == self.target.folder
        staging = self.target.staging
        if in_place:
            self.target.clear_staging()
        files = self._write_result(staging)
        device = str(self.setup.device)
        if self.setup.device.type == "cuda":
            device += f" ({torch.cuda.get_device_name(self.setup.device)})"
        versions = {"python": platform.python_version(), "lora-analysis": __version__}
        for name in _PACKAGES:
            with suppress(PackageNotFoundError):
                versions[name] = version(name)
        epoch = steps_per_epoch(self.config.loop, len(self.setup.task))
        facts = {
            **describe_run(self.config, self.inputs, self.key),
            "modules": list(self.setup.modules),
            "device": device,
            "threads": torch.get_num_threads(),
            "versions": versions,
            **self.setup.facts,
            "steps": self.training.step,
            # With a trajectory, the adapter belongs to its last step.
            **({"step": self.training.step} if self.config.loop.trajectory else {}),
            "metrics": summarize_metrics(self.folder / METRICS_NAME, epoch),
            "seconds": round(self._seconds(), 2),
            "files": {METRICS_NAME: file_sha256(self.folder / METRICS_NAME)}
            | {name: file_sha256(staging / name) for name in files},
        }
        write_json(staging / MANIFEST_NAME, facts)
        if not in_place:
            for name in (CHECKPOINT_NAME, EARLIER_CHECKPOINT_NAME):
                (staging / name).unlink(missing_ok=True)
        remaining = [
            name
            for name in unfinished_names(self.config)
            if in_place and (self.folder / name).is_file() and not name.startswith("checkpoint")
        ]
        self.target.commit(remaining)

    def _write_result(self, folder: Path) -> list[str]:
        """Write the adapter, or the model of a full fine-tune; return the names of its files."""
        from lora_analysis.formats.writing import write_adapter_files
        from lora_analysis.lora import extract_adapter

        if self.config.method == "full":
            return self.setup.save(folder)
        adapter = extract_adapter(
            self.setup.model, label=self.config.name, config=self.setup.fields
        )
        return write_adapter_files(adapter, folder)

    def _seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def _note(self, text: str) -> None:
        self._send("note", note=text)

    def _send(self, kind: EventKind, **fields: Any) -> None:
        if self.first:
            training = self.training
            total = training.options.steps
            self.on_event(RunEvent(self.config.name, kind, training.step, total, **fields))


def _prefix_sha256(path: Path, size: int) -> str | None:
    """Return the hash of a file's first bytes; None if it has fewer."""
    if not path.is_file() or path.stat().st_size < size:
        return None
    with path.open("rb") as stream:
        return hashlib.sha256(stream.read(size)).hexdigest()
