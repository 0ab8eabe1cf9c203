"""What the user sets wins: styles, sizes, colors, keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import factories
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from factories import group_analysis
from matplotlib import colors
from matplotlib.text import Text

from lora_analysis import plots
from lora_analysis.amplify import amplification, weight_basis_energy
from lora_analysis.errors import InputError
from lora_analysis.intruders import intruder_dimensions
from lora_analysis.plots.style import contrast, font_size
from lora_analysis.similarity import SimilarityGrid, subspace_similarity
from lora_analysis.spectra import spectrum, weight_svd
from lora_analysis.studies import study

LINES = {"a": ([1, 2, 3], [0.2, 0.4, 0.9]), "b": ([1, 2, 3], [0.1, 0.3, 0.8])}
VALUES = {f"layers.{n}.{kind}": (n + 1) / 5 for n in range(3) for kind in ("q", "v")}


def _update(rank: int, label: str) -> Any:
    return factories.low_rank_update(np.random.default_rng(rank), 24, 24, rank, label=label)


def _grid() -> SimilarityGrid:
    rng = np.random.default_rng(5)
    U, V = (factories.orthonormal(rng, 24, 5) for _ in range(2))
    graded = factories.planted_update(U, np.array([5, 4.9, 3, 2, 2.0]), V, label="r5-s0")
    return subspace_similarity(graded, _update(8, "r8-s0"))


def _weight() -> Any:
    return np.random.default_rng(1).standard_normal((24, 24))


def _intruders() -> Any:
    update = factories.low_rank_update(np.random.default_rng(2), 24, 24, 2, scale=10.0)
    return [intruder_dimensions(update, np.diag(np.linspace(5, 1, 24)))]


def _matrix() -> Any:
    rng = np.random.default_rng(3)
    return study([factories.adapter(rng, label=f"a{n}") for n in range(3)]).similarity_matrix


def _group() -> Any:
    rng = np.random.default_rng(4)
    return group_analysis(
        [factories.adapter(rng, label=f"m{n}", d_out=40, d_in=40, rank=2) for n in range(6)],
        [factories.adapter(rng, label=f"o{n}", d_out=40, d_in=40, rank=2) for n in range(2)],
    )


HEAT_MAPS: dict[str, Callable[..., Any]] = {
    "plot_similarity": lambda **options: plots.plot_similarity(_grid(), **options),
    "plot_module_map": lambda **options: plots.plot_module_map(VALUES, **options),
    "plot_clustermap": lambda **options: plots.plot_clustermap(_matrix(), **options),
    "plot_intruders": lambda **options: plots.plot_intruders(_intruders(), **options),
}
CURVES: dict[str, Callable[..., Any]] = {
    "plot_spectrum": lambda **options: plots.plot_spectrum(
        [spectrum(_update(r, f"r{r}")) for r in (2, 4)], **options
    ),
    "plot_amplification": lambda **options: plots.plot_amplification(
        amplification(_update(4, "r4"), _weight()), **options
    ),
    "plot_weight_energy": lambda **options: plots.plot_weight_energy(
        weight_basis_energy(_update(4, "r4"), weight_svd(_weight(), cache=False)), **options
    ),
    "plot_layers": lambda **options: plots.plot_layers(VALUES, chance=0.1, **options),
    "plot_trajectories": lambda **options: plots.plot_trajectories(LINES, **options),
    "plot_budget": lambda **options: plots.plot_budget(LINES, **options),
    "plot_group": lambda **options: plots.plot_group(_group(), **options),
}
OTHERS: dict[str, Callable[..., Any]] = {
    "plot_bars": lambda **options: plots.plot_bars(VALUES, xlabel="φ", **options),
    "plot_levels": lambda **options: plots.plot_levels(
        {"same task": [0.2, 0.4], "other tasks": [0.1, 0.2]}, 0.05, **options
    ),
}
ALL = HEAT_MAPS | CURVES | OTHERS


def _texts(figure: Any) -> list[Text]:
    """Return the visible texts of a figure, those of ticks included."""
    figure.draw_without_rendering()
    return [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]


def test_every_plot_is_tested() -> None:
    assert sorted(ALL) == [name for name in sorted(plots.__all__) if name.startswith("plot_")]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("given", ["new", "ax", "ax of an ended style"])
def test_drawings_on_dark_are_legible(name: str, given: str) -> None:
    with plt.style.context("dark_background"):
        ax = None if given == "new" else plt.subplots(layout="constrained")[1]
        if given != "ax of an ended style":
            ax = ALL[name](ax=ax)
    ax = ALL[name](ax=ax) if given == "ax of an ended style" else ax
    figure = ax.figure
    assert contrast(figure.get_facecolor(), "black") < 1.1
    for text in _texts(figure):
        assert contrast(text.get_color(), "black") >= 4.5, text.get_text()
    for line in ax.lines:
        if line.get_zorder() > 0:  # guides are below everything
            assert contrast(line.get_color(), "black") >= 3
    for spine in ax.spines.values():
        if spine.get_visible():
            assert contrast(spine.get_edgecolor(), "black") >= 3


@pytest.mark.parametrize("name", ALL)
def test_texts_have_the_size_of_a_paper_or_of_a_slide(name: str) -> None:
    paper, slide = ALL[name](), ALL[name](figsize=(10, 6))
    on_slide = plt.subplots(figsize=(13, 7), layout="constrained")[1]
    ALL[name](ax=on_slide)
    assert all(6 <= text.get_fontsize() <= 8 for text in _texts(paper.figure))
    for ax in (slide, on_slide):
        assert all(14 <= text.get_fontsize() <= 20 for text in _texts(ax.figure))


def test_the_size_of_text_is_one_rule() -> None:
    assert [font_size(width) for width in (2, 3.3, 7, 8.5, 10, 13)] == pytest.approx(
        [8, 8, 8, 12, 16, 18]
    )
    assert plots.figure_ranks({"q": _grid()}, width=12)._suptitle.get_fontsize() == 18
    assert plots.figure_ranks({"q": _grid()}, width=7)._suptitle.get_fontsize() == 8


def test_what_the_user_set_wins() -> None:
    settings = {
        "font.size": 11,
        "axes.titlesize": 20,
        "lines.linewidth": 3,
        "axes.spines.left": False,
        "text.color": "navy",
        "image.cmap": "cividis",
        "axes.prop_cycle": mpl.cycler(color=["#112233", "#445566"]),
        "axes.grid": True,
    }
    with mpl.rc_context(settings):
        grid_ax, curves = plots.plot_similarity(_grid()), CURVES["plot_spectrum"]()
    assert grid_ax.title.get_fontsize() == 20
    assert grid_ax.xaxis.label.get_fontsize() == 11
    assert grid_ax.images[0].get_cmap().name == "cividis"
    assert grid_ax.title.get_color() == "navy"
    assert [line.get_color() for line in curves.lines if len(line.get_xdata()) > 1] == [
        "#112233", "#445566",
    ]  # fmt: skip
    assert curves.lines[0].get_linewidth() == 3
    assert not curves.spines["left"].get_visible()
    # A grid would hide the cells of a heat-map.
    assert not any(line.get_visible() for line in grid_ax.get_xgridlines())


def test_a_users_font_without_greek_falls_back() -> None:
    with mpl.rc_context({"font.family": "cmr10", "axes.formatter.use_mathtext": True}):
        ax = plots.plot_similarity(_grid())
        assert ax.title.get_fontfamily() == ["cmr10", "DejaVu Sans"]
        ax.figure.canvas.draw()  # a missing glyph would be a warning


@pytest.mark.parametrize("name", HEAT_MAPS)
def test_heat_maps_take_a_colormap_and_limits(name: str) -> None:
    ax = HEAT_MAPS[name](cmap="magma", vmin=0.1, vmax=0.4, figsize=(5, 4), alpha=0.5)
    (image,) = ax.images
    assert image.get_cmap().name == "magma"
    assert image.get_clim() == (0.1, 0.4)
    assert image.get_alpha() == 0.5
    assert tuple(ax.figure.get_size_inches()) == (5, 4)
    automatic = HEAT_MAPS[name](vmax="auto")
    values = automatic.images[0].get_array()
    assert automatic.images[0].get_clim()[1] == values.max()
    bars = [*automatic.child_axes, *automatic.figure.axes]
    assert any("auto: " in bar.get_ylabel() for bar in bars)
    with pytest.raises(InputError, match=r"no colormap 'virdis'. \(Did you mean one of: 'viridis'"):
        HEAT_MAPS[name](cmap="virdis")
    with pytest.raises(InputError, match="vmin must be less than vmax"):
        HEAT_MAPS[name](vmin=0.5, vmax=0.5)
    with pytest.raises(InputError, match="numbers, vmax also 'auto'"):
        HEAT_MAPS[name](vmax="most")
    with pytest.raises(InputError, match="Pass one of the two"):
        HEAT_MAPS[name](ax=plt.subplots()[1], figsize=(3, 3))


def test_values_outside_of_the_colors_are_arrows_of_the_color_bar() -> None:
    grid = _grid()
    middle = float(np.median(grid.values))
    scale = plots.heatmap.resolve_similarity(grid, options={"vmin": 0.9 * middle, "vmax": middle})
    assert scale.scale.extend == "both"
    assert plots.heatmap.resolve_similarity(grid).scale.extend == "neither"


def test_an_own_norm_is_used() -> None:
    norm = colors.LogNorm(0.01, 1)
    ax = plots.plot_similarity(_grid(), norm=norm)
    assert ax.images[0].norm is norm


@pytest.mark.parametrize("name", CURVES)
def test_curves_take_a_color_and_what_plot_takes(name: str) -> None:
    ax = CURVES[name](color="#c0ffee", lw=4, ls=":", figsize=(5, 2))
    curves = [line for line in ax.lines if line.get_linewidth() == 4]
    assert curves
    assert {line.get_linestyle() for line in curves} == {":"}
    assert "#c0ffee" in {line.get_color() for line in curves}
    assert tuple(ax.figure.get_size_inches()) == (5, 2)
    with pytest.raises(InputError, match=r"color of matplotlib.*'no color'"):
        CURVES[name](color="no color")


def test_each_curve_can_have_its_color() -> None:
    ax = plots.plot_trajectories(LINES, color=["red", (0, 0, 1)])
    assert [line.get_color() for line in ax.lines] == ["#ff0000", "#0000ff"]


def test_bars_and_points_take_a_color_and_what_matplotlib_takes() -> None:
    ax = OTHERS["plot_bars"](color="red", hatch="//", height=0.2)
    assert {bar.get_hatch() for bar in ax.patches} == {"//"}
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.2] * len(VALUES))
    assert {colors.to_hex(bar.get_facecolor()) for bar in ax.patches} == {"#ff0000"}
    ax = OTHERS["plot_levels"](color=["red", "blue"], s=50, marker="D")
    assert [colors.to_hex(points.get_facecolor()[0]) for points in ax.collections] == [
        "#ff0000", "#0000ff",
    ]  # fmt: skip
    assert {float(points.get_sizes()[0]) for points in ax.collections} == {50}


def test_panels_of_phi_share_the_users_colors_and_excess_keeps_its_own() -> None:
    grid = _grid()
    figure = plots.figure_ranks({"q": grid}, excess=True, cmap="magma", vmax="auto", title="T")
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert [image.get_cmap().name for image in images] == ["magma"] * 2 + ["excess"] * 2
    peak = max(images[0].get_array().max(), images[1].get_array().max())
    assert [image.get_clim() for image in images[:2]] == [(0, peak)] * 2
    assert figure.get_suptitle() == "T"
    alone = plots.figure_layers({"layer 1": {"q": grid}}, excess=True, cmap="magma")
    assert {ax.images[0].get_cmap().name for ax in alone.axes if ax.images} == {"magma"}


def test_panels_name_their_axes_after_the_adapters() -> None:
    other = subspace_similarity(_update(3, "$a"), _update(4, "b" * 30))
    panels = [plots.Panel(_grid(), "one"), plots.Panel(_grid(), "same"), plots.Panel(other, "two")]
    axes = plots.figure_grid([panels]).axes
    assert [ax.get_ylabel() for ax in axes] == ["i: r5-s0", "", "i: $a"]
    assert [ax.get_xlabel() for ax in axes[:2]] == ["j: r8-s0"] * 2
    assert axes[2].get_xlabel().startswith("j: …b")


@pytest.mark.parametrize("side", ["paper", "ink"])
def test_hatching_is_visible_on_dark_and_on_bright_cells(side: str) -> None:
    ax = plots.plot_similarity(_grid(), cmap="Greys_r" if side == "paper" else "Greys", vmax=20)
    (lines,) = [patch for patch in ax.patches if patch.get_label() == "nearly degenerate"]
    shade = contrast(lines.get_edgecolor()[:3], "white")
    assert shade < 1.1 if side == "paper" else shade > 10
