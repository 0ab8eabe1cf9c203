"""What the documents show works: every command, every line of Python, every link."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from document_workspace import make_workspace
from documents import ROOT, Page, blocks, copy_tree, fits

import lora_analysis
from lora_analysis import demo, formats, plots, study
from lora_analysis.cli import VERBS
from lora_analysis.execution.protocol import SerialExecutor
from lora_analysis.formats import registry
from lora_analysis.report.results import TABLE_NAMES, all_tables
from lora_analysis.studies.pair_classes import PairClass
from lora_analysis.training import LoopOptions, RunConfig, sweep

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Pages that train, write reports, or take more than two seconds for another reason.
SLOW_PAGES = {
    "chance", "ci-gate", "conclusions", "fine-tunes", "gallery", "kohya", "paper-figure", "peft",
    "results", "steps", "survey", "sweep", "tutorial",
}  # fmt: skip
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.rst"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that every document finds around it; each runs in a copy."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def inside(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undrawn: None,
) -> Path:
    """Go into a fresh copy of the workspace."""
    copy_tree(workspace, tmp_path)
    monkeypatch.chdir(tmp_path)
    # What a document adds to the program ends with it.
    monkeypatch.setattr(registry, "READERS", list(registry.READERS))
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, "lora_analysis/formats"])
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    # Two steps each are done in this process before another one has imported torch.
    monkeypatch.setattr(sweep, "choose_executor", lambda *_: SerialExecutor())
    loop = LoopOptions(steps=2, warmup_steps=1, evaluations=1)
    short = [RunConfig(task="rotate", rank=r, seed=0, loop=loop) for r in (2, 3)]
    monkeypatch.setattr(demo, "demo_sweep", lambda: short)
    return tmp_path


def run_in(path: Path, **namespace: object) -> Page:
    page = Page(path, dict(namespace))
    page.run()
    return page


@pytest.mark.slow
def test_every_block_and_every_command_of_the_readme_runs(inside: Path) -> None:
    page = run_in(ROOT / "README.md")
    assert page.ran >= 5
    in_tables = re.findall(r"\| `(lora-analysis [^`]+)` \|", README)
    assert len(in_tables) >= 8
    for command in in_tables:
        page.command(command, "", "README.md")
    assert {"ab.svg", "out", "small", "lora", "copy"} <= {path.name for path in inside.iterdir()}


# PEFT and transformers warn of their own affairs.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.stem in SLOW_PAGES else [])
        for page in PAGES
    ],
    ids=lambda path: str(path.relative_to(ROOT / "docs")),
)
def test_every_block_of_the_documentation_runs(path: Path, inside: Path) -> None:
    run_in(path)


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```console\n$ lora-analysis inspect adapter\nadapter     another\n...\n```", "printed"),
        ("```console\n$ lora-analysis inspect nothing\n```", "ended with 3"),
        ("```console\n$ lora-analysis heatmap adapter\n```", "ended with 2"),
        ("```console\n$ rm -rf adapter\n```", "cannot run `rm"),
        ("```console\n$ make sense\n```", "line 1"),
        ("```python\nassert 1 + 1 == 3, 'sum'\n```", "sum"),
        ("```python\nprint('a')\n```\n```output\nb\n```", "printed"),
        ("```ruby\nputs 1\n```", "what is to be done"),
    ],
)
def test_a_document_with_a_mistake_does_not_pass(block: str, error: str, inside: Path) -> None:
    page = inside / "page.md"
    page.write_text(block, encoding="utf-8")
    with pytest.raises(AssertionError, match=error):
        run_in(page)


def test_numbers_in_what_is_shown_may_differ_and_words_may_not() -> None:
    assert fits("rank  8\n...\nall  0.25 █▃▁\n", "rank 16\nlayer 1\n all 1e-3 ▇▂▁")
    assert not fits("rank  8\n", "size 8\n")
    assert not fits("rank  8\n", "rank 8 of 9\n")


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    left_out = [
        f"{path.name}: {block.why}"
        for path in (ROOT / "README.md", *PAGES)
        for block in blocks(path.read_text(encoding="utf-8"))
        if block.why
    ]
    assert len(left_out) == 4, left_out


def test_the_documents_show_every_verb() -> None:
    texts = README + "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for verb in VERBS:
        assert f"lora-analysis {verb}" in texts


def test_the_reference_has_every_public_name_and_every_module() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in REFERENCE)
    for name in lora_analysis.__all__:
        assert name.startswith("_") or re.search(rf"lora_analysis\.{name}$", text, re.MULTILINE)
    for home in lora_analysis._HOME:
        assert f".. automodule:: lora_analysis.{home}\n" in text


def documented(heading: str) -> set[str]:
    """Return the names in the first column of the table below a heading of the tables' page."""
    text = (ROOT / "docs" / "reference" / "tables.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


def test_the_gallery_has_every_plot_function() -> None:
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    names = [name for name in plots.__all__ if name.startswith("plot_")]
    assert sorted(re.findall(r"^## `(\w+)`$", text, re.MULTILINE)) == sorted(names)
    for name in names:
        assert re.search(rf"^ax = plots\.{name}\(", text, re.MULTILINE)


def test_every_column_of_every_table_is_documented(inside: Path) -> None:
    result = study(["runs"], base="path/to/model", weight_spectra=True)
    tables = dict(all_tables(result))
    assert list(tables) == list(TABLE_NAMES)
    differences = {
        name: documented(name) ^ {re.sub("^metric_.+", "metric_*", c) for c in table.columns}
        for name, table in tables.items()
    }
    # The runs of the workspace were not evaluated.
    assert differences.pop("adapters") <= {"metric_*"}
    assert not any(differences.values()), differences


def test_every_pair_class_is_documented() -> None:
    assert documented("Pair classes") == set(PairClass)


def test_every_make_target_of_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in set(
        re.findall(r"\bmake (test|check|demo|docs|figures|notebooks|data|bench|fuzz)\b", texts)
    ):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_pattern_of_the_numeric_tests_matches_a_file() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    numeric = re.search(
        r"^NUMERIC := \S+ tests/test_,\$\(addsuffix \.py,([^)]+)\)\)$", makefile, re.M
    )
    assert numeric
    for pattern in numeric[1].split():
        assert list((ROOT / "tests").glob(f"test_{pattern}.py")), pattern


def test_every_file_the_readme_links_to_is_there() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("https://"):
            assert (ROOT / link).is_file(), link


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_were_run_in_order_and_without_an_error(path: Path) -> None:
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [one for one in outputs if one["output_type"] == "error"]
    pictures = [one for one in outputs if "image/png" in one.get("data", {})]
    sources = ["".join(cell["source"]) for cell in cells]
    drawn = [one for one in sources if re.search(r"^ *(la\.)?plot_", one, re.MULTILINE)]
    assert len(pictures) >= len(drawn) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_use_the_package_and_define_next_to_nothing(path: Path) -> None:
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    tree = ast.parse("\n".join(re.sub(r";$", "", "".join(c["source"])) for c in cells))
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert any(name.startswith("lora_analysis") for name in imported)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.ClassDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 5, node.name


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("myst_nb", reason="the documentation's extra is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-d", tmp_path / "trees", ROOT / "docs", "."],
        # Its pages are run above; here it is their text, their links, and the docstrings.
        env={**os.environ, "DOCS_EXECUTION": "off"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "reference" / "commands.html").read_text(encoding="utf-8")
    assert all(f"Usage: lora-analysis {verb}" in shown for verb in VERBS)
    pages = [page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")]
    assert not [one for page in pages for one in re.findall(r'(?:src|<link[^>]*href)="http', page)]
