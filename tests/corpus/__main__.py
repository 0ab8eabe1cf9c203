"""Write the corpus out, one folder per case, for a look at it or for other programs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from corpus.cases import CASES


def main(target: Path) -> None:
    """Write every case that can be made into a new folder."""
    for at, case in enumerate(CASES):
        folder = target / f"{at:03d}-{re.sub('[^a-z0-9]+', '-', case.name.lower())[:60]}"
        folder.mkdir(parents=True)
        case.make(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
