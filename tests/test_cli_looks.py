"""What the commands show in a terminal of 80 columns."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import image_files
import numpy as np
import pytest
from factories import adapter, low_rank_update
from test_cli import call

from lora_analysis.adapter import Adapter
from lora_analysis.blocks import locate_module
from lora_analysis.cli import doctor, show
from lora_analysis.formats import write_adapter


@pytest.fixture
def deep(rng: np.random.Generator, tmp_path: Path) -> list[Path]:
    """Two adapters of 60 modules with long names."""
    paths = []
    for label in ("first", "second"):
        names = [f"base.model.layers.{n}.self_attention.{k}_proj" for n in range(30) for k in "qv"]
        updates = {name: low_rank_update(rng, name=name) for name in names}
        paths.append(write_adapter(Adapter(updates, label=label), tmp_path / label))
    return paths


@pytest.mark.parametrize("arguments", [[], ["--all"]])
def test_inspect_and_compare_keep_to_80_columns(
    deep: list[Path],
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["inspect", deep[0]], ["compare", *deep]):
        code, out, err = call(capsys, *words, *arguments)
        assert (code, err) == (0, "")
        # A path to copy is whole, however long it is.
        assert max(len(line) for line in out.splitlines() if not line.startswith("path ")) <= 80
    lines = out.splitlines()
    assert any(one.startswith("q_proj (30)") for one in lines) != bool(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "factory",
    [
        image_files.kohya_sd15,
        image_files.kohya_sdxl,
        image_files.diffusers_sdxl,
        image_files.kohya_flux,
        image_files.diffusers_flux,
    ],
)
def test_an_image_adapter_fits_one_screen(
    factory: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = factory(tmp_path / "image.safetensors", rank=2, width=4)
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = call(capsys, "inspect", path)
    lines = [line for line in out.splitlines() if not line.startswith("path ")]
    assert (code, err) == (0, "")
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    code, out, _ = call(capsys, "inspect", path, "--format", "json")
    (document,) = json.loads(out)["adapters"]
    blocks = [block["block"] for block in document["blocks"]]
    assert [line.split("  ")[0] for line in lines[-len(blocks) :]] == blocks
    assert sum(block["modules"] for block in document["blocks"]) == len(document["modules"])
    squares = sum(block["norm"] ** 2 for block in document["blocks"])
    assert squares == pytest.approx(document["norm"] ** 2)
    assert sum(block["share"] for block in document["blocks"]) == pytest.approx(1)
    last = document["modules"][-1]
    assert last["component"] == document["modules"][-2]["component"]
    assert "text encoder" in last["component"] or blocks[-1].startswith("single")


@pytest.mark.slow
def test_image_adapters_are_compared_and_drawn_by_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    pair = [
        image_files.kohya_sdxl(tmp_path / "a.safetensors", rank=2, width=24, text_encoders=False),
        image_files.diffusers_sdxl(tmp_path / "b.safetensors", rank=2, width=24, seed=1),
    ]
    code, out, err = call(capsys, "compare", *pair, "--sort", "module", "--top", "2")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    blocks = lines[lines.index("medians by block") + 2 :][:11]
    assert [line.split()[0] for line in blocks] == [
        "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{n:02}" for n in range(6)),
    ]  # fmt: skip
    modules = lines.index("first and last 2 of 722 modules, in the order of the files")
    assert lines[modules + 2].startswith("IN04 proj_in ")
    assert lines[modules + 3].startswith("IN04.0 attn1.to_k ")
    assert lines[modules + 6].startswith("OUT05 proj_out ")
    code, out, _ = call(capsys, "compare", *pair, "--module", "IN04 attn1", "--format", "json")
    assert {row["block"] for row in json.loads(out)["modules"]} == {"IN04"}
    code, out, _ = call(
        capsys, "heatmap", *pair, "-o", tmp_path / "h.svg", "--module", "IN", "--format", "json"
    )
    assert code == 0
    drawn = json.loads(out)["modules"]
    assert [locate_module(name).name for name in drawn] == ["attn1.to_q", "attn1.to_v"]
    assert {locate_module(name).block[:2] for name in drawn} == {"IN"}


@pytest.mark.slow
def test_an_image_adapter_is_amplified_by_block(
    rng: np.random.Generator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    path = image_files.diffusers_sdxl(tmp_path / "a.safetensors", rank=2, width=6)
    names = image_files.unet_modules(image_files.SDXL_DIFFUSERS, ".")
    weights = {f"{name}.weight": rng.standard_normal((6, 6)).astype(np.float32) for name in names}
    base = image_files.stored(tmp_path / "base.safetensors", weights)
    words = ("amplify", path, "--base", base, "--scale", "1", "--draws", "2", "--not-transposed")
    _, out, err = call(capsys, *words)
    table = out.splitlines()
    start = next(i for i, line in enumerate(table) if line.startswith("block (modules)"))
    assert [line.split("  ")[0] for line in table[start + 1 : start + 4]] == [
        "IN04 (22)", "IN05 (22)", "IN07 (102)",
    ]  # fmt: skip
    assert "Left out: 256 modules more" in err  # those of the text encoders
    _, out, _ = call(capsys, *words, "--all")
    assert "IN04.1 attn2.to_out" in out


def test_labels_in_names_make_a_relation(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("turn-s0", "turn-s1"):
        write_adapter(adapter(rng, label=name), tmp_path / name)
    _, out, _ = call(
        capsys, "compare", tmp_path / "turn-s0", tmp_path / "turn-s1", "--label", "{task}-s{seed}"
    )
    assert "same task, different seed" in out
    glob = str(tmp_path / "turn-*")
    words = ("report", glob, "--label", "{task}-s{seed}", "--as", "md", "--figures", "")
    code, out, err = call(capsys, *words, "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["seed"] for one in results["adapters"]] == [0, 1]
    code, _, err = call(capsys, *words[:3], "{tsk}", "-o", tmp_path / "out")
    assert code == 3
    assert "must name at least one of {task}" in err


def test_formats_of_figures_are_chosen_and_checked(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write_adapter(adapter(rng), tmp_path / "one")
    words = ("report", place, "-o", tmp_path / "out", "--figures")
    assert call(capsys, *words, "pdf")[0] == 0
    suffixes = {path.suffix for path in (tmp_path / "out" / "figures").iterdir()}
    assert suffixes == {".pdf"}
    code, _, err = call(capsys, *words, "svg,bmp")
    assert code == 2
    assert "bmp" in err


def test_color_says_a_kind_and_stays_away_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    colored: list[object] = []
    monkeypatch.setattr(show.click, "style", lambda text, **how: colored.append(how) or text)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show.print_finding("artifact", "It is one.")
    assert colored == [{"fg": "yellow", "bold": True}]
    monkeypatch.setenv("NO_COLOR", "1")
    show.print_finding("failure", "It is gone.")
    assert len(colored) == 1
    assert capsys.readouterr().out == "artifact   It is one.\nfailure    It is gone.\n"


def test_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "doctor", "--format", "json")
    found = json.loads(out)
    assert code == 0
    assert found["packages"]["numpy"] == np.__version__
    assert "cpu" in found["devices"]
    assert found["missing"] == []
    assert found["cpus"] >= 1
    assert found["cache"]
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert set(found["extras"]) == set(project["project"]["optional-dependencies"])
    assert list(found["extras"]) == list(doctor.EXTRAS)
    assert all(one["installed"] != bool(one["missing"]) for one in found["extras"].values())
    code, out, _ = call(capsys, "doctor")
    assert "packages" in out
    assert call(capsys, "doctor", "--format", "quiet")[1] == "ok\n"


def test_doctor_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CORE", ("numpy", "no-such-package"))
    needed = ["numpy>=2", "no.such-one>=1; extra == 'demo'", 'numpy; extra == "odd"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: needed)
    code, out, _ = call(capsys, "doctor")
    assert code == 3
    assert "no-such-package. Install the package again" in out
    assert "not installed (missing no.such-one): demo, train" in out
    assert "pip install 'lora-analysis[demo]'" in out
    assert "extra odd      installed: no description" in out


def test_doctor_in_a_checkout_reads_the_extras_of_the_project(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(name: str) -> list[str]:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", lost)
    _, out, _ = call(capsys, "doctor", "--format", "json")
    assert list(json.loads(out)["extras"]) == list(doctor.EXTRAS)
