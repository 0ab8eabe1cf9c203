"""One adapter, trained into a folder: metrics, adapter, and last of all the manifest."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_analysis.errors import DivergedError
from lora_analysis.storage.locks import locked
from lora_analysis.training.events import EventKind, Progress, RunEvent
from lora_analysis.training.files import MANIFEST_NAME, file_sha256, write_json
from lora_analysis.training.inputs import input_hashes
from lora_analysis.training.manifests import final_metrics, identity, origin
from lora_analysis.training.run_folders import (
    ADAPTER_NAMES,
    CHECKPOINT_NAME,
    METRICS_NAME,
    OWN_FILES,
    TRAJECTORY_NAME,
    RunState,
    run_state,
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
) -> Path:
    """Train one adapter into its folder, or find it there finished, or go on with it.

    The folder gets ``metrics.jsonl`` (one line per step), the adapter in PEFT's layout (with
    ``method="full"`` the model), below ``trajectory`` those of chosen steps, and last
    ``manifest.json``. An interrupted run goes on from its last checkpoint. Whatever else than
    this very run the folder held is trained anew, from the start: its files go once it is sure
    that the new run can begin. One process at a time is in a folder. On a CPU, with one number of
    threads, the same configuration gives the same bits, interrupted or not.

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

    Returns
    -------
    Path
        ``folder``.

    Raises
    ------
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
    from lora_analysis.training.devices import cpu_threads, resolve_device
    from lora_analysis.training.parallel import joined

    place = resolve_device(device)
    with cpu_threads(threads), joined(place) as processes:
        from lora_analysis.training.settings import prepare

        setting = prepare(config, place, sharded=sharded and processes.count > 1)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) if processes.is_first else nullcontext():
            processes.wait()
            run = _Run(config, folder, setting, processes, tell=tell, trackers=trackers)
            run.complete(state)
            processes.wait()
    return folder


class _Run:
    """A run in its folder, from the first file to the manifest."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        setting: Setting,
        processes: Processes,
        *,
        tell: Progress,
        trackers: tuple[str, ...],
    ) -> None:
        from lora_analysis.training.loop import Training
        from lora_analysis.training.trackers import Trackers

        self.config = config
        self.folder = folder
        self.setting = setting
        self.first = processes.is_first
        self.tell = tell if self.first else _ignore
        self.inputs = input_hashes(config)
        self.key = config.key(self.inputs)
        self.training: Training = Training(
            setting.model, setting.task, config.loop, seeds=config.seeds, processes=processes
        )
        self.total = self.training.options.steps
        self.trackers = Trackers(trackers if self.first else (), config, folder, self._note)
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
        files = [METRICS_NAME, *self._write_result(self.folder)]
        facts = identity(self.config, self.inputs, self.key) | origin(self.setting)
        facts |= {
            "steps": self.training.step,
            # Beside steps on the way, the adapter is one of them: the last.
            **({"step": self.training.step} if self.config.loop.trajectory else {}),
            "metrics": final_metrics(self.folder / METRICS_NAME, self.config, self.setting),
            "seconds": round(self._seconds(), 2),
            "files": {name: file_sha256(self.folder / name) for name in files},
        }
        write_json(self.folder / MANIFEST_NAME, facts)
        (self.folder / CHECKPOINT_NAME).unlink(missing_ok=True)
        self.trackers.close()
        self._event("finished")

    def _clear_or_go_on(self) -> None:
        """Take up the checkpoint where it is this run's; else remove what the folder holds."""
        from lora_analysis.training.checkpoints import checkpoint_facts, load_checkpoint

        facts = checkpoint_facts(self.folder)
        metrics = self.folder / METRICS_NAME
        if facts and facts.get("key") == self.key and _size(metrics) >= facts["metrics_bytes"]:
            load_checkpoint(self.training, self.folder)
            if self.first:
                with metrics.open("r+b") as stream:
                    stream.truncate(facts["metrics_bytes"])
            self.before = facts["seconds"]
            return
        if not self.first:
            return
        for name in OWN_FILES:
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / TRAJECTORY_NAME, ignore_errors=True)

    def _train(self) -> None:
        from lora_analysis.training.checkpoints import checkpoint_facts

        lines = self.folder / METRICS_NAME if self.first else Path(os.devnull)
        try:
            with lines.open("ab") as stream:
                for metrics in self.training:
                    if self.first:
                        stream.write(metrics.to_line())
                        stream.flush()
                    self._after_step(metrics, stream.tell())
        except DivergedError as error:
            saved = checkpoint_facts(self.folder)
            place = self.folder / CHECKPOINT_NAME
            last = f"that of step {saved['step']}, {place}" if saved else "none"
            message = f"{self.config.name}: {error} The last checkpoint: {last}."
            raise DivergedError(message) from error

    def _after_step(self, metrics: StepMetrics, metrics_bytes: int) -> None:
        """Save what this step is chosen for, and tell of it."""
        from lora_analysis.training.checkpoints import save_checkpoint
        from lora_analysis.training.schedules import is_checkpointed

        step = metrics.step
        if self.first and step in self.config.loop.trajectory:
            self._write_passing(step)
        if step and is_checkpointed(step, self.training.options):
            facts = {
                "key": self.key,
                "step": step,
                "metrics_bytes": metrics_bytes,
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
        from lora_analysis.formats import write_adapter
        from lora_analysis.lora import extract_adapter

        if self.config.method == "full":
            return self.setting.save(folder)
        adapter = extract_adapter(
            self.setting.model, label=self.config.name, config={**self.setting.fields, **fields}
        )
        write_adapter(adapter, folder)
        return list(ADAPTER_NAMES)

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


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _ignore(event: RunEvent) -> None:
    """Watch nothing."""
