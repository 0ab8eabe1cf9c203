"""The installed program, ended by SIGKILL wherever it happens to be, started again by its user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from training_bases import write_tiny_base

from lora_analysis.cli import group
from lora_analysis.storage.records import RECORD_FOLDER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="ends processes as POSIX does"),
]

STEPS = 160
OPTIONS = [
    *["--name", "rotate", "--rank", "2", "--dropout", "0.2", "--batch-size", "8", "--lr", "0.01"],
    *["--steps", str(STEPS), "--device", "cpu", "--format", "quiet"],
    *["--set", "loop.checkpoint_every=3", "--set", "loop.trajectory=[10, 120]"],
]


def files(folder: Path) -> dict[str, bytes]:
    """What the run left, but for the manifest, which tells seconds."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in found
        if path.name != "manifest.json" and path.parent.name != RECORD_FOLDER
    }


def killed_at(command: list[str], folder: Path, lines: int) -> bool:
    """Start the program and end it once so many lines are written; say whether it was in time."""
    metrics = folder / "metrics.jsonl"
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as child:
        while child.poll() is None:
            if metrics.is_file() and metrics.read_bytes().count(b"\n") >= lines:
                child.kill()
                break
            time.sleep(0.001)
        return child.wait(timeout=60) == -signal.SIGKILL


def test_a_training_killed_at_any_moment_ends_bit_equal(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    arguments = ["train", "--base", str(base), *OPTIONS, "-o"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    done = CliRunner().invoke(group, [*arguments, str(whole)])
    assert done.exit_code == 0, done.output
    command = [sys.executable, "-m", "lora_analysis", *arguments, str(folder)]
    rng = np.random.default_rng()  # other moments at every run: every one has to do
    moments = np.sort(rng.integers(1, STEPS - 60, size=2))
    killed = [killed_at(command, folder, int(lines)) for lines in moments]
    assert any(killed), moments
    done = CliRunner().invoke(group, [*arguments, str(folder)])
    assert done.exit_code == 0, done.output
    assert files(folder) == files(whole), moments
