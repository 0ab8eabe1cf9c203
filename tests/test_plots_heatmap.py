from __future__ import annotations

import factories
import matplotlib.pyplot as plt
import numpy as np
import pytest

from lora_analysis import LowRankUpdate
from lora_analysis.errors import InputError
from lora_analysis.plots import Panel, figure_grid, figure_ranks, figure_seeds, plot_similarity
from lora_analysis.plots.hatching import rectangles
from lora_analysis.plots.heatmap import EXCESS_LIMITS, resolve_similarity
from lora_analysis.similarity import SimilarityGrid, subspace_similarity
from lora_analysis.spectra import spectrum


def _grid(rng, rank_1=3, rank_2=5, d=24, **names) -> SimilarityGrid:
    one = factories.low_rank_update(rng, d, d, rank_1, label=names.get("first", "r3-s0"))
    two = factories.low_rank_update(rng, d, d, rank_2, label=names.get("second", "r5-s0"))
    return subspace_similarity(one, two, side="output")


def _graded(rng, values, *, label="graded") -> LowRankUpdate:
    U, V = (factories.orthonormal(rng, 24, len(values)) for _ in range(2))
    return factories.planted_update(U, np.array(values, dtype=float), V, label=label)


def test_the_drawn_array_is_phi_with_i_down_and_j_across_from_one(rng):
    grid = _grid(rng)
    ax = plot_similarity(grid)
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array(), grid.values)
    assert image.get_extent() == [0.5, 5.5, 3.5, 0.5]
    assert ax.get_ylim() == (3.5, 0.5)
    assert ax.get_xlim() == (0.5, 5.5)
    assert list(ax.get_xticks()) == [1, 2, 3, 4, 5]
    assert list(ax.get_yticks()) == [1, 2, 3]


def test_color_runs_from_zero_to_one_whatever_the_values(rng):
    (image,) = plot_similarity(_grid(rng)).images
    assert image.get_clim() == (0, 1)
    assert image.get_cmap().name == "viridis"


def test_labels_name_both_adapters_and_the_title_the_module(rng):
    ax = plot_similarity(_grid(rng))
    assert (ax.get_xlabel(), ax.get_ylabel()) == (
        "j: directions of r5-s0",
        "i: directions of r3-s0",
    )
    assert ax.get_title() == "layers.0.q_proj"
    assert plot_similarity(_grid(rng), title="ΔWq").get_title() == "ΔWq"


def test_zoom_shows_only_the_corner_and_in_it_j_up_to_i(rng):
    grid = _grid(rng, 6, 9)
    heatmap = resolve_similarity(grid, zoom=4)
    assert heatmap.data.shape == (4, 4)
    assert np.array_equal(heatmap.data.mask, np.triu(np.ones((4, 4), bool), 1))
    shown = np.tril_indices(4)
    np.testing.assert_array_equal(heatmap.data.data[shown], grid.values[:4, :4][shown])


def test_zoom_beyond_the_grid_stops_at_the_smaller_rank(rng):
    assert resolve_similarity(_grid(rng, 3, 5), zoom=8).data.shape == (3, 3)


def test_zoom_below_one_is_refused(rng):
    with pytest.raises(InputError, match="at least 1, got 0"):
        plot_similarity(_grid(rng), zoom=0)


def test_excess_is_drawn_around_zero_with_its_own_colors(rng):
    grid = _grid(rng)
    heatmap = resolve_similarity(grid, excess=True)
    np.testing.assert_array_equal(heatmap.data, grid.excess)
    assert heatmap.scale.limits == EXCESS_LIMITS
    assert heatmap.chance is None
    middle = heatmap.scale.colors((0 - EXCESS_LIMITS[0]) / (EXCESS_LIMITS[1] - EXCESS_LIMITS[0]))
    assert min(middle[:3]) > 0.95  # white at chance


def test_excess_below_the_color_bar_is_announced(rng):
    d = 4  # chance of a half: orthogonal subspaces lie at -1
    U = np.eye(d)
    one = factories.planted_update(U[:, :2], np.array([2.0, 1.0]), U[:, :2])
    two = factories.planted_update(U[:, 2:], np.array([2.0, 1.0]), U[:, 2:])
    heatmap = resolve_similarity(subspace_similarity(one, two), excess=True)
    assert heatmap.data[1, 1] == -1
    assert heatmap.scale.below


def test_chance_is_marked_beside_the_color_bar(rng):
    grid = _grid(rng, d=24)
    ax = plot_similarity(grid)
    (bar,) = ax.child_axes
    (line,) = [line for line in bar.lines if line.get_label() == "random"]
    assert list(line.get_ydata()) == pytest.approx([1 / 24, 5 / 24])
    assert bar.get_ylabel() == "φ(i, j)"
    assert not plot_similarity(grid, colorbar=False).child_axes


def test_undefined_cells_are_not_drawn_and_soft_ones_are_marked(rng):
    one = _graded(rng, [4, 4, 1])  # top-1 undefined
    two = _graded(rng, [5, 4.9, 1])  # top-1 soft
    heatmap = resolve_similarity(subspace_similarity(one, two))
    assert heatmap.data.mask.tolist() == [[True] * 3, [False] * 3, [False] * 3]
    assert heatmap.degenerate.tolist() == heatmap.data.mask.tolist()
    assert heatmap.nearly_degenerate.tolist() == [
        [False] * 3,
        [True, False, False],
        [True, False, False],
    ]
    ax = plot_similarity(subspace_similarity(one, two))
    assert [patch.get_label() for patch in ax.patches] == ["degenerate", "nearly degenerate"]
    assert all(patch.get_hatch() for patch in ax.patches)


def test_cells_left_out_by_zoom_are_not_hatched(rng):
    one, two = _graded(rng, [4, 4, 1]), _graded(rng, [5, 4.9, 1])
    heatmap = resolve_similarity(subspace_similarity(one, two), zoom=3)
    assert heatmap.degenerate.tolist() == [[True, False, False], [False] * 3, [False] * 3]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 8)])
def test_rectangles_cover_each_true_cell_once(rng, shape):
    mask = rng.random(shape) < 0.5
    covered = np.zeros(shape, dtype=int)
    for top, bottom, left, right in rectangles(mask):
        covered[top:bottom, left:right] += 1
    assert np.array_equal(covered, mask.astype(int))


def test_a_fully_marked_grid_is_one_rectangle():
    assert list(rectangles(np.ones((64, 64), dtype=bool))) == [(0, 64, 0, 64)]


def test_an_untrained_update_gives_a_sentence_instead_of_a_picture(rng):
    trained = factories.low_rank_update(rng, 24, 24, 3, label="trained")
    zero = LowRankUpdate(name="q", A=trained.A, B=0 * trained.B, scale=1.0, label="fresh")
    ax = plot_similarity(subspace_similarity(zero, trained))
    assert [text.get_text() for text in ax.texts] == ["fresh:\nuntrained, no directions"]
    ax.figure.draw_without_rendering()


@pytest.mark.parametrize("name", ["$x_{", "a\nb", "层\U0001f600", "%s\\frac{", "x" * 300])
def test_names_cannot_break_a_drawing(rng, name):
    one = factories.low_rank_update(rng, 24, 24, 2, name=name, label=name)
    ax = plot_similarity(subspace_similarity(one, one))
    ax.figure.draw_without_rendering()
    assert len(ax.get_title()) <= 48


def test_given_axes_are_drawn_on_and_returned(rng):
    figure, ax = plt.subplots()
    assert plot_similarity(_grid(rng), ax) is ax
    assert plt.get_fignums() == [figure.number]


def test_the_users_settings_are_left_alone(rng):
    before = dict(plt.rcParams)
    plot_similarity(_grid(rng))
    figure_ranks({"q": _grid(rng)})
    assert dict(plt.rcParams) == before


def test_figure_of_ranks_shows_whole_grids_then_zooms_then_the_excess_of_both(rng):
    grids = {"ΔWq": _grid(rng, 4, 8), "ΔWv": _grid(rng, 4, 8)}
    figure = figure_ranks(grids, zoom=4)
    assert [ax.get_title() for ax in figure.axes[:4]] == [
        "ΔWq", "ΔWv", "ΔWq, j ≤ i", "ΔWv, j ≤ i",
    ]  # fmt: skip
    assert len(figure.axes) == 8  # chance 8/24 is visible
    assert [ax.images[0].get_array().shape for ax in figure.axes[:4]] == [(4, 8)] * 2 + [(4, 4)] * 2
    assert figure.axes[0].images[0].get_clim() == (0, 1)
    assert figure.axes[4].images[0].get_clim() == EXCESS_LIMITS
    assert figure.get_suptitle() == "φ(r3-s0, r5-s0, i, j), output directions of ΔW"


def test_small_chance_needs_no_second_row(rng):
    grids = {"q": _grid(rng, 2, 3, d=200)}
    assert len(figure_ranks(grids).axes) == 2
    assert len(figure_ranks(grids, excess=True).axes) == 4


def test_one_column_breaks_four_panels_in_two_rows(rng):
    grids = {"q": _grid(rng, d=200), "v": _grid(rng, d=200)}
    figure = figure_ranks(grids, width=3.3)
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 2)
    assert figure.get_figwidth() == 3.3


def test_figure_of_seeds_takes_its_headline_from_the_measured_panels(rng):
    random = _grid(rng, first="random", second="random")
    figure = figure_seeds({"ΔWq": _grid(rng), "random": random})
    assert [ax.get_title() for ax in figure.axes[:2]] == ["ΔWq", "random"]
    assert figure.get_suptitle().startswith("φ(r3-s0, r5-s0")


def test_the_color_bar_of_a_row_spans_the_chance_of_all_its_panels(rng):
    figure = figure_grid([[Panel(_grid(rng, d=200), "a"), Panel(_grid(rng, 2, 2, d=24), "b")]])
    (bar,) = [child for ax in figure.axes for child in ax.child_axes]
    (line,) = [line for line in bar.lines if line.get_label() == "random"]
    assert list(line.get_ydata()) == pytest.approx([1 / 200, 2 / 24])


def test_a_row_cannot_mix_two_color_scales(rng):
    grid = _grid(rng)
    with pytest.raises(InputError, match="one color bar"):
        figure_grid([[Panel(grid, "a"), Panel(grid, "b", excess=True)]])
    with pytest.raises(InputError, match="at least one panel"):
        figure_grid([])


def test_shorter_rows_leave_room_at_the_right(rng):
    panel = Panel(_grid(rng), "a")
    figure = figure_grid([[panel, panel], [panel]])
    assert [bool(ax.images) for ax in figure.axes] == [True, True, True, False]
    assert [len(ax.child_axes) for ax in figure.axes] == [0, 1, 0, 1]  # color bars
    figure.draw_without_rendering()
    widths = {round(ax.get_position().width, 6) for ax in figure.axes}
    assert len(widths) == 1


def test_panel_figures_stay_out_of_pyplot_and_show_themselves(rng):
    figure = figure_seeds({"q": _grid(rng)})
    assert plt.get_fignums() == []
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_factor_of_one_side_is_named(rng):
    one = factories.low_rank_update(rng, label="a")
    grid = subspace_similarity(spectrum(one, of="A"), spectrum(one, of="A"), side="input", of="A")
    assert figure_ranks({"q": grid}).get_suptitle() == "φ(a, a, i, j), input directions of A"
