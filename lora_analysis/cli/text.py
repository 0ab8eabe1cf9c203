"""Text from files, as a terminal may have it: what would move its cursor is shown by its code."""

from __future__ import annotations

import re

# Control characters, marks that turn the direction of writing, and halves of characters, none of
# which JSON asks to escape.
_HIDDEN = re.compile("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")


def printable(text: str) -> str:
    r"""Return a line in which ESC reads ``\x1b``: nothing in it acts on the terminal."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _code(one) for one in text)


def printable_lines(text: str) -> str:
    """Return the same of a text whose lines are our own."""
    return "\n".join(map(printable, text.split("\n")))


def json_for_terminals(text: str) -> str:
    """Return a JSON document with everything escaped that a terminal or a codec trips over."""
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _code(one: str) -> str:
    return one.encode("unicode_escape", "surrogatepass").decode("ascii")
