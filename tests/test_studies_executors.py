"""A study run by executors has the same tables as one run by threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from factories import adapter
from safetensors.numpy import save_file

from lora_analysis import report
from lora_analysis.bases import open_base
from lora_analysis.cli import run
from lora_analysis.errors import InputError
from lora_analysis.execution.cluster import RayExecutor
from lora_analysis.execution.processes import ProcessExecutor
from lora_analysis.execution.protocol import Executor, Outcome, SerialExecutor, results_in_order
from lora_analysis.formats import find_adapters, read_adapter, write_adapter
from lora_analysis.studies import ReadLater, Study, study

TABLES = ("runs", "spectra", "pairs", "similarities", "amplifications", "changes")


@pytest.fixture
def stored(rng: np.random.Generator, tmp_path: Path) -> Path:
    """Five adapters, of which one is damaged in one module, and their base."""
    for at in range(5):
        one = adapter(rng, modules=3, rank=2 + at % 2)
        write_adapter(one, tmp_path / "adapters" / f"task{at % 2}-s{at}")
    weights = {f"{name}.weight": rng.standard_normal((24, 20)).astype("float32") for name in one}
    save_file(weights, tmp_path / "base.safetensors")
    damaged = tmp_path / "adapters" / "task0-s2" / "adapter_model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-16:] = b"\xff" * 16  # not a number, in the last tensor
    damaged.write_bytes(bytes(content))
    return tmp_path


EXECUTORS = [
    pytest.param(SerialExecutor, id="serial"),
    pytest.param(partial(ProcessExecutor, 2), id="process"),
    pytest.param(partial(RayExecutor, workers=2), id="ray", marks=pytest.mark.cluster),
]


@pytest.mark.slow
@pytest.mark.parametrize("make", EXECUTORS)
def test_a_study_is_the_same_with_every_executor(
    stored: Path, make: type[Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(make, partial) and make.func is RayExecutor:
        pytest.importorskip("ray", reason="Ray is not installed")
        here = str(Path(__file__).parent.parent)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    asked = {"base": str(stored / "base.safetensors"), "label": "{task}-s{seed}"}
    sources = [str(stored / "adapters")]
    alone = study(sources, workers=1, **asked)
    told: list[tuple[str, int, int]] = []
    spread = study(sources, executor=make(), progress=lambda *one: told.append(one), **asked)
    assert told == [("modules", n, 6) for n in range(1, 7)]
    assert spread.failures == alone.failures
    assert [one.source for one in spread.failures] == ["task0-s2"]
    assert len(spread.runs) == 4
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(spread, name), getattr(alone, name))
    np.testing.assert_array_equal(spread.similarity_matrix.cosine, alone.similarity_matrix.cosine)
    assert spread.options == alone.options


def test_how_adapters_are_read_goes_with_them(stored: Path) -> None:
    read = partial(read_adapter, scale=3.0)
    refs = find_adapters(stored / "adapters")[:2]
    spread = study([ReadLater(ref, read) for ref in refs], executor=ProcessExecutor(1))
    alone = study([read(ref) for ref in refs])
    assert set(spread.spectra["scale"]) == {3.0}
    pd.testing.assert_frame_equal(spread.spectra, alone.spectra)


def test_what_is_in_memory_cannot_be_opened_by_workers(
    stored: Path, rng: np.random.Generator
) -> None:
    with pytest.raises(InputError, match="adapter is in memory: with an executor"):
        study([adapter(rng)], executor=SerialExecutor())
    base = open_base(stored / "base.safetensors")
    with pytest.raises(InputError, match="is open already: with an executor"):
        study([str(stored / "adapters")], base=base, executor=SerialExecutor())


def test_results_are_put_in_order_and_the_first_error_raised() -> None:
    def outcomes(*jobs: int, failing: int | None = None) -> Iterator[Outcome[int, int]]:
        for job in jobs:
            error = ValueError(f"job {job}") if job == failing else None
            yield Outcome(job, -job, error, 1)

    assert list(results_in_order(outcomes(3, 1, 2, 0), range(4))) == [0, -1, -2, -3]
    found = results_in_order(outcomes(0, 2, 1, 3, failing=1), range(4))
    assert next(found) == 0
    with pytest.raises(ValueError, match="job 1"):
        next(found)


@pytest.mark.slow
def test_the_report_may_be_made_by_processes(
    stored: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Study] = []

    def keep(result: Study, path: Path, **_: object) -> Path:
        found.append(result)
        return path

    monkeypatch.setattr(report, "write_report", keep)  # its figures take long, and say no more
    for executor in ("threads", "process"):
        arguments = ["report", str(stored / "adapters"), "-o", "out", "--executor", executor]
        assert run([*arguments, "--workers", "2"]) == 4
        assert "Left out" in capsys.readouterr().err
    pd.testing.assert_frame_equal(found[0].similarities, found[1].similarities)
    assert [one.reason for one in found[0].failures] == [one.reason for one in found[1].failures]
