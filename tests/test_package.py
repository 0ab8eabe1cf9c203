"""The package as it is installed: without torch, and as a wheel outside of the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import numpy as np
import pytest
from factories import adapter
from packaging.requirements import Requirement
from safetensors.numpy import save_file

import lora_analysis
from lora_analysis.formats import write_adapter

ROOT = Path(__file__).parents[1]


def outside(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that sees nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def shell(*command: object, cwd: Path) -> str:
    done = outside(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of a fresh environment that holds the wheel and no extras.

    What the wheel requires, and nothing else, is linked from the environment of the tests:
    downloading and unpacking more than a gigabyte would take minutes and prove no more.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    shell(*pip, "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("lora_analysis-*.whl")
    venv.create(folder / "env", symlinks=os.name == "posix")
    programs = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    target = ("--python", programs / "python", "install", "-q", "--no-deps", "--no-index")
    shell(*pip, *target, wheel, cwd=folder)
    (packages,) = (folder / "env").rglob("site-packages")
    (metadata,) = packages.glob("lora_analysis-*.dist-info")
    link_requirements(Distribution.at(metadata), packages)
    return programs


def link_requirements(wheel: Distribution, packages: Path) -> None:
    """Link every distribution that a wheel requires without extras, and what those require."""
    pending, seen = [(wheel, {""})], set()
    while pending:
        parent, extras = pending.pop()
        for requirement in map(Requirement, parent.requires or ()):
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
                continue
            if (requirement.name, *requirement.extras) in seen:
                continue
            seen.add((requirement.name, *requirement.extras))
            child = distribution(requirement.name)
            assert requirement.specifier.contains(child.version, prereleases=True), requirement
            pending.append((child, {"", *requirement.extras}))
            for name in {file.parts[0] for file in child.files or ()} - {"..", "__pycache__"}:
                if not (packages / name).exists():
                    (packages / name).symlink_to(Path(str(child.locate_file(name))))


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    program = installed / "lora-analysis"
    assert "lora-analysis, version" in shell(program, "--version", cwd=tmp_path)
    assert "--device" in shell(program, "demo", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_the_wheel_holds_the_bundled_base(installed: Path, tmp_path: Path) -> None:
    code = (
        "from lora_analysis import open_base\n"
        "from lora_analysis.storage.paths import bundled_data\n"
        "path = bundled_data('digits-vit')\n"
        "assert 'site-packages' in str(path), path\n"
        "print(open_base(path).weight('blocks.0.attention.q_proj').array().shape)\n"
    )
    shape = shell(installed / "python", "-c", code, cwd=tmp_path)
    rows, columns = map(int, shape.strip("() \n").split(","))
    assert rows == columns >= 192


@pytest.mark.slow
def test_the_demo_without_its_extra_says_what_to_install(installed: Path, tmp_path: Path) -> None:
    done = outside(installed / "lora-analysis", "demo", "-o", "out", cwd=tmp_path)
    assert done.returncode == 3
    assert "lora-analysis[demo]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# Runs commands in an interpreter in which torch cannot be imported; prints their exit codes.
WITHOUT_TORCH = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
from lora_analysis.cli import run
codes = [run(words) for words in json.loads(sys.argv[1])]
assert "torch" not in sys.modules
print(json.dumps(codes))
"""


def run_without_torch(commands: list[list[str]], cwd: Path) -> tuple[list[int], str]:
    """Return the exit codes of commands, and what they printed to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


BASE = ["--base", "base.safetensors"]


@pytest.fixture
def adapters(rng: np.random.Generator, tmp_path: Path) -> Path:
    """Return a folder with two adapters, a and b, and their base."""
    for name, rank in (("a", 2), ("b", 4)):
        write_adapter(adapter(rng, rank=rank, label=name), tmp_path / name)
    names = [f"layers.{layer}.{kind}_proj.weight" for layer in range(2) for kind in "qv"]
    weights = {name: rng.standard_normal((24, 20)).astype(np.float32) for name in names}
    save_file(weights, tmp_path / "base.safetensors")
    return tmp_path


@pytest.mark.slow
def test_a_report_with_all_figures_needs_no_torch(adapters: Path) -> None:
    codes, errors = run_without_torch([["report", "a", "b", *BASE, "-o", "report"]], adapters)
    assert codes == [0], errors


def test_analysis_and_conversion_need_no_torch(adapters: Path) -> None:
    commands = [
        ["inspect", "a", "b"],
        ["compare", "a", "b"],
        ["report", "a", "b", *BASE, "--figures", "", "-o", "report"],
        ["amplify", "a", *BASE],
        ["heatmap", "a", "b", "--module", "layers.0.q_proj", "-o", "heatmap.svg"],
        ["resize", "b", "--rank", "2", "-o", "smaller"],
        ["convert", "a", "--to", "kohya", "-o", "a.safetensors"],
        ["doctor"],
    ]
    codes, errors = run_without_torch(commands, adapters)
    assert codes == [0] * len(commands), errors


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["demo", "-o", "out"], "demo"),
        (["train", "--base", "digits", "--name", "rotate", "-o", "out"], "demo"),
        (["train", "rows.csv", "--base", "model", "-o", "out"], "train"),
    ],
)
def test_training_without_torch_says_which_extra_to_install(
    words: list[str], extra: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    codes, errors = run_without_torch([words], tmp_path)
    assert codes == [3]
    assert "Training needs torch, which is not installed." in errors
    assert f"pip install 'lora-analysis[{extra}]'" in errors


def test_lora_layers_without_torch_say_which_extra_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import lora_analysis\n"
        "try: lora_analysis.add_lora\n"
        "except ImportError as error: assert 'lora-analysis[gpu]' in str(error), error\n"
        "else: raise AssertionError\n"
    )
    shell(sys.executable, "-c", code, cwd=tmp_path)


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {lora_analysis.__version__}\n" in citation


def test_the_core_depends_on_no_extra_and_all_extras_are_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {line.partition(">")[0] for line in project["dependencies"]}
    assert not core & {"torch", "transformers", "scikit-learn", "gguf", "ray"}
    extras = project["optional-dependencies"]
    (everything,) = extras["all"]
    included = everything.partition("[")[2].rstrip("]").split(",")
    assert set(included) == set(extras) - {"all", "dev", "docs", "test"}
