"""kohya's and diffusers' files written and read back: the same ΔW, the scale included."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import low_rank_update
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate, Provenance
from lora_analysis.errors import InputError, LoraAnalysisError, ScaleError, UnsupportedMethodError
from lora_analysis.formats import read_adapter, write_adapter
from lora_analysis.formats.diffusion.kohya import flattened_names
from lora_analysis.names import identify

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
FORMATS = ("kohya", "diffusers")


def conv_update(rng: np.random.Generator, name: str, **options: Any) -> LowRankUpdate:
    plain = low_rank_update(rng, 6, 27, 2, name=name, **options)
    return LowRankUpdate(name, plain.A, plain.B, plain.scale, layout="conv", kernel=(3, 3))


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Modules of a pipeline or of one model, each with its own rank, scale, layout and alpha."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    names = draw(
        st.sampled_from(
            [
                [f"{UNET}.attn{i}.to_{letter}" for i in (1, 2) for letter in "qk"]
                + ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
                + ["text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"],
                [f"transformer.transformer_blocks.{i}.attn.to_q" for i in (1, 11)],
                ["down_blocks.1.resnets.0.conv1", "layers.1.q_proj", "layers.11.q_proj"],
            ]
        )
    )
    dora = draw(st.booleans())
    updates = {}
    for name in names:
        rank, kernel = draw(st.integers(1, 5)), draw(st.sampled_from([(), (1, 1), (3, 3)]))
        d_in = 4 * int(np.prod(kernel, dtype=int))
        plain = low_rank_update(rng, 6, d_in, rank, name=name)
        alpha = draw(st.none() | st.floats(0.25, 300) | st.integers(1, 64).map(float))
        scale = alpha / rank if alpha else draw(st.floats(1e-3, 1e3) | st.floats(-10, -0.1))
        updates[name] = LowRankUpdate(
            name,
            plain.A.astype(draw(st.sampled_from([np.float32, np.float64]))),
            plain.B,
            scale,
            alpha=alpha,
            layout="conv" if kernel else "linear",
            kernel=kernel,
            variant="DoRA" if dora else "",
            magnitude=rng.random(6) + 1 if dora else None,
        )
    return Adapter(updates, label="drawn")


def flat(name: str, names: set[str]) -> str:
    prefixes = {"unet": "unet", "transformer": "transformer", "text_encoder_2": "te2"}
    first, _, rest = name.partition(".")
    if first == "text_encoder":
        prefix = "te1" if any(name.startswith("text_encoder_2.") for name in names) else "te"
    else:
        prefix = prefixes.get(first, "")
    return (
        f"lora_{prefix}_{rest}".replace(".", "_")
        if prefix
        else (f"lora_unet_{name}".replace(".", "_"))
    )


@pytest.mark.parametrize("format", FORMATS)
@given(adapters())
def test_what_is_written_reads_back_with_the_same_delta_weight(
    format: str, adapter: Adapter
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        read = read_adapter(write_adapter(adapter, Path(folder) / "out", format=format))
        assert read.provenance.format == format
        dora = any(isinstance(u, LowRankUpdate) and u.variant for u in adapter.values())
        assert [finding.code for finding in read.provenance.findings] == (["dora"] if dora else [])
        names = {name: flat(name, set(adapter)) if format == "kohya" else name for name in adapter}
        assert set(read) == set(names.values())
        for name, update in adapter.items():
            again = read[names[name]]
            assert isinstance(again, LowRankUpdate)
            assert isinstance(update, LowRankUpdate)
            assert again.scale == pytest.approx(update.scale, rel=1e-15)
            assert (again.rank, again.layout, again.kernel) == (
                update.rank,
                update.layout,
                update.kernel,
            )
            assert again.variant == update.variant
            expected = update.delta_weight()
            np.testing.assert_allclose(
                again.delta_weight(), expected, rtol=0, atol=1e-6 * np.abs(expected).max()
            )
            if update.magnitude is not None:
                np.testing.assert_allclose(again.magnitude, update.magnitude, rtol=1e-6)


def test_a_kohya_file_has_the_keys_and_shapes_of_sd_scripts(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    adapter = Adapter(
        {
            f"{UNET}.attn1.to_q": low_rank_update(rng, 6, 5, 2, scale=0.5),
            "unet.conv_in": conv_update(rng, "unet.conv_in", scale=0.1),
            "text_encoder.q_proj": low_rank_update(rng, 6, 5, 2, scale=1),
        },
        label="a",
        provenance=Provenance(base_model="sd_v1"),
    )
    file = write_adapter(adapter, tmp_path / "style", format="kohya")
    assert file == tmp_path / "style" / "style.safetensors"
    tensors = load_file(file)
    assert {key: value.shape for key, value in tensors.items()} == {
        f"{FLAT}_attn1_to_q.lora_down.weight": (2, 5),
        f"{FLAT}_attn1_to_q.lora_up.weight": (6, 2),
        f"{FLAT}_attn1_to_q.alpha": (),
        "lora_unet_conv_in.lora_down.weight": (2, 3, 3, 3),
        "lora_unet_conv_in.lora_up.weight": (6, 2, 1, 1),
        "lora_unet_conv_in.alpha": (),
        "lora_te_q_proj.lora_down.weight": (2, 5),
        "lora_te_q_proj.lora_up.weight": (6, 2),
        "lora_te_q_proj.alpha": (),
    }
    assert tensors[f"{FLAT}_attn1_to_q.alpha"] == 1
    assert tensors[f"{FLAT}_attn1_to_q.alpha"].dtype == np.float32
    # 0.2 has no float32: the scale stays exact in a wider type.
    assert tensors["lora_unet_conv_in.alpha"] == 0.2
    assert read_adapter(file).provenance.base_model == "sd_v1"


def test_a_diffusers_file_states_pefts_config_per_component(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    adapter = Adapter(
        {
            "unet.a.to_q": low_rank_update(rng, 6, 5, 2, scale=0.5),
            "unet.b.to_q": low_rank_update(rng, 6, 5, 2, scale=0.5),
            "unet.b.to_k": low_rank_update(rng, 6, 5, 3, scale=2.0),
            "text_encoder.q_proj": low_rank_update(rng, 6, 5, 4, scale=1.0),
        },
        label="a",
    )
    file = write_adapter(adapter, tmp_path, format="diffusers")
    assert file == tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "np") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (2, 1)
    assert config["unet.rank_pattern"] == {r"^b\.to_k": 3}
    assert config["unet.alpha_pattern"] == {r"^b\.to_k": 6}
    assert (config["text_encoder.r"], config["text_encoder.lora_alpha"]) == (4, 4)
    assert "unet.a.to_q.lora_A.weight" in load_file(file)


@pytest.mark.parametrize(
    ("format", "key", "linear", "conv"),
    [
        ("kohya", "lora_unet_q.dora_scale", (6, 1), (6, 1, 1, 1)),
        ("diffusers", "unet.q.lora_magnitude_vector", (6,), (1, 6, 1, 1)),
    ],
)
def test_doras_norms_have_the_shape_that_loaders_expect(
    tmp_path: Path, format: str, key: str, linear: tuple[int, ...], conv: tuple[int, ...]
) -> None:
    """LyCORIS keeps the first axis (``modules/locon.py``), PEFT the second (``lora/dora.py``)."""
    dora = {"variant": "DoRA", "magnitude": np.arange(1.0, 7.0)}
    for shape, layout in ((linear, {}), (conv, {"layout": "conv", "kernel": (2, 1)})):
        file = write_adapter(changed(**dora, **layout), tmp_path, format=format)
        assert load_file(file)[key].shape == shape


@pytest.mark.parametrize("format", FORMATS)
def test_the_scale_is_written_and_not_the_alpha_of_another_rule(
    tmp_path: Path, format: str
) -> None:
    rslora = changed(alpha=16.0, scale=16 / 2**0.5)
    (update,) = read_adapter(write_adapter(rslora, tmp_path, format=format)).values()
    assert isinstance(update, LowRankUpdate)
    assert update.scale == pytest.approx(16 / 2**0.5, rel=1e-15)
    assert update.alpha == pytest.approx(16 * 2**0.5)


def test_a_path_that_names_a_file_is_the_file(tmp_path: Path, rng: np.random.Generator) -> None:
    adapter = Adapter({"unet.to_q": low_rank_update(rng, 6, 5, 2)}, label="a")
    for format in FORMATS:
        path = tmp_path / format / "mine.safetensors"
        assert write_adapter(adapter, path, format=format) == path
        assert read_adapter(path).provenance.format == format


def test_kohyas_own_names_are_kept(tmp_path: Path, rng: np.random.Generator) -> None:
    names = [f"{FLAT}_attn1_to_q", "lora_te1_text_q", "lora_transformer_x", "lycoris_y_z"]
    adapter = Adapter({name: low_rank_update(rng, 6, 5, 2) for name in names}, label="a")
    assert set(read_adapter(write_adapter(adapter, tmp_path, format="kohya"))) == set(names)


def changed(**fields: Any) -> Adapter:
    plain = low_rank_update(np.random.default_rng(5), 6, 4, 2, name="unet.q")
    given = {"name": "unet.q", "A": plain.A, "B": plain.B, "scale": 1.0} | fields
    return Adapter({given["name"]: LowRankUpdate(**given)}, label="mine")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("fields", "error", "expected"),
    [
        ({"scale": None}, ScaleError, "is not known"),
        ({"layout": "conv1d"}, InputError, "layout 'conv1d'"),
        ({"layout": "embedding"}, InputError, "layout 'embedding'"),
        ({"variant": "KaSA"}, UnsupportedMethodError, "part of a KaSA update"),
        ({"variant": "DoRA"}, UnsupportedMethodError, "without its magnitude"),
        ({"base_name": "experts[3]"}, UnsupportedMethodError, "for the weight 'experts[3]'"),
        ({"A": np.full((2, 4), 1e300)}, InputError, "too large for float32"),
        ({"scale": 1.7e308}, InputError, "is not finite"),
    ],
)
def test_what_neither_can_say_is_refused_and_nothing_written(
    tmp_path: Path,
    format: str,
    fields: dict[str, Any],
    error: type[LoraAnalysisError],
    expected: str,
) -> None:
    with pytest.raises(error) as caught:
        write_adapter(changed(**fields), tmp_path, format=format)
    assert expected in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_more_than_factors_is_refused(
    tmp_path: Path, rng: np.random.Generator, format: str
) -> None:
    updates = {"unet.q": low_rank_update(rng, 6, 5, 2)}
    for adapter, expected in (
        (Adapter(updates, label="a", saved_modules={"head.weight": np.ones(2)}), "'head.weight'"),
        (Adapter(updates, label="a", config={"bias": "all"}), "bias = 'all'"),
        (Adapter({"q": DenseUpdate("q", np.ones((2, 2)))}, label="a"), "a dense update"),
        (Adapter({}, label="a"), "adapts no module"),
    ):
        with pytest.raises((InputError, UnsupportedMethodError), match=expected):
            write_adapter(adapter, tmp_path, format=format)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["unet.a.b", "unet.a_b"], "'unet.a.b' and 'unet.a_b' would both be 'lora_unet_a_b'"),
        (["unet_a"], "means something else"),
        (["unet:0"], "is not a path of a module"),
        (["vae.decoder.q"], "belongs to the component 'vae', for which kohya's keys have no"),
        (["te1.q", "clip_l.q"], "would both be 'lora_te1_q'"),
    ],
)
def test_names_that_kohyas_keys_cannot_carry_are_refused(
    tmp_path: Path, rng: np.random.Generator, names: list[str], expected: str
) -> None:
    adapter = Adapter({name: low_rank_update(rng, 6, 5, 2) for name in names}, label="a")
    with pytest.raises(InputError, match=expected):
        write_adapter(adapter, tmp_path, format="kohya")


def test_a_scale_of_zero_is_refused_where_it_would_be_taken_for_r(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="alpha of 0 for the rank"):
        write_adapter(changed(scale=0.0), tmp_path, format="kohya")
    read = read_adapter(write_adapter(changed(scale=0.0), tmp_path, format="diffusers"))
    assert read["unet.q"].scale is None  # type: ignore[union-attr]
    assert "alpha-zero" in [finding.code for finding in read.provenance.findings]


def test_names_that_diffusers_files_cannot_carry_are_refused(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    def of(*names: str) -> Adapter:
        return Adapter({name: low_rank_update(rng, 6, 5, 2) for name in names}, label="a")

    with pytest.raises(InputError, match="for a pipeline or for one model"):
        write_adapter(of("unet.q", "layers.0.q"), tmp_path, format="diffusers")
    with pytest.raises(InputError, match="'lora_unet_a_to_q' is not a path of a module"):
        write_adapter(of("lora_unet_a_to_q"), tmp_path, format="diffusers")
    mixed = {**changed(variant="DoRA", magnitude=np.ones(6)), **of("unet.k")}
    with pytest.raises(InputError, match="'unet': DoRA in some modules only"):
        write_adapter(Adapter(mixed, label="a"), tmp_path, format="diffusers")


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.blocks.0.attn.q",
        "module._orig_mod.blocks.0.attn.q",
        "unet.down_blocks.0.proj",
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer_2.blocks.0.attn.to_q",
        "prior.unet.down.q",
        "text_encoder.text_model.q",
        "text_encoders.clip_g.transformer.text_model.q",
        "conditioner.embedders.1.model.q",
        "text_encoder_4.layers.0.q",
    ],
)
def test_kohyas_name_means_the_same_module(name: str) -> None:
    written = flattened_names([name])[name]
    assert identify(written, flat=True) == identify(name, flat=True)
    assert written.startswith("lora_")


def test_a_second_text_encoder_numbers_the_first() -> None:
    first, second = "text_encoder.text_model.q", "text_encoder_2.text_model.q"
    assert flattened_names([first])[first] == "lora_te_text_model_q"
    assert flattened_names([first, second])[first] == "lora_te1_text_model_q"
