"""Quantised weights: read as their own libraries decode them, and with the noise that they have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantised_bases import (
    awq,
    bitsandbytes_4bit,
    bitsandbytes_int8,
    fp8_blocks,
    gptq,
    write_base,
)

from lora_analysis.bases import open_base, quantised
from lora_analysis.bases.quantised.codes import cell_variances, unpacked
from lora_analysis.errors import BaseWeightError

# The noise is an expectation over where values fell inside their cells.
NOISE = 0.12


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
        patch.setattr(quantised, "BLOCK_ELEMENTS", n)
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
        patch.setattr(quantised, "BLOCK_ELEMENTS", 32 * 32)
        np.testing.assert_allclose(read(folder), values, rtol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_unpack_to_the_bits_that_were_packed(rng: np.random.Generator, bits: int) -> None:
    codes = rng.integers(0, 2**bits, (64, 3))
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in codes[:, 1])
    words = np.zeros((2 * bits, 3), np.uint32)
    words[:, 1] = [int(stream[32 * at : 32 * (at + 1)][::-1], 2) for at in range(2 * bits)]
    np.testing.assert_array_equal(unpacked(words.view(np.int32), bits)[:, 1], codes[:, 1])


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


def test_fp8_without_scales_is_quantised_too(rng: np.random.Generator, tmp_path: Path) -> None:
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
    with pytest.raises(BaseWeightError, match=r"marlin.*dequantise"):
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
