"""Edits that keep what they were given: format, container, type, metadata, and the loaders' names.

The files are read with the formats' own libraries, and their names compared with the tables in
`image_models`, never with the package's readers.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import Tensors
from image_models import flux_fused, flux_layers, sd15_layers, sdxl_layers
from safetensors import safe_open
from safetensors.numpy import load_file, save
from safetensors.torch import load_file as load_torch
from test_cli import call, document

from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.edit import resize_adapter
from lora_analysis.errors import InputError
from lora_analysis.formats import read_adapter, write_adapter

MARK = "lora_analysis"


def header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return dict(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as opened:
        return dict(opened.metadata())


def types_of(path: Path) -> dict[str, str]:
    return {k: v["dtype"] for k, v in header(path).items() if k != "__metadata__"}


def sd_scripts_hashes(path: Path) -> tuple[str, str]:
    """Return the hashes by the rule of sd-scripts' ``precalculate_safetensors_hashes``."""
    training = {k: v for k, v in metadata_of(path).items() if k.startswith("ss_")}
    content = save(load_file(path), training)
    start = 8 + int.from_bytes(content[:8], "little")
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return hashlib.sha256(content[start:]).hexdigest(), legacy


def kohya_tensors(
    rng: np.random.Generator, name: str, rank: int, alpha: float, *, width: int = 96
) -> Tensors:
    """A layer whose singular values fall, in half precision as sd-scripts saves it."""
    decay = 2.0 ** -np.arange(rank)
    kernel = (
        (3, 3) if name.endswith(("in_layers_2", "out_layers_3", "_op", "_conv", "conv2")) else ()
    )
    down = rng.standard_normal((rank, width, *kernel)) * decay.reshape(-1, 1, *(1 for _ in kernel))
    up = rng.standard_normal((width, rank, *(1 for _ in kernel)))
    return {
        f"{name}.lora_down.weight": down.astype(np.float16),
        f"{name}.lora_up.weight": up.astype(np.float16),
        f"{name}.alpha": np.array(alpha, np.float16),
    }


def written(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.write_bytes(save(tensors, metadata))
    return path


METADATA = {
    "ss_network_dim": "32",
    "ss_network_alpha": "16.0",
    "ss_network_module": "networks.lora",
    "ss_network_args": json.dumps({"conv_dim": "32"}),
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_training_comment": "trigger: ohwx",
    "ss_tag_frequency": json.dumps({"10_ohwx": {"ohwx person": 12}}),
    "ss_output_name": "style",
    "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "0" * 8,
    "modelspec.trigger_phrase": "ohwx",
    "modelspec.hash_sha256": "0x" + "0" * 64,
}


@pytest.fixture
def sdxl(rng: np.random.Generator, tmp_path: Path) -> Path:
    tensors: Tensors = {"bundle_emb.ohwx.clip_l": rng.standard_normal((2, 8)).astype(np.float16)}
    for layer in sdxl_layers():
        tensors |= kohya_tensors(rng, layer.kohya, 32, 16)
    return written(tmp_path / "style.safetensors", tensors, METADATA)


def delta_weights(tensors: Tensors) -> dict[str, np.ndarray]:
    """Return ΔW of each layer in a kohya file, by the rule of its loaders."""
    deltas = {}
    for key in tensors:
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            down = tensors[key].astype(np.float64)
            up = tensors[f"{name}.lora_up.weight"].astype(np.float64)
            scale = float(tensors[f"{name}.alpha"]) / len(down)
            deltas[name] = scale * up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    return deltas


def test_a_resized_kohya_file_stays_what_it_was(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without a suffix, too, the file stays one file.
    code, out, _ = call(capsys, "resize", sdxl, "--rank", 8, "-o", tmp_path / "small")
    small = tmp_path / "small.safetensors"
    assert (code, small.is_file()) == (0, True)
    assert {p.name for p in tmp_path.iterdir()} == {"small.safetensors", "style.safetensors"}
    assert 0.24 < small.stat().st_size / sdxl.stat().st_size < 0.30
    assert types_of(small) == types_of(sdxl)
    assert set(types_of(small).values()) == {"F16"}

    before, after = load_file(sdxl), load_file(small)
    given, shrunk = delta_weights(before), delta_weights(after)
    assert given.keys() == shrunk.keys() == {layer.kohya for layer in sdxl_layers()}
    assert after["bundle_emb.ohwx.clip_l"].tobytes() == before["bundle_emb.ohwx.clip_l"].tobytes()
    assert {tuple(after[k].shape) for k in after if k.endswith(".alpha")} == {()}

    metadata = metadata_of(small)
    assert metadata.keys() == METADATA.keys() | {MARK}
    model, legacy = sd_scripts_hashes(small)
    assert {k: v for k, v in metadata.items() if k != MARK and v != METADATA[k]} == {
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_training_comment": "dimension is resized from 32 to 8; trigger: ohwx",
        "sshs_model_hash": model,
        "sshs_legacy_hash": legacy,
        "modelspec.hash_sha256": f"0x{model}",
    }

    # The printed error is that of the file as it is loaded, rounding included.
    lost = np.sqrt(sum(np.sum((given[n] - shrunk[n]) ** 2) for n in given))
    error = lost / np.sqrt(sum(np.sum(delta**2) for delta in given.values()))
    sizes = [f"{path.stat().st_size / 1e6:.1f} MB" for path in (sdxl, small)]
    assert f"size     {sizes[0]} → {sizes[1]}, error {100 * error:.2g} %" in out


def test_the_printed_error_includes_the_rounding(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.safetensors"
    ask = ("resize", sdxl, "--rank", 24, "-o", path, "--format", "json")
    result = document(call(capsys, *ask)[1])
    assert result["given_bytes"] == sdxl.stat().st_size
    assert result["bytes"] == path.stat().st_size
    given, shrunk = delta_weights(load_file(sdxl)), delta_weights(load_file(path))
    for module in result["modules"]:
        name = module["module"]
        lost = np.linalg.norm(given[name] - shrunk[name]) / np.linalg.norm(given[name])
        # A truncation to rank 24 loses 2⁻²⁴; the rest is the rounding to half precision.
        assert 1e-5 < module["error"] == pytest.approx(lost, rel=1e-4)


def test_ranks_by_pattern(sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.safetensors"
    patterns = ("--rank-for", ".*attn2_to_k=16", "--rank-for", ".*attn.*=2")
    assert call(capsys, "resize", sdxl, "--rank", 8, *patterns, "-o", path)[0] == 0
    for key, tensor in load_file(path).items():
        if key.endswith("lora_down.weight"):
            expected = 16 if "attn2_to_k" in key else 2 if "attn" in key else 8
            assert len(tensor) == expected
    metadata = metadata_of(path)
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"
    for wrong in ("attn2", "attn2=", "=4", "attn2=0", "attn2=x"):
        ask = ("resize", sdxl, "--rank", 8, "--rank-for", wrong, "-o", tmp_path / "no")
        assert call(capsys, *ask)[0] == 2
    ask = ("resize", sdxl, "--rank", 8, "--rank-for", "attn3=4", "-o", tmp_path / "no")
    code, _, err = call(capsys, *ask)
    assert (code, "'attn3' matches no module" in err) == (3, True)


def test_a_module_type_chooses_a_rank() -> None:
    rng = np.random.default_rng(3)
    names = [f"layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "v_proj")]
    updates = {
        n: LowRankUpdate(n, rng.standard_normal((6, 9)), rng.standard_normal((8, 6)), 0.5)
        for n in names
    }
    adapter = Adapter(updates, label="a")
    patterns = {"layers.1.self_attn.v_proj": 5, "v_proj": 3}
    small = resize_adapter(adapter, energy=1.0, rank_for=patterns).adapter
    assert [update.rank for update in small.values()] == [6, 3, 6, 5]
    assert {update.scale for update in small.values() if isinstance(update, LowRankUpdate)} == {0.5}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("format", ["kohya", "diffusers", "flux", "peft", "loralib", "mlx", "gguf"])
def test_every_format_keeps_and_takes_each_type(
    format: str, dtype: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    if format in ("kohya", "diffusers", "flux"):
        names = ["unet.a.to_q", "unet.a.to_k"] if format != "flux" else ["a.to_q", "a.to_k"]
    updates = {}
    for name in names:
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 8), (12, 4)))
        updates[name] = LowRankUpdate(name, a, b, 0.5)
    adapter = Adapter(updates, label="a")
    options = {"architecture": "qwen2"} if format == "gguf" else {}
    first = write_adapter(adapter, tmp_path / "first", format=format, dtype=dtype, **options)
    again = write_adapter(read_adapter(first), tmp_path / "again")  # its own format and type
    resized = resize_adapter(read_adapter(first), rank=2).adapter
    small = write_adapter(resized, tmp_path / "small")
    for path in (first, again, small):
        assert set(factor_types(path)) == {dtype}
        assert read_adapter(path).provenance.format == format


def factor_types(path: Path) -> list[str]:
    """Return the types of all factors in a file or folder, by safetensors' or gguf's own reader."""
    if path.is_dir():
        (path,) = path.glob("*.safetensors")
    if path.suffix == ".gguf":
        gguf = pytest.importorskip("gguf")
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        return [names[tensor.tensor_type.name] for tensor in gguf.GGUFReader(path).tensors]
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return [names[v] for k, v in types_of(path).items() if not k.endswith(".alpha")]


# --- names that loaders look up ---------------------------------------------------------------


def random_tensors(rng: np.random.Generator, names: list[str], width: int = 14) -> Tensors:
    tensors: Tensors = {}
    for name in names:
        tensors |= kohya_tensors(rng, name, 4, 2, width=width)
    return tensors


def peft_deltas(path: Path) -> dict[str, np.ndarray]:
    """Return ΔW by path in a file of diffusers, by the rule of PEFT's config in its metadata."""
    config = json.loads(metadata_of(path)["lora_adapter_metadata"])
    tensors = load_file(path)
    deltas = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            component, _, layer = name.partition(".")
            anchored = "^" + layer.replace(".", "\\.")
            alpha = config[f"{component}.alpha_pattern"].get(
                anchored, config[f"{component}.lora_alpha"]
            )
            A, B = (tensors[f"{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
            assert config[f"{component}.rank_pattern"].get(
                anchored, config[f"{component}.r"]
            ) == len(A)
            deltas[name] = alpha / len(A) * B.reshape(len(B), -1) @ A.reshape(len(A), -1)
    return deltas


@pytest.mark.parametrize("layers", [sdxl_layers(), sd15_layers()], ids=["sdxl", "sd15"])
def test_a_unet_changes_between_kohya_and_diffusers(
    layers: list[Any],
    tmp_path: Path,
    rng: np.random.Generator,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = written(tmp_path / "a.safetensors", random_tensors(rng, [x.kohya for x in layers]))
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    code, out, _ = call(capsys, "convert", source, "--to", "diffusers", "-o", there)
    assert code == 0
    assert f"{len(layers)} modules, maximum relative error of ΔW 0" in out
    assert call(capsys, "convert", there, "--to", "kohya", "-o", back)[0] == 0
    given, middle, returned = (
        delta_weights(load_file(source)),
        peft_deltas(there),
        delta_weights(load_file(back)),
    )
    assert middle.keys() == {layer.diffusers for layer in layers}
    assert returned.keys() == {layer.kohya for layer in layers}
    for layer in layers:
        np.testing.assert_allclose(middle[layer.diffusers], given[layer.kohya], rtol=1e-12)
        assert np.array_equal(returned[layer.kohya], given[layer.kohya])
    assert set(factor_types(there)) == set(factor_types(back)) == {"float16"}


def flux_file(rng: np.random.Generator, path: Path, *, split: bool, hidden: int = 7) -> Path:
    """Return a file of sd-scripts for FLUX; ``split``: q, k, v and MLP were trained apart."""
    tensors = random_tensors(rng, [layer.kohya for layer in flux_layers()])
    for name, parts in flux_fused():
        rows = hidden * sum(parts.values())
        rank = 2 * len(parts) if split else 4
        up = rng.standard_normal((rows, rank))
        if split:
            mask, row = np.zeros_like(up), 0
            for i, share in enumerate(parts.values()):
                mask[row : row + hidden * share, 2 * i : 2 * i + 2] = 1
                row += hidden * share
            up *= mask
        tensors |= {
            f"{name}.lora_down.weight": rng.standard_normal((rank, 14)).astype(np.float16),
            f"{name}.lora_up.weight": up.astype(np.float16),
            f"{name}.alpha": np.array(2, np.float16),
        }
    return written(path, tensors)


@pytest.mark.parametrize("split", [True, False])
def test_flux_changes_between_kohya_and_diffusers(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str], *, split: bool
) -> None:
    source = flux_file(rng, tmp_path / "a.safetensors", split=split)
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert call(capsys, "convert", source, "--to", "diffusers", "-o", there)[0] == 0
    assert call(capsys, "convert", there, "--to", "kohya", "-o", back)[0] == 0
    given, middle = delta_weights(load_file(source)), peft_deltas(there)
    layers = {layer.diffusers: given[layer.kohya] for layer in flux_layers()}
    ranks = {len(v) for k, v in load_file(there).items() if ".to_q.lora_A" in k}
    assert ranks == ({2} if split else {4})
    for name, parts in flux_fused():
        row = 0
        for part, share in parts.items():
            layers[part] = given[name][row : row + 7 * share]
            row += 7 * share
    assert middle.keys() == layers.keys()
    for name, delta in layers.items():
        np.testing.assert_allclose(middle[name], delta, rtol=1e-12, atol=1e-15)
    before, after = load_file(source), load_file(back)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        if not key.endswith("alpha"):
            assert np.array_equal(after[key], tensor)
    returned = delta_weights(after)
    for name, delta in given.items():
        np.testing.assert_allclose(returned[name], delta, rtol=1e-12)


def test_parts_that_flux_lacks_are_zero_in_the_whole(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = "transformer.single_transformer_blocks.0"
    a, b = rng.standard_normal((2, 14)), rng.standard_normal((7, 2))
    updates = {
        f"{path}.attn.{part}": LowRankUpdate(f"{path}.attn.{part}", a, b, scale)
        for part, scale in (("to_q", 0.5), ("to_v", 2.0))
    }
    file = write_adapter(Adapter(updates, label="a"), tmp_path / "x.safetensors", format="kohya")
    delta = delta_weights(load_file(file))["lora_unet_single_blocks_0_linear1"]
    expected = np.zeros((49, 14))
    expected[:7], expected[14:21] = 0.5 * b @ a, 2.0 * b @ a
    np.testing.assert_allclose(delta, expected, atol=1e-5)


def test_the_last_layer_of_flux_swaps_scale_and_shift(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    names = ["lora_unet_final_layer_adaLN_modulation_1", "lora_unet_single_blocks_0_linear2"]
    source = written(tmp_path / "a.safetensors", random_tensors(rng, names))
    there = write_adapter(read_adapter(source), tmp_path / "b.safetensors", format="diffusers")
    back = write_adapter(read_adapter(there), tmp_path / "c.safetensors", format="kohya")
    given = delta_weights(load_file(source))[names[0]]
    swapped = peft_deltas(there)["transformer.norm_out.linear"]
    assert np.array_equal(swapped, np.concatenate([given[7:], given[:7]]))
    assert np.array_equal(delta_weights(load_file(back))[names[0]], given)


def test_names_of_other_models_are_refused_or_kept(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    video = ["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_19_img_attn_qkv"]
    source = written(tmp_path / "v.safetensors", random_tensors(rng, video, 21))
    with pytest.raises(InputError, match="is not a path of a module"):
        write_adapter(read_adapter(source), tmp_path / "b.safetensors", format="diffusers")
    deep = "transformer.single_transformer_blocks.39.attn.to_q"
    update = LowRankUpdate(deep, np.ones((1, 3)), np.ones((2, 1)), 1.0)
    file = write_adapter(Adapter({deep: update}, label="a"), tmp_path / "k", format="kohya")
    assert "lora_transformer_single_transformer_blocks_39_attn_to_q.alpha" in load_file(file)


def test_diffusers_converts_unets_to_the_same_layers(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Its own conversion of kohya's files for SDXL, from the keys of before PEFT's."""
    pytest.importorskip("diffusers")
    from diffusers.loaders import lora_conversion_utils as utils

    layers = sdxl_layers()
    source = written(tmp_path / "a.safetensors", random_tensors(rng, [x.kohya for x in layers]))
    there = write_adapter(read_adapter(source), tmp_path / "b.safetensors", format="diffusers")
    config = types.SimpleNamespace(layers_per_block=2)
    mapped = utils._maybe_map_sgm_blocks_to_diffusers(load_torch(source), config)
    converted, _ = utils._convert_non_diffusers_lora_to_diffusers(mapped)
    projections = {"to_q": "q_proj", "to_out": "out_proj"}
    theirs = {}
    for key, tensor in converted.items():
        name, role = re.fullmatch(
            r"(.+?)(?:[._]lora|\.lora_linear_layer)\.(down|up)\.weight", key
        ).groups()  # type: ignore[union-attr]
        path, _, layer = name.rpartition(".")
        if "text_encoder" in name:
            name = f"{path}.{projections.get(layer, layer)}"
        elif path.endswith(".processor"):
            name = f"{path.removesuffix('.processor')}.{layer}{'.0' * (layer == 'to_out')}"
        theirs[f"{name}.lora_{'AB'[role == 'up']}.weight"] = tensor.numpy()
    ours = load_file(there)
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert np.array_equal(tensor, ours[key])


@pytest.mark.parametrize("split", [True, False])
def test_diffusers_converts_flux_to_the_same_layers(
    tmp_path: Path, rng: np.random.Generator, *, split: bool
) -> None:
    """Its own conversion of sd-scripts' files for FLUX, which folds the scale into the factors."""
    pytest.importorskip("diffusers")
    from diffusers.loaders import lora_conversion_utils as utils

    source = flux_file(rng, tmp_path / "a.safetensors", split=split, hidden=3072)
    there = write_adapter(read_adapter(source), tmp_path / "b.safetensors", format="diffusers")
    tensors = {k: v.double() for k, v in load_torch(source).items() if "lora_te" not in k}
    theirs = utils._convert_kohya_flux_lora_to_diffusers(tensors)
    ours = {k: v for k, v in peft_deltas(there).items() if not k.startswith("text_encoder")}
    assert {f"{name}.lora_{x}.weight" for name in ours for x in "AB"} == theirs.keys()
    for name, delta in ours.items():
        A, B = (theirs[f"{name}.lora_{x}.weight"].numpy() for x in "AB")
        np.testing.assert_allclose(delta, B @ A, rtol=1e-6, atol=1e-9)


def test_diffusers_loads_what_it_is_given(tmp_path: Path, rng: np.random.Generator) -> None:
    """A small U-Net of its own, with the scale in its metadata."""
    pytest.importorskip("diffusers")
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        transformer_layers_per_block=2,
        attention_head_dim=8,
        norm_num_groups=8,
        use_linear_projection=True,
    )
    names = [n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear) and "attn" in n]
    updates = {}
    for i, name in enumerate(names):
        d_out, d_in = unet.get_submodule(name).weight.shape
        a, b = rng.standard_normal((2 + i % 2, d_in)), rng.standard_normal((d_out, 2 + i % 2))
        updates[f"unet.{name}"] = LowRankUpdate(f"unet.{name}", a, b, 0.25 * (1 + i % 3))
    adapter = Adapter(updates, label="a")
    kohya = write_adapter(adapter, tmp_path / "k.safetensors", format="kohya")
    assert any("middle_block_1_transformer_blocks_1" in key for key in load_file(kohya))
    file = write_adapter(read_adapter(kohya), tmp_path / "d.safetensors", format="diffusers")
    before = {name: unet.get_submodule(name).weight.detach().numpy().copy() for name in names}
    unet.load_lora_adapter(str(tmp_path), weight_name=file.name, prefix="unet")
    unet.fuse_lora()
    for name, weight in before.items():
        fused = unet.get_submodule(name).base_layer.weight.detach().numpy()
        delta = updates[f"unet.{name}"].delta_weight()
        np.testing.assert_allclose(fused - weight, delta, atol=1e-5 * np.abs(delta).max() + 1e-6)
