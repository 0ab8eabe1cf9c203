"""How results show themselves in a notebook: small tables in which every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape


def html_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], note: str = ""
) -> str:
    """Return an HTML table with a caption; numbers get three digits that matter.

    Examples
    --------
    >>> "&lt;b&gt;" in html_table("<b>", ["k"], [[1]])
    True
    """
    head = "".join(f"<th>{escape(str(one))}</th>" for one in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    below = f"<p>{escape(note)}</p>" if note else ""
    return (
        f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead>"
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
    return str(value)
