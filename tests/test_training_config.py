"""A run's configuration: what it takes and refuses, and what makes two runs different ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lora_analysis.errors import InputError
from lora_analysis.training import BaseOptions, DataOptions, LoopOptions, RunConfig, Seeds

CONFIG = RunConfig(
    task="reviews",
    rank=4,
    seed=3,
    data_seed=1,
    targets="all-linear",
    rank_pattern={"query": 2},
    alpha_pattern={r".*\.1\..*": 5.0},
    parts={"c_attn": ["q", "v"]},
    target_parameters=("experts.down_proj",),
    trainable=("classifier",),
    base=BaseOptions(source="models/bert", dtype="bfloat16"),
    data=DataOptions(source="data/reviews.csv", label="stars"),
    loop=LoopOptions(epochs=2, schedule="linear", trajectory=(0, 4, 2)),
)


def test_a_configuration_comes_back_from_its_table_through_json() -> None:
    table = json.loads(json.dumps(CONFIG.to_dict()))
    again = RunConfig.from_dict(table)
    assert again.to_dict() == CONFIG.to_dict()
    assert again == replace(CONFIG, dropout_seed=3)  # what was implied is stated
    assert hash(again) == hash(replace(CONFIG, dropout_seed=3))
    assert again.loop.trajectory == (0, 2, 4)


def test_an_empty_table_is_the_digits_run_of_the_defaults() -> None:
    assert RunConfig.from_dict({}) == RunConfig(task="digits", rank=8, seed=0)
    named = RunConfig.from_dict({"data": {"source": "data/reviews.csv"}})
    assert named.name == "reviews-r8-s0"


@pytest.mark.parametrize(
    ("table", "seeds"),
    [
        ({"seed": 4}, Seeds(4, 4, 4)),
        ({"seed": {"init": 4}}, Seeds(4, 4, 4)),
        ({"seed": {"data": 2}}, Seeds(0, 2, 0)),
        ({"seed": {"init": 1, "data": 2, "dropout": 3}}, Seeds(1, 2, 3)),
    ],
)
def test_one_seed_serves_three_streams_or_each_has_its_own(
    table: dict[str, Any], seeds: Seeds
) -> None:
    assert RunConfig.from_dict(table).seeds == seeds


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rnak": 4}, "no option 'rnak'.*rank"),
        ({"loop": {"batchsize": 4}}, "no option 'batchsize' in loop.*batch_size"),
        ({"base": {"sauce": "x"}}, "no option 'sauce' in base.*source"),
        ({"seed": {"dota": 1}}, "no option 'dota' in seed.*data"),
        ({"rank": 2.5}, "rank must be an integer, found 2.5"),
        ({"rank": True}, "rank must be an integer, found True"),
        ({"alpha": "big"}, "alpha must be a number, found 'big'"),
        ({"use_rslora": 1}, "use_rslora must be true or false, found 1"),
        ({"targets": 3}, "targets must be a list, found 3"),
        ({"trainable": "head"}, "trainable must be a list, found 'head'"),
        ({"rank_pattern": [1]}, "pattern"),
        ({"loop": {"lr": None}}, "loop.lr must be given"),
        ({"loop": {"schedule": "triangular"}}, "schedule must be one of cosine, linear"),
        ({"loop": 3}, "loop must be a table"),
        ({"data": {"test_share": 1.5}}, "data.test_share must be between 0 and 1"),
        ({"objective": "guess"}, "objective must be one of auto, causal-lm"),
        ({"base": {"quantized": "int3"}}, "base.quantized must be one of nf4, int8"),
    ],
)
def test_what_is_no_configuration_is_refused_by_name(table: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RunConfig.from_dict(table)


KEY = CONFIG.key({"base": "b", "data": "d"})


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 5},
        {"dropout_seed": 9},
        {"rank_pattern": ()},
        {"parts": ()},
        {"target_parameters": ()},
        {"dropout": 0.5},
        {"method": "full"},
        {"base": replace(CONFIG.base, dtype="float16")},
        {"data": replace(CONFIG.data, label="mood")},
        {"loop": replace(CONFIG.loop, label_smoothing=0.1)},
    ],
)
def test_every_field_that_shapes_the_result_is_in_the_key(change: dict[str, Any]) -> None:
    assert replace(CONFIG, **change).key({"base": "b", "data": "d"}) != KEY


def test_the_content_of_the_inputs_is_in_the_key_and_their_place_is_not() -> None:
    moved = replace(CONFIG, base=replace(CONFIG.base, source="elsewhere"))
    assert moved.key({"base": "b", "data": "d"}) == KEY
    assert CONFIG.key({"base": "b", "data": "e"}) != KEY
    often = replace(CONFIG, loop=replace(CONFIG.loop, checkpoint_every=1))
    assert often.key({"base": "b", "data": "d"}) == KEY


def test_a_seed_that_is_stated_and_one_that_follows_are_one_run() -> None:
    assert replace(CONFIG, dropout_seed=3).key({"base": "b", "data": "d"}) == KEY


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ({"loop": {"autocast": "bfloat16"}}, lambda run: run.loop.autocast),
        ({"base": {"quantized": "nf4"}}, lambda run: run.base.quantized),
        ({"base": {"quantized": "int8"}}, lambda run: run.base.quantized),
    ],
)
def test_a_word_that_names_a_type_of_numbers_is_a_word(
    table: dict[str, Any], field: Callable[[RunConfig], str | None]
) -> None:
    config = RunConfig.from_dict({"task": "rotate", "rank": 2} | table)
    assert field(config) == next(iter(next(iter(table.values())).values()))
    assert field(RunConfig.from_dict(config.to_dict())) == field(config)
