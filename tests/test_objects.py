"""Public functions take live objects and arrays, and give what they give for values and files."""

from __future__ import annotations

import base64
import inspect
import pickle
import pkgutil
import re
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from factories import adapter, group_analysis, low_rank_update
from torch import nn

import lora_analysis as la
from lora_analysis.amplify import weight_basis_energy
from lora_analysis.errors import BaseWeightError, InputError
from lora_analysis.pairwise import pairwise
from lora_analysis.results import ByModule
from lora_analysis.similarity import chordal_distance, random_similarity
from lora_analysis.spectra import weight_svd
from lora_analysis.studies import StudySpec
from lora_analysis.weight_changes import magnitude_direction


@pytest.fixture
def peft() -> Any:
    """Return a model with PEFT's layers, two adapters of which one is active."""
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layers = {
        f"layer{i}": nn.ModuleDict({"q": nn.Linear(12, 10), "v": nn.Linear(12, 8)}) for i in (0, 1)
    }
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q", "v"])
    model = get_peft_model(nn.ModuleDict(layers), config, adapter_name="first")
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=4, target_modules=["q", "v"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def factors(update: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    A, B = (torch.tensor(factor, requires_grad=True) for factor in (update.A, update.B))
    return A, B, update.scale


def test_measures_of_factors_and_tensors_are_those_of_updates(rng: np.random.Generator) -> None:
    a, b = (low_rank_update(rng, rank=r) for r in (2, 3))
    for measure, arguments in (
        (la.energy_overlap, {}),
        (la.signed_cosine, {}),
        (chordal_distance, {"side": "output", "k": 2}),
        (la.principal_angles, {"side": "input", "k": 2}),
    ):
        expected = measure(a, b, **arguments)
        np.testing.assert_array_equal(measure(factors(a), factors(b), **arguments), expected)
        dense = torch.tensor(a.delta_weight())
        np.testing.assert_allclose(measure(dense, factors(b), **arguments), expected, atol=1e-7)
    grid = la.subspace_similarity(factors(a), factors(b))
    np.testing.assert_array_equal(grid.values, la.subspace_similarity(a, b).values)
    np.testing.assert_array_equal(la.singular_values(factors(a)), la.singular_values(a))
    np.testing.assert_array_equal(la.spectrum(factors(a)).S, la.spectrum(a).S)
    np.testing.assert_array_equal(la.truncate(factors(a), rank=1)[0].B, la.truncate(a, rank=1)[0].B)


def test_measures_of_two_adapters_are_a_mapping_by_module(
    peft: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    first, second = (la.as_adapter(peft, adapter_name=name) for name in ("first", "second"))
    grids = la.subspace_similarity(peft, second, side="input")
    assert list(grids) == list(first)
    for name in first:
        expected = la.subspace_similarity(first[name], second[name], side="input")
        np.testing.assert_array_equal(grids[name].values, expected.values)
    omegas = la.energy_overlap(peft, la.write_adapter(second, tmp_path / "second"))
    assert omegas == {name: la.energy_overlap(first[name], second[name]) for name in first}
    angles = la.principal_angles(first, second, side="output", k=1)
    assert angles.to_frame()["value"].tolist() == [float(angles[name][0]) for name in first]
    assert list(omegas.to_frame().columns) == ["module", "value"]
    table = grids.to_frame()
    assert len(table) == sum(grid.values.size for grid in grids.values())
    assert repr(grids) == "<4 modules of first and second: SimilarityGrid>"
    assert "layer0.q" in grids._repr_html_()
    spectra = la.spectrum(peft)
    assert isinstance(spectra, ByModule)
    np.testing.assert_array_equal(spectra["layer1.v"].S, la.spectrum(first["layer1.v"]).S)
    assert la.singular_values(peft).keys() == first.keys()
    with pytest.raises(InputError, match="An adapter and a single update cannot be compared"):
        la.energy_overlap(first, second["layer0.q"])
    with pytest.raises(InputError, match=r"have no module in common: the first has 'layer0.q'"):
        la.energy_overlap(first, {"other": second["layer0.q"]})


def test_adapters_of_one_label_are_told_apart(rng: np.random.Generator) -> None:
    update = low_rank_update(rng)
    grids = la.subspace_similarity({"q": update}, {"q": update})
    assert grids["q"].labels == ("adapter", "adapter (2)")


class Conv1D(nn.Module):
    """As transformers has it: the weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_every_kind_are_those_of_their_array(
    peft: Any, rng: np.random.Generator, dtype: torch.dtype
) -> None:
    update = low_rank_update(rng, d_out=10, d_in=12)
    linear = nn.Linear(12, 10).to(dtype)
    W = linear.weight.detach().float().numpy()
    conv1d, table, conv = Conv1D(10, 12), nn.Embedding(12, 10), nn.Conv2d(3, 10, 2)
    with torch.no_grad():
        conv1d.weight.copy_(torch.tensor(W.T))
        table.weight.copy_(torch.tensor(W.T))
        conv.weight.copy_(torch.tensor(W).reshape(10, 3, 2, 2))
    wrapped = peft.base_model.model["layer0"]["q"]
    wrapped.base_layer.weight.data = linear.weight.data
    expected = la.amplification(update, W)
    counts = la.intruder_dimensions(update, W, k=3)
    for form in (linear, linear.weight, conv1d, table, conv, wrapped):
        weight = la.as_weight(form)
        assert weight.shape == (10, 12)
        np.testing.assert_array_equal(weight.array(), W)  # type: ignore[union-attr]
        result = la.amplification(factors(update), form)
        np.testing.assert_allclose(result.enrichment, expected.enrichment, rtol=1e-6)
        np.testing.assert_allclose(
            la.intruder_dimensions(factors(update), form, k=3).sides["input"].max_cosine,
            counts.sides["input"].max_cosine,
            rtol=1e-5,
        )
    assert la.as_weight(W) is W


def test_what_is_no_weight_is_refused_with_what_is(peft: Any) -> None:
    for form in (3, np.ones(4), torch.ones(4), "path", torch.ones(2, 2, dtype=torch.int8)):
        with pytest.raises(InputError, match=r"No base weight can be made of .* Accepted: a float"):
            la.as_weight(form)
    with pytest.raises(InputError, match="A LayerNorm has no weight that is a matrix"):
        la.as_weight(nn.LayerNorm(3))
    with pytest.raises(BaseWeightError, match="meta device"):
        la.as_weight(nn.Linear(3, 3, device="meta"))
    with pytest.raises(BaseWeightError, match="not finite"):
        la.as_weight(torch.full((2, 2), torch.nan)).array()  # type: ignore[union-attr]
    peft.merge_adapter()
    with pytest.raises(BaseWeightError, match="an adapter is merged into the weight"):
        la.as_weight(peft.base_model.model["layer0"]["q"])


def test_a_study_takes_models_files_and_mappings(
    peft: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    second = la.as_adapter(peft, adapter_name="second")
    path = la.write_adapter(second, tmp_path / "second")
    references = [{name: low_rank_update(rng, *second[name].shape, name=name) for name in second}]
    live = la.study([peft, path], base=peft, reference=references)
    values = la.study([la.as_adapter(peft), second], base=la.open_base(peft), reference=references)
    assert list(live.adapters) == ["first", "second", "adapter"]
    pd.testing.assert_frame_equal(live.spectra, values.spectra)
    pd.testing.assert_frame_equal(live.pairs, values.pairs)
    assert len(live.amplifications)
    with pytest.raises(InputError, match="PeftModel is in memory: with an executor"):
        StudySpec((path, peft)).check_sources()
    with pytest.raises(InputError, match="The base PeftModel is open already"):
        StudySpec((path,), base=peft).check_sources()
    assert list(la.study(peft).adapters) == ["first"]
    assert list(la.study(str(path)).adapters) == ["second"]


def test_editing_and_writing_take_a_live_model(peft: Any, tmp_path: Path) -> None:
    first = la.as_adapter(peft)
    resized = la.resize_adapter(peft, rank=1)
    for name in first:
        np.testing.assert_array_equal(
            resized.adapter[name].delta_weight(),
            la.resize_adapter(first, rank=1).adapter[name].delta_weight(),
        )
    assert list(resized.to_frame()["rank"]) == [1] * 4
    assert repr(resized).startswith("<ResizedAdapter 'first': 4 modules")
    stored = la.read_adapter(la.write_adapter(peft, tmp_path / "out"))
    np.testing.assert_array_equal(stored["layer0.q"].A, first["layer0.q"].A)
    assert len(la.without_subspace(peft, la.as_adapter(peft, adapter_name="second"))) == 4
    assert len(la.without_directions(peft, {"layer0.q": [1]})) == 4


def test_pairs_take_live_models(peft: Any) -> None:
    second = la.as_adapter(peft, adapter_name="second")
    pairs = pairwise([peft, second])
    assert pairs.labels == ("first", "second")
    table = pairs.to_frame()
    assert len(table) == 4 * 2
    row = table.query("module == 'layer0.q' and side == 'output'").iloc[0]
    assert row["omega"] == pytest.approx(la.energy_overlap(peft, second)["layer0.q"])


def test_a_report_is_written_of_a_list_of_anything(peft: Any, tmp_path: Path) -> None:
    second = la.as_adapter(peft, adapter_name="second")
    path = la.write_report([peft, dict(second)], tmp_path / "out", form="md", figures=())
    assert "first" in path.read_text(encoding="utf-8")


def test_heat_maps_take_updates_and_plain_values(rng: np.random.Generator) -> None:
    a, b = (low_rank_update(rng, rank=r) for r in (2, 3))
    expected = la.subspace_similarity(a, b, side="input").values
    image = la.plot_similarity(factors(a), b, side="input").images[0]
    np.testing.assert_array_equal(image.get_array(), expected)
    _, ax = plt.subplots()
    assert la.plot_similarity(expected, ax) is ax
    np.testing.assert_array_equal(ax.images[0].get_array(), expected)
    np.testing.assert_array_equal(
        la.plot_similarity({"q": a}, {"q": b}, side="input").images[0].get_array(), expected
    )
    with pytest.raises(InputError, match=r"A heat map shows one module, but .* have 2 in common"):
        la.plot_similarity({"q": a, "v": a}, {"q": b, "v": b})
    with pytest.raises(InputError, match="cannot be drawn of a dict"):
        la.plot_similarity({"q": a})


def test_spectra_are_drawn_of_updates_adapters_and_arrays(rng: np.random.Generator) -> None:
    update = low_rank_update(rng, rank=3)
    S = la.spectrum(update).S
    for form in (update, factors(update), S, torch.tensor(S[::-1].copy()), [update], {"q": update}):
        line = la.plot_spectrum(form).lines[0]
        np.testing.assert_allclose(line.get_ydata(), S)
    two = [update, la.truncate(update, rank=2)[0]]
    assert len(la.plot_spectrum(two).lines) == 4  # each has a dot at its end
    with pytest.raises(InputError, match="non-negative"):
        la.plot_spectrum(np.array([1.0, -1.0]))


def results(rng: np.random.Generator) -> dict[str, Any]:
    """Return one result of every public kind."""
    a, b = (low_rank_update(rng, rank=r, d_out=10, d_in=12) for r in (2, 3))
    W = rng.standard_normal((10, 12))
    spectra = [la.spectrum(update) for update in (a, b)]
    first, second = adapter(rng, label="a"), adapter(rng, label="b")
    return {
        "update": a,
        "dense": la.as_update(W),
        "grid": la.subspace_similarity(a, b),
        "spectrum": spectra[0],
        "amplification": la.amplification(a, W, unrelated=[b], through_weight=2),
        "intruders": la.intruder_dimensions(a, W, k=3),
        "energy": weight_basis_energy(a, weight_svd(W)),
        "changes": magnitude_direction(a, W),
        "truncation": la.truncate(a, rank=1)[1],
        "resized": la.resize_adapter(first, rank=1),
        "by module": la.energy_overlap(first, second),
        "grids": la.subspace_similarity(first, second),
        "pairwise": pairwise([first, second]),
        "group": group_analysis([first, second, adapter(rng, label="c")]),
        "matrix": la.study([first, second]).similarity_matrix,
    }


def test_every_result_survives_pickling_and_fits_on_a_line(rng: np.random.Generator) -> None:
    for name, result in results(rng).items():
        text = repr(result)
        assert "\n" not in text, name
        assert name == "changes" or len(text) < 600, (name, text)
        restored = pickle.loads(pickle.dumps(result))
        assert repr(restored) == text, name
        if hasattr(result, "to_frame"):
            pd.testing.assert_frame_equal(restored.to_frame(), result.to_frame())


TABLES = ("grid", "spectrum", "amplification", "intruders", "energy", "resized", "by module",
          "grids", "pairwise", "group", "matrix")  # fmt: skip


def test_results_that_are_tables_have_a_frame(rng: np.random.Generator) -> None:
    everything = results(rng)
    for name in TABLES:
        assert len(everything[name].to_frame()), name
    grid, spectral = everything["grid"], everything["spectrum"]
    table = grid.to_frame().set_index(["i", "j"])
    assert table.loc[(2, 3), "phi"] == grid.at(2, 3)
    assert spectral.to_frame()["sigma"].tolist() == spectral.S.tolist()
    intruders = everything["intruders"]
    assert intruders.to_frame().query("side == 'input'")["intruder"].sum() == intruders.count(
        "input"
    )
    amplified = everything["amplification"]
    assert amplified.to_frame()["enrichment"].iloc[-1] == amplified.enrichment[-1]


def test_grids_and_spectra_show_a_small_picture_without_matplotlib(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = random_similarity(512, (64, 64))
    image = plt.imread(
        BytesIO(base64.b64decode(re.findall('base64,([^"]+)', big._repr_html_())[0]))
    )
    assert image.shape[:2] == (64, 64)
    expected = plt.get_cmap("viridis")(big.values)[..., :3]
    assert np.abs(image[..., :3] - expected).max() < 0.03
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for result in (big, la.spectrum(low_rank_update(rng, rank=64, d_out=80, d_in=90))):
        html = result._repr_html_()
        assert "<svg" in html
        assert len(html) < 30_000
    update = low_rank_update(rng)
    untrained = replace(update, B=np.zeros((24, 4)))
    assert "<svg" not in la.subspace_similarity(untrained, update)._repr_html_()
    assert "<svg" not in la.spectrum(untrained)._repr_html_()
    hostile = la.LowRankUpdate("q", np.eye(2, 4), np.eye(3, 2), 1.0, label="<script>$x_1$")
    assert "<script>" not in la.subspace_similarity(hostile, hostile)._repr_html_()


@pytest.mark.slow
def test_every_module_is_an_attribute_of_the_package() -> None:
    for module in pkgutil.iter_modules(la.__path__):
        if module.name != "__main__":
            assert inspect.ismodule(getattr(la, module.name)), module.name
    code = "import lora_analysis as la; la.plots.new_axes; la.chance.excess; la.errors.InputError"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
