"""What the documents say exists, exists."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import click
import pytest

import lora_analysis
from lora_analysis.cli import VERBS, group

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def fenced(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, flags=re.DOTALL)


def test_every_command_in_the_readme_parses() -> None:
    lines = [line for block in fenced("console") for line in block.splitlines()]
    used = [re.split(r"\s{2,}#", line)[0] for line in lines if "lora-analysis " in line]
    assert len(used) >= 6
    for line in used:
        words = line.partition("lora-analysis ")[2].split()
        command = group.get_command(click.Context(group), words[0])
        assert command is not None, line
        command.make_context(words[0], words[1:])


def test_the_readme_shows_every_verb() -> None:
    for verb in VERBS:
        assert f"lora-analysis {verb}" in README


def test_the_pythons_of_the_readme_import_public_names_only() -> None:
    blocks = fenced("python")
    assert len(blocks) >= 2
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert node.module == "lora_analysis"
                for alias in node.names:
                    assert alias.name in lora_analysis.__all__


def test_every_make_target_of_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in set(
        re.findall(r"\bmake (test|check|demo|figures|notebooks|data|bench)\b", texts)
    ):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


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
    drawn = [cell for cell in cells if re.search(r"^plot_", "".join(cell["source"]), re.MULTILINE)]
    assert len(pictures) >= len(drawn) > 0
