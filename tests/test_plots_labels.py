"""Names in figures never overlap, whatever their number and length and the figure's size."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable
from pathlib import Path

import image_files as files
import numpy as np
import pytest
from factories import adapter, low_rank_update
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.transforms import Bbox

from lora_analysis import plots
from lora_analysis.plots.labels import name_ticks, shorten_label, text_width, wrap_label
from lora_analysis.plots.maps import resolve_module_map
from lora_analysis.plots.saving import svg_text
from lora_analysis.similarity import subspace_similarity
from lora_analysis.studies import study

FONT = FontProperties(family=["DejaVu Sans"], size=7)


def sdxl_names() -> list[str]:
    names = [f"lora_unet_{name}" for name in files.unet_modules(files.SDXL_BLOCKS)]
    names += [f"lora_te1_{name}" for name in files.clip_modules(12)]
    return names + [f"lora_te2_{name}" for name in files.clip_modules(32)]


def long_names(count: int, length: int) -> list[str]:
    """Return names of a layer and a part each, of about ``length`` characters."""
    filler = (string.ascii_lowercase * 4)[: max(length - 14, 1)]
    return [f"m.layers.{n // 4}.{filler}_{n % 4}" for n in range(count)]


def name_groups(figure: Figure) -> list[list[Bbox]]:
    """Draw a figure; return the boxes of the names along each axis, and of all titles."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    groups = []
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            labels = [tick.label1 for tick in axis.get_major_ticks() if tick.label1.get_visible()]
            if ax.axison:
                groups.append([t.get_window_extent(renderer) for t in labels if t.get_text()])
    titles = [ax.title.get_window_extent(renderer) for ax in figure.axes if ax.title.get_text()]
    return [*groups, titles]


def overlapping(boxes: list[Bbox]) -> list[tuple[Bbox, Bbox]]:
    return [
        pair
        for pair in itertools.combinations(boxes, 2)
        if (inside := Bbox.intersection(*pair)) is not None and min(inside.size) > 0.5
    ]


def assert_apart(figure: Figure) -> None:
    groups = name_groups(figure)
    assert sum(map(len, groups)) > 1
    for boxes in groups:
        assert not overlapping(boxes)


def values_of(names: list[str]) -> dict[str, float]:
    return {name: n / len(names) for n, name in enumerate(names)}


def draw_map(names: list[str], width: float) -> Figure:
    axes = plots.plot_module_map(values_of(names), plots.new_axes(width, width), title=names[-1])
    return axes.figure  # type: ignore[return-value]


def draw_maps(names: list[str], width: float) -> Figure:
    one_map = resolve_module_map(values_of(names), title=f"{names[0]} of replicates, output side")
    return plots.figure_module_maps([[one_map, one_map], [one_map]], width=width)


def draw_bars(names: list[str], width: float) -> Figure:
    axes = plots.plot_bars(values_of(names), plots.new_axes(width, width / 2), xlabel="‖ΔW‖")
    return axes.figure  # type: ignore[return-value]


def draw_layers(names: list[str], width: float) -> Figure:
    axes = plots.plot_layers(values_of(names), plots.new_axes(width, 2.0))
    return axes.figure  # type: ignore[return-value]


def draw_grids(names: list[str], width: float) -> Figure:
    rng = np.random.default_rng(0)
    grid = subspace_similarity(*(low_rank_update(rng, rank=4) for _ in range(2)))
    return plots.figure_ranks(dict.fromkeys(names[:2], grid), width=width)


# 3.3 inches are one column of a paper.
@pytest.mark.parametrize("width", [3.3, 7.0, 12.0])
@pytest.mark.parametrize("draw", [draw_map, draw_maps, draw_bars, draw_layers, draw_grids])
@pytest.mark.parametrize(
    "names",
    [sdxl_names(), long_names(8, 20), long_names(60, 30), long_names(400, 80)],
    ids=["sdxl", "few", "many", "long"],
)
def test_names_do_not_overlap(
    names: list[str], draw: Callable[[list[str], float], Figure], width: float
) -> None:
    assert_apart(draw(names, width))


@pytest.mark.parametrize("draw", [draw_map, draw_maps, draw_bars])
def test_names_do_not_overlap_in_small_figures(
    draw: Callable[[list[str], float], Figure],
) -> None:
    for names in (sdxl_names(), long_names(400, 80)):
        assert_apart(draw(names, 2.4))


def test_adapters_of_a_matrix_do_not_overlap(rng: np.random.Generator) -> None:
    labels = [f"experiment-with-a-long-name/{n}/final-{'x' * n}" for n in range(24)]
    adapters = [adapter(rng, label=label) for label in labels]
    matrix = study(adapters, label="none").similarity_matrix
    assert matrix is not None
    for width in (2.4, 4.4):
        axes = plots.plot_clustermap(matrix, plots.new_axes(width, width + 0.25))
        assert_apart(axes.figure)  # type: ignore[arg-type]


def test_the_check_sees_names_that_overlap() -> None:
    axes = plots.new_axes(2.0, 2.0)
    axes.set_yticks(range(60), [f"name {n}" for n in range(60)])
    assert any(overlapping(boxes) for boxes in name_groups(axes.figure))  # type: ignore[arg-type]


def test_as_many_names_are_written_as_there_is_room_for() -> None:
    axes = plots.new_axes(3.0, 3.0)
    axes.set_ylim(-0.5, 39.5)
    names = [f"name {n}" for n in range(40)]
    name_ticks(axes, "y", range(40), names)
    FigureCanvasAgg(axes.figure).draw()
    few = [label.get_text() for label in axes.get_yticklabels()]
    axes.figure.set_size_inches(3, 8)  # type: ignore[union-attr]
    FigureCanvasAgg(axes.figure).draw()
    assert few == names[:: 40 // len(few) + bool(40 % len(few))]
    assert 1 < len(few) < 40
    assert [label.get_text() for label in axes.get_yticklabels()] == names


def test_names_turn_where_they_do_not_fit_across() -> None:
    for width, rotation in ((7.0, 0), (3.0, 90)):
        axes = plots.new_axes(width, 2.0)
        axes.set_xlim(-0.5, 7.5)
        name_ticks(axes, "x", range(8), [f"OUT{n:02}" for n in range(8)], vertical=None)
        assert {label.get_rotation() for label in axes.get_xticklabels()} == {rotation}


def test_a_dollar_sign_stays_what_it_is() -> None:
    axes = plots.plot_bars({"a.$x$": 1.0, "a.$y": 2.0}, plots.new_axes(), xlabel="x")
    FigureCanvasAgg(axes.figure).draw()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["$y", "$x$"]


def test_long_text_is_broken_and_then_shortened() -> None:
    wide = text_width("down_blocks.1.attentions.0.proj_in", FONT)
    assert wrap_label("IN04 attn1.to_q", wide, FONT) == "IN04 attn1.to_q"
    title = wrap_label("IN04.1 attn1.to_q, j ≤ i", text_width("IN04.1 attn1.to_q, j", FONT), FONT)
    assert title == "IN04.1 attn1.to_q,\nj ≤ i"
    lines = wrap_label("down_blocks.1.attentions.0.proj_in", 0.6 * wide, FONT).split("\n")
    assert "".join(lines) == "down_blocks.1.attentions.0.proj_in"
    assert len(lines) == 2
    lines = wrap_label("x" * 200 + ".end", 50.0, FONT).split("\n")
    assert lines[-1].endswith("end")
    assert all(text_width(line, FONT) <= 50 for line in lines)
    assert shorten_label("abcdef", 1000.0, FONT) == "abcdef"
    assert shorten_label("abcdef", 12.0, FONT).startswith("…")


@pytest.mark.slow
def test_a_map_of_a_thousand_modules_is_a_small_picture(tmp_path: Path) -> None:
    parts = ("q", "k", "v", "o", "gate", "up", "down")
    language = [f"model.layers.{n}.{part}_proj" for n in range(143) for part in parts]
    odd = [f"lora_unet_module_{chr(97 + n // 26 % 26)}{chr(97 + n % 26)}{'z' * (n // 676)}_x"
           for n in range(1000)]  # fmt: skip
    for names in (sdxl_names(), language, odd):
        figure = plots.figure_module_maps([[resolve_module_map(values_of(names))]])
        assert figure.get_figheight() < 10
        (written,) = plots.save_figure(figure, tmp_path / "map", ["svg"])
        inline = svg_text(figure, title="map", description="of modules")
        assert max(written.stat().st_size, len(inline.encode())) < 500_000
