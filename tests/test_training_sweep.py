"""Many runs: what the demo trains, what is skipped, and what workers do when they fail."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from training_bases import SHORT, on, write_tiny_base

from lora_analysis.errors import InputError, InUseError, OccupiedError, OutputError, TargetError
from lora_analysis.execution.protocol import SerialExecutor
from lora_analysis.formats import find_adapters
from lora_analysis.storage.atomic import lock_folder
from lora_analysis.storage.records import RECORD_FOLDER
from lora_analysis.training import (
    FAILURE_NAME,
    ExecutionOptions,
    RunConfig,
    RunEvent,
    demo_sweep,
    run_state,
    run_sweep,
    sweep_states,
)

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
        run_sweep(configs, tmp_path, device="cpu", workers=1, on_event=interrupt)
    states = [run_state(config, tmp_path / config.name) for config in configs]
    assert states == ["finished", "unfinished", "missing"]
    events.clear()
    result = run_sweep(configs, tmp_path, device="cpu", workers=1, on_event=events.append)
    assert [event.label for event in events if event.kind == "skipped"] == [configs[0].name]
    assert [event.label for event in events if event.kind == "finished"] == [
        config.name for config in configs[1:]
    ]
    assert result.all_folders() == [tmp_path / config.name for config in configs]
    assert [ref.label for ref in find_adapters(tmp_path)] == [config.name for config in configs]


def test_a_finished_sweep_only_tells_that_it_is(configs: list[RunConfig], tmp_path: Path) -> None:
    run_sweep(configs[:1], tmp_path, device="cpu", workers=1)
    events: list[RunEvent] = []
    run_sweep(configs[:1], tmp_path, device="cpu", on_event=events.append)
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


def test_what_is_resolved_is_written_beside_the_results(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    run_sweep({"one": configs[0]}, tmp_path, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        RECORD_FOLDER,
        "one",
        "sweep.json",
    ]
    found = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert RunConfig.from_dict(found["one"]).to_dict() == configs[0].to_dict()


def test_runs_of_another_configuration_are_replaced_by_force_only(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    run_sweep({"one": configs[0]}, tmp_path, device="cpu")
    files = (tmp_path / "one" / "manifest.json", tmp_path / "sweep.json")
    before = [path.read_bytes() for path in files]
    other = {"one": replace(configs[0], alpha=1.0), "two": configs[1]}
    with pytest.raises(OccupiedError, match=r"1 run of another configuration.*'one': alpha 8.0"):
        run_sweep(other, tmp_path, device="cpu")
    assert [path.read_bytes() for path in files] == before
    assert not (tmp_path / "two").exists()
    run_sweep(other, tmp_path, device="cpu", workers=1, force=True)
    assert run_state(other["one"], tmp_path / "one") == "finished"


def test_a_second_sweep_of_the_same_runs_is_refused_and_of_others_is_not(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    names = [config.name for config in configs]

    def start_others(event: RunEvent) -> None:
        if event.kind == "started":
            with pytest.raises(InUseError, match="in use by process"):
                run_sweep(configs, tmp_path, names=names[:1], device="cpu")
            run_sweep(configs, tmp_path, names=names[1:2], device="cpu")

    result = run_sweep(configs, tmp_path, names=names[:1], device="cpu", on_event=start_others)
    assert list(result.folders) == names[:1]
    assert list(sweep_states(_named(configs), tmp_path).values()) == [
        "finished",
        "finished",
        "missing",
    ]


def test_a_run_that_cannot_be_trained_is_reported_and_the_rest_goes_on(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    runs = {"wrong": replace(configs[0], targets=("q_porj",)), "right": configs[1]}
    events: list[RunEvent] = []
    result = run_sweep(runs, tmp_path, device="cpu", workers=1, on_event=events.append)
    assert list(result.folders) == ["right"]
    assert isinstance(result.failures["wrong"].error, TargetError)
    (failure,) = [event for event in events if event.kind == "failed"]
    assert failure.label == "wrong"
    assert (failure.note or "").startswith("failed once and is left out: ")
    note = json.loads((tmp_path / "wrong" / FAILURE_NAME).read_text())
    assert (note["kind"], note["attempts"]) == ("TargetError", 1)
    assert any("q_porj" in line for line in note["traceback"])
    with pytest.raises(InputError, match=r"1 of 2 runs failed, 'wrong' among them: .*q_porj"):
        result.all_folders()
    mended = run_sweep(runs | {"wrong": configs[0]}, tmp_path, device="cpu")
    assert not mended.failures
    assert not (tmp_path / "wrong" / FAILURE_NAME).exists()


def test_who_is_still_in_a_runs_folder_is_waited_for(
    configs: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "one"
    place.mkdir()
    (place / RECORD_FOLDER).mkdir()
    holding = lock_folder(place, f"{RECORD_FOLDER}/run.lock")
    holding.__enter__()
    monkeypatch.setattr(time, "sleep", lambda _: holding.__exit__(None, None, None))
    assert run_sweep({"one": configs[0]}, tmp_path, device="cpu").folders == {"one": place}


def _contents(folder: Path) -> dict[str, object]:
    """Return every file below a folder; of manifests all but how long it took."""
    found: dict[str, object] = {}
    files = (path for path in folder.rglob("*") if path.is_file())
    for path in sorted(path for path in files if path.parent.name != RECORD_FOLDER):
        content: object = path.read_bytes()
        if path.name == "manifest.json":
            content = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        found[str(path.relative_to(folder))] = content
    return found


@pytest.mark.slow
def test_two_workers_make_what_one_makes_though_one_is_killed(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    killed: list[int] = []
    retries: list[str | None] = []

    def kill_once(event: RunEvent) -> None:
        if event.kind == "retried":
            retries.append(event.note)
        if event.kind == "step" and event.step == 2 and not killed:
            worker = multiprocessing.active_children()[0]
            killed.append(worker.pid or 0)
            worker.kill()

    run_sweep(configs, tmp_path / "one", device="cpu", workers=1)
    result = run_sweep(
        configs,
        tmp_path / "two",
        device="cpu",
        workers=2,
        on_event=kill_once,
    )
    assert not result.failures
    (retry,) = retries
    assert f"The worker process {killed[0]} ended with exit code -9" in (retry or "")
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")
    assert multiprocessing.active_children() == []


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("seed", [20210617])
def test_a_sweep_killed_twice_ends_as_one_that_never_was(
    configs: list[RunConfig], tmp_path: Path, seed: int
) -> None:
    long = {one.name: replace(one, loop=replace(SHORT, steps=60)) for one in configs}
    run_sweep(long, tmp_path / "whole", device="cpu", workers=1)
    steps = sum(one.loop.steps for one in long.values())
    broken = tmp_path / "broken"
    for executor, at in zip(
        ("process", "serial"),
        sorted(random.Random(seed).sample(range(1, steps), 2)),
        strict=True,
    ):
        with _sweeping(long, broken, executor) as process:
            _wait_until(lambda at=at: _steps_done(broken) >= at)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    result = run_sweep(long, broken, device="cpu", workers=1)
    assert not result.failures
    assert _contents(broken) == _contents(tmp_path / "whole")


def _sweeping(runs: dict[str, RunConfig], folder: Path, executor: str) -> subprocess.Popen[bytes]:
    """Start a sweep in a process of its own."""
    folder.mkdir(exist_ok=True)
    script = folder.with_name("script.py")
    tables = {name: config.to_dict() for name, config in runs.items()}
    script.write_text(
        f"""
import json
from pathlib import Path
from lora_analysis.training import ExecutionOptions, RunConfig, run_sweep

if __name__ == "__main__":
    tables = json.loads({json.dumps(tables)!r})
    runs = {{name: RunConfig.from_dict(table) for name, table in tables.items()}}
    execution = ExecutionOptions(executor={executor!r}, workers=2, device="cpu")
    run_sweep(runs, Path({str(folder)!r}), execution=execution)
"""
    )
    return subprocess.Popen([sys.executable, script])


def _steps_done(folder: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in folder.glob("*/metrics.jsonl"))


def _wait_until(holds: Callable[[], bool]) -> None:
    """Wait for something that is sure to come; two minutes are for very busy machines."""
    for _ in range(12_000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("It did not come.")


@pytest.mark.cluster
def test_processes_and_a_ray_cluster_make_the_same_adapters(
    configs: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    here = str(Path(__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    events: list[RunEvent] = []
    for executor in ("process", "ray"):
        run_sweep(
            configs,
            tmp_path / executor,
            execution=ExecutionOptions(executor=executor, workers=2, device="cpu"),
            on_event=events.append,
        ).all_folders()
    assert _contents(tmp_path / "process") == _contents(tmp_path / "ray")
    told = Counter((event.label, event.kind) for event in events)
    for config in configs:
        assert told[config.name, "step"] == 2 * (SHORT.steps + 1)
        assert told[config.name, "finished"] == 2


@pytest.mark.slow
def test_workers_that_are_stopped_leave_no_lock_behind(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    long = [replace(configs[0], loop=replace(SHORT, steps=100_000))]
    execution = ExecutionOptions(executor="process", workers=1, device="cpu")

    def interrupt(event: RunEvent) -> None:
        if event.kind == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(long, tmp_path, execution=execution, on_event=interrupt)
    assert multiprocessing.active_children() == []
    hidden = [path for path in tmp_path.rglob(".*") if path.name != RECORD_FOLDER]
    assert hidden + list(tmp_path.rglob("*.lock")) + list(tmp_path.rglob("*.tmp")) == []


def _named(configs: list[RunConfig]) -> dict[str, RunConfig]:
    return {config.name: config for config in configs}


def test_a_sweep_can_be_described_without_torch() -> None:
    code = (
        "import sys; from lora_analysis.training.sweep import demo_sweep; demo_sweep(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_full_disk_ends_one_run_and_not_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the run's own error, nor that of noting it, ends the others."""
    from lora_analysis.training.inputs import write_json

    trained: list[str] = []

    def train(_config: RunConfig, folder: Path, **_: object) -> None:
        if folder.name == "second":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        trained.append(folder.name)

    def write(path: Path, fields: dict[str, object]) -> Path:
        if path.parent.name == "second":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_json(path, fields)

    monkeypatch.setattr("lora_analysis.training.sweep.train_run", train)
    monkeypatch.setattr("lora_analysis.training.sweep.write_json", write)
    runs = {
        name: RunConfig("rotate", 2, seed=n) for n, name in enumerate(("first", "second", "third"))
    }
    events: list[RunEvent] = []
    result = run_sweep(runs, tmp_path / "out", executor=SerialExecutor(), on_event=events.append)
    assert trained == ["first", "third"]
    assert list(result.failures) == ["second"]
    error = result.failures["second"].error
    assert isinstance(error, OutputError)
    assert str(error).startswith(f"{tmp_path / 'out' / 'second'}: No space left on device.")
    notes = [event.note or "" for event in events if event.kind == "failed"]
    assert any("the failure could not be written to failed.json" in note for note in notes)
