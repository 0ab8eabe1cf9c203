"""Module names: PEFT's matching rules, natural order, near names, and what a name says."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from lora_analysis.errors import InputError

T = TypeVar("T")

_DIGITS = re.compile(r"(\d+)")
# More digits than that are no layer's number, and Python refuses to convert thousands of them.
_INDEX = re.compile(r"(?:^|\.)(\d{1,9})(?=\.|$)")
# Without other special characters, only the dots of a pattern mean more than themselves.
_PLAIN = re.compile(r"[\w.\-]*")
# The type of modules whose names are numbers alone; no name has a space in it.
NO_TYPE = "no type"
# A pattern may come from a file: one that backtracks without end is stopped, in CPU seconds.
PATTERN_TIMEOUT = 1.0


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts ``layers.2`` before ``layers.10``, however long a number is."""
    parts = _DIGITS.split(name)
    return tuple(_number_key(part) if part.isdecimal() else (1, 0, part) for part in parts)


def _number_key(digits: str) -> tuple[int, int, str]:
    """Order by value: of numbers without leading zeros the longer one is larger."""
    plain = digits.lstrip("0")
    return 0, len(plain), f"{plain} {digits}"


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


def matches_target(name: str, targets: str | Sequence[str]) -> bool:
    """Return whether PEFT's ``target_modules`` names the module.

    Parameters
    ----------
    name
        Module name in the base model.
    targets
        A string is a regular expression for the whole name. In a list, each entry is a name or
        its last segments: ``"q_proj"`` names ``"layers.0.q_proj"``.

    Raises
    ------
    InputError
        The expression is not valid, or takes too long to match.
    """
    if isinstance(targets, str):
        if _PLAIN.fullmatch(targets):
            return _equal_but_for_dots(name, targets)
        return _matches_expression(name, targets)
    return any(name == target or name.endswith(f".{target}") for target in targets)


def choose_names(names: Iterable[str], pattern: str | Sequence[str] | None) -> list[str]:
    """Return the names that a pattern means; all for None, none where nothing matches.

    A string is the end of a name (whole segments) if any name ends so, else a regular expression
    that must match in full; a list holds ends of names.
    """
    pool = list(names)
    if pattern is None:
        return pool
    ends = [pattern] if isinstance(pattern, str) else pattern
    chosen = [name for name in pool if matches_target(name, ends)]
    if not chosen and isinstance(pattern, str):
        chosen = [name for name in pool if matches_target(name, pattern)]
    return chosen


def pattern_value(name: str, patterns: Mapping[str, T], default: T) -> T:
    """Return the value PEFT's ``rank_pattern`` or ``alpha_pattern`` gives the module.

    The first key, in their order, that matches the whole name or its last segments as a regular
    expression decides; ``default`` where none does.

    Raises
    ------
    InputError
        A key is not a valid expression, or takes too long to match.
    """
    for pattern, value in patterns.items():
        if _matches_tail(name, pattern):
            return value
    return default


def module_type(name: str) -> str:
    """Return the last segment that is not a number: ``"q_proj"`` of ``"layers.0.q_proj"``.

    Names of numbers alone (``"003"``) say no type, and all have the same: `NO_TYPE`.
    """
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), NO_TYPE)


def layer_index(name: str) -> int | None:
    """Return the first number among the segments: 3 of ``"layers.3.experts.1.w1"``."""
    match = _INDEX.search(name)
    return int(match[1]) if match else None


def _matches_tail(name: str, pattern: str) -> bool:
    """Return whether the name, or its last segments, match; plain patterns need no engine."""
    if not _PLAIN.fullmatch(pattern):
        return _matches_expression(name, rf"(.*\.)?({pattern})")
    start = len(name) - len(pattern)
    at_segment = start == 0 or (start > 0 and name[start - 1] == ".")
    return at_segment and _equal_but_for_dots(name[start:], pattern)


def _equal_but_for_dots(text: str, plain: str) -> bool:
    """Return whether the text equals a pattern in which a dot stands for any character."""
    if len(text) != len(plain):
        return False
    return text == plain or all(p in (t, ".") for p, t in zip(plain, text, strict=True))


def _matches_expression(name: str, expression: str) -> bool:
    import regex

    try:
        re.compile(expression)  # PEFT's own; regex would also take patterns that call themselves
        return regex.fullmatch(expression, name, timeout=PATTERN_TIMEOUT) is not None
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        shown = expression if len(expression) <= 160 else f"{expression[:157]}..."
        message = f"'{shown}' is not a regular expression: {error}."
    except TimeoutError:
        message = (
            f"Matching '{name}' against '{expression}' was stopped after {PATTERN_TIMEOUT:g} s. "
            "Write the pattern without nested repetition."
        )
    raise InputError(message)
