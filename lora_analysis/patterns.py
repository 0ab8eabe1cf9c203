"""Module names: PEFT's matching rules, natural order, near names, and what a name says."""

from __future__ import annotations

import difflib
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeVar

from lora_analysis.errors import InputError

T = TypeVar("T")
D = TypeVar("D")

_DIGITS = re.compile(r"(\d+)")
# Up to so many names, each is compared with a name that is not among them.
_FEW_NAMES: Final = 64
# More digits than that are no layer's number, and Python refuses to convert thousands of them.
_INDEX = re.compile(r"(?:^|\.)(\d{1,9})(?=\.|$)")
# Without other special characters, only the dots of a pattern mean more than themselves.
_PLAIN = re.compile(r"[\w.\-]*")
_SPECIAL: Final = frozenset("^$*+?{}[]\\|()")
# Parts of a regular expression: an escape, a comment, a set, a repetition, a brace that is none.
_TOKEN: Final = re.compile(
    r"""\\N\{[^}]*\} | \\. | \(\?\#[^)]*\)
    | (?P<set>(?P<start>\[\^?\]?)(?P<inside>(?:\\.|[^\]\\])*)\])
    | \{(?:\d+|\d*,\d*)\} | (?P<brace>[{}])""",
    re.VERBOSE | re.DOTALL,
)
# The type of modules whose names are numbers alone; no name has a space in it.
NO_TYPE = "no type"
# All patterns of one adapter together, in CPU seconds: they may come from a stranger's file.
PATTERN_SECONDS = 4.0
MAX_PATTERN_CHARACTERS: Final = 2**16


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts ``layers.2`` before ``layers.10``, however long a number is."""
    key = []
    for part in _DIGITS.split(name):
        if part.isdecimal():
            plain = part.lstrip("0")  # of numbers without leading zeros the longer one is larger
            key.append((0, len(plain), f"{plain} {part}"))
        else:
            key.append((1, 0, part))
    return tuple(key)


def near_names(name: str, names: Iterable[str], *, cutoff: float = 0.5) -> list[str]:
    """Return up to three names that resemble ``name``, by name or by its last segment."""
    pool = tuple(names)
    likely = pool if len(pool) <= _FEW_NAMES else _likely_names(name, pool, cutoff)
    near = difflib.get_close_matches(name, likely, cutoff=cutoff)
    tails = {other.rpartition(".")[2]: other for other in reversed(pool)}
    for match in _close_matches(name.rpartition(".")[2], tuple(tails), cutoff):
        if tails[match] not in near:
            near.append(tails[match])
    return near[:3]


@lru_cache(maxsize=256)
def _close_matches(name: str, pool: tuple[str, ...], cutoff: float) -> list[str]:
    # A model that lacks one layer's module lacks it in all: most of them ask for the same.
    return difflib.get_close_matches(name, pool, cutoff=cutoff)


@lru_cache(maxsize=4)
def _without_numbers(pool: tuple[str, ...]) -> dict[str, list[str]]:
    """Group names that differ in their numbers alone."""
    groups: dict[str, list[str]] = {}
    for name in pool:
        groups.setdefault(_DIGITS.sub("0", name), []).append(name)
    return groups


def _likely_names(name: str, pool: tuple[str, ...], cutoff: float) -> list[str]:
    """Return the names that resemble one but for their numbers, those of most equal numbers first.

    Comparing a name with each of a thousand takes a third of a second; most differ in numbers only.
    """
    groups = _without_numbers(pool)
    numbers: list[str] = _DIGITS.findall(name)

    def count_differing(other: str) -> int:
        others: list[str] = _DIGITS.findall(other)
        same = sum(a == b for a, b in zip(numbers, others, strict=False))
        return max(len(numbers), len(others)) - same

    plain = _close_matches(_DIGITS.sub("0", name), tuple(groups), cutoff)
    return [
        other for key in plain for other in sorted(groups[key], key=count_differing)[:_FEW_NAMES]
    ]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a sentence, with a space before it, that suggests near names; empty if none is near.

    Examples
    --------
    >>> did_you_mean("insepct", ["inspect", "compare"])
    " Did you mean 'inspect'?"
    """
    near = [repr(other) for other in near_names(name, names, cutoff=0.6)]
    if len(near) < 2:
        return f" Did you mean {near[0]}?" if near else ""
    return f" (Did you mean one of: {', '.join(near)}?)"  # as click has it for options


def matches_target(name: str, targets: str | Sequence[str]) -> bool:
    """Return True if PEFT's ``target_modules`` names the module.

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
            # A dot stands for any character.
            return len(name) == len(targets) and (
                name == targets or all(p in (t, ".") for p, t in zip(targets, name, strict=True))
            )
        budget = _BUDGET.get() or _Budget(PATTERN_SECONDS)
        with budget.spending(name, targets) as seconds:
            compiled = _compile(targets, targets)
            return compiled.fullmatch(name, timeout=seconds) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


class ModulePatterns(Mapping[str, T]):
    r"""The keys of PEFT's ``rank_pattern`` or ``alpha_pattern``, indexed for many module names.

    Keys without a regular expression in them (``q_proj``, ``^model\.layers\.0\.q_proj$``,
    ``.*\.q_proj``) are looked up by the end of the name. The others are matched one after the
    other, each compiled once.

    Parameters
    ----------
    patterns
        Values by pattern; the first pattern that matches decides.

    Notes
    -----
    All instances made within one `pattern_budget` share its time; any other has its own.
    """

    def __init__(self, patterns: Mapping[str, T]) -> None:
        self._patterns = dict(patterns)
        self._keys = list(self._patterns)
        # By length, then by the positions of wildcards: the smallest place of every text.
        self._literals: dict[int, dict[tuple[int, ...], dict[tuple[str, str], int]]] = {}
        self._expressions: list[int] = []
        for order, key in enumerate(self._keys):
            literal = _as_literal(key)
            if literal is None:
                self._expressions.append(order)
                continue
            texts = self._literals.setdefault(len(literal.text), {})
            texts.setdefault(literal.wildcards, {}).setdefault(literal[:2], order)
        self._compiled: dict[int, Any] = {}
        self._budget = _BUDGET.get() or _Budget(PATTERN_SECONDS)

    def __getitem__(self, key: str) -> T:
        return self._patterns[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    def value(self, name: str, default: D) -> T | D:
        """Return the value of the first pattern that matches the whole name or its last segments.

        As in PEFT, a name that no pattern matches is then looked up as a key itself.

        Raises
        ------
        InputError
            A pattern is not a valid expression, or the patterns take too long to match.
        """
        if not self._patterns:
            return default
        if "\n" in name:  # for which `.` and `$` make exceptions
            literal, orders = None, list(range(len(self._keys)))
        else:
            with self._budget.spending(name, self._keys[0]):
                literal, orders = self._literal_match(name), self._expressions
        for order in orders:
            if literal is not None and order > literal:
                break
            key = self._keys[order]
            with self._budget.spending(name, key) as seconds:
                if order not in self._compiled:
                    self._compiled[order] = _compile(rf"(.*\.)?({key})$", key)
                matches = self._compiled[order].match(name, timeout=seconds) is not None
            if matches:
                return self._patterns[key]
        return self._patterns.get(name if literal is None else self._keys[literal], default)

    def _literal_match(self, name: str) -> int | None:
        """Return the place of the first literal key that the name, or an end of it, equals."""
        matches = []
        for length, by_wildcards in self._literals.items():
            start = len(name) - length
            if start < 0:
                continue
            at_segment = start == 0 or name[start - 1] == "."
            for wildcards, orders in by_wildcards.items():
                end = _blank_wildcards(name[start:], wildcards)
                matches += [
                    orders[reach, end]
                    for reach, fits in (("any", True), ("tail", at_segment), ("whole", start == 0))
                    if fits and (reach, end) in orders
                ]
        return min(matches, default=None)


def pattern_value(name: str, patterns: Mapping[str, T], default: D) -> T | D:
    """Return the value PEFT's ``rank_pattern`` or ``alpha_pattern`` gives the module.

    For many names, make one `ModulePatterns` and ask it.

    Raises
    ------
    InputError
        A key is not a valid expression, or takes too long to match.
    """
    compiled = patterns if isinstance(patterns, ModulePatterns) else ModulePatterns(patterns)
    return compiled.value(name, default)


@contextmanager
def pattern_budget() -> Iterator[None]:
    """Give all patterns that are matched inside one total of CPU time, `PATTERN_SECONDS`.

    Inside another such block nothing changes: the total is that of the outer one.
    """
    if _BUDGET.get() is not None:
        yield
        return
    token = _BUDGET.set(_Budget(PATTERN_SECONDS))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def module_type(name: str) -> str:
    """Return the last segment that is not a number: ``"q_proj"`` of ``"layers.0.q_proj"``.

    Names of numbers alone (``"003"``) say no type, and all have the same: `NO_TYPE`.
    """
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), NO_TYPE)


def layer_index(name: str) -> int | None:
    """Return the first number among the segments: 3 of ``"layers.3.experts.1.w1"``."""
    match = _INDEX.search(name)
    return int(match[1]) if match else None


class _Budget:
    """CPU seconds that are left for matching."""

    __slots__ = ("left", "total")

    def __init__(self, seconds: float) -> None:
        self.total = self.left = seconds

    @contextmanager
    def spending(self, name: str, pattern: str) -> Iterator[float]:
        """Count the time inside; yield what is left of it.

        Raises
        ------
        InputError
            Nothing is left, or the regular expression engine stops because of it.
        """
        if self.left <= 0:
            raise self._spent_error(name, pattern)
        start = time.thread_time()
        try:
            yield self.left
        except TimeoutError:
            self.left = 0.0
            raise self._spent_error(name, pattern) from None
        finally:
            self.left -= time.thread_time() - start

    def _spent_error(self, name: str, pattern: str) -> InputError:
        return InputError(
            f"Matching module names against patterns was stopped after {self.total:g} s in all, "
            f"at '{_shorten(name)}' against '{_shorten(pattern)}'. Write module names in full, "
            "or patterns without nested repetition."
        )


_BUDGET: Final[ContextVar[_Budget | None]] = ContextVar("_BUDGET", default=None)


class _Literal(NamedTuple):
    """A pattern that only spells characters.

    ``reach`` says which part of a name the text must equal: the ``"whole"`` name, its last segments
    (``"tail"``) or ``"any"`` end. ``wildcards`` are positions where any character fits.
    """

    reach: str
    text: str
    wildcards: tuple[int, ...]


def _as_literal(key: str) -> _Literal | None:
    r"""Return a key of ``rank_pattern`` as plain text, None if it is more than text.

    The key stands in ``(.*\.)?(key)$``.
    """
    reach, position = "tail", 0
    if key.startswith("^"):
        reach, position = "whole", 1
    if key.startswith(".*", position):
        reach, position = "any", position + 2
    text: list[str] = []
    wildcards = []
    while position < len(key):
        character = key[position]
        if character == "\\":
            position += 1
            character = key[position : position + 1]
            # A backslash before a letter or digit is a class, a reference or a special character.
            if not character or character.isalnum() or not character.isascii():
                return None
        elif character == ".":
            wildcards.append(len(text))
        elif character == "$" and position == len(key) - 1:
            break
        elif character in _SPECIAL:
            return None
        text.append(character)
        position += 1
    return _Literal(reach, "".join(text), tuple(wildcards))


def _blank_wildcards(text: str, positions: Sequence[int]) -> str:
    """Return the text with a dot at every wildcard, as the pattern spells it."""
    if not positions:
        return text
    characters = list(text)
    for position in positions:
        characters[position] = "."
    return "".join(characters)


@lru_cache(maxsize=64)
def _compile(expression: str, pattern: str) -> Any:
    """Compile what Python's own engine accepts, for the one that stops at a time limit."""
    import regex

    if len(expression) > MAX_PATTERN_CHARACTERS:
        message = (
            f"'{_shorten(pattern)}' is too long for a regular expression: {len(pattern):,} "
            f"characters, the limit is {MAX_PATTERN_CHARACTERS:,}."
        )
        raise InputError(message)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sets that another version may read otherwise
            re.compile(expression)
            # The other engine takes more for special: braces, and brackets in a set.
            return regex.compile(_TOKEN.sub(_escape_token, expression))
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        message = f"'{_shorten(pattern)}' is not a regular expression: {error}."
        raise InputError(message) from error


def _escape_token(token: re.Match[str]) -> str:
    if token["brace"]:
        return f"\\{token['brace']}"
    if token["set"]:
        start, inside = token["start"], token["inside"]
        return start + re.sub(r"\\.|\[", lambda match: match[0].replace("[", "\\["), inside) + "]"
    return token[0]


def _shorten(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."
