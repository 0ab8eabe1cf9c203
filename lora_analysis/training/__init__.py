"""Adapters made here: a base model, its tasks, the loop, and sweeps of runs that can be resumed.

Each run is a folder with the adapter in PEFT's layout, so that what was trained is read back as
any other adapter is. Nothing here looks at subspaces, draws or prints. torch is imported by the
modules that compute with it (``vit``, ``base``, ``loop``, ``pretrain``), never by this one, by
``config`` or by ``sweep``.
"""

from lora_analysis.training.config import RunConfig, Seeds
from lora_analysis.training.events import RunEvent
from lora_analysis.training.files import base_folder
from lora_analysis.training.inputs import run_key
from lora_analysis.training.options import BaseOptions, DataOptions, LoopOptions
from lora_analysis.training.plan import ExecutionOptions, SweepPlan, read_plan
from lora_analysis.training.progress import SweepProgress
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
    "SweepProgress",
    "SweepResult",
    "base_folder",
    "demo_sweep",
    "read_plan",
    "run_key",
    "run_state",
    "run_sweep",
    "sweep_states",
    "train_run",
]
