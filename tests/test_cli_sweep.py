"""``lora-analysis sweep``: what it trains, prints and refuses, and its exit codes."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_bases import write_tiny_base

from lora_analysis.cli import run
from lora_analysis.formats import find_adapters, read_adapter
from lora_analysis.storage.records import RECORD_FOLDER
from lora_analysis.training import events

PLAN = """
base = "base"
task = ["rotate", "mirror"]
rank = [2, 3]
[loop]
steps = {steps}
warmup_steps = 1
batch_size = 16
evaluations = 1
[execution]
executor = "serial"
device = "cpu"
"""
NAMES = ["rotate-r2-s0", "rotate-r3-s0", "mirror-r2-s0", "mirror-r3-s0"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a base and ``ranks.toml`` in it."""
    write_tiny_base(tmp_path / "base")
    (tmp_path / "ranks.toml").write_text(PLAN.format(steps=3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_run_is_an_adapter_in_a_folder_named_after_the_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sweep", "ranks.toml"]) == 0
    assert capsys.readouterr() == ("ranks\n", "")
    assert {path.name for path in (folder / "ranks").iterdir()} == {
        *NAMES,
        "sweep.json",
        RECORD_FOLDER,
    }
    found = [read_adapter(one) for one in find_adapters(folder / "ranks")]
    facts = {(one.label, one.provenance.task, one.provenance.rank) for one in found}
    assert facts == {(name, name.partition("-")[0], int(name[-4])) for name in NAMES}


def test_run_again_it_trains_what_is_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sweep", "ranks.toml", "--only", NAMES[2]]) == 0
    assert run(["sweep", "ranks.toml", "--status", "--format", "quiet"]) == 0
    assert capsys.readouterr().out == "ranks\n1\n"
    before = (folder / "ranks" / NAMES[2] / "manifest.json").stat().st_mtime_ns
    assert run(["sweep", "ranks.toml", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["finished"], document["failures"]) == (NAMES, [])
    assert (folder / "ranks" / NAMES[2] / "manifest.json").stat().st_mtime_ns == before


def test_shards_share_the_runs_between_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def finished() -> list[str]:
        capsys.readouterr()
        assert run(["sweep", "ranks.toml", "-o", "out", "--status", "--format", "json"]) == 0
        runs = json.loads(capsys.readouterr().out)["runs"]
        return [one["name"] for one in runs if one["state"] == "finished"]

    assert run(["sweep", "ranks.toml", "-o", "out", "--shard", "2/3"]) == 0
    assert finished() == [NAMES[1]]
    assert run(["sweep", "ranks.toml", "-o", "out", "--shard", "1/3"]) == 0
    assert finished() == [NAMES[0], NAMES[1], NAMES[3]]
    assert run(["sweep", "ranks.toml", "-o", "out", "--shard", "3/3"]) == 0
    assert finished() == NAMES


def test_the_printed_jobs_train_what_is_left(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sweep", "ranks.toml", "-o", "a b", "--only", NAMES[0]]) == 0
    capsys.readouterr()
    assert run(["sweep", "ranks.toml", "-o", "a b", "--print-jobs", "--device", "cpu"]) == 0
    jobs = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [job[job.index("--only") + 1] for job in jobs] == NAMES[1:]
    assert {path.name for path in (folder / "a b").iterdir()} == {
        NAMES[0],
        "sweep.json",
        RECORD_FOLDER,
    }
    for job in jobs:
        assert job[0] == "lora-analysis"
        assert run(job[1:]) == 0
    assert run(["sweep", "ranks.toml", "-o", "a b", "--print-jobs"]) == 0
    assert capsys.readouterr().out == "a b\n" * 3


@pytest.mark.parametrize("given", ["option", "file"])
def test_every_run_of_a_sweep_reports_to_the_trackers(
    given: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: dict[str, list[int]] = {}

    class Recorder:
        def __init__(self, _config: object, run_folder: Path) -> None:
            self.steps = steps.setdefault(run_folder.name, [])

        def log(self, values: dict[str, float], step: int) -> None:
            assert values
            self.steps.append(step)

        def close(self) -> None:
            self.steps.append(-1)

    monkeypatch.setattr(events, "TRACKERS", {"json": Recorder})
    words = ["sweep", "ranks.toml"]
    if given == "option":
        words += ["--tracker", "json"]
        assert run([*words, "--print-jobs"]) == 0
        assert capsys.readouterr().out.count(" --tracker json ") == len(NAMES)
    else:
        plan = Path("ranks.toml")
        plan.write_text(plan.read_text() + 'trackers = ["json"]\n')
    assert run([*words[:2], "--tracker", "wandbb"]) == 3
    assert "no tracker 'wandbb'. Choose from json" in capsys.readouterr().err
    assert not Path("ranks").exists()
    monkeypatch.setattr(events, "require_package", lambda *_: None)
    assert run(words) == 0
    assert steps == {name: [0, 1, 2, 3, -1] for name in NAMES}


def test_a_run_that_fails_is_named_and_the_others_are_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "ranks.toml").write_text(
        'targets = [["q_proj"], ["q_porj"]]\n' + PLAN.format(steps=2)
    )
    assert run(["sweep", "ranks.toml", "--format", "json"]) == 4
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert len(document["finished"]) == len(document["failures"]) == 4
    assert all(
        "q_porj" in one["source"] and "q_porj" in one["reason"] for one in document["failures"]
    )
    assert printed.err.count("failed once and is left out: No module") == 4
    assert run(["sweep", "ranks.toml", "--status"]) == 0
    status = capsys.readouterr().out
    assert "4 of 8 runs are finished in ranks" in status
    assert status.count("failed: No module") == 4


def test_where_every_run_fails_the_input_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "ranks.toml").write_text('targets = ["q_porj"]\n' + PLAN.format(steps=2))
    assert run(["sweep", "ranks.toml"]) == 3
    assert "4 of 4 runs failed, 'rotate-r2-s0' among them" in capsys.readouterr().err


def test_finished_runs_are_replaced_by_force_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sweep", "ranks.toml", "--only", NAMES[0]]) == 0
    (folder / "ranks.toml").write_text(PLAN.format(steps=4))
    assert run(["sweep", "ranks.toml", "--only", NAMES[0]]) == 3
    assert "another configuration" in capsys.readouterr().err
    assert run(["sweep", "ranks.toml", "--only", NAMES[0], "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["missing.toml"], 3, "missing.toml does not exist."),
        (["ranks.toml", "--only", "rotate-r2-s1"], 3, "Near names: rotate-r2-s0"),
        (["ranks.toml", "--shard", "0/4"], 2, "shards are counted from 1"),
        (["ranks.toml", "--shard", "5/4"], 2, "no shard 5/4"),
        (["ranks.toml", "--shard", "half"], 2, "A shard is k/n, for example 3/8"),
        (["ranks.toml", "--executor", "slurm"], 2, "slurm"),
        (["ranks.toml", "--workers", "0"], 2, "0 is not in the range"),
        (["ranks.toml", "--device", "abacus"], 3, "no device 'abacus'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    told: str,
) -> None:
    assert run(["sweep", *arguments]) == code
    printed = capsys.readouterr()
    assert told in printed.err
    assert printed.out == ""


@pytest.mark.slow
def test_an_interrupt_ends_it_with_130_and_keeps_what_is_finished(folder: Path) -> None:
    assert run(["sweep", "ranks.toml", "--only", "rotate-r2-s0"]) == 0
    long = PLAN.format(steps=100_000).replace("[2, 3]", "[4, 5]")
    (folder / "long.toml").write_text(long)
    arguments = ["sweep", "long.toml", "-o", "ranks", "--executor", "process", "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "lora_analysis", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _wait_until_one_trains(folder / "ranks")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()  # one that does not end would be waited for
    assert (process.returncode, out) == (130, "")
    assert err.strip() == "Interrupted. Finished results are kept."
    hidden = [path for path in (folder / "ranks").rglob(".*") if path.name != RECORD_FOLDER]
    assert not hidden
    assert not list((folder / "ranks").rglob("*.lock"))
    assert (folder / "ranks" / "rotate-r2-s0" / "manifest.json").exists()


def _wait_until_one_trains(folder: Path) -> None:
    for _ in range(12_000):
        if any(path.stat().st_size for path in folder.glob("*-r4-*/metrics.jsonl")):
            return
        time.sleep(0.01)
    pytest.fail("It did not come.")
