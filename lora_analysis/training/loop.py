"""Training loop: AdamW on the trainable parameters of a model, its schedule and its metrics.

Dropout and the order of examples draw from random streams whose states can be saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_analysis.errors import DivergedError, InputError
from lora_analysis.training.config import Seeds
from lora_analysis.training.devices import ALONE, Processes
from lora_analysis.training.options import LoopOptions
from lora_analysis.training.tasks import (
    Task,
    count_targets,
    evaluate,
    move_batch,
    summed_loss,
)

if TYPE_CHECKING:
    from types import TracebackType

_ZERO = Seeds(0, 0, 0)


class DropoutStream:
    """State of torch's global generators for the dropout of a run.

    Dropout draws from the global generator and accepts no other. Inside of ``with stream:`` that
    generator is in the state of the stream; outside, in the caller's.

    Parameters
    ----------
    seed
        Seed of the stream.
    device
        Device of the model: on a GPU its generator is included.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self._states = {"cpu": torch.Generator().manual_seed(seed).get_state()}
        if self.device:
            self._states["cuda"] = torch.Generator(self.device).manual_seed(seed).get_state()
        self._caller_states: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        self._caller_states = self._current()
        self._set(self._states)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._states = self._current()
        self._set(self._caller_states)

    def state(self) -> dict[str, Tensor]:
        """Return the state of the stream, as bytes by device."""
        return dict(self._states)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state."""
        self._states = dict(state)

    def _current(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device:
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


class Order:
    """Endless iterator over batches of rows, shuffled again when fewer than a batch are left.

    Parameters
    ----------
    count
        Number of rows.
    size
        Rows per batch, at most all of them.
    seed
        Seed of the generator, from which augmentation draws as well.
    """

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.size = min(size, count)
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = torch.empty(0, dtype=torch.int64)
        self.position = 0
        self.count = count

    def __next__(self) -> Tensor:
        """Return the next batch's rows."""
        if self.position + self.size > len(self.rows):
            self.rows = torch.randperm(self.count, generator=self.generator)
            self.position = 0
        first = self.position
        self.position += self.size
        return self.rows[first : self.position]

    def state(self) -> dict[str, Tensor]:
        """Return the current order, the position in it, and the state of the generator."""
        return {
            "rows": self.rows,
            "position": torch.tensor(self.position),
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state."""
        self.rows = state["rows"]
        self.position = int(state["position"])
        self.generator.set_state(state["generator"])


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Metrics of one optimizer step; those of the test split are None if it was not evaluated.

    Step 0 is the model before training, without a training loss.
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


def steps_per_epoch(options: LoopOptions, examples: int) -> int:
    """Return the number of optimizer steps of one pass over the data."""
    return max(1, examples // (options.batch_size * options.gradient_accumulation_steps))


def learning_rate(step: int, options: LoopOptions) -> float:
    """Return the learning rate of a step, counted from 1: linear warmup times the schedule."""
    warmup = min(1.0, step / options.warmup_steps) if options.warmup_steps else 1.0
    if options.schedule == "constant":
        decay = 1.0
    elif options.schedule == "linear":  # from the end of the warmup, as in transformers
        rest = max(1, options.steps - options.warmup_steps)
        decay = min(1.0, max(0.0, (options.steps - step + 1) / rest))
    else:
        decay = 0.5 * (1 + math.cos(math.pi * (step - 1) / options.steps))
    return options.lr * warmup * decay


class Training:
    """A model's training in progress: an iterator over optimizer steps.

    Only parameters that require a gradient are trained and have optimizer state. Examples are
    drawn without replacement until too few for a step are left, then shuffled again. The gradient
    of a step is that of the mean over all its targets, for any number of batches and processes.
    On a CPU with a fixed number of threads, the same arguments give the same bits, also if the
    training continues from a saved state.

    Parameters
    ----------
    model
        Model on the device where it is trained. Changed in place.
    task
        Training and test data.
    options
        Options of the loop.
    seeds
        Seeds of the order of the examples, and of dropout.
    processes
        Processes that train this model together, each on a part of every batch.

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
        # Passes over the data and a share of warmup become numbers of steps.
        steps, warmup = options.steps, options.warmup_steps
        if options.epochs is not None:
            steps = max(1, math.ceil(options.epochs * steps_per_epoch(options, len(task))))
        if options.warmup_ratio is not None:
            warmup = math.ceil(options.warmup_ratio * steps)
        self.options = replace(
            options, steps=steps, warmup_steps=warmup, epochs=None, warmup_ratio=None
        )
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
        is_half = options.autocast == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_half)
        self.order = Order(
            len(task), options.batch_size * options.gradient_accumulation_steps, seeds.data
        )
        self.dropout = DropoutStream(seeds.dropout + processes.rank, self.device)
        self.step = 0
        self.best = math.inf
        self.waited = 0

    def __iter__(self) -> Iterator[StepMetrics]:
        """Train and yield the metrics of each step, beginning with step 0 before training.

        Raises
        ------
        DivergedError
            The loss or the gradient is no longer finite.
        """
        options = self.options
        if self.step == 0:
            yield self._evaluate(StepMetrics(0))
        self._set_training_mode()
        while self.step < options.steps:
            if options.patience is not None and self.waited >= options.patience:
                return
            self.step += 1
            rate = learning_rate(self.step, options)
            metrics = StepMetrics(self.step, self._take_step(rate), rate)
            # Evaluations are evenly spaced, the last one after the last step.
            done = self.step * options.evaluations // options.steps
            if done > (self.step - 1) * options.evaluations // options.steps:
                metrics = self._evaluate(metrics)
            yield metrics

    def _set_training_mode(self) -> None:
        """Enable dropout; frozen batch norms keep their statistics, as no adapter stores them."""
        self.model.train()
        for module in self.model.modules():
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if is_norm and not any(p.requires_grad for p in module.parameters()):
                module.eval()

    def _take_step(self, rate: float) -> float:
        """Take an optimizer step; return the mean loss over its targets."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = next(self.order)
        # This process's part of the step, in batches.
        step = self.task.training_batch(rows, self.order.generator)
        parts = torch.split(torch.arange(len(rows)), self.options.batch_size)
        mine = [part[self.processes.rank :: self.processes.count] for part in parts]
        batches = [
            {name: value[part] for name, value in step.items()} for part in mine if len(part)
        ]
        count = sum(count_targets(batch["labels"], self.task.target) for batch in batches)
        count = max(1, self.processes.total(count))
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        with self.dropout:
            for cpu_batch in batches:
                batch = move_batch(cpu_batch, self.device)
                with self._precision():
                    outputs = self.task.outputs(self.model, batch)
                smoothing = self.options.label_smoothing
                total = summed_loss(
                    outputs, batch["labels"], self.task.target, label_smoothing=smoothing
                )
                part = total / count
                self.scaler.scale(part).backward()  # type: ignore[no-untyped-call]
                loss += part.detach()
        self.processes.sum_gradients(self.trained.values())
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.options.max_grad_norm is None else self.options.max_grad_norm
        norm = nn.utils.clip_grad_norm_(list(self.trained.values()), limit)  # before clipping
        mean = float(self.processes.sum_tensor(loss))
        # A scaler skips steps whose gradient overflowed, and reduces its scale.
        has_overflow = not self.scaler.is_enabled() and not bool(norm.isfinite())
        if not math.isfinite(mean) or has_overflow:
            problem = f"the loss at step {self.step} is {mean}"
            if math.isfinite(mean):
                problem = (
                    f"the loss at step {self.step} is {mean:.4g}, but its gradient {float(norm)}"
                )
            examples = ", ".join(map(str, rows[:8].tolist())) + (", …" if len(rows) > 8 else "")
            message = (
                f"Training diverged: {problem} at a learning rate of {rate:.3g}, on the training "
                f"examples {examples}. Use a smaller lr or alpha, or inspect those examples."
            )
            raise DivergedError(message)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return mean

    def _precision(self) -> AbstractContextManager[object]:
        if self.options.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.options.autocast))

    def _evaluate(self, metrics: StepMetrics) -> StepMetrics:
        """Return the metrics with those of the test split, and count evaluations in vain."""
        with self._precision():
            result = evaluate(self.model, self.task)
        self._set_training_mode()
        if metrics.step:
            self.waited = 0 if result["loss"] < self.best else self.waited + 1
        self.best = min(self.best, result["loss"])
        test = {f"test_{name}": value for name, value in result.items()}
        return StepMetrics(**asdict(metrics) | test)
