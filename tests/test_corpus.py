"""The command line on files that nobody should send: a refusal or a number, never a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpus.cases import CASES, Case
from corpus.headers import NAMES

from lora_analysis.cli import run


def test_the_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_inspect_refuses_or_reads_and_says_why(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = case.make(tmp_path)
    code = run(["inspect", str(source), "--format", "json", *case.arguments])
    out, err = capfd.readouterr()
    assert code == case.code, err
    assert case.said in out + err
    assert "never be printed" not in out
    if code == 3:
        assert out == ""
        assert err.startswith("Error: ")
        return
    document = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert document["adapters"]


@pytest.mark.parametrize("case", NAMES, ids=[case.name for case in NAMES])
def test_no_name_acts_on_the_terminal(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(["inspect", str(case.make(tmp_path))])
    shown = "".join(capfd.readouterr())
    assert all(line.isprintable() for line in shown.splitlines())
    assert "Traceback" not in shown


@pytest.mark.parametrize("verb", ["resize", "convert"])
def test_what_can_be_inspected_can_be_written_or_is_refused(
    verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    how = {"resize": ["--rank", "1"], "convert": ["--to", "mlx"]}[verb]
    for at, case in enumerate(CASES):
        if case.code == 0:
            (tmp_path / str(at)).mkdir()
            source, output = case.make(tmp_path / str(at)), tmp_path / f"out-{at}"
            code = run([verb, str(source), *how, "-o", str(output), *case.arguments])
            assert code in (0, 3), f"{case.name}: {capfd.readouterr().err}"
