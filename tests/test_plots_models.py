from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from factories import adapter, low_rank_update

from lora_analysis import plots
from lora_analysis.adapter import Adapter
from lora_analysis.amplify import weight_basis_energy
from lora_analysis.errors import InputError
from lora_analysis.intruders import intruder_dimensions
from lora_analysis.patterns import NO_TYPE
from lora_analysis.plots.curves import resolve_layers, resolve_weight_energy
from lora_analysis.plots.many_adapters import resolve_clustermap
from lora_analysis.plots.maps import resolve_intruders, resolve_module_map
from lora_analysis.similarity import subspace_similarity
from lora_analysis.spectra import weight_svd
from lora_analysis.studies import study


def test_a_map_has_layers_across_and_types_down() -> None:
    values = {f"layers.{n}.{kind}": n + (kind == "v") / 10 for n in (0, 2, 10) for kind in "qv"}
    plot = resolve_module_map(values | {"layers.1.v": float("nan")}, limits=(0, 11))
    assert plot.kinds == ("q", "v")
    assert plot.layers == (0, 1, 2, 10)
    np.testing.assert_array_equal(plot.data[1], [0.1, np.nan, 2.1, 10.1])
    assert np.isnan(plot.data[0, 1])


def test_experts_of_one_layer_count_as_their_median() -> None:
    values = {f"layers.0.experts.{n}.w1": float(n) for n in (1, 2, 9)}
    assert resolve_module_map(values).data.tolist() == [[2.0]]


def test_a_map_draws_what_it_resolved() -> None:
    axes = plots.plot_module_map({"layers.0.q": 0.25, "layers.1.$v": 0.5}, plots.new_axes())
    drawn = np.asarray(axes.images[0].get_array())
    assert np.nanmax(drawn) == 0.5
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "$v"]
    axes.figure.canvas.draw()


def test_maps_share_a_figure(rng: np.random.Generator) -> None:
    one = resolve_module_map({"layers.0.q": 0.1, "layers.1.q": 0.9}, label="φ")
    figure = plots.figure_module_maps([[one, one], [one, one]])
    assert sum(bool(ax.images) for ax in figure.axes) == 4
    with pytest.raises(InputError, match="at least one map"):
        plots.figure_module_maps([[]])


def test_layers_are_lines_by_type_with_chance() -> None:
    values = {f"layers.{n}.{kind}": n + 1.0 for n in range(3) for kind in "qv"}
    plot = resolve_layers(pd.Series(values), ylabel="enrichment", chance=1.0, log=True)
    assert [line.label for line in plot.lines] == ["q", "v"]
    assert plot.chance == 1.0
    gray = resolve_layers(values, ylabel="x", chance=dict.fromkeys(values, 2.0)).lines[-1]
    assert gray.label == "random directions"
    assert gray.y.tolist() == [2.0, 2.0, 2.0]
    axes = plots.plot_layers(values, plots.new_axes(), chance=1.0, log=True)
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["q", "v"]


def test_modules_named_by_numbers_alone_are_one_row() -> None:
    plot = resolve_module_map({f"{n:03}": n / 10 for n in range(4)})
    assert plot.kinds == (NO_TYPE,)
    assert plot.layers == (0, 1, 2, 3)
    np.testing.assert_allclose(plot.data, [[0, 0.1, 0.2, 0.3]])


def test_the_energy_in_w_is_drawn_with_its_chance(rng: np.random.Generator) -> None:
    W = rng.standard_normal((24, 20))
    found = weight_basis_energy(low_rank_update(rng), weight_svd(W, cache=False))
    plot = resolve_weight_energy([found], side="input")
    np.testing.assert_allclose(plot.chance, np.arange(1, 21) / 20)
    np.testing.assert_allclose(plot.lines[0].y, found.sides["input"].leading)
    assert (plot.bound >= plot.chance - 1e-9).all()
    axes = plots.plot_weight_energy(found, plots.new_axes(), side="input")
    assert axes.get_ylim() == (0, 1.02)


def test_weights_of_several_sizes_do_not_share_an_axis(rng: np.random.Generator) -> None:
    found = [
        weight_basis_energy(
            low_rank_update(rng, d_out=d), weight_svd(rng.standard_normal((d, 20)), cache=False)
        )
        for d in (24, 28)
    ]
    with pytest.raises(InputError, match="2 sizes"):
        plots.plot_weight_energy(found)


def test_intruders_carry_a_dot(rng: np.random.Generator) -> None:
    W = np.diag(np.linspace(5, 1, 30))
    update = low_rank_update(rng, d_out=30, d_in=30, rank=2, scale=10.0)
    report = intruder_dimensions(update, W)
    plot = resolve_intruders([report])
    assert plot.intruder.sum() == report.count("output") > 0
    axes = plots.plot_intruders([report], plots.new_axes())
    dots = axes.collections[0].get_offsets()
    assert len(dots) == report.count("output")


def test_the_similarity_matrix_is_drawn_in_the_order_of_its_tree(rng: np.random.Generator) -> None:
    similarity_matrix = study([adapter(rng, label=f"a$ {n}") for n in range(5)]).similarity_matrix
    assert similarity_matrix is not None
    plot = resolve_clustermap(similarity_matrix)
    order = similarity_matrix.order()
    np.testing.assert_array_equal(
        plot.data, similarity_matrix.matrix("output")[np.ix_(order, order)]
    )
    leaves = plot.branches[..., 0][plot.branches[..., 1] == 0]
    assert sorted(leaves) == [0, 1, 2, 3, 4]
    for corners in plot.branches:  # every join goes up, over and down again
        assert corners[1, 1] == corners[2, 1] >= max(corners[0, 1], corners[3, 1])
    for what in ("output", "input", "cosine"):
        axes = plots.plot_clustermap(similarity_matrix, plots.new_axes(), what=what)
        assert axes.images[0].get_array().shape == (5, 5)
        axes.figure.canvas.draw()


def test_untrained_adapters_stand_outside_the_tree(rng: np.random.Generator) -> None:
    def empty(label: str) -> Adapter:
        whole = adapter(rng, label=label)
        updates = {name: replace(one, B=np.zeros_like(one.B)) for name, one in whole.items()}
        return Adapter(updates, label=label)

    trained = [adapter(rng, label=f"t{n}") for n in range(3)]
    mixed = study([empty("one"), trained[0], empty("two"), *trained[1:]]).similarity_matrix
    alone = study(trained).similarity_matrix
    assert mixed is not None
    assert alone is not None
    np.testing.assert_allclose(mixed.linkage(), alone.linkage())
    plot, expected = resolve_clustermap(mixed), resolve_clustermap(alone)
    assert plot.labels == (*expected.labels, "one (untrained)", "two (untrained)")
    np.testing.assert_allclose(plot.branches, expected.branches)
    np.testing.assert_allclose(plot.data[:3, :3], expected.data)
    assert np.isnan(plot.data[3:]).all()
    few = study([empty("one"), trained[0], empty("two")]).similarity_matrix
    assert few is not None
    assert resolve_clustermap(few).branches.shape == (0, 4, 2)
    plots.plot_clustermap(few, plots.new_axes())


def test_two_adapters_have_an_similarity_matrix_and_one_has_none(rng: np.random.Generator) -> None:
    two = study([adapter(rng, label="a"), adapter(rng, label="b")]).similarity_matrix
    assert two is not None
    assert resolve_clustermap(two).branches.shape == (1, 4, 2)
    one = study([adapter(rng)]).similarity_matrix
    assert one is not None
    with pytest.raises(InputError, match="at least two adapters"):
        plots.plot_clustermap(one)


def test_steps_are_sorted_and_named() -> None:
    series = {"a": ([200, 100], [1.0, 0.5]), "b": ([100, 200], [0.2, 1.0])}
    axes = plots.plot_trajectories(series, plots.new_axes(), chance=0.1)
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in lines] == [[0.5, 1.0], [0.2, 1.0]]
    assert [text.get_text() for text in axes.texts] == ["a", "b"]


def test_a_budget_has_thousands_on_its_axis() -> None:
    curves = {"best": ([1000, 2000, 40_000], [0.9, 0.5, 0.0])}
    axes = plots.plot_budget(curves, plots.new_axes())
    axes.figure.canvas.draw()
    assert "10k" in [label.get_text() for label in axes.get_xticklabels()]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.plot_module_map({}),
        lambda: plots.plot_layers({}),
        lambda: plots.plot_weight_energy([]),
        lambda: plots.plot_intruders([]),
        lambda: plots.plot_trajectories({}),
        lambda: plots.plot_budget({}),
    ],
)
def test_nothing_to_draw_is_an_error(draw: object) -> None:
    with pytest.raises(InputError, match="was given no"):
        draw()  # type: ignore[operator]


def test_layers_below_each_other_as_in_figure_6(rng: np.random.Generator) -> None:
    a, b = low_rank_update(rng, label="a"), low_rank_update(rng, rank=6, label="b")
    grids = {"ΔWq": subspace_similarity(a, b)}
    figure = plots.figure_layers({"layer 1": grids, "layer 2": grids}, zoom=3)
    titles = [ax.get_title() for ax in figure.axes if ax.images and ax.get_title()]
    assert titles == [f"ΔWq, layer {n}{end}" for n in (1, 2) for end in ("", ", j ≤ i")]
    alone = plots.figure_layers({"layer 1": grids}, zoom=None)
    assert len([ax for ax in alone.axes if ax.images and ax.get_title()]) == 1


def test_many_points_are_one_picture(rng: np.random.Generator) -> None:
    few = plots.plot_levels({"a": rng.random(10)}, 0.1, plots.new_axes()).figure
    many = plots.plot_levels({"a": rng.random(5000)}, 0.1, plots.new_axes()).figure
    texts = [plots.svg_text(one, title="t", description="d") for one in (few, many)]
    assert "<image" not in texts[0]
    assert "<image" in texts[1]
    assert len(texts[1]) < 100_000


def test_new_figures_are_the_same_bytes_each_time(rng: np.random.Generator, tmp_path: Path) -> None:
    similarity_matrix = study([adapter(rng, label=str(n)) for n in range(4)]).similarity_matrix
    assert similarity_matrix is not None
    for kind in ("svg", "pdf"):
        both = []
        for n in (0, 1):
            figure = plots.plot_clustermap(similarity_matrix, plots.new_axes()).figure
            (path,) = plots.save_figure(figure, tmp_path / f"{kind}{n}", (kind,))
            both.append(path.read_bytes())
        assert both[0] == both[1]
