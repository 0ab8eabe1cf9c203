"""Results as pictures.

What lives here takes results (`SimilarityGrid`, `Spectrum`, `Amplification`, arrays of numbers)
and returns matplotlib axes, or a figure where there are several panels. It works in two steps:
``resolve_*`` decides limits, ticks, labels and masks as plain attributes, and painting follows
them. Nothing here reads a file, computes a metric or touches matplotlib's global settings.
"""

from lora_analysis.plots.amplification import plot_amplification
from lora_analysis.plots.curves import (
    plot_budget,
    plot_layers,
    plot_trajectories,
    plot_weight_energy,
)
from lora_analysis.plots.heatmap import plot_similarity
from lora_analysis.plots.many_adapters import plot_clustermap, plot_group
from lora_analysis.plots.maps import (
    ModuleMap,
    figure_module_maps,
    plot_intruders,
    plot_module_map,
    resolve_module_map,
)
from lora_analysis.plots.module_values import plot_bars, plot_levels
from lora_analysis.plots.panels import (
    Panel,
    figure_grid,
    figure_layers,
    figure_ranks,
    figure_seeds,
)
from lora_analysis.plots.saving import save_figure, svg_text
from lora_analysis.plots.spectrum import plot_spectrum
from lora_analysis.plots.style import new_axes

__all__ = [
    "ModuleMap",
    "Panel",
    "figure_grid",
    "figure_layers",
    "figure_module_maps",
    "figure_ranks",
    "figure_seeds",
    "new_axes",
    "plot_amplification",
    "plot_bars",
    "plot_budget",
    "plot_clustermap",
    "plot_group",
    "plot_intruders",
    "plot_layers",
    "plot_levels",
    "plot_module_map",
    "plot_similarity",
    "plot_spectrum",
    "plot_trajectories",
    "plot_weight_energy",
    "resolve_module_map",
    "save_figure",
    "svg_text",
]
