from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import adapter
from safetensors.numpy import save_file

from lora_analysis import __version__
from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.cli import VERBS, run
from lora_analysis.formats import write_adapter

PAIR = "w_a_{name},w_b_{name}"


@pytest.fixture
def saved(rng: np.random.Generator, tmp_path: Path) -> dict[str, Path]:
    """Two PEFT folders, a base, and a file that is no adapter."""
    paths = {}
    for label, rank in (("small", 2), ("large", 5)):
        paths[label] = write_adapter(adapter(rng, rank=rank, label=label), tmp_path / label)
    weights = {f"{name}.weight": rng.standard_normal((24, 20)) for name in adapter(rng)}
    save_file({k: v.astype(np.float32) for k, v in weights.items()}, tmp_path / "base.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"abc")
    return {**paths, "base": tmp_path / "base.safetensors", "bad": tmp_path / "bad.safetensors"}


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run([str(one) for one in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def document(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        pytest.fail(f"the document holds {constant}")

    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    assert found["schema_version"] == 1
    return found


def test_help_names_every_verb_and_each_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for verb in VERBS:
        assert f"  {verb} " in out
        code, text, _ = call(capsys, verb, "--help")
        assert code == 0
        assert "--format" in text


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version")[1].strip() == f"lora-analysis, version {__version__}"


def test_an_unknown_verb_and_a_missing_argument_are_usage_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(capsys, "inspekt")[0] == 2
    assert call(capsys, "inspect")[0] == 2
    code, _, err = call(capsys, "inspect", "x", "--pair", "only_one_{name}")
    assert code == 2
    assert "two names separated by a comma" in err


def test_inspect_says_rank_scale_and_its_origin(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "inspect", saved["small"])
    assert code == 0
    assert "rank        2" in out
    assert "scale       2 from config" in out
    assert "layers.0.q_proj" in out


def test_inspect_as_json_holds_the_singular_values(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = call(capsys, "inspect", saved["large"], "--format", "json")
    module = document(out)["adapters"][0]["modules"][0]
    assert module["rank"] == module["numerical_rank"] == 5
    assert module["scale"] == 2.0
    assert module["scale_origin"] == "config"
    assert len(module["singular_values"]) == 5


def test_inspect_lists_a_folder_of_adapters_in_natural_order(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = call(capsys, "inspect", saved["small"].parent / "small", saved["large"])
    assert out.index("small") < out.index("large")
    assert "2 adapters" in out


def test_inspect_goes_on_after_a_bad_source_and_says_so(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "inspect", saved["small"], saved["bad"])
    assert code == 4
    assert "small" in out
    assert "bad.safetensors" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "{bad}"], "bad.safetensors"),
        (["inspect", "{none}"], "no file or folder"),
        (["compare", "{small}", "{none}"], "no file or folder"),
        (["report", "{bad}", "-o", "{out}"], "None of the 1 sources"),
        (["amplify", "{small}", "--base", "{bad}"], "bad.safetensors"),
        (["amplify", "{small}", "--base", "{base}", "--module", "k_proj"], "k_proj"),
    ],
)
def test_refused_input_ends_with_code_3_and_one_line(
    arguments: list[str],
    said: str,
    saved: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {name: str(path) for name, path in saved.items()}
    filled = [
        one.format(**places, none=tmp_path / "none", out=tmp_path / "out") for one in arguments
    ]
    code, out, err = call(capsys, *filled)
    assert code == 3
    assert out == ""
    assert said in err
    assert "Traceback" not in err


def test_debug_shows_the_error_itself(saved: dict[str, Path]) -> None:
    from lora_analysis.errors import InputError

    with pytest.raises(InputError):
        run(["inspect", str(saved["bad"]), "--debug"])


def test_compare_shows_chance_beside_every_overlap(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "compare", saved["small"], saved["large"])
    assert code == 0
    assert out.count("chance") >= 6
    assert "no reference" in out
    assert "output side" in out
    assert "input side" in out


def test_compare_as_json_equals_the_library(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_analysis import read_adapter, subspace_similarity

    _, out, _ = call(capsys, "compare", saved["small"], saved["large"], "--format", "json")
    found = document(out)
    a, b = read_adapter(saved["small"]), read_adapter(saved["large"])
    for row in found["modules"]:
        grid = subspace_similarity(a[row["module"]], b[row["module"]], side=row["side"])
        assert row["phi_1_1"] == pytest.approx(grid.at(1, 1), abs=1e-12)
        assert row["phi_r_r"] == pytest.approx(grid.at(2, 5), abs=1e-12)
    means = [row["phi_1_1"] for row in found["modules"] if row["side"] == "input"]
    assert found["summary"]["input"]["mean_phi_1_1"] == pytest.approx(np.mean(means))


def test_heatmap_writes_the_picture_its_suffix_asks_for(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        path = tmp_path / f"map{suffix}"
        code, out, _ = call(capsys, "heatmap", saved["small"], saved["large"], "-o", path)
        assert code == 0
        assert out.strip() == str(path)
        assert path.read_bytes().startswith(start)
    code, _, err = call(capsys, "heatmap", saved["small"], saved["large"], "-o", "map.bmp")
    assert code == 3
    assert "bmp" in err


def test_amplify_prints_factor_chance_and_enrichment(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "amplify", saved["small"], "--base", saved["base"])
    assert code == 0
    assert "enrichment" in out
    _, out, _ = call(capsys, "amplify", saved["small"], "--base", saved["base"], "--format", "json")
    rows = document(out)["modules"]
    assert {row["k"] for row in rows} == {1, 2}
    for row in rows:
        ratio = row["amplification_factor"] / row["chance_factor"]
        assert ratio == pytest.approx(1 / row["enrichment"])


def test_amplify_refuses_a_scale_it_does_not_know(
    rng: np.random.Generator, saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved["base"].with_name("bare.safetensors")
    save_file(
        {
            "w_a_layers.0.q_proj": rng.standard_normal((2, 20)).astype(np.float32),
            "w_b_layers.0.q_proj": rng.standard_normal((24, 2)).astype(np.float32),
        },
        path,
    )
    code, _, err = call(capsys, "amplify", path, "--base", saved["base"], "--pair", PAIR)
    assert code == 3
    assert "--scale or --alpha" in err
    code, out, _ = call(
        capsys, "amplify", path, "--base", saved["base"], "--pair", PAIR, "--scale", 2,
        "--format", "quiet",
    )  # fmt: skip
    assert code == 0
    assert float(out) > 0


def test_report_names_what_it_left_out_and_ends_with_code_4(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(
        capsys, "report", saved["small"], saved["bad"], "-o", tmp_path / "out", "--title", "T"
    )
    assert code == 4
    assert out.strip() == str(tmp_path / "out" / "report.html")
    assert "Left out" in err
    assert "bad.safetensors" in (tmp_path / "out" / "report.html").read_text()


def test_report_as_markdown(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "report", saved["small"], "--as", "md", "-o", tmp_path / "out")
    assert code == 0
    assert out.strip().endswith("report.md")


def test_terminal_escapes_and_markup_in_names_are_printed_as_text(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "[bold]layers.0.q_proj"
    update = LowRankUpdate(
        name=name, A=rng.standard_normal((2, 9)), B=rng.standard_normal((8, 2)), scale=1.0
    )
    path = write_adapter(Adapter({name: update}, label="x"), tmp_path / "x")
    _, out, _ = call(capsys, "inspect", path)
    assert "[bold]layers.0.q_proj" in out


def test_an_interrupt_ends_with_code_130(
    monkeypatch: pytest.MonkeyPatch, saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_analysis.formats.find_adapters", interrupted)
    code, _, err = call(capsys, "inspect", saved["small"])
    assert code == 130
    assert "Traceback" not in err


def test_a_broken_pipe_is_quiet(saved: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "lora_analysis", "inspect", str(saved["small"])]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False, text=True)
    os.close(writer)
    assert done.stderr == ""


def test_the_installed_program_runs(saved: dict[str, Path]) -> None:
    program = Path(sys.executable).with_name("lora-analysis")
    done = subprocess.run(
        [program, "inspect", saved["small"], "--format", "quiet"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "small\n"


@pytest.mark.real
def test_inspect_reads_real_adapters(
    real_adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("gpt-neo-peft", "qwen2.5-peft/final"):
        code, out, _ = call(capsys, "inspect", real_adapters / folder)
        assert code == 0
        assert "scale       2 from config" in out
        assert "rank        8" in out
    code, out, _ = call(capsys, "inspect", real_adapters / "qwen2.5-peft")
    assert code == 0
    for name in ("checkpoint-23", "checkpoint-46", "final"):
        assert f"qwen2.5-peft/{name}" in out


@pytest.mark.real
def test_report_on_real_bare_pairs(
    real_adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((real_adapters / "sam-ring").glob("*.safetensors"))
    code, _, _ = call(capsys, "report", *files, "--pair", PAIR, "--scale", 1, "-o", tmp_path)
    assert code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    phi = {
        side: np.mean(
            [
                row["phi_1_1"]
                for row in results["similarities"]
                if {row["a"], row["b"]} == {"lora_rank8", "lora_rank16"} and row["side"] == side
            ]
        )
        for side in ("input", "output")
    }
    assert phi["input"] == pytest.approx(0.284, abs=5e-4)
    assert phi["output"] == pytest.approx(0.785, abs=5e-4)
    assert "untrained is untrained" in (tmp_path / "report.html").read_text()
