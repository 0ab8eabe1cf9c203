"""Text for people: escaped names, numbers and lists in sentences, tables for notebooks.

Names come from files. Characters that move a terminal's cursor or change the direction of writing
are replaced by their codes, so that no name acts on the reader's screen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

# Smallest p-value of matched distributions, whose tails are accurate down to about this value. A
# p-value at or below it is a bound, written "< 1e-4".
P_FLOOR: Final = 1e-4
# Control characters, marks that change the direction of writing, and lone surrogates: JSON does not
# require any of them to be escaped.
_HIDDEN = re.compile("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")

_ARGUMENT = re.compile(
    r"\b[a-z_]+=(?:'[^']*'|[^\s(),']*) \(command line: (--[^)]*)\)"
    r"|\b[a-z_]+=, command line: (--[^)]*)(?=\))"
)


def printable(text: str) -> str:
    r"""Return one line of text with unprintable characters escaped (ESC as ``\x1b``)."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def printable_lines(text: str) -> str:
    """Return text whose line breaks are kept, each line escaped as by `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(text: str) -> str:
    """Return a JSON document with control characters and lone surrogates escaped."""
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def name_options(text: str) -> str:
    """Return a message that names options of the command line instead of arguments of Python.

    Examples
    --------
    >>> name_options("Pass scale= (command line: --scale).")
    'Pass --scale.'
    >>> name_options("Pass two (reference=, command line: --reference).")
    'Pass two (--reference).'
    """
    return _ARGUMENT.sub(lambda match: match[1] or match[2], text)


def whole_characters(text: str) -> str:
    """Return text that UTF-8 can encode; paths with undecodable bytes have lone surrogates."""
    return text.encode(errors="backslashreplace").decode()


def html_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], note: str = ""
) -> str:
    """Return an HTML table with a caption; numbers get three significant digits.

    Examples
    --------
    >>> "&lt;b&gt;" in html_table("<b>", ["k"], [[1]])
    True
    """
    head = "".join(f"<th>{escape(printable(str(column)))}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    below = f"<p>{escape(printable(note))}</p>" if note else ""
    return (
        f"<table><caption>{escape(printable(title))}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>{below}"
    )


def html_facts(title: str, facts: Iterable[tuple[str, object]], note: str = "") -> str:
    """Return an HTML table of names and values, one fact per row."""
    return html_table(title, ("", ""), facts, note)


def _text(value: object) -> str:
    if value is None:
        return "–"
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else "–"
    return printable(str(value))


def plural(count: int, word: str) -> str:
    """Return ``"1 pair"``, ``"2 pairs"``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def join_names(names: Sequence[str], at_most: int = 4) -> str:
    """Return ``"a, b and c"``; of many names the first, and how many more there are.

    Examples
    --------
    >>> join_names(["a", "b", "c", "d"], at_most=2)
    'a, b and 2 more'
    """
    if len(names) <= at_most + 1:
        return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
    return f"{', '.join(names[:at_most])} and {len(names) - at_most} more"


def number(value: float) -> str:
    """Return a number for a sentence: two significant digits, no exponent if it stays short."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 0.1 <= abs(value) < 1000:
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.2g}" if 1e-4 <= abs(value) < 0.1 else f"{value:.1e}"


def overlap_number(value: float) -> str:
    """Return an overlap for a sentence with two decimals; −0.00 is 0.00."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text


def p_value_text(p: float) -> str:
    """Return a p-value with two digits, ``"< 1e-4"`` for a bound (see `P_FLOOR`), "" for NaN.

    Examples
    --------
    >>> [p_value_text(p) for p in (0.0123, 1e-4, 3e-7)]
    ['0.012', '< 1e-4', '< 1e-4']
    """
    if math.isnan(p):
        return ""
    return "< 1e-4" if p <= P_FLOOR else f"{p:.2g}"
