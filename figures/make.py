"""Copy the figures of a demo run: ``python figures/make.py RUN FIGURES``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def main(run: Path, target: Path) -> None:
    """Copy every figure of the run's report; the README links to some of them."""
    for figure in sorted((run / "figures").iterdir()):
        shutil.copyfile(figure, target / figure.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
