"""Training of adapters: base models, tasks, the training loop, and sweeps that can be resumed.

Each run is a folder with the adapter in PEFT's format, so that a trained adapter is read like any
other. Nothing in this package analyzes subspaces, draws or prints. torch is imported by the
modules that compute with it (``digits_vit``, ``loop``, ``run_setup``, …), not by this one, by
``config`` or by ``sweep``.
"""

from lora_analysis.training.config import RunConfig, Seeds
from lora_analysis.training.events import RunEvent
from lora_analysis.training.inputs import base_folder, run_hash
from lora_analysis.training.options import BaseOptions, DataOptions, LoopOptions
from lora_analysis.training.plan import ExecutionOptions, SweepPlan, read_plan
from lora_analysis.training.run_folders import FAILURE_NAME, run_state
from lora_analysis.training.runs import train_run
from lora_analysis.training.sweep import (
    SweepResult,
    demo_sweep,
    run_sweep,
    sweep_states,
)

__all__ = [
    "FAILURE_NAME",
    "BaseOptions",
    "DataOptions",
    "ExecutionOptions",
    "LoopOptions",
    "RunConfig",
    "RunEvent",
    "Seeds",
    "SweepPlan",
    "SweepResult",
    "base_folder",
    "demo_sweep",
    "read_plan",
    "run_hash",
    "run_state",
    "run_sweep",
    "sweep_states",
    "train_run",
]
