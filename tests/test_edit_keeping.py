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
import torch
from image_files import Tensors
from image_models import flat, flux_fused, flux_layers, sd15_layers, sdxl_layers
from safetensors import safe_open
from safetensors.numpy import load_file, save
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- folders of PEFT, and scales that nobody knows ---------------------------------------------

PEFT_CONFIG = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": "owner/base",
    "revision": "abc",
    "r": 8,
    "lora_alpha": 16,
    "use_rslora": True,
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": ["classifier", "score"],
    "lora_dropout": 0.1,
    "init_lora_weights": "gaussian",
    "loftq_config": {},
    "eva_config": None,
    "megatron_core": "megatron.core",
    "inference_mode": True,
    "peft_version": "0.18.0",
    "some_later_field": [1, 2],
}
CARD = "---\nlicense: mit\n---\n# Mine\n"


def peft_folder(folder: Path, *, config: dict[str, Any] | None) -> Path:
    """Return a folder of bfloat16 as PEFT saves it, with a head and a model card."""
    torch.manual_seed(4)
    prefix = "base_model.model."
    tensors = {
        f"{prefix}layers.{i}.{p}.lora_{x}.weight": torch.randn(*shape).bfloat16()
        for i in range(2)
        for p in ("q_proj", "v_proj")
        for x, shape in (("A", (8, 12)), ("B", (16, 8)))
    }
    if config is not None:
        tensors[f"{prefix}classifier.weight"] = torch.randn(3, 16).bfloat16()
        tensors[f"{prefix}score.weight"] = torch.randn(3, 16).double()
    folder.mkdir()
    name = "adapter_model.safetensors" if config is not None else "bare.safetensors"
    save_torch(tensors, folder / name, {"format": "pt", "trained_by": "me"})
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "README.md").write_text(CARD)
        (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_resized_peft_folder_keeps_what_is_still_true(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = peft_folder(tmp_path / "source", config=PEFT_CONFIG)
    small = tmp_path / "small"
    assert call(capsys, "resize", source, "--rank", 4, "-o", small)[0] == 0
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in small.iterdir() if path.is_file()} == names
    assert (small / "README.md").read_text() == CARD
    config = json.loads((small / "adapter_config.json").read_text())
    changed = {k: v for k, v in config.items() if PEFT_CONFIG.get(k) != v}
    # rsLoRA's alpha/√r stays what it was; what is stated anew is what PEFT takes if it is missing.
    assert changed.pop("lora_alpha") / 4**0.5 == pytest.approx(16 / 8**0.5, rel=1e-12)
    assert changed == {
        "r": 4,
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "rank_pattern": {},
    }
    assert config.keys() >= PEFT_CONFIG.keys()
    before = load_torch(source / "adapter_model.safetensors")
    after = load_torch(small / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        if "lora" not in key:
            assert torch.equal(tensor, before[key])
    assert metadata_of(small / "adapter_model.safetensors").items() >= {
        ("format", "pt"),
        ("trained_by", "me"),
    }
    code, _, _ = call(capsys, "convert", source, "--dtype", "float32", "-o", tmp_path / "wide")
    assert code == 0
    wide = load_torch(tmp_path / "wide" / "adapter_model.safetensors")
    assert {t.dtype for k, t in wide.items() if "lora" in k} == {torch.float32}
    assert all(
        torch.equal(tensor.to(before[key].dtype), before[key]) for key, tensor in wide.items()
    )


def test_peft_loads_a_config_and_weights_that_were_kept(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = {key: value for key, value in PEFT_CONFIG.items() if key != "some_later_field"}
    small = resize_adapter(
        read_adapter(peft_folder(tmp_path / "source", config=config)), energy=0.6
    ).adapter
    folder = write_adapter(small, tmp_path / "small")
    loaded = peft.LoraConfig.from_pretrained(str(folder))
    assert loaded.use_rslora
    assert loaded.revision == "abc"
    weights = peft.utils.load_peft_weights(str(folder), device="cpu")
    deltas = read_adapter(tmp_path / "source")
    for name, update in small.items():
        A, B = (weights[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        rank = loaded.rank_pattern.get(name, loaded.r)
        scale = loaded.alpha_pattern.get(name, loaded.lora_alpha) / rank**0.5
        assert rank == len(A) == update.rank
        whole = deltas[name].delta_weight()
        lost = np.linalg.norm(scale * (B @ A).numpy() - whole) / np.linalg.norm(whole)
        assert lost**2 < 0.41


def test_a_scale_that_nobody_knows_is_not_asked_for(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {
        f"layers.{i}.q.lora_{x}": rng.standard_normal(shape).astype(np.float32)
        for i in range(2)
        for x, shape in (("A", (6, 9)), ("B", (12, 6)))
    }
    loralib = written(tmp_path / "loralib.safetensors", tensors)
    bare = peft_folder(tmp_path / "bare", config=None) / "bare.safetensors"
    for source, suffix in ((loralib, "lora_A"), (bare, "lora_A.weight")):
        for verb in (("resize", "--rank", 3), ("resize", "--budget", 150), ("convert",)):
            out = tmp_path / f"{source.stem}-{'-'.join(map(str, verb))}.safetensors"
            code, text, _ = call(capsys, verb[0], source, *verb[1:], "-o", out)
            assert (code, out.is_file()) == (0, True)
            assert "lora_scale" not in metadata_of(out)
            assert ("The scale is unknown" in text) == (verb[0] == "resize")
            assert set(types_of(out).values()) == set(types_of(source).values())
            assert all(key.endswith((suffix, suffix.replace("A", "B"))) for key in load_torch(out))
    # ΔW in units of the scale is the best approximation, whatever the scale will be.
    whole, small = tensors, load_file(tmp_path / "loralib-resize---rank-3.safetensors")
    for i in range(2):
        matrices = [m[f"layers.{i}.q.lora_B"] @ m[f"layers.{i}.q.lora_A"] for m in (whole, small)]
        sigma = np.linalg.svd(matrices[0], compute_uv=False)
        lost = np.linalg.norm(matrices[0] - matrices[1])
        assert lost == pytest.approx(np.linalg.norm(sigma[3:]), rel=1e-5)
    # PEFT's config must state a scale.
    ask = ("resize", loralib, "--rank", 3, "--to", "peft", "-o", tmp_path / "folder")
    code, _, err = call(capsys, *ask)
    assert (code, "--scale" in err) == (3, True)
    assert call(capsys, *ask, "--scale", 2)[0] == 0


def test_an_extracted_adapter_has_the_type_it_is_asked_for(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {f"layers.{i}.q_proj.weight": rng.standard_normal((12, 9)) for i in range(2)}
    tuned = {name: W + rng.standard_normal((12, 9)) for name, W in base.items()}
    paths = [
        written(tmp_path / f"{label}.safetensors", {k: v.astype(np.float32) for k, v in t.items()})
        for label, t in (("tuned", tuned), ("base", base))
    ]
    out = tmp_path / "lora.safetensors"
    ask = ("extract", paths[0], "--base", paths[1], "--not-transposed", "--rank", 6)
    ask += ("--rank-for", "layers.1.q_proj=2", "--to", "kohya", "--dtype", "float16", "-o", out)
    result = document(call(capsys, *ask, "--format", "json")[1])
    assert [module["rank"] for module in result["modules"]] == [6, 2]
    assert set(types_of(out).values()) == {"F16", "F32"}  # alphas are those of a new file
    stored = load_file(out)
    for module, name in zip(result["modules"], base, strict=True):
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        A, B = (stored[f"{flat}.lora_{x}.weight"].astype(float) for x in ("down", "up"))
        W = tuned[name].astype(np.float32).astype(float) - base[name].astype(np.float32)
        lost = np.linalg.norm(W - float(stored[f"{flat}.alpha"]) / len(A) * B @ A)
        assert module["error_norm"] == pytest.approx(lost, rel=1e-6)


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


@pytest.mark.slow
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


def test_kohyas_names_of_flux_become_the_paths_they_are_made_of(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """ComfyUI looks for ``diffusion_model.`` and the path; text encoders keep kohya's names."""
    layers = flux_layers()
    source = written(tmp_path / "a.safetensors", random_tensors(rng, [x.kohya for x in layers]))
    file = write_adapter(read_adapter(source), tmp_path / "b.safetensors", format="flux")
    paths = {key.removesuffix(".lora_A.weight") for key in load_file(file) if "lora_A" in key}
    assert "diffusion_model.double_blocks.0.img_mlp.2" in paths
    assert "diffusion_model.single_blocks.2.modulation.lin" in paths
    flattened = {flat("lora_unet", path.removeprefix("diffusion_model.")) for path in paths}
    encoders = {x.kohya for x in layers if x.kohya.startswith("lora_te1")}
    assert flattened == {x.kohya for x in layers} - encoders
    downs = {key.removesuffix(".lora_down.weight") for key in load_file(file) if "down" in key}
    assert downs == encoders
