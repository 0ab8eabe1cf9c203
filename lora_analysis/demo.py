"""The embedded default: train on bundled data, analyse, report, as any user of the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_analysis.bases import open_base
from lora_analysis.formats import read_adapter
from lora_analysis.patterns import natural_key
from lora_analysis.report import write_report
from lora_analysis.studies import Study, study
from lora_analysis.training import SweepProgress, base_folder, demo_sweep, run_sweep

if TYPE_CHECKING:
    from collections.abc import Sequence

Progress = Callable[[str, int, int], None]

TITLE = "Section 7 of the LoRA paper, on handwritten digits"


def train_demo(
    folder: Path, *, device: str = "auto", progress: Progress | None = None
) -> list[Path]:
    """Train the demo's 13 adapters below ``folder``; those finished before are skipped.

    Rank 8 on three tasks with three seeds, ranks 4 and 64 with two seeds on one task.
    """
    configs = demo_sweep()
    watch = SweepProgress(progress, len(configs)) if progress else None
    # What an earlier version left there is trained anew, as the demo's other files are made anew.
    return run_sweep(configs, folder, device=device, force=True, progress=watch).all_folders()


def study_demo(runs: Sequence[Path], *, progress: Progress | None = None) -> Study:
    """Return the study of trained runs against the bundled base."""
    base = open_base(base_folder())
    adapters = [read_adapter(run) for run in sorted(runs, key=lambda one: natural_key(one.name))]
    return study(adapters, base=base, progress=progress)


def run_demo(folder: Path, *, device: str = "auto", progress: Progress | None = None) -> Path:
    """Train, analyse and report; return the path of the report.

    Parameters
    ----------
    folder
        Gets ``runs/`` (one folder per adapter), ``report.html``, ``figures/``, ``tables/`` and
        ``results.json``.
    device
        ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"`` or ``"mps"``.
    progress
        Called with (what, done, total).
    """
    runs = train_demo(folder / "runs", device=device, progress=progress)
    result = study_demo(runs, progress=progress)
    return write_report(
        result,
        folder,
        title=TITLE,
        progress=progress,
        command=f"lora-analysis demo --device {device}",
    )
