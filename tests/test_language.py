"""The language of the package: names say what they hold, docstrings start with what is done."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_analysis

ROOT = Path(lora_analysis.__file__).parent
# Names that tell nothing of what they hold.
FILLERS = frozenset(
    [
        "one",
        "found",
        "own",
        "at",
        "said",
        "told",
        "stated",
        "known",
        "wanted",
        "kept",
        "held",
        "shown",
        "lost",
        "both",
        "here",
        "place",
    ]
)
SOURCES = sorted(ROOT.rglob("*.py"))


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every name that is assigned or is a parameter, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def docstrings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every docstring, with its line."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text, getattr(node, "lineno", 1)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_tell_what_they_hold(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    fillers = [f"line {line}: {name}" for name, line in bound_names(tree) if name in FILLERS]
    assert not fillers, fillers


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_what_is_done(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [
        f"line {line}: {text.splitlines()[0]}"
        for text, line in docstrings(tree)
        if re.match(r"Say\b|Return (what|whether)\b|Tell\b|Hold\b", text)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_phrases_that_were_replaced_do_not_return(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    phrases = (
        "(?:held|hold) against|(?:is|are) told|says nothing of|has no verdict|beyond all reason|"
        "(?:lies|lie) beside|shared start|in no conclusion"
    )
    wrong = re.findall(phrases, " ".join(text.split()))
    assert not wrong, wrong
