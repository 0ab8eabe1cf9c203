"""Lines over cells of a heat-map that must not be read as they stand."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


def rectangles(mask: NDArray[np.bool_]) -> Iterator[tuple[int, int, int, int]]:
    """Cut the true cells into rectangles (top, bottom, left, right), few where rows are alike."""
    top = 0
    for row, alike in groupby(map(tuple, mask.tolist())):
        bottom = top + len(list(alike))
        edges = np.flatnonzero(np.diff(np.concatenate(([False], row, [False])).astype(int)))
        for left, right in edges.reshape(-1, 2).tolist():
            yield top, bottom, left, right
        top = bottom


def hatch_cells(ax: Axes, mask: NDArray[np.bool_], label: str, **look: Any) -> None:
    """Hatch the true cells with one patch; nothing if there are none."""
    boxes = [
        Outline(
            [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)],
            [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY],
        )
        for y0, y1, x0, x1 in (
            (top + 0.5, bottom + 0.5, left + 0.5, right + 0.5)
            for top, bottom, left, right in rectangles(mask)
        )
    ]
    if boxes:
        patch = PathPatch(Outline.make_compound_path(*boxes), linewidth=0, label=label, **look)
        ax.add_patch(patch)


def hatch_legend(figure: Figure, *, degenerate: bool, nearly_degenerate: bool) -> None:
    """Add a legend of the kinds of lines that a figure of heat-maps has, below its panels."""
    handles = []
    if nearly_degenerate:
        handles.append(
            Patch(
                facecolor="#2a788e",
                edgecolor=(1, 1, 1, 0.8),
                hatch="////",
                linewidth=0,
                label="nearly degenerate: σ within 5 %, so noise can rotate the direction",
            )
        )
    if degenerate:
        handles.append(
            Patch(
                facecolor="#dedede",
                edgecolor="#9a9a9a",
                hatch="xxxx",
                linewidth=0,
                label="degenerate: equal σ, so no direction is defined",
            )
        )
    if handles:
        figure.legend(
            handles=handles, loc="outside lower left", ncols=1, frameon=False, fontsize=7,
            handlelength=2.5,
        )  # fmt: skip
