"""The callback in a real Trainer; its numbers are recomputed from dense matrices."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_analysis.errors import InputError
from lora_analysis.formats import as_adapter
from lora_analysis.integrations import SubspaceCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def peft_model(seed: int = 0) -> Any:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    return get_peft_model(LlamaForCausalLM(config), lora)


def trainer_of(model: Any, folder: Path, *, steps: int = 6, callbacks: Any = ()) -> Any:
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 30, (16, 8), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, logging_steps=2,
        learning_rate=0.05, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        lr_scheduler_type="constant",
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=list(callbacks))


class Recorder:
    """A reporter: keeps a copy of the factors at each step, and everything that is logged."""

    def __init__(self) -> None:
        self.adapters: dict[int, Any] = {}
        self.logs: list[tuple[int, dict[str, float]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *_args, **_kwargs: None
        raise AttributeError(name)

    def on_train_begin(
        self, _args: Any, state: Any, _control: Any, *, model: Any, **_: Any
    ) -> None:
        self.adapters[state.global_step] = as_adapter(model)

    def on_step_end(self, _args: Any, state: Any, _control: Any, *, model: Any, **_: Any) -> None:
        self.adapters[state.global_step] = as_adapter(model)

    def on_log(self, _args: Any, state: Any, _control: Any, *, logs: Any, **_: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))


def omega(first: np.ndarray, second: np.ndarray) -> float:
    gram1, gram2 = first @ first.T, second @ second.T
    return float(np.sum(gram1 * gram2) / np.linalg.norm(gram1) / np.linalg.norm(gram2))


def row_projection(A: np.ndarray) -> np.ndarray:
    return A.T @ np.linalg.inv(A @ A.T) @ A


def expected_numbers(
    adapters: dict[int, Any], step: int, last: int, names: list[str]
) -> dict[str, float]:
    """Return the medians from dense matrices, without any code of the callback."""
    rows = []
    for name in names:
        now, then, start = (adapters[moment][name] for moment in (step, last, 0))
        delta = now.scale * now.B.astype(float) @ now.A
        before = then.scale * then.B.astype(float) @ then.A
        values = np.linalg.svd(delta, compute_uv=False)
        p = values[values > 1e-12 * values[0]] / values[values > 1e-12 * values[0]].sum()
        A, A0 = now.A.astype(float), start.A.astype(float)
        same = np.trace(row_projection(A) @ row_projection(A0)) / len(A)
        rows.append(
            {
                "sigma_1": values[0],
                "norm": np.linalg.norm(delta),
                "stable_rank": np.linalg.norm(delta) ** 2 / values[0] ** 2,
                "effective_rank": np.exp(-np.sum(p * np.log(p))),
                "omega_last_output": omega(delta, before),
                "omega_last_input": omega(delta.T, before.T),
                "A_drift": np.linalg.norm(A - A0) / np.linalg.norm(A0),
                "A_rotation": 1 - same,
            }
        )
    return {key: float(np.median([row[key] for row in rows])) for key in rows[0]}


def test_looks_of_a_real_trainer_are_logged_to_its_reporters(tmp_path: Path) -> None:
    model = peft_model()
    recorder = Recorder()
    trainer = trainer_of(model, tmp_path, callbacks=[recorder])
    callback = SubspaceCallback(every=2).attach(trainer)
    trainer.train()
    looks = [(step, logs) for step, logs in recorder.logs if "subspace/norm" in logs]
    assert [step for step, _ in looks] == [0, 2, 4, 6]
    assert [entry["step"] for entry in callback.history] == [0, 2, 4, 6]
    names = list(recorder.adapters[0])
    for step in (4, 6):
        logs = dict(looks)[step]
        for key, value in expected_numbers(recorder.adapters, step, step - 2, names).items():
            assert logs[f"subspace/{key}"] == pytest.approx(value, rel=1e-5, abs=1e-9), (step, key)
        queries = [name for name in names if name.endswith("q_proj")]
        for key, value in expected_numbers(recorder.adapters, step, step - 2, queries).items():
            assert logs[f"subspace/q_proj/{key}"] == pytest.approx(value, rel=1e-5, abs=1e-9)
    # The loss is still logged at its own steps, and the history of the trainer has both.
    assert [step for step, logs in recorder.logs if "loss" in logs] == [2, 4, 6]
    assert sum("subspace/norm" in entry for entry in trainer.state.log_history) == 4
    # ΔW is zero at step 0: it has a norm, and no direction.
    first = looks[0][1]
    assert first["subspace/norm"] == first["subspace/A_drift"] == 0
    assert not any("omega" in key for key in first)


def test_looks_change_nothing_in_a_training(tmp_path: Path) -> None:
    states = []
    for watched in (True, False):
        model = peft_model()
        trainer = trainer_of(model, tmp_path / str(watched))
        if watched:
            SubspaceCallback(every=1).attach(trainer)
        trainer.train()
        states.append(as_adapter(model))
    for name in states[0]:
        np.testing.assert_array_equal(states[0][name].B, states[1][name].B)


def test_a_reference_modules_and_an_end_between_looks(tmp_path: Path) -> None:
    model = peft_model()
    trainer_of(model, tmp_path / "first").train()
    reference = as_adapter(model)
    other = peft_model(seed=1)
    trainer = trainer_of(other, tmp_path / "second", steps=5)
    callback = SubspaceCallback(
        every=4, modules="q_proj", reference=reference, by_type=False
    ).attach(trainer)
    trainer.train()
    assert [entry["step"] for entry in callback.history] == [0, 4, 5]
    trained = as_adapter(other)
    values = [
        omega(trained[name].delta_weight(), reference[name].delta_weight())
        for name in trained
        if name.endswith("q_proj")
    ]
    last = callback.history[-1]
    assert last["subspace/omega_reference_output"] == pytest.approx(np.median(values), rel=1e-6)
    assert not any(key.count("/") > 1 for key in last)


def test_without_attaching_the_numbers_are_in_the_history(tmp_path: Path) -> None:
    callback = SubspaceCallback(every=3)
    trainer = trainer_of(peft_model(), tmp_path, callbacks=[callback])
    trainer.train()
    assert [entry["step"] for entry in callback.history] == [0, 3, 6]
    assert not any("subspace/norm" in entry for entry in trainer.state.log_history)
    assert pickle.loads(pickle.dumps(callback)).history == callback.history
    assert copy.deepcopy(callback).every == 3


def test_a_model_that_cannot_be_read_stops_the_start_and_not_the_training(tmp_path: Path) -> None:
    model = peft_model()
    trainer = trainer_of(model.base_model.model.lm_head, tmp_path)
    SubspaceCallback().attach(trainer)
    with pytest.raises(InputError, match="The Linear has no adapter"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    callback = SubspaceCallback(every=1, modules="q_proj")
    callback.look(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match=r"step 1 is not analyzed: .*non-finite"):
        callback.on_step_end(None, type("State", (), {"global_step": 1}), None, model=model)
    with pytest.raises(InputError, match="No module matches 'k_proj'"):
        SubspaceCallback(modules="k_proj").look(peft_model())
    with pytest.raises(InputError, match="at least 1, got 0"):
        SubspaceCallback(every=0)


def test_a_look_reads_the_factors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_analysis.formats import live

    model = peft_model()
    copied = []
    original = live.MemoryTensors

    def watch(label: str, tensors: dict[str, Any]) -> Any:
        copied.extend(tensors)
        return original(label, tensors)

    monkeypatch.setattr(live, "MemoryTensors", watch)
    model.base_model.model.lm_head.modules_to_save = torch.nn.ModuleDict(
        {"default": torch.nn.Linear(16, 30)}
    )
    SubspaceCallback().look(model)
    assert copied
    assert all(".lora_" in name for name in copied)
