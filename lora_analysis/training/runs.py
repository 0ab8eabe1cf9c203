"""One adapter, trained into a folder: metrics, adapter, and last of all the manifest."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from lora_analysis import __version__
from lora_analysis.errors import InputError
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.locks import locked
from lora_analysis.training.files import MANIFEST_NAME, file_sha256, write_json
from lora_analysis.training.inputs import base_place, input_hashes, run_key

if TYPE_CHECKING:
    import torch

    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.data import TaskData
    from lora_analysis.training.loop import StepMetrics
    from lora_analysis.training.vit import DigitsViT

METRICS_NAME = "metrics.jsonl"
ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors")

RunState = Literal["missing", "unfinished", "changed", "damaged", "finished"]
EventKind = Literal["skipped", "started", "step", "finished"]


@dataclass(frozen=True, slots=True)
class RunEvent:
    """What a run tells whoever watches it.

    Parameters
    ----------
    label
        Name of the run.
    kind
        ``"skipped"`` where it was finished before; else ``"started"``, then ``"step"`` after each
        step, then ``"finished"``.
    step, total
        Steps done, and in all.
    loss
        Training loss of the step.
    test_accuracy
        Accuracy on the test split, where it was measured at this step.
    state
        What was found in the folder: why a run was started or skipped.
    """

    label: str
    kind: EventKind
    step: int
    total: int
    loss: float | None = None
    test_accuracy: float | None = None
    state: RunState | None = None


Progress = Callable[[RunEvent], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Setting:
    """What a run trains, where, and on what: all that could be missing or wrong."""

    model: DigitsViT
    modules: list[str]
    device: torch.device
    data: TaskData


def run_state(config: RunConfig, folder: Path) -> RunState:
    """Return what the folder of a run holds.

    Parameters
    ----------
    config
        The run that is wanted.
    folder
        The run's own folder.

    Returns
    -------
    RunState
        ``"finished"``: this very run, its files as they were written. ``"missing"``: nothing.
        ``"unfinished"``: no manifest, which is written last. ``"changed"``: another configuration
        or base. ``"damaged"``: a file is absent or not the one that was written, or the manifest
        cannot be read.
    """
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        return "unfinished" if folder.is_dir() and any(folder.iterdir()) else "missing"
    try:
        found = read_json_object(manifest)
    except InputError:
        return "damaged"
    if found.get("key") != run_key(config):
        return "changed"
    wanted = {name: _sha256_or_none(folder / name) for name in (METRICS_NAME, *ADAPTER_NAMES)}
    return "finished" if found.get("files") == wanted else "damaged"


def train_run(
    config: RunConfig,
    folder: Path,
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> Path:
    """Train one adapter into its folder, or find it there finished.

    The folder gets ``metrics.jsonl`` (one line per step), the adapter in PEFT's layout, and last
    ``manifest.json``. Whatever else than this very run it held is trained anew, from the start:
    its files go once it is sure that the new run can begin. One process at a time is in a folder.
    On a CPU one thread is used, and the same configuration gives the same bits.

    Parameters
    ----------
    config
        The run.
    folder
        The run's own folder; made where it does not exist.
    device
        ``"auto"`` (cuda, mps, cpu: the first there is), or a device as torch names it.
    progress
        Called with every :class:`RunEvent`.

    Returns
    -------
    Path
        ``folder``.

    Raises
    ------
    InputError
        The task or the device does not exist, another process is training into the folder, or
        the training diverged.
    TargetError
        The targets name no module of the base.
    MissingExtraError
        The task's data come with a package that is not installed.
    """
    from lora_analysis.training.devices import one_thread

    tell = progress or _ignore
    total = config.loop.steps
    state = run_state(config, folder)
    if state == "finished":
        tell(RunEvent(config.name, "skipped", total, total, state=state))
        return folder
    with one_thread():
        setting = _prepare(config, device)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            for name in (MANIFEST_NAME, *ADAPTER_NAMES, METRICS_NAME):
                (folder / name).unlink(missing_ok=True)
            tell(RunEvent(config.name, "started", 0, total, state=state))
            facts = _identity(config) | _train(config, folder, setting, tell)
            write_json(folder / MANIFEST_NAME, facts)
    tell(RunEvent(config.name, "finished", total, total))
    return folder


def _prepare(config: RunConfig, device: str) -> _Setting:
    """Return device, data, and the base with its LoRA layers."""
    from lora_analysis.lora import add_lora
    from lora_analysis.training.base import read_base
    from lora_analysis.training.devices import resolve_device
    from lora_analysis.training.digits import digits_task

    place = resolve_device(device)
    data = digits_task(config.task)
    model = read_base(base_place(config.base.source))
    modules = add_lora(
        model,
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets,
        seed=config.seed,
        use_rslora=config.use_rslora,
    )
    return _Setting(model.to(place), modules, place, data)


def _train(config: RunConfig, folder: Path, setting: _Setting, tell: Progress) -> dict[str, Any]:
    """Train, write the adapter and the metrics, and return what the manifest says of it."""
    from lora_analysis.formats import write_adapter
    from lora_analysis.lora import extract_adapter

    started = time.perf_counter()
    with (folder / METRICS_NAME).open("w", encoding="utf-8") as stream:
        metrics = _run_loop(config, setting, stream, tell)
    fields = _peft_fields(config, setting.model)
    write_adapter(extract_adapter(setting.model, label=config.name, config=fields), folder)
    return {
        "modules": setting.modules,
        "device": _describe(setting.device),
        "versions": _versions(),
        "metrics": metrics,
        "seconds": round(time.perf_counter() - started, 2),
        "files": {name: file_sha256(folder / name) for name in (METRICS_NAME, *ADAPTER_NAMES)},
    }


def _run_loop(
    config: RunConfig, setting: _Setting, stream: TextIO, tell: Progress
) -> dict[str, float]:
    """Train, writing each step as it comes; return the figures that stand for the run."""
    from lora_analysis.training.loop import training_steps

    seen: list[StepMetrics] = []
    for metrics in training_steps(setting.model, setting.data, config.loop, seed=config.seeds.data):
        stream.write(json.dumps(metrics.to_dict()) + "\n")
        stream.flush()
        seen.append(metrics)
        tell(
            RunEvent(
                config.name,
                "step",
                metrics.step,
                config.loop.steps,
                loss=metrics.loss,
                test_accuracy=metrics.test_accuracy,
            )
        )
    epoch = max(1, len(setting.data.train) // config.loop.batch_size)
    losses = [metrics.loss for metrics in seen if metrics.loss is not None][-epoch:]
    accuracies = [m.test_accuracy for m in seen if m.test_accuracy is not None]
    return {
        "base_accuracy": accuracies[0],
        "accuracy": accuracies[-1],
        "loss": sum(losses) / len(losses),  # training loss, mean over the last epoch
    }


def _identity(config: RunConfig) -> dict[str, Any]:
    inputs = input_hashes(config)
    return {
        "name": config.name,
        "task": config.task,
        "rank": config.rank,
        "seed": config.seed,
        "data_seed": config.seeds.data,
        "config": config.to_dict(),
        "base_sha256": inputs["base"],
        "key": config.key(inputs),
    }


def _peft_fields(config: RunConfig, model: DigitsViT) -> dict[str, Any]:
    return {
        "base_model_name_or_path": model.config.to_dict()["model_type"],
        "target_modules": list(config.targets),
        "use_rslora": config.use_rslora,
    }


def _versions() -> dict[str, str]:
    own = {"python": platform.python_version(), "lora-analysis": __version__}
    return own | {name: version(name) for name in ("torch", "numpy", "scikit-learn")}


def _describe(device: torch.device) -> str:
    import torch

    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def _sha256_or_none(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None


def _ignore(event: RunEvent) -> None:
    """Watch nothing."""
