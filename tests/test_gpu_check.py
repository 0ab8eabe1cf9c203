"""The check of a GPU against the CPU, run on the CPU: its rows, its bounds, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_every_part_runs_and_finds_one_cpu_equal_to_itself(tmp_path: Path) -> None:
    rows = list(gpu.rows(1, tmp_path, device="cpu", width=64, steps=2))
    assert [row.what.partition(",")[0] for row in rows] == [
        "4 spectra", "4 spectra", "amplification", "2 steps of the demo's training",
    ]  # fmt: skip
    assert all(row.accuracy for row in rows)


def test_wrong_numbers_of_a_device_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(updates: Any, **options: Any) -> list[Any]:
        exact = gpu.spectrum
        return [replace(exact(one), S=exact(one).S * (1 + 1e-4)) for one in updates]

    monkeypatch.setattr(gpu, "stacked_spectra", wrong)
    with pytest.raises(gpu.GpuError, match="4 spectra, 64², r = 16, float64"):
        list(gpu.rows(1, tmp_path, device="cpu", width=64))


def test_without_a_gpu_there_are_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert not list(gpu.rows(1, tmp_path))
