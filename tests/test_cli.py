from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import adapter
from safetensors.numpy import load_file, save_file

from lora_analysis import __version__
from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.cli import VERBS, run, show
from lora_analysis.cli.options import progress_bar
from lora_analysis.cli.show import decimals, print_json
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
        assert "quiet: only" in " ".join(text.split())


def test_help_has_the_needed_options_first_and_those_of_unusual_files_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rescue = {"--pair", "--heads", "--kernel", "--enable-lora", "--expert-order", "--initial"}
    for verb in VERBS:
        text = call(capsys, verb, "--help")[1]
        usual, _, unusual = text.partition("\nReading unusual files:\n")
        usual = usual.partition("\nOptions:\n")[2]
        options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", usual, re.MULTILINE)
        assert not rescue & set(options), verb
        assert not {"--output", "--base", "--rank"} & set(unusual.split()), verb
        if verb in ("inspect", "compare", "heatmap", "amplify", "report", "resize", "convert"):
            assert rescue <= set(re.findall(r"^  (--[\w-]+)", unusual, re.MULTILINE)), verb
        if "[required]" in usual and verb != "extract":  # two are required
            assert options[0] in ("--output", "--base"), verb


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["insepct", "a"], "No such command insepct. Did you mean inspect?"),
        (["xyzzy"], "No such command xyzzy."),
        (["inspect", "a", "--modul", "q"], "Did you mean --module?"),
        (["train", "--vrsion", "x"], "Did you mean --revision?"),
    ],
)
def test_a_mistyped_command_or_option_suggests_near_ones(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err.replace("'", "")  # click 8.1 has no quotes


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
        (["report", "{bad}", "-o", "{out}"], "bad.safetensors"),
        (["report", "{bad}", "{none}", "-o", "{out}"], "None of the 2 adapters and sources"),
        (["inspect", "{bad}", "{none}"], "None of the 2 adapters and sources"),
        (["compare", "{small}", "{large}", "--reference", "{bad}"], "bad.safetensors"),
        (["amplify", "{small}", "--base", "{bad}"], "bad.safetensors"),
        *(
            ([*one, "--module", "k_proj"], "'k_proj'")
            for one in (
                ["inspect", "{small}"],
                ["compare", "{small}", "{large}"],
                ["heatmap", "{small}", "{large}", "-o", "{out}.svg"],
                ["amplify", "{small}", "--base", "{base}"],
                ["report", "{small}", "-o", "{out}"],
            )
        ),
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


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["q_proj", "0.q_proj", r"layers\.\d\.q_proj"])
def test_module_takes_the_end_of_a_name_or_an_expression_in_every_verb(
    pattern: str, saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large, base = saved["small"], saved["large"], saved["base"]
    wanted = (
        {"layers.0.q_proj"} if pattern == "0.q_proj" else {"layers.0.q_proj", "layers.1.q_proj"}
    )

    def ask(*arguments: object) -> dict[str, Any]:
        code, out, err = call(capsys, *arguments, "--module", pattern, "--format", "json")
        assert (code, err) == (0, "")
        return document(out)

    inspected = ask("inspect", small)["adapters"][0]["modules"]
    compared = ask("compare", small, large)["modules"]
    amplified = ask("amplify", small, "--base", base)["modules"]
    for rows in (inspected, compared, amplified):
        assert {row["module"] for row in rows} == wanted
    assert set(ask("heatmap", small, large, "-o", tmp_path / "a.svg")["modules"]) == wanted
    ask("report", small, "--as", "md", "--figures", "", "-o", tmp_path / "out")
    table = (tmp_path / "out" / "tables" / "spectra.csv").read_text().splitlines()[1:]
    assert {row.split(",")[1] for row in table} == wanted


def spoil(folder: Path, tensor: str) -> Path:
    """Put a NaN into the tensors whose name holds ``tensor``."""
    path = folder / "adapter_model.safetensors"
    values = load_file(path)
    for name in values:
        if tensor in name:
            values[name][0, 0] = np.nan
    save_file(values, path)
    return folder


def test_scale_and_alpha_together_are_a_usage_error(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "inspect", saved["small"], "--scale", 1, "--alpha", 2)
    assert code == 2
    assert "pass one" in err


def test_inspect_shows_the_good_adapters_of_a_folder_that_holds_damaged_ones(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("good", "diverged", "cut", "other"):
        write_adapter(adapter(rng, label=label), tmp_path / "runs" / label)
    spoil(tmp_path / "runs" / "diverged", "layers.1.v_proj.lora_B")
    weights = tmp_path / "runs" / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    code, out, err = call(capsys, "inspect", tmp_path / "runs", "--format", "quiet")
    assert (code, out) == (4, "good\nother\n")
    lines = err.splitlines()
    assert len(lines) == 2
    assert any("cut" in line for line in lines)
    assert any("diverged" in line and "layers.1.v_proj" in line for line in lines)
    code, out, _ = call(capsys, "inspect", tmp_path / "runs", "--format", "json")
    assert code == 4
    assert [one["label"] for one in document(out)["adapters"]] == ["good", "other"]
    assert len(document(out)["failures"]) == 2


def test_one_adapter_left_of_two_is_listed_as_one(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = call(capsys, "inspect", saved["small"], saved["bad"])
    assert out.startswith("1 adapter\n")


def test_inspect_loads_every_module_once(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    load = Adapter.__getitem__

    def counting(self: Adapter, name: str) -> Any:
        asked.append(name)
        return load(self, name)

    monkeypatch.setattr(Adapter, "__getitem__", counting)
    assert call(capsys, "inspect", saved["small"])[0] == 0
    assert sorted(asked) == sorted(set(asked))
    assert len(asked) == 4


def test_an_unused_rank_is_shown(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    B = rng.standard_normal((8, 3)).astype(np.float32)
    B[:, 2] = 0
    update = LowRankUpdate(
        name="q", A=rng.standard_normal((3, 9)).astype(np.float32), B=B, scale=1.0
    )
    path = write_adapter(Adapter({"q": update}, label="x"), tmp_path / "x")
    assert "2 of 3" in call(capsys, "inspect", path)[1]


def test_debug_shows_the_error_itself(saved: dict[str, Path]) -> None:
    from lora_analysis.errors import InputError

    with pytest.raises(InputError):
        run(["inspect", str(saved["bad"]), "--debug"])


def test_heatmap_names_the_module_that_is_not_finite(
    rng: np.random.Generator,
    saved: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nan = spoil(write_adapter(adapter(rng), tmp_path / "nan"), "lora_B")
    code, _, err = call(capsys, "heatmap", saved["small"], nan, "-o", tmp_path / "a.svg")
    assert code == 3
    assert "q_proj" in err
    assert "non-finite" in err


def test_heatmap_reads_no_more_modules_than_it_takes_to_find_two(
    rng: np.random.Generator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"layers.{i}.{kind}_proj" for i in range(20) for kind in "qv"]
    paths = []
    for label in ("one", "two"):
        updates = {}
        for name in names:
            B = rng.standard_normal((12, 2)) * (name != "layers.10.q_proj")
            updates[name] = LowRankUpdate(name=name, A=rng.standard_normal((2, 9)), B=B, scale=1.0)
        paths.append(write_adapter(Adapter(updates, label=label), tmp_path / label))
    asked: list[str] = []
    load = Adapter.__getitem__

    def counting(self: Adapter, name: str) -> Any:
        asked.append(name)
        return load(self, name)

    monkeypatch.setattr(Adapter, "__getitem__", counting)
    _, out, _ = call(capsys, "heatmap", *paths, "-o", tmp_path / "a.svg", "--format", "json")
    # The middle one of q_proj is untrained: another layer stands in for it.
    assert document(out)["modules"] == ["layers.9.q_proj", "layers.10.v_proj"]
    assert len(asked) == 6


def test_heatmap_of_adapters_without_a_common_trained_module_is_refused(
    rng: np.random.Generator,
    saved: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = write_adapter(adapter(rng, d_in=30), tmp_path / "other")
    code, _, err = call(capsys, "heatmap", saved["small"], other, "-o", tmp_path / "a.svg")
    assert code == 3
    assert "no trained module in common" in err


def test_heatmap_panels_whose_short_names_collide_carry_full_names(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"layers.0.experts.{i}.w1" for i in range(2)]
    paths = []
    for label in ("one", "two"):
        updates = {
            name: LowRankUpdate(
                name=name,
                A=rng.standard_normal((2, 9)),
                B=rng.standard_normal((8, 2)),
                scale=1.0,
            )
            for name in names
        }
        paths.append(write_adapter(Adapter(updates, label=label), tmp_path / label))
    code, out, _ = call(capsys, "heatmap", *paths, "-o", tmp_path / "a.svg", "--format", "json")
    assert code == 0
    assert document(out)["modules"] == names
    picture = (tmp_path / "a.svg").read_text()
    assert all(name in picture for name in names)


@pytest.mark.slow
def test_heatmap_takes_the_size_and_colors_of_the_figure(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("heatmap", saved["small"], saved["large"])
    path = tmp_path / "map.png"
    options = ("--width", "10", "--dpi", "50", "--cmap", "magma", "--vmax", "auto", "--title", "T")
    assert call(capsys, *words, "-o", path, *options)[0] == 0
    assert int.from_bytes(path.read_bytes()[16:20]) == 500  # pixels across
    for option, value, message in (
        ("--cmap", "virdis", "no colormap 'virdis'. (Did you mean one of: 'viridis'"),
        ("--vmax", "most", "'most' is neither a positive number nor auto"),
        ("--vmax", "-1", "'-1' is neither"),
        ("--width", "0", "is not in the range"),
        ("--dpi", "0", "is not in the range"),
    ):
        code, _, err = call(capsys, *words, "-o", tmp_path / "x.svg", option, value)
        assert code == 2
        assert message in " ".join(err.split())
        assert not (tmp_path / "x.svg").exists()


@pytest.mark.slow
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


def test_amplify_holds_the_update_against_the_whole_spectrum_if_asked(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    call_it = ("amplify", saved["small"], "--base", saved["base"], "--spectrum")
    code, out, err = call(capsys, *call_it)
    assert code == 0
    assert not err
    assert "novelty" in out
    _, out, _ = call(capsys, *call_it, "--format", "json")
    rows = document(out)["changes"]
    modules = {row["module"] for row in document(out)["modules"]}
    assert {(row["module"], row["side"]) for row in rows} == {
        (module, side) for module in modules for side in ("input", "output")
    }
    assert all(0 <= row["leading_energy"] <= 1 and row["k"] == 2 for row in rows)


def test_amplify_says_what_whole_spectra_will_cost(
    saved: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora_analysis.linalg.gram_seconds", lambda _: 600.0)
    monkeypatch.setenv("LORA_ANALYSIS_CACHE", str(saved["base"].parent / "kept"))
    _, _, err = call(capsys, "amplify", saved["small"], "--base", saved["base"], "--spectrum")
    assert "min the first time" in err
    assert str(saved["base"].parent / "kept") in err


def test_amplify_names_modules_without_a_base_weight_and_shows_the_others(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(saved["base"])
    del weights["layers.1.v_proj.weight"]
    save_file(weights, tmp_path / "part.safetensors")
    code, out, err = call(
        capsys, "amplify", saved["small"], "--base", tmp_path / "part.safetensors"
    )
    assert code == 4
    assert "layers.1.v_proj" in err
    assert "layers.1.q_proj" in out


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


@pytest.mark.slow
def test_transposed_decides_how_a_square_weight_is_read(
    rng: np.random.Generator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_adapter(adapter(rng, d_out=16, d_in=16), tmp_path / "square")
    base = tmp_path / "square.safetensors"
    weights = {f"{name}.weight": rng.standard_normal((16, 16)) for name in adapter(rng)}
    save_file({k: v.astype(np.float32) for k, v in weights.items()}, base)
    ask = ("amplify", path, "--base", base, "--format", "quiet")
    found = [call(capsys, *ask, flag)[1] for flag in ("--transposed", "--not-transposed")]
    assert found[0] != found[1]
    for flag in ("--transposed", "--not-transposed"):
        out = tmp_path / flag
        words = ("report", path, "--base", base, flag, "--as", "md", "--figures", "", "-o", out)
        code, _, _ = call(capsys, *words)
        assert code == 0
    tables = [
        (tmp_path / flag / "tables" / "amplifications.csv").read_text()
        for flag in ("--transposed", "--not-transposed")
    ]
    assert tables[0] != tables[1]


@pytest.mark.slow
def test_report_takes_a_reference_and_judges_against_it(
    rng: np.random.Generator,
    saved: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = write_adapter(adapter(rng, label="other"), tmp_path / "other")
    code, _, _ = call(
        capsys, "report", saved["small"], saved["large"], "--reference", other,
        "--as", "md", "--figures", "", "-o", tmp_path / "out", "--format", "json",
    )  # fmt: skip
    assert code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    output = results["comparisons"][0]
    assert (output["side"], output["conclusion"]) == ("output", "too few runs")
    assert (output["references"], output["unrelated_pairs"]) == (["other"], 2)


def test_report_names_what_it_left_out_and_ends_with_code_4(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("report", saved["small"], saved["bad"], "--title", "T", "--figures", "")
    code, out, err = call(capsys, *words, "-o", tmp_path / "out")
    assert code == 4
    assert out.strip() == str(tmp_path / "out" / "report.html")
    assert "Left out" in err
    assert "bad.safetensors" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_report_as_markdown(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "report", saved["small"], "--as", "md", "-o", tmp_path / "out")
    assert code == 0
    assert out.strip().endswith("report.md")
    suffixes = {path.suffix for path in (tmp_path / "out" / "figures").iterdir()}
    assert suffixes == {".svg", ".png", ".pdf"}  # where nothing is asked for


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

    monkeypatch.setattr("lora_analysis.formats.find_sources", interrupted)
    code, _, err = call(capsys, "inspect", saved["small"])
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["inspect", "--help"], ["inspect"], ["inspect", "--format", "json"]]
)
def test_a_reader_that_has_gone_ends_the_program_quietly_as_it_ends_others(
    arguments: list[str], saved: dict[str, Path]
) -> None:
    if "--help" not in arguments:
        arguments = [*arguments, str(saved["small"])]
    command = [sys.executable, "-m", "lora_analysis", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False, text=True)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


def wide(rng: np.random.Generator, folder: Path) -> Path:
    """Save an adapter with the long names that real models have."""
    names = [f"transformer.h.{i}.attn.attention.{kind}_proj" for i in (2, 11) for kind in "qv"]
    updates = {
        name: LowRankUpdate(
            name=name,
            A=rng.standard_normal((8, 40)).astype(np.float32),
            B=rng.standard_normal((50, 8)).astype(np.float32),
            scale=2.0,
        )
        for name in names
    }
    weights = {f"{name}.weight": rng.standard_normal((50, 40)) for name in names}
    folder.mkdir(exist_ok=True)
    save_file({k: v.astype(np.float32) for k, v in weights.items()}, folder / "base.safetensors")
    return write_adapter(Adapter(updates, label=folder.name), folder / "adapter")


@pytest.mark.parametrize("verb", ["inspect", "compare", "amplify"])
def test_tables_fit_a_page_of_80_columns_and_are_whole_where_there_is_no_page(
    verb: str,
    rng: np.random.Generator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = (wide(rng, tmp_path / name) for name in ("one", "two"))
    more: dict[str, list[object]] = {
        "inspect": [],
        "compare": [two],
        "amplify": ["--base", one.with_name("base.safetensors")],
    }
    arguments: list[object] = [verb, one, *more[verb]]
    monkeypatch.delenv("COLUMNS", raising=False)
    _, out, _ = call(capsys, *arguments)
    assert "transformer.h.11.attn.attention.v_proj" in out
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call(capsys, *arguments)
    lines = [line for line in out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    assert "names without 'transformer.h.'" in out
    assert any(line.startswith("11.attn.attention.v_proj ") for line in lines)
    assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (float("nan"), "–"), (0.0, "0"), (0.7804, "0.780"), (3.35, "3.350"),
        (13.66, "13.66"), (-0.5, "-0.500"), (0.00131, "0.0013"), (3.2e-6, "3.2e-06"),
        (1234.56, "1234.6"), (123456.0, "1.2e+05"),
    ],
)  # fmt: skip
def test_numbers_in_tables_keep_the_digits_that_matter(value: float | None, shown: str) -> None:
    assert decimals(value) == shown


def test_json_lists_what_is_not_defined(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [np.float64("nan"), 1.5], "b": {"c": np.array([1.0, np.inf])}, "d": None})
    found = document(capsys.readouterr().out)
    assert found["a"] == [None, 1.5]
    assert found["b"] == {"c": [1.0, None]}
    assert set(found["undefined"]) == {"$.a[0]", "$.b.c[1]"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_bars_and_a_program_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for form, stream in (("human", Terminal()), ("json", Terminal()), ("human", io.StringIO())):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(form) as progress:
            progress("figures", 1, 7)
        assert ("figures" in stream.getvalue()) is (form == "human" and stream.isatty())


@pytest.mark.slow
def test_what_takes_long_shows_its_progress(
    saved: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: set[str] = set()

    @contextmanager
    def watched(_form: str) -> Iterator[Any]:
        yield lambda what, _done, _total: seen.add(what)

    bars = {
        ("inspect",): {"adapters"},
        ("heatmap", "-o", tmp_path / "a.svg"): {"modules"},
        ("report", "--figures", "", "-o", tmp_path / "out"): {
            "adapters",
            "modules",
            "report sections",
        },
    }
    for (verb, *more), wanted in bars.items():
        module = importlib.import_module(f"lora_analysis.cli.{verb.replace('-', '_')}")
        monkeypatch.setattr(module, "progress_bar", watched)
        seen.clear()
        assert call(capsys, verb, saved["small"], saved["large"], *more)[0] == 0
        assert seen == wanted


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


@pytest.mark.slow
@pytest.mark.real
def test_report_on_real_bare_pairs(
    real_adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((real_adapters / "sam-ring").glob("*.safetensors"))
    words = ("report", *files, "--pair", PAIR, "--scale", 1, "--as", "md", "--figures", "")
    code, _, _ = call(capsys, *words, "-o", tmp_path)
    assert code == 0
    with (tmp_path / "tables" / "similarities.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    phi = {
        side: np.mean(
            [
                float(row["phi_1_1"])
                for row in rows
                if {row["a"], row["b"]} == {"lora_rank8", "lora_rank16"} and row["side"] == side
            ]
        )
        for side in ("input", "output")
    }
    assert phi["input"] == pytest.approx(0.284, abs=5e-4)
    assert phi["output"] == pytest.approx(0.785, abs=5e-4)
    assert "untrained is untrained" in (tmp_path / "report.md").read_text()


def test_a_pickle_is_read_when_the_command_says_so(
    capsys: pytest.CaptureFixture[str], saved: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file as load_torch

    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((saved["small"] / name).read_bytes())
    torch.save(load_torch(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    code, _, err = call(capsys, "inspect", folder)
    assert code == 3
    assert "--allow-pickle" in err
    code, out, _ = call(capsys, "inspect", folder, "--allow-pickle", "--format", "json")
    assert code == 0
    (found,) = document(out)["adapters"]
    assert {one["variant"] for one in found["modules"]} == {""}
    _, wanted, _ = call(capsys, "inspect", saved["small"], "--format", "json")
    assert found["norm"] == document(wanted)["adapters"][0]["norm"]


def test_the_initial_adapter_is_given_by_name(
    capsys: pytest.CaptureFixture[str], saved: dict[str, Path]
) -> None:
    config = saved["small"] / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "pissa_niter_4"})
    )
    code, _, err = call(capsys, "inspect", saved["small"])
    assert code == 3
    assert "--initial" in err
    code, out, _ = call(
        capsys, "inspect", saved["small"], "--initial", saved["small"], "--format", "json"
    )
    assert code == 0
    (found,) = document(out)["adapters"]
    assert {one["rank"] for one in found["modules"]} == {4}
    assert found["norm"] < 1e-12  # it is its own start


@pytest.mark.parametrize("numbers_from", [0, 1, 2])
def test_a_table_that_fits_looks_as_it_does_laid_out(
    rng: np.random.Generator, numbers_from: int
) -> None:
    rows = [["module", "side", "‖ΔW‖"]]
    rows += [["q" * int(n), "in put", f"{n / 7:.3f}"] for n in rng.integers(0, 12, 5)]
    assert show._is_plain(rows)
    plain = [line.rstrip() for line in show._align_columns(rows, numbers_from)]
    laid_out = show._fold_cells(rows, numbers_from, 200, close=False)
    assert plain == [line.rstrip() for line in laid_out]


@pytest.mark.parametrize("cell", ["層", "\x1b[31m", "a\nb", "e\u0301"])
def test_wide_and_unprintable_cells_are_laid_out_with_care(cell: str) -> None:
    assert not show._is_plain([["a", cell]])
