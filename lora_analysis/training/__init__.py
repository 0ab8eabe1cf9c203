"""Adapters made here: a base model, its tasks, the loop, and sweeps of runs that can be resumed.

Each run is a folder with the adapter in PEFT's layout, so that what was trained is read back as
any other adapter is. Nothing here looks at subspaces, draws or prints. torch is imported by the
modules that compute with it (``vit``, ``base``, ``loop``, ``pretrain``), never by this one, by
``config`` or by ``sweep``.
"""

from lora_analysis.training.config import RunConfig, Seeds
from lora_analysis.training.files import base_folder
from lora_analysis.training.inputs import run_key
from lora_analysis.training.options import BaseOptions, DataOptions, LoopOptions
from lora_analysis.training.runs import RunEvent, run_state, train_run
from lora_analysis.training.sweep import demo_sweep, run_sweep

__all__ = [
    "BaseOptions",
    "DataOptions",
    "LoopOptions",
    "RunConfig",
    "RunEvent",
    "Seeds",
    "base_folder",
    "demo_sweep",
    "run_key",
    "run_state",
    "run_sweep",
    "train_run",
]
