"""Text in figures: names that never overlap, and the values of cells as hover text.

Names are measured, then thinned, wrapped or shortened. Hover text is the title of an invisible
rectangle over the picture in an SVG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary
from xml.etree import ElementTree as ET

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import Locator

from lora_analysis.blocks import forward_order, locate_module

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

# Largest share of a figure's width that the names along one side take.
_MOST_SHARE = 0.4
# Room between two labels, in units of the font size.
_GAP = 0.35
# Height of a line of text in units of the font size, descenders included.
_LINE = 1.2
# More labels than that fit no figure.
_MOST_LABELS = 200
# Each rectangle takes about 100 bytes.
MOST_CELLS = 600


@lru_cache(maxsize=1 << 14)
def text_width(text: str, font: FontProperties) -> float:
    """Return the width of a line of text in points."""
    if not text:
        return 0.0
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def shorten_label(text: str, width: float, font: FontProperties) -> str:
    """Return text of at most ``width`` points; a longer one keeps its end, where names differ."""
    if text_width(text, font) <= width:
        return text
    start = 1
    while start < len(text) and text_width(f"…{text[start:]}", font) > width:
        start += 1
    return f"…{text[start:]}"


def wrap_label(text: str, width: float, font: FontProperties) -> str:
    """Return text broken into at most two lines of ``width`` points.

    Lines break at a comma, else at spaces, else after a dot, a slash or an underscore; lines that
    are still too long are shortened.
    """
    if text_width(text, font) > width and ", " in text:
        parts = [part.strip() for part in text.rsplit(", ", 1)]
        if all(text_width(part, font) < width for part in (f"{parts[0]},", parts[1])):
            return f"{parts[0]},\n{parts[1]}"
    rows = [""]
    # Pieces between which a line may break, each with the mark that ends it.
    words = [""]
    for character in text:
        words[-1] += character
        if character in " ./_":
            words.append("")
    for word in words:
        if rows[-1] and text_width((rows[-1] + word).rstrip(), font) > width:
            rows.append("")
        rows[-1] += word
    if len(rows) > 2:
        rows = [rows[0], "".join(rows[1:])]
    return "\n".join(shorten_label(row.strip(), width, font) for row in rows)


def set_title(ax: Axes, text: str, width: float | None = None) -> None:
    """Set the title of axes, in two lines of at most ``width`` points; by default the axes' own."""
    if width is None:
        width = ax.bbox.width * 72 / ax.figure.dpi
    ax.set_title(wrap_label(text, width, ax.title.get_fontproperties()), parse_math=False)


class _ThinnedTicks(Locator):
    """The positions of names of which every nth is labeled, so that none touches the next."""

    def __init__(
        self, line: XAxis | YAxis, positions: NDArray[np.float64], labels: Sequence[str]
    ) -> None:
        self._line = line
        self._positions = positions
        self._labels = labels

    def tick_values(self, vmin: float, vmax: float) -> list[float]:  # noqa: ARG002 - a signature
        """Return the positions, whatever the limits are."""
        return self()

    def __call__(self) -> list[float]:
        positions = [float(position) for position in self._positions]
        if len(positions) < 2:
            return positions
        across = self._line.axis_name == "x"
        points = np.zeros((len(positions), 2))
        points[:, 0 if across else 1] = positions
        pixels = self._line.axes.transData.transform(points)[:, 0 if across else 1]
        spacing = float(np.abs(np.diff(pixels)).min()) * 72 / self._line.axes.figure.dpi
        first = self._line.get_major_ticks(1)[0].label1
        font = first.get_fontproperties()
        size = font.get_size_in_points()
        along = _LINE * size
        if across and first.get_rotation() == 0:
            along = max(text_width(label, font) for label in self._labels)
        step = max(1, math.ceil((along + _GAP * size) / max(spacing, 1e-6)))
        return positions[::step]


def name_ticks(
    ax: Axes,
    axis: Literal["x", "y"],
    positions: ArrayLike,
    labels: Sequence[str],
    *,
    fontsize: float | None = None,
    vertical: bool | None = False,
) -> None:
    """Write names along an axis; if there are too many for its length, every nth.

    The choice is made whenever the figure is drawn, for the size that it has then. Names take at
    most two fifths of the figure's width.

    Parameters
    ----------
    ax
        Axes to label.
    axis
        ``"x"`` or ``"y"``.
    positions, labels
        In ascending order, equally far apart or nearly.
    fontsize
        In points; by default that of tick labels.
    vertical
        Turn names along the x axis by 90°; None turns them if they do not fit otherwise.
    """
    step = max(1, -(-len(labels) // _MOST_LABELS))
    positions, labels = np.asarray(positions, dtype=np.float64)[::step], labels[::step]
    line = ax.xaxis if axis == "x" else ax.yaxis
    options: dict[str, Any] = {} if fontsize is None else {"fontsize": fontsize}
    line.set_ticks(positions, labels, parse_math=False, **options)
    if not len(labels):
        return
    font = line.get_major_ticks()[0].label1.get_fontproperties()
    if vertical is None:
        widest = max(text_width(label, font) for label in labels)
        needed = len(labels) * (widest + _GAP * font.get_size_in_points())
        vertical = needed > ax.bbox.width * 72 / ax.figure.dpi
    if axis == "y" or vertical:
        figure = ax.figure.get_figure(root=True)
        inches = figure.get_figwidth() if axis == "y" else figure.get_figheight()
        labels = [shorten_label(label, _MOST_SHARE * 72 * inches, font) for label in labels]
        if vertical:
            options["rotation"] = 90
        line.set_ticks(positions, labels, parse_math=False, **options)
    line.set_major_locator(_ThinnedTicks(line, positions, labels))


def module_columns(names: Iterable[str]) -> dict[str, int | str]:
    """Return where each module stands along the model: its layer or, of an image model, its block.

    The modules are in the order of the forward pass. Where there are several components, the name
    of the component is in front: ``"TE1 3"`` is layer 3 of the first text encoder.
    """
    locations = {name: locate_module(name) for name in forward_order(names)}
    components = {where.component for where in locations.values()}
    if components == {""}:
        return {name: where.number or 0 for name, where in locations.items()}
    blocks = {name: where.block.removeprefix("layer ") for name, where in locations.items()}
    if len(components) == 1 and all(block.isdecimal() for block in blocks.values()):
        return {name: int(block) for name, block in blocks.items()}
    return {
        name: f"{where.short_component if len(components) > 1 else ''} "
        f"{blocks[name] or 'other'}".strip()
        for name, where in locations.items()
    }


def column_order(columns: Mapping[str, int | str]) -> tuple[int | str, ...]:
    """Return the columns from left to right: layers by number, blocks as they come."""
    distinct = dict.fromkeys(columns.values())
    numbers = [column for column in distinct if isinstance(column, int)]
    return tuple(sorted(numbers)) if len(numbers) == len(distinct) else tuple(distinct)


@dataclass(frozen=True, slots=True, eq=False)
class HoverCells:
    """The cells of a picture with their texts.

    Attributes
    ----------
    values
        ``(rows, columns)``; a cell without a finite value has no text.
    origin
        Data coordinates of the upper left corner of the first cell.
    text
        Function of (first row, last row, first column, last column) that names the cells.
    most
        Most rectangles; the cells of a larger picture are merged into blocks.
    """

    values: NDArray[np.float64]
    origin: tuple[float, float]
    text: Callable[[int, int, int, int], str]
    most: int = MOST_CELLS

    def blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (top, bottom, left, right) of the rectangles: single cells if they are few."""
        rows, columns = self.values.shape
        steps = [1, 1]
        while -(-rows // steps[0]) * -(-columns // steps[1]) > self.most:
            # The axis with more rectangles is coarsened first.
            axis = 0 if rows / steps[0] > columns / steps[1] else 1
            steps[axis] *= 2
        for top in range(0, rows, steps[0]):
            for left in range(0, columns, steps[1]):
                yield top, min(top + steps[0], rows), left, min(left + steps[1], columns)

    def title(self, top: int, bottom: int, left: int, right: int) -> str:
        """Return the text of a rectangle: its name, and its value or the range of its values."""
        values = self.values[top:bottom, left:right]
        values = values[np.isfinite(values)]
        if not values.size:
            return ""
        low, high = (f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"
                     for value in (values.min(), values.max()))  # fmt: skip
        name = self.text(top, bottom - 1, left, right - 1)
        return f"{name}: {low}" if low == high else f"{name}: {low} to {high}"


_CELLS: WeakKeyDictionary[Axes, HoverCells] = WeakKeyDictionary()


def set_hover(ax: Axes, cells: HoverCells) -> None:
    """Give the cells of a picture hover text, which `hover_elements` returns for an SVG."""
    _CELLS[ax] = cells


def span(first: int, last: int) -> str:
    """Return ``"3"`` or ``"3–6"``, counting from 1."""
    return f"{first + 1}" if first == last else f"{first + 1}–{last + 1}"


def hover_elements(figure: Figure, width: float, height: float) -> list[ET.Element]:
    """Return one group of rectangles per picture with hover text, in units of the drawing."""
    groups = []
    for ax in figure.axes:
        cells = _CELLS.get(ax)
        if cells is None:
            continue
        titled = [(block, title) for block in cells.blocks() if (title := cells.title(*block))]
        if not titled:
            continue
        group = ET.Element("g", {"fill": "none", "pointer-events": "all"})
        blocks = np.array([block for block, _ in titled])
        to_figure = ax.transData + figure.transFigure.inverted()
        # Columns left and right, rows top and bottom: two corners per rectangle.
        corners = to_figure.transform(blocks[:, [2, 0, 3, 1]].reshape(-1, 2) + cells.origin)
        x_ends = np.sort(corners[:, 0].reshape(-1, 2) * width)
        y_ends = np.sort((1 - corners[:, 1]).reshape(-1, 2) * height)
        for (_, title), x, y in zip(titled, x_ends, y_ends, strict=True):
            box = {"x": x[0], "y": y[0], "width": x[1] - x[0], "height": y[1] - y[0]}
            element = ET.SubElement(group, "rect", {k: f"{v:.1f}" for k, v in box.items()})
            ET.SubElement(element, "title").text = "".join(
                c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in title
            )
        groups.append(group)
    return groups
