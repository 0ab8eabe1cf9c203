"""Run what a document shows: its commands, its Python, its files, in the order they stand.

Fenced blocks are read from the Markdown itself. ``console`` holds commands after ``$`` and what
they print; ``python`` and ``{code-cell}`` share one namespace a page; a ``{code-block}`` with a
caption is a file of that name, as is ``toml`` whose first line is one; ``output`` is what the
``python`` before it prints. A block after
``% not run: why`` (README: ``<!-- not run: why -->``) is left out, and counted by the caller.
"""

from __future__ import annotations

import ast
import contextlib
import glob
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_analysis.cli import run

ROOT = Path(__file__).parents[1]

_BLOCK = re.compile(
    r"(?:^(?:%|<!--) not run: (?P<why>.+?)(?: -->)?\n+)?"
    r"^(?P<indent> *)(?P<fence>```+|:::+)\{?(?P<kind>[\w-]+)\}?(?P<argument>[^\n]*)\n"
    r"(?P<body>.*?)^(?P=indent)(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
_OPTION = re.compile(r"^:(?P<name>[\w-]+): *(?P<value>.*)\n", re.MULTILINE)
_NUMBER = re.compile(r"[-−]?\d[\d,.]*(?:e[-+]?\d+)?%?")
_SPARKS = re.compile("[▁▂▃▄▅▆▇█]+")
RUN_KINDS = frozenset({"console", "python", "code-cell", "code-block"})
SHOWN_KINDS = frozenset(
    {"text", "bibtex", "toctree", "note", "tip", "warning", "click", "image", "glossary"}
)


@dataclass(frozen=True)
class Block:
    """One fenced block; ``why`` says why it is not run, and is empty where it is."""

    kind: str
    language: str
    body: str
    options: dict[str, str]
    why: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a Markdown text, those inside of admonitions too."""
    for match in _BLOCK.finditer(text):
        body = textwrap.dedent(match["body"])
        options = {}
        if match["kind"] in ("code-cell", "code-block"):
            while option := _OPTION.match(body):
                options[option["name"]] = option["value"].strip()
                body = body[option.end() :]
        line = text.count("\n", 0, match.start("fence")) + 1
        argument = match["argument"].strip(" }")
        yield Block(match["kind"], argument, body.lstrip("\n"), options, match["why"] or "", line)


def commands(body: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a console block and what the block says it prints."""
    parts = re.split(r"^\$ ", body.replace("\\\n", " "), flags=re.MULTILINE)
    assert not parts[0].strip(), f"a console block starts with '$ ', not with {parts[0]!r}"
    for part in parts[1:]:
        command, _, printed = part.partition("\n")
        yield re.split(r"\s+# ", command)[0].strip(), printed


def shape(printed: str) -> str:
    """Return a text without what changes from machine to machine: numbers, curves, spaces."""
    return " ".join(_SPARKS.sub("#", _NUMBER.sub("#", printed)).split())


def fits(shown: str, printed: str) -> bool:
    """Say whether a text was printed as it is shown, numbers apart; ``...`` stands for any."""
    pattern = r".*".join(re.escape(shape(part)) for part in shown.split("..."))
    return re.fullmatch(pattern, shape(printed), re.DOTALL) is not None


@dataclass
class Page:
    """A document being run in the current folder."""

    path: Path
    namespace: dict[str, Any] = field(default_factory=dict)
    ran: int = 0
    printed: str = ""

    def run(self) -> None:
        """Run every block that is to be run."""
        for block in blocks(self.path.read_text(encoding="utf-8")):
            if block.why:
                continue
            place = f"{self.path.name}, line {block.line}"
            if block.kind in ("python", "code-cell"):
                self._python(block, place)
            elif block.kind == "console":
                for command, printed in commands(block.body):
                    self.command(command, printed, place)
            elif block.kind == "output":
                assert fits(block.body, self.printed), f"{place}: printed\n{self.printed}"
            elif "caption" in block.options:
                self._file(block, place)
            elif block.kind == "toml":  # its first line names the file
                name, _, body = block.body.removeprefix("# ").partition("\n")
                options = {"caption": name}
                self._file(replace(block, language="toml", body=body, options=options), place)
            else:
                assert block.kind in SHOWN_KINDS, f"{place}: what is to be done with it?"
                continue
            self.ran += 1

    def _python(self, block: Block, place: str) -> None:
        # What a notebook shows at the end of a cell goes nowhere here.
        source = "\n" * (block.line - 1) + short(block.body)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(source, place, "exec"), self.namespace)
        self.printed = out.getvalue()

    def _file(self, block: Block, place: str) -> None:
        path = Path(block.options["caption"].strip("`"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(short(block.body), encoding="utf-8")
        if block.language == "toml":
            tomllib.loads(block.body)
        elif block.language == "python":
            ast.parse(block.body, place)
        elif block.language == "bash":
            subprocess.run(["bash", "-n", path], check=True)
            for line in block.body.splitlines():
                if line.startswith("lora-analysis "):
                    self.command(os.path.expandvars(line), "", place)

    def command(self, command: str, printed: str, place: str) -> None:
        words = shlex.split(command)
        program = Path(words[0]).name
        if program == "lora-analysis":
            arguments = [word for one in words[1:] for word in expand_glob(one)]
            out = captured(arguments)
            assert not printed.strip() or fits(printed, out), f"{place}: `{command}` printed\n{out}"
        elif program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(words[1:]) <= set(targets), place
        elif program == "pip" and words[1] == "install":
            check_extras(words, place)
        elif program == "python" and words[1].endswith(".py"):
            here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            done = subprocess.run(
                [sys.executable, *words[1:]],
                env={**os.environ, "PATH": here},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{place}: {done.stderr}"
            assert not printed.strip() or fits(printed, done.stdout), f"{place}: {done.stdout}"
        else:
            assert words[:3] == ["python3", "-m", "venv"], f"{place}: cannot run `{command}`"


def short(source: str) -> str:
    """Return a source with short trainings of two seeds: what is tested is that they run."""
    source = re.sub(r"\b(steps *= *)\d+", r"\g<1>2", source)
    return re.sub(r"^seed = \[0, 1, 2\]$", "seed = [0, 1]", source, flags=re.MULTILINE)


def captured(arguments: list[str]) -> str:
    """Return stdout of one command, run in this process; it must succeed."""
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = run(arguments)
    assert code == 0, f"{arguments} ended with {code}: {said.getvalue()}"
    return out.getvalue()


def expand_glob(word: str) -> list[str]:
    """Return the files that a word with a ``*`` means, as a shell would; the word if none."""
    return sorted(glob.glob(word)) or [word] if "*" in word else [word]  # noqa: PTH207 - as shells


def check_extras(words: list[str], place: str) -> None:
    """Assert that every extra that is to be installed exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), place


def copy_tree(source: Path, target: Path) -> Path:
    """Copy a folder of small files."""
    return shutil.copytree(source, target, dirs_exist_ok=True)
