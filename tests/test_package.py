"""The built wheel in an environment of its own, outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
