"""Every verb that writes, with every file operation failing in turn: nothing is lost or mixed.

A few operations of each verb fail here; ``make test-faults`` takes them all.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from factories import adapter
from faults import ERRORS, Killed, faulty, release_locks
from safetensors.numpy import save_file
from training_bases import write_tiny_base

from lora_analysis.cli import run
from lora_analysis.errors import UnfinishedError
from lora_analysis.formats import write_adapter
from lora_analysis.storage.records import RECORD_FOLDER, refuse_unfinished

_TRAIN = ["--rank", "2", "--batch-size", "8", "--steps", "4", "--device", "cpu", "--name", "rotate"]
_TRAIN += ["--set", "loop.checkpoint_every=2", "--set", "loop.trajectory=[2]", "--force"]
_EXTRACT = ["extract", "{in}/tuned.safetensors", "--base", "{in}/base.safetensors"]
_EXTRACT += ["--not-transposed"]
_PLAIN = ["--as", "md", "--figures", ""]
# Of each verb: the words that write a first result, those that replace it by a second one, and
# the name of the output.
VERBS: dict[str, tuple[list[str], list[str], str]] = {
    "report": (["report", "{in}/a", "{in}/b", *_PLAIN], ["report", "{in}/a", *_PLAIN], "out"),
    "heatmap": (
        ["heatmap", "{in}/a", "{in}/b", "--module", "layers.0.q_proj"],
        ["heatmap", "{in}/a", "{in}/b", "--module", "layers.1.q_proj"],
        "out.svg",
    ),
    "resize": (
        ["resize", "{in}/a", "--rank", "1"],
        ["resize", "{in}/a", "--rank", "2"],
        "out",
    ),
    "convert to a folder": (
        ["convert", "{in}/a", "--to", "mlx"],
        ["convert", "{in}/b", "--to", "mlx"],
        "out",
    ),
    "convert to a file": (
        ["convert", "{in}/a", "--to", "kohya"],
        ["convert", "{in}/b", "--to", "kohya"],
        "out.safetensors",
    ),
    "extract": ([*_EXTRACT, "--rank", "1"], [*_EXTRACT, "--rank", "2"], "out"),
    "train": (
        ["train", "--base", "{in}/model", *_TRAIN, "--seed", "0"],
        ["train", "--base", "{in}/model", *_TRAIN, "--seed", "1"],
        "out",
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("inputs")
    for label in "ab":
        write_adapter(adapter(rng, label=label), folder / label)
    base = {f"layers.{i}.q_proj.weight": rng.standard_normal((12, 9)) for i in range(2)}
    tuned = {name: W + rng.standard_normal((12, 9)) for name, W in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        path = folder / f"{name}.safetensors"
        save_file({k: v.astype(np.float32) for k, v in tensors.items()}, path)
    write_tiny_base(folder / "model")
    return folder


def files(root: Path) -> dict[str, bytes]:
    """Return what a user sees below a folder; of texts with a time of day, that they are there."""
    seen = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and RECORD_FOLDER not in path.parts and not name.endswith(".lock"):
            timed = path.suffix in (".md", ".html") or path.name == "manifest.json"
            seen[name] = b"" if timed else path.read_bytes()
    return seen


def is_refused(target: Path) -> bool:
    try:
        refuse_unfinished(target)
    except UnfinishedError:
        return True
    record = target / RECORD_FOLDER / "report.json"
    return record.is_file() and '"state": "finished"' not in record.read_text()


class Case:
    """One verb on its own folder: the first result, then the second under a fault."""

    def __init__(self, verb: str, inputs: Path, root: Path) -> None:
        first, second, name = VERBS[verb]
        self.root, self.name, self.inputs = root, name, inputs
        self.first, self.second = (
            [w.format_map({"in": inputs}) for w in o] for o in (first, second)
        )
        self.run_first(root / "old")
        self.run_second(root / "new")
        self.old, self.new = files(root / "old"), files(root / "new")
        assert self.old != self.new

    def run_first(self, folder: Path) -> None:
        assert run([*self.first, "-o", str(folder / self.name)]) == 0

    def run_second(self, folder: Path) -> None:
        assert run([*self.second, "-o", str(folder / self.name)]) == 0

    def count(self) -> int:
        """Return how many file operations the second result takes."""
        shutil.copytree(self.root / "old", self.root / "count")
        with faulty(self.root / "count", 1 << 40, OSError()) as faults:
            self.run_second(self.root / "count")
        return faults.seen

    def check(self, number: int, error: OSError | None) -> None:
        """Let one operation fail, look at what is there, and run again."""
        folder = self.root / "at"
        shutil.copytree(self.root / "old", folder)
        given = files(self.inputs)
        code = None
        with suppress(Killed), faulty(folder, number, error):
            code = run([*self.second, "-o", str(folder / self.name)])
        release_locks(folder)
        seen = {k: v for k, v in files(folder).items() if not k.endswith(".tmp")}
        where = (number, error)
        if code == 0:
            assert seen == self.new, where
        assert seen in (self.old, self.new) or is_refused(folder / self.name), where
        assert files(self.inputs) == given, where
        self.run_second(folder)
        assert _plain(files(folder)) == _plain(self.new), where
        shutil.rmtree(folder)


def _plain(seen: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in seen.items() if not name.endswith(".tmp")}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_failing_file_operation_loses_and_mixes_nothing(
    verb: str, inputs: Path, tmp_path: Path
) -> None:
    case = Case(verb, inputs, tmp_path)
    count = case.count()
    assert count > 5
    for index, error in enumerate(ERRORS.values()):
        case.check(1 + (2 * index + 1) * count // (2 * len(ERRORS)), error)


@pytest.mark.faults
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("verb", VERBS)
def test_no_file_operation_that_fails_loses_or_mixes_anything(
    verb: str, error: str, inputs: Path, tmp_path: Path
) -> None:
    case = Case(verb, inputs, tmp_path)
    for number in range(1, case.count() + 1):
        case.check(number, ERRORS[error])
