"""Hover text of cells, sorted bars, marks of groups, and the legend of hatched cells."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from factories import adapter, low_rank_update

from lora_analysis import plots
from lora_analysis.errors import InputError
from lora_analysis.plots.labels import MOST_CELLS, HoverCells
from lora_analysis.plots.many_adapters import resolve_clustermap
from lora_analysis.plots.module_values import MOST_BARS, resolve_bars
from lora_analysis.similarity import subspace_similarity
from lora_analysis.studies import study


def hovers(svg: str) -> list[tuple[dict[str, float], str]]:
    """Return the boxes and texts of the rectangles with hover text."""
    root = ET.fromstring(svg)
    rects = root.iter("{http://www.w3.org/2000/svg}rect")
    titles = ((r, r.find("{http://www.w3.org/2000/svg}title")) for r in rects)
    return [
        ({key: float(r.attrib[key]) for key in ("x", "y", "width", "height")}, title.text or "")
        for r, title in titles
        if title is not None
    ]


def test_a_cell_of_a_heat_map_says_its_value(rng: np.random.Generator) -> None:
    a, b = (low_rank_update(rng, rank=rank) for rank in (2, 3))
    grid = subspace_similarity(a, b)
    axes = plots.plot_similarity(grid)
    svg = plots.svg_text(axes.figure, title="t", description="d")  # type: ignore[arg-type]
    cells = hovers(svg)
    assert len(cells) == 6
    expected = f"{grid.at(2, 3):.2f}" if grid.at(2, 3) >= 0.1 else f"{grid.at(2, 3):.3f}"
    assert cells[-1][1] == f"φ(2, 3): {expected}"
    # The boxes tile the picture: i grows downward, j to the right.
    boxes = [box for box, _ in cells]
    assert boxes[1]["x"] > boxes[0]["x"]
    assert boxes[3]["y"] > boxes[0]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] == pytest.approx(boxes[1]["x"], abs=0.11)
    picture = re.search(r'<image [^>]*?\bx="([\d.]+)"[^>]*?\bwidth="([\d.]+)"', svg)
    if picture:
        left, width = map(float, picture.groups())
        assert boxes[0]["x"] == pytest.approx(left, abs=1.5)
        assert boxes[2]["x"] + boxes[2]["width"] == pytest.approx(left + width, abs=1.5)


def test_a_large_grid_says_the_range_of_blocks() -> None:
    values = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    cells = HoverCells(values, (0.5, 0.5), lambda *edges: str(edges))
    blocks = list(cells.blocks())
    assert len(blocks) <= MOST_CELLS
    covered = np.zeros((64, 64), dtype=int)
    for top, bottom, left, right in blocks:
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all()
    assert " to " in cells.title(*blocks[-1])


def test_a_cell_without_a_value_says_nothing() -> None:
    cells = HoverCells(np.array([[np.nan]]), (0, 0), lambda *_: "x")
    assert not cells.title(0, 1, 0, 1)


def test_a_matrix_names_both_adapters_and_marks_their_groups(rng: np.random.Generator) -> None:
    labels = [f"<b>{n}" for n in range(4)]
    matrix = study([adapter(rng, label=label) for label in labels]).similarity_matrix
    assert matrix is not None
    tasks = dict(zip(labels, ["add", "$copy", "add", "$copy"], strict=True))
    plot = resolve_clustermap(matrix, groups=tasks)
    assert plot.marks == tuple(tasks[name] for name in plot.names)
    axes = plots.plot_clustermap(matrix, plots.new_axes(), groups=tasks)
    svg = plots.svg_text(axes.figure, title="t", description="d")  # type: ignore[arg-type]
    texts = [text for _, text in hovers(svg)]
    assert len(texts) == 16
    assert texts[1].startswith(f"{plot.names[0]} and {plot.names[1]}: ")
    legend = axes.figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        name.replace("$", r"\$") for name in dict.fromkeys(plot.marks)
    ]


def test_files_of_figures_have_no_hover_text(rng: np.random.Generator, tmp_path) -> None:  # type: ignore[no-untyped-def]
    a, b = (low_rank_update(rng, rank=2) for _ in "ab")
    axes = plots.plot_similarity(subspace_similarity(a, b))
    (path,) = plots.save_figure(axes.figure, tmp_path / "x", ("svg",))  # type: ignore[arg-type]
    assert not hovers(path.read_text())


def test_bars_are_sorted_and_the_middle_of_many_is_left_out() -> None:
    few = resolve_bars({"m.a": 1.0, "m.b": 3.0, "m.c": np.nan}, xlabel="x")
    assert few.labels == ("b", "a")
    assert few.omitted == 0
    many = resolve_bars({f"m.{n}": float(n) for n in range(100)}, xlabel="x")
    assert len(many.values) == MOST_BARS
    assert many.omitted == 100 - MOST_BARS
    assert many.values[0] == 99
    assert many.values[-1] == 0
    assert list(many.values) == sorted(many.values, reverse=True)
    axes = plots.plot_bars({f"m.{n}": float(n) for n in range(100)}, xlabel="$x")
    assert len(axes.patches) == MOST_BARS
    axes.figure.draw_without_rendering()
    with pytest.raises(InputError, match="no finite value"):
        plots.plot_bars({"a": np.nan}, xlabel="x")


def test_hatched_cells_have_a_legend(rng: np.random.Generator) -> None:
    B = np.linalg.qr(rng.standard_normal((20, 3)))[0]
    A = np.linalg.qr(rng.standard_normal((20, 3)))[0].T
    tied = low_rank_update(rng, d_out=20, d_in=20, rank=3)
    tied = type(tied)(name=tied.name, A=A, B=B * [1.0, 0.99, 0.5], scale=1.0)
    other = low_rank_update(rng, d_out=20, d_in=20, rank=3)
    clear = type(tied)(name=tied.name, A=A, B=B * [1.0, 0.7, 0.3], scale=1.0)
    figure = plots.figure_grid([[plots.Panel(subspace_similarity(tied, other), "t")]])
    assert "nearly degenerate" in figure.legends[0].get_texts()[0].get_text()
    assert not plots.figure_grid([[plots.Panel(subspace_similarity(clear, clear), "t")]]).legends
