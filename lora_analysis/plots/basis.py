"""ΔW in W's own basis: how much of its energy lies in W's leading directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.amplify import WeightBasisEnergy
from lora_analysis.errors import InputError
from lora_analysis.plots import style
from lora_analysis.plots.curves import Line, lines_of, paint_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lora_analysis.spectra import Side


@dataclass(frozen=True, slots=True, eq=False)
class EnergyPlot:
    """Data drawn by `plot_weight_energy`: cumulated shares over k, chance and its 95 % bound."""

    lines: tuple[Line, ...]
    k: NDArray[np.float64]
    chance: NDArray[np.float64]
    bound: NDArray[np.float64]
    xlabel: str
    ylabel: str


def resolve_weight_energy(
    energies: Sequence[WeightBasisEnergy], *, side: Side = "output"
) -> EnergyPlot:
    """Resolve the data that `plot_weight_energy` draws."""
    if not energies:
        message = "plot_weight_energy was given no result."
        raise InputError(message)
    sizes = {(len(energy.weight_values), energy.sides[side].dimension) for energy in energies}
    if len(sizes) > 1:
        message = f"The weights have {len(sizes)} sizes; draw those of one size together."
        raise InputError(message)
    ((count, dimension),) = sizes
    k = np.arange(1, count + 1, dtype=np.float64)
    labels = [energy.label for energy in energies]
    names = labels if len(set(labels)) == len(energies) else [energy.module for energy in energies]
    names = style.without_common_start(names)
    lines = lines_of(
        {
            name: (k, energy.sides[side].leading)
            for name, energy in zip(names, energies, strict=True)
        }
    )
    # The fewest effective directions vary most: their bound holds for all.
    bound = np.max([energy.band(side, 0.95) for energy in energies], axis=0)
    return EnergyPlot(
        lines=lines,
        k=k,
        chance=k / dimension,
        bound=bound,
        xlabel="k, leading directions of W",
        ylabel=f"share of ‖ΔW‖², {side} side",
    )


def plot_weight_energy(
    energies: WeightBasisEnergy | Sequence[WeightBasisEnergy],
    ax: Axes | None = None,
    *,
    side: Side = "output",
    color: style.Colors | None = None,
    figsize: tuple[float, float] | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw the share of ‖ΔW‖² in W's top-k directions over k, next to what random ones hold.

    Dashed: chance, k/d; gray up to where 95 % of isotropic updates of such a spectrum stay. The
    LoRA paper's Figure 8 is a part of it.

    Parameters
    ----------
    energies
        From `lora_analysis.amplify.weight_basis_energy`; several of one size.
    ax
        Axes to draw on; None makes a figure of one column's width.
    side
        ``"input"`` or ``"output"``.
    color
        Color of the curves, or one per curve; by default those of ``axes.prop_cycle``.
    figsize
        Size of a new figure in inches.
    **kwargs
        Passed to ``plot`` for every curve.

    Raises
    ------
    InputError
        No result, weights of several sizes, or a wrong color.
    """
    several = [energies] if isinstance(energies, WeightBasisEnergy) else list(energies)
    plot = resolve_weight_energy(several, side=side)
    with style.drawing(ax, (style.ONE_COLUMN, 2.4), figsize=figsize, color=color) as look:
        ax = look.ax
        ax.fill_between(plot.k, 0, plot.bound, color=look.muted, alpha=0.18, linewidth=0)
        ax.plot(plot.k, plot.chance, color=look.muted, linestyle=(0, (4, 2)), label="random")
        paint_lines(look, plot.lines, kwargs)
        style.log_axis(ax, "x", (0.9, float(plot.k[-1]) * 1.05), base=2)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel(plot.xlabel)
        ax.set_ylabel(plot.ylabel)
        # All lines end at 1: they are named where they differ, in a legend.
        ax.legend(loc="upper left", handlelength=1.2)
    return ax
