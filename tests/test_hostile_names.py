"""Names from strangers are shown as text, wherever they are shown."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import jsonschema
import numpy as np
import pyte
import pytest
from hostile_names import ACTIVE, MODULES, NAMES, hostile_adapters, hostile_files
from image_files import stored
from markdown_it import MarkdownIt
from safetensors.numpy import load_file
from test_cli import call
from test_report import Page

from lora_analysis.adapter import Adapter
from lora_analysis.bases import open_base
from lora_analysis.report import results_schema, write_report
from lora_analysis.report.results import square_table
from lora_analysis.storage.records import RECORD_FOLDER
from lora_analysis.studies import study
from lora_analysis.studies.base_models import base_title
from lora_analysis.text import html_table, printable, printable_json

ALL = "".join(NAMES)


@pytest.fixture(scope="module")
def hostile() -> list[Adapter]:
    return hostile_adapters(np.random.default_rng(5))


@pytest.fixture(scope="module")
def reports(hostile: list[Adapter], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    rng = np.random.default_rng(5)
    weights = {f"{name}.weight": rng.standard_normal((12, 10)) for name in hostile[0]}
    result = study(hostile, base=open_base(weights), draws=0)
    folder = tmp_path_factory.mktemp("hostile")
    return {
        "html": write_report(result, folder / "html", figures=("svg",), title=ALL, command=ALL),
        "md": write_report(
            study(hostile[:1]), folder / "md", figures=(), form="md", title=ALL, command=ALL
        ),
    }


def files(reports: dict[str, Path], *suffixes: str) -> Iterator[Path]:
    for page in reports.values():
        yield from (one for one in sorted(page.parent.rglob("*")) if one.suffix in suffixes)


@pytest.mark.slow
def test_no_text_that_is_written_holds_an_active_character(reports: dict[str, Path]) -> None:
    found = list(files(reports, ".html", ".md", ".csv", ".json", ".svg"))
    assert len(found) > 20
    for path in found:
        text = path.read_bytes().decode()
        assert not set(text) & set(ACTIVE), path.name
        assert "/home/somebody" not in text, path.name


def test_no_name_becomes_the_name_of_a_file(reports: dict[str, Path]) -> None:
    for page in reports.values():
        names = [one.name for one in page.parent.rglob("*") if one.name != RECORD_FOLDER]
        assert names == [one for one in names if re.fullmatch(r"[a-z0-9_]+(\.[a-z]+)?", one)]


def test_a_page_has_no_element_from_a_name(reports: dict[str, Path]) -> None:
    page = Page(reports["html"].read_text())
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "a:href"}
    assert not [key for _, found in page.tags for key in found if key.startswith("on")]
    shown = "".join(page.text)
    assert all(printable(name) in shown for name in NAMES)
    assert "49" not in page.text  # {{ 7*7 }}


def test_every_figure_is_well_formed_and_holds_no_script(reports: dict[str, Path]) -> None:
    for path in files(reports, ".svg"):
        elements = {element.tag.rpartition("}")[2] for element in ET.parse(path).iter()}
        assert not elements & {"script", "foreignObject", "a"}, path.name


def test_no_cell_of_a_table_is_a_formula_and_every_row_is_a_line(reports: dict[str, Path]) -> None:
    for path in files(reports, ".csv"):
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
        assert len(rows) == len(path.read_text().splitlines())
        assert len(set(map(len, rows))) == 1
        texts = [cell for row in rows for cell in row if re.search(r"[^\d.e+-]", cell)]
        assert not [cell for cell in texts if cell.startswith(("=", "+", "-", "@"))], path.name


def test_heads_of_columns_are_no_formulas_either() -> None:
    from lora_analysis.report.results import csv_text

    text = csv_text(square_table(["=cmd()", "＋1\n2"], np.eye(2)))
    assert text.splitlines()[0] == "adapter,'=cmd(),'＋1\\n2"


def test_results_hold_the_names_as_they_are(reports: dict[str, Path]) -> None:
    results = json.loads((reports["html"].parent / "results.json").read_text())
    jsonschema.validate(results, results_schema())
    modules = {one["module"] for one in results["modules"]}
    assert modules == set(MODULES)
    assert results["adapters"][0]["task"] == ALL


def test_grids_are_found_under_printable_names(reports: dict[str, Path]) -> None:
    with np.load(reports["html"].parent / "grids.npz", allow_pickle=False) as grids:
        assert len(grids) == 2 * len(MODULES)
        assert all(key.isprintable() and "/" not in key for key in grids)
        assert all(np.isfinite(grids[key]).all() for key in grids)


def test_markdown_shows_names_and_makes_nothing_of_them(reports: dict[str, Path]) -> None:
    text = reports["md"].read_text()
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    tags = re.findall(r"<(\w+)", shown)
    assert not set(tags) & {"script", "svg", "a"}
    sources = re.findall(r'<img src="([^"]*)"', shown)
    assert all(one.startswith("figures/") for one in sources)
    assert len(re.findall(r"<h1>", shown)) == 1
    assert "document.title='owned'" in shown.replace("&#x27;", "'")


def screen_after(printed: str) -> pyte.Screen:
    """What a terminal shows that got these characters and is large enough for them."""
    lines = printed.splitlines()
    screen = pyte.Screen(max(map(len, lines), default=0) + 1, len(lines) + 2)
    screen.set_mode(pyte.modes.LNM)
    pyte.Stream(screen).feed(printed)
    return screen


def assert_untouched(screen: pyte.Screen) -> None:
    assert screen.title == screen.icon_name == ""
    cells = [cell for line in screen.buffer.values() for cell in line.values()]
    assert {(cell.bg, cell.reverse, cell.blink) for cell in cells} <= {("default", False, False)}


def test_a_terminal_shows_every_line_and_does_nothing_else(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = hostile_files(rng, tmp_path)
    three = one.parent / f"{one.name}3"
    stored(three / "adapter_model.safetensors", load_file(one / "adapter_model.safetensors"))
    bad = tmp_path / NAMES[4].replace("/", "|")
    stored(bad / "adapter_model.safetensors", {f"{NAMES[4]}.lora_A.weight": np.ones((2, 3))})
    for words, code in (
        (["inspect", one], 0),
        (["inspect", one, two, bad], 4),
        (["inspect", one, "--format", "json"], 0),
        (["inspect", two, "--format", "quiet"], 0),
        (["inspect", bad], 3),
        (["compare", one, two], 0),
        (["compare", one, two, "--reference", tmp_path], 3),  # a reference is A itself
        (["compare", one, two, "--reference", three, "--reference", bad], 4),
        (["compare", one, bad], 3),
    ):
        done, out, err = call(capsys, *words)
        assert done == code
        for printed in (out, err):
            screen = screen_after(printed)
            assert_untouched(screen)
            assert [line.rstrip() for line in screen.display[:-2]] == [
                line.rstrip() for line in printed.splitlines()
            ]
        if code != 3:
            assert "owned" in out or "cmd" in out


@pytest.mark.slow
def test_a_real_terminal_is_left_as_it_was(rng: np.random.Generator, tmp_path: Path) -> None:
    """On a terminal there are colors, a bar of progress, and a width."""
    one, two = hostile_files(rng, tmp_path)
    screen = pyte.Screen(100, 200)
    stream = pyte.ByteStream(screen)
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "lora_analysis", "compare", str(one), str(two)]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "200"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        words, stdin=slave, stdout=slave, stderr=slave, env=environment
    ) as running:
        os.close(slave)
        while True:
            try:
                got = os.read(master, 4096)
            except OSError:  # the other end is closed
                break
            stream.feed(got)
    os.close(master)
    assert running.returncode == 0
    assert_untouched(screen)
    colored = [
        "".join(cell.data for _, cell in sorted(line.items()) if cell.fg != "default").strip()
        for line in screen.buffer.values()
    ]
    assert set(colored) - {""} <= {"artifact", "limit", "result"}
    shown = "\n".join(screen.display)
    assert "\\x1b]0;owned\\x07" in shown
    assert "median" in shown


def test_notebooks_show_names_by_their_codes() -> None:
    shown = html_table(ALL, [ALL], [[ALL]], ALL)
    assert not set(shown) & set(ACTIVE)
    assert "<script" not in shown


def test_json_for_a_terminal_is_the_same_document() -> None:
    text = json.dumps({ALL: ALL}, ensure_ascii=False)
    safe = printable_json(text)
    assert not set(safe) & set(ACTIVE)
    assert json.loads(safe) == {ALL: ALL}


@pytest.mark.parametrize(
    ("stated", "shown"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("/home/somebody/models/llama/", "llama"),
        ("C:\\Users\\somebody\\llama", "llama"),
        ("~/models/llama", "llama"),
        ("/", None),
        (None, None),
    ],
)
def test_folders_of_somebodys_disk_stay_out_of_reports(stated: str, shown: str) -> None:
    assert base_title(stated) == shown


def test_a_folder_whose_name_is_no_utf_8_is_analyzed_like_any_other(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = hostile_files(rng, tmp_path)
    try:
        moved = one.rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9-s1")))
    except OSError:
        pytest.skip("this file system takes no other bytes")
    assert call(capsys, "inspect", moved)[0] == 0
    result = study([moved, two], label="*{task}-s{seed}")
    assert result.runs["adapter"][0] == "caf\\udce9-s1"
    assert result.runs["seed"][0] == 1
