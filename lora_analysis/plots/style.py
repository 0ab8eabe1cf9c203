"""The one style of every figure: fonts, colors, ticks, labels that cannot break a drawing.

Nothing here touches matplotlib's global settings: functions that draw run inside ``house_style``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager, style
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

INK = "#262626"
QUIET = "#6b6b6b"
FAINT = "#d9d9d9"
BLANK = "#dedede"  # a cell that is not shown
# Okabe and Ito's palette without yellow (too pale on white), ordered by contrast to neighbors.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

ONE_COLUMN = 3.3  # inches
# More points than this are one picture inside a vector file: each would cost 100 bytes.
MANY_POINTS = 500
TWO_COLUMNS = 7.0

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "figure.titlesize": 8,
    "figure.dpi": 144,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "axes.titlepad": 4,
    "axes.labelpad": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.4,
}


@contextmanager
def house_style(**settings: object) -> Iterator[None]:
    """Draw in the package's style, whatever the user's own settings are; they come back after.

    ``settings`` are matplotlib's, dots written as double underscores.
    """
    extra = {name.replace("__", "."): value for name, value in settings.items()}
    interactive = mpl.is_interactive()
    try:
        with style.context(["default", STYLE | extra]):
            yield
            interactive = mpl.is_interactive()
    finally:
        # A notebook's backend turns this on with its first figure, which may be made in here;
        # taken back with the style, it would leave every later figure unshown.
        mpl.interactive(interactive)


class PanelFigure(Figure):
    """A figure outside pyplot's registry, so that many can be made and none has to be closed."""

    def _repr_png_(self) -> bytes:
        """Show it in a notebook, once, whether or not pyplot's inline mode is on."""
        buffer = io.BytesIO()
        with house_style():
            self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def new_axes(width: float = ONE_COLUMN, height: float = 2.6) -> Axes:
    """Return empty axes on a figure of their own that pyplot does not keep.

    For programs that draw many figures; in a notebook leave ``ax`` out instead.
    """
    with house_style():
        return PanelFigure(figsize=(width, height), layout="constrained").subplots()


def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return ``ax``, or axes on a new pyplot figure, which a notebook shows by itself."""
    if ax is not None:
        return ax
    return plt.subplots(figsize=size, layout="constrained")[1]


@cache
def _drawable(character: str) -> bool:
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return character.isprintable() and font.get_char_index(ord(character)) != 0


def plain(text: object, at_most: int = 48) -> str:
    """Return a name as it can be drawn: one line, no glyph the font lacks, the end kept if long.

    Draw it with ``parse_math=False``: a dollar sign in a name is a dollar sign.
    """
    drawable = "".join(c if _drawable(c) else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return drawable if len(drawable) <= at_most else "…" + drawable[1 - at_most :]


def without_common_start(names: list[str]) -> list[str]:
    """Return names without the leading folders or parents that all of them share."""
    if len(set(names)) < 2:
        return names
    alike = takewhile(lambda characters: len(set(characters)) == 1, zip(*names, strict=False))
    shared = "".join(characters[0] for characters in alike)
    cut = max(shared.rfind("/"), shared.rfind(".")) + 1
    return [name[cut:] for name in names]


def legend_label(text: str) -> str:
    """Return an artist's label with ``$`` escaped: a legend would read it as mathematics."""
    return plain(text).replace("$", r"\$")


def count_ticks(n: int, at_most: int = 9) -> NDArray[np.intp]:
    """Return ticks for 1…n: 1, then multiples of the smallest power of two that are few enough."""
    step = 1
    while n // step > at_most - 1 and n > at_most:
        step *= 2
    ticks = np.arange(0, n + 1, step)
    ticks = ticks[ticks > max(step // 2, 2)] if step > 1 else ticks[2:]  # 1 and 2 would touch
    return np.append(np.ones(min(n, 1), dtype=np.intp), ticks)


def set_label(ax: Axes, axis: Literal["x", "y"], text: str) -> None:
    """Label an axis without reading ``$`` as mathematics."""
    (ax.set_xlabel if axis == "x" else ax.set_ylabel)(text, parse_math=False)


def log_axis(
    ax: Axes, axis: Literal["x", "y"], limits: tuple[float, float], *, base: int = 10
) -> None:
    """Make an axis logarithmic over ``limits``, labeled with plain numbers, never powers."""
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log", base=base)
    (ax.set_xlim if axis == "x" else ax.set_ylim)(*limits)
    line = ax.xaxis if axis == "x" else ax.yaxis
    wide = base == 2 or limits[1] / limits[0] > 100
    line.set_major_locator(
        LogLocator(base=base, subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=12)
    )
    line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    line.set_minor_formatter(NullFormatter())
    if base == 2:
        line.set_minor_locator(NullLocator())


def swarm(values: ArrayLike, limits: tuple[float, float], *, width: float) -> NDArray[np.float64]:
    """Return offsets that set points of nearly equal value side by side, within ±``width``.

    The same values give the same picture: no random jitter.
    """
    y = np.asarray(values, dtype=np.float64)
    slots = np.floor((y - limits[0]) / max(limits[1] - limits[0], 1e-300) * 40).astype(int)
    offsets = np.zeros(len(y))
    for slot in np.unique(slots):
        members = np.flatnonzero(slots == slot)
        offsets[members[np.argsort(y[members], kind="stable")]] = _side_by_side(len(members))
    widest = np.abs(offsets).max(initial=1.0)
    return np.asarray(offsets * min(width / widest, width / 3))


def _side_by_side(n: int) -> NDArray[np.float64]:
    """Return n positions one apart around 0, the middle first: 0, 1, −1, 2, … (centered)."""
    order = (np.arange(n) + 1) // 2 * np.where(np.arange(n) % 2, 1.0, -1.0)
    return np.asarray(order - order.mean())


def apart(positions: ArrayLike, gap: float, limits: tuple[float, float]) -> NDArray[np.float64]:
    """Return positions for labels: as near to ``wanted`` as a mutual distance of ``gap`` allows."""
    target = np.asarray(positions, dtype=np.float64)
    order = np.argsort(target, kind="stable")
    placed = target[order]
    for _ in range(200):
        overlap = gap - np.diff(placed)
        if not (overlap > 1e-9).any():
            break
        push = np.clip(overlap, 0, None) / 2
        placed[:-1] -= push
        placed[1:] += push
        placed = np.clip(placed, *limits)
    result = np.empty_like(placed)
    result[order] = placed
    return result
