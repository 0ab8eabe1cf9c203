"""Tasks: batches to train and test on, the model's outputs for them, losses and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_analysis.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Batch = Mapping[str, Tensor]
Transform = Callable[[Tensor, torch.Generator], Tensor]
# Kind of a label: classes and numbers belong to an example, tokens to a position.
Target = Literal["class", "number", "next token", "masked token"]

NO_TARGET = -100  # label of a position without target, as in torch and transformers
EVALUATION_BATCH = 512


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Examples ``(n, ...)`` and their targets ``(n, ...)``.

    Raises
    ------
    InputError
        The lengths differ, or there is no example.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]

    def __post_init__(self) -> None:
        if not 0 < len(self.inputs) == len(self.targets):
            message = (
                f"A split needs as many targets as inputs, and at least one; "
                f"found {len(self.inputs)} inputs and {len(self.targets)} targets."
            )
            raise InputError(message)

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, slots=True, eq=False)
class TaskData:
    """Training and test split of a task."""

    train: Split
    test: Split


class Task(Protocol):
    """Examples of one task, and how to compute a model's outputs for them."""

    @property
    def target(self) -> Target:
        """Kind of the labels."""
        ...

    def __len__(self) -> int:
        """Return the number of training examples."""
        ...

    def training_batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """Return the examples in those rows; random choices are drawn from the generator."""
        ...

    def test_batches(self) -> Iterator[Batch]:
        """Yield the whole test split, the same at every call."""
        ...

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits or numbers for a batch."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ArrayTask:
    """Arrays and their classes, for a model that takes a batch and gives logits.

    Parameters
    ----------
    data
        Training and test split.
    transform
        Augmentation of a batch of inputs, called with the inputs and a generator.
    """

    data: TaskData
    transform: Transform | None = None
    target: Target = "class"

    def __len__(self) -> int:
        return len(self.data.train)

    def training_batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """Return the inputs of those rows, transformed, and their labels."""
        batch = _rows(self.data.train, rows)
        if self.transform is None:
            return batch
        return {**batch, "inputs": self.transform(batch["inputs"], generator)}

    def test_batches(self) -> Iterator[Batch]:
        """Yield the test split in its order."""
        for first in range(0, len(self.data.test), EVALUATION_BATCH):
            yield _rows(self.data.test, slice(first, first + EVALUATION_BATCH))

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits, also if it returns an output object of transformers."""
        output: Any = model(batch["inputs"])
        logits: Tensor = getattr(output, "logits", output)
        return logits


def _rows(split: Split, rows: Tensor | slice) -> Batch:
    return {
        "inputs": torch.as_tensor(split.inputs)[rows],
        "labels": torch.as_tensor(split.targets)[rows],
    }


def align_targets(outputs: Tensor, labels: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Return one row of outputs per target: shapes ``(n, classes)`` and ``(n,)``.

    The output of a causal language model at a position is for the token after it.
    """
    if target == "number":
        return outputs.reshape(-1, 1), labels.reshape(-1)
    if target == "next token":
        outputs, labels = outputs[:, :-1], labels[:, 1:]
    flat = labels.reshape(-1)
    has_target = flat != NO_TARGET
    return outputs.reshape(-1, outputs.shape[-1])[has_target], flat[has_target]


def count_targets(labels: Tensor, target: Target) -> int:
    """Return the number of targets in a batch, by which its summed loss is divided."""
    if target == "next token":
        labels = labels[:, 1:]
    return labels.numel() if target == "number" else int((labels != NO_TARGET).sum())


def summed_loss(
    outputs: Tensor, labels: Tensor, target: Target, *, label_smoothing: float = 0.0
) -> Tensor:
    """Return the sum of the losses over the targets: cross-entropy, or squared error.

    With a sum, the mean over several batches or processes is the mean over all targets, even if
    their numbers differ.
    """
    rows, targets = align_targets(outputs, labels, target)
    if target == "number":
        return functional.mse_loss(rows[:, 0].float(), targets.float(), reduction="sum")
    return functional.cross_entropy(
        rows.float(), targets, reduction="sum", label_smoothing=label_smoothing
    )


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> dict[str, float]:
    """Evaluate a model on the test split, in evaluation mode.

    Returns
    -------
    dict
        ``loss``, the mean over targets without label smoothing; ``accuracy``, the fraction of
        targets with the largest logit; or for numbers ``correlation`` (Pearson's, absent if one
        side is constant).
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    numbers: list[tuple[Tensor, Tensor]] = []
    for cpu_batch in task.test_batches():
        batch = move_batch(cpu_batch, device)
        rows, targets = align_targets(task.outputs(model, batch), batch["labels"], task.target)
        loss += float(summed_loss(rows, targets, "number" if rows.shape[1] == 1 else "class"))
        count += len(targets)
        if task.target == "number":
            numbers.append((rows[:, 0].double().cpu(), targets.double().cpu()))
        else:
            right += int((rows.argmax(dim=-1) == targets).sum())
    model.train(was_training)
    result = {"loss": loss / max(count, 1)}
    if task.target != "number":
        return result | {"accuracy": right / max(count, 1)}
    outputs, targets = (torch.cat(side) for side in zip(*numbers, strict=True))
    value = float(torch.corrcoef(torch.stack([outputs, targets]))[0, 1]) if count > 1 else 0.0
    return result | ({"correlation": value} if math.isfinite(value) else {})


def accuracy(model: nn.Module, split: Split) -> float:
    """Return the fraction of a split's examples whose largest logit is that of their class."""
    return evaluate(model, ArrayTask(TaskData(train=split, test=split)))["accuracy"]


def move_batch(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return a batch on a device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
