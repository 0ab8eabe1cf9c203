"""Module names: PEFT's matching rules, against PEFT's own two lines of `re`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_analysis import patterns as patterns_module
from lora_analysis.blocks import choose_names
from lora_analysis.errors import InputError
from lora_analysis.patterns import (
    NO_TYPE,
    ModulePatterns,
    layer_index,
    matches_target,
    module_type,
    natural_key,
    near_names,
    pattern_budget,
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
    monkeypatch.setattr("lora_analysis.patterns._compile", None)
    assert pattern_value("model.layers.1.q_proj", {"layers.0.q_proj": 1, "q_proj": 2}, 0) == 2
    assert matches_target("model.q_proj", "model.q_proj")


def test_a_broken_expression_is_refused_with_its_text() -> None:
    with pytest.raises(InputError, match=r"\(q_proj.* is not a regular expression"):
        matches_target("model.q_proj", "(q_proj")


def test_an_endless_expression_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_analysis.patterns.PATTERN_SECONDS", 0.001)
    with pytest.raises(InputError, match=r"stopped after 0\.001 s"):
        pattern_value("a" * 40, {"(a|a)+[b-c]": 1}, 0)
    with pytest.raises(InputError, match=r"stopped after 0\.001 s"):
        matches_target("a" * 40, "(a|a)+[b-c]")


def test_all_patterns_of_one_adapter_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_analysis.patterns.PATTERN_SECONDS", 0.01)
    endless = "(a|a)+[b-c]"
    with pattern_budget():
        ranks, alphas = ModulePatterns({endless: 1}), ModulePatterns({"[q]_proj": 2})
        with pytest.raises(InputError, match="stopped after"):
            ranks.value("a" * 40, 0)
        with pytest.raises(InputError, match=r"0\.01 s in all, at 'q_proj' against"):
            alphas.value("q_proj", 0)
        with pytest.raises(InputError, match="stopped after"), pattern_budget():
            matches_target("q_proj", "[q]_proj")
    assert matches_target("q_proj", "[q]_proj")  # another adapter has a budget of its own


LAYERS = [f"model.layers.{n}.{kind}" for n in range(80) for kind in ("q", "k", "v", "o")]


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name,
        lambda name: f"^{re.escape(name)}$",
        lambda name: f"^{re.escape(name)}",
        lambda name: rf".*\.{name}",
        lambda name: f"^.*{name.partition('.')[2]}$",
    ],
)
def test_keys_that_spell_names_take_no_engine_and_one_look_up_a_name(
    monkeypatch: pytest.MonkeyPatch, spell: Callable[[str], str]
) -> None:
    monkeypatch.setattr("lora_analysis.patterns._compile", None)
    looked_up: list[str] = []
    blanked = patterns_module._blank_wildcards
    monkeypatch.setattr(
        patterns_module,
        "_blank_wildcards",
        lambda *given: looked_up.append(given[0]) or blanked(*given),
    )
    patterns = ModulePatterns({spell(name): n for n, name in enumerate(LAYERS)})
    names = [f"base.{name}" for name in LAYERS] if spell("x").startswith(".*") else LAYERS
    assert [patterns.value(name, -1) for name in names] == list(range(len(LAYERS)))
    assert len(looked_up) < 6 * len(LAYERS)  # and not one for every key and name


def test_a_pattern_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_it = patterns_module._compile
    monkeypatch.setattr(
        patterns_module, "_compile", lambda *given: compiled.append(given[1]) or compile_it(*given)
    )
    keys = {rf"layers\.({n}|x)\.q": n for n in range(80)}  # more than caches hold
    patterns = ModulePatterns(keys)
    for name in LAYERS:
        patterns.value(name, -1)
    assert compiled == list(keys)


def test_an_overlong_expression_is_refused_before_it_is_compiled() -> None:
    with pytest.raises(InputError, match=r"too long for a regular expression: 80,000 char"):
        pattern_value("q", {"(q|v)" * 16_000: 1}, 0)


PIECES = st.sampled_from(
    [*"ab.^$*+?|()[]{}\\,-1 \n", "a{1,2}", "{e<=1}", "[[:alpha:]]", "[^]a]", r"\.", r"\d",
     ".*", r"(.*\.)?", "(?:", "(?i:", "(?#x{)", "(?P<n>", r"\1", r"\Z", r"\N{DOT}", "a.b", "é"]
)  # fmt: skip


@settings(max_examples=400)
@given(
    name=st.text("abA.1\n{}[]()^:e=\\é ", max_size=6),
    keys=st.lists(st.lists(PIECES, max_size=5).map("".join), max_size=4, unique=True),
)
@example("aab", ["{e<=1}aab", "a{e<=1}b"])
@example("a+b", ["a+b"])  # matched by nothing, then looked up as it is
@example("a.b\n", ["b", "^a.b"])
@example("a.", ["$", ""])
@example("Axb", ["^.*.b$"])
def test_any_keys_mean_what_peft_takes_them_to_mean(name: str, keys: list[str]) -> None:
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    patterns = {key: n for n, key in enumerate(keys)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            expected = patterns.get(get_pattern_key(list(patterns), name), -1)
    except re.error:
        with pytest.raises(InputError, match="is not a regular expression"):
            pattern_value(name, patterns, -1)
    else:
        assert pattern_value(name, patterns, -1) == expected


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


@pytest.mark.parametrize(
    "pattern",
    [
        "base_model.model.model.layers.0.q_proj",
        "model.layers.0._orig_mod.q_proj",
        "lora_unet_layers_0_q_proj",
        ["model.language_model.layers.0.q_proj"],
    ],
)
def test_a_module_is_chosen_by_the_name_that_another_file_gives_it(
    pattern: str | list[str],
) -> None:
    names = ["model.layers.0.q_proj", "model.layers.10.q_proj", "vision_tower.layers.0.q_proj"]
    if isinstance(pattern, str) and pattern.startswith("lora_"):
        names[0] = "unet.layers.0.q_proj"
    assert choose_names(names, pattern) == names[:1]


def test_near_names_among_thousands_differ_least() -> None:
    names = [f"model.layers.{n}.self_attn.{kind}_proj" for n in range(300) for kind in "qkvo"]
    near = near_names("model.layers.123.self_atn.q_proj", names)
    assert near[0] == "model.layers.123.self_attn.q_proj"
    assert set(near) <= set(names)
    assert near_names("xyz", names) == []
