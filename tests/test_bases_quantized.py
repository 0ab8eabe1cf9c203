"""Quantized weights: read as their own libraries decode them, and with the noise that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized_bases import (
    awq,
    bitsandbytes_4bit,
    bitsandbytes_int8,
    comfy_mark,
    four_bit_blocks,
    fp8_blocks,
    gptq,
    in_tiles,
    mxfp8,
    pack_nibbles,
    write_base,
)

from lora_analysis.bases import open_base, quantized
from lora_analysis.bases.quantized.codes import cell_variances, unpack
from lora_analysis.errors import BaseWeightError
from lora_analysis.storage.dtypes import BITS

# The noise is an expectation over where values fell inside their cells.
NOISE = 0.12
# Of 16 levels the outer ones are far apart, and values are not uniform between them.
COARSE_NOISE = 0.25


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def read(folder: Path, **asked: Any) -> np.ndarray:
    return open_base(folder).weight("q", **asked).array()


def true_noise(W: np.ndarray, values: np.ndarray) -> float:
    return float(np.linalg.norm(values - W) / np.linalg.norm(W))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4bit_reads_as_the_library_decodes_it(
    rng: np.random.Generator, tmp_path: Path, kind: str, nested: bool
) -> None:
    W = normal(rng, 48, 160)
    stored, decoded = bitsandbytes_4bit(W, kind, nested=nested)
    weight = open_base(write_base(tmp_path, stored)).weight("q", shape=(48, 160))
    np.testing.assert_allclose(weight.array(), decoded, rtol=0, atol=2e-6)
    assert weight.storage == f"bitsandbytes {kind}"
    assert weight.noise() == pytest.approx(true_noise(W.numpy(), weight.array()), rel=NOISE)


# From three elements on: the library takes a single byte for a transposed weight.
@given(m=st.integers(1, 9), n=st.integers(3, 70))
def test_4bit_rows_may_begin_inside_a_byte_and_inside_a_block(
    tmp_path_factory: pytest.TempPathFactory, m: int, n: int
) -> None:
    W = normal(np.random.default_rng(m * 100 + n), m, n)
    stored, decoded = bitsandbytes_4bit(W, "nf4", nested=False)
    folder = write_base(tmp_path_factory.mktemp("base"), stored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "BLOCK_ELEMENTS", n)
        np.testing.assert_array_equal(read(folder), decoded)


def test_bitsandbytes_int8_reads_as_the_library_decodes_it(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    W = normal(rng, 40, 64)
    stored, decoded = bitsandbytes_int8(W)
    weight = open_base(write_base(tmp_path, stored)).weight("q")
    np.testing.assert_allclose(weight.array(), decoded, rtol=1e-6)
    assert weight.storage == "bitsandbytes int8"
    assert weight.noise() == pytest.approx(true_noise(W.numpy(), weight.array()), rel=NOISE)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_reads_by_its_layout(
    rng: np.random.Generator, tmp_path: Path, bits: int, version: int
) -> None:
    W = rng.standard_normal((64, 96)).astype(np.float32)
    stored, values = gptq(W, bits=bits, group=32, version=version)
    stated = "gptq" if version == 1 else "gptq_v2"
    folder = write_base(tmp_path, stored, quant_method="gptq", checkpoint_format=stated)
    weight = open_base(folder).weight("q", shape=(64, 96))
    assert weight.transposed
    np.testing.assert_allclose(weight.array(), values, rtol=1e-6)
    assert weight.storage == f"GPTQ {bits}-bit"
    # At two bits a cell is so wide that values are not uniform over it.
    assert weight.noise() == pytest.approx(
        true_noise(W, weight.array()), rel=NOISE if bits > 2 else 0.25
    )


def test_gptq_with_activation_order_takes_each_inputs_own_group(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    W = rng.standard_normal((32, 96)).astype(np.float32)
    order = rng.permutation(np.arange(96) // 32)
    stored, values = gptq(W, bits=4, group=32, order=order)
    folder = write_base(tmp_path, stored, quant_method="gptq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "BLOCK_ELEMENTS", 32 * 32)
        np.testing.assert_allclose(read(folder), values, rtol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_unpack_to_the_bits_that_were_packed(rng: np.random.Generator, bits: int) -> None:
    codes = rng.integers(0, 2**bits, (64, 3))
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in codes[:, 1])
    words = np.zeros((2 * bits, 3), np.uint32)
    words[:, 1] = [int(stream[32 * at : 32 * (at + 1)][::-1], 2) for at in range(2 * bits)]
    np.testing.assert_array_equal(unpack(words.view(np.int32), bits)[:, 1], codes[:, 1])


def test_awq_reads_by_its_layout(rng: np.random.Generator, tmp_path: Path) -> None:
    W = rng.standard_normal((64, 96)).astype(np.float32)
    stored, values = awq(W, group=32)
    folder = write_base(tmp_path, stored, quant_method="awq", version="gemm")
    weight = open_base(folder).weight("q", shape=(64, 96))
    np.testing.assert_allclose(weight.array(), values, rtol=1e-6)
    assert weight.storage == "AWQ 4-bit"
    assert weight.noise() == pytest.approx(true_noise(W, weight.array()), rel=NOISE)


@pytest.mark.parametrize("block", [(16, 32), (40, 48)])
def test_fp8_blocks_are_scaled_each_by_its_own(
    rng: np.random.Generator, tmp_path: Path, block: tuple[int, int]
) -> None:
    W = normal(rng, 40, 90)  # blocks that do not divide it
    stored, values = fp8_blocks(W, block)
    folder = write_base(tmp_path, stored, quant_method="fp8", weight_block_size=list(block))
    weight = open_base(folder).weight("q", shape=(40, 90))
    np.testing.assert_array_equal(weight.array(), values)
    assert weight.storage.startswith("fp8, ")
    assert weight.noise() == pytest.approx(true_noise(W.numpy(), weight.array()), rel=NOISE)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24,), (24, 1), (1, 40)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "scale_weight"])
def test_fp8_scales_cover_what_their_shape_says(
    rng: np.random.Generator, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    codes = normal(rng, 24, 40).to(torch.float8_e5m2)
    scales = torch.rand(shape) + 0.5
    wanted = codes.float() * (scales[:, None] if shape == (24,) else scales)
    folder = write_base(tmp_path, {"q.weight": codes, f"q.{name}": scales})
    np.testing.assert_array_equal(read(folder), wanted)


@pytest.mark.parametrize("scale", [None, (), (1,), (8,), (8, 1, 1, 1)])
def test_kernels_in_fp8_are_matrices_with_a_row_per_output(
    rng: np.random.Generator, tmp_path: Path, scale: tuple[int, ...] | None
) -> None:
    codes = normal(rng, 8, 4, 3, 3).to(torch.float8_e4m3fn)
    stored, factor = {"q.weight": codes}, torch.ones(())
    if scale is not None:
        stored["q.scale_weight"] = factor = torch.rand(scale) + 0.5
    weight = open_base(write_base(tmp_path, stored)).weight("q", shape=(8, 36))
    wanted = codes.float().reshape(8, 36) * (
        factor.reshape(-1, 1) if factor.numel() > 1 else factor
    )
    np.testing.assert_array_equal(weight.array(), wanted)
    assert 0 < weight.noise() < 0.05


def test_fp8_without_scales_is_quantized_too(rng: np.random.Generator, tmp_path: Path) -> None:
    W = normal(rng, 24, 40)
    folder = write_base(tmp_path, {"q.weight": W.to(torch.float8_e4m3fn)})
    weight = open_base(folder).weight("q")
    np.testing.assert_array_equal(weight.array(), W.to(torch.float8_e4m3fn).float())
    assert weight.noise() == pytest.approx(true_noise(W.numpy(), weight.array()), rel=0.15)


def compressed(
    W: torch.Tensor, compressor: str, **args: Any
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what compressed-tensors stores of W, and what it decodes."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    weights = scheme.weights
    size = weights.group_size or W.shape[1]
    parts = W.reshape(W.shape[0], -1, size)
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), weights)
    state = {"weight": W, "weight_scale": scale}
    if not weights.symmetric:
        state["weight_zero_point"] = zero
    kind = BaseCompressor.get_value_from_registry(compressor)
    stored = kind.compress(state, scheme)
    decoded = kind.decompress(stored, scheme)["weight"]
    return {f"q.{name}": value for name, value in stored.items()}, decoded


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
def test_compressed_tensors_integers_read_as_the_library_decodes_them(
    rng: np.random.Generator, tmp_path: Path, bits: int, symmetric: bool, group: int | None
) -> None:
    W = normal(rng, 48, 96)
    strategy = "channel" if group is None else "group"
    stored, decoded = compressed(
        W, "pack-quantized", num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group
    )
    weight = open_base(write_base(tmp_path, stored)).weight("q", shape=(48, 96))
    np.testing.assert_allclose(weight.array(), decoded.float(), rtol=1e-6)
    assert weight.storage == f"compressed-tensors int{bits}"
    if bits > 3:
        assert weight.noise() == pytest.approx(true_noise(W.numpy(), weight.array()), rel=0.1)


@pytest.mark.parametrize(("bits", "kind"), [(8, "int"), (8, "float")])
def test_compressed_tensors_of_8_bits_read_as_the_library_decodes_them(
    rng: np.random.Generator, tmp_path: Path, bits: int, kind: str
) -> None:
    W = normal(rng, 48, 96)
    stored, decoded = compressed(
        W, f"{kind}-quantized", num_bits=bits, type=kind, symmetric=True, strategy="channel"
    )
    np.testing.assert_allclose(read(write_base(tmp_path, stored)), decoded.float(), rtol=1e-6)


def test_gpt_oss_experts_read_as_transformers_converts_them(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.from_numpy(rng.integers(0, 256, (3, 10, 2, 16), dtype=np.uint8))
    scales = torch.from_numpy(rng.integers(120, 134, (3, 10, 2), dtype=np.uint8))
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # (expert, in, out)
    path = "model.layers.0.mlp.experts.gate_up_proj"
    folder = write_base(tmp_path, {f"{path}_blocks": blocks, f"{path}_scales": scales})
    base = open_base(folder)
    for expert in range(3):
        weight = base.weight(f"{path}.{expert}", shape=(10, 64))
        assert weight.storage == "MXFP4"
        np.testing.assert_array_equal(weight.array(), wanted[expert].T)
    with pytest.raises(BaseWeightError, match="no weight belongs"):
        base.weight(f"{path}.3", shape=(10, 64))


@pytest.mark.parametrize("divided", [True, False])
def test_nvfp4_has_a_scale_per_16_and_one_for_the_whole(
    rng: np.random.Generator, tmp_path: Path, divided: bool
) -> None:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    packed = torch.from_numpy(rng.integers(0, 256, (8, 32), dtype=np.uint8))
    scales = (torch.rand(8, 4) * 4).to(torch.float8_e4m3fn)
    whole = torch.tensor([3.5])
    codes = unpack_fp4_from_uint8(packed, 8, 64).float()
    spread = scales.float().repeat_interleave(16, 1)
    if divided:
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        wanted = codes * (spread / whole)
    else:
        names = ("weight", "weight_scale", "weight_scale_2")
        wanted = codes * (spread * whole)
    stored = dict(zip((f"q.{name}" for name in names), (packed, scales, whole), strict=True))
    weight = open_base(write_base(tmp_path, stored)).weight("q", shape=(8, 64))
    assert weight.storage == "NVFP4"
    np.testing.assert_allclose(weight.array(), wanted, rtol=1e-6)


def test_the_cells_of_equal_steps_have_the_variance_of_a_uniform_error() -> None:
    levels = np.arange(-4, 5, dtype=np.float32) * 0.5
    inner = cell_variances(levels)[1:-1]
    np.testing.assert_allclose(inner, 0.25 / 12, rtol=1e-6)
    doubled = cell_variances(2 * levels)[1:-1]
    np.testing.assert_allclose(doubled, 4 * inner, rtol=1e-6)


Damage = Callable[[dict[str, Any]], None]


def cut(name: str) -> Damage:
    def damage(stored: dict[str, Any]) -> None:
        stored[name] = stored[name][:-1].contiguous()

    return damage


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut("q.weight"), "q.weight' should have 5,120 elements, it has 5,119"),
        (cut("q.weight.absmax"), "absmax' should have 160 elements"),
        (lambda stored: stored.pop("q.weight.quant_map"), "quant_map.*is missing"),
        (
            lambda stored: stored.update(
                {"q.weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}
            ),
            "quant_state is not readable",
        ),
    ],
)
def test_4bit_parts_that_do_not_fit_are_an_error_in_one_line(
    rng: np.random.Generator, tmp_path: Path, damage: Damage, told: str
) -> None:
    stored, _ = bitsandbytes_4bit(normal(rng, 64, 160), "nf4", nested=False)
    damage(stored)
    with pytest.raises(BaseWeightError, match=told) as caught:
        open_base(write_base(tmp_path, stored)).weight("q")
    assert "\n" not in str(caught.value)


def test_packed_words_that_do_not_fit_are_an_error(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    W = rng.standard_normal((64, 96)).astype(np.float32)
    whole, _ = gptq(W, bits=4, group=32)
    for name in ("q.qweight", "q.qzeros", "q.scales", "q.g_idx"):
        stored = dict(whole)
        stored[name] = stored[name][..., :-1]
        folder = write_base(tmp_path / name, stored, quant_method="gptq")
        with pytest.raises(BaseWeightError, match=r"q\.qweight.*do(es)? not fit"):
            open_base(folder).weight("q")
    for wrong in (-1, 3):
        stored = {**whole, "q.g_idx": np.full(96, wrong, np.int32)}
        folder = write_base(tmp_path / f"group {wrong}", stored)
        with pytest.raises(BaseWeightError, match="do not fit"):
            open_base(folder).weight("q")
    folder = write_base(tmp_path / "marlin", whole, checkpoint_format="marlin")
    with pytest.raises(BaseWeightError, match=r"marlin.*dequantize"):
        open_base(folder).weight("q")
    stored, _ = awq(W, group=32)
    folder = write_base(tmp_path / "gemv", stored, quant_method="awq", version="gemv")
    with pytest.raises(BaseWeightError, match=r"gemm.*gemv"):
        open_base(folder).weight("q")


def test_scales_that_do_not_cover_the_weight_are_an_error(tmp_path: Path) -> None:
    codes = torch.zeros(24, 40, dtype=torch.float8_e4m3fn)
    for shape in ((7,), (24, 7), (5, 5)):
        folder = write_base(
            tmp_path / str(shape), {"q.weight": codes, "q.weight_scale": torch.ones(shape)}
        )
        with pytest.raises(BaseWeightError, match=r"do not cover a weight of shape \(24, 40\)"):
            open_base(folder).weight("q")


MX_STATEMENTS: tuple[dict[str, Any], ...] = (
    {"quant_method": "mxfp8"},
    {"quant_method": "modelopt", "quant_algo": "MXFP8"},
    {"quant_method": "compressed-tensors", "format": "mxfp8-quantized"},
    {"quant_method": "fp8", "scale_fmt": "ue8m0"},
    {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {"group_0": {"format": "mxfp8-quantized"}},
    },
)


@pytest.mark.parametrize("stated", MX_STATEMENTS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_mxfp8_linear_layers_have_a_power_of_two_per_32(
    rng: np.random.Generator, tmp_path: Path, stated: dict[str, Any], dtype: torch.dtype
) -> None:
    W = normal(rng, 24, 96) * 0.02
    codes, exponents, values = mxfp8(W, dtype)
    folder = write_base(tmp_path, {"q.weight": codes, "q.weight_scale": exponents}, **stated)
    weight = open_base(folder).weight("q", shape=(24, 96))
    np.testing.assert_array_equal(weight.array(), values)
    assert weight.storage == "MXFP8, a scale per 1 × 32"
    assert weight.noise() == pytest.approx(true_noise(W.numpy(), values.numpy()), rel=NOISE)


@pytest.mark.parametrize("block", [(1, 32), (16, 32), (16, 48)])
def test_scales_stored_as_exponents_need_no_statement(
    rng: np.random.Generator, tmp_path: Path, block: tuple[int, int]
) -> None:
    codes, exponents, values = mxfp8(normal(rng, 32, 96), block=block)
    stored = {"q.weight": codes, "q.weight_scale_inv": exponents.view(torch.float8_e8m0fnu)}
    weight = open_base(write_base(tmp_path, stored)).weight("q")
    np.testing.assert_array_equal(weight.array(), values)


def test_mxfp8_is_read_as_compressed_tensors_decodes_it(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    for bits, name in (
        (8, "mxfp8-quantized"),
        (4, "mxfp4-pack-quantized"),
        (6, "mxfp6-pack-quantized"),
    ):
        W = normal(rng, 24, 96)
        stored, decoded = compressed_mx(W, name, bits)
        folder = write_base(tmp_path / name, stored, quant_method="compressed-tensors", format=name)
        weight = open_base(folder).weight("q", shape=(24, 96))
        np.testing.assert_array_equal(weight.array(), decoded.float())
        assert weight.storage.startswith(f"MXFP{bits}")
        assert weight.noise() == pytest.approx(
            true_noise(W.numpy(), weight.array()), rel=NOISE if bits > 4 else COARSE_NOISE
        )


def compressed_mx(
    W: torch.Tensor, compressor: str, bits: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what compressed-tensors stores of W under a scheme of powers of two, and decodes."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = {
        "num_bits": bits, "type": "float", "symmetric": True, "strategy": "group",
        "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8,
    }  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    parts = W.reshape(W.shape[0], -1, 32)
    scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme.weights)
    kind = BaseCompressor.get_value_from_registry(compressor)
    stored = kind.compress({"weight": W, "weight_scale": scale.float()}, scheme)
    assert stored["weight_scale"].dtype == torch.uint8
    decoded = kind.decompress(stored, scheme)["weight"]
    return {f"q.{name}": value for name, value in stored.items()}, decoded


@pytest.mark.parametrize("exponents", ["uint8", "float8_e8m0fnu"])
def test_mxfp4_linear_layers_are_decoded(
    rng: np.random.Generator, tmp_path: Path, exponents: str
) -> None:
    W = normal(rng, 12, 64).numpy()
    codes, scales, values = four_bit_blocks(
        W, 32, lambda largest: 2.0 ** (np.floor(np.log2(largest)) - 2)
    )
    stored = {
        "q.weight": torch.from_numpy(pack_nibbles(codes)),
        "q.weight_scale": torch.from_numpy((np.log2(scales) + 127).astype(np.uint8)).view(
            getattr(torch, exponents)
        ),
    }
    stated = {"quant_method": "modelopt", "quant_algo": "MXFP4"} if exponents == "uint8" else {}
    weight = open_base(write_base(tmp_path, stored, **stated)).weight("q", shape=(12, 64))
    np.testing.assert_array_equal(weight.array(), values)
    assert weight.storage == "MXFP4"
    assert weight.noise() == pytest.approx(true_noise(W, values), rel=COARSE_NOISE)


def nvfp4(W: np.ndarray) -> tuple[np.ndarray, torch.Tensor, float, np.ndarray]:
    """Return codes, fp8 scales per 16, the factor of the whole, and values."""
    whole = float(np.abs(W).max()) / (6 * 448)

    def scale_of(largest: float) -> float:
        return float(torch.tensor(largest / 6 / whole).to(torch.float8_e4m3fn)) * whole

    codes, scales, values = four_bit_blocks(W, 16, scale_of)
    return codes, torch.from_numpy(scales / whole).to(torch.float8_e4m3fn), whole, values


def test_nvfp4_of_modelopt_and_of_comfyui_differ_in_order_alone(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    # Of a size at which ComfyUI's tiles have the shape of scales in rows.
    W = normal(rng, 128, 64).numpy()
    codes, scales, whole, values = nvfp4(W)
    second = torch.tensor(whole)
    modelopt = {
        "q.weight": torch.from_numpy(pack_nibbles(codes)),
        "q.weight_scale": scales,
        "q.weight_scale_2": second,
        "q.input_scale": torch.ones(()),
    }
    comfy = {
        "q.weight": torch.from_numpy(pack_nibbles(codes, high_first=True)),
        "q.weight_scale": in_tiles(scales.float()).to(torch.float8_e4m3fn),
        "q.weight_scale_2": second,
        "q.comfy_quant": comfy_mark(format="nvfp4"),
    }
    assert comfy["q.weight_scale"].shape == scales.shape
    folders = (
        write_base(tmp_path / "modelopt", modelopt, quant_method="modelopt", quant_algo="NVFP4"),
        write_base(tmp_path / "comfy", comfy),
    )
    for folder in folders:
        weight = open_base(folder).weight("q", shape=(128, 64))
        np.testing.assert_allclose(weight.array(), values, rtol=1e-6)
        assert weight.storage == "NVFP4"
        assert weight.noise() == pytest.approx(true_noise(W, values), rel=COARSE_NOISE)


def test_comfyuis_mxfp8_has_its_scales_in_padded_tiles(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    codes, exponents, values = mxfp8(normal(rng, 160, 96))
    stored = {
        "q.weight": codes,
        "q.weight_scale": in_tiles(exponents),
        "q.comfy_quant": comfy_mark(format="mxfp8"),
    }
    assert stored["q.weight_scale"].shape == (256, 4)
    np.testing.assert_array_equal(read(write_base(tmp_path, stored)), values)


def test_comfyuis_marks_are_read_from_the_files_metadata_too(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    codes, exponents, values = mxfp8(normal(rng, 160, 96))
    layers = {"blocks.0.q": {"format": "mxfp8"}}
    save_file(
        {
            "model.diffusion_model.blocks.0.q.weight": codes,
            "model.diffusion_model.blocks.0.q.weight_scale": in_tiles(exponents),
        },
        tmp_path / "model.safetensors",
        {"_quantization_metadata": json.dumps({"layers": layers})},
    )
    weight = open_base(tmp_path / "model.safetensors").weight("blocks.0.q", transposed=False)
    np.testing.assert_array_equal(weight.array(), values)


@pytest.mark.parametrize("new", [False, True])
def test_comfyuis_scaled_fp8_is_read(rng: np.random.Generator, tmp_path: Path, new: bool) -> None:
    W = normal(rng, 24, 40)
    scale = W.abs().max() / 448
    codes = (W / scale).to(torch.float8_e4m3fn)
    beside = (
        {"q.weight_scale": scale, "q.comfy_quant": comfy_mark(format="float8_e4m3fn")}
        if new
        else {
            "q.scale_weight": scale.reshape(1),
            "q.scale_input": torch.ones(1),
            "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn),
        }
    )
    weight = open_base(write_base(tmp_path, {"q.weight": codes, **beside})).weight("q")
    np.testing.assert_array_equal(weight.array(), codes.float() * scale)
    assert weight.storage == "fp8, one scale"


@pytest.mark.parametrize(
    ("shape", "block"), [((3, 1, 5, 1), (8, 8)), ((24, 5, 1), (1, 8)), ((3, 5), (8, 8))]
)
def test_axes_of_one_between_blocks_of_scales_are_dropped(
    rng: np.random.Generator, tmp_path: Path, shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    codes = normal(rng, 24, 40).to(torch.float8_e4m3fn)
    scales = torch.rand(shape) + 0.5
    spread = scales.reshape(24 // block[0], 40 // block[1])
    for axis in (0, 1):
        spread = spread.repeat_interleave(block[axis], axis)
    folder = write_base(tmp_path, {"q.weight": codes, "q.weight_scale": scales})
    np.testing.assert_array_equal(read(folder), codes.float() * spread)


def test_a_stack_of_experts_has_its_scales_behind_its_own_name(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    path = "model.layers.0.mlp.experts.gate_up_proj"
    codes = normal(rng, 2, 16, 64).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, 4) + 0.5
    spread = scales.repeat_interleave(8, 1).repeat_interleave(16, 2)
    folder = write_base(
        tmp_path, {path: codes, f"{path}_scale_inv": scales},
        quant_method="fp8", weight_block_size=[8, 16],
    )  # fmt: skip
    base = open_base(folder)
    for expert in range(2):
        weight = base.weight(f"{path}.{expert}", shape=(16, 64))
        np.testing.assert_array_equal(weight.array(), (codes.float() * spread)[expert])


def test_modelopts_own_file_of_settings_states_the_scheme(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    codes, exponents, values = mxfp8(normal(rng, 24, 96))
    folder = write_base(tmp_path, {"q.weight": codes, "q.weight_scale": exponents})
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "MXFP8"}}')
    np.testing.assert_array_equal(read(folder), values)


def bytes_of(*shape: int) -> torch.Tensor:
    return torch.full(shape, 120, dtype=torch.uint8)


FP8 = torch.ones(24, 64).to(torch.float8_e4m3fn)
REFUSED: tuple[tuple[dict[str, torch.Tensor], dict[str, Any], str], ...] = (
    # Bytes that may be exponents or factors.
    ({"weight": FP8, "weight_scale": bytes_of(24, 2)}, {}, "uint8 scales.*MXFP8.*no config"),
    (
        {"weight": FP8, "weight_scale": bytes_of(24, 2)},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        "uint8 scales.*MXFP8.*states modelopt, FP8",
    ),
    ({"weight": bytes_of(24, 32), "weight_scale": bytes_of(24, 2)}, {}, "uint8.*MXFP4"),
    # Two 4-bit codes in an int8.
    (
        {"weight": bytes_of(24, 32).view(torch.int8), "weight_scale": torch.ones(24, 2)},
        {"quant_method": "fp8"},
        "int8 with float32 scales.*states fp8",
    ),
    (
        {
            "weight": bytes_of(24, 32).view(torch.int8),
            "weight_scale": bytes_of(24, 2).view(torch.float8_e8m0fnu),
        },
        {},
        "int8 with float8_e8m0fnu scales, which is not read",
    ),
    ({"weight": FP8, "weight_scale": torch.ones(24, dtype=torch.int32)}, {}, "int32 scales"),
    ({"weight": torch.ones(24, 64).half(), "weight_scale": torch.ones(24)}, {}, "float16 with"),
    ({"weight": FP8, "weight_scale": torch.ones(1), "scale_weight": torch.ones(1)}, {}, "several"),
    (
        {"weight": FP8, "weight_scale": torch.ones(1), "pre_quant_scale": torch.ones(64)},
        {},
        "pre_q",
    ),
    (
        {"weight": FP8, "weight_scale": torch.ones(24), "weight_zero_point": torch.ones(24)},
        {},
        "zero points",
    ),
    ({"weight": FP8}, {"quant_method": "fp8"}, "states fp8, but the weight has no scales"),
    (
        {
            "weight": torch.ones(24, 64, dtype=torch.int8),
            "weight_scale": torch.ones(1),
            "comfy_quant": comfy_mark(format="int8_tensorwise", convrot=True, convrot_groupsize=4),
        },
        {},
        "int8_tensorwise with convrot",
    ),
    (
        {
            "weight": bytes_of(24, 32).view(torch.int8),
            "weight_scale": torch.ones(1),
            "comfy_quant": comfy_mark(format="svdquant_w4a4"),
        },
        {},
        "states svdquant_w4a4, which is not read",
    ),
    (
        {"weight": FP8, "weight_scale": torch.ones(1), "comfy_quant": comfy_mark(format="nvfp4")},
        {},
        "float8_e4m3fn with float32 scales are read as fp8, but ComfyUI's mark states nvfp4",
    ),
    (
        {"weight": FP8, "weight_scale": torch.ones(1), "comfy_quant": bytes_of(3)},
        {},
        "comfy_quant' is not readable",
    ),
)


@pytest.mark.parametrize(("stored", "stated", "told"), REFUSED)
def test_what_the_table_does_not_cover_is_refused_by_name(
    tmp_path: Path, stored: dict[str, torch.Tensor], stated: dict[str, Any], told: str
) -> None:
    folder = write_base(tmp_path, {f"q.{name}": value for name, value in stored.items()}, **stated)
    with pytest.raises(BaseWeightError, match=told) as caught:
        open_base(folder).weight("q").array()
    assert "q.weight" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_exponent_that_means_nan_is_damage(rng: np.random.Generator, tmp_path: Path) -> None:
    codes, exponents, _ = mxfp8(normal(rng, 24, 96))
    exponents[3, 1] = 255
    stored = {"q.weight": codes, "q.weight_scale": exponents.view(torch.float8_e8m0fnu)}
    with pytest.raises(BaseWeightError, match="32 numbers that are not finite"):
        open_base(write_base(tmp_path, stored)).weight("q").array()


def test_every_type_of_safetensors_is_read_or_named(tmp_path: Path) -> None:
    names = {
        "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
        "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
        "C64": 8, "U64": 8, "U32": 4, "U16": 2, "F4": 0.5, "F6_E2M3": 0.75, "F6_E3M2": 0.75,
    }  # fmt: skip
    read_as_weights = {name for name in names if re.match("F16|F32|F64|BF16|F8_E[45]M[23]", name)}
    for name, size in names.items():
        data = bytes(int(8 * 16 * size))
        path = tmp_path / f"{name}.safetensors"
        header = json.dumps(
            {"q.weight": {"dtype": name, "shape": [8, 16], "data_offsets": [0, len(data)]}}
        ).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
        base = open_base(path)
        if name in read_as_weights:
            assert not base.weight("q", transposed=False).array().any()
        else:
            with pytest.raises(BaseWeightError, match=BITS[name][0]):
                base.weight("q", transposed=False)
    assert set(names) == set(BITS)
