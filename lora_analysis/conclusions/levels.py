"""What stands behind a sentence: medians over modules and pairs, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora_analysis.shared_init import InitRelation
from lora_analysis.text import html_facts

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from lora_analysis.finding import Severity
    from lora_analysis.spectra import Side

Kind = Literal["result", "reference", "artifact", "limit", "failure", "damage"]
_SEVERITIES: Mapping[Kind, Severity] = {
    "result": "result",
    "reference": "result",
    "artifact": "artifact",
    "limit": "limit",
    "failure": "limit",
    "damage": "damage",
}

# The output side leads: what an update writes is not diluted by its initial A.
# Pairs alike are described one by one up to this many, then together.
PAIRS_IN_WORDS = 6
SIDES_IN_ORDER: tuple[Side, Side] = ("output", "input")


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence (or two) about a study, with the numbers in it.

    Attributes
    ----------
    kind
        ``"result"``; ``"reference"`` (what unrelated adapters give); ``"artifact"`` (a number
        that has another cause than learning); ``"limit"`` (what cannot be said); ``"failure"``;
        ``"damage"`` (numbers that should not be relied on).
    topic
        What it is about, one or two words.
    parts
        The findings that it sums up, if any; they stand in no list beside it.
    code
        Of a finding about a file: its code in `lora_analysis.finding`.
    """

    kind: Kind
    topic: str
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Finding, ...] = ()
    code: str = ""

    @property
    def severity(self) -> Severity:
        """How the finding bears on the numbers next to it."""
        return _SEVERITIES[self.kind]

    def to_dict(self) -> dict[str, Any]:
        """Return code, severity, topic, text and fields, as JSON output has them."""
        return {
            "code": self.code or self.topic.replace(" ", "-"),
            "severity": self.severity,
            "topic": self.topic,
            "text": self.text,
            "fields": dict(self.values),
        }

    def _repr_html_(self) -> str:
        return html_facts(f"{self.kind}: {self.topic}", self.values.items(), self.text)


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """φ(1, 1) over a group of pairs.

    Attributes
    ----------
    values
        One per module and pair.
    pair_medians
        Median over modules, for each pair: the unit of every verdict.
    modules
        Modules per pair, at most.
    chance
        Isotropic chance; 0 where the values are already above chance.
    above_chance
        Whether the values are ``(φ − chance)/(1 − chance)``.
    left_out
        How many comparisons did not count (see `level`).
    """

    values: NDArray[np.float64]
    pair_medians: tuple[float, ...]
    modules: int
    chance: float
    above_chance: bool
    left_out: int

    def quantile(self, share: float) -> float:
        """Return a quantile of the values."""
        return float(np.quantile(self.values, share))

    @property
    def median(self) -> float:
        """The median of the values."""
        return self.quantile(0.5)

    @property
    def pairs(self) -> int:
        """How many pairs have a value."""
        return len(self.pair_medians)

    def text(self, value: float) -> str:
        """Return a value as a sentence shows it; above chance, what is nothing is 0."""
        return number(round(value, 3) + 0.0 if self.above_chance else value)

    @property
    def name(self) -> str:
        """What the values are."""
        return "φ(1,1) above chance" if self.above_chance else "φ(1,1)"


def number(value: float) -> str:
    """Return a number as a sentence shows it: two digits that matter, no exponent where short."""
    if not np.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 0.1 <= abs(value) < 1000:
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.2g}" if 1e-4 <= abs(value) < 0.1 else f"{value:.1e}"


def on(base: str) -> str:
    """Return " on gpt2", or nothing where a study has one base."""
    return f" on {base}" if base else ""


def level(rows: pd.DataFrame, *, above_chance: bool | None = None) -> Level | None:
    """Return the level of φ(1, 1) over rows of ``Study.similarities``; None if none count.

    What does not count: ill-defined first directions, pairs that are one run twice, and input
    sides that share their start. Where modules differ in dimension, chance differs too, and
    ``(φ − chance)/(1 − chance)`` is taken instead of φ, or as ``above_chance`` says: what is held
    against each other must be on one scale.
    """
    counted = rows[
        (rows["initialization"] != InitRelation.SAME_RUN) & (rows["degeneracy_1_1"] == "")
    ]
    counted = counted[~(counted["shared_init"] & (counted["side"] == "input"))]
    if counted.empty:
        return None
    if above_chance is None or counted["dimension"].nunique() > 1:
        above_chance = bool(counted["dimension"].nunique() > 1)
    phi, expected = counted["phi_1_1"], counted["chance_1_1"]
    values = (phi - expected) / (1 - expected) if above_chance else phi
    by_pair = values.groupby([counted["a"], counted["b"]], sort=False)
    return Level(
        values.to_numpy(dtype=np.float64),
        tuple(float(one) for one in by_pair.median()),
        int(by_pair.size().max()),
        0.0 if above_chance else float(expected.iloc[0]),
        above_chance,
        len(rows) - len(counted),
    )
