"""Values of cells as hover text: invisible rectangles with a title, over the pictures in an SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary
from xml.etree import ElementTree as ET

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# Each rectangle takes about 100 bytes.
MOST_CELLS = 600


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
