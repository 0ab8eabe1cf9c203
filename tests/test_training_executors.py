"""Who trains: chosen from what was asked for and what the machine has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from lora_analysis.errors import InputError
from lora_analysis.execution.cluster import RayExecutor
from lora_analysis.execution.processes import ProcessExecutor
from lora_analysis.execution.protocol import SerialExecutor
from lora_analysis.training import ExecutionOptions
from lora_analysis.training import sweep as choosing
from lora_analysis.training.sweep import choose_executor


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of sixteen cores."""
    monkeypatch.setattr(choosing, "available_workers", lambda: 16)


@pytest.fixture
def gpus(cores: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that gives the machine GPUs."""

    def give(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return give


def processes(runs: int = 100, **options: object) -> ProcessExecutor:
    found = choose_executor(ExecutionOptions(**options), runs)
    assert isinstance(found, ProcessExecutor)
    return found


def test_on_a_cpu_there_is_one_worker_of_one_thread_a_core_up_to_four(cores: None) -> None:
    found = processes(device="cpu")
    assert (found.workers, found.threads, list(found.environments)) == (4, 1, [{}])
    assert processes(device="cpu", workers=12).workers == 12


def test_there_are_no_more_workers_than_runs(cores: None) -> None:
    assert processes(3, device="cpu").workers == 3
    assert isinstance(choose_executor(ExecutionOptions(device="cpu"), 1), SerialExecutor)
    assert processes(1, device="cpu", executor="process").workers == 1


def test_every_gpu_has_a_worker_of_its_own(gpus: Callable[[int], None]) -> None:
    gpus(4)
    found = processes()
    assert found.workers == 4
    assert found.threads == 4
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found.environments] == ["0", "1", "2", "3"]
    assert processes(device="cuda", workers=8).workers == 8  # two share each


def test_gpus_that_were_chosen_are_the_ones_that_are_used(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7f")
    assert [one["CUDA_VISIBLE_DEVICES"] for one in processes().environments] == ["5", "GPU-7f"]


def test_one_gpu_that_is_named_has_one_worker(gpus: Callable[[int], None]) -> None:
    gpus(4)
    assert isinstance(choose_executor(ExecutionOptions(device="cuda:1"), 9), SerialExecutor)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no device 'abacus'"):
        choose_executor(ExecutionOptions(device="abacus"), 9)


def test_ray_reserves_what_was_asked_for_and_no_gpu_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = SimpleNamespace(exceptions=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
    asked = {"executor": "ray", "workers": 3, "cpus": 2.0, "address": "head:6379"}
    found = choose_executor(ExecutionOptions(**asked, gpus=0.5), 9)
    assert isinstance(found, RayExecutor)
    assert (found.workers, found.cpus, found.gpus, found.address) == (3, 2.0, 0.5, "head:6379")
    on_cpu = choose_executor(ExecutionOptions(**asked, gpus=0.5, device="cpu"), 9)
    assert isinstance(on_cpu, RayExecutor)
    assert on_cpu.gpus == 0
