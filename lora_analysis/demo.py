"""The demo: train on bundled data, analyze and report, with the package's public functions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_analysis.formats import read_adapter
from lora_analysis.patterns import natural_key
from lora_analysis.progress import Progress
from lora_analysis.report import write_report
from lora_analysis.report.report_folder import check_report_folder
from lora_analysis.studies import Study, study
from lora_analysis.training import (
    BaseOptions,
    DataOptions,
    LoopOptions,
    RunConfig,
    base_folder,
    demo_sweep,
    run_sweep,
)
from lora_analysis.training.demo_data import require_digits
from lora_analysis.training.inputs import minilm_folder
from lora_analysis.training.options import DOCSTRINGS, MINILM
from lora_analysis.training.sweep import SWEEP_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence


TITLE = "Section 7 of the LoRA paper, on handwritten digits"
TEXT_TITLE = "Section 7 of the LoRA paper, on a sentence encoder and the docstrings of two packages"


def text_sweep() -> list[RunConfig]:
    """Return the 10 runs of the demo on text, on the encoder all-MiniLM-L6-v2.

    The task is to tell from which subpackage a docstring comes, of SciPy or of scikit-learn: rank 8
    on both tasks with the same three seeds, so that pairs of different tasks and one seed show the
    effect of a shared initialization; ranks 4 and 64 on the first task with two seeds.
    """
    jobs = [(task, 8, seed) for task in ("scipy", "sklearn") for seed in (0, 1, 2)]
    jobs += [("scipy", rank, seed) for rank in (4, 64) for seed in (0, 1)]
    return [
        RunConfig(
            task=task,
            rank=rank,
            seed=seed,
            alpha=16.0,
            targets=("query", "value"),
            base=BaseOptions(source=MINILM),
            data=DataOptions(source=DOCSTRINGS, max_length=64, test_share=0.2),
            loop=LoopOptions(steps=60, batch_size=16, lr=3e-3, warmup_steps=6, evaluations=1),
        )
        for task, rank, seed in jobs
    ]


def train_demo(
    folder: Path,
    *,
    text: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    force: bool = False,
) -> list[Path]:
    """Train the demo's adapters below ``folder``; finished ones are skipped.

    On digits 13: rank 8 on three tasks with three seeds, ranks 4 and 64 with two seeds on one
    task. On ``text`` 10, see `text_sweep`. ``force`` retrains runs of other versions.

    Raises
    ------
    MissingExtraError
        The package that holds the data or the base is not installed; nothing is written then.
    """
    # A missing extra is reported at once, not by every run after its worker has started.
    _ = minilm_folder() if text else require_digits()
    configs = text_sweep() if text else demo_sweep()
    result = run_sweep(configs, folder, device=device, force=force, progress=progress)
    return result.all_folders()


def find_demo_runs(folder: Path) -> list[Path]:
    """Return the folder of an earlier demo's runs, if there is one."""
    runs = folder / "runs"
    return [runs] if (runs / SWEEP_NAME).is_file() else []


def study_demo(
    runs: Sequence[Path], *, text: bool = False, progress: Progress | None = None
) -> Study:
    """Return the study of trained runs against their base."""
    base = minilm_folder() if text else base_folder()
    adapters = [read_adapter(run) for run in sorted(runs, key=lambda run: natural_key(run.name))]
    return study(adapters, base=base, progress=progress)


def run_demo(
    folder: Path,
    *,
    text: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Train, analyze and report; return the path of the report.

    Parameters
    ----------
    folder
        Receives ``runs/`` (one folder per adapter), ``report.html``, ``figures/``, ``tables/`` and
        ``results.json``.
    text
        Train a pretrained sentence encoder on text instead of the bundled vision transformer
        on digits. Both come with installed packages (extra ``demo-text``).
    device
        ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"mps"``.
    progress
        Called with (what, done, total).
    force
        Replace runs of another version or configuration, and foreign files at the names that the
        report writes.
    """
    _, path = make_demo(folder, text=text, device=device, progress=progress, force=force)
    return path


def make_demo(
    folder: Path,
    *,
    text: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    force: bool = False,
) -> tuple[Study, Path]:
    """Run the demo (see `run_demo`) and return the study and the path of its report."""
    check_report_folder(folder, inputs=find_demo_runs(folder), force=force)
    runs = train_demo(folder / "runs", text=text, device=device, progress=progress, force=force)
    result = study_demo(runs, text=text, progress=progress)
    path = write_report(
        result,
        folder,
        title=TEXT_TITLE if text else TITLE,
        progress=progress,
        force=force,
        command=f"lora-analysis demo{' --text' if text else ''} --device {device}",
    )
    return result, path
