"""The loop, on models small enough to know the answer."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lora_analysis.errors import DivergedError, InputError
from lora_analysis.training.config import Seeds
from lora_analysis.training.devices import cpu_threads, resolve_device
from lora_analysis.training.loop import StepMetrics, Training, learning_rate
from lora_analysis.training.options import LoopOptions
from lora_analysis.training.tasks import ArrayTask, DataSplit, TaskData, accuracy

OPTIONS = LoopOptions(steps=12, batch_size=8, lr=1e-2, warmup_steps=3, evaluations=3)


@pytest.fixture
def data(rng: np.random.Generator) -> TaskData:
    inputs = rng.standard_normal((60, 5)).astype(np.float32)
    targets = (inputs[:, 0] > 0).astype(np.int64)
    return TaskData(DataSplit(inputs[:40], targets[:40]), DataSplit(inputs[40:], targets[40:]))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


def _trained(
    model: nn.Module, data: TaskData, options: LoopOptions, seed: int = 4
) -> tuple[nn.Module, list[StepMetrics]]:
    twin = copy.deepcopy(model)
    return twin, list(Training(twin, ArrayTask(data), options, seeds=Seeds(0, seed, 0)))


def test_training_lowers_the_loss_and_raises_the_accuracy(model: nn.Module, data: TaskData) -> None:
    _, metrics = _trained(model, data, replace(OPTIONS, steps=100))
    assert metrics[-1].loss < 0.5 * metrics[1].loss
    assert metrics[-1].test_accuracy > max(0.8, metrics[0].test_accuracy)


def test_the_same_options_give_the_same_bits(model: nn.Module, data: TaskData) -> None:
    first, seen = _trained(model, data, OPTIONS)
    second, again = _trained(model, data, OPTIONS)
    assert seen == again
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_data_seed_gives_another_order(model: nn.Module, data: TaskData) -> None:
    _, seen = _trained(model, data, OPTIONS)
    _, other = _trained(model, data, OPTIONS, seed=5)
    assert seen[0] == other[0]  # the model before training is the same
    assert seen[1].loss != other[1].loss


def test_the_global_generator_is_neither_used_nor_touched(model: nn.Module, data: TaskData) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    _trained(model, data, OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_parameters_stay_and_get_no_gradient(model: nn.Sequential, data: TaskData) -> None:
    model[0].requires_grad_(False)
    trained, _ = _trained(model, data, OPTIONS)
    assert torch.equal(trained[0].weight, model[0].weight)
    assert trained[0].weight.grad is None
    assert not torch.equal(trained[2].weight, model[2].weight)


def test_one_epoch_draws_every_example_once(model: nn.Module, data: TaskData) -> None:
    drawn: list[torch.Tensor] = []

    def record(batch: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        drawn.append(batch)
        return batch

    options = replace(OPTIONS, steps=10)  # 40 examples in batches of 8: two epochs
    list(Training(model, ArrayTask(data, record), options))
    wanted = np.sort(data.train.inputs[:, 0])
    for epoch in (drawn[:5], drawn[5:]):
        np.testing.assert_array_equal(np.sort(torch.cat(epoch)[:, 0].numpy()), wanted)


def test_a_batch_larger_than_the_data_is_all_of_it(model: nn.Module, data: TaskData) -> None:
    _, metrics = _trained(model, data, replace(OPTIONS, batch_size=1000, steps=1, evaluations=1))
    loss = nn.functional.cross_entropy(
        model(torch.as_tensor(data.train.inputs)), torch.as_tensor(data.train.targets)
    )
    assert metrics[1].loss == pytest.approx(loss.item(), rel=1e-5)


def test_the_first_step_is_adamw_by_hand(data: TaskData) -> None:
    model = nn.Linear(5, 2, bias=False)
    before = model.weight.detach().clone()
    options = LoopOptions(
        steps=1, batch_size=40, lr=0.1, warmup_steps=0, weight_decay=0.5, max_grad_norm=1e9
    )
    list(Training(model, ArrayTask(data), options))
    twin = before.clone().requires_grad_()
    inputs, targets = torch.as_tensor(data.train.inputs), torch.as_tensor(data.train.targets)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(inputs @ twin.T, targets), twin)
    # With one step behind them both momenta are the gradient's own: a step of lr in each sign.
    wanted = before * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), wanted, rtol=1e-4, atol=1e-6)


def test_the_rate_warms_up_and_falls_along_half_a_cosine() -> None:
    options = LoopOptions(steps=100, lr=2.0, warmup_steps=10)
    rates = [learning_rate(step, options) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0, rel=0.03)
    assert rates[50] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.001
    assert learning_rate(1, replace(options, warmup_steps=0)) == 2.0


@pytest.mark.parametrize(("evaluations", "steps"), [(3, [0, 4, 8, 12]), (1, [0, 12])])
def test_the_test_split_is_looked_at_evenly_and_at_the_end(
    model: nn.Module, data: TaskData, evaluations: int, steps: list[int]
) -> None:
    _, metrics = _trained(model, data, replace(OPTIONS, evaluations=evaluations))
    assert [m.step for m in metrics] == list(range(13))
    assert [m.step for m in metrics if m.test_accuracy is not None] == steps


def test_more_evaluations_than_steps_look_at_every_step(model: nn.Module, data: TaskData) -> None:
    _, metrics = _trained(model, data, replace(OPTIONS, steps=2, evaluations=50))
    assert all(m.test_accuracy is not None for m in metrics)


def test_the_reported_accuracy_is_that_of_the_model(model: nn.Module, data: TaskData) -> None:
    trained, metrics = _trained(model, data, OPTIONS)
    logits = trained(torch.as_tensor(data.test.inputs)).detach().numpy()
    assert metrics[-1].test_accuracy == np.mean(logits.argmax(axis=1) == data.test.targets)


def test_accuracy_measures_in_evaluation_mode_and_leaves_the_mode(data: TaskData) -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(5, 2))
    model.train()
    assert accuracy(model, data.test) == accuracy(model, data.test)
    assert model.training


def test_a_diverged_training_says_at_which_step(model: nn.Module, data: TaskData) -> None:
    def spoil(inputs: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        return inputs * float("inf")

    words = r"diverged: the loss at step 1 is nan at .* examples \d+, .* smaller lr"
    with pytest.raises(DivergedError, match=words):
        list(Training(model, ArrayTask(data, spoil), OPTIONS))


def test_a_model_with_nothing_to_train_is_refused(model: nn.Module, data: TaskData) -> None:
    model.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter to train"):
        list(Training(model, ArrayTask(data), OPTIONS))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("beta2", 1.0),
        ("max_grad_norm", 0.0),
        ("evaluations", 0),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"{field} must be .*found {value!r}"):
        replace(OPTIONS, **{field: value})


def test_auto_is_a_device_of_this_machine() -> None:
    device = resolve_device("auto")
    assert torch.ones(1, device=device).sum() == 1
    assert resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "xla"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"device '{name}'.*cpu"):
        resolve_device(name)


def test_one_thread_gives_the_others_back() -> None:
    before = torch.get_num_threads()
    with cpu_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
