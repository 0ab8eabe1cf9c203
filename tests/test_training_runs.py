"""One run in its folder: what it holds, when it is skipped, when it is trained anew."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_bases import SHORT, on, write_tiny_base

import lora_analysis
from lora_analysis.errors import (
    InputError,
    MissingExtraError,
    OccupiedError,
    TargetError,
    UnfinishedError,
)
from lora_analysis.formats import find_adapters, read_adapter
from lora_analysis.lora import initial_factor, load_adapter_into
from lora_analysis.storage.records import RECORD_FOLDER
from lora_analysis.training import RunConfig, RunEvent, run_state, train_run
from lora_analysis.training.demo_data import digits_task
from lora_analysis.training.digits_vit import read_base
from lora_analysis.training.inputs import folder_sha256
from lora_analysis.training.options import LoopOptions
from lora_analysis.training.tasks import accuracy

CONFIG = RunConfig(task="rotate", rank=2, seed=3, loop=SHORT)
FILES = ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "metrics.jsonl"]


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / CONFIG.name
    return train_run(on(base, CONFIG), folder, device="cpu")


@pytest.fixture
def train(base: Path, tmp_path: Path) -> Callable[..., list[RunEvent]]:
    """Train into ``tmp_path / "run"``; return what was told."""

    def run(config: RunConfig = CONFIG, *, force: bool = False) -> list[RunEvent]:
        events: list[RunEvent] = []
        train_run(
            on(base, config), tmp_path / "run", device="cpu", on_event=events.append, force=force
        )
        return events

    return run


def test_a_run_leaves_metrics_adapter_and_manifest(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [RECORD_FOLDER, *FILES]
    assert [path.name for path in (finished / RECORD_FOLDER).iterdir()] == ["run.json"]
    assert finished.name == "rotate-r2-s3"


def test_the_manifest_says_what_was_done_and_with_what(finished: Path, base: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["config"] == on(base, CONFIG).to_dict()
    assert {k: manifest[k] for k in ("task", "rank", "seed", "data_seed")} == {
        "task": "rotate",
        "rank": 2,
        "seed": 3,
        "data_seed": 3,
    }
    assert manifest["inputs"] == {"base": folder_sha256(base), "data": "digits"}
    assert manifest["device"] == "cpu"
    assert manifest["modules"] == [
        f"blocks.{block}.attention.{kind}_proj" for block in (0, 1) for kind in "qv"
    ]
    assert set(manifest["versions"]) >= {"lora-analysis", "torch", "numpy", "python"}
    assert manifest["seconds"] > 0


def test_the_metrics_hold_one_line_per_step(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert all({"loss", "lr"} <= line.keys() for line in lines[1:])
    assert [line["step"] for line in lines if "test_accuracy" in line] == [0, 2, 4]
    metrics = json.loads((finished / "manifest.json").read_text())["metrics"]
    assert metrics["base_accuracy"] == lines[0]["test_accuracy"]
    assert metrics["accuracy"] == lines[-1]["test_accuracy"]
    assert metrics["loss"] == pytest.approx(np.mean([line["loss"] for line in lines[1:]]))


def test_the_adapter_reads_back_with_its_rank_scale_task_and_seed(finished: Path) -> None:
    adapter = read_adapter(finished)
    assert (adapter.label, len(adapter)) == ("rotate-r2-s3", 4)
    facts = adapter.provenance
    assert (facts.rank, facts.seed, facts.task, facts.base_model) == (2, 3, "rotate", "digits-vit")
    for update in adapter.values():
        assert update.known_scale() == 8 / 2
        assert (update.A.shape, update.B.shape) == ((2, 16), (16, 2))
        assert update.stored_dtype == "float32"
        assert np.abs(update.B).max() > 0


def test_the_adapter_on_the_base_has_the_accuracy_of_the_manifest(
    finished: Path, base: Path
) -> None:
    model = read_base(base)
    load_adapter_into(model, read_adapter(finished))
    stated = json.loads((finished / "manifest.json").read_text())["metrics"]["accuracy"]
    assert accuracy(model, digits_task("rotate").test) == stated


def test_the_initial_factor_of_a_run_can_be_computed_again(base: Path, tmp_path: Path) -> None:
    # So small a rate moves nothing: what is saved is what training started from.
    still = replace(CONFIG, loop=LoopOptions(steps=1, batch_size=8, lr=1e-12, weight_decay=0.0))
    adapter = read_adapter(train_run(on(base, still), tmp_path / "still", device="cpu"))
    for name, update in adapter.items():
        start = initial_factor(name, still.rank, still.seed, update.A.shape[1])
        np.testing.assert_allclose(update.A, start.numpy(), atol=1e-9)


def test_two_runs_of_one_configuration_are_equal_bit_for_bit(
    finished: Path, train: Callable[..., list[RunEvent]], tmp_path: Path
) -> None:
    torch.manual_seed(99)  # whatever the global generator's state
    train()
    for name in FILES:
        if name != "manifest.json":  # it holds the time that passed
            assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_the_seeds_of_start_and_data_act_apart(
    finished: Path, train: Callable[..., list[RunEvent]], tmp_path: Path
) -> None:
    train(replace(CONFIG, data_seed=4))
    first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[1])
    other = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert first["loss"] != other["loss"]  # B is zero at step 1: the data alone differ
    ours, theirs = read_adapter(finished), read_adapter(tmp_path / "run")
    for name, update in ours.items():  # the same start, moved a little by each
        rows = np.sum(update.A * theirs[name].A, axis=1)
        norms = np.linalg.norm(update.A, axis=1) * np.linalg.norm(theirs[name].A, axis=1)
        assert (rows / norms).min() > 0.95


def test_the_base_is_left_as_it_was(base: Path, train: Callable[..., list[RunEvent]]) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    train()
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_a_finished_run_is_skipped(
    base: Path, train: Callable[..., list[RunEvent]], tmp_path: Path
) -> None:
    assert run_state(on(base, CONFIG), tmp_path / "run") == "missing"
    events = train()
    assert [event.kind for event in events] == ["started", *["step"] * 5, "finished"]
    assert [event.step for event in events] == [0, 0, 1, 2, 3, 4, 4]
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert train() == [RunEvent(CONFIG.name, "skipped", 4, 4, state="finished")]
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()} == written


def _cut_metrics(folder: Path) -> str:
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes()[:40])
    return "damaged"


def _zero_metrics(folder: Path) -> str:
    content = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(content[:100] + bytes(len(content) - 100))
    return "damaged"


def _cut_weights(folder: Path) -> str:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    return "damaged"


def _lose_weights(folder: Path) -> str:
    (folder / "adapter_model.safetensors").unlink()
    return "damaged"


def _lose_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "damaged"


def _spoil_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text("{")
    return "damaged"


@pytest.mark.parametrize(
    "harm",
    [_cut_metrics, _zero_metrics, _lose_weights, _cut_weights, _lose_manifest, _spoil_manifest],
)
def test_a_run_that_is_not_whole_is_trained_anew(
    harm: Callable[[Path], str],
    finished: Path,
    train: Callable[..., list[RunEvent]],
    tmp_path: Path,
) -> None:
    train()
    state = harm(tmp_path / "run")
    assert train()[0] == RunEvent(CONFIG.name, "started", 0, 4, state=state)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (finished / weights).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"task": "invert"},
        {"rank": 3},
        {"seed": 4},
        {"alpha": 16.0},
        {"use_rslora": True},
        {"targets": ("q_proj",)},
        {"loop": replace(CONFIG.loop, lr=1e-4)},
    ],
)
def test_any_other_configuration_is_another_run(
    change: dict[str, object], finished: Path, base: Path
) -> None:
    assert run_state(replace(on(base, CONFIG), **change), finished) == "changed"


def test_another_base_is_another_run(finished: Path, tmp_path: Path) -> None:
    other = write_tiny_base(tmp_path / "other", seed=6)
    assert run_state(on(other, CONFIG), finished) == "changed"


def test_an_interrupted_run_is_not_taken_for_an_adapter(
    base: Path, train: Callable[..., list[RunEvent]], tmp_path: Path
) -> None:
    train()  # an older run lies in the folder

    def interrupt(event: RunEvent) -> None:
        if event.step == 2:
            raise KeyboardInterrupt

    older = read_adapter(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train_run(on(base, CONFIG), tmp_path / "new", device="cpu", on_event=interrupt)
    checkpoints = {"checkpoint.safetensors", "checkpoint.earlier.safetensors"}
    left = {path.name for path in (tmp_path / "new").iterdir()}
    assert left == {RECORD_FOLDER, "metrics.jsonl"} | checkpoints
    assert [ref.label for ref in find_adapters(tmp_path)] == ["run"]
    with pytest.raises(UnfinishedError, match="'lora-analysis train' is still running there"):
        read_adapter(tmp_path / "new")
    with pytest.raises(UnfinishedError, match="is not finished"):
        find_adapters(tmp_path / "new")
    assert run_state(on(base, CONFIG), tmp_path / "new") == "unfinished"

    # Where an older run is replaced, it stays until the new one is complete.
    other = on(base, replace(CONFIG, seed=4))
    with pytest.raises(KeyboardInterrupt):
        train_run(other, tmp_path / "run", device="cpu", on_event=interrupt, force=True)
    assert read_adapter(tmp_path / "run").provenance.sha256 == older.provenance.sha256
    assert train()[0].kind == "skipped"
    assert run_state(other, tmp_path / "run") == "changed"
    events = train(other, force=True)
    assert (events[0].step, events[-1].kind) == (2, "finished")  # from its checkpoint
    assert run_state(other, tmp_path / "run") == "finished"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [RECORD_FOLDER, *FILES]


def test_a_run_of_another_configuration_is_refused_by_what_changed(
    base: Path, train: Callable[..., list[RunEvent]], tmp_path: Path
) -> None:
    train()
    held = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(OccupiedError, match=r"another configuration: rank 2, now 4 .*--force"):
        train(replace(CONFIG, rank=4))
    # A run of an earlier version, which kept no record, is named as that and stays readable.
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest["versions"]["lora-analysis"] = "0.0.9"
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "run" / RECORD_FOLDER)
    with pytest.raises(OccupiedError, match=r"rank 2, now 4 \(written by lora_analysis 0.0.9\)"):
        train(replace(CONFIG, rank=4))
    assert read_adapter(tmp_path / "run").provenance.rank == 2
    assert train()[0].kind == "skipped"
    weights = tmp_path / "run" / "adapter_model.safetensors"
    assert weights.read_bytes() == held[weights.name]
    assert train(replace(CONFIG, rank=4), force=True)[-1].kind == "finished"


def test_files_of_others_and_inputs_are_never_trained_over(
    base: Path, train: Callable[..., list[RunEvent]], tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    for folder in (base, base / "trajectory"):
        for force in (False, True):
            with pytest.raises(OccupiedError, match="inputs are never written"):
                train_run(on(base, CONFIG), folder, device="cpu", force=force)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    (tmp_path / "run" / "trajectory").mkdir(parents=True)
    (tmp_path / "run" / "trajectory" / "mine").write_text("mine")
    (tmp_path / "run" / "adapter_model.safetensors").write_text("mine too")
    with pytest.raises(OccupiedError, match="is not empty"):
        train()
    train(force=True)
    assert (tmp_path / "run" / "trajectory" / "mine").read_text() == "mine"
    assert read_adapter(tmp_path / "run").provenance.seed == 3


def test_an_edited_file_of_a_run_needs_force(
    train: Callable[..., list[RunEvent]], tmp_path: Path
) -> None:
    train()
    manifest = tmp_path / "run" / "manifest.json"
    facts = json.loads(manifest.read_text()) | {"note": "by hand"}
    manifest.write_text(json.dumps(facts))
    with pytest.raises(OccupiedError, match=r"manifest.json was edited after"):
        train()
    assert json.loads(manifest.read_text()) == facts
    assert train(force=True)[-1].kind == "finished"


def test_a_target_that_matches_nothing_is_refused(train: Callable[..., list[RunEvent]]) -> None:
    with pytest.raises(TargetError, match="q_porj"):
        train(replace(CONFIG, targets=("q_porj",)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("seed", -1), ("alpha", 0.0), ("alpha", float("inf")), ("targets", ())],
)
def test_a_configuration_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"{field} must be"):
        replace(CONFIG, **{field: value})


def test_the_name_tells_a_data_seed_of_its_own() -> None:
    assert replace(CONFIG, data_seed=7).name == "rotate-r2-s3-d7"
    assert replace(CONFIG, dropout_seed=7).name == "rotate-r2-s3-p7"
    assert replace(CONFIG, method="full").name == "rotate-full-s3"


def test_a_run_that_cannot_start_leaves_the_older_one_as_it_was(
    base: Path,
    train: Callable[..., list[RunEvent]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train()
    folder, other = tmp_path / "run", on(base, replace(CONFIG, seed=4))
    held = files_of(folder)
    with pytest.raises(InputError, match="no device 'abacus'"):
        train_run(other, folder, device="abacus", force=True)
    with pytest.raises(TargetError, match="q_porj"):
        train(replace(other, targets=("q_porj",)), force=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="scikit-learn"):
        train(other, force=True)
    assert files_of(folder) == held


def test_a_run_needs_no_installed_package_to_say_its_version(
    train: Callable[..., list[RunEvent]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.metadata.distribution

    def uninstalled(name: str) -> importlib.metadata.Distribution:
        if name == "lora-analysis":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr("importlib.metadata.distribution", uninstalled)
    train()
    versions = json.loads((tmp_path / "run" / "manifest.json").read_text())["versions"]
    assert versions["lora-analysis"] == lora_analysis.__version__


def _gone() -> int:
    """Return the number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("host", [None, "elsewhere"])
def test_a_run_that_another_process_is_at_is_left_to_it(
    host: str | None, train: Callable[..., list[RunEvent]], tmp_path: Path
) -> None:
    train()
    lock = tmp_path / "run" / RECORD_FOLDER / "run.lock"
    pid = os.getpid() if host is None else _gone()  # on another host, nobody can tell
    lock.write_text(f"{pid} {host or socket.gethostname()}\n")
    held = files_of(tmp_path / "run")
    with pytest.raises(InputError, match=rf"process {pid} on {host or ''}.*delete .*\.lock"):
        train(replace(CONFIG, seed=4), force=True)
    assert files_of(tmp_path / "run") == held
    assert train()[0].kind == "skipped"  # reading what is finished disturbs nobody


def test_a_lock_that_a_killed_process_left_is_taken_over(
    train: Callable[..., list[RunEvent]], tmp_path: Path
) -> None:
    lock = tmp_path / "run" / RECORD_FOLDER / "run.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(f"{_gone()} {socket.gethostname()}\n")
    assert train()[-1].kind == "finished"
    assert not lock.exists()
