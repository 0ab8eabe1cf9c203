"""The training loop: AdamW on whatever parameters of a model are trainable."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_analysis.errors import DivergedError, InputError
from lora_analysis.training.config import Seeds
from lora_analysis.training.options import LoopOptions
from lora_analysis.training.parallel import ALONE, Processes
from lora_analysis.training.randomness import DropoutStream, Order
from lora_analysis.training.schedules import is_evaluated, learning_rate, resolved
from lora_analysis.training.tasks import Batch, Task, on_device, scores, summed_loss, targets_in

_ZERO = Seeds(0, 0, 0)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one optimizer step showed; the test's figures are None where it was not looked at.

    Step 0 is the model before training: it has no loss of its own.
    """

    step: int
    loss: float | None = None
    lr: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    test_correlation: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def to_line(self) -> bytes:
        """Return the fields that have a value as a line of JSON."""
        return (json.dumps(self.to_dict()) + "\n").encode()


class Training:
    """A model's training in progress, one optimizer step per item taken.

    Only parameters that require a gradient are trained and have optimizer state. Examples are
    drawn without replacement until fewer than a step's are left, then shuffled anew. A step's
    gradient is that of the mean over all its targets, in however many batches and processes they
    come. On a CPU with a fixed number of threads, the same arguments give the same bits, and so
    does going on from a saved state.

    Parameters
    ----------
    model
        Computes where its parameters lie. Changed in place.
    task
        What to train and to test on.
    options
        Of the loop.
    seeds
        Of the order of the examples, and of dropout.
    processes
        Those that train this model together, each on a part of every batch.

    Raises
    ------
    InputError
        The model has no trainable parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        options: LoopOptions,
        *,
        seeds: Seeds = _ZERO,
        processes: Processes = ALONE,
    ) -> None:
        self.model = model
        self.task = task
        self.options = resolved(options, len(task))
        self.processes = processes
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            message = "The model has no parameter to train: all are frozen. Add LoRA layers first."
            raise InputError(message)
        self.device = next(iter(self.trained.values())).device
        self.optimizer = torch.optim.AdamW(
            list(self.trained.values()),
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
            weight_decay=options.weight_decay,
        )
        half = options.autocast == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.order = Order(
            len(task), options.batch_size * options.gradient_accumulation_steps, seeds.data
        )
        self.dropout = DropoutStream(seeds.dropout + processes.rank, self.device)
        self.step = 0
        self.best = math.inf
        self.waited = 0

    def __iter__(self) -> Iterator[StepMetrics]:
        """Train on; step 0, the model before training, comes first where there was no step yet.

        Raises
        ------
        DivergedError
            The loss or the gradient is no longer finite.
        """
        if self.step == 0:
            yield self._tested(StepMetrics(0))
        self._to_training_mode()
        while self.step < self.options.steps and not self.has_stopped:
            self.step += 1
            rate = learning_rate(self.step, self.options)
            metrics = StepMetrics(self.step, self._one_step(rate), rate)
            if is_evaluated(self.step, self.options):
                metrics = self._tested(metrics)
            yield metrics

    @property
    def has_stopped(self) -> bool:
        """Whether the test loss has not fallen for longer than the options' patience."""
        return self.options.patience is not None and self.waited >= self.options.patience

    def _to_training_mode(self) -> None:
        """Let dropout act, and frozen batch norms keep their statistics: no adapter holds them."""
        self.model.train()
        for module in self.model.modules():
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if is_norm and not any(p.requires_grad for p in module.parameters()):
                module.eval()

    def _one_step(self, rate: float) -> float:
        """Take an optimizer step; return the mean loss over its targets."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = next(self.order)
        batches = self._batches(rows)
        labels = [batch["labels"] for batch in batches]
        count = sum(targets_in(one, self.task.target) for one in labels)
        count = max(1, self.processes.total(count))
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        with self.dropout:
            for batch in batches:
                part = self._loss(on_device(batch, self.device)) / count
                self.scaler.scale(part).backward()  # type: ignore[no-untyped-call]
                loss += part.detach()
        self.processes.sum_gradients(self.trained.values())
        self.scaler.unscale_(self.optimizer)
        norm = self._clipped()
        mean = float(self.processes.summed(loss))
        self._refuse_divergence(mean, norm, rate, rows)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return mean

    def _batches(self, rows: Tensor) -> list[Batch]:
        """Return this process's part of a step, in batches."""
        step = self.task.training_batch(rows, self.order.generator)
        parts = torch.split(torch.arange(len(rows)), self.options.batch_size)
        mine = [part[self.processes.rank :: self.processes.count] for part in parts]
        return [{name: value[part] for name, value in step.items()} for part in mine if len(part)]

    def _loss(self, batch: Batch) -> Tensor:
        with self._precision():
            outputs = self.task.outputs(self.model, batch)
        return summed_loss(
            outputs,
            batch["labels"],
            self.task.target,
            label_smoothing=self.options.label_smoothing,
        )

    def _precision(self) -> AbstractContextManager[object]:
        if self.options.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.options.autocast))

    def _clipped(self) -> Tensor:
        """Scale the gradient down to the largest norm allowed; return the norm it had."""
        limit = math.inf if self.options.max_grad_norm is None else self.options.max_grad_norm
        return nn.utils.clip_grad_norm_(list(self.trained.values()), limit)

    def _refuse_divergence(self, loss: float, norm: Tensor, rate: float, rows: Tensor) -> None:
        # A scaler leaves out steps whose gradient overflowed, and then scales less.
        what = f"the loss at step {self.step} is {loss}"
        if math.isfinite(loss) and not self.scaler.is_enabled() and not bool(norm.isfinite()):
            what = f"the loss at step {self.step} is {loss:.4g}, but its gradient {float(norm)}"
        elif math.isfinite(loss):
            return
        shown = ", ".join(map(str, rows[:8].tolist())) + (", …" if len(rows) > 8 else "")
        message = (
            f"Training diverged: {what} at a learning rate of {rate:.3g}, on the training examples "
            f"{shown}. Use a smaller lr or alpha, or look at those examples."
        )
        raise DivergedError(message)

    def _tested(self, metrics: StepMetrics) -> StepMetrics:
        """Return the metrics with the test's figures, and note whether it got better."""
        with self._precision():
            found = scores(self.model, self.task)
        self._to_training_mode()
        if metrics.step:
            self.waited = 0 if found["loss"] < self.best else self.waited + 1
        self.best = min(self.best, found["loss"])
        own = asdict(metrics)
        return StepMetrics(**own | {f"test_{name}": value for name, value in found.items()})


def training_steps(
    model: nn.Module, task: Task, options: LoopOptions, *, seeds: Seeds = _ZERO
) -> Iterator[StepMetrics]:
    """Train a model in place and yield what each step showed; see :class:`Training`."""
    yield from Training(model, task, options, seeds=seeds)
