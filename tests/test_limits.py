"""The table of limits in SECURITY.md, against the constants."""

from __future__ import annotations

import re
from pathlib import Path

from lora_analysis import patterns
from lora_analysis.storage import limits

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
NUMBER = re.compile(r"[\d,]+(?:e-?\d+)?(?= |$)")


def table() -> dict[str, list[float]]:
    """Return the numbers stated for each constant; a range for two of them."""
    text = (Path(__file__).parents[1] / "SECURITY.md").read_text(encoding="utf-8")
    stated: dict[str, list[float]] = {}
    for line in text.splitlines():
        if line.startswith("| ") and line.count("|") == 4:
            _, limit, constants = (cell.strip() for cell in line.strip("|").split("|"))
            unit = next((size for name, size in UNITS.items() if limit.endswith(name)), 1)
            numbers = [float(one.replace(",", "")) * unit for one in NUMBER.findall(limit)]
            for name, number in zip(re.findall(r"`([A-Z_]+)`", constants), numbers, strict=False):
                stated.setdefault(name, []).append(number)
    return stated


def test_the_page_states_every_limit_as_it_is() -> None:
    names = {name for name in vars(limits) if name.isupper()}
    actual = {name: float(getattr(limits, name)) for name in names} | {
        name: float(getattr(patterns, name))
        for name in ("PATTERN_SECONDS", "MAX_PATTERN_CHARACTERS")
    }
    assert {name: numbers[0] for name, numbers in table().items()} == actual
