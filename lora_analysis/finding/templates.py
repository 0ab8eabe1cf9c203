"""How the sentence of a finding is made: a template per code, filled with the finding's fields."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from string import Formatter
from typing import Any, Final, Literal

from lora_analysis.text import join_names, number, overlap_number, p_value_text, plural

# result: a statement about the adapters; artifact: a number with another cause than learning;
# limit: what cannot be said or was not used; damage: numbers that should not be relied on.
Severity = Literal["result", "artifact", "limit", "damage"]
Topic = Literal[
    "accuracy",
    "adapters",
    "amplification",
    "base weights",
    "config",
    "experts",
    "file",
    "groups",
    "initialization",
    "labels",
    "merge",
    "method",
    "module names",
    "modules",
    "numbers",
    "overlap",
    "runs",
    "scale",
    "spectra",
    "training",
    "writing",
]
# Names that a sentence lists before it says how many more there are.
_LISTED: Final = 4
_OPTIONAL: Final = re.compile(r"\[\[(.*?)\]\]")


@dataclass(frozen=True, slots=True)
class Code:
    """What all findings of one code have in common.

    Parameters
    ----------
    severity, topic
        How the finding bears on the numbers next to it, and what it is about.
    template
        The sentence, with ``{field}`` or ``{field:spec}`` for a field. A part in ``[[ ]]`` is left
        out if one of its fields is None, or 0 with the spec ``nonzero``. Besides Python's own,
        these specs are defined: ``number`` (two significant digits), ``overlap`` (the same for a
        similarity), ``range`` and ``quartiles`` (of a list), ``trend`` (of a list in order: "rises
        from 1.2 to 3.4"), ``p`` ("= 0.03"), ``and`` ("a, b and 3 more", ``and 12`` for up to
        twelve), ``plural WORD`` ("2 pairs").
    subject
        Template of what is compared, which stands before the sentence.
    items
        Templates of list fields whose items are mappings, by field name.
    """

    severity: Severity
    topic: Topic
    template: str
    subject: str = ""
    items: Mapping[str, str] = field(default_factory=dict)


def quote_names(names: Sequence[Any], at_most: int = _LISTED) -> str:
    """Return names in quotes: the first few, and how many more there are.

    Examples
    --------
    >>> quote_names(["a", "b", "c"], at_most=2)
    "'a', 'b' and 1 more"
    """
    quoted = ", ".join(f"'{name}'" for name in names[:at_most])
    return f"{quoted} and {len(names) - at_most} more" if len(names) > at_most else quoted


def _range(values: Sequence[float], _: str) -> str:
    low, high = map(overlap_number, values)
    return low if low == high else f"{low} to {high}"


def _quartiles(values: Sequence[float], _: str) -> str:
    low, median, high = map(overlap_number, values)
    return f"{median} (quartiles {low} to {high})"


def _trend(values: Sequence[float], _: str) -> str:
    """Return the direction that the numbers have, and the first and the last of them."""
    first, last = number(values[0]), number(values[-1])
    steps = [b - a for a, b in pairwise(values)]
    if first != last and all(step >= 0 for step in steps):
        return f"rises from {first} to {last}"
    if first != last and all(step <= 0 for step in steps):
        return f"falls from {first} to {last}"
    low, high = number(min(values)), number(max(values))
    if low == high:
        return f"stays at {low}"
    return f"does not change in one direction (between {low} and {high})"


def _p_value(value: float, _: str) -> str:
    text = p_value_text(value)
    return text if text.startswith("<") else f"= {text}"


_SPECS: Final[Mapping[str, Callable[[Any, str], str]]] = {
    "number": lambda value, _: number(value),
    "overlap": lambda value, _: overlap_number(value),
    "range": _range,
    "quartiles": _quartiles,
    "trend": _trend,
    "p": _p_value,
    "nonzero": lambda count, _: str(count),
    "and": lambda names, at_most: join_names(names, int(at_most or _LISTED)),
    "plural": plural,
}


class _Sentence(Formatter):
    """Fill a template: numbers get three significant digits, long lists are cut."""

    def format_field(self, value: Any, format_spec: str) -> str:
        name, _, argument = format_spec.partition(" ")
        if name in _SPECS:
            return _SPECS[name](value, argument)
        if format_spec:
            return format(value, format_spec)
        if isinstance(value, float):
            return f"{value:.3g}" if math.isfinite(value) else str(value)
        return quote_names(value) if isinstance(value, list | tuple) else str(value)


_SENTENCE: Final = _Sentence()


def fill(template: str, fields: Mapping[str, Any], items: Mapping[str, str] | None = None) -> str:
    """Return the text of a template, see `Code`.

    Raises
    ------
    KeyError
        The template has a field that is missing.
    """
    values = dict(fields)
    for name, item in (items or {}).items():
        if values[name] is not None:
            texts = [fill(item, row) for row in values[name]]
            values[name] = ("; " if any(", " in text for text in texts) else ", ").join(texts)

    def optional_part(match: re.Match[str]) -> str:
        names = [(name, spec) for _, name, spec, _ in _SENTENCE.parse(match[1]) if name]
        missing = (
            values[name] is None or (spec == "nonzero" and not values[name]) for name, spec in names
        )
        return "" if any(missing) else match[1]

    return _SENTENCE.vformat(_OPTIONAL.sub(optional_part, template), (), values)
