"""Numbers that training does not leave are refused or doubted, all others are left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import adapter, low_rank_update
from image_files import lora_pair, stored

from lora_analysis.adapter import Adapter, DenseUpdate
from lora_analysis.cli import run
from lora_analysis.errors import MalformedFileError, SourceError
from lora_analysis.findings import findings
from lora_analysis.formats import find_adapters, read_adapter, write_adapter
from lora_analysis.formats.doubts import doubts
from lora_analysis.storage import limits
from lora_analysis.studies import study

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


def damaged(rng: np.random.Generator, label: str, *names: str) -> Adapter:
    """An adapter with one number of 1e9 in B of some modules."""
    updates = dict(adapter(rng, label=label))
    for name in names:
        B = updates[name].B.copy()
        B[0, 0] = 1e9
        updates[name] = replace(updates[name], B=B)
    return Adapter(updates, label=label)


def test_a_study_names_adapters_and_modules_with_doubtful_numbers_first(
    rng: np.random.Generator,
) -> None:
    names = ("layers.0.v_proj", "layers.1.q_proj")
    result = study([damaged(rng, "bad", *names), adapter(rng, label="good")])
    assert {label: tuple(said) for label, said in result.doubts.items()} == {"bad": names}
    found = findings(result)
    (one,) = (one for one in found if one.topic == "damaged numbers")
    assert one.kind == "artefact"
    assert "in 2 of 4 modules ('layers.0.v_proj' and 'layers.1.q_proj')" in one.text
    assert "B of 'layers.0.v_proj' holds a number of 1e+09" in one.text
    assert found.index(one) < min(at for at, f in enumerate(found) if f.kind == "result")
    assert not study([adapter(rng, label="good")]).doubts


def test_every_verb_that_shows_a_doubtful_number_says_so(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {f"{name}.weight": rng.standard_normal((24, 20)) for name in adapter(rng)}
    base = stored(tmp_path / "base.safetensors", weights)
    bad = write_adapter(damaged(rng, "bad", "layers.0.v_proj"), tmp_path / "bad")
    good = write_adapter(adapter(rng), tmp_path / "good")
    broken = {name: value.copy() for name, value in weights.items()}
    broken["layers.0.v_proj.weight"][3, 4] = 1e9
    tuned = stored(tmp_path / "tuned.safetensors", broken)
    picture, out = tmp_path / "out.svg", tmp_path / "out"
    for words in (
        ["inspect", bad],
        ["compare", bad, good],
        ["heatmap", bad, good, "--module", "v_proj", "-o", picture],
        ["amplify", bad, "--base", base],
        ["resize", bad, "--rank", "2", "-o", tmp_path / "small"],
        ["convert", bad, "--to", "mlx", "-o", tmp_path / "mlx"],
        ["extract", tuned, "--base", base, "--not-transposed", "--rank", "2", "-o", tmp_path / "e"],
        ["report", bad, good, "--as", "md", "--figures", "", "-o", out],
    ):
        assert run([str(one) for one in words]) == 0
        said = "".join(capsys.readouterr()) + "".join(p.read_text() for p in out.glob("*.md"))
        assert "a number of 1e+09" in " ".join(said.replace("\\", "").split()), words[0]
