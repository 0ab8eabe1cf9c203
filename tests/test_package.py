"""The built wheel in an environment of its own, outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def shell(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of a fresh environment that holds the wheel and no extras."""
    place = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    shell(*pip, "wheel", "-q", "--no-deps", "-w", place, ROOT, cwd=place)
    (wheel,) = place.glob("lora_analysis-*.whl")
    venv.create(place / "env", with_pip=True)
    folder = place / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    shell(
        folder / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel,
        cwd=place,
    )  # fmt: skip
    return folder


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    program = installed / "lora-analysis"
    assert "lora-analysis, version" in shell(program, "--version", cwd=tmp_path)
    assert "--device" in shell(program, "demo", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_the_wheel_holds_the_bundled_base(installed: Path, tmp_path: Path) -> None:
    code = (
        "from lora_analysis import open_base\n"
        "from lora_analysis.storage.bundled import bundled_data\n"
        "path = bundled_data('digits-vit')\n"
        "assert 'site-packages' in str(path), path\n"
        "print(open_base(path).weight('blocks.0.attention.q_proj').array().shape)\n"
    )
    shape = shell(installed / "python", "-c", code, cwd=tmp_path)
    rows, columns = map(int, shape.strip("() \n").split(","))
    assert rows == columns >= 192


@pytest.mark.slow
def test_the_demo_without_its_extra_says_what_to_install(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed / "lora-analysis", "demo", "-o", "out"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "lora-analysis[demo]" in done.stderr
    assert "Traceback" not in done.stderr
