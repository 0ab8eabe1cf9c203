"""What results share: one value per module, tables for pandas, small pictures for notebooks.

The pictures are made without matplotlib: a notebook shows a result at once, whatever else is
installed.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from html import escape
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import numpy as np

from lora_analysis.text import html_table, plural, printable

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

T = TypeVar("T")

_MOST_ROWS: Final = 12
# viridis at eleven equal steps; between them colors are interpolated.
_VIRIDIS: Final = np.array(
    [
        (68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140),
        (34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37),
    ],
    dtype=np.float64,
)  # fmt: skip
_BLANK: Final = (221, 221, 221)
_LINE: Final = "#3b528b"
_SIDE: Final = 150


class ByModule(Mapping[str, T], Generic[T]):
    """Results by module name, read-only, in the order of the modules.

    Parameters
    ----------
    results
        One result per module.
    label
        Names of what was analyzed, for the heading.
    """

    __slots__ = ("_results", "label")

    def __init__(self, results: Mapping[str, T], label: str = "") -> None:
        self._results = dict(results)
        self.label = label

    def __getitem__(self, module: str) -> T:
        return self._results[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def to_frame(self) -> pd.DataFrame:
        """Return one table with the rows of all modules, the module's name first.

        A number is one row with the column ``value``; an array one row per entry, counted from 1
        in the column ``i``.
        """
        rows = [{"module": module, **row} for module in self for row in _rows(self[module])]
        return frame(rows)

    def __repr__(self) -> str:
        kind = type(next(iter(self._results.values()), None)).__name__
        return f"<{plural(len(self), 'module')} of {self.label}: {kind}>"

    def _repr_html_(self) -> str:
        summaries = [_summary(self[module]) for module in list(self)[:_MOST_ROWS]]
        columns = list(dict.fromkeys(key for summary in summaries for key in summary))
        rows = [
            (module, *(summary.get(column) for column in columns))
            for module, summary in zip(self, summaries, strict=False)
        ]
        left_out = len(self) - len(rows)
        note = f"and {plural(left_out, 'more module')}; all are in to_frame()." if left_out else ""
        return html_table(self.label, ("module", *columns), rows, note)


def _rows(value: Any) -> list[dict[str, Any]]:
    if hasattr(value, "to_frame"):
        return list(value.to_frame().to_dict("records"))
    if isinstance(value, np.ndarray):
        return [{"i": i, "value": entry} for i, entry in enumerate(value.tolist(), start=1)]
    return [{"value": value}]


def _summary(value: Any) -> Mapping[str, Any]:
    """Return a few numbers of a result: its own choice, or the value itself."""
    if hasattr(value, "summary"):
        return dict(value.summary())
    if isinstance(value, np.ndarray):
        return {"count": value.size, "first": value[:1].sum(), "last": value[-1:].sum()}
    return {"value": value}


def short_repr(self: Any) -> str:
    """Return one line for a dataclass: shapes of arrays, names of nested values.

    The ``__repr__`` of results that hold many numbers.
    """
    parts = []
    for item in fields(self):
        value = getattr(self, item.name)
        if isinstance(value, np.ndarray):
            text = f"array {value.shape}"
        elif value is None or isinstance(value, str | bool | int | float):
            text = repr(value)
        elif isinstance(value, tuple) and all(isinstance(entry, str) for entry in value):
            text = repr(value) if len(value) <= 4 else f"{len(value)} names"
        else:
            text = type(value).__name__
        parts.append(f"{item.name}={text}")
    return f"{type(self).__name__}({', '.join(parts)})"


def frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return rows as a pandas table."""
    import pandas as pd  # results are computed without it

    return pd.DataFrame(rows, columns=columns)


def heat_map(values: NDArray[np.float64], labels: tuple[str, str]) -> str:
    """Return a small picture of values from 0 to 1, row i down and column j across, as SVG.

    Parameters
    ----------
    values
        ``(rows, columns)``; non-finite values are gray.
    labels
        Names of rows and of columns.
    """
    rows, columns = values.shape
    if not values.size:
        return ""
    step = max(1, -(-max(rows, columns) // 128))  # cells that no eye tells apart are left out
    image = base64.b64encode(_png(_colors(values[::step, ::step]))).decode()
    scale = _SIDE / max(rows, columns)
    # Room for the first and the last number along each axis.
    width, height = max(columns * scale, 34), max(rows * scale, 26)
    picture = (
        f'<image x="34" y="6" width="{width:.1f}" height="{height:.1f}" '
        'preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{image}"/>'
    )
    texts = [
        _svg_text(34, height + 20, "1", "start"),
        _svg_text(34 + width, height + 20, str(columns) if columns > 1 else "", "end"),
        _svg_text(34 + width / 2, height + 34, f"j ({labels[1]})", "middle"),
        _svg_text(30, 16, "1", "end"),
        _svg_text(30, height + 6, str(rows) if rows > 1 else "", "end"),
        _svg_text(34 + width + 12, 16, f"i ({labels[0]}) downward", "start"),
        _svg_text(34 + width + 12, 32, "dark 0, bright 1", "start"),
    ]
    return _svg(34 + width + 190, height + 40, picture + "".join(texts), "heat map")


def curve(values: NDArray[np.float64], rank: int) -> str:
    """Return a small picture of positive values against their index, logarithmic, as SVG.

    Values from ``rank`` on are left out.
    """
    leading = values[:rank]
    if not leading.size or not (leading > 0).all():
        return ""
    logs = np.log10(leading / leading.max())
    span = max(float(-logs.min()), 0.1)
    left = 60.0
    x = left + np.linspace(0, _SIDE, len(logs)) if len(logs) > 1 else np.array([left])
    y = 8 - 90 * logs / span
    step = max(1, len(logs) // 256)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[::step], y[::step], strict=True))
    dots = "".join(
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2" fill="{_LINE}"/>'
        for a, b in zip(x, y, strict=True)
        if len(logs) <= 32
    )
    line = f'<polyline points="{points}" fill="none" stroke="{_LINE}" stroke-width="1.4"/>'
    texts = [
        _svg_text(left - 4, 12, f"{leading[0]:.3g}", "end"),
        _svg_text(left - 4, 102, f"{leading.min():.3g}" if len(logs) > 1 else "", "end"),
        _svg_text(left, 118, "1", "middle"),
        _svg_text(left + _SIDE, 118, str(len(logs)) if len(logs) > 1 else "", "middle"),
        _svg_text(left + _SIDE / 2, 118, "i", "middle"),
    ]
    return _svg(left + _SIDE + 20, 124, line + dots + "".join(texts), "singular values")


def _svg(width: float, height: float, content: str, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'role="img" aria-label="{escape(title)}" '
        f'style="background:white;font:11px sans-serif">{content}</svg>'
    )


def _svg_text(x: float, y: float, text: str, anchor: str) -> str:
    name = printable(text)
    name = name if len(name) <= 28 else f"{name[:26]}…"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333">{escape(name)}</text>'


def _colors(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return a color for each value, ``(rows, columns, 3)``."""
    finite = np.isfinite(values)
    where = np.clip(np.where(finite, values, 0.0), 0, 1) * (len(_VIRIDIS) - 1)
    steps = np.arange(len(_VIRIDIS))
    channels = [np.interp(where, steps, _VIRIDIS[:, channel]) for channel in range(3)]
    colors = np.stack(channels, axis=-1)
    colors[~finite] = _BLANK
    return colors.round().astype(np.uint8)


def _png(colors: NDArray[np.uint8]) -> bytes:
    """Return an image as PNG: header, one block of compressed rows, end."""
    height, width = colors.shape[:2]
    rows = np.insert(colors.reshape(height, -1), 0, 0, axis=1)  # each row starts with its filter

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(rows.tobytes(), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
