"""What every executor promises, tried with each: outcomes, retries, workers lost, interrupts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import executor_work as work
import pytest

from lora_analysis.errors import (
    InputError,
    LoraAnalysisError,
    LostWorkerError,
    UnguardedScriptError,
)
from lora_analysis.execution.cluster import RayExecutor
from lora_analysis.execution.processes import ProcessExecutor
from lora_analysis.execution.protocol import Executor, Retried, SerialExecutor

CLUSTER = pytest.param("ray", marks=pytest.mark.cluster)


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A cluster of two nodes on this machine, with one place for work each."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # Its workers must find the package and the work of the tests.
        here = Path(__file__).parent
        paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def make(request: pytest.FixtureRequest):
    """Return a function that makes an executor by its name, with two workers."""

    def executor(name: str) -> Executor:
        if name == "serial":
            return SerialExecutor()
        if name == "process":
            return ProcessExecutor(2)
        return RayExecutor(address=request.getfixturevalue("ray_address"))

    return executor


every_executor = pytest.mark.parametrize("name", ["serial", "process", CLUSTER])
executors_with_workers = pytest.mark.parametrize("name", ["process", CLUSTER])


@every_executor
def test_every_job_has_its_result_and_what_it_told(make, name: str) -> None:
    told: list[object] = []
    outcomes = list(make(name).map(work.square, range(7), on_event=told.append))
    assert sorted((one.job, one.result) for one in outcomes) == [(n, n * n) for n in range(7)]
    assert all(one.error is None and one.attempts == 1 for one in outcomes)
    assert sorted(told) == [("at", n) for n in range(7)]


@every_executor
def test_without_jobs_there_is_nothing_to_do(make, name: str) -> None:
    assert list(make(name).map(work.square, [])) == []


@every_executor
def test_what_was_given_wrongly_is_not_tried_again(make, name: str) -> None:
    outcomes = {one.job: one for one in make(name).map(work.refuse_three, range(5))}
    assert {n: one.result for n, one in outcomes.items()} == {0: 0, 1: 1, 2: 2, 3: None, 4: 4}
    assert isinstance(outcomes[3].error, InputError)
    assert str(outcomes[3].error) == "three is refused"
    assert outcomes[3].attempts == 1


@every_executor
def test_a_job_that_fails_once_is_tried_again(make, name: str, tmp_path: Path) -> None:
    told: list[object] = []
    tally = work.Tally(tmp_path, failures=1, how="raise")
    outcomes = {one.job: one for one in make(name).map(tally, range(4), on_event=told.append)}
    assert {n: one.result for n, one in outcomes.items()} == {0: 0, 1: 1, 2: 2, 3: 3}
    assert [outcomes[n].attempts for n in range(4)] == [1, 1, 2, 1]
    (event,) = told
    assert isinstance(event, Retried)
    assert (event.job, str(event.error)) == (2, "attempt 1")


@every_executor
def test_a_job_that_fails_twice_is_told_and_the_rest_goes_on(
    make, name: str, tmp_path: Path
) -> None:
    tally = work.Tally(tmp_path, failures=9, how="raise")
    outcomes = {one.job: one for one in make(name).map(tally, range(4))}
    assert {n: one.result for n, one in outcomes.items()} == {0: 0, 1: 1, 2: None, 3: 3}
    assert (str(outcomes[2].error), outcomes[2].attempts) == ("attempt 2", 2)
    assert tally.attempts(2) == 2


@executors_with_workers
def test_a_worker_that_is_killed_is_replaced_and_its_job_done(
    make, name: str, tmp_path: Path
) -> None:
    told: list[object] = []
    tally = work.Tally(tmp_path, failures=1, how="kill")
    outcomes = {one.job: one for one in make(name).map(tally, range(4), on_event=told.append)}
    assert {n: one.result for n, one in outcomes.items()} == {0: 0, 1: 1, 2: 2, 3: 3}
    assert outcomes[2].attempts == 2
    assert [(event.job, type(event.error)) for event in told] == [(2, LostWorkerError)]


@executors_with_workers
def test_a_job_that_loses_two_workers_is_told(make, name: str, tmp_path: Path) -> None:
    tally = work.Tally(tmp_path, failures=9, how="kill")
    outcomes = {one.job: one for one in make(name).map(tally, range(4))}
    assert {n: one.result for n, one in outcomes.items()} == {0: 0, 1: 1, 2: None, 3: 3}
    assert isinstance(outcomes[2].error, LostWorkerError)
    assert tally.attempts(2) == 2


@executors_with_workers
def test_an_error_comes_with_the_traceback_of_the_worker(make, name: str, tmp_path: Path) -> None:
    (outcome,) = make(name).map(work.Tally(tmp_path, failures=9, how="raise"), [2])
    assert any("executor_work.py" in note for note in outcome.error.__notes__)


@executors_with_workers
def test_an_error_that_does_not_pickle_comes_as_its_text(make, name: str) -> None:
    (outcome,) = make(name).map(work.raise_foreign, [1])
    assert type(outcome.error) is LoraAnalysisError
    assert str(outcome.error) == "ForeignError: 1 and more"


@executors_with_workers
def test_closing_stops_the_work_in_an_orderly_way(make, name: str, tmp_path: Path) -> None:
    def interrupt(job: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(make(name).map(work.UntilStopped(tmp_path), [0], on_event=interrupt))
    _wait_until((tmp_path / "stopped-0").exists)


@every_executor
def test_an_error_of_the_caller_is_raised_as_it_is(make, name: str) -> None:
    def fail(event: object) -> None:
        message = "the bar broke"
        raise ValueError(message)

    with pytest.raises(ValueError, match="the bar broke"):
        list(make(name).map(work.square, range(3), on_event=fail))


def test_a_result_that_does_not_pickle_is_an_error_of_its_job() -> None:
    (outcome,) = ProcessExecutor(1).map(work.return_function, [1])
    assert "return_function" in str(outcome.error)


def test_workers_have_one_thread_and_an_environment_of_their_own() -> None:
    executor = ProcessExecutor(2, environments=[{"CUDA_VISIBLE_DEVICES": str(n)} for n in (4, 7)])
    found = {one.result[0]: one.result[1:] for one in executor.map(work.setting, range(12))}
    assert os.getpid() not in found
    assert all(threads == {1} for _, threads in found.values())
    assert {device for device, _ in found.values()} <= {"4", "7"}
    assert len(found) == len({device for device, _ in found.values()})


def test_workers_end_with_the_executor() -> None:
    list(ProcessExecutor(2).map(work.square, range(3)))
    assert multiprocessing.active_children() == []


def test_a_worker_killed_between_two_jobs_costs_an_attempt_only() -> None:
    results = ProcessExecutor(1).map(work.square, [1, 2])
    assert next(results).result == 1
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    (outcome,) = results
    assert (outcome.result, outcome.attempts) == (4, 2)


def test_fewer_than_one_worker_is_refused() -> None:
    with pytest.raises(InputError, match="workers must be at least 1, found 0"):
        ProcessExecutor(0)


def test_what_the_work_prints_stays_out_of_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    (outcome,) = ProcessExecutor(1).map(work.print_something, [1])
    assert outcome.error is None
    printed = capfd.readouterr()
    assert (printed.out, printed.err.strip()) == ("", "from the work")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
def test_workers_end_when_their_caller_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from executor_work import UntilStopped
            from lora_analysis.execution.processes import ProcessExecutor
            if __name__ == "__main__":
                list(ProcessExecutor(1).map(UntilStopped(Path({str(tmp_path)!r})), [0]))
            """
        )
    )
    with subprocess.Popen([sys.executable, script]) as caller:
        _wait_until((tmp_path / "started-0").exists)
        caller.send_signal(signal.SIGKILL)
    _wait_until((tmp_path / "stopped-0").exists)


def _ended(script: Path, text: str) -> subprocess.CompletedProcess[str]:
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n" + textwrap.dedent(text)
    )
    return subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)


def test_a_script_that_its_workers_would_run_again_fails_with_one_sentence(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    text = """
        import executor_work
        from lora_analysis.execution.processes import ProcessExecutor
        print("once")
        for outcome in ProcessExecutor(2).map(executor_work.square, range(4)):
            print(outcome)
    """
    done = _ended(script, text)
    assert done.returncode == 1
    assert "Outcome" not in done.stdout
    assert done.stderr.strip() == (
        f"{script} starts worker processes, which import it and would start their own: put the "
        'call under `if __name__ == "__main__":`, or use one worker (workers=1).'
    )


@pytest.mark.slow
def test_a_sweep_in_such_a_script_fails_before_it_writes(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    text = f"""
        from pathlib import Path
        from lora_analysis.training import RunConfig, run_sweep
        runs = [RunConfig("rotate", 2, seed=seed) for seed in range(2)]
        run_sweep(runs, Path({str(tmp_path / "out")!r}), workers=2, device="cpu")
        print("done")
    """
    done = _ended(script, text)
    assert done.returncode == 1
    assert "done" not in done.stdout
    assert done.stderr.strip().startswith(f"{script} starts worker processes")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_script_that_workers_cannot_import_is_said_once(tmp_path: Path) -> None:
    text = """
        import executor_work
        from lora_analysis.errors import InputError
        from lora_analysis.execution.processes import ProcessExecutor
        if __name__ == "__mp_main__":
            raise KeyError("main")
        try:
            list(ProcessExecutor(1).map(executor_work.square, range(9)))
        except InputError as error:
            print(error)
    """
    done = _ended(tmp_path / "caller.py", text)
    assert done.returncode == 0
    assert "Worker processes cannot import" in done.stdout
    assert "(exit code 1; their error is above)" in done.stdout
    assert done.stderr.count("KeyError: 'main'") == 1


def test_such_a_script_may_catch_the_error() -> None:
    error = UnguardedScriptError("sentence")
    assert isinstance(error, InputError)
    assert (str(error), error.code) == ("sentence", "sentence")


def test_a_missing_ray_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'lora-analysis\[ray\]'"):
        RayExecutor()


def test_a_cluster_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        message = "no route to head:6379"
        raise ConnectionError(message)

    ray = SimpleNamespace(init=refuse, is_initialized=lambda: False, exceptions=None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", ray)
    with pytest.raises(InputError, match=r"cluster at head:6379: no route .*RAY_AUTH_TOKEN"):
        list(RayExecutor(address="head:6379").map(work.square, [1]))


@executors_with_workers
def test_relative_paths_start_where_the_caller_is(
    make, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make(name)
    monkeypatch.chdir(tmp_path)
    (outcome,) = executor.map(work.here, [1])
    assert outcome.result == str(tmp_path)


@executors_with_workers
def test_two_jobs_are_under_way_at_once(make, name: str, tmp_path: Path) -> None:
    outcomes = list(make(name).map(work.Meeting(tmp_path, 2), range(2)))
    assert len({one.result for one in outcomes}) == 2  # by processes


def _wait_until(holds) -> None:
    """Wait for something that is sure to come; a minute is for machines that are very busy."""
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.02)
    pytest.fail("It did not come.")
