"""Several processes that train one model, started by torchrun as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import metrics_of
from training_bases import write_tiny_base

from lora_analysis.errors import InputError
from lora_analysis.formats import read_adapter
from lora_analysis.training import RunConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

OPTIONS = ["--steps", "5", "--batch-size", "6", "--lr", "0.01", "--rank", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = write_tiny_base(tmp_path_factory.mktemp("base"))
    return ["--base", str(base), "--name", "rotate"]


@pytest.fixture(scope="module")
def alone(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that one process makes."""
    from click.testing import CliRunner

    from lora_analysis.cli import group

    folder = tmp_path_factory.mktemp("alone") / "run"
    done = CliRunner().invoke(group, ["train", *inputs, *OPTIONS, "-o", str(folder)])
    assert done.exit_code == 0, done.output
    return folder


def together(inputs: list[str], out: Path, *more: str) -> None:
    """Train with two processes under torchrun, on a free port of its own choice."""
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [*launch, "-m", "lora_analysis", "train", *inputs, *OPTIONS, "-o", str(out), *more]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps") == 1  # the report is the first process's


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--fsdp",)])
def test_two_processes_make_what_one_makes(
    more: tuple[str, ...], inputs: list[str], alone: Path, tmp_path: Path
) -> None:
    together(inputs, tmp_path / "two", *more)
    ours, theirs = read_adapter(alone), read_adapter(tmp_path / "two")
    for name, update in ours.items():
        np.testing.assert_allclose(update.A, theirs[name].A, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
        np.testing.assert_allclose(update.B, theirs[name].B, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    losses = [[line.get("loss") for line in metrics_of(f)] for f in (alone, tmp_path / "two")]
    assert losses[0][1:] == pytest.approx(losses[1][1:], rel=1e-5)
    manifests = [json.loads((f / "manifest.json").read_text()) for f in (alone, tmp_path / "two")]
    assert manifests[0]["key"] == manifests[1]["key"]


def test_weights_that_are_trained_are_not_spread(inputs: list[str]) -> None:
    import torch

    from lora_analysis.training.run_setup import set_up_run

    table = {"base": {"source": inputs[1]}, "task": "rotate", "method": "full"}
    with pytest.raises(InputError, match="Only frozen weights can be sharded"):
        set_up_run(RunConfig.from_dict(table), torch.device("cpu"), sharded=True)


KILLED_ONCE = """
import json, os, signal, sys
from pathlib import Path
from lora_analysis.training import RunConfig, train_run

table, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
mark = folder / "mark"

def watch(event):
    if event.kind == "step" and event.step == 4 and not mark.exists():
        mark.write_text("killed")
        os.kill(os.getpid(), signal.SIGKILL)

train_run(RunConfig.from_dict(table), folder / "run", device="cpu", on_event=watch)
os.environ["TORCHELASTIC_RESTART_COUNT"] = "whole"  # the processes meet anew, under another name
train_run(RunConfig.from_dict(table), folder / "whole", device="cpu")
"""


@pytest.mark.long
@pytest.mark.slow
def test_torchrun_restarts_what_was_killed_and_it_ends_bit_equal(
    inputs: list[str], tmp_path: Path
) -> None:
    loop = {"steps": 6, "batch_size": 6, "lr": 0.01, "checkpoint_every": 2}
    table = {"base": {"source": inputs[1]}, "task": "rotate", "rank": 2, "loop": loop}
    text = json.dumps({**table, "dropout": 0.3})  # of which each process has a stream of its own
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    done = subprocess.run(
        [
            *[sys.executable, "-m", "torch.distributed.run", "--standalone"],
            *["--nproc-per-node", "2", "--max-restarts", "1", str(script), text, str(tmp_path)],
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mark").exists()
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(7))
    for name in ("metrics.jsonl", "adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
