"""What the commands show in a terminal of 80 columns."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from factories import adapter, low_rank_update
from test_cli import call

from lora_analysis.adapter import Adapter
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
