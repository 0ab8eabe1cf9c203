"""Module names: PEFT's matching rules, against PEFT's own two lines of `re`."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_analysis.errors import InputError
from lora_analysis.patterns import (
    NO_TYPE,
    choose_names,
    layer_index,
    matches_target,
    module_type,
    natural_key,
    near_names,
    pattern_value,
)

SEGMENT = st.sampled_from(["model", "layers", "0", "10", "q_proj", "proj", "q.proj", "h", "c_attn"])
NAME = st.lists(SEGMENT, min_size=1, max_size=5).map(".".join)
PATTERN = st.one_of(
    NAME,
    st.sampled_from(
        [
            r".*\.q_proj",
            r"layers\.\d+\.q_proj",
            "q|proj",
            "q.proj",
            "(q|v)_proj",
            "^model.*",
            ".*",
            "",
        ]
    ),
)


@given(name=NAME, pattern=PATTERN)
def test_a_string_of_targets_matches_as_a_full_regular_expression(name: str, pattern: str) -> None:
    assert matches_target(name, pattern) == (re.fullmatch(pattern, name) is not None)


@given(name=NAME, pattern=PATTERN)
def test_a_pattern_key_matches_the_name_or_its_last_segments(name: str, pattern: str) -> None:
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert (pattern_value(name, {pattern: 1}, 0) == 1) == expected


@pytest.mark.parametrize(
    ("name", "targets", "matches"),
    [
        ("model.layers.0.q_proj", ["q_proj"], True),
        ("q_proj", ["q_proj"], True),
        ("model.layers.0.eq_proj", ["q_proj"], False),
        ("model.layers.0.q_proj", ["0.q_proj", "v_proj"], True),
        ("model.layers.10.q_proj", ["0.q_proj"], False),
        ("model.layers.0.qXproj", ["q.proj"], False),  # entries of a list are not expressions
        ("model.layers.0.q_proj", "q_proj", False),  # a string must match the whole name
        ("model.layers.0.q_proj", r".*\.[qv]_proj", True),
        ("model.layers.0.q_proj", [], False),
    ],
)
def test_targets_follow_peft(name: str, targets: str | list[str], matches: bool) -> None:
    assert matches_target(name, targets) is matches


def test_the_first_matching_pattern_decides() -> None:
    patterns = {"k_proj": 1, r"layers\.0\..*": 2, "q_proj": 3, "layers.0.q_proj": 4}
    assert pattern_value("model.layers.0.q_proj", patterns, 8) == 2
    assert pattern_value("model.layers.1.q_proj", patterns, 8) == 3
    assert pattern_value("model.layers.1.v_proj", patterns, 8) == 8


def test_plain_patterns_need_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_analysis.patterns._matches_expression", None)
    assert pattern_value("model.layers.1.q_proj", {"layers.0.q_proj": 1, "q_proj": 2}, 0) == 2
    assert matches_target("model.q_proj", "model.q_proj")


def test_a_broken_expression_is_refused_with_its_text() -> None:
    with pytest.raises(InputError, match=r"\(q_proj.* is not a regular expression"):
        matches_target("model.q_proj", "(q_proj")


def test_an_endless_expression_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_analysis.patterns.PATTERN_TIMEOUT", 0.001)
    with pytest.raises(InputError, match="stopped after"):
        pattern_value("a" * 40, {"(a|a)+[b-c]": 1}, 0)


@pytest.mark.parametrize(
    ("name", "kind", "index"),
    [
        ("model.layers.3.self_attn.q_proj", "q_proj", 3),
        ("transformer.h.11.attn.c_attn", "c_attn", 11),
        ("model.layers.2.mlp.experts.7.w1", "w1", 2),
        ("classifier.0", "classifier", 0),
        ("lm_head", "lm_head", None),
        ("0", NO_TYPE, 0),
        ("007.1", NO_TYPE, 7),
        ("conv2d.layer4", "layer4", None),
    ],
)
def test_a_name_tells_its_type_and_layer(name: str, kind: str, index: int | None) -> None:
    assert module_type(name) == kind
    assert layer_index(name) == index


def test_natural_order_counts() -> None:
    names = ["layers.10.q", "layers.2.v", "layers.2.q", "head"]
    assert sorted(names, key=natural_key) == ["head", "layers.2.q", "layers.2.v", "layers.10.q"]


def test_near_names_find_a_typo_by_the_last_segment() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert near_names("q_porj", names)[0] == names[0]
    assert near_names("zzz", names) == []


def test_a_choice_is_the_end_of_a_name_or_else_an_expression() -> None:
    names = ["layers.0.q_proj", "layers.1.q_proj", "layers.1.v_proj"]
    assert choose_names(names, None) == names
    assert choose_names(names, "q_proj") == names[:2]
    assert choose_names(names, "1.v_proj") == names[2:]
    assert choose_names(names, r"layers\.1\..*") == names[1:]
    assert choose_names(names, ["v_proj", "0.q_proj"]) == [names[0], names[2]]
    assert choose_names(names, "proj") == []
