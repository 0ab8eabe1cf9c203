from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import factories
import matplotlib as mpl
import pytest

from lora_analysis.errors import InputError
from lora_analysis.plots import (
    figure_seeds,
    plot_levels,
    plot_similarity,
    save_figure,
    style,
    svg_text,
)
from lora_analysis.similarity import subspace_similarity

SVG = "{http://www.w3.org/2000/svg}"


def _figure(rng, label="r4"):
    one = factories.low_rank_update(rng, label=label)
    return figure_seeds({"ΔWq": subspace_similarity(one, one)})


def _small_figure(label="same task"):
    return plot_levels({label: [0.1, 0.5]}, 0.1).figure


def _ids(text):
    return set(re.findall(r'\bid="([^"]+)"', text))


def test_files_are_written_beside_each_other_and_folders_made(tmp_path):
    written = save_figure(_small_figure(), tmp_path / "new" / "fig.3", ("svg", "png", "pdf"))
    assert [path.name for path in written] == ["fig.3.svg", "fig.3.png", "fig.3.pdf"]
    starts = [path.read_bytes()[:5] for path in written]
    assert starts == [b"<?xml", b"\x89PNG\r", b"%PDF-"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in written)


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"gif.*svg, png, pdf"):
        save_figure(_small_figure(), tmp_path / "x", ("svg", "gif"))
    assert list(tmp_path.iterdir()) == []


def test_the_same_numbers_give_the_same_bytes(rng, tmp_path):
    update = factories.low_rank_update(rng)
    grid = subspace_similarity(update, update)
    kinds = ("svg", "pdf")
    first = save_figure(plot_similarity(grid).figure, tmp_path / "a", kinds)
    figure = plot_similarity(grid).figure
    second = save_figure(figure, tmp_path / "b", kinds)
    (again,) = save_figure(figure, tmp_path / "c", ("svg",))
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert again.read_bytes() == first[0].read_bytes()


def test_files_hold_no_date_and_outlined_text(rng, tmp_path):
    (path,) = save_figure(_figure(rng), tmp_path / "x", ("svg",))
    text = path.read_text(encoding="utf-8")
    assert "<dc:date>" not in text
    assert "<text" not in text


def test_inline_svg_is_one_element_with_title_and_description(rng):
    text = svg_text(_figure(rng), title="Seeds & <tags>", description="φ(1, 1) is 1.\x00")
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    title, desc = root[0], root[1]
    assert (title.tag, title.text) == (f"{SVG}title", "Seeds & <tags>")
    assert (desc.tag, desc.text) == (f"{SVG}desc", "φ(1, 1) is 1.\N{REPLACEMENT CHARACTER}")
    assert root.get("aria-labelledby").split() == [title.get("id"), desc.get("id")]
    assert text.startswith("<svg")


def test_inline_svg_reaches_nothing_outside_itself(rng):
    text = svg_text(_figure(rng, label="http://elsewhere/$x"), title="t", description="d")
    root = ET.fromstring(text)
    tags = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert not tags & {"script", "style", "metadata", "foreignObject", "a"}
    ids = _ids(text)
    for element in root.iter():
        for key, value in element.attrib.items():
            assert not key.startswith("on")
            if key == "href":
                assert value.startswith("data:image/png;base64,") or value[1:] in ids
            for target in re.findall(r"url\(#([^)]+)\)", value):
                assert target in ids


def test_text_in_inline_svg_can_be_read_and_selected(rng):
    text = svg_text(_figure(rng), title="t", description="d")
    assert {"ΔWq", "φ(i, j)"} <= {
        element.text for element in ET.fromstring(text).iter(f"{SVG}text")
    }


def test_ids_of_two_inline_figures_do_not_clash():
    one = svg_text(_small_figure(), title="one", description="d")
    two = svg_text(_small_figure(), title="two", description="d")
    assert _ids(one)
    assert not _ids(one) & _ids(two)
    named = svg_text(_small_figure(), title="t", description="d", prefix="fig1-")
    assert all(name.startswith("fig1-") for name in _ids(named))


def test_inline_svg_is_the_same_on_every_call():
    figure = _small_figure()
    first = svg_text(figure, title="t", description="d")
    assert svg_text(figure, title="t", description="d") == first


def test_a_backend_that_turns_interactive_mode_on_keeps_it_on() -> None:
    before = mpl.is_interactive()
    try:
        mpl.interactive(False)
        with style.house_style():
            mpl.interactive(True)  # what a notebook's backend does when its first figure is made
        assert mpl.is_interactive()
    finally:
        mpl.interactive(before)
