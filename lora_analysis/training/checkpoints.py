"""A training in progress as one file: what is trained, AdamW's momenta, every random stream.

One safetensors file with its few numbers and a hash of its tensors as JSON in the header, written
whole or not at all; the checkpoint before the last is kept next to it. A run killed at any moment
goes on from the last one that is whole, to the same bits on a CPU.
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
from lora_analysis.training.randomness import DropoutStream
from lora_analysis.training.run_folders import (
    CHECKPOINT_NAME,
    EARLIER_CHECKPOINT_NAME,
    NEXT_CHECKPOINT_NAME,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lora_analysis.training.loop import Training

_FACTS = "lora_analysis.training"
_MOMENTA = ("exp_avg", "exp_avg_sq")


def save_checkpoint(training: Training, folder: Path, facts: dict[str, Any]) -> Path:
    """Write where a training is; the checkpoint before it stays as the earlier one.

    Every process of the training has to call it, each for its own stream of dropout; the first
    writes the file.

    Parameters
    ----------
    training
        Between two steps.
    folder
        The run's.
    facts
        What the run wants to know when it goes on: its key, how far its files had come.

    Returns
    -------
    Path
        The file.
    """
    streams = {
        f"{_stream(rank)}/{name}": one
        for name, value in training.dropout.state().items()
        for rank, one in enumerate(training.processes.gathered(value))
    }
    if not training.processes.is_first:
        return folder / CHECKPOINT_NAME
    tensors = {f"parameter/{n}": p.detach() for n, p in training.trained.items()}
    for name, parameter in training.trained.items():
        held = training.optimizer.state[parameter]
        tensors |= {f"{moment}/{name}": held[moment] for moment in _MOMENTA if moment in held}
    tensors |= {f"order/{name}": value for name, value in training.order.state().items()}
    tensors |= streams
    tensors = {name: value.to("cpu").contiguous() for name, value in tensors.items()}
    own = {
        "sha256": _digest(tensors),
        "step": training.step,
        "best": training.best if training.best < float("inf") else None,
        "waited": training.waited,
        "scaler": training.scaler.state_dict(),
        "facts": facts,
    }
    content = safetensors.torch.save(tensors, metadata={_FACTS: json.dumps(own)})
    last = folder / CHECKPOINT_NAME
    written = write_atomic(folder / NEXT_CHECKPOINT_NAME, content)
    if last.is_file():
        last.replace(folder / EARLIER_CHECKPOINT_NAME)
    written.replace(last)
    sync_folder(folder)
    return last


def checkpoint_facts(path: Path) -> dict[str, Any] | None:
    """Return the facts that a checkpoint states; None if it cannot be read."""
    try:
        return dict(_header(path)["facts"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def load_checkpoint(training: Training, path: Path) -> bool:
    """Put a training, made anew with the same arguments, where a checkpoint was taken.

    Returns
    -------
    bool
        False, with the training as it was, if the file is not as it was written.
    """
    try:
        own = _header(path)
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return False
    if own.get("sha256") != _digest(tensors):
        return False
    step = int(own["step"])
    with torch.no_grad():
        for name, parameter in training.trained.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            held = {m: tensors[f"{m}/{name}"] for m in _MOMENTA if f"{m}/{name}" in tensors}
            if held:
                placed = {m: value.to(parameter.device) for m, value in held.items()}
                training.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **placed}
    training.order.go_to(_below("order", tensors))
    rank = training.processes.rank
    if stream := _below(_stream(rank), tensors):
        training.dropout.go_to(stream)
    else:  # there were fewer processes when it was saved: the others draw anew, each its own
        training.dropout = DropoutStream(hash((step, rank)), training.device)
    training.scaler.load_state_dict(own["scaler"])
    training.step = step
    training.best = float("inf") if own["best"] is None else own["best"]
    training.waited = own["waited"]
    return True


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return one hash over the names, types, shapes and numbers of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _stream(rank: int) -> str:
    """Return the place of a process's stream of dropout."""
    return f"dropout{rank}" if rank else "dropout"


def _below(place: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one place, by the rest of their names."""
    start = f"{place}/"
    return {n.removeprefix(start): value for n, value in tensors.items() if n.startswith(start)}


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads((file.metadata() or {})[_FACTS])
    return found
