from __future__ import annotations

import factories
import numpy as np
import pytest
from factories import group_analysis

from lora_analysis import LowRankUpdate, amplification
from lora_analysis.errors import InputError
from lora_analysis.plots import (
    new_axes,
    plot_amplification,
    plot_group,
    plot_levels,
    plot_spectrum,
)
from lora_analysis.plots import style as plot_style
from lora_analysis.plots.amplification import resolve_directions, resolve_ranks
from lora_analysis.plots.many_adapters import resolve_group
from lora_analysis.plots.module_values import resolve_levels
from lora_analysis.plots.spectrum import resolve_spectrum
from lora_analysis.spectra import spectrum


def _line(ax, label):
    (line,) = [line for line in ax.lines if line.get_label() == label]
    return line


def _spectrum(rng, rank=4, **options):
    return spectrum(factories.low_rank_update(rng, 80, 80, rank, **options))


def _deficient(rng):
    """Rank 4 given, 2 used."""
    U, V = (factories.orthonormal(rng, 30, 2) for _ in range(2))
    values = np.array([3.0, 1.0])
    A, B = np.vstack([V.T, V.T]), np.hstack([U * values, U * values])
    return spectrum(LowRankUpdate(name="q", A=A, B=B, scale=1.0, label="half"))


def _amplifications(rng, ranks=(2, 4), modules=3):
    W = {m: rng.standard_normal((24, 20)) for m in range(modules)}
    return [
        amplification(
            factories.low_rank_update(rng, rank=r, name=f"layers.{m}.q", label=f"r{r}"), W[m]
        )
        for r in ranks
        for m in W
    ]


# Spectra


def test_a_spectrum_is_drawn_over_i_from_one_on_a_log_axis(rng):
    one = _spectrum(rng, label="r4-s0")
    ax = plot_spectrum(one)
    line = _line(ax, "r4-s0")
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(line.get_ydata(), one.S)
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "singular value σᵢ of ΔW"


def test_normalized_spectra_start_at_one(rng):
    plot = resolve_spectrum([_spectrum(rng)], normalized=True)
    assert plot.curves[0].values[0] == 1
    assert plot.ylabel == "σᵢ / σ₁ of ΔW"


def test_energy_ends_at_one_on_a_linear_axis_with_guides(rng):
    one = _spectrum(rng)
    ax = plot_spectrum(one, energy=True)
    drawn = _line(ax, "adapter").get_ydata()
    np.testing.assert_allclose(drawn, np.cumsum(one.S**2) / np.sum(one.S**2))
    assert ax.get_yscale() == "linear"
    assert ax.get_ylim()[0] == 0
    assert {0.9, 0.99} <= {line.get_ydata()[0] for line in ax.lines}


def test_values_beyond_the_numerical_rank_are_hollow_and_do_not_stretch_the_axis(rng):
    plot = resolve_spectrum([_deficient(rng)])
    assert (plot.curves[0].numerical_rank, plot.curves[0].beyond_rank) == (2, 2)
    assert plot.limits[0] > 0.1
    ax = plot_spectrum(_deficient(rng))
    lost = _line(ax, "beyond numerical rank")
    assert list(lost.get_xdata()) == [3, 4]
    assert lost.get_markerfacecolor() == "#ffffff"  # as the axes
    assert lost.get_ydata() == pytest.approx([plot.limits[0]] * 2)
    assert [text.get_text() for text in ax.texts] == ["half\n2 of 4 above rounding"]


def test_an_untrained_update_is_named_and_not_drawn(rng):
    one = factories.low_rank_update(rng, label="$fresh")
    zero = spectrum(LowRankUpdate(name="q", A=one.A, B=0 * one.B, scale=1.0, label="$fresh"))
    ax = plot_spectrum(zero)
    assert not ax.lines
    assert ax.get_title(loc="left") == "untrained (ΔW = 0): $fresh"
    ax.figure.draw_without_rendering()


def test_very_different_ranks_get_a_log_axis_of_i(rng):
    assert resolve_spectrum([_spectrum(rng, 4), _spectrum(rng, 64)]).xscale == "log"
    assert resolve_spectrum([_spectrum(rng, 4), _spectrum(rng, 8)]).xscale == "linear"


def test_curves_are_told_apart_by_adapter_or_else_by_module(rng):
    adapters = [_spectrum(rng, label=f"runs/r{r}") for r in (4, 8)]
    assert [c.label for c in resolve_spectrum(adapters).curves] == ["r4", "r8"]
    modules = [_spectrum(rng, name=f"layers.{n}.q", label="same") for n in (1, 2)]
    assert [c.label for c in resolve_spectrum(modules).curves] == ["1.q", "2.q"]
    ax = plot_spectrum(adapters)
    assert [text.get_text() for text in ax.texts] == ["r4", "r8"]


def test_of_a_bundle_only_the_outermost_are_named(rng):
    many = [_spectrum(rng, name=f"layers.{n}.q", label="same") for n in range(12)]
    ax = plot_spectrum(many)
    ends = {f"{n}.q": s.S[-1] for n, s in enumerate(many)}
    assert [t.get_text() for t in ax.texts] == [min(ends, key=ends.get), max(ends, key=ends.get)]


def test_an_unknown_scale_is_said_on_the_axis_or_at_the_curve(rng):
    unknown, known = _spectrum(rng, scale=None, label="a"), _spectrum(rng, label="b")
    assert resolve_spectrum([unknown]).ylabel.endswith("of ΔW / scale")
    mixed = resolve_spectrum([unknown, known])
    assert [c.label for c in mixed.curves] == ["a / scale", "b"]
    assert [c.label for c in resolve_spectrum([unknown, known], normalized=True).curves] == [
        "a", "b",
    ]  # fmt: skip


def test_no_spectrum_is_refused():
    with pytest.raises(InputError, match="no spectrum"):
        plot_spectrum([])


# Amplification


@pytest.mark.parametrize("value", ["amplification_factor", "enrichment"])
def test_one_amplification_is_drawn_over_k_with_chance(rng, value):
    (item,) = _amplifications(rng, ranks=(4,), modules=1)
    ax = plot_amplification(item, value=value)
    chance = item.chance_factor if value == "amplification_factor" else np.ones(4)
    np.testing.assert_array_equal(_line(ax, "ΔW").get_ydata(), getattr(item, value))
    np.testing.assert_array_equal(_line(ax, "random directions").get_ydata(), chance)
    np.testing.assert_array_equal(_line(ax, "ΔW").get_xdata(), [1, 2, 3, 4])
    assert ax.get_yscale() == "log"
    assert ax.get_title() == "layers.0.q · r4"


def test_the_band_is_one_spread_of_random_directions(rng):
    (item,) = _amplifications(rng, ranks=(4,), modules=1)
    random = item.random
    band = resolve_directions(item, value="enrichment").band
    np.testing.assert_allclose(band[:, 0], (random.mean - random.spread) / random.rms)
    np.testing.assert_allclose(band[:, 1], (random.mean + random.spread) / random.rms)
    factors = resolve_directions(item).band
    np.testing.assert_allclose(factors, item.chance_factor[:, None] / band[:, ::-1])


def test_by_rank_each_module_is_a_point_at_its_last_k(rng):
    items = _amplifications(rng)
    plot = resolve_ranks(items)
    assert plot.ranks == (2, 4)
    expected = [item.amplification_factor[-1] for item in items]
    np.testing.assert_array_equal(plot.measured[0].values, expected[:3])
    np.testing.assert_array_equal(plot.measured[1].values, expected[3:])
    np.testing.assert_array_equal(
        plot.chance[1].values, [item.chance_factor[-1] for item in items[3:]]
    )
    assert plot.measured[0].median == np.median(expected[:3])


def test_the_plot_by_rank_writes_medians_and_ranks(rng):
    items = _amplifications(rng)
    ax = plot_amplification(items, value="enrichment")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "4"]
    medians = [np.median([i.enrichment[-1] for i in items[at : at + 3]]) for at in (0, 3)]
    written = [text.get_text() for text in ax.texts]
    assert {f"{m:.2f}" for m in medians} <= set(written)
    assert any(np.array_equal(line.get_ydata(), [1, 1]) for line in ax.lines)


def test_ranks_can_be_given_where_the_numerical_rank_is_another(rng):
    items = _amplifications(rng)
    assert resolve_ranks(items, ranks=[8] * 6).ranks == (8,)
    with pytest.raises(InputError, match="2 ranks for 6"):
        plot_amplification(items, ranks=[8, 8])


def test_values_that_are_not_finite_are_counted_below_the_axis(rng):
    items = _amplifications(rng, ranks=(2,), modules=2)
    empty = factories.low_rank_update(rng, rank=2)
    silent = amplification(empty, np.zeros(empty.shape))
    ax = plot_amplification([*items, silent])
    assert ax.get_xlabel().endswith("1 of 3 values are not finite and not drawn")
    ax.figure.draw_without_rendering()


def test_an_amplification_without_draws_has_no_band_and_still_draws(rng):
    update = factories.low_rank_update(rng)
    item = amplification(update, rng.standard_normal(update.shape), draws=0)
    for shown in (item, [item]):
        plot_amplification(shown).figure.draw_without_rendering()


def test_bad_requests_for_amplification_are_refused(rng):
    with pytest.raises(InputError, match="no amplification"):
        plot_amplification([])
    with pytest.raises(InputError, match="'projected'"):
        plot_amplification(_amplifications(rng), value="projected")


# Levels


def test_levels_draw_every_value_the_median_and_chance(rng):
    values = {"same task": rng.random(9), "other task (reference)": 0.1 * rng.random(20)}
    ax = plot_levels(values, 1 / 192)
    for collection, drawn in zip(ax.collections, values.values(), strict=True):
        np.testing.assert_array_equal(collection.get_offsets()[:, 0], drawn)
    assert any(line.get_xdata() == [1 / 192, 1 / 192] for line in ax.lines)
    written = [text.get_text() for text in ax.texts]
    assert "same task  (n = 9)" in written
    assert "random 0.0052" in written
    assert f"{np.median(values['same task']):.2f}" in written
    assert f"{np.median(values['other task (reference)']):.3f}" in written
    assert ax.get_xlim() == (0, 1)


def test_the_first_group_stands_on_top_and_groups_do_not_overlap(rng):
    plot = resolve_levels({"a": rng.random(300), "b": [0.5]}, 0.1)
    assert plot.heights == (1, 0)
    ax = plot_levels({"a": rng.random(300), "b": [0.5]}, 0.1)
    offsets = ax.collections[0].get_offsets()[:, 1]
    assert abs(offsets - 1).max() <= 0.2 + 1e-9


def test_levels_count_what_is_not_finite_and_survive_an_empty_group():
    plot = resolve_levels({"a": [0.2, np.nan], "b": []}, 0.1)
    assert plot.note == "1 of 2 values are not finite and not drawn"
    assert np.isnan(plot.groups[1].median)
    plot_levels({"a": [0.2, np.nan], "$b": []}, 0.1).figure.draw_without_rendering()


def test_levels_without_groups_are_refused():
    with pytest.raises(InputError, match="no group"):
        plot_levels({}, 0.1)


# Style


@pytest.mark.parametrize(
    ("n", "at_most", "expected"),
    [
        (0, 9, []),
        (1, 9, [1]),
        (8, 9, [1, 2, 3, 4, 5, 6, 7, 8]),
        (10, 9, [1, 4, 6, 8, 10]),
        (64, 9, [1, 8, 16, 24, 32, 40, 48, 56, 64]),
        (64, 6, [1, 16, 32, 48, 64]),
    ],
)
def test_ticks_count_from_one_in_round_steps(n, at_most, expected):
    assert list(plot_style.count_ticks(n, at_most)) == expected


def test_labels_are_pushed_apart_and_keep_their_order():
    placed = plot_style.spread_apart([0.5, 0.5, 0.1], 0.1, (0, 1))
    assert sorted(np.diff(sorted(placed)))[0] >= 0.1 - 1e-6
    assert placed[2] == pytest.approx(0.1)


def test_long_names_keep_their_end():
    assert plot_style.drawable_text("model.layers.0.self_attn.q_proj", 10) == "…tn.q_proj"


def test_axes_for_programs_do_not_enter_pyplot():
    import matplotlib.pyplot as plt

    ax = plot_levels({"a": [0.5]}, 0.1, new_axes(3.3, 1.2))
    assert plt.get_fignums() == []
    assert ax.figure.get_size_inches() == pytest.approx([3.3, 1.2])


# Groups


def test_a_group_is_drawn_as_two_lines_over_both_nulls(rng):
    members, others = (
        [
            factories.adapter(rng, label=f"{name}{n}", d_out=40, d_in=40, rank=2)
            for n in range(count)
        ]
        for name, count in (("m", 8), ("o", 3))
    )
    analysis = group_analysis(members, others)
    plot = resolve_group(analysis, part="output")
    mean, output = (analysis.parts.index(part) for part in ("mean", "output"))
    ax = plot_group(analysis, part="output")
    assert ax.get_xscale() == "log"
    for line, part in zip(ax.lines, (mean, output), strict=False):
        np.testing.assert_array_equal(line.get_xdata(), analysis.sizes)
        np.testing.assert_array_equal(line.get_ydata(), analysis.shares[part])
    np.testing.assert_array_equal(ax.lines[2].get_ydata(), analysis.expected_mean)
    np.testing.assert_array_equal(plot.parts[1].others, analysis.others_range[:, output])
    np.testing.assert_allclose(plot.parts[1].random[1, -1], analysis.chance_limit[output])
    assert [text.get_text() for text in ax.texts] == ["mean", "2 directions,\noutput side"]
    assert list(ax.get_xticks()) == [2, 4, 7]
    assert len(ax.collections) == 4  # two nulls of two parts
    assert resolve_group(group_analysis(members)).limits[1] < 1
    with pytest.raises(InputError, match="part must be one of matrices"):
        plot_group(analysis, part="mean")
