"""Singular values of updates, and where rounding errors begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.lines import Line2D

from lora_analysis import linalg
from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.spectra import Spectrum, spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

ENERGY_GUIDES = (0.9, 0.99)


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One spectrum as drawn; its last ``beyond_rank`` values are rounding errors.

    ``color`` is an index: distinct for few curves, one for a bundle of many.
    """

    label: str
    values: NDArray[np.float64]
    beyond_rank: int
    color: int

    @property
    def i(self) -> NDArray[np.intp]:
        """1…n."""
        return np.arange(1, len(self.values) + 1)

    @property
    def numerical_rank(self) -> int:
        """Number of values above the rounding error."""
        return len(self.values) - self.beyond_rank


@dataclass(frozen=True, slots=True, eq=False)
class SpectrumPlot:
    """Everything `plot_spectrum` shows.

    Attributes
    ----------
    curves
        One per trained update.
    beyond_rank
        For each curve that has them, the singular values beyond the numerical rank.
    limits
        Limits of the vertical axis.
    xscale
        ``"log"`` if ranks differ so much that a linear axis would hide the small ones.
    note
        Names the untrained updates, which have nothing to draw.
    """

    curves: tuple[Curve, ...]
    longest: int
    limits: tuple[float, float]
    xscale: Literal["linear", "log"]
    ylabel: str
    note: str


def _labels(spectra: Sequence[Spectrum]) -> list[str]:
    """Return the shortest labels that tell the spectra apart: adapter, else module, else both."""
    adapters = [s.label or "update" for s in spectra]
    modules = [s.name for s in spectra]
    if len(set(adapters)) == len(spectra):
        return style.without_common_start(adapters)
    if len(set(modules)) == len(spectra):
        return style.without_common_start(modules)
    return [f"{a} {m}" for a, m in zip(adapters, modules, strict=True)]


def resolve_spectrum(
    spectra: Sequence[Spectrum], *, normalized: bool = False, energy: bool = False
) -> SpectrumPlot:
    """Resolve the data that `plot_spectrum` draws."""
    if not spectra:
        message = "plot_spectrum was given no spectrum."
        raise InputError(message)
    labels = [style.drawable_text(label, 24) for label in _labels(spectra)]
    # The unit is part of the label if only some of the scales are known.
    mixed = not (normalized or energy or all(s.in_units_of_scale for s in spectra))
    curves = []
    for index, (spectral, label) in enumerate(zip(spectra, labels, strict=True)):
        if not spectral.untrained:
            values = _drawn_values(spectral, normalized=normalized, energy=energy)
            unit = " / scale" if spectral.in_units_of_scale and mixed else ""
            color = index if len(spectra) <= len(style.PALETTE) else 0
            beyond_rank = len(values) - spectral.numerical_rank
            curves.append(Curve(label + unit, values, beyond_rank, color))
    untrained = [n for s, n in zip(spectra, labels, strict=True) if s.untrained]
    lengths = [len(curve.values) for curve in curves] or [1]
    return SpectrumPlot(
        curves=tuple(curves),
        longest=max(lengths),
        limits=(0.0, 1.04) if energy or not curves else _log_limits(curves),
        xscale="log" if max(lengths) > 4 * min(lengths) else "linear",
        ylabel=_ylabel(spectra, normalized=normalized, energy=energy),
        note=f"untrained (ΔW = 0): {', '.join(untrained)}" if untrained else "",
    )


def _drawn_values(spectral: Spectrum, *, normalized: bool, energy: bool) -> NDArray[np.float64]:
    """Return σ, σ/σ₁, or the share of Σσ² in the first i."""
    if energy:
        cumulated = np.cumsum(spectral.S[: spectral.numerical_rank] ** 2)
        return np.asarray(cumulated / cumulated[-1])
    return spectral.S / spectral.S[0] if normalized else spectral.S


def _log_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return limits around the values above rounding; others would stretch the axis to 1e-17."""
    above_rounding = np.concatenate([c.values[: c.numerical_rank] for c in curves])
    low, high = float(above_rounding.min()), float(above_rounding.max())
    room = max((high / low) ** 0.06, 1.3)
    has_floor = any(c.beyond_rank for c in curves)  # of values that are below the axis
    return low / room ** (2 if has_floor else 1), high * room


def _ylabel(spectra: Sequence[Spectrum], *, normalized: bool, energy: bool) -> str:
    factors = {s.of for s in spectra}
    of = "ΔW" if factors == {"delta"} else " / ".join(sorted(factors))
    if energy:
        return f"share of Σσ² of {of} in the first i"
    if normalized:
        return f"σᵢ / σ₁ of {of}"
    unit = " / scale" if all(s.in_units_of_scale for s in spectra) else ""
    return f"singular value σᵢ of {of}{unit}"


def _paint_curve(
    look: style.Look, curve: Curve, floor: float, kwargs: dict[str, Any], *, bundle: bool
) -> None:
    ax, rank, values = look.ax, curve.numerical_rank, curve.values
    color, width = look.color(curve.color), mpl.rcParams["lines.linewidth"]
    defaults = {
        "marker": "" if bundle or rank > 16 else "o",
        "markersize": 3 * look.scale,
        "color": color,
        "label": style.legend_label(curve.label),
        "alpha": 0.4 if bundle else 1,
        "linewidth": width * 2 / 3 if bundle else width,
    }
    ax.plot(curve.i[:rank], values[:rank], **style.merge_kwargs(Line2D, defaults, kwargs))
    # The end of a curve is the numerical rank.
    size = (2 if bundle else 4) * look.scale
    ax.plot(curve.i[rank - 1], values[rank - 1], "o", color=color, markersize=size)
    if curve.beyond_rank:
        ax.plot(
            curve.i[rank:],
            np.maximum(values[rank:], floor),
            "v",
            color=color,
            markerfacecolor=look.paper,
            markersize=3.5 * look.scale,
            clip_on=False,
            label="beyond numerical rank",
        )


def _as_spectra(source: Any) -> list[Spectrum]:
    """Return the spectra of one or several things that have one or several."""
    if isinstance(source, Spectrum):
        return [source]
    if linalg.is_array(source) and source.ndim == 1:
        values = linalg.to_numpy(source)
        if not values.size or not np.isfinite(values).all() or (values < 0).any():
            message = "Singular values must be non-negative numbers, at least one."
            raise InputError(message)
        descending = np.sort(values.astype(np.float64))[::-1].copy()
        count = len(descending)
        return [
            Spectrum(
                name="values",
                U=None,
                S=descending,
                V=None,
                of="delta",
                numerical_rank=int(
                    np.count_nonzero(descending > count * linalg.EPS * descending[0])
                ),
                rank=count,
                shape=(count, count),
            )
        ]
    # A tuple (A, B) or (A, B, scale) is one update; two matrices ΔW come in a list.
    are_factors = (
        isinstance(source, tuple)
        and len(source) in (2, 3)
        and all(linalg.is_array(factor) and factor.ndim == 2 for factor in source[:2])
    )
    if isinstance(source, Sequence) and not isinstance(source, str) and not are_factors:
        return [spectral for entry in source for spectral in _as_spectra(entry)]
    spectra = spectrum(source, vectors=False)
    return [spectra] if isinstance(spectra, Spectrum) else list(spectra.values())


def plot_spectrum(
    spectra: Any,
    ax: Axes | None = None,
    *,
    normalized: bool = False,
    energy: bool = False,
    color: style.Colors | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw singular values against their index i, one curve per spectrum.

    A curve ends in a dot at the numerical rank. Values beyond it are rounding: hollow triangles,
    at the floor of the axis where they lie below it. An untrained update has no curve and is
    named instead. More than seven curves are a bundle of one color, in which only those that
    end highest and lowest are named.

    Parameters
    ----------
    spectra
        One spectrum, or several to overlay. For a spectrum there may be an update in any form that
        :func:`as_update` takes, an adapter (one curve per module) in any form that
        :func:`as_adapter` takes, or an array of singular values.
    ax
        Axes to draw on; None makes a figure of one column's width.
    normalized
        Divide by σ₁, to compare shapes.
    energy
        Draw the share of Σσ² in the first i directions instead, from 0 to 1.
    color
        Color of the curves, or one per spectrum; by default those of ``axes.prop_cycle``.
    figsize
        Size of a new figure in inches.
    **kwargs
        Passed to ``plot`` for every curve.

    Raises
    ------
    InputError
        No spectrum, or a wrong color.
    """
    plot = resolve_spectrum(_as_spectra(spectra), normalized=normalized, energy=energy)
    bundle = len(plot.curves) > len(style.PALETTE)
    with style.drawing(ax, (style.ONE_COLUMN, 2.4), figsize=figsize, color=color) as look:
        ax = look.ax
        if plot.xscale == "log":
            style.log_axis(ax, "x", (0.9, plot.longest * 1.1), base=2)
        else:
            ax.set_xlim(1 - 0.02 * plot.longest - 0.2, plot.longest + 0.02 * plot.longest + 0.2)
            ax.set_xticks(style.count_ticks(plot.longest))
        if not plot.curves:
            ax.set_xticks([])
            ax.set_yticks([])
        elif energy:
            ax.set_ylim(*plot.limits)
        else:
            style.log_axis(ax, "y", plot.limits)
        ax.set_xlabel("i")
        ax.set_ylabel(plot.ylabel)
        if energy:
            for share in ENERGY_GUIDES:
                ax.axhline(share, color=look.faint, linewidth=0.8 * look.scale, zorder=0)
                text = f"{share:g}"
                ax.text(1, share, text, fontsize=look.small, color=look.muted, va="bottom")
        for curve in plot.curves:
            _paint_curve(look, curve, plot.limits[0], kwargs, bundle=bundle)
        if plot.note:
            ax.set_title(
                plot.note, fontsize=look.small, color=look.muted, loc="left", parse_math=False
            )
        if len(plot.curves) > 1 or any(c.beyond_rank for c in plot.curves):
            _name_curves(look, plot.curves, bundle=bundle)
    return ax


def _name_curves(look: style.Look, curves: Sequence[Curve], *, bundle: bool) -> None:
    """Write the labels at the ends of curves; of a bundle, at those that end highest and lowest."""
    if bundle:
        ends = sorted(curves, key=lambda c: float(c.values[c.numerical_rank - 1]))
        curves = (ends[0], ends[-1])
    ranks = [
        f"\n{c.numerical_rank} of {len(c.values)} above rounding" if c.beyond_rank else ""
        for c in curves
    ]
    look.name_ends(
        [(c.i[c.numerical_rank - 1], c.values[c.numerical_rank - 1]) for c in curves],
        [f"{c.label}{rank}" for c, rank in zip(curves, ranks, strict=True)],
        [look.color(c.color) for c in curves],
    )
