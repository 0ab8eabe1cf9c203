"""Fixtures for every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before numpy is loaded: small matrices are slower on two BLAS threads than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Some tests start the program, which would compile all of its files at every start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Before huggingface_hub is loaded: no test asks a hub but the one on loopback.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500)
hypothesis.settings.load_profile("explore" if os.environ.get("EXPLORE") else "ci")


# A shell's background jobs ignore Ctrl-C, and their children would: some tests send it to one.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest, in the order in which workers get them: whoever starts one of them
# last keeps the others waiting. A wrong order costs time and nothing else.
LONGEST = (
    "test_documents", "test_training_sweep", "test_chance_calibration", "test_training_parallel",
    "test_report_large", "test_demo", "test_training_killed", "test_package", "test_browser",
    "test_report", "test_bases_damage", "test_interrupted", "test_faults", "test_cli", "test_hub",
)  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would start files in the order of how many tests they hold.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture
def rng() -> np.random.Generator:
    """The one source of random data: every test starts from the same state."""
    return np.random.default_rng(20210617)


@pytest.fixture(scope="session")
def real_adapters() -> Path:
    """Folder of adapters that others trained; see CONTRIBUTING.md."""
    folder = os.environ.get("LORA_ANALYSIS_REAL_ADAPTERS")
    if not folder:
        pytest.skip("LORA_ANALYSIS_REAL_ADAPTERS is not set")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"LORA_ANALYSIS_REAL_ADAPTERS={folder} is not a folder")
    return path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write reports without figures, which take most of their time and have tests of their own."""
    from lora_analysis.report import sections

    monkeypatch.setattr(sections, "draw_figures", lambda *_, **__: ())


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    import sys

    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
