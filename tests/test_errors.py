"""Errors of the machine, as the user sees them."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from lora_analysis import cli, errors
from lora_analysis.errors import (
    InputError,
    LoraAnalysisError,
    MalformedFileError,
    OutOfMemoryError,
    OutputError,
    named_error,
    named_errors,
)
from lora_analysis.formats import read_adapter

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# torch's, for a device
DEVICE = type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (MemoryError(), OutOfMemoryError, "a.bin: memory ran out"),
        (DEVICE, OutOfMemoryError, "a.bin: memory ran out"),
        (RecursionError("maximum recursion depth"), MalformedFileError, "a.bin: something in it"),
        (FULL, OutputError, "a.bin: No space left on device. Make room"),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), OutputError, "/x/y: No space left. Make"),
        (OSError(errno.EIO, "Input/output error"), OutputError, "a.bin: Input/output error."),
        (OSError("a message"), OutputError, "a.bin: a message."),
    ],
)
def test_an_error_of_the_machine_names_what_was_worked_on(
    error: Exception, kind: type[Exception], said: str
) -> None:
    named = named_error(error, "a.bin")
    assert type(named) is kind
    assert str(named).startswith(said)
    with pytest.raises(kind) as caught, named_errors("a.bin"):
        raise error
    assert str(caught.value) == str(named)
    assert str(pickle.loads(pickle.dumps(named))) == str(named)


@pytest.mark.parametrize("error", [KeyError("x"), InputError("x"), OutputError("x")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert named_error(error, "a.bin") is None
    with pytest.raises(type(error)) as caught, named_errors("a.bin"):
        raise error
    assert caught.value is error


def test_every_error_of_the_tree_is_in_its_text() -> None:
    kinds = [one for one in vars(errors).values() if isinstance(one, type)]
    names = [one.__name__ for one in kinds if issubclass(one, LoraAnalysisError)]
    assert [one for one in names if one not in (errors.__doc__ or "")] == []


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), FULL, DEVICE])
def test_the_command_line_ends_with_one_line_and_code_3(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lora_analysis.formats.find_sources", fail)
    assert cli.run(["inspect", "x"]) == 3
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("Error: inspect: ")
    assert len(shown.splitlines()) == 1
    assert "Errno" not in shown


@pytest.mark.parametrize(
    ("error", "kind"), [(MemoryError(), OutOfMemoryError), (RecursionError(), MalformedFileError)]
)
def test_reading_names_the_file(
    error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("lora_analysis.formats.load.recognize", fail)
    with pytest.raises(kind, match=str(tmp_path)):
        read_adapter(tmp_path)
