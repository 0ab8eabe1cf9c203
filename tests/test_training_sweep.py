"""Many runs: what the demo trains, what is skipped, and what workers do when they fail."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from training_bases import SHORT, on, write_tiny_base

from lora_analysis.errors import InputError, LoraAnalysisError, TargetError
from lora_analysis.formats import find_adapters
from lora_analysis.patterns import natural_key
from lora_analysis.training import RunConfig, RunEvent, demo_sweep, run_state, run_sweep
from lora_analysis.training.workers import train_in_processes

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def configs(base: Path) -> list[RunConfig]:
    return [on(base, RunConfig(task="invert", rank=2, seed=seed, loop=SHORT)) for seed in SEEDS]


def test_the_demo_trains_thirteen_adapters() -> None:
    configs = demo_sweep()
    assert len({config.name for config in configs}) == 13
    assert Counter((c.task, c.rank) for c in configs) == {
        ("rotate", 8): 3,
        ("invert", 8): 3,
        ("mirror", 8): 3,
        ("rotate", 4): 2,
        ("rotate", 64): 2,
    }
    assert all(config.seeds.data == config.seed for config in configs)
    assert len({config.alpha for config in configs}) == 1


def test_a_sweep_goes_on_where_it_was_interrupted(configs: list[RunConfig], tmp_path: Path) -> None:
    events: list[RunEvent] = []

    def interrupt(event: RunEvent) -> None:
        events.append(event)
        if event.label == configs[1].name and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(configs, tmp_path, device="cpu", workers=1, progress=interrupt)
    states = [run_state(config, tmp_path / config.name) for config in configs]
    assert states == ["finished", "unfinished", "missing"]
    events.clear()
    places = run_sweep(configs, tmp_path, device="cpu", workers=1, progress=events.append)
    assert [event.label for event in events if event.kind == "skipped"] == [configs[0].name]
    assert [event.label for event in events if event.kind == "finished"] == [
        config.name for config in configs[1:]
    ]
    assert places == [tmp_path / config.name for config in configs]
    assert [ref.label for ref in find_adapters(tmp_path)] == [config.name for config in configs]


def test_a_finished_sweep_only_tells_that_it_is(configs: list[RunConfig], tmp_path: Path) -> None:
    run_sweep(configs[:1], tmp_path, device="cpu", workers=1)
    events: list[RunEvent] = []
    run_sweep(configs[:1], tmp_path, device="cpu", progress=events.append)
    assert [event.kind for event in events] == ["skipped"]


def test_runs_that_would_share_a_folder_are_refused(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"share a folder name, 'invert-r2-s0'"):
        run_sweep([configs[0], replace(configs[0], alpha=1.0)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fewer_than_one_worker_is_refused(configs: list[RunConfig], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="workers must be at least 1, found 0"):
        run_sweep(configs, tmp_path, workers=0)


@pytest.mark.slow
def test_two_workers_make_what_one_makes(configs: list[RunConfig], tmp_path: Path) -> None:
    events: list[RunEvent] = []
    alone = run_sweep(configs, tmp_path / "one", device="cpu", workers=1)
    beside = run_sweep(configs, tmp_path / "two", device="cpu", workers=2, progress=events.append)
    for one, two in zip(alone, beside, strict=True):
        for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl"):
            assert (one / name).read_bytes() == (two / name).read_bytes()
    told = Counter((event.label, event.kind) for event in events)
    for config in configs:
        assert told[config.name, "step"] == 5
        assert told[config.name, "finished"] == 1


@pytest.mark.slow
def test_an_error_in_a_worker_is_raised_with_its_traceback(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    wrong = replace(configs[1], targets=("q_porj",))
    with pytest.raises(TargetError, match="q_porj") as caught:
        run_sweep([configs[0], wrong], tmp_path, device="cpu", workers=2)
    assert any("Traceback" in note for note in caught.value.__notes__)


@pytest.mark.slow
def test_a_killed_worker_is_told_with_its_run(configs: list[RunConfig], tmp_path: Path) -> None:
    long = [replace(c, loop=replace(c.loop, steps=100_000)) for c in configs[:2]]
    killed: list[int] = []

    def kill_once(event: RunEvent) -> None:
        if event.kind == "step" and not killed:
            killed.append(_children()[0])
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(LoraAnalysisError, match=r"trained 'invert-r2-s[01]' ended with exit code"):
        run_sweep(long, tmp_path, device="cpu", workers=2, progress=kill_once)
    assert _children() == []  # the other one was stopped


@pytest.mark.slow
def test_a_worker_killed_between_two_runs_is_told_as_any_other(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    def kill_when_done(event: RunEvent) -> None:
        if event.kind == "finished":
            time.sleep(0.5)  # it has asked for the next run by then, and waits
            (worker,) = multiprocessing.active_children()
            worker.kill()
            worker.join()

    jobs = [(config, tmp_path / config.name) for config in configs[:2]]
    with pytest.raises(LoraAnalysisError, match=r"'invert-r2-s1' ended with exit code -9"):
        train_in_processes(jobs, 1, device="cpu", progress=kill_when_done)


@pytest.mark.slow
def test_a_worker_killed_when_nothing_is_left_to_do_is_not_missed(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    def kill_the_idle_one(event: RunEvent) -> None:
        if event.kind == "started":
            idle = max(multiprocessing.active_children(), key=lambda one: natural_key(one.name))
            idle.kill()
            idle.join()

    jobs = [(configs[0], tmp_path / "run")]
    train_in_processes(jobs, 2, device="cpu", progress=kill_the_idle_one)
    assert run_state(configs[0], tmp_path / "run") == "finished"


@pytest.mark.slow
def test_workers_that_are_stopped_leave_no_lock_behind(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    long = replace(configs[0], loop=replace(SHORT, steps=100_000))

    def interrupt(event: RunEvent) -> None:
        if event.kind == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_in_processes([(long, tmp_path)], 1, device="cpu", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def _children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid]


def test_a_sweep_can_be_described_without_torch() -> None:
    code = (
        "import sys; from lora_analysis.training.sweep import demo_sweep; demo_sweep(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
