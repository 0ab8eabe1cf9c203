"""The package's shape, proved from its source: who imports whom, and what an import costs."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from factories import adapter

import lora_analysis
from lora_analysis.formats import write_adapter

ROOT = Path(lora_analysis.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

# A module imports from lower levels and from its own folder only.
LEVELS = {
    "errors": 0,
    "progress": 0,
    "text": 0,
    "execution": 1,
    "linalg": 1,
    "finding": 1,
    "names": 1,
    "family_names": 2,
    "patterns": 2,
    "results": 2,
    "adapter": 3,
    "blocks": 3,
    "chance": 3,
    "storage": 3,
    "bases": 4,
    "init_evidence": 4,
    "formats": 5,
    "shared_init": 6,
    "effective": 6,
    "lora": 6,
    "spectra": 6,
    "amplify": 7,
    "edit": 7,
    "intruders": 7,
    "merging": 7,
    "pairwise": 9,
    "similarity": 7,
    "weight_changes": 7,
    "integrations": 8,
    "studies": 8,
    "training": 8,
    "conclusions": 9,
    "plots": 9,
    "survey": 9,
    "report": 10,
    "demo": 11,
    "reproduction": 12,
    "cli": 13,
    "__main__": 14,
}
# Which parts may import what is slow to import, and no other part may.
HEAVY = {
    "torch": {"lora", "spectra", "training"},  # spectra: on a device only
    "matplotlib": {"plots", "report"},
    "pandas": {"results", "studies", "survey", "report"},
    "gguf": {"bases", "storage"},
    "bitsandbytes": {"training"},  # to say that it is missing
    "compressed_tensors": set(),
    "transformers": {"training"},
    "peft": set(),
    "huggingface_hub": {"storage"},
    "ray": {"execution"},
}


def part_of(path: Path) -> str:
    """Return the entry of the table to which a source file belongs."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def imported_names(path: Path) -> list[str]:
    """Return the full name of everything a file imports, wherever in the file it does."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def imported_parts(path: Path) -> set[str]:
    """Return the parts of the package that a file imports; a public name counts for its home."""
    parts = set()
    for name in imported_names(path):
        package, _, rest = name.partition(".")
        if package == "lora_analysis" and rest != "__version__":
            first = rest.partition(".")[0]
            parts.add(lora_analysis._MODULE_OF.get(first, first))
    return parts


def test_every_module_has_a_level() -> None:
    assert {part_of(path) for path in SOURCES} - {"__init__"} <= set(LEVELS)


@pytest.mark.parametrize("part", sorted({part_of(path) for path in SOURCES} - {"__init__"}))
def test_imports_lead_to_lower_levels_only(part: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} (level {LEVELS[part]}) imports {other} (level {LEVELS[other]})"
        for path in SOURCES
        if part_of(path) == part
        for other in imported_parts(path) - {part}
        if LEVELS[other] >= LEVELS[part]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("heavy", HEAVY)
def test_heavy_packages_are_imported_where_they_belong_and_nowhere_else(heavy: str) -> None:
    users = {
        part_of(path)
        for path in SOURCES
        if any(name.partition(".")[0] == heavy for name in runtime_imports(path))
    }
    assert users <= HEAVY[heavy]


@cache
def runtime_imports(path: Path) -> list[str]:
    """Return the imports of a file when it runs: those for type checkers alone cost nothing."""
    names: list[str] = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return names


def test_scipy_stats_is_never_imported() -> None:
    # It takes five times as long as scipy.special, which holds all that is needed.
    assert not [
        path for path in SOURCES for name in imported_names(path) if name.startswith("scipy.stats")
    ]


def test_no_exported_name_is_a_submodules_name() -> None:
    for package in sorted({path.parent for path in SOURCES}):
        name = ".".join(("lora_analysis", *package.relative_to(ROOT).parts))
        exported = set(getattr(importlib.import_module(name), "__all__", ()))
        submodules = {path.stem for path in package.iterdir() if path.suffix in ("", ".py")}
        assert not exported & submodules, name


def test_every_exported_name_is_there_and_documented() -> None:
    assert dir(lora_analysis) == lora_analysis.__all__
    for name in lora_analysis.__all__:
        value = getattr(lora_analysis, name)
        assert isinstance(value, str) or value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lora_analysis.nothing


def test_what_type_checkers_see_is_what_is_exported() -> None:
    shown = {name for name in imported_names(ROOT / "__init__.py") if "lora_analysis." in name}
    exported = {f"lora_analysis.{home}.{name}" for name, home in lora_analysis._MODULE_OF.items()}
    # Imported only to name a missing extra.
    assert shown == exported | {"lora_analysis.errors.require_package"}


def loaded_by(code: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter has loaded after running ``code``."""
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


def loaded_by_command(*arguments: str, code: int = 0) -> set[str]:
    """Return the same for a command, run as ``python -m lora_analysis``."""
    return loaded_by(
        "import runpy\n"
        f"sys.argv = ['lora-analysis', *{list(arguments)!r}]\n"
        "try: runpy.run_module('lora_analysis', run_name='__main__')\n"
        f"except SystemExit as end: assert end.code == {code}, end.code"
    )


@pytest.fixture
def stored(rng: np.random.Generator, tmp_path: Path) -> list[str]:
    """Two adapters on disk."""
    return [str(write_adapter(adapter(rng, rank=r), tmp_path / f"r{r}")) for r in (2, 4)]


LATE = {"torch", "scipy", "matplotlib", "pandas"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import lora_analysis") & (LATE | {"numpy"})


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["--version"], 0), (["nonsense"], 2)]
)
def test_help_and_usage_errors_load_nothing_heavy(arguments: list[str], code: int) -> None:
    assert not loaded_by_command(*arguments, code=code) & (LATE | {"numpy"})


def test_reading_an_adapter_needs_numpy_alone(stored: list[str]) -> None:
    read = f"from lora_analysis import read_adapter\nlist(read_adapter({stored[0]!r}).values())"
    assert not loaded_by(read) & LATE


def test_inspect_needs_numpy_alone(stored: list[str]) -> None:
    loaded = loaded_by_command("inspect", *stored)
    assert "numpy" in loaded
    assert not loaded & LATE


@pytest.mark.slow
def test_compare_loads_no_torch(stored: list[str]) -> None:
    loaded = loaded_by_command("compare", *stored)
    assert not loaded & {"torch", "matplotlib"}
