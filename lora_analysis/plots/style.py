"""The style of every figure: fonts, colors, ticks, labels that cannot break a drawing.

The package's style fills in what the user left at matplotlib's defaults: what a style sheet,
``rcParams`` or a ``matplotlibrc`` sets is drawn as set. Nothing here touches matplotlib's global
settings: functions that draw run inside ``house_style``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib import cbook, colors, font_manager
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from lora_analysis.errors import InputError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.typing import ColorType
    from numpy.typing import ArrayLike, NDArray

    Colors = ColorType | Sequence[ColorType]
    RGB = tuple[float, float, float]

_INK = "#262626"
# Okabe and Ito's palette without yellow (too pale on white), ordered by contrast to neighbors.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# The same on a dark background: yellow for the blue, white for the black.
_DARK_PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#FFFFFF")
# WCAG's least contrast of text.
_TEXT_CONTRAST = 4.5

ONE_COLUMN = 3.3  # inches
# More points than this are one picture inside a vector file: each would cost 100 bytes.
MANY_POINTS = 500
TWO_COLUMNS = 7.0
PAPER_SIZE = 8.0  # points

# Sizes in points at paper size; all grow with the font size.
_POINTS: dict[str, float] = {
    "font.size": PAPER_SIZE,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.titlesize": 8,
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
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.4,
}
_STYLE: dict[str, Any] = {
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "figure.dpi": 144,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
# Names are data and not TeX; hover text is placed on the whole figure; images stay in the file.
_FIXED: dict[str, Any] = {"text.usetex": False, "savefig.bbox": None, "svg.image_inline": True}


def font_size(width: float) -> float:
    """Return the font size in points for a figure of ``width`` inches.

    8 points up to the two columns of a paper (7 in), then growing to 18: at the width of a slide
    (10 in and more) the smallest text has 14 points.
    """
    return float(np.clip(PAPER_SIZE * (1 + (width - TWO_COLUMNS) / 3), PAPER_SIZE, 18.0))


def _rgb(color: ColorType, below: RGB = (1.0, 1.0, 1.0)) -> RGB:
    """Return a color as it appears on the color ``below`` it."""
    *rgb, alpha = colors.to_rgba(color)
    red, green, blue = (alpha * c + (1 - alpha) * b for c, b in zip(rgb, below, strict=True))
    return red, green, blue


def contrast(first: ColorType, second: ColorType) -> float:
    """Return WCAG's contrast ratio of two colors, from 1 (equal) to 21 (black on white)."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: ColorType) -> float:
    rgb = np.array(_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _mix(ink: ColorType, paper: ColorType, share: float) -> str:
    """Return ``ink`` with a share of ``paper``."""
    red, green, blue = (
        (1 - share) * a + share * b for a, b in zip(_rgb(ink), _rgb(paper), strict=True)
    )
    return colors.to_hex((red, green, blue))


def _mute(ink: ColorType, papers: Sequence[ColorType]) -> str:
    """Return a quieter ink that can still be read on each of ``papers``."""
    for share in (0.318, 0.25, 0.2, 0.15, 0.1, 0.05):
        color = _mix(ink, papers[0], share)
        if min(contrast(color, paper) for paper in papers) >= _TEXT_CONTRAST:
            return color
    return colors.to_hex(ink)


def _background_colors(ax: Axes | None) -> tuple[RGB, RGB]:
    """Return the background of axes and of their figure; of new ones without ``ax``."""
    page = _rgb(mpl.rcParams["figure.facecolor"])
    if ax is None:
        return _rgb(mpl.rcParams["axes.facecolor"], page), page
    figure = _rgb(ax.figure.figure.get_facecolor(), page)
    return _rgb(ax.get_facecolor(), figure), figure


def _is_set(name: Any) -> bool:
    """Return True if the user's value of a setting is not matplotlib's default."""
    return bool(mpl.rcParams[name] != mpl.rcParamsDefault[name])


@contextmanager
def house_style(
    width: float = ONE_COLUMN, ax: Axes | None = None, **settings: object
) -> Iterator[None]:
    """Draw in the package's style where the user set none; the user's settings come back after.

    ``width`` is that of the figure in inches; ``settings`` are matplotlib's, dots written as double
    underscores.
    """
    papers = _background_colors(ax)
    is_dark = contrast(papers[1], "white") > contrast(papers[1], "black")
    ink = mpl.rcParams["text.color"] if _is_set("text.color") else _INK
    if min(contrast(ink, paper) for paper in papers) < _TEXT_CONTRAST:
        ink = "white" if is_dark else _INK
    muted = _mute(ink, papers)
    base = float(mpl.rcParams["font.size"]) if _is_set("font.size") else font_size(width)
    house = {name: size * base / PAPER_SIZE for name, size in _POINTS.items()} | _STYLE
    house |= {"axes.prop_cycle": cycler(color=_DARK_PALETTE if is_dark else PALETTE)}
    house |= {"axes.labelcolor": ink, "axes.edgecolor": muted}
    for axis in ("xtick", "ytick"):
        house |= {f"{axis}.color": muted}
        if not _is_set(f"{axis}.color"):  # its labels have it too
            house |= {f"{axis}.labelcolor": ink}
    drawn: dict[Any, Any] = {name: value for name, value in house.items() if not _is_set(name)}
    if _is_set("font.family"):  # which may lack φ, Δ and ‖
        drawn["font.family"] = [*mpl.rcParams["font.family"], "DejaVu Sans"]
    drawn |= {"text.color": ink} | _FIXED
    drawn |= {name.replace("__", "."): value for name, value in settings.items()}
    interactive = mpl.is_interactive()
    try:
        with mpl.rc_context(drawn):
            yield
            interactive = mpl.is_interactive()
    finally:
        # A notebook's backend turns this on with its first figure, which may be made in here;
        # taken back with the style, it would leave every later figure unshown.
        mpl.interactive(interactive)


def font_scale() -> float:
    """Return the font size in use over the paper's; lengths that hold text grow with it."""
    return float(mpl.rcParams["font.size"]) / PAPER_SIZE


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """Axes to draw on, with the colors and sizes that fit them.

    Attributes
    ----------
    ink, muted, crossed, faint, blank
        Colors of text, of what is secondary, of lines over blank cells, of guides, and of cells
        without a value.
    paper
        Background of the axes.
    palette
        Colors of lines and groups, in order.
    scale
        Font size over the paper's 8 points: sizes in points or inches are multiplied by it.
    """

    ax: Axes
    ink: str
    muted: str
    crossed: str
    faint: str
    blank: str
    paper: str
    palette: tuple[str, ...]
    scale: float

    @property
    def small(self) -> float:
        """Font size of annotations."""
        return 7 * self.scale

    @property
    def tiny(self) -> float:
        """Font size of long lists of names; on slides as large as annotations."""
        return 6 * self.scale if self.scale < 1.5 else self.small

    def color(self, index: int | None) -> str:
        """Return the color of the line or group ``index``; muted for None, the baseline."""
        return self.muted if index is None else self.palette[index % len(self.palette)]

    def draw_baseline(self, axis: Literal["x", "y"], level: float) -> None:
        """Draw a random baseline as a dashed line across the axes."""
        draw = self.ax.axhline if axis == "y" else self.ax.axvline
        dashes = (0, (4, 2))
        draw(level, color=self.muted, linewidth=0.9 * self.scale, linestyle=dashes, zorder=0)

    def name_ends(
        self, ends: Sequence[tuple[float, float]], texts: Sequence[str], ink: Sequence[str]
    ) -> None:
        """Write texts at the right of the axes, each at the height where its curve ends."""
        ax = self.ax
        heights = (ax.transScale + ax.transLimits).transform(ends)[:, 1]
        lines = 1 + max(text.count("\n") for text in texts)
        gap = lines * 9.5 * self.scale / ax.bbox.height * ax.figure.dpi / 72
        for y, text, color in zip(spread_apart(heights, gap, (0.0, 1.0)), texts, ink, strict=True):
            ax.text(
                1.03, y, text, transform=ax.transAxes, color=color, va="center",
                fontsize=self.small, parse_math=False,
            )  # fmt: skip

    def visible_on(self, cells: ArrayLike) -> str:
        """Return ink or paper, what is easier to see on cells of the given RGBA colors."""
        mean = colors.to_hex(np.reshape(cells, (-1, 4))[:, :3].mean(axis=0).clip(0, 1))
        return max((self.paper, self.ink), key=lambda color: contrast(color, mean))


def look(ax: Axes, color: Colors | None = None) -> Look:
    """Return the look of a drawing on ``ax``; call it inside `house_style`.

    Raises
    ------
    InputError
        ``color`` is neither a color nor a sequence of colors.
    """
    papers = _background_colors(ax)
    ink = mpl.rcParams["text.color"]
    if color is None:
        palette = mpl.rcParams["axes.prop_cycle"].by_key().get("color", PALETTE)
    elif colors.is_color_like(color):
        palette = [color]
    else:
        palette = list(color) if isinstance(color, Sequence | np.ndarray) else []
        if isinstance(color, str) or not palette or not all(map(colors.is_color_like, palette)):
            message = f"color is a color of matplotlib, or one per line or group, got {color!r}."
            raise InputError(message)
    return Look(
        ax=ax,
        ink=colors.to_hex(ink),
        muted=_mute(ink, papers),
        crossed=_mix(ink, papers[0], 0.535),
        faint=_mix(ink, papers[0], 0.825),
        blank=_mix(ink, papers[0], 0.848),
        paper=colors.to_hex(papers[0]),
        palette=tuple(
            colors.to_hex(each, keep_alpha=colors.to_rgba(each)[3] < 1) for each in palette
        ),
        scale=font_scale(),
    )


@contextmanager
def drawing(
    ax: Axes | None,
    size: tuple[float, float],
    *,
    figsize: tuple[float, float] | None,
    color: Colors | None = None,
) -> Iterator[Look]:
    """Draw on ``ax``, or on a new pyplot figure of ``figsize`` (by default ``size``) inches.

    Raises
    ------
    InputError
        ``ax`` and ``figsize`` are given, or ``color`` is not a color.
    """
    if ax is not None and figsize is not None:
        message = "figsize is for a new figure; the given ax has one. Pass one of the two."
        raise InputError(message)
    size = size if figsize is None else figsize
    user_sizes = _is_set("font.size")
    with house_style(size[0] if ax is None else ax.figure.figure.get_figwidth(), ax):
        if ax is None:  # a notebook shows a figure of pyplot by itself
            ax = plt.subplots(figsize=size, layout="constrained")[1]
        elif not user_sizes:  # labels and ticks of the default size get the one in use
            default = mpl.rcParamsDefault["font.size"]
            names: tuple[Any, Any] = "xtick.labelsize", "ytick.labelsize"
            for axis, name in zip((ax.xaxis, ax.yaxis), names, strict=True):
                if axis.label.get_fontsize() == default:
                    axis.label.set_fontsize(mpl.rcParams["axes.labelsize"])
                if axis.get_major_ticks(1)[0].label1.get_fontsize() == default:
                    axis.set_tick_params(labelsize=mpl.rcParams[name])
        yield look(ax, color)


def merge_kwargs(
    artist: type[Artist], defaults: dict[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the keyword arguments of an artist: the user's ``kwargs`` over the defaults."""
    return cbook.normalize_kwargs(defaults, artist) | cbook.normalize_kwargs(kwargs, artist)


class PanelFigure(Figure):
    """A figure outside pyplot's registry, so that many can be made and none has to be closed."""

    def _repr_png_(self) -> bytes:
        """Show it in a notebook, once, whether or not pyplot's inline mode is on."""
        buffer = io.BytesIO()
        with house_style(self.get_figwidth()):
            self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def new_axes(width: float = ONE_COLUMN, height: float = 2.6) -> Axes:
    """Return empty axes on a figure of their own that pyplot does not keep.

    For programs that draw many figures; in a notebook leave ``ax`` out instead.
    """
    with house_style(width):
        return PanelFigure(figsize=(width, height), layout="constrained").subplots()


@cache
def _is_drawable(character: str) -> bool:
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return character.isprintable() and font.get_char_index(ord(character)) != 0


def drawable_text(text: object, at_most: int = 48) -> str:
    """Return a name as it can be drawn: one line, no glyph the font lacks, the end kept if long.

    Draw it with ``parse_math=False``: a dollar sign in a name is a dollar sign.
    """
    drawable = "".join(c if _is_drawable(c) else "\N{REPLACEMENT CHARACTER}" for c in str(text))
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
    return drawable_text(text).replace("$", r"\$")


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
        # Positions one apart around 0, the middle first: 0, 1, −1, 2, … (centered).
        ranks = np.arange(len(members))
        places = (ranks + 1) // 2 * np.where(ranks % 2, 1.0, -1.0)
        offsets[members[np.argsort(y[members], kind="stable")]] = places - places.mean()
    widest = np.abs(offsets).max(initial=1.0)
    return np.asarray(offsets * min(width / widest, width / 3))


def spread_apart(
    positions: ArrayLike, gap: float, limits: tuple[float, float]
) -> NDArray[np.float64]:
    """Return positions for labels: as near to the given as a distance of ``gap`` allows."""
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
