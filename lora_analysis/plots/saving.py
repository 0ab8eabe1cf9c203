"""Figures as files and as inline SVG, the same bytes from the same numbers."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree as ET

from matplotlib import rc_context
from matplotlib.layout_engine import PlaceHolderLayoutEngine

from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.labels import hover_elements
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.records import FIGURE_CREATOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

# The creator is the mark by which a file is known as ours; None leaves out what would change from
# run to run or from machine to machine.
_METADATA: dict[str, dict[str, str | None]] = {
    "svg": {"Date": None, "Creator": FIGURE_CREATOR, "Format": None, "Type": None},
    "png": {"Software": FIGURE_CREATOR},
    "pdf": {"CreationDate": None, "Creator": FIGURE_CREATOR, "Producer": None},
}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def _render(figure: Figure, kind: str, *, dpi: int, text: Literal["none", "path"]) -> bytes:
    """Return the bytes of a figure: fixed ids, no date, text as characters or as outlines."""
    buffer = io.BytesIO()
    width = figure.get_figwidth()
    with style.house_style(
        width, svg__hashsalt="lora-analysis", svg__fonttype=text, pdf__fonttype=42
    ):
        # Laid out once and for all: every further pass would move it by a hair.
        engine = figure.get_layout_engine()
        if not isinstance(engine, PlaceHolderLayoutEngine | None):
            engine.execute(figure)
            # With no engine at all, not even the one called "none", a figure is drawn once when
            # saved.
            with rc_context({"figure.constrained_layout.use": False, "figure.autolayout": False}):
                figure.set_layout_engine(None)
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=_METADATA[kind])
    return buffer.getvalue()


def save_figure(
    figure: Figure,
    path: str | Path,
    formats: Sequence[str] = ("svg", "png"),
    *,
    dpi: int = 200,
) -> list[Path]:
    """Write a figure as ``path.svg``, ``path.png``, ``path.pdf``, whole or not at all.

    The same figure gives the same bytes on every run of one installation; its layout is fixed
    when it is first saved. Text in SVG files is outlined, so that they look alike in every
    program, with or without the font.

    Parameters
    ----------
    figure
        Figure of any function of this package (``ax.figure`` for those that return axes).
    path
        Without suffix; missing folders are made, existing files replaced.
    formats
        Any of ``"svg"``, ``"png"``, ``"pdf"``.
    dpi
        Of PNG, and of the heat-maps inside the other two.

    Returns
    -------
    list of Path
        What was written, in the order of ``formats``.

    Raises
    ------
    InputError
        An unknown format; nothing is written then.
    """
    unknown = [kind for kind in formats if kind not in _METADATA]
    if unknown:
        message = f"Cannot write {', '.join(unknown)}; known formats: {', '.join(_METADATA)}."
        raise InputError(message)
    stem = Path(path)
    return [
        write_atomic(
            stem.with_name(f"{stem.name}.{kind}"), _render(figure, kind, dpi=dpi, text="path")
        )
        for kind in formats
    ]


def _text_element(tag: str, text: str, name: str) -> ET.Element:
    element = ET.Element(tag, id=name)
    element.text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return element


def svg_text(
    figure: Figure, *, title: str, description: str, prefix: str | None = None, dpi: int = 200
) -> str:
    """Return a figure as an ``<svg>`` element to stand in an HTML page.

    No XML prolog, script, style sheet or outside reference; heat-maps are embedded as PNG.
    ``role="img"`` with title and description for those who hear it. Text is text: it can be
    selected and searched, and falls back to a common sans-serif font. Cells of heat-maps and
    matrices carry their values as hover text.

    Parameters
    ----------
    figure
        Of any function of this package.
    title
        What it is, in a few words.
    description
        What it shows, with its numbers.
    prefix
        Put before every id, so that several figures do not clash on one page; by default a hash
        of the content and the title.
    dpi
        Of embedded heat-maps.
    """
    drawn = _render(figure, "svg", dpi=dpi, text="none")
    digest = hashlib.sha256(drawn + title.encode() + description.encode()).hexdigest()
    prefix = f"f{digest[:10]}-" if prefix is None else prefix
    root = ET.fromstring(drawn)
    # Without namespaces, and with a prefix before every id and every reference to one. Axes inside
    # axes give some groups one id; a second one gets a number (no group is referred to).
    seen: dict[str, int] = {}
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if _HREF in element.attrib:
            element.set("href", element.attrib.pop(_HREF))
        for key, value in element.attrib.items():
            if key == "id":
                seen[value] = count = seen.get(value, 0) + 1
                element.set(key, prefix + value + (f"-{count}" if count > 1 else ""))
            elif key == "href" and value.startswith("#"):
                element.set(key, f"#{prefix}{value[1:]}")
            elif "url(#" in value:
                element.set(key, _REFERENCE.sub(rf"url(#{prefix}\1)", value))
    # The one style rule would reach out of the figure; it is inherited from the root instead.
    for parent in list(root.iter("defs")):
        for child in parent.findall("style"):
            parent.remove(child)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for metadata in root.findall("metadata"):
        root.remove(metadata)
    root.attrib.pop("version", None)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    root.extend(hover_elements(figure, width, height))
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}title {prefix}desc")
    root.insert(0, _text_element("title", title, f"{prefix}title"))
    root.insert(1, _text_element("desc", description, f"{prefix}desc"))
    return ET.tostring(root, encoding="unicode")
