"""The verdict on a group of pairs: what they share, held against unrelated pairs, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_analysis.conclusions.levels import SIDES_IN_ORDER, Finding, Level, level, number
from lora_analysis.studies import Relation, Study
from lora_analysis.studies.base_models import base_keys
from lora_analysis.text import plural

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.spectra import Side

# Fewer pairs say too little about what unrelated adapters give.
MIN_REFERENCE_PAIRS = 3

Verdict = Literal["share", "partly", "no more"]


@dataclass(frozen=True, slots=True)
class _SideLevel:
    """One side of a group of pairs: what was found, in the reference, and by chance."""

    side: Side
    found: Level
    reference: Level | None

    @property
    def above(self) -> int:
        """How many values exceed 95 % of the reference's."""
        if self.reference is None:
            return 0
        return int((self.found.values > self.reference.quantile(0.95)).sum())

    @property
    def verdict(self) -> Verdict | None:
        """What the values say against the reference; None without one that is large enough.

        "share": every pair's median exceeds that of every reference pair, and at least half of
        the modules exceed 95 % of the reference's. Five in a hundred do so among unrelated pairs.
        """
        if self.reference is None or self.reference.pairs < MIN_REFERENCE_PAIRS:
            return None
        best = max(self.reference.pair_medians)
        share = self.above / len(self.found.values)
        if share >= 0.5 and all(one > best for one in self.found.pair_medians):
            return "share"
        return "partly" if share >= 0.25 else "no more"

    @property
    def reason(self) -> str | None:
        """Why there is no verdict; None where there is one."""
        if self.verdict is not None:
            return None
        pairs = self.reference.pairs if self.reference else 0
        return f"a reference of {plural(pairs, 'pair')} is too small" if pairs else "no reference"

    def numbers(self, *, first: bool) -> str:
        """Return "median φ(1,1) 0.61 over ..."; short where a first side has said what it is."""
        one = self.found
        quartiles = f"quartiles {one.text(one.quantile(0.25))} to {one.text(one.quantile(0.75))}"
        over = f"{plural(one.modules, 'module')} of {plural(one.pairs, 'pair')}"
        text = f"median {one.name} {one.text(one.median)} over {over} ({quartiles})"
        if not first:
            text = f"{one.text(one.median)} ({quartiles})"
        if one.left_out:
            text += f", {one.left_out} left out as ill defined or shared from the start"
        if self.reference is not None:
            text += (
                f", {self.above} of {len(one.values)} above 95 % of unrelated pairs (their median "
                f"{self.reference.text(self.reference.median)})"
            )
        return f"{text}, isotropic chance {number(one.chance)}" if first else text

    def values(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        found = {
            "phi_1_1": self.found.median,
            "chance": self.found.chance,
            "above_chance": self.found.above_chance,
            "pairs": self.found.pairs,
            "modules": self.found.modules,
            "left_out": self.found.left_out,
            "values": len(self.found.values),
            "above_reference_95": self.above if self.reference else None,
            "reference": self.reference.median if self.reference else None,
            "verdict": self.verdict,
            "reason": self.reason,
        }
        return {f"{name}_{self.side}": value for name, value in found.items()}


def _sidestudy_level(study: Study, rows: pd.DataFrame, side: Side) -> _SideLevel | None:
    own = rows[rows["side"] == side]
    found = study_level(study, own)
    if found is None:
        return None
    return _SideLevel(side, found, study_level(study, reference_rows(study, rows, side)))


def study_level(study: Study, rows: pd.DataFrame) -> Level | None:
    """Return the level of rows on the one scale of the study.

    Chosen group by group, φ of square modules would be held against the reference's φ above
    chance wherever the reference has modules of other dimensions.
    """
    return level(rows, above_chance=study.similarities["dimension"].nunique() > 1)


def reference_rows(study: Study, rows: pd.DataFrame, side: Side) -> pd.DataFrame:
    """Return the unrelated pairs on the bases and types of module of ``rows``.

    Those of another base or type say nothing. An adapter that names no base may be of any.
    """
    reference = study.select(Relation.REFERENCE, side)
    reference = reference[reference["module_type"].isin(rows["module_type"])]
    keys = base_keys(study)
    wanted = {keys[label] for one in ("a", "b") for label in rows[one].unique()}
    if None in wanted:
        return reference
    # By number: of an empty table, an empty list would choose columns.
    on = enumerate(keys[label] for label in reference["a"])
    return reference.iloc[[at for at, base in on if base is None or base in wanted]]


_VERDICT_WORDS: dict[Verdict, str] = {
    "share": "share their first {side} direction",
    "partly": "share their first {side} direction in part of the modules",
    "no more": "share no more of their first {side} direction than unrelated adapters do",
}


def _clause(one: _SideLevel, *, first: bool) -> str:
    """Return "share their first output direction: ..." or that there is no verdict, and why."""
    numbers = one.numbers(first=first)
    if one.verdict is not None:
        return f"{_VERDICT_WORDS[one.verdict].format(side=one.side)}: {numbers}"
    return f"have no verdict on the {one.side} side ({one.reason}): {numbers}"


def compared(study: Study, rows: pd.DataFrame, who: str, topic: str) -> Finding:
    """Return one sentence about a group of pairs: the verdict on either side, and its numbers."""
    sides = [_sidestudy_level(study, rows, side) for side in SIDES_IN_ORDER]
    present = [one for one in sides if one is not None]
    if not present:
        text = f"{who}: no first direction is well defined, or none counts; φ(1,1) says nothing."
    else:
        text = f"{who} {'; they '.join(_clause(one, first=one is present[0]) for one in present)}."
    values = {name: value for one in present for name, value in one.values().items()}
    return Finding("result", topic, text, {"subject": who} | values)
