"""Remake what the README shows, from a demo run: ``python figures/make.py RUN FIGURES``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich import terminal_theme
from rich.console import Console

from lora_analysis.demo import TITLE, study_demo
from lora_analysis.report import write_report

COLUMNS = 96  # of the terminal that is drawn
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
    write_terminal(run / "runs", target / "terminal.svg")


def write_terminal(runs: Path, target: Path) -> None:
    """Draw what a terminal shows when two adapters are compared."""
    arguments = ["rotate-r8-s0", "rotate-r8-s1"]
    for unrelated in ("invert-r8-s2", "mirror-r8-s2"):
        arguments += ["--reference", unrelated]
    done = subprocess.run(
        [sys.executable, "-m", "lora_analysis", "compare", *arguments],
        cwd=runs,
        env={**os.environ, "COLUMNS": str(COLUMNS), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, highlight=False)
        console.print(f"$ lora-analysis compare {' '.join(arguments)}", markup=False)
        console.print(done.stdout.rstrip(), markup=False)
    text = console.export_svg(
        title="", theme=terminal_theme.DEFAULT_TERMINAL_THEME, unique_id="terminal"
    )
    # Its font would be fetched: any monospaced one does.
    text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)
    target.write_text(re.sub(r"Fira Code, ?", "", text), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
