"""FLUX files under BFL's layer names: XLabs, ai-toolkit, control LoRAs.

All files are made by the layouts that x-flux, ai-toolkit and diffusers' converters document.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_files import Tensors, kohya_linear, lora_pair, normal, stored

from lora_analysis.errors import MalformedFileError
from lora_analysis.formats import read_adapter

XLABS = {
    "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
    "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv",
    "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj",
    "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj",
    "single_blocks.12.processor.qkv_lora": "single_blocks.12.linear1.qkv",
    "single_blocks.12.processor.proj_lora": "single_blocks.12.linear2",
}


def test_xlabs_processors_are_the_layers_they_add_to(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors: Tensors = {}
    for stem in XLABS:
        tensors |= lora_pair(rng, f"{stem}.down.weight", f"{stem}.up.weight")
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
    assert adapter.provenance.format == "flux"
    assert set(adapter) == set(XLABS.values())
    assert set(adapter.provenance.scale_origin.values()) == {"format"}
    assert tuple(map(str, adapter.provenance.findings)) == (
        "6 of 6 modules state no alpha: XLabs' format has none, its scale is 1.",
    )
    for stem, name in XLABS.items():
        wanted = tensors[f"{stem}.up.weight"].astype(float) @ tensors[f"{stem}.down.weight"]
        np.testing.assert_allclose(adapter[name].delta_weight(), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("diffusion_model.double_blocks.0.img_attn.qkv", "ai-toolkit's format has none"),
        ("diffusion_model.blocks.3.self_attn.q", "ai-toolkit's format has none"),
        ("single_blocks.3.linear1", "control LoRAs have none"),
    ],
)
def test_pefts_keys_under_the_authors_names_have_scale_1_by_the_format(
    tmp_path: Path, rng: np.random.Generator, module: str, told: str
) -> None:
    tensors = lora_pair(rng, f"{module}.lora_A.weight", f"{module}.lora_B.weight")
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
    assert (list(adapter), adapter.provenance.format) == ([module], "flux")
    assert adapter.provenance.scale_origin == {module: "format"}
    assert told in adapter.provenance.findings[0].text
    wanted = tensors[f"{module}.lora_B.weight"].astype(float) @ tensors[f"{module}.lora_A.weight"]
    np.testing.assert_allclose(adapter[module].delta_weight(), wanted, rtol=1e-6)


def test_an_alpha_beside_the_factors_counts(tmp_path: Path, rng: np.random.Generator) -> None:
    module = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = lora_pair(rng, f"{module}.lora_A.weight", f"{module}.lora_B.weight") | {
        f"{module}.alpha": np.array(5.0, np.float32)
    }
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
    assert adapter[module].scale == 2.5  # type: ignore[union-attr]
    assert adapter.provenance.scale_origin == {module: "tensor"}
    assert adapter.provenance.format == "flux"


def test_a_control_lora_keeps_its_norms_and_biases_as_findings(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors: Tensors = {}
    for module in ("img_in", "time_in.in_layer", "double_blocks.0.img_attn.qkv"):
        tensors |= lora_pair(rng, f"{module}.lora_A.weight", f"{module}.lora_B.weight")
        tensors[f"{module}.lora_B.bias"] = normal(rng, 6)
    tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = normal(rng, 5)
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
    assert len(adapter) == 3
    text = " ".join(map(str, adapter.provenance.findings))
    assert "3 tensors next to the factors: biases of B" in text
    assert "1 tensor next to the factors: no factors" in text


def test_kohyas_text_encoder_may_lie_in_the_same_file(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    module = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = lora_pair(rng, f"{module}.lora_A.weight", f"{module}.lora_B.weight")
    tensors |= kohya_linear(rng, "lora_te1_q", rank=2, alpha=1)
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
    assert adapter.provenance.scale_origin == {module: "format", "lora_te1_q": "tensor"}


def test_a_missing_partner_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    key = "double_blocks.0.processor.qkv_lora1.up.weight"
    with pytest.raises(MalformedFileError, match=r"but no 'double_.*qkv_lora1\.down\.weight'"):
        read_adapter(stored(tmp_path / "f.safetensors", {key: normal(rng, 6, 2)}))
