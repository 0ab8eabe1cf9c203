"""The folder of a report: what in it is an earlier one's, and may be replaced."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lora_analysis.report.results import TABLE_NAMES
from lora_analysis.report.sections import FORMATS
from lora_analysis.storage.atomic import is_leftover

# Names that this package gives, and no others.
_FIGURE = re.compile(
    r"(ranks|seeds|pair|levels|energy|intruders)_(output|input)|atlas_(output|input|cosine)"
    r"|amplification_factor|enrichment|amplification_layers|enrichment_layers|spectra|energy|budget"
    r"|modules|steps"
)
_TABLE = re.compile("|".join((*TABLE_NAMES, "atlas_(output|input|cosine)")))
# Folder, suffixes and names of what a report writes into it.
_MINE = (
    ("figures", tuple(f".{kind}" for kind in FORMATS), _FIGURE),
    ("tables", (".csv", ".parquet"), _TABLE),
)
GRIDS, RESULTS = "grids.npz", "results.json"
# Within so many bytes of its start results.json says what wrote it.
_HEAD = 200


def holds_report(folder: Path) -> bool:
    """Return whether a folder holds a report, or nothing but the beginnings of one.

    Other files beside a whole report are left alone by the next one, and do not count.
    """
    results = folder / RESULTS
    if results.is_file():
        with results.open("rb") as stream:
            return b'"generator": "lora_analysis' in stream.read(_HEAD)
    known = {name for name, _, _ in _MINE} | {GRIDS}
    inside = [one for name in known if (folder / name).is_dir() for one in _left(folder / name)]
    return {one.name for one in _left(folder)} <= known and set(inside) == set(_written(folder))


def prepare(folder: Path) -> None:
    """Make the folders, and take away what an earlier report left: it may not be written anew."""
    for name, _, _ in _MINE:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for old in list(_written(folder)):
        old.unlink()
    (folder / GRIDS).unlink(missing_ok=True)


def _left(folder: Path) -> Iterator[Path]:
    return (one for one in folder.iterdir() if not is_leftover(one))


def _written(folder: Path) -> Iterator[Path]:
    """Yield the files that carry a name which a report gives."""
    for place, suffixes, name in _MINE:
        if (folder / place).is_dir():
            for one in (folder / place).iterdir():
                if one.suffix in suffixes and name.fullmatch(one.stem):
                    yield one
