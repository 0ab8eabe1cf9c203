"""How names from files are shown, and results in a notebook: nothing in a text acts on a reader.

What would move a terminal's cursor, or turn the direction of a line, is shown by its code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape

# Control characters, marks that turn the direction of writing, and halves of characters, none of
# which JSON asks to escape.
_HIDDEN = re.compile("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")


def printable(text: str) -> str:
    r"""Return a line in which ESC reads ``\x1b``: nothing in it acts on the reader's screen."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _code(one) for one in text)


def printable_lines(text: str) -> str:
    """Return the same of a text whose lines are our own."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(text: str) -> str:
    """Return a JSON document with everything escaped that a terminal or a codec trips over."""
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def whole_characters(text: str) -> str:
    """Return text that UTF-8 can hold: paths with bytes of another encoding have halves."""
    return text.encode(errors="backslashreplace").decode()


def _code(one: str) -> str:
    return one.encode("unicode_escape", "surrogatepass").decode("ascii")


def html_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], note: str = ""
) -> str:
    """Return an HTML table with a caption; numbers get three digits that matter.

    Examples
    --------
    >>> "&lt;b&gt;" in html_table("<b>", ["k"], [[1]])
    True
    """
    head = "".join(f"<th>{escape(printable(str(one)))}</th>" for one in columns)
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
    """Return a table of names and values, one a row."""
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
