"""The training loop: AdamW on whatever parameters of a model are trainable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_analysis.errors import InputError

if TYPE_CHECKING:
    from lora_analysis.training.data import Split, TaskData
    from lora_analysis.training.options import LoopOptions

Loss = Callable[[Tensor, Tensor], Tensor]
Transform = Callable[[Tensor, torch.Generator], Tensor]

_EVALUATION_BATCH = 512


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one optimiser step showed; ``test_accuracy`` is None where the test was not looked at.

    Step 0 is the model before training: it has an accuracy alone.
    """

    step: int
    loss: float | None = None
    lr: float | None = None
    test_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        return {name: v for name in self.__slots__ if (v := getattr(self, name)) is not None}


def training_steps(
    model: nn.Module,
    data: TaskData,
    options: LoopOptions,
    *,
    seed: int = 0,
    loss: Loss = functional.cross_entropy,
    transform: Transform | None = None,
) -> Iterator[StepMetrics]:
    """Train a model in place, one optimiser step per item taken.

    Only parameters that require a gradient are trained and have optimiser state. Examples are
    drawn without replacement until fewer than a batch are left, then shuffled anew. On a CPU with
    a fixed number of threads, the same model, data and options give the same bits.

    Parameters
    ----------
    model
        Takes a batch of inputs, gives what ``loss`` takes; it computes where its parameters lie.
    data
        What to train and to test on.
    options
        Steps, batch size and optimiser.
    seed
        Of the order of the examples, and of their augmentation.
    loss
        Mean loss of outputs and targets.
    transform
        Augmentation of a batch of inputs, drawing from the generator it is given.

    Yields
    ------
    StepMetrics
        Step 0 first, the model before training; then one per step.

    Raises
    ------
    InputError
        The model has no trainable parameter, or the loss is no longer finite.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        message = "The model has no parameter to train: all are frozen. Add LoRA layers first."
        raise InputError(message)
    device = trained[0].device
    optimizer = torch.optim.AdamW(
        trained, lr=options.lr, betas=(0.9, options.beta2), weight_decay=options.weight_decay
    )
    inputs, targets = _on_device(data.train, device)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(len(data.train), options.batch_size, generator)
    yield StepMetrics(0, test_accuracy=accuracy(model, data.test))
    model.train()
    for step in range(1, options.steps + 1):
        rate = learning_rate(step, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = next(batches).to(device)
        batch = inputs[rows] if transform is None else transform(inputs[rows], generator)
        value = loss(model(batch), targets[rows])
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if options.clip is not None:
            nn.utils.clip_grad_norm_(trained, options.clip)
        optimizer.step()
        measured = accuracy(model, data.test) if _evaluated_at(step, options) else None
        yield StepMetrics(step, _finite(value, step, rate), rate, measured)


def learning_rate(step: int, options: LoopOptions) -> float:
    """Return the rate of a step, counted from 1: linear warm-up, then half a cosine to zero."""
    rising = min(1.0, step / options.warmup) if options.warmup else 1.0
    falling = 0.5 * (1 + math.cos(math.pi * (step - 1) / options.steps))
    return options.lr * rising * falling


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of examples whose largest logit is that of their target."""
    device = next(model.parameters()).device
    inputs, targets = _on_device(split, device)
    was_training = model.training
    model.eval()
    right = 0
    for first in range(0, len(split), _EVALUATION_BATCH):
        rows = slice(first, first + _EVALUATION_BATCH)
        right += int((model(inputs[rows]).argmax(dim=-1) == targets[rows]).sum())
    model.train(was_training)
    return right / len(split)


def _on_device(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.as_tensor(split.inputs, device=device),
        torch.as_tensor(split.targets, device=device),
    )


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield row numbers without end: a new order whenever fewer than a batch are left."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        for first in range(0, count - size + 1, size):
            yield order[first : first + size]


def _evaluated_at(step: int, options: LoopOptions) -> bool:
    """Say whether a step is one of ``options.evaluations`` evenly spaced ones; the last one is."""
    done = step * options.evaluations // options.steps
    return done > (step - 1) * options.evaluations // options.steps


def _finite(value: Tensor, step: int, rate: float) -> float:
    number = float(value.detach())
    if not math.isfinite(number):
        message = (
            f"Training diverged: the loss at step {step} is {number} at a learning rate of "
            f"{rate:.3g}. Use a smaller lr or alpha."
        )
        raise InputError(message)
    return number
