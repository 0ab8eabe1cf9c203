"""What files of image models hold next to the factors, their metadata and their stored types.

What is written is read by the safetensors library and judged by the rules of the programs that
load it (ComfyUI ``comfy/lora.py``, sd-scripts ``networks/lora.py`` and ``library/train_util.py``,
LyCORIS ``modules/locon.py``), rebuilt here as small tables; never by this package's own readers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from test_cli import call, document

from lora_analysis.edit import resize_adapter
from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats import read_adapter, unwritten_findings, write_adapter
from lora_analysis.storage.dtypes import narrow, to_float32

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
METADATA = {
    "ss_network_dim": "8",
    "ss_network_alpha": "4.0",
    "ss_network_module": "networks.lora",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_tag_frequency": '{"a":{"cät":3}}',
    "ss_training_comment": "mine",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.trigger_phrase": "mytoken",
    "modelspec.hash_sha256": "0xold",
    "sshs_model_hash": "old",
    "sshs_legacy_hash": "old",
}
SIDE = ("lora_unet_norm.diff", "lora_unet_norm.diff_b", "lora_unet_mod.diff_m", "x.scale_weight")
EMBEDDING = "bundle_emb.mytoken.string_to_param.*"

Tensors = dict[str, torch.Tensor]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pair(name: str, d_out: int = 24, d_in: int = 32, rank: int = 8, dtype: Any = None) -> Tensors:
    dtype = dtype or torch.float16
    return {
        f"{name}.lora_down.weight": drawn(rank, d_in).to(dtype),
        f"{name}.lora_up.weight": drawn(d_out, rank).to(dtype),
        f"{name}.alpha": torch.tensor(rank / 2),
    }


def kohya_file(path: Path, *, side: bool = True, dtype: Any = None, **more: Tensors) -> Path:
    """A file as sd-scripts, LyCORIS and OneTrainer make it together."""
    tensors = pair(Q, dtype=dtype)
    for part in more.values():
        tensors |= part
    tensors[EMBEDDING] = drawn(2, 24).to(torch.bfloat16)
    if side:
        tensors |= {
            SIDE[0]: drawn(5).to(torch.float16),
            SIDE[1]: drawn(6).to(torch.bfloat16),
            SIDE[2]: drawn(3, 4).double(),
            SIDE[3]: drawn(4).to(torch.float8_e4m3fn),
        }
    save_file(tensors, path, METADATA)
    return path


def content(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, "pt") as opened:
        return load_file(path), dict(opened.metadata())


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    plain = [t.reshape(-1).view(torch.uint8).tolist() for t in (first, second)]
    return first.dtype == second.dtype and first.shape == second.shape and plain[0] == plain[1]


def update_of(tensors: Tensors, name: str = Q) -> np.ndarray:
    """ΔW as ComfyUI computes it (``weight_adapter/lora.py``)."""
    up, down = (tensors[f"{name}.lora_{role}.weight"].double() for role in ("up", "down"))
    alpha = tensors[f"{name}.alpha"].item()
    product = up.flatten(1) @ down.flatten(1)
    return np.asarray(product * alpha / down.shape[0])


def sd_scripts_hashes(path: Path) -> tuple[str, str]:
    """The hashes that sd-scripts stores (``precalculate_safetensors_hashes``)."""
    tensors, metadata = content(path)
    written = save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(written[:8], "little")
    legacy = written[0x100000 : 0x100000 + 0x10000]
    return hashlib.sha256(written[start:]).hexdigest(), hashlib.sha256(legacy).hexdigest()[:8]


@pytest.mark.parametrize("verb", ["resize", "convert"])
def test_within_kohya_all_that_lies_next_to_the_factors_is_carried_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    source, target = kohya_file(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    more = ("--rank", 3) if verb == "resize" else ()
    code, out, _ = call(capsys, verb, source, *more, "-o", target, "--format", "json")
    assert code == 0
    assert document(out)["format"] == "kohya"
    assert not any("not-written" in finding["code"] for finding in document(out)["findings"])
    before, after = content(source)[0], content(target)[0]
    assert before.keys() == after.keys()
    for key in (*SIDE, EMBEDDING):
        assert same_bits(before[key], after[key])


def test_resize_updates_the_metadata_as_sd_scripts_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = kohya_file(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    assert call(capsys, "resize", source, "--rank", 3, "-o", target)[0] == 0
    metadata = content(target)[1]
    assert METADATA.keys() <= metadata.keys()
    model, legacy = sd_scripts_hashes(target)
    changed = {
        "ss_network_dim": "3",
        "ss_network_alpha": "1.5",
        "ss_training_comment": "dimension is resized from 8 to 3; mine",
        "sshs_model_hash": model,
        "sshs_legacy_hash": legacy,
        "modelspec.hash_sha256": f"0x{model}",
    }
    assert {key: metadata[key] for key in METADATA} == METADATA | changed


def test_ranks_that_differ_are_dynamic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Modules narrower than the rank: one output, four inputs, a convolution of one tap."""
    narrow_modules = pair("lora_unet_final_layer_linear", 1) | pair("lora_unet_img_in", 32, 4)
    source = kohya_file(tmp_path / "in.safetensors", narrow=narrow_modules)
    target = tmp_path / "out.safetensors"
    code, out, _ = call(capsys, "resize", source, "--rank", 6, "-o", target, "--format", "json")
    assert code == 0
    assert target.is_file()
    tensors, metadata = content(target)
    assert {k: v.shape for k, v in tensors.items() if "lora_down" in k} == {
        f"{Q}.lora_down.weight": (6, 32),
        "lora_unet_final_layer_linear.lora_down.weight": (1, 32),
        "lora_unet_img_in.lora_down.weight": (4, 4),
    }
    assert {v.dtype for k, v in tensors.items() if ".lora_" in k} == {torch.float16}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert metadata["ss_training_comment"] == "Dynamic resize from 8; mine"
    # The printed error is that of the file, rounding included.
    given = content(source)[0]
    for module in document(out)["modules"]:
        whole = update_of(given, module["module"])
        difference = np.linalg.norm(update_of(tensors, module["module"]) - whole)
        assert module["error_norm"] == pytest.approx(difference, rel=1e-6)
        assert module["error_norm"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("large", [False, True])
def test_hashes_are_those_of_the_file(tmp_path: Path, dtype: torch.dtype, large: bool) -> None:
    """Also of a file larger than a megabyte, of which the legacy hash sees a part."""
    wide = pair("lora_unet_wide", 9000, 1500, 64, dtype=dtype) if large else {}
    source = kohya_file(tmp_path / "in.safetensors", dtype=dtype, wide=wide)
    target = write_adapter(read_adapter(source), tmp_path / "out.safetensors", format="kohya")
    tensors, metadata = content(target)
    hashes = metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]
    assert hashes == sd_scripts_hashes(target)
    assert {v.dtype for k, v in tensors.items() if ".lora_" in k} == {dtype}
    assert (hashes[1] == hashlib.sha256(b"").hexdigest()[:8]) != large
    unchanged = METADATA.keys() - {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}
    assert all(metadata[key] == METADATA[key] for key in unchanged)


def test_what_alters_the_model_is_refused_by_writers_of_other_formats(tmp_path: Path) -> None:
    adapter = read_adapter(kohya_file(tmp_path / "in.safetensors"))
    for format in ("peft", "flux", "loralib", "mlx"):
        with pytest.raises(UnsupportedMethodError, match=r"'lora_unet_norm\.diff'.*--to kohya"):
            write_adapter(adapter, tmp_path / format, format=format)
        assert not (tmp_path / format).exists()


def test_what_does_not_is_named_as_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = kohya_file(tmp_path / "in.safetensors", side=False)
    for verb, more in (("convert", ()), ("resize", ("--rank", 2))):
        ask = (verb, source, *more, "--to", "peft", "-o", tmp_path / verb, "--format", "json")
        code, out, _ = call(capsys, *ask)
        assert code == 0
        lacking = {
            finding["code"]: finding["fields"]["keys"]
            for finding in document(out)["findings"]
            if finding["code"].endswith("not-written")
        }
        assert lacking["side-tensors-not-written"] == [EMBEDDING]
        assert set(lacking["metadata-not-written"]) == set(METADATA)


def test_an_adapter_without_such_things_lacks_nothing(tmp_path: Path) -> None:
    save_file(pair(Q), tmp_path / "in.safetensors")
    adapter = read_adapter(tmp_path / "in.safetensors")
    assert not adapter.side_tensors
    assert unwritten_findings(adapter, "peft") == []


def test_resizing_within_loralib_keeps_trained_biases(tmp_path: Path) -> None:
    """loralib's ``lora_state_dict`` with ``bias="lora_only"``."""
    tensors = {"q.lora_A": drawn(4, 8), "q.lora_B": drawn(6, 4), "q.bias": drawn(6)}
    save_file(tensors, tmp_path / "in.safetensors", {"note": "mine"})
    small = resize_adapter(read_adapter(tmp_path / "in.safetensors", scale=1), rank=2).adapter
    written, metadata = content(write_adapter(small, tmp_path / "out", format="loralib"))
    assert same_bits(written["q.bias"], tensors["q.bias"])
    assert metadata["note"] == "mine"
    with pytest.raises(UnsupportedMethodError, match=r"'q\.bias'"):
        write_adapter(small, tmp_path / "peft", format="peft")


def test_the_rest_of_a_whole_model_is_named_and_does_not_hinder(tmp_path: Path) -> None:
    tensors = {"q.lora_A": drawn(4, 8), "q.lora_B": drawn(6, 4)}
    save_file(tensors | {"q.weight": drawn(6, 8), "q.bias": drawn(6)}, tmp_path / "in.safetensors")
    adapter = read_adapter(tmp_path / "in.safetensors", scale=1)
    write_adapter(adapter, tmp_path / "peft")
    (finding,) = unwritten_findings(adapter, "peft")
    assert sorted(finding.fields["keys"]) == ["q.bias", "q.weight"]


def test_a_bias_of_b_keeps_its_weight_when_the_rank_falls(tmp_path: Path) -> None:
    """B's bias is multiplied by the scale: a module's scale must stay what it was."""
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": drawn(8, 16), f"{name}.lora_B.weight": drawn(24, 8)}
    tensors[f"{name}.lora_B.bias"] = drawn(24)
    config = {"unet.r": 8, "unet.lora_alpha": 2, "unet.lora_bias": True}
    path = tmp_path / "in.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config)})
    small = resize_adapter(read_adapter(path), rank=2).adapter
    target = write_adapter(small, tmp_path / "out.safetensors", format="diffusers")
    written, metadata = content(target)
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["unet.lora_alpha"] / config["unet.r"] == 2 / 8
    assert config["unet.lora_bias"] is True
    assert same_bits(written[f"{name}.lora_B.bias"], tensors[f"{name}.lora_B.bias"])


def test_numbers_too_large_for_the_stored_type_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two directions of which one half-precision factor each is near the limit.
    tensors = {
        f"{Q}.lora_down.weight": torch.full((1, 512), 6e4, dtype=torch.float16),
        f"{Q}.lora_up.weight": torch.full((512, 1), 6e4, dtype=torch.float16),
        f"{Q}.alpha": torch.tensor(1e-4),
        f"{Q[:-1]}k.lora_down.weight": torch.full((1, 4), 6e4, dtype=torch.float16),
        f"{Q[:-1]}k.lora_up.weight": torch.full((4096, 1), 6e4, dtype=torch.float16),
        f"{Q[:-1]}k.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    target = tmp_path / "out.safetensors"
    ask = ("resize", tmp_path / "in.safetensors", "--rank", 1, "-o", target)
    code, _, err = call(capsys, *ask)
    assert code == 3
    assert "too large for float16" in err
    assert "--to peft" in err
    assert not target.exists()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_rounding_to_a_stored_type_is_torchs(rng: np.random.Generator, name: str) -> None:
    values = np.concatenate([rng.standard_normal(4000) * 2.0 ** rng.integers(-24, 12, 4000)])
    values[:3] = 0.0, 1 + 2**-8, 1 + 3 * 2**-8  # ties of bfloat16: to the even neighbor
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).to(getattr(torch, name)).float().numpy()
    np.testing.assert_array_equal(to_float32(narrow(values, name, "A"), name), expected)


def test_products_that_the_stored_type_does_not_hold_are_written_wider(tmp_path: Path) -> None:
    """A Tucker core is multiplied out: half precision would round the product."""
    tensors = {
        f"{CONV}.lora_down.weight": drawn(2, 5, 1, 1).half(),
        f"{CONV}.lora_mid.weight": drawn(2, 2, 3, 3).half(),
        f"{CONV}.lora_up.weight": drawn(6, 2, 1, 1).half(),
        f"{CONV}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    adapter = read_adapter(tmp_path / "in.safetensors")
    written, _ = content(write_adapter(adapter, tmp_path / "out.safetensors", format="kohya"))
    assert written[f"{CONV}.lora_down.weight"].dtype == torch.float32
    mid, up, down = (
        tensors[f"{CONV}.lora_{role}.weight"].double().numpy() for role in ("mid", "up", "down")
    )
    whole = np.einsum("ijkl,pi,jr->prkl", mid, up[:, :, 0, 0], down[:, :, 0, 0]) / 2
    np.testing.assert_allclose(
        update_of(written, CONV), whole.reshape(6, -1), rtol=0, atol=1e-6 * abs(whole).max()
    )


# ComfyUI's map of a model's keys (comfy/lora.py, model_lora_keys_unet), for names of its own, and
# of diffusers' for FLUX and SD3 ("onetrainer").
def comfy_keys(path: str, diffusers: str = "") -> set[str]:
    keys = {f"lora_unet_{path.replace('.', '_')}", f"diffusion_model.{path}"}
    if diffusers:
        flat = diffusers.replace(".", "_")
        keys |= {f"transformer.{diffusers}", f"lora_transformer_{flat}", f"lycoris_{flat}"}
    return keys


FLUX_QKV = ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_q")


@pytest.mark.parametrize(
    ("stored", "loadable"),
    [
        ("diffusion_model.blocks.0.adaLN_modulation.1", comfy_keys("blocks.0.adaLN_modulation.1")),
        ("transformer.blocks.0.attn.to_q", comfy_keys("blocks.0.attn.to_q")),
        ("transformer.transformer_blocks.0.attn.to_q", comfy_keys(*FLUX_QKV)),
        ("transformer.single_transformer_blocks.3.attn.to_q",
         comfy_keys("single_blocks.3.linear1", "single_transformer_blocks.3.attn.to_q")),
        ("diffusion_model.double_blocks.0.img_attn.qkv", comfy_keys(FLUX_QKV[0])),
        ("unet.down_blocks.0.a.proj_in", comfy_keys("down_blocks.0.a.proj_in")),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1",
         {f"lora_te{i}_text_model_encoder_layers_0_mlp_fc1" for i in ("", "1")}),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
         {"lora_te1_text_model_encoder_layers_0_mlp_fc1"}),
    ],
)  # fmt: skip
def test_kohyas_names_are_those_that_comfyui_looks_up(
    tmp_path: Path, stored: str, loadable: set[str]
) -> None:
    """Mixed ranks without alphas: the loaders multiply by 1, and so do those of the result."""
    tensors = {f"{stored}.lora_A.weight": drawn(4, 8), f"{stored}.lora_B.weight": drawn(6, 4)}
    authors = stored.startswith(("diffusion_model.", "text_encoders."))
    other = "diffusion_model.blocks.9.x" if authors else "transformer.blocks.9.x"
    tensors |= {f"{other}.lora_A.weight": drawn(2, 8), f"{other}.lora_B.weight": drawn(6, 2)}
    save_file(tensors, tmp_path / "in.safetensors")
    target = tmp_path / "out.safetensors"
    write_adapter(read_adapter(tmp_path / "in.safetensors", scale=1), target, format="kohya")
    written, metadata = content(target)
    names = {key.partition(".")[0] for key in written}
    (name,) = names - {"lora_unet_blocks_9_x"}
    assert name in loadable
    # sd-scripts creates its modules from keys under these prefixes alone (networks/lora*.py).
    if not name.startswith("lora_transformer_"):
        assert name.startswith(("lora_unet_", "lora_te"))
    product = tensors[f"{stored}.lora_B.weight"] @ tensors[f"{stored}.lora_A.weight"]
    np.testing.assert_allclose(update_of(written, name), product, rtol=1e-6)
    assert metadata["ss_network_dim"] == "Dynamic"


def test_a_file_of_diffusers_without_a_scale_converts_at_its_loaders_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "transformer.blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": drawn(4, 8), f"{name}.lora_B.weight": drawn(6, 4)}
    source = tmp_path / "in.safetensors"
    save_file(tensors, source)
    ask = ("convert", source, "--to", "kohya", "-o", tmp_path / "k.safetensors")
    code, out, _ = call(capsys, *ask, "--format", "json")
    assert code == 0
    assert [finding["code"] for finding in document(out)["findings"]] == ["loaders-scale"]
    written, _ = content(tmp_path / "k.safetensors")
    assert written["lora_unet_blocks_0_attn_to_q.alpha"] == 4
    # PEFT's own file states an alpha, which nobody knows.
    assert call(capsys, "convert", source, "--to", "peft", "-o", tmp_path / "p")[0] == 3


@pytest.mark.parametrize(
    "stem",
    [
        "diffusion_model.blocks.0.attn.to_q",
        "double_blocks.0.img_attn.proj",
        "double_blocks.0.processor.qkv_lora1",
        "diffusion_model.single_blocks.2.processor.proj_lora",
        "text_encoders.clip_l.transformer.text_model.q",
    ],
)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_files_under_the_authors_names_keep_their_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stem: str, alpha: float | None
) -> None:
    """ai-toolkit's, control LoRAs', XLabs' and OneTrainer's keys, kohya's next to them."""
    a, b = ("down", "up") if "processor" in stem else ("lora_A", "lora_B")
    tensors = {f"{stem}.{a}.weight": drawn(8, 16).half(), f"{stem}.{b}.weight": drawn(24, 8).half()}
    tensors |= pair("lora_te1_q")
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    if not stem.startswith("diffusion_model"):
        tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = drawn(5)
        extra = "double_blocks.3.img_attn.qkv" if "processor" not in stem else stem[:-1] + "2"
        tensors |= {f"{extra}.{a}.weight": drawn(8, 16), f"{extra}.{b}.weight": drawn(24, 8)}
    save_file(tensors, tmp_path / "in.safetensors", {"software": "mine", "sshs_model_hash": "old"})
    target = tmp_path / "out.safetensors"
    ask = ("resize", tmp_path / "in.safetensors", "--rank", 2, "-o", target, "--format", "json")
    code, out, _ = call(capsys, *ask)
    assert code == 0
    assert document(out)["format"] == "flux"
    written, metadata = content(target)
    assert written.keys() == tensors.keys()
    assert written[f"{stem}.{a}.weight"].shape == (2, 16)
    assert written[f"{stem}.{b}.weight"].dtype == torch.float16
    if alpha is not None:
        assert written[f"{stem}.alpha"] == alpha * 2 / 8
    assert metadata["software"] == "mine"
    assert metadata["sshs_model_hash"] == sd_scripts_hashes(target)[0]


def lycoris_merge(W: np.ndarray, delta: np.ndarray, dora_scale: np.ndarray) -> np.ndarray:
    """W with DoRA as LyCORIS (``wd_on_out`` or not) and OneTrainer compute it, for any kernel."""
    V = W + delta
    if dora_scale.shape[0] == V.shape[0]:
        norm = np.linalg.norm(V.reshape(V.shape[0], -1), axis=1)
        norm = norm.reshape(-1, *[1] * (V.ndim - 1))
    else:
        turned = V.swapaxes(0, 1)
        norm = np.linalg.norm(turned.reshape(turned.shape[0], -1), axis=1)
        norm = norm.reshape(-1, *[1] * (V.ndim - 1)).swapaxes(0, 1)
    merged: np.ndarray = dora_scale * (V / norm)
    return merged


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("d_in", [24, 32])
def test_dora_of_lycoris_and_onetrainer_is_computed_and_kept(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    side: str,
    kernel: tuple[int, ...],
    d_in: int,
) -> None:
    name, path = "lora_transformer_transformer_blocks_0_attn_to_q", "transformer_blocks.0.attn.to_q"
    ones = tuple(1 for _ in kernel)
    tensors = {
        f"{name}.lora_down.weight": drawn(4, d_in, *kernel).half(),
        f"{name}.lora_up.weight": drawn(24, 4, *ones).half(),
        f"{name}.alpha": torch.tensor(1.0),
        f"{name}.dora_scale": drawn(*((24, 1) if side == "output" else (1, d_in)), *ones).abs() + 1,
    }
    W = drawn(24, d_in, *kernel)
    save_file(tensors, tmp_path / "in.safetensors")
    save_file({f"{path}.weight": W}, tmp_path / "base.safetensors")
    delta = update_of(tensors, name).reshape(W.shape)
    whole = lycoris_merge(W.double().numpy(), delta, tensors[f"{name}.dora_scale"].double().numpy())
    whole = (whole - W.double().numpy()).reshape(24, -1)
    ask = ("inspect", tmp_path / "in.safetensors", "--format", "json")
    plain = document(call(capsys, *ask)[1])["adapters"][0]
    assert plain["findings"][0]["code"] == "dora"
    inspected = document(call(capsys, *ask, "--trained-on", tmp_path / "base.safetensors")[1])
    (module,) = inspected["adapters"][0]["modules"]
    np.testing.assert_allclose(
        module["singular_values"], np.linalg.svd(whole)[1], rtol=1e-6, atol=1e-6
    )
    assert [finding["code"] for finding in inspected["adapters"][0]["findings"]] == ["whole-change"]
    target = tmp_path / "out.safetensors"
    assert call(capsys, "resize", tmp_path / "in.safetensors", "--rank", 2, "-o", target)[0] == 0
    written_norms, given = content(target)[0][f"{name}.dora_scale"], tensors[f"{name}.dora_scale"]
    assert written_norms.shape == given.shape
    np.testing.assert_array_equal(written_norms.float(), given.float())
    if side == "input":  # PEFT's norms are of rows
        adapter = read_adapter(tmp_path / "in.safetensors")
        for format in ("peft", "mlx"):
            with pytest.raises(UnsupportedMethodError):
                write_adapter(adapter, tmp_path / format, format=format)


def test_half_renamed_dora_is_that_of_the_full_name(tmp_path: Path) -> None:
    """PEFT's factors and magnitudes under kohya's prefix, some dots left in the path."""
    stored = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_1_attn2_to_out.0"
    tensors = pair(stored) | {f"{stored}.lora_magnitude_vector": drawn(24).abs() + 1}
    save_file(tensors, tmp_path / "in.safetensors")
    adapter = read_adapter(tmp_path / "in.safetensors")
    name = stored.replace(".", "_")
    assert list(adapter) == [name]
    assert [finding.code for finding in adapter.provenance.findings] == ["dora"]
    written, _ = content(write_adapter(adapter, tmp_path / "out.safetensors", format="kohya"))
    norms = written[f"{name}.dora_scale"]
    np.testing.assert_array_equal(norms, tensors[f"{stored}.lora_magnitude_vector"][:, None])


def test_a_name_with_a_suffix_is_a_file_or_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = kohya_file(tmp_path / "in.safetensors", side=False)
    for to, name, hint in (
        ("peft", "out.safetensors", "a folder"),
        ("kohya", "out.pt", "end in .safetensors"),
        ("kohya", "out.gguf", "with --to: gguf"),
    ):
        ask = ("resize", source, "--rank", 2, "--to", to, "-o", tmp_path / name)
        code, _, err = call(capsys, *ask)
        assert code == 2
        assert hint in " ".join(err.split())
        assert not (tmp_path / name).exists()


def test_a_type_that_cannot_hold_the_factors_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="A of 'q' would hold 1e\\+05"):
        narrow(np.array([1e5]), "float16", "A of 'q'")


@pytest.mark.parametrize(
    ("a", "b", "alpha"),
    [
        ("attn1.processor.to_q_lora.down.weight", "attn1.processor.to_q_lora.up.weight", None),
        ("unet.attn1.to_out.0.lora.down.weight", "unet.attn1.to_out.0.lora.up.weight", None),
        (
            "unet.attn1.to_q.lora.down.weight",
            "unet.attn1.to_q.lora.up.weight",
            "unet.attn1.to_q.alpha",
        ),
        (
            "text_encoder.text_model.q_proj.lora_linear_layer.down.weight",
            "text_encoder.text_model.q_proj.lora_linear_layer.up.weight",
            None,
        ),
    ],
)
def test_files_of_earlier_diffusers_keep_their_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], a: str, b: str, alpha: str | None
) -> None:
    """Old programs know no other: neither x-to-PEFT conversions nor a config in the metadata."""
    tensors = {a: drawn(4, 16).half(), b: drawn(24, 4).half()}
    tensors |= {"unet.conv.lora_A.weight": drawn(4, 8), "unet.conv.lora_B.weight": drawn(6, 4)}
    if alpha:
        tensors[alpha] = torch.tensor(2.0)
    if not a.startswith("unet"):
        del tensors["unet.conv.lora_A.weight"], tensors["unet.conv.lora_B.weight"]
    save_file(tensors, tmp_path / "in.safetensors")
    target = tmp_path / "out.safetensors"
    assert call(capsys, "resize", tmp_path / "in.safetensors", "--rank", 2, "-o", target)[0] == 0
    written, _ = content(target)
    assert written.keys() == tensors.keys()
    assert (written[a].shape, written[b].dtype) == ((2, 16), torch.float16)
    if alpha:
        assert written[alpha] == 1
    scale = 0.5 if alpha else 1.0
    product = scale * (written[b].double() @ written[a].double())
    U, S, Vh = np.linalg.svd(scale * (tensors[b].double() @ tensors[a].double()).numpy())
    np.testing.assert_allclose(product, U[:, :2] * S[:2] @ Vh[:2], atol=2e-3 * S[0])
