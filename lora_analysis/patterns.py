"""Module names: PEFT's matching rules, natural order, near names, and what a name says."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

_DIGITS = re.compile(r"(\d+)")
_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts ``layers.2`` before ``layers.10``."""
    parts = _DIGITS.split(name)
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)


def near_names(wanted: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` names that resemble ``wanted``, by name or by its last segment."""
    pool = list(names)
    near = difflib.get_close_matches(wanted, pool, n=count, cutoff=0.5)
    tails = {name.rpartition(".")[2]: name for name in reversed(pool)}
    tail = wanted.rpartition(".")[2]
    for match in difflib.get_close_matches(tail, tails, n=count, cutoff=0.5):
        if tails[match] not in near:
            near.append(tails[match])
    return near[:count]
