"""GGUF bases: types as the library decodes them, rows as the running model has them, names."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bases import permuted, q4_k, random_blocks, write_gguf

from lora_analysis.bases import gguf_source, open_base
from lora_analysis.errors import (
    BaseWeightError,
    MalformedFileError,
    MissingExtraError,
    UnknownFormatError,
)
from lora_analysis.storage.gguf import TYPES, read_gguf

NORM = "model.layers.0.mlp.down_proj"
DECODED = [
    kind for kind in (name for name, _, _ in TYPES.values()) if kind not in ("Q8_1", "Q8_K", "F64")
    and not kind.startswith("I8") and kind not in ("I16", "I32", "I64")
]  # fmt: skip


def test_the_table_of_types_is_the_librarys() -> None:
    for code, (name, elements, width) in TYPES.items():
        kind = gguf.GGMLQuantizationType(code)
        assert kind.name == name
        assert gguf.GGML_QUANT_SIZES[kind] == (elements, width)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_library_quantizes_is_read_with_its_noise(
    rng: np.random.Generator, tmp_path: Path, kind: str
) -> None:
    W = rng.standard_normal((40, 64)).astype(np.float32)
    base = open_base(write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": W}, kind=kind))
    weight = base.weight(NORM, shape=(40, 64))
    stored = gguf.GGMLQuantizationType[kind]
    wanted = gguf.dequantize(gguf.quantize(W, stored), stored)
    np.testing.assert_array_equal(weight.array(), wanted)
    if kind.startswith("Q"):
        assert weight.storage == f"GGUF {kind}"
        true = np.linalg.norm(wanted - W) / np.linalg.norm(W)
        assert weight.noise() == pytest.approx(true, rel=0.12)
    else:
        assert weight.storage == ""
        assert weight.noise() is None


@pytest.mark.parametrize("kind", [kind for kind in DECODED if kind not in ("F32", "F16", "BF16")])
def test_every_type_is_read_as_the_library_decodes_it(
    rng: np.random.Generator, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = random_blocks(rng, kind, 6, 3)
    wanted = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.isfinite(wanted).all()
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": raw}, kind=kind, raw=True)
    monkeypatch.setattr(gguf_source, "BLOCK_ELEMENTS", 4 * wanted.shape[1])
    weight = open_base(path).weight(NORM, shape=wanted.shape)
    np.testing.assert_array_equal(weight.array(), wanted)
    assert weight.storage == f"GGUF {kind}"


@pytest.mark.parametrize("kind", ["MXFP4", "TQ1_0", "TQ2_0"])
def test_the_noise_of_coarse_levels_is_their_error(
    rng: np.random.Generator, tmp_path: Path, kind: str
) -> None:
    # Uniform values: over cells this wide the density of others is far from even.
    W = rng.uniform(-1, 1, (40, 512)).astype(np.float32)
    base = open_base(write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": W}, kind=kind))
    weight = base.weight(NORM)
    true = np.linalg.norm(weight.array() - W) / np.linalg.norm(W)
    assert weight.noise() == pytest.approx(true, rel=0.2)


def iq4_nl(W: np.ndarray) -> np.ndarray:
    """Blocks of IQ4_NL, each value rounded to the nearest level: f16 d, codes j and j + 16."""
    levels = np.array(gguf.quants.IQ4_NL.kvalues, float)
    blocks = W.reshape(-1, 32)
    d = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    numbers = blocks / d.astype(float)
    codes = np.abs(numbers[..., None] - levels).argmin(-1).astype(np.uint8)
    packed = np.hstack([d.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4])
    return packed.reshape(len(W), -1)


def test_the_noise_of_iq4_nl_is_its_error(rng: np.random.Generator, tmp_path: Path) -> None:
    W = rng.standard_normal((40, 512)).astype(np.float32)
    tensors = {"blk.0.ffn_down.weight": iq4_nl(W)}
    path = write_gguf(tmp_path / "m.gguf", tensors, kind="IQ4_NL", raw=True)
    weight = open_base(path).weight(NORM)
    true = np.linalg.norm(weight.array() - W) / np.linalg.norm(W)
    assert weight.noise() == pytest.approx(true, rel=0.12)


def test_the_noise_of_codes_for_several_values_is_not_known(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    raw = random_blocks(rng, "IQ2_XS", 2, 1)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": raw}, kind="IQ2_XS", raw=True)
    weight = open_base(path).weight(NORM)
    assert weight.storage == "GGUF IQ2_XS"
    assert weight.noise() is None


def test_the_noise_of_q4_k_is_its_error(rng: np.random.Generator, tmp_path: Path) -> None:
    W = rng.standard_normal((48, 512)).astype(np.float32)
    path = write_gguf(
        tmp_path / "m.gguf", {"blk.0.ffn_down.weight": q4_k(W)}, kind="Q4_K", raw=True
    )
    weight = open_base(path).weight(NORM)
    true = np.linalg.norm(weight.array() - W) / np.linalg.norm(W)
    assert true < 0.1  # the fixture's packing is right
    assert weight.noise() == pytest.approx(true, rel=0.12)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_the_step_of_k_quants_is_what_one_code_adds(
    rng: np.random.Generator, tmp_path: Path, kind: str
) -> None:
    raw = random_blocks(rng, kind, 2, 4)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": raw}, kind=kind, raw=True)
    weight = open_base(path).weight(NORM)
    square = sum(float(tile.sum()) for _, _, tile in weight._errors() or ())
    # Slowly: of all random codes of a block of equal scale, the least distance is the step.
    run = 32 if kind in ("Q4_K", "Q5_K") else 16
    again = np.concatenate(
        [weight.array()[None]]
        + [
            gguf.dequantize(_other_codes(rng, raw, kind), gguf.GGMLQuantizationType[kind])[None]
            for _ in range(60)
        ]
    ).astype(np.float64)
    values = again.reshape(len(again), -1, run).swapaxes(0, 1).reshape(again[0].size // run, -1)
    steps = [_least_gap(row) for row in values]
    wanted = sum(run * step**2 / 12 for step in steps)
    assert square == pytest.approx(wanted, rel=1e-3)


def _other_codes(rng: np.random.Generator, raw: np.ndarray, kind: str) -> np.ndarray:
    kept = {"Q2_K": [*range(16), *range(80, 84)], "Q3_K": range(96, 110), "Q4_K": range(16),
            "Q5_K": range(16), "Q6_K": range(192, 210)}[kind]  # fmt: skip
    width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    other = rng.integers(0, 256, (raw.size // width, width), dtype=np.uint8)
    other[:, list(kept)] = raw.reshape(-1, width)[:, list(kept)]
    return other.reshape(raw.shape)


def _least_gap(values: np.ndarray) -> float:
    gaps = np.diff(np.sort(values))
    size = np.abs(values).max()
    return float(gaps[gaps > 1e-5 * size].min(initial=np.inf)) if np.ptp(values) else 0.0


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_rotated_rows_of_q_and_k_are_put_back(
    rng: np.random.Generator, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = rng.standard_normal((48, 32)), rng.standard_normal((16, 32))
    tensors = {
        "blk.0.attn_q.weight": permuted(q, 6),
        "blk.0.attn_k.weight": permuted(k, 2),
        "blk.0.attn_v.weight": k,
    }
    path = write_gguf(tmp_path / "m.gguf", tensors, kind=kind, heads=6, kv_heads=2)
    base = open_base(path)
    monkeypatch.setattr(gguf_source, "BLOCK_ELEMENTS", 17 * 32)  # tiles hold whole heads
    exact = {"F32": 1e-6, "Q8_0": 0.02}[kind]
    for part, wanted in (("q", q), ("k", k), ("v", k)):
        found = base.weight(f"model.layers.0.self_attn.{part}_proj", shape=wanted.shape)
        np.testing.assert_allclose(found.array(), wanted, atol=exact, rtol=0)


def test_heads_may_differ_from_block_to_block(rng: np.random.Generator, tmp_path: Path) -> None:
    q = rng.standard_normal((48, 32)).astype(np.float32)
    tensors = {f"blk.{at}.attn_q.weight": permuted(q, heads) for at, heads in enumerate((6, 3))}
    base = open_base(write_gguf(tmp_path / "m.gguf", tensors, heads=[6, 3]))
    for at in range(2):
        found = base.weight(f"model.layers.{at}.self_attn.q_proj", shape=q.shape)
        np.testing.assert_array_equal(found.array(), q)
    lone = open_base(write_gguf(tmp_path / "n.gguf", {"blk.0.attn_q.weight": q}))
    with pytest.raises(BaseWeightError, match="the file states None"):
        lone.weight("blk.0.attn_q")


def test_rows_stay_where_the_architecture_has_not_moved_them(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    q = rng.standard_normal((24, 32)).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": q}, arch="qwen2", heads=6)
    found = open_base(path).weight("model.layers.0.self_attn.q_proj", shape=(24, 32))
    np.testing.assert_array_equal(found.array(), q)


def test_an_architecture_whose_order_is_not_known_refuses_q_and_k_alone(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    W = rng.standard_normal((24, 32)).astype(np.float32)
    tensors = {"blk.0.attn_q.weight": W, "blk.0.attn_v.weight": W}
    base = open_base(write_gguf(tmp_path / "m.gguf", tensors, arch="plamo", heads=6))
    np.testing.assert_array_equal(base.weight("blk.0.attn_v", shape=(24, 32)).array(), W)
    with pytest.raises(BaseWeightError, match="architecture 'plamo'"):
        base.weight("blk.0.attn_q", shape=(24, 32))


@pytest.mark.parametrize(
    ("arch", "groups", "queries"), [("bloom", 4, 1), ("gptneox", 4, 1), ("falcon", 2, 2)]
)
def test_blocks_of_q_k_and_v_are_interleaved_again(
    rng: np.random.Generator, tmp_path: Path, arch: str, groups: int, queries: int
) -> None:
    head, width = 3, 32
    model = rng.standard_normal((groups, queries + 2, head, width)).astype(np.float32)
    parts = {
        "q": model[:, :queries].reshape(-1, width),
        "k": model[:, queries].reshape(-1, width),
        "v": model[:, queries + 1].reshape(-1, width),
    }
    path = write_gguf(
        tmp_path / "m.gguf",
        {"blk.0.attn_qkv.weight": np.vstack(list(parts.values()))},
        arch=arch,
        heads=groups * queries,
        kv_heads=groups,
    )
    base = open_base(path)
    name = {
        "bloom": "transformer.h.0.self_attention.query_key_value",
        "gptneox": "gpt_neox.layers.0.attention.query_key_value",
        "falcon": "transformer.h.0.self_attention.query_key_value",
    }[arch]
    whole = base.weight(name, shape=(model.size // width, width))
    np.testing.assert_array_equal(whole.array(), model.reshape(-1, width))
    for part, wanted in parts.items():
        cut = base.weight(f"{name}.{part}", shape=wanted.shape)
        np.testing.assert_array_equal(cut.array(), wanted)


@pytest.mark.parametrize(
    ("arch", "module", "stored", "shape"),
    [
        ("llama", "base_model.model.model.layers.1.mlp.gate_proj", "blk.1.ffn_gate", (6, 32)),
        ("llama", "model.embed_tokens", "token_embd", (6, 32)),
        ("llama", "model.embed_tokens", "token_embd", (32, 6)),
        ("llama", "lm_head", "token_embd", (6, 32)),
        ("llama", "lm_head", "output", (6, 32)),
        ("gpt2", "transformer.h.1.attn.c_proj", "blk.1.attn_output", (6, 32)),
        ("gpt2", "h.1.mlp.c_fc", "blk.1.ffn_up", (6, 32)),
        ("phi3", "model.layers.1.self_attn.qkv_proj", "blk.1.attn_qkv", (6, 32)),
        ("phi3", "model.layers.1.self_attn.v_proj", "blk.1.attn_qkv", (2, 32)),
        ("bert", "bert.encoder.layer.1.attention.self.query", "blk.1.attn_q", (6, 32)),
    ],
)
def test_modules_are_found_under_the_files_names(  # noqa: PLR0917
    rng: np.random.Generator,
    tmp_path: Path,
    arch: str,
    module: str,
    stored: str,
    shape: tuple[int, int],
) -> None:
    W = rng.standard_normal((6, 32)).astype(np.float32)
    base = open_base(write_gguf(tmp_path / "m.gguf", {f"{stored}.weight": W}, arch=arch))
    found = base.weight(module, shape=shape).array()
    wanted = W.T if shape == (32, 6) else W[-shape[0] :]
    np.testing.assert_array_equal(found, wanted)


def test_experts_are_cut_out_of_their_stack(rng: np.random.Generator, tmp_path: Path) -> None:
    stacks = {
        f"blk.0.ffn_{kind}_exps.weight": rng.standard_normal((3, 6, 32)).astype(np.float32)
        for kind in ("gate", "up")
    }
    base = open_base(write_gguf(tmp_path / "m.gguf", stacks))
    gate, up = stacks.values()
    one = base.weight("model.layers.0.block_sparse_moe.experts.2.w3", shape=(6, 32))
    np.testing.assert_array_equal(one.array(), up[2])
    both = base.weight("model.layers.0.mlp.experts.gate_up_proj[1]", shape=(12, 32))
    np.testing.assert_array_equal(both.array(), np.vstack([gate[1], up[1]]))


def test_types_that_the_library_does_not_decode_are_refused(tmp_path: Path) -> None:
    raw = np.zeros((2, 292), np.uint8)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": raw}, kind="Q8_K", raw=True)
    with pytest.raises(BaseWeightError, match="GGUF Q8_K, which is not read"):
        open_base(path).weight(NORM)


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": np.zeros((2, 32))})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"lora-analysis\[gguf\]"):
        open_base(path)


def test_a_folder_with_one_gguf_file_is_a_base(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"token_embd.weight": np.zeros((2, 32))})
    assert open_base(tmp_path).label == "m.gguf"


def test_every_cut_of_a_file_is_malformed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": np.ones((2, 32))})
    whole = path.read_bytes()
    short = tmp_path / "short.gguf"
    for length in range(0, len(whole), 7):
        short.write_bytes(whole[:length])
        with pytest.raises(MalformedFileError, match=r"short\.gguf"):
            read_gguf(short)


@pytest.mark.parametrize(
    ("at", "layout", "value", "kind", "told"),
    [
        (4, "<I", 1, UnknownFormatError, "version 1"),
        (4, ">I", 3, UnknownFormatError, "little-endian"),
        (8, "<Q", 2**60, MalformedFileError, "claims"),
        (16, "<Q", 2**40, MalformedFileError, "claims"),
        (24, "<Q", 2**50, MalformedFileError, "claims"),
    ],
)
def test_claims_of_a_header_are_checked(  # noqa: PLR0917
    tmp_path: Path, at: int, layout: str, value: int, kind: type[Exception], told: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": np.ones((2, 32))})
    raw = bytearray(path.read_bytes())
    struct.pack_into(layout, raw, at, value)
    path.write_bytes(raw)
    with pytest.raises(kind, match=told):
        read_gguf(path)
