"""What stands behind a sentence: medians over modules and pairs, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.spectra import Side

Kind = Literal["result", "reference", "artefact", "limit", "failure"]

# The output side leads: what an update writes is not diluted by its initial A.
SIDES_IN_ORDER: tuple[Side, Side] = ("output", "input")


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence (or two) about a study, with the numbers in it.

    Attributes
    ----------
    kind
        ``"result"``; ``"reference"`` (what unrelated adapters give); ``"artefact"`` (a number
        that has another cause than learning); ``"limit"`` (what cannot be said); ``"failure"``.
    topic
        What it is about, one or two words.
    """

    kind: Kind
    topic: str
    text: str
    values: Mapping[str, float | int | str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Level:
    """One number over a group of pairs.

    Attributes
    ----------
    median, low, high
        Median and quartiles over all modules of all pairs.
    pair_medians
        Median over modules, for each pair: the unit of every verdict.
    modules, left_out
        Modules per pair, and how many cells did not count.
    """

    median: float
    low: float
    high: float
    pair_medians: tuple[float, ...]
    modules: int
    left_out: int

    @property
    def pairs(self) -> int:
        """How many pairs have a value."""
        return len(self.pair_medians)


def number(value: float) -> str:
    """Return a number as a sentence shows it: two digits that matter, no exponent where short."""
    if not np.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 0.1 <= abs(value) < 1000:
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.2g}" if 1e-4 <= abs(value) < 0.1 else f"{value:.1e}"


def plural(count: int, word: str) -> str:
    """Return ``"1 pair"``, ``"2 pairs"``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def level(rows: pd.DataFrame, value: str) -> Level | None:
    """Return the level of one column over rows of ``Study.similarities``; None if none count."""
    counted = rows
    if value == "phi_1_1":
        counted = counted[counted["ill_defined_1_1"] == ""]
    counted = counted[~(counted["shared_start"] & (counted["side"] == "input"))]
    if counted.empty:
        return None
    low, median, high = np.quantile(counted[value], [0.25, 0.5, 0.75])
    by_pair = counted.groupby(["a", "b"], sort=False)[value]
    return Level(
        float(median),
        float(low),
        float(high),
        tuple(float(one) for one in by_pair.median()),
        int(by_pair.size().max()),
        len(rows) - len(counted),
    )


def median_chance(rows: pd.DataFrame, value: str) -> float:
    """Return the median isotropic chance of one column over rows of ``similarities``."""
    column = {"phi_1_1": "chance_1_1", "phi_r_r": "chance_r_r", "omega": "omega_chance"}[value]
    return float(rows[column].median())
