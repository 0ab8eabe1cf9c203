"""diffusers' files of three eras, with and without the metadata that states their scale.

Files are made by the layouts of diffusers 0.14 to 0.42 (``loaders/lora_pipeline.py``,
``utils/state_dict_utils.py``); the last test lets diffusers write one, where it is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import Tensors, kohya_linear, lora_pair, normal, stored

from lora_analysis import initial_factors_from_base, open_base
from lora_analysis.adapter import LowRankUpdate
from lora_analysis.errors import MalformedFileError, UnsupportedMethodError
from lora_analysis.formats import find_adapters, read_adapter

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ENCODER = "text_encoder.text_model.encoder.layers.0"


def up_down(rng: np.random.Generator, stem: str, rank: int = 2) -> Tensors:
    return lora_pair(rng, f"{stem}.down.weight", f"{stem}.up.weight", rank=rank)


def peft_keys(rng: np.random.Generator, stem: str, rank: int = 2) -> Tensors:
    return lora_pair(rng, f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", rank=rank)


# What a stem in the file is called in the base; one row per era and kind of layer.
SPELLED = {
    f"{BLOCK}.attn1.processor.to_q_lora": f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn2.processor.to_out_lora": f"{BLOCK}.attn2.to_out.0",
    f"{BLOCK}.attn2.processor.add_k_proj_lora": f"{BLOCK}.attn2.add_k_proj",
    f"unet.{BLOCK}.attn1.processor.to_k_lora": f"unet.{BLOCK}.attn1.to_k",
    f"{ENCODER}.self_attn.to_out_lora": f"{ENCODER}.self_attn.out_proj",
    f"unet.{BLOCK}.attn1.to_out.0.lora": f"unet.{BLOCK}.attn1.to_out.0",
    f"{ENCODER}.self_attn.q_proj.lora_linear_layer": f"{ENCODER}.self_attn.q_proj",
    f"{ENCODER}.mlp.fc1.lora_linear_layer": f"{ENCODER}.mlp.fc1",
}


@pytest.mark.parametrize("stem", SPELLED)
def test_older_keys_give_the_modules_name_in_the_base(
    tmp_path: Path, rng: np.random.Generator, stem: str
) -> None:
    tensors = up_down(rng, stem)
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors), scale=1)
    assert list(adapter) == [SPELLED[stem]]
    assert adapter.provenance.format == "diffusers"
    wanted = tensors[f"{stem}.up.weight"].astype(float) @ tensors[f"{stem}.down.weight"]
    np.testing.assert_allclose(adapter[SPELLED[stem]].delta_weight(), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "module",
    [
        f"unet.{BLOCK}.attn1.to_q",
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.single_transformer_blocks.3.proj_mlp",
        "transformer.blocks.0.attn1.to_out.0",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
    ],
)
def test_pefts_keys_after_a_component_are_diffusers(
    tmp_path: Path, rng: np.random.Generator, module: str
) -> None:
    adapter = read_adapter(stored(tmp_path / "f.safetensors", peft_keys(rng, module)))
    assert (list(adapter), adapter.provenance.format) == ([module], "diffusers")


def test_pefts_keys_of_a_language_model_are_not(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = peft_keys(rng, "transformer.h.0.attn.c_attn")
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
    assert adapter.provenance.format == "peft"


def test_one_file_may_mix_eras_and_components(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = (
        up_down(rng, f"unet.{BLOCK}.attn1.to_q.lora")
        | {
            "unet.conv_in.lora_A.weight": normal(rng, 2, 5, 3, 3),
            "unet.conv_in.lora_B.weight": normal(rng, 6, 2, 1, 1),
        }
        | up_down(rng, f"{ENCODER}.self_attn.q_proj.lora_linear_layer")
        | kohya_linear(rng, "lora_te2_q", alpha=1.0)
    )
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
    assert list(adapter) == sorted(
        [f"unet.{BLOCK}.attn1.to_q", "unet.conv_in", f"{ENCODER}.self_attn.q_proj", "lora_te2_q"]
    )
    conv = adapter["unet.conv_in"]
    assert isinstance(conv, LowRankUpdate)
    assert (conv.layout, conv.kernel, conv.shape) == ("conv", (3, 3), (6, 45))
    assert adapter.provenance.scale_origin["lora_te2_q"] == "tensor"


def test_without_metadata_the_scale_is_unknown_and_is_said(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "sd" / "pytorch_lora_weights.safetensors"
    adapter = read_adapter(stored(path, up_down(rng, f"unet.{BLOCK}.attn1.to_q.lora")))
    (update,) = adapter.values()
    assert isinstance(update, LowRankUpdate)
    assert update.scale is None
    assert set(adapter.provenance.scale_origin.values()) == {"unknown"}
    (finding,) = map(str, adapter.provenance.findings)
    assert "scale of 1 of 1 modules is not known" in finding
    assert "loaders then take a scale of 1" in finding
    assert adapter.label == "sd/pytorch_lora_weights"


def test_an_alpha_tensor_states_the_scale(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors: Tensors = {}
    for stem, module in SPELLED.items():
        tensors |= up_down(rng, stem)
        raw = stem.removesuffix(".lora").removesuffix(".lora_linear_layer")
        tensors[f"{raw}.alpha"] = np.array(3.0, np.float32)
        assert module
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
    assert {update.scale for update in adapter.values()} == {1.5}  # type: ignore[union-attr]
    assert set(adapter.provenance.scale_origin.values()) == {"tensor"}
    assert adapter.provenance.findings == ()


def test_alphas_beside_pefts_factors_are_read_whatever_the_names(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    for module in ("lora_unet_blocks_0_attn_to_q", "transformer_blocks.0.attn.to_q"):
        tensors = peft_keys(rng, module) | {f"{module}.alpha": np.array(5.0, np.float32)}
        adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
        assert adapter.provenance.format == "diffusers"
        assert adapter.provenance.scale_origin == {module: "tensor"}
        assert adapter[module].scale == 2.5  # type: ignore[union-attr]


def metadata(**components: dict[str, Any]) -> dict[str, str]:
    """The string that ``save_lora_weights`` puts beside the tensors; ``one=`` has no prefix."""
    fields = {
        key if component == "one" else f"{component}.{key}": value
        for component, config in components.items()
        for key, value in config.items()
    }
    return {"format": "pt", "lora_adapter_metadata": json.dumps(fields, indent=2, sort_keys=True)}


def test_metadata_states_the_scale_per_component_and_module(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = (
        up_down(rng, f"unet.{BLOCK}.attn1.to_q.lora", rank=4)
        | up_down(rng, f"unet.{BLOCK}.attn2.to_q.lora", rank=3)
        | up_down(rng, f"{ENCODER}.self_attn.q_proj.lora_linear_layer", rank=4)
    )
    stated = metadata(
        unet={"r": 4, "lora_alpha": 2, "alpha_pattern": {"attn2.to_q": 9}, "rank_pattern": {}},
        text_encoder={"r": 4, "lora_alpha": 5.0, "use_rslora": True},
    )
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors, stated))
    scales = {name: update.scale for name, update in adapter.items()}  # type: ignore[union-attr]
    assert scales == {
        f"unet.{BLOCK}.attn1.to_q": 0.5,
        f"unet.{BLOCK}.attn2.to_q": 3.0,
        f"{ENCODER}.self_attn.q_proj": 2.5,
    }
    assert set(adapter.provenance.scale_origin.values()) == {"metadata"}
    assert adapter.provenance.findings == ()


def test_a_component_that_the_metadata_leaves_out_is_of_unknown_scale(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = peft_keys(rng, "unet.conv.to_q") | peft_keys(rng, "text_encoder.q_proj")
    stated = metadata(unet={"r": 2, "lora_alpha": 2})
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors, stated))
    assert adapter.provenance.scale_origin == {
        "unet.conv.to_q": "metadata",
        "text_encoder.q_proj": "unknown",
    }
    assert "scale of 1 of 2 modules is not known" in adapter.provenance.findings[0].text


def test_a_file_for_one_model_has_metadata_and_names_without_a_component(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """The layout of ``save_lora_adapter``."""
    path = stored(
        tmp_path / "f.safetensors",
        peft_keys(rng, "blocks.0.q"),
        metadata(one={"r": 2, "lora_alpha": 3}),
    )
    adapter = read_adapter(path)
    assert (list(adapter), adapter.provenance.format) == (["blocks.0.q"], "diffusers")
    assert {update.scale for update in adapter.values()} == {1.5}  # type: ignore[union-attr]


def test_dora_and_biases_are_told(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = peft_keys(rng, "unet.to_q") | {
        "unet.to_q.lora_magnitude_vector": normal(rng, 6),
        "unet.to_q.lora_B.bias": normal(rng, 6),
    }
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors), scale=1)
    update = adapter["unet.to_q"]
    assert isinstance(update, LowRankUpdate)
    assert update.variant == "DoRA"
    np.testing.assert_array_equal(update.magnitude, tensors["unet.to_q.lora_magnitude_vector"])
    dora, side = adapter.provenance.findings
    assert dora.code == "dora"
    assert "1 tensor next to the factors: biases of B" in side.text


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("{", MalformedFileError, "is not valid JSON"),
        ("[1]", MalformedFileError, "must be a JSON object"),
        ('{"unet.lora_alpha": "8"}', MalformedFileError, "gives '8' as an alpha"),
        ('{"unet.lora_alpha": NaN}', MalformedFileError, "gives nan as an alpha"),
        (
            '{"unet.lora_alpha": 8, "unet.alpha_pattern": {"q": null}}',
            MalformedFileError,
            "gives None as an alpha",
        ),
        (
            '{"unet.lora_alpha": 8, "unet.alpha_pattern": {"(": 1}}',
            MalformedFileError,
            "alpha_pattern in 'lora_adapter_metadata'",
        ),
        (
            '{"unet.init_lora_weights": "pissa_niter_4"}',
            UnsupportedMethodError,
            "PiSSA starts from",
        ),
    ],
)
def test_metadata_that_cannot_be_believed_is_refused(
    tmp_path: Path, rng: np.random.Generator, text: str, error: type[Exception], told: str
) -> None:
    path = stored(
        tmp_path / "f.safetensors", peft_keys(rng, "unet.to_q"), {"lora_adapter_metadata": text}
    )
    with pytest.raises(error, match=r"f\.safetensors") as caught:
        read_adapter(path)
    assert told in str(caught.value)


def test_a_missing_partner_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    whole = up_down(rng, f"unet.{BLOCK}.attn1.to_q.lora")
    (up,) = (key for key in whole if key.endswith("up.weight"))
    path = stored(tmp_path / "f.safetensors", {up: whole[up]})
    with pytest.raises(MalformedFileError, match=r"but no 'unet.*to_q\.lora\.down\.weight'"):
        read_adapter(path)


@pytest.mark.slow
@pytest.mark.real
def test_a_real_file_reads_from_both_containers(real_adapters: Path) -> None:
    from safetensors.numpy import load_file

    folder = real_adapters / "sd15-diffusers"
    adapter = read_adapter(folder, scale=1)
    assert (len(adapter), adapter.provenance.rank) == (128, 4)
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    for stem in {key.rsplit(".", 2)[0] for key in tensors}:
        name = stem.replace(".processor.", ".").removesuffix("_lora")
        up, down = (tensors[f"{stem}.{role}.weight"].astype(float) for role in ("up", "down"))
        update = adapter[name + ".0" * name.endswith("to_out")]
        np.testing.assert_allclose(update.delta_weight(), up @ down, rtol=1e-10, atol=1e-12)
    assert len(find_adapters(folder, allow_pickle=True)) == 2
    pickled = read_adapter(folder / "pytorch_lora_weights.bin", allow_pickle=True)
    assert set(pickled) == set(adapter)
    assert set(pickled.provenance.scale_origin.values()) == {"unknown"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_diffusers_saves_reads_with_pefts_delta_weight(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    import torch
    from peft import LoraConfig

    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 2, 2),
    )
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "proj_out"], alpha_pattern={"proj_out": 7}
    )
    model.add_adapter(config, "default")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_lora_adapter(tmp_path)
    adapter = read_adapter(tmp_path)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert set(adapter) == set(layers)
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(adapter[name].delta_weight(), delta, rtol=1e-5, atol=1e-6)


def test_a_start_that_was_taken_out_of_the_base_is_subtracted(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    unet, text = "unet.mid.attn1.to_q", "text_encoder.layers.0.q_proj"
    parts = {"unet": {"lora_alpha": 4, "init_lora_weights": "pissa"}}
    said = metadata(**parts, text_encoder={"lora_alpha": 4})
    tensors = peft_keys(rng, unet) | peft_keys(rng, text)
    trained = stored(tmp_path / "trained.safetensors", tensors, said)
    with pytest.raises(UnsupportedMethodError, match=r"PiSSA starts from .*--trained-on BASE"):
        read_adapter(trained)
    before = peft_keys(rng, unet)
    first = stored(tmp_path / "first.safetensors", before, said)
    adapter = read_adapter(trained, initial=first)
    assert "ΔW has rank 2r." in adapter.provenance.findings[-1].text

    def product(of: Tensors, stem: str) -> np.ndarray:
        a, b = (of[f"{stem}.lora_{role}.weight"].astype(float) for role in "AB")
        return 2 * b @ a

    found = adapter[unet].delta_weight()
    np.testing.assert_allclose(found, product(tensors, unet) - product(before, unet), rtol=1e-6)
    np.testing.assert_allclose(adapter[text].delta_weight(), product(tensors, text), rtol=1e-6)
    W = rng.standard_normal((6, 5)).astype(np.float32)
    worked_out = read_adapter(trained, initial=initial_factors_from_base(open_base({unet: W})))
    U, S, V = np.linalg.svd(W.astype(float))
    wanted = product(tensors, unet) - (U[:, :2] * S[:2]) @ V[:2]
    np.testing.assert_allclose(worked_out[unet].delta_weight(), wanted, rtol=1e-5)
    other = stored(tmp_path / "other.safetensors", peft_keys(rng, unet, rank=3), said)
    with pytest.raises(
        MalformedFileError, match=r"must have rank 2 and shape .*from the same run\?"
    ):
        _ = read_adapter(trained, initial=other)[unet]
