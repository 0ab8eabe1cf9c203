"""When things happen in a run: how many steps, at which rate, and where the test is looked at."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_analysis.training.options import LoopOptions

_CHECKPOINTS = 20  # in a run, where the options do not say


def resolved(options: LoopOptions, examples: int) -> LoopOptions:
    """Return the options with ``steps`` and ``warmup_steps`` resolved to numbers of steps."""
    steps = options.steps
    if options.epochs is not None:
        steps = max(1, math.ceil(options.epochs * steps_of_epoch(options, examples)))
    warmup = options.warmup_steps
    if options.warmup_ratio is not None:
        warmup = math.ceil(options.warmup_ratio * steps)
    return replace(options, steps=steps, warmup_steps=warmup, epochs=None, warmup_ratio=None)


def steps_of_epoch(options: LoopOptions, examples: int) -> int:
    """Return the optimizer steps of one pass over the data."""
    return max(1, examples // (options.batch_size * options.gradient_accumulation_steps))


def learning_rate(step: int, options: LoopOptions) -> float:
    """Return the rate of a step, counted from 1: linear warm-up, times the schedule's fall."""
    rising = min(1.0, step / options.warmup_steps) if options.warmup_steps else 1.0
    return options.lr * rising * _falling(step, options)


def _falling(step: int, options: LoopOptions) -> float:
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "linear":  # from the end of the warm-up, as transformers has it
        rest = max(1, options.steps - options.warmup_steps)
        return min(1.0, max(0.0, (options.steps - step + 1) / rest))
    return 0.5 * (1 + math.cos(math.pi * (step - 1) / options.steps))


def is_evaluated(step: int, options: LoopOptions) -> bool:
    """Say whether a step is one of ``options.evaluations`` evenly spaced ones; the last one is."""
    done = step * options.evaluations // options.steps
    return done > (step - 1) * options.evaluations // options.steps


def is_checkpointed(step: int, options: LoopOptions) -> bool:
    """Say whether a run can go on from this step; at the last one it has nothing left to do."""
    every = options.checkpoint_every
    if every is None:
        every = math.ceil(options.steps / _CHECKPOINTS)
    return every > 0 and step % every == 0 and step < options.steps
