"""Remake what the README shows, from a demo run: ``python figures/make.py RUN FIGURES``."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from lora_analysis.demo import TITLE, study_demo
from lora_analysis.report import write_report

# PNGs that other pages show; report.md shows the SVGs.
SHOWN = ("ranks_output.png", "similarity_matrix_output.png")


def main(run: Path, target: Path) -> None:
    """Write the demo's report as Markdown into ``target``, its figures next to it."""
    result = study_demo(
        [
            folder
            for folder in (run / "runs").iterdir()
            if folder.is_dir() and not folder.name.startswith(".")
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        report = write_report(
            result,
            folder,
            title=TITLE,
            command="lora-analysis demo",
            form="md",
            figures=("svg", "png"),
        )
        text = report.read_text(encoding="utf-8").replace("](figures/", "](")
        (target / "report.md").write_text(text, encoding="utf-8")
        for figure in sorted((Path(folder) / "figures").iterdir()):
            if figure.suffix == ".svg" or figure.name in SHOWN:
                shutil.copyfile(figure, target / figure.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
