"""What a loop needs of a task: batches to train and to test on, outputs, a loss, scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_analysis.training.data import Split, TaskData

Batch = Mapping[str, Tensor]
Transform = Callable[[Tensor, torch.Generator], Tensor]
# Of a label: classes and numbers go with an example, next and masked tokens with a position.
Target = Literal["class", "number", "next token", "masked token"]

NO_TARGET = -100  # a label that is no target, as torch and transformers have it
EVALUATION_BATCH = 512


class Task(Protocol):
    """Examples of one task, and how a model is held against them."""

    @property
    def target(self) -> Target:
        """What a label is of."""
        ...

    def __len__(self) -> int:
        """Return how many examples there are to train on."""
        ...

    def training_batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """Return the examples of those rows; what is drawn for them is drawn by the generator."""
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
        What to train and to test on.
    transform
        Augmentation of a batch of inputs, drawing from the generator it is given.
    """

    data: TaskData
    transform: Transform | None = None
    target: Target = "class"

    def __len__(self) -> int:
        return len(self.data.train)

    def training_batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """Return the rows' inputs, transformed, and labels."""
        batch = _rows(self.data.train, rows)
        if self.transform is None:
            return batch
        return {**batch, "inputs": self.transform(batch["inputs"], generator)}

    def test_batches(self) -> Iterator[Batch]:
        """Yield the test split in its order."""
        for first in range(0, len(self.data.test), EVALUATION_BATCH):
            yield _rows(self.data.test, slice(first, first + EVALUATION_BATCH))

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits; those of a transformers output are taken out of it."""
        found: Any = model(batch["inputs"])
        logits: Tensor = getattr(found, "logits", found)
        return logits


def _rows(split: Split, rows: Tensor | slice) -> Batch:
    return {
        "inputs": torch.as_tensor(split.inputs)[rows],
        "labels": torch.as_tensor(split.targets)[rows],
    }


def aligned(outputs: Tensor, labels: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Return one row of outputs per target: shapes ``(n, classes)`` and ``(n,)``.

    Of a causal language model, the output at a position is held against the token after it.
    """
    if target == "number":
        return outputs.reshape(-1, 1), labels.reshape(-1)
    if target == "next token":
        outputs, labels = outputs[:, :-1], labels[:, 1:]
    flat = labels.reshape(-1)
    wanted = flat != NO_TARGET
    return outputs.reshape(-1, outputs.shape[-1])[wanted], flat[wanted]


def targets_in(labels: Tensor, target: Target) -> int:
    """Return how many targets a batch holds: what its summed loss is divided by."""
    if target == "next token":
        labels = labels[:, 1:]
    return labels.numel() if target == "number" else int((labels != NO_TARGET).sum())


def summed_loss(
    outputs: Tensor, labels: Tensor, target: Target, *, label_smoothing: float = 0.0
) -> Tensor:
    """Return the sum of the losses over the targets: cross-entropy, or squared error.

    A sum, so that the mean over several batches, or several processes, is that over all targets
    whatever their number in each.
    """
    rows, wanted = aligned(outputs, labels, target)
    if target == "number":
        return functional.mse_loss(rows[:, 0].float(), wanted.float(), reduction="sum")
    return functional.cross_entropy(
        rows.float(), wanted, reduction="sum", label_smoothing=label_smoothing
    )


@torch.no_grad()
def scores(model: nn.Module, task: Task) -> dict[str, float]:
    """Return how well a model does on the test split, in evaluation mode.

    Returns
    -------
    dict
        ``loss``, the mean over targets without label smoothing; ``accuracy``, the share of
        targets that have the largest logit, or of numbers ``correlation`` (Pearson's).
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    numbers: list[tuple[Tensor, Tensor]] = []
    for batch in task.test_batches():
        there = on_device(batch, device)
        rows, wanted = aligned(task.outputs(model, there), there["labels"], task.target)
        loss += float(summed_loss(rows, wanted, "number" if rows.shape[1] == 1 else "class"))
        count += len(wanted)
        if task.target == "number":
            numbers.append((rows[:, 0].double().cpu(), wanted.double().cpu()))
        else:
            right += int((rows.argmax(dim=-1) == wanted).sum())
    model.train(was_training)
    result = {"loss": loss / max(count, 1)}
    if task.target != "number":
        return result | {"accuracy": right / max(count, 1)}
    return result | _correlation(numbers)


def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of a split's examples whose largest logit is that of their class."""
    return scores(model, ArrayTask(TaskData(train=split, test=split)))["accuracy"]


def _correlation(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return Pearson's correlation; nothing where one side does not vary."""
    found, wanted = (torch.cat(side) for side in zip(*pairs, strict=True))
    value = float(torch.corrcoef(torch.stack([found, wanted]))[0, 1]) if len(found) > 1 else 0.0
    return {"correlation": value} if math.isfinite(value) else {}


def on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return a batch where the model computes."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
