"""Checkpoints of a training: trained parameters, AdamW's moments and every random stream.

A checkpoint is one safetensors file, with its few numbers and a hash of its tensors as JSON in the
header, written whole or not at all; the previous one stays next to it. A run that is killed at any
moment continues from the last intact one, to the same bits on a CPU.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from lora_analysis.storage.atomic import sync_folder, write_atomic
from lora_analysis.training.loop import DropoutStream
from lora_analysis.training.run_folders import (
    CHECKPOINT_NAME,
    EARLIER_CHECKPOINT_NAME,
    NEXT_CHECKPOINT_NAME,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lora_analysis.training.loop import Training

_METADATA_KEY = "lora_analysis.training"
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Errors of a file that is missing, damaged or not a checkpoint.
_UNREADABLE = (OSError, SafetensorError, KeyError, TypeError, ValueError)


def save_checkpoint(training: Training, folder: Path, facts: dict[str, Any]) -> None:
    """Write the state of a training; the last checkpoint stays as the earlier one.

    All processes of the training must call it, as each has its own dropout stream; the first one
    writes the file.

    Parameters
    ----------
    training
        Training between two steps.
    folder
        Folder of the run.
    facts
        Facts that the run needs to continue: its key, the length of its files.
    """
    streams = {
        f"{_stream_name(rank)}/{name}": state
        for name, value in training.dropout.state().items()
        for rank, state in enumerate(training.processes.gather_tensor(value))
    }
    if not training.processes.is_first:
        return
    tensors = {f"parameter/{n}": p.detach() for n, p in training.trained.items()}
    for name, parameter in training.trained.items():
        state = training.optimizer.state[parameter]
        tensors |= {f"{moment}/{name}": state[moment] for moment in _MOMENTS if moment in state}
    tensors |= {f"order/{name}": value for name, value in training.order.state().items()}
    tensors |= streams
    tensors = {name: value.to("cpu").contiguous() for name, value in tensors.items()}
    numbers = {
        "sha256": _digest(tensors),
        "step": training.step,
        "best": training.best if training.best < float("inf") else None,
        "waited": training.waited,
        "scaler": training.scaler.state_dict(),
        "facts": facts,
    }
    content = safetensors.torch.save(tensors, metadata={_METADATA_KEY: json.dumps(numbers)})
    last = folder / CHECKPOINT_NAME
    written = write_atomic(folder / NEXT_CHECKPOINT_NAME, content)
    if last.is_file():
        last.replace(folder / EARLIER_CHECKPOINT_NAME)
    written.replace(last)
    sync_folder(folder)


def checkpoint_facts(path: Path) -> dict[str, Any] | None:
    """Return the facts in a checkpoint; None if it cannot be read."""
    try:
        return dict(_read_numbers(path)["facts"])
    except _UNREADABLE:
        return None


def load_checkpoint(training: Training, path: Path) -> bool:
    """Restore the state of a checkpoint in a new training with the same arguments.

    Returns
    -------
    bool
        False, with the training unchanged, if the file is damaged.
    """
    try:
        numbers = _read_numbers(path)
        tensors = safetensors.torch.load_file(path)
    except _UNREADABLE:
        return False
    if numbers.get("sha256") != _digest(tensors):
        return False
    step = int(numbers["step"])
    with torch.no_grad():
        for name, parameter in training.trained.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            moments = {
                moment: tensors[f"{moment}/{name}"].to(parameter.device)
                for moment in _MOMENTS
                if f"{moment}/{name}" in tensors
            }
            if moments:
                state = {"step": torch.tensor(float(step)), **moments}
                training.optimizer.state[parameter] = state
    training.order.load_state(_with_prefix("order", tensors))
    rank = training.processes.rank
    if stream := _with_prefix(_stream_name(rank), tensors):
        training.dropout.load_state(stream)
    else:  # it was saved by fewer processes: this one starts a stream of its own
        training.dropout = DropoutStream(hash((step, rank)), training.device)
    training.scaler.load_state_dict(numbers["scaler"])
    training.step = step
    training.best = float("inf") if numbers["best"] is None else numbers["best"]
    training.waited = numbers["waited"]
    return True


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return one hash of the names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _stream_name(rank: int) -> str:
    """Return the prefix of the dropout stream of a process."""
    return f"dropout{rank}" if rank else "dropout"


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a prefix, by the rest of their names."""
    start = f"{prefix}/"
    return {n.removeprefix(start): value for n, value in tensors.items() if n.startswith(start)}


def _read_numbers(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        numbers: dict[str, Any] = json.loads((file.metadata() or {})[_METADATA_KEY])
    return numbers
