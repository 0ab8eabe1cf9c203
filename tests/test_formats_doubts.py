"""Numbers that training does not leave are refused or doubted, all others are left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import low_rank_update
from image_files import lora_pair, stored

from lora_analysis.adapter import DenseUpdate
from lora_analysis.cli import run
from lora_analysis.errors import MalformedFileError, SourceError
from lora_analysis.formats import find_adapters, read_adapter
from lora_analysis.formats.doubts import doubts
from lora_analysis.storage import limits

PEFT = "base_model.model.q"


def flipped(values: np.ndarray, bit: int) -> np.ndarray:
    """The same numbers with one bit of the first turned over."""
    changed = values.copy()
    raw = changed.view(f"u{values.itemsize}")
    raw.flat[0] ^= np.asarray(1 << bit).astype(raw.dtype)
    return changed


def test_trained_factors_are_not_doubted(rng: np.random.Generator) -> None:
    update = low_rank_update(rng, 300, 200, 16)
    assert doubts(update) == []
    assert doubts(replace(update, B=np.zeros_like(update.B))) == []
    rows = np.zeros_like(update.B)
    rows[7] = 0.1  # one token of an embedding was seen
    assert doubts(replace(update, B=rows)) == []
    falling = update.B * 10.0 ** -np.arange(16)  # a spectrum over sixteen decades
    assert doubts(replace(update, B=falling)) == []
    assert doubts(DenseUpdate("q", rng.standard_normal((4, 4)))) == []


@pytest.mark.parametrize(("dtype", "bit"), [(np.float16, 14), (np.float32, 30), (np.float64, 62)])
@pytest.mark.parametrize("role", ["A", "B"])
def test_the_top_bit_of_an_exponent_is_noticed(
    rng: np.random.Generator, dtype: type, bit: int, role: str
) -> None:
    update = low_rank_update(rng, 30, 20, 4)
    values = flipped(np.full((4, 20), 0.01, dtype), bit)
    changed = {"A": values} if role == "A" else {"B": values.T}
    (found,) = doubts(replace(update, **changed))  # type: ignore[arg-type]
    assert found.startswith(f"{role} of '{update.name}' holds a number of ")


def test_numbers_next_to_nothing_and_huge_scales_are_doubted(rng: np.random.Generator) -> None:
    update = low_rank_update(rng, 30, 20, 4)
    (tiny,) = doubts(replace(update, A=update.A * 1e-40))
    assert "not so small" in tiny
    assert doubts(replace(update, scale=3e4)) == [
        "The scale of 'layers.0.q_proj' is 3e+04. Is its alpha damaged?"
    ]


@pytest.mark.parametrize("role", ["A", "B"])
def test_what_no_training_leaves_is_refused_with_the_number(
    tmp_path: Path, rng: np.random.Generator, role: str
) -> None:
    tensors = lora_pair(rng, f"{PEFT}.lora_A.weight", f"{PEFT}.lora_B.weight")
    tensors[f"{PEFT}.lora_{role}.weight"][0, 0] = 3e38
    adapter = read_adapter(stored(tmp_path / "adapter_model.safetensors", tensors), scale=1)
    with pytest.raises(MalformedFileError, match=rf"{role} of 'q' holds 3e\+38.*above 1e\+15"):
        _ = adapter["q"]


def test_scales_and_sizes_beyond_the_limits_are_refused(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = lora_pair(rng, f"{PEFT}.lora_A.weight", f"{PEFT}.lora_B.weight")
    path = stored(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(MalformedFileError, match=r"scale of 'q' would be 5e\+08 \(caller\)"):
        read_adapter(path, alpha=1e9)
    monkeypatch.setattr("lora_analysis.formats.factors.MAX_ADAPTER_BYTES", 80)
    with pytest.raises(MalformedFileError, match="take 88 bytes, the limit is 80"):
        read_adapter(path, scale=1)
    assert limits.MAX_ADAPTER_BYTES == 8 * 2**30


def test_what_the_system_refuses_is_named_as_any_bad_input(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = lora_pair(rng, f"{PEFT}.lora_A.weight", f"{PEFT}.lora_B.weight")
    for name in ("good", "bad"):
        stored(tmp_path / name / "adapter_model.safetensors", tensors)
    bad = tmp_path / "bad" / "adapter_model.safetensors"
    adapter = read_adapter(bad, scale=1)
    plain = Path.open

    def refusing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == bad:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(SourceError, match=r"bad/adapter_model.safetensors: cannot be read: Perm"):
        _ = adapter["q"]
    with pytest.raises(SourceError, match="cannot be read: Permission denied"):
        read_adapter(bad, scale=1)
    assert [ref.format for ref in find_adapters(tmp_path)] == ["unreadable", "peft"]
    assert run(["inspect", str(tmp_path), "--scale", "1"]) == 4
