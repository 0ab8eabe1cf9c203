"""Many comparisons without a verdict in one sentence: a table holds them one by one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

from lora_analysis.conclusions import overlaps
from lora_analysis.conclusions.levels import SIDES_IN_ORDER, Finding, number

if TYPE_CHECKING:
    from lora_analysis.studies import Study


def comparisons(study: Study) -> Iterator[Finding]:
    """Compare ranks, seeds and pairs of unknown relation; those without a verdict are summed up."""
    found = chain(overlaps.by_rank_pair(study), overlaps.by_seed(study), overlaps.unknown(study))
    for key, same in groupby(found, _what_is_missing):
        alike = tuple(same)
        if key is None or len(alike) == 1:
            yield from alike
        else:
            yield _summed(alike)


def _what_is_missing(one: Finding) -> tuple[Any, ...] | None:
    """Return why there is no verdict on any side, and what is measured; None where there is one."""
    values = one.values
    sides = [side for side in SIDES_IN_ORDER if f"phi_1_1_{side}" in values]
    if not sides or any(values[f"verdict_{side}"] for side in sides):
        return None
    return tuple((side, values[f"reason_{side}"], values[f"above_chance_{side}"]) for side in sides)


def _summed(alike: tuple[Finding, ...]) -> Finding:
    first = alike[0].values
    sides = [side for side in SIDES_IN_ORDER if f"phi_1_1_{side}" in first]
    name = "φ(1,1) above chance" if first[f"above_chance_{sides[0]}"] else "φ(1,1)"
    ranges = [
        f"{_range(alike, f'phi_1_1_{side}')} on the {side} side (isotropic chance "
        f"{_range(alike, f'chance_{side}')})"
        for side in sides
    ]
    left_out = sum(int(one.values[f"left_out_{side}"] or 0) for one in alike for side in sides)
    text = (
        f"{len(alike)} comparisons have no verdict ({first[f'reason_{sides[0]}']}). Their medians "
        f"of {name} over modules are {' and '.join(ranges)}; the table of verdicts has each."
    )
    if left_out:
        text += f" {left_out} values are left out as ill defined or shared from the start."
    values: dict[str, float | int | str | None] = {"comparisons": len(alike)}
    for side in sides:
        own = [float(one.values[f"phi_1_1_{side}"] or 0) for one in alike]
        values |= {f"lowest_{side}": min(own), f"highest_{side}": max(own)}
    return Finding("result", "no verdict", text, values, parts=alike)


def _range(alike: tuple[Finding, ...], name: str) -> str:
    """Return "0.13 to 0.32", or one number where all are written alike."""
    own = sorted(float(one.values[name] or 0) for one in alike)
    low, high = (number(round(own[at], 5) + 0.0) for at in (0, -1))
    return low if low == high else f"{low} to {high}"
