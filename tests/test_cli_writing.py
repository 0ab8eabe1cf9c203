"""The verbs that write adapters: resize, convert, extract."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from factories import adapter, low_rank_update
from reference import dense_svd
from safetensors.numpy import save_file
from test_cli import PAIR, call, document

from lora_analysis.adapter import Adapter
from lora_analysis.edit import relative_difference, resize_adapter
from lora_analysis.errors import OccupiedError
from lora_analysis.formats import read_adapter, write_adapter
from lora_analysis.formats.peft import writer as peft_writer
from lora_analysis.formats.registry import WRITERS

if TYPE_CHECKING:
    from lora_analysis.storage.atomic import Content


@pytest.fixture
def source(rng: np.random.Generator, tmp_path: Path) -> Path:
    return write_adapter(adapter(rng, rank=4, label="source"), tmp_path / "source")


@pytest.fixture
def models(rng: np.random.Generator, tmp_path: Path) -> dict[str, Path]:
    base = {f"layers.{i}.q_proj.weight": rng.standard_normal((12, 9)) for i in range(3)}
    tuned = {name: W + rng.standard_normal((12, 9)) for name, W in base.items()}
    tuned["layers.2.q_proj.weight"] = base["layers.2.q_proj.weight"]
    paths = {}
    for label, tensors in (("base", base), ("tuned", tuned)):
        paths[label] = tmp_path / f"{label}.safetensors"
        save_file({k: v.astype(np.float32) for k, v in tensors.items()}, paths[label])
    return paths


def test_resize_writes_the_adapter_and_says_what_was_lost(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "resize", source, "--rank", 2, "-o", tmp_path / "small")
    assert code == 0
    whole, small = read_adapter(source), read_adapter(tmp_path / "small")
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    for name in whole:
        assert small[name].rank == 2
        S = dense_svd(whole[name].delta_weight(), 4)[1]
        assert lines[name][1:3] == ["4", "2"]
        assert float(lines[name][-1]) == pytest.approx(
            np.linalg.norm(S[2:]) / np.linalg.norm(S), abs=6e-4
        )
        assert relative_difference(small[name], whole[name]) == pytest.approx(
            np.linalg.norm(S[2:]) / np.linalg.norm(S), rel=1e-5
        )
    assert lines["all"][1] == "352"
    assert lines["written"][1] == str(tmp_path / "small")


def test_resize_as_json_and_as_one_number_say_the_same(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ("resize", source, "--budget", 300)
    _, out, _ = call(capsys, *ask, "-o", tmp_path / "one", "--format", "json")
    found = document(out)
    assert found["parameters"] <= 300 < found["given_parameters"]
    assert sum(one["parameters"] for one in found["modules"]) == found["parameters"]
    squares = [sum(one[key] ** 2 for one in found["modules"]) for key in ("error_norm", "norm")]
    assert found["error"] == pytest.approx((squares[0] / squares[1]) ** 0.5)
    _, out, _ = call(capsys, *ask, "-o", tmp_path / "two", "--format", "quiet")
    assert float(out) == pytest.approx(found["error"], abs=6e-4)


def test_resize_takes_bare_pairs_with_the_callers_scale(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = low_rank_update(rng, name="layers.0.q_proj", scale=0.5)
    pair = {"w_a_layers.0.q_proj": one.A, "w_b_layers.0.q_proj": one.B}
    file = tmp_path / "pairs.safetensors"
    save_file({k: v.astype(np.float32) for k, v in pair.items()}, file)
    ask = ("resize", file, "--pair", PAIR, "--energy", 1, "-o", tmp_path / "out")
    code, _, err = call(capsys, *ask)
    assert code == 3
    assert "--scale" in err
    assert not (tmp_path / "out").exists()
    assert call(capsys, *ask, "--scale", 0.5)[0] == 0
    (small,) = read_adapter(tmp_path / "out").values()
    assert relative_difference(small, one) < 1e-6


def test_convert_reads_back_what_it_wrote(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "convert", source, "--to", "peft", "-o", tmp_path / "copy")
    assert code == 0
    assert "4 modules" in out
    _, out, _ = call(
        capsys, "convert", source, "--to", "peft", "-o", tmp_path / "two", "--format", "json"
    )
    found = document(out)
    assert len(found["modules"]) == 4
    assert found["error"] < 1e-6
    ask = ("convert", source, "--to", "peft", "-o", tmp_path / "three", "--format", "quiet")
    assert call(capsys, *ask)[1].strip() == str(tmp_path / "three")


def test_convert_shows_what_a_format_loses_and_renames(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lossy(whole: Adapter) -> dict[str, Content]:
        """Forget a tenth of every update, and rename a module."""
        names = {name: name for name in whole} | {"layers.0.q_proj": "layers.0.query"}
        updates = {new: low_rank_update_of(whole[name], new, 0.9) for name, new in names.items()}
        return peft_writer.contents(Adapter(updates, label="lossy"))

    module = types.ModuleType("lora_analysis.formats.lossy_writer")
    module.contents = lossy  # type: ignore[attr-defined]
    monkeypatch.setitem(WRITERS, "lossy", "lossy_writer")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert "lossy" in call(capsys, "convert", "--help")[1]
    code, out, _ = call(capsys, "convert", source, "--to", "lossy", "-o", tmp_path / "out")
    assert code == 0
    assert ["layers.1.v_proj", "0.100"] in [line.split() for line in out.splitlines()]
    assert "1 modules have different names" in out


def low_rank_update_of(update: Any, name: str, factor: float) -> Any:
    from dataclasses import replace

    return replace(update, name=name, scale=update.scale * factor, alpha=None)


def test_extract_writes_the_best_lora_of_a_fine_tune(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ("extract", models["tuned"], "--base", models["base"], "--not-transposed")
    code, out, _ = call(capsys, *ask, "--rank", 3, "-o", tmp_path / "lora")
    assert code == 0
    assert "1 of 3 weights are unchanged" in " ".join(out.split())
    small = read_adapter(tmp_path / "lora")
    assert list(small) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert {one.rank for one in small.values()} == {3}
    assert small.provenance.base_model == str(models["base"])
    _, out, _ = call(
        capsys, *ask, "--energy", 0.9, "-o", tmp_path / "two", "--module", "1.q_proj",
        "--format", "json",
    )  # fmt: skip
    found = document(out)
    assert [one["module"] for one in found["modules"]] == ["layers.1.q_proj"]
    assert found["error"] ** 2 <= 0.1


def test_what_lies_there_is_not_written_over_unasked(
    source: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    asks: list[tuple[object, ...]] = [
        ("resize", source, "--rank", 1),
        ("convert", source, "--to", "peft"),
        ("extract", models["tuned"], "--base", models["base"], "--not-transposed", "--rank", 1),
    ]
    for ask in asks:
        code, _, err = call(capsys, *ask, "-o", kept)
        assert code == 3
        assert "is not empty" in err
        assert call(capsys, *ask, "-o", models["base"])[0] == 3
        assert [one.name for one in kept.iterdir()] == ["notes.txt"]
        empty = tmp_path / f"empty-{ask[0]}"
        empty.mkdir()
        assert call(capsys, *ask, "-o", empty)[0] == 0
        assert call(capsys, *ask, "-o", empty, "--force")[0] == 0


def test_sizes_and_formats_that_make_no_sense_are_usage_errors(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for ask in (
        ("resize", source, "-o", out),
        ("resize", source, "-o", out, "--rank", 2, "--energy", 0.5),
        ("resize", source, "-o", out, "--rank", 0),
        ("resize", source, "-o", out, "--energy", 1.5),
        ("resize", source, "--rank", 2),
        ("convert", source, "-o", out, "--to", "nonsense"),
        ("convert", source, "-o", out.with_suffix(".safetensors")),
        ("convert", source, "-o", out.with_suffix(".bin"), "--to", "kohya"),
    ):
        assert call(capsys, *ask)[0] == 2
    assert not out.exists()


def test_the_difference_of_two_updates_is_that_of_their_matrices(rng: np.random.Generator) -> None:
    one, other = low_rank_update(rng, rank=3), low_rank_update(rng, rank=5, scale=-1.0)
    a, b = one.delta_weight(), other.delta_weight()
    assert relative_difference(one, other) == pytest.approx(
        np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-10
    )
    assert relative_difference(one, one) < 1e-15


@pytest.mark.real
@pytest.mark.parametrize("folder", ["gpt-neo-peft", "qwen2.5-peft/final"])
def test_real_adapters_lose_what_is_printed(
    folder: str, real_adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ("resize", real_adapters / folder, "--energy", 0.9, "-o", tmp_path / "small")
    code, out, _ = call(capsys, *ask, "--format", "json")
    assert code == 0
    found = document(out)
    whole, small = read_adapter(real_adapters / folder), read_adapter(tmp_path / "small")
    assert list(small) == list(whole)
    for one in found["modules"][:6]:
        update = whole[one["module"]]
        S = dense_svd(update.delta_weight(), update.rank)[1]
        k = one["rank"]
        assert np.sum(S[:k] ** 2) >= 0.9 * np.sum(S**2) > np.sum(S[: k - 1] ** 2)
        apart = np.linalg.norm(update.delta_weight() - small[one["module"]].delta_weight())
        assert apart / np.linalg.norm(S) == pytest.approx(one["error"], rel=1e-4)


@pytest.mark.parametrize("verb", ["convert", "resize", "heatmap", "report"])
@pytest.mark.parametrize("option", ["--initial", "--trained-on"])
def test_what_options_of_reading_name_is_never_written(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    option: str,
) -> None:
    given = tmp_path / "given"
    if option == "--initial":
        write_adapter(adapter(np.random.default_rng(1), rank=4, label="given"), given)
        name = str(given)
    else:
        given.mkdir()
        (given / "config.json").write_text('{"model_type": "llama"}')
        names = read_adapter(source)
        weights = {f"{name}.weight": np.ones((24, 20), np.float32) for name in names}
        save_file(weights, given / "model.safetensors")
        name = str(given / "model.safetensors")  # the folder of the model is protected too
    before = {path: path.read_bytes() for path in given.rglob("*") if path.is_file()}
    asked: dict[str, tuple[Any, ...]] = {
        "convert": (source, "--force", "-o", given),
        "resize": (source, "--rank", 2, "--force", "-o", given / "small"),
        "heatmap": (source, source, "--force", "-o", given / "map.svg"),
        "report": (source, "--force", "-o", given),
    }
    code, _, err = call(capsys, verb, *asked[verb], option, name)
    assert code == 3
    assert "inputs are never written" in err
    assert {path: path.read_bytes() for path in given.rglob("*") if path.is_file()} == before


def test_an_edited_adapter_does_not_replace_the_one_it_was_made_from(source: Path) -> None:
    edited = resize_adapter(read_adapter(source), rank=2).adapter
    before = (source / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OccupiedError, match="inputs are never written"):
        write_adapter(edited, source, force=True)
    assert (source / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("chosen", ["folder", "file"])
def test_no_adapter_is_extracted_into_the_folder_of_a_model(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], chosen: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tuned = models["tuned"].rename(folder / "model.safetensors")
    ask = ("extract", folder if chosen == "folder" else tuned, "--base", models["base"])
    code, _, err = call(capsys, *ask, "--rank", 2, "--force", "-o", folder / "k.safetensors")
    assert code == 3
    assert "is inside the input" in err
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_nothing_is_written_through_a_symbolic_link(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_adapter(adapter(rng), tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for verb in (["resize", source, "--rank", 1], ["convert", source, "--to", "mlx"]):
        code, _, err = call(capsys, *verb, "-o", tmp_path / "link", "--force")
        assert (code, "is a symbolic link" in err) == (3, True)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_report_replaces_a_report_and_nothing_else(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(folder: Path, *more: str) -> tuple[int, str]:
        words = ("report", source, "--as", "md", "--figures", "", "-o", folder, *more)
        code, _, err = call(capsys, *words)
        return code, err

    out = tmp_path / "out"
    assert report(out) == (0, "")
    (out / "notes.txt").write_text("mine")
    assert report(out) == (0, "")
    assert (out / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    (other / "figures").mkdir(parents=True)
    (other / "figures" / "energy.svg").write_text("mine")
    (other / "results.json").write_text('{"accuracy": 1}')
    code, err = report(other)
    assert code == 3
    assert "other is not empty" in err
    assert "--force" in err
    assert (other / "figures" / "energy.svg").read_text() == "mine"
    assert report(other, "--force") == (0, "")
    link = tmp_path / "link"
    link.symlink_to(out)
    code, err = report(link, "--force")
    assert code == 3
    assert "symbolic link" in err


def test_a_report_of_an_earlier_version_is_named_as_that(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text('{"generator": "lora_analysis 0.1.0"}')
    words = ("report", source, "--as", "md", "--figures", "", "-o", tmp_path)
    code, _, err = call(capsys, *words)
    assert (code, "a report of an earlier version" in err) == (3, True)
    assert call(capsys, *words, "--force")[0] == 0


@pytest.mark.slow
def test_a_picture_is_replaced_by_the_next(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.svg"
    picture.write_text("somebody's")
    words = ("heatmap", source, source, "--module", "q_proj", "-o", picture)
    code, _, err = call(capsys, *words)
    assert (code, picture.read_text()) == (3, "somebody's")
    assert "not written by this program" in err
    assert call(capsys, *words, "--force")[0] == 0
    assert call(capsys, *words)[0] == 0
    assert picture.read_text().startswith("<?xml")
