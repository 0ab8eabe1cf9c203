"""A run that is interrupted anywhere ends as the one that was not; passing states are kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import metrics_of
from torch import nn
from training_bases import SHORT, on, write_tiny_base

from lora_analysis.errors import DivergedError, InputError, MissingExtraError, OccupiedError
from lora_analysis.formats import find_adapters, read_adapter
from lora_analysis.lora import initial_factor
from lora_analysis.training import LoopOptions, RunConfig, RunEvent, Seeds, run_state, train_run
from lora_analysis.training.checkpoints import checkpoint_facts, load_checkpoint, save_checkpoint
from lora_analysis.training.events import check_trackers
from lora_analysis.training.loop import Training
from lora_analysis.training.tasks import ArrayTask, DataSplit, TaskData

LOOP = replace(SHORT, steps=7, checkpoint_every=2, evaluations=3)
CONFIG = RunConfig(task="rotate", rank=2, seed=3, dropout=0.2, loop=LOOP)
RESULTS = ["adapter_config.json", "adapter_model.safetensors", "metrics.jsonl"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / CONFIG.name
    return train_run(on(base, CONFIG), folder, device="cpu")


def interrupted(config: RunConfig, folder: Path, step: int) -> list[RunEvent]:
    events: list[RunEvent] = []

    def watch(event: RunEvent) -> None:
        events.append(event)
        if event.kind == "step" and event.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(config, folder, device="cpu", on_event=watch)
    return events


@pytest.mark.parametrize("steps", [(1,), (2,), (5,), (6,), (3, 3, 5)])
def test_a_run_interrupted_anywhere_ends_bit_equal_to_the_whole_one(
    steps: tuple[int, ...], base: Path, whole: Path, tmp_path: Path
) -> None:
    config, folder = on(base, CONFIG), tmp_path / CONFIG.name
    for number, step in enumerate(steps):
        torch.manual_seed(number)  # the caller's own generator is no part of it
        interrupted(config, folder, step)
    assert run_state(config, folder) == "unfinished"
    events: list[RunEvent] = []
    train_run(config, folder, device="cpu", on_event=events.append)
    assert events[0].step == steps[-1] - steps[-1] % 2  # from the last checkpoint, not from 0
    for name in RESULTS:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not (folder / "checkpoint.safetensors").exists()
    assert run_state(config, folder) == "finished"


def test_a_checkpoint_of_another_run_is_not_gone_on_from(base: Path, tmp_path: Path) -> None:
    interrupted(on(base, CONFIG), tmp_path / "run", 5)
    other = replace(on(base, CONFIG), seed=4)
    events: list[RunEvent] = []
    with pytest.raises(OccupiedError, match=r"seed.init 3, now 4"):
        train_run(other, tmp_path / "run", device="cpu")
    train_run(other, tmp_path / "run", device="cpu", on_event=events.append, force=True)
    assert events[0].step == 0
    assert len(metrics_of(tmp_path / "run")) == 8


def test_a_checkpoint_that_cannot_be_read_is_not_gone_on_from(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    interrupted(on(base, CONFIG), tmp_path / "run", 5)
    for damaged in ("checkpoint.safetensors", "checkpoint.earlier.safetensors"):
        (tmp_path / "run" / damaged).write_bytes(b"cut off")
    train_run(on(base, CONFIG), tmp_path / "run", device="cpu")
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def _flip_a_bit(folder: Path) -> int:
    path = folder / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    return 2


def _zero_the_tail(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    content = path.read_bytes()
    kept = content.index(b"\n", content.index(b'"step": 3')) + 1
    path.write_bytes(content[:kept] + bytes(len(content) - kept))
    return 2


def _zero_all(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    path.write_bytes(bytes(path.stat().st_size))
    return 0


def _lose_the_last(folder: Path) -> int:
    (folder / "checkpoint.safetensors").unlink()
    return 2


@pytest.mark.parametrize("harm", [_flip_a_bit, _zero_the_tail, _zero_all, _lose_the_last])
def test_a_damaged_run_goes_on_from_what_is_whole_to_the_same_bits(
    harm: Callable[[Path], int], base: Path, whole: Path, tmp_path: Path
) -> None:
    interrupted(on(base, CONFIG), tmp_path / "run", 5)
    step = harm(tmp_path / "run")
    events: list[RunEvent] = []
    train_run(on(base, CONFIG), tmp_path / "run", device="cpu", on_event=events.append)
    assert events[0].step == step
    for name in RESULTS:
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_dropout_has_a_stream_of_its_own(base: Path, whole: Path, tmp_path: Path) -> None:
    other = train_run(replace(on(base, CONFIG), dropout_seed=9), tmp_path / "run", device="cpu")
    ours, theirs = metrics_of(whole), metrics_of(other)
    assert ours[1]["loss"] == theirs[1]["loss"]  # B is zero at the first step: the same data
    assert ours[3]["loss"] != theirs[3]["loss"]
    assert json.loads((other / "manifest.json").read_text())["dropout_seed"] == 9


def test_adapters_of_chosen_steps_are_kept_where_a_study_finds_them(
    base: Path, tmp_path: Path
) -> None:
    loop = replace(LOOP, trajectory=(0, 2, 7))
    config = replace(on(base, CONFIG), loop=loop)
    folder = train_run(config, tmp_path / config.name, device="cpu")
    passing = find_adapters(folder / "trajectory")
    assert [ref.label for ref in passing] == [f"{CONFIG.name}-step{step}" for step in (0, 2, 7)]
    first, _, last = (read_adapter(ref) for ref in passing)
    assert (first.provenance.seed, first.provenance.task) == (3, "rotate")
    for name, update in first.items():
        assert not update.B.any()  # type: ignore[union-attr]
        start = initial_factor(name, 2, 3, update.shape[1]).numpy()
        np.testing.assert_array_equal(update.A, start)  # type: ignore[union-attr]
    final = read_adapter(folder)
    assert final.provenance.step == 7  # so that a study knows it for the last of the run
    assert (
        read_adapter(train_run(on(base, CONFIG), tmp_path / "whole", device="cpu")).provenance.step
        is None
    )
    for name, update in last.items():
        np.testing.assert_array_equal(update.B, final[name].B)  # type: ignore[union-attr]
    manifest = folder / "trajectory" / f"{CONFIG.name}-step2" / "manifest.json"
    assert json.loads(manifest.read_text())["step"] == 2


def test_the_best_test_loss_that_does_not_come_back_ends_the_run(
    base: Path, tmp_path: Path
) -> None:
    # So large a rate makes it worse at once.
    loop = LoopOptions(
        steps=40,
        batch_size=16,
        lr=1.0,
        warmup_steps=0,
        evaluations=20,
        patience=2,
        max_grad_norm=None,
    )
    folder = train_run(replace(on(base, CONFIG), loop=loop), tmp_path / "run", device="cpu")
    tested = [line for line in metrics_of(folder) if "test_loss" in line]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["steps"] == tested[-1]["step"] < 40
    best = min(line["test_loss"] for line in tested)
    assert best < min(line["test_loss"] for line in tested[-2:])


def test_a_run_that_diverges_names_step_examples_and_last_checkpoint(
    base: Path, tmp_path: Path
) -> None:
    loop = LoopOptions(
        steps=40,
        batch_size=8,
        lr=1e18,
        warmup_steps=0,
        schedule="constant",
        max_grad_norm=None,
        evaluations=1,
    )
    config = replace(on(base, CONFIG), loop=replace(loop, checkpoint_every=1))
    words = r"rotate-r2-s3: Training diverged.*step \d+.*examples \d+.*last checkpoint: (that|none)"
    with pytest.raises(DivergedError, match=words):
        train_run(config, tmp_path / "run", device="cpu")
    saved = checkpoint_facts(tmp_path / "run" / "checkpoint.safetensors")
    if saved is not None:
        assert saved["step"] >= 1


def test_all_weights_are_trained_by_the_same_loop_and_saved_as_a_model(
    base: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    config = replace(on(base, CONFIG), method="full", dropout=0.0)
    folder = train_run(config, tmp_path / config.name, device="cpu")
    assert folder.name == "rotate-full-s3"
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name].float(), after[name]) for name in before) > 20
    assert run_state(config, folder) == "finished"


def data() -> ArrayTask:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((60, 5)).astype(np.float32)
    targets = (inputs[:, 0] > 0).astype(np.int64)
    return ArrayTask(
        TaskData(DataSplit(inputs[:40], targets[:40]), DataSplit(inputs[40:], targets[40:]))
    )


def model(*, batch_norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8) if batch_norm else nn.Dropout(0.3)
    return nn.Sequential(nn.Linear(5, 8), middle, nn.Linear(8, 2))


def test_many_small_batches_make_the_step_of_one_large_batch() -> None:
    results = []
    for batch, accumulate in ((8, 1), (2, 4)):
        one = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
        torch.manual_seed(1)
        for value in one.parameters():
            nn.init.normal_(value)
        options = LoopOptions(
            steps=10, batch_size=batch, gradient_accumulation_steps=accumulate, warmup_steps=0
        )
        list(Training(one, data(), options))
        results.append([value.detach() for value in one.parameters()])
    for large, small in zip(*results, strict=True):
        torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-6)


def test_frozen_batch_norms_keep_their_statistics() -> None:
    one = model(batch_norm=True)
    one[1].requires_grad_(False)
    before = one[1].running_mean.clone()
    list(Training(one, data(), LoopOptions(steps=3, batch_size=8)))
    assert torch.equal(one[1].running_mean, before)


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_a_training_goes_on_from_its_file_to_the_same_bits(autocast: Any, tmp_path: Path) -> None:
    options = LoopOptions(
        steps=9, batch_size=8, evaluations=3, patience=5, autocast=autocast, label_smoothing=0.1
    )
    seeds = Seeds(0, 1, 2)
    whole = model()
    seen = list(Training(whole, data(), options, seeds=seeds))
    first = Training(model(), data(), options, seeds=seeds)
    for metrics in first:
        if metrics.step == 4:
            save_checkpoint(first, tmp_path, {"key": "k"})
            break
    again = model()
    second = Training(again, data(), options, seeds=seeds)
    assert load_checkpoint(second, tmp_path / "checkpoint.safetensors")
    assert checkpoint_facts(tmp_path / "checkpoint.safetensors") == {"key": "k"}
    assert list(second) == seen[5:]
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_half_precision_products_stay_near_those_of_single_precision() -> None:
    losses = {}
    for autocast in (None, "bfloat16"):
        options = LoopOptions(steps=20, batch_size=8, autocast=autocast)  # type: ignore[arg-type]
        losses[autocast] = [m.loss for m in Training(model(), data(), options)][-1]
    assert losses[None] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses[None], rel=0.05)


def test_a_tracker_that_fails_is_noted_and_stops_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_analysis.training import events as trackers

    class Broken:
        def __init__(self, config: RunConfig, folder: Path) -> None:
            pass

        def log(self, _values: object, _step: int) -> None:
            message = "the disk is full"
            raise OSError(message)

        def close(self) -> None:
            pass

    monkeypatch.setattr(trackers, "TRACKERS", {"json": Broken})
    events: list[RunEvent] = []
    train_run(
        on(base, CONFIG),
        tmp_path / "run",
        device="cpu",
        trackers=("json",),
        on_event=events.append,
    )
    notes = [event.note for event in events if event.kind == "note"]
    assert notes == ["The tracker json failed (OSError: the disk is full); it is left out."]
    assert events[-1].kind == "finished"


def test_what_a_tracker_prints_is_no_part_of_what_a_command_prints(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_analysis.training import events as trackers

    class Loud:
        def __init__(self, *_: object) -> None:
            sys.stdout.write("* project initialized\n")

        def log(self, _values: object, _step: int) -> None:
            sys.stdout.write("* logged\n")

        def close(self) -> None:
            sys.stdout.write("* finished\n")

    monkeypatch.setattr(trackers, "TRACKERS", {"json": Loud})
    train_run(on(base, CONFIG), tmp_path / "run", device="cpu", trackers=("json",))
    out, err = capsys.readouterr()
    assert out == ""
    assert "* project initialized" in err
    assert "* finished" in err


def test_trackers_are_checked_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no tracker 'clearml'. Choose from tensorboard"):
        check_trackers(("clearml",))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lora-analysis\[trackers\]'"):
        check_trackers(("wandb",))


def test_the_presets_are_the_papers_and_give_runs() -> None:
    from lora_analysis.training.config import PRESETS, get_preset

    assert len(PRESETS) == 8 * 3 + 3 + 1
    for name in PRESETS:
        RunConfig.from_dict({**get_preset(name), "base": {"source": "somewhere"}})
    e2e = RunConfig.from_dict({**get_preset("gpt2-e2e"), "base": {"source": "gpt2"}})
    assert (e2e.rank, e2e.alpha, e2e.dropout) == (4, 32, 0.1)
    assert e2e.parts == (("c_attn", ("q", "v")),)
    loop = e2e.loop
    assert (loop.batch_size, loop.epochs, loop.warmup_steps, loop.lr) == (8, 5, 500, 2e-4)
    assert (loop.schedule, loop.weight_decay, loop.label_smoothing) == ("linear", 0.01, 0.1)
    assert loop.max_grad_norm is None
    with pytest.raises(InputError, match=r"no preset 'gpt2-e2'. Near names: gpt2-e2e"):
        get_preset("gpt2-e2")


# Tables 9 and 10 as printed: task by task a row each of batch, epochs, rate and longest sequence.
PRINTED = {
    "roberta-base": """16 16 16 32 32 16 32 16
        30 60 30 80 25 25 80 40
        5E-04 5E-04 4E-04 4E-04 4E-04 5E-04 5E-04 4E-04
        512 512 512 512 512 512 512 512
        0.1 0.1 0.1 0.1 0.1 0.1 0.1 0.1""",
    "roberta-large": """4 4 4 4 4 4 8 8
        10 10 20 20 10 20 20 30
        3E-04 4E-04 3E-04 2E-04 2E-04 3E-04 4E-04 2E-04
        128 128 512 128 512 512 512 512
        0.1 0.1 0.1 0.1 0.1 0.1 0.1 0.1""",
    "deberta-xxl": """8 8 32 4 6 8 4 4
        5 16 30 10 8 11 11 10
        1E-04 6E-05 2E-04 1E-04 1E-04 1E-04 2E-04 2E-04
        256 128 128 64 512 320 320 128
        0 0.01 0.01 0 0.01 0.01 0.01 0.1""",
}
ALPHA_AND_WARMUP = {"roberta-base": (8, 0.06), "roberta-large": (16, 0.06), "deberta-xxl": (8, 0.1)}


@pytest.mark.parametrize("model_name", PRINTED)
def test_the_presets_of_glue_are_the_tables_row_by_row(model_name: str) -> None:
    from lora_analysis.training.config import get_preset

    tasks = ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]
    found = [get_preset(f"{model_name}-{task}") for task in tasks]
    rows = [[float(word) for word in line.split()] for line in PRINTED[model_name].splitlines()]
    for row, field in zip(rows, ("batch_size", "epochs", "lr", "", "weight_decay"), strict=True):
        held = [one["loop"][field] if field else one["data"]["max_length"] for one in found]
        assert held == row, field
    alpha, warmup = ALPHA_AND_WARMUP[model_name]
    for one in found:
        assert (one["rank"], one["alpha"], one["loop"]["warmup_ratio"]) == (8, alpha, warmup)
        assert one["loop"]["schedule"] == "linear"


def test_the_linear_schedule_is_transformers_own() -> None:
    pytest.importorskip("transformers")
    from transformers import get_linear_schedule_with_warmup

    from lora_analysis.training.loop import learning_rate

    options = LoopOptions(steps=50, lr=1.0, warmup_steps=10, schedule="linear")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, 10, 50)
    for step in range(1, 51):
        # Theirs has a first step at rate zero, which trains nothing.
        optimizer.step()
        theirs.step()
        falling = optimizer.param_groups[0]["lr"]
        assert learning_rate(step, options) == pytest.approx(falling, abs=1 / 40 + 1e-9)


def test_tensorboard_is_told_every_figure(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train_run(on(base, CONFIG), tmp_path / "run", device="cpu", trackers=("tensorboard",))
    events = EventAccumulator(str(folder / "tensorboard" / CONFIG.name))
    events.Reload()
    told = [event.value for event in events.Scalars("loss")]
    assert told == pytest.approx([line["loss"] for line in metrics_of(folder)[1:]])


def test_half_precision_with_a_scaled_loss_trains() -> None:
    options = LoopOptions(steps=60, batch_size=8, lr=0.02, warmup_steps=0, autocast="float16")
    seen = [metrics.loss for metrics in Training(model(), data(), options)][1:]
    assert np.isfinite(seen).all()
    assert np.mean(seen[-5:]) < np.mean(seen[:5])


def test_gradients_that_are_not_finite_stop_the_training() -> None:
    class Root(nn.Module):
        """Zero at zero, where the square root has no slope."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight).abs().sqrt()

    with pytest.raises(DivergedError, match=r"step 1 is 0.69.*, but its gradient (nan|inf)"):
        list(Training(Root(), data(), LoopOptions(steps=3, batch_size=8)))
