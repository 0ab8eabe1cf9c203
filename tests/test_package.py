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
from lora_analysis.cli import VERBS
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
        "from lora_analysis.storage.source_names import bundled_data\n"
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


# Modules of the extras.
EXTRAS = (
    "torch", "transformers", "datasets", "sklearn", "gguf", "huggingface_hub", "pyarrow", "ray",
    "accelerate", "bitsandbytes", "tensorboard", "trackio", "wandb", "peft", "IPython",
)  # fmt: skip
# Runs commands in an interpreter that finds no extra; prints their exit codes.
WITHOUT_EXTRAS = """
import json, sys
from importlib.machinery import PathFinder

commands, extras = map(json.loads, sys.argv[1:])

class Core(PathFinder):
    @classmethod
    def find_spec(cls, name, *args):
        return None if name.partition(".")[0] in extras else super().find_spec(name, *args)

sys.meta_path[sys.meta_path.index(PathFinder)] = Core
from lora_analysis.cli import run
codes = [run(words) for words in commands]
assert not sys.modules.keys() & set(extras)
print(json.dumps(codes))
"""


def run_without_extras(commands: list[list[str]], cwd: Path) -> tuple[list[int], str]:
    """Return the exit codes of commands, and what they printed to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, json.dumps(commands), json.dumps(EXTRAS)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


BASE = ["--base", "base.safetensors"]
TO_GGUF = ["convert", "mlx.npz", "--scale", "1", "--to", "gguf", "--architecture", "llama"]


@pytest.fixture
def adapters(rng: np.random.Generator, tmp_path: Path) -> Path:
    """Return a folder with two adapters, a and b, and their base."""
    for name, rank in (("a", 2), ("b", 4)):
        write_adapter(adapter(rng, rank=rank, label=name), tmp_path / name)
    names = [f"layers.{layer}.{kind}_proj.weight" for layer in range(2) for kind in "qv"]
    weights = {name: rng.standard_normal((24, 20)).astype(np.float32) for name in names}
    save_file(weights, tmp_path / "base.safetensors")
    tuned = {
        name: W + 0.1 * rng.standard_normal(W.shape).astype("f4") for name, W in weights.items()
    }
    save_file(tuned, tmp_path / "tuned.safetensors")
    (tmp_path / "authors.toml").write_text('[ann]\nsources = ["a", "b"]\n')
    pairs = {
        f"model.layers.{layer}.self_attn.{kind}_proj.lora_{factor}": rng.standard_normal(shape)
        for layer in range(2)
        for kind in "qv"
        for factor, shape in (("a", (20, 2)), ("b", (2, 24)))
    }
    np.savez(tmp_path / "mlx.npz", **pairs)
    np.savez(tmp_path / "other.npz", **{name: value[::-1] for name, value in pairs.items()})
    return tmp_path


@pytest.mark.slow
def test_a_report_with_all_figures_needs_no_extra(adapters: Path) -> None:
    codes, errors = run_without_extras([["report", "a", "b", *BASE, "-o", "report"]], adapters)
    assert codes == [0], errors


@pytest.mark.slow
def test_analysis_and_conversion_need_no_extra(adapters: Path) -> None:
    commands = [
        ["inspect", "a", "b", "--format", "json"],
        ["inspect", "mlx.npz", "--scale", "1"],
        ["compare", "a", "b", *BASE],
        ["compare", "mlx.npz", "other.npz", "--scale", "1"],
        ["reference", "a", "b", "-o", "levels.json"],
        ["report", "a", "b", *BASE, "--figures", "", "-o", "report"],
        ["survey", "authors.toml"],
        ["amplify", "a", *BASE, "--spectrum"],
        ["merge-check", "a", *BASE],
        ["heatmap", "a", "b", "--module", "layers.0.q_proj", "-o", "heatmap.svg"],
        ["heatmap", "a", "b", "--width", "10", "--cmap", "magma", "-o", "slide.png"],
        ["resize", "b", "--rank", "2", "-o", "smaller"],
        ["convert", "a", "--to", "kohya", "-o", "a.safetensors"],
        ["extract", "tuned.safetensors", *BASE, "--rank", "2", "--not-transposed", "-o", "x"],
        ["doctor"],
    ]
    verbs = {words[0] for words in commands}
    assert verbs == set(VERBS) - {"demo", "train", "sweep", "reproduce"}
    codes, errors = run_without_extras(commands, adapters)
    assert codes == [0] * len(commands), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "needs"),
    [
        (["demo", "-o", "out"], "scikit-learn, demo"),
        (["reproduce", "-o", "out"], "scikit-learn, demo"),
        (
            ["train", "--base", "digits", "--name", "rotate", "-o", "out"],
            "Training needs torch, demo",
        ),
        (["train", "rows.csv", "--base", "model", "-o", "out"], "Training needs torch, train"),
        (["sweep", "sweep.toml", "-o", "out"], "Training needs torch, demo"),
        (
            ["sweep", "sweep.toml", "-o", "out", "--tracker", "wandb"],
            "The tracker 'wandb', trackers",
        ),
        ([*TO_GGUF, "--heads", "2,2", "-o", "a.gguf"], "Writing GGUF, gguf"),
        (
            ["report", "a", "b", "--parquet", "--figures", "", "-o", "out"],
            "Parquet tables, parquet",
        ),
        (["report", "a", "b", "--executor", "ray", "-o", "out"], "The executor 'ray', ray"),
        (["inspect", "hf://owner/name"], "hf"),
    ],
)
def test_a_verb_says_which_extra_it_needs(words: list[str], needs: str, adapters: Path) -> None:
    (adapters / "rows.csv").write_text("text,label\na,0\nb,1\n")
    (adapters / "model").mkdir()
    (adapters / "model" / "config.json").write_text('{"model_type": "bert"}')
    (adapters / "sweep.toml").write_text('task = "rotate"\nrank = [2, 4]\n')
    codes, errors = run_without_extras([words], adapters)
    assert codes == [3], errors
    purpose, _, extra = needs.rpartition(", ")
    assert purpose in errors
    assert f"pip install 'lora-analysis[{extra}]'" in " ".join(errors.split())


def test_the_device_of_a_spectrum_needs_the_extra_for_gpus(adapters: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import lora_analysis\n"
        "update = lora_analysis.read_adapter('a')['layers.0.q_proj']\n"
        "try: lora_analysis.spectrum(update, device='cuda')\n"
        "except ImportError as error: assert 'lora-analysis[gpu]' in str(error), error\n"
        "else: raise AssertionError\n"
    )
    shell(sys.executable, "-c", code, cwd=adapters)


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
