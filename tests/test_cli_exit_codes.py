"""Exit codes: one case per verb and code, and nothing left out that the JSON does not name."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import adapter
from image_files import stored
from training_bases import write_tiny_base

from lora_analysis.adapter import Adapter
from lora_analysis.cli import VERBS, run
from lora_analysis.cli.options import exit_code
from lora_analysis.errors import (
    InUseError,
    MissingExtraError,
    OutputError,
    SourceError,
    TargetError,
)
from lora_analysis.formats import write_adapter
from lora_analysis.training import RunEvent

# What each verb needs to be parsed; nothing of it has to exist.
WORDS = {
    "demo": ["-o", "out"],
    "train": ["--base", "base", "-o", "out"],
    "sweep": ["file.toml"],
    "inspect": ["a"],
    "compare": ["a", "b"],
    "heatmap": ["a", "b", "-o", "out.svg"],
    "amplify": ["a", "--base", "base"],
    "report": ["a", "-o", "out"],
    "reference": ["a", "-o", "out.json"],
    "reproduce": ["-o", "out"],
    "survey": ["authors.toml"],
    "resize": ["a", "--rank", "1", "-o", "out"],
    "convert": ["a", "--to", "mlx", "-o", "out"],
    "extract": ["a", "--base", "base", "--rank", "1", "-o", "out"],
    "merge-check": ["a", "--base", "base"],
    "doctor": [],
}
ERRORS = {
    "done": (None, 0),
    "a bug": (ZeroDivisionError("division by zero"), 1),
    "input": (SourceError("x: nothing is there."), 3),
    "a missing extra": (MissingExtraError("The package peft is not installed."), 3),
    "a folder in use": (InUseError("out is in use by process 4."), 3),
    "a full disk": (OutputError(errno.ENOSPC, "No space left on device"), 3),
    "a full disk without a name": (OSError(errno.ENOSPC, "No space left on device"), 3),
    "not permitted": (PermissionError(errno.EACCES, "Permission denied", "/out"), 3),
    "no memory": (MemoryError(), 3),
    "interrupted": (KeyboardInterrupt(), 130),
}


def test_every_verb_has_its_words() -> None:
    assert set(WORDS) == set(VERBS)


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("verb", WORDS)
def test_what_ends_a_verb_decides_its_exit_code(
    verb: str, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, expected = ERRORS[case]

    def end(**_: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(
        import_module(f"lora_analysis.cli.{verb.replace('-', '_')}").command, "callback", end
    )
    assert run([verb, *WORDS[verb]]) == expected
    out, err = capsys.readouterr()
    assert not out
    assert bool(err) is (error is not None)
    assert "Traceback" not in err
    assert err.count("\n") <= 2


@pytest.mark.parametrize("verb", WORDS)
def test_a_reader_that_went_away_is_141(
    verb: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def end(**_: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(
        import_module(f"lora_analysis.cli.{verb.replace('-', '_')}").command, "callback", end
    )
    monkeypatch.setattr("lora_analysis.cli.os.dup2", lambda *_: None)  # capfd needs its stdout
    assert run([verb, *WORDS[verb]]) == 141
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("verb", [verb for verb, words in WORDS.items() if "-o" in words])
def test_an_empty_output_is_a_usage_error(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = WORDS[verb][: WORDS[verb].index("-o")]
    assert run([verb, *words, "-o", ""]) == 2
    assert "the name is empty" in capsys.readouterr().err


@pytest.mark.parametrize("verb", WORDS)
def test_an_unknown_option_is_a_usage_error(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, *WORDS[verb], "--no-such-option"]) == 2
    assert "no-such-option" in capsys.readouterr().err


MISSING = [verb for verb in WORDS if verb not in ("demo", "reproduce", "doctor")]


@pytest.mark.parametrize("verb", MISSING)
def test_a_source_that_is_not_there_is_refused(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([verb, *WORDS[verb]]) == 3
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("Error: ")


@pytest.mark.parametrize("codes", [(4, 5, 0), (6, 5, 4), (5,)])
def test_a_failed_check_counts_more_than_a_failed_source(codes: tuple[int, ...]) -> None:
    assert exit_code(codes) == 5


def test_the_order_of_codes() -> None:
    assert exit_code([4, 6, 5, 3]) == 3
    assert exit_code([4, 6]) == 6
    assert exit_code([0, 4]) == 4
    assert exit_code([]) == 0


@pytest.fixture
def files(tmp_path: Path, rng: np.random.Generator) -> dict[str, Path]:
    """Adapters of which one is damaged, one has other shapes, and a base without a weight."""
    good = adapter(rng, label="good")
    updates = dict(adapter(rng, label="hurt"))
    name = "layers.0.v_proj"
    B = updates[name].B.copy()  # type: ignore[union-attr]
    B[0, 0] = 1e9
    hurt = Adapter(updates | {name: replace(updates[name], B=B)}, label="hurt")
    wide = dict(adapter(rng, label="wide"))
    other = dict(adapter(rng, d_in=12))
    weights = {f"{module}.weight": rng.standard_normal((24, 20)) for module in good}
    part = {key: value for key, value in weights.items() if "1.v_proj" not in key}
    zero = dict(adapter(rng, label="part"))
    zero[name] = replace(zero[name], B=np.zeros_like(B))
    (tmp_path / "bad.safetensors").write_bytes(b"\x10")
    return {
        "good": write_adapter(good, tmp_path / "good"),
        "hurt": write_adapter(hurt, tmp_path / "hurt"),
        "wide": write_adapter(Adapter(wide | {name: other[name]}, label="wide"), tmp_path / "wide"),
        "zero": write_adapter(Adapter(zero, label="zero"), tmp_path / "zero"),
        "base": stored(tmp_path / "base.safetensors", weights),
        "part": stored(tmp_path / "part.safetensors", part),
        "bad": tmp_path / "bad.safetensors",
        "out": tmp_path / "out",
        "picture": tmp_path / "out.svg",
    }


# What is given, the exit code, and what the JSON has to name: a key, and where it leads.
PARTLY: dict[str, tuple[list[str], Callable[[dict[str, Any]], Any], Any]] = {
    "inspect": (
        ["good", "bad"],
        lambda found: [one["source"].endswith("bad.safetensors") for one in found["failures"]],
        [True],
    ),
    "compare, a reference": (
        ["good", "zero", "--reference", "wide", "--reference", "bad"],
        lambda found: [one["source"].endswith("bad.safetensors") for one in found["failures"]],
        [True],
    ),
    "compare, a module": (
        ["good", "wide"],
        lambda found: found["left_out"],
        [
            {
                "module": "layers.0.v_proj",
                "code": "shape-mismatch",
                "reason": "the shapes differ: (24, 20) and (24, 12)",
            }
        ],
    ),
    "amplify": (
        ["good", "--base", "part"],
        lambda found: [(one["module"], one["code"]) for one in found["left_out"]],
        [("layers.1.v_proj", "no-base-weight")],
    ),
    "report, a source": (
        ["good", "bad", "-o", "out"],
        lambda found: [one["source"].endswith("bad.safetensors") for one in found["failures"]],
        [True],
    ),
    "report, a module": (
        ["good", "--base", "part", "-o", "out"],
        lambda found: [one["module"] for one in found["left_out"]],
        ["layers.1.v_proj"],
    ),
}


@pytest.mark.parametrize("case", PARTLY)
def test_what_failed_in_part_is_4_and_in_the_json(
    case: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words, look, expected = PARTLY[case]
    given = [str(files.get(word, word)) for word in words]
    plain = ["--as", "md", "--figures", ""] if case.startswith("report") else []
    assert run([case.partition(",")[0], *given, *plain, "--format", "json"]) == 4
    assert look(json.loads(capsys.readouterr().out)) == expected


PLAN = """
task = "mirror"
base = "base"
rank = 2
{axis}
[loop]
steps = 1
warmup_steps = 0
batch_size = 8
evaluations = 1
[execution]
executor = "serial"
device = "cpu"
"""


def test_a_job_of_a_sweep_that_fails_is_4_and_in_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    Path("plan.toml").write_text(PLAN.format(axis='targets = [["q_proj"], ["no_such"]]'))
    assert run(["sweep", "plan.toml", "--format", "json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert len(document["finished"]) == 1
    (failure,) = document["failures"]
    assert "no_such" in failure["source"]
    assert "no_such" in failure["reason"]
    assert (failure["kind"], failure["attempts"]) == ("TargetError", 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TargetError("no module"), 3),
        (OSError(errno.ENOSPC, "No space left on device"), 3),
        (MemoryError(), 3),
        (ZeroDivisionError(), 1),
    ],
)
def test_a_sweep_of_which_nothing_is_left_names_each_failure_and_is_refused(
    error: Exception,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    write_tiny_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_analysis.training.sweep.train_run", fail)
    Path("plan.toml").write_text(PLAN.format(axis="seed = [0, 1]"))
    assert run(["sweep", "plan.toml", "--format", "json"]) == expected
    out, err = capsys.readouterr()
    assert len(json.loads(out)["failures"]) == 2
    assert "2 of 2 runs failed" in err


def test_notes_of_a_training_are_findings_in_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Any, folder: Path, *, on_event: Any, **_: Any) -> None:
        on_event(RunEvent(config.name, "note", 0, 1, note="3 rows are left out."))
        folder.mkdir()
        (folder / "manifest.json").write_text(f'{{"name": "{config.name}", "steps": 1}}')

    monkeypatch.setattr("lora_analysis.training.train_run", train)
    words = ["train", "--base", "digits", "--name", "mirror", "-o", str(tmp_path / "run")]
    assert run([*words, "--format", "json"]) == 0
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["code"], finding["severity"]) == ("run-note", "limit")
    assert finding["fields"]["text"] == "3 rows are left out."


DAMAGED = {
    "inspect": ["hurt"],
    "compare": ["hurt", "good"],
    "heatmap": ["hurt", "good", "--module", "v_proj", "-o", "picture"],
    "amplify": ["hurt", "--base", "base"],
    "report": ["hurt", "good", "--as", "md", "--figures", "", "-o", "out"],
    "resize": ["hurt", "--rank", "2", "-o", "out"],
    "convert": ["hurt", "--to", "mlx", "-o", "out"],
}


@pytest.mark.parametrize("verb", DAMAGED)
def test_damage_is_a_finding_with_code_severity_and_fields_in_every_json(
    verb: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(files.get(word, word)) for word in DAMAGED[verb]]
    assert run([verb, *given, "--format", "json"]) == 0  # done: damage is a finding
    found = json.loads(capsys.readouterr().out)
    findings = found["adapters"][0]["findings"] if verb == "inspect" else found["findings"]
    assert all({"code", "severity", "text", "fields"} <= one.keys() for one in findings)
    (damage,) = (one for one in findings if one["severity"] == "damage")
    assert damage["code"] == "enlarged-entry"
    assert damage["fields"]["modules"] == ["layers.0.v_proj"]
    assert damage["fields"]["value"] == pytest.approx(1e9)


def test_modules_left_out_by_rule_are_0_and_in_the_json(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    zero, good = str(files["zero"]), str(files["good"])
    assert run(["compare", zero, good, "--format", "json"]) == 0
    (left_out,) = json.loads(capsys.readouterr().out)["left_out"]
    assert left_out == {
        "module": "layers.0.v_proj",
        "code": "untrained",
        "reason": "ΔW is zero in zero",
    }
    assert run(["amplify", zero, "--base", str(files["base"]), "--format", "json"]) == 0
    (left_out,) = json.loads(capsys.readouterr().out)["left_out"]
    assert (left_out["module"], left_out["code"]) == ("layers.0.v_proj", "untrained")


def test_damage_is_named_in_a_listing_of_several_adapters_too(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(files["good"]), str(files["hurt"])]) == 0
    assert "damage     hurt: B of 'layers.0.v_proj' holds 1e+09" in capsys.readouterr().out


def test_what_resize_leaves_out_is_in_the_json(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["resize", str(files["good"]), "--budget", "50", "-o", str(files["out"])]
    assert run([*words, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["code"] for one in found["left_out"]} == {"nothing-kept"}
    assert len(found["left_out"]) == sum(one["rank"] == 0 for one in found["modules"]) > 0
