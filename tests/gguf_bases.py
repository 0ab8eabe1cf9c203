"""GGUF files as the package gguf writes them, and what its converter does to rows before."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    arch: str = "llama",
    kind: str = "F32",
    heads: int | list[int] | None = None,
    kv_heads: int | list[int] | None = None,
    raw: bool = False,
) -> Path:
    """Write tensors, quantized to ``kind`` by the library; ``raw`` ones are bytes of that kind."""
    writer = gguf.GGUFWriter(path, arch)
    if heads is not None:
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads or heads)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_array("some.numbers", [1, 2, 3])
    stored = gguf.GGMLQuantizationType[kind]
    for name, value in tensors.items():
        data = value if raw else gguf.quantize(value.astype(np.float32), stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(W: np.ndarray, heads: int) -> np.ndarray:
    """q or k rows as llama.cpp's converter orders them: the halves of each head interleaved."""
    out = np.empty_like(W)
    size = len(W) // heads
    for head in range(heads):
        for at in range(size // 2):
            for half in range(2):
                out[head * size + 2 * at + half] = W[head * size + half * size // 2 + at]
    return out


def q4_k(W: np.ndarray) -> np.ndarray:
    """Return rows of Q4_K blocks, each value rounded to the nearest level of its 32.

    By the layout: f16 d and dmin, eight scales and mins of 6 bits in 12 bytes, 128 bytes of codes.
    """
    rows, columns = W.shape
    blocks = W.reshape(-1, 8, 32).astype(np.float64)
    low = np.maximum(-blocks.min(-1), 0)
    step = (blocks.max(-1) + low) / 15
    d = (step.max(-1) / 63).astype(np.float16)
    dmin = (low.max(-1) / 63).astype(np.float16)
    scales = np.ceil(step / d[:, None].astype(float)).clip(1, 63).astype(np.uint8)
    mins = (
        np.round(low / np.maximum(dmin[:, None].astype(float), 1e-30)).clip(0, 63).astype(np.uint8)
    )
    steps = d[:, None].astype(float) * scales
    offsets = dmin[:, None].astype(float) * mins
    codes = np.round((blocks + offsets[..., None]) / steps[..., None]).clip(0, 15).astype(np.uint8)
    packed = np.zeros((len(blocks), 144), np.uint8)
    packed[:, 0:2] = d[:, None].view(np.uint8)
    packed[:, 2:4] = dmin[:, None].view(np.uint8)
    for j in range(4):
        packed[:, 4 + j] = (scales[:, j] & 63) | (scales[:, j + 4] >> 4 << 6)
        packed[:, 8 + j] = (mins[:, j] & 63) | (mins[:, j + 4] >> 4 << 6)
        packed[:, 12 + j] = (scales[:, j + 4] & 15) | ((mins[:, j + 4] & 15) << 4)
    for pair in range(4):
        packed[:, 16 + 32 * pair : 48 + 32 * pair] = (
            codes[:, 2 * pair] | codes[:, 2 * pair + 1] << 4
        )
    return packed.reshape(rows, columns // 256 * 144)


def random_blocks(rng: np.random.Generator, kind: str, rows: int, blocks: int) -> np.ndarray:
    """Random bytes of a type, its 16-bit scales small numbers: what they decode to is finite."""
    elements, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (rows, blocks, width), dtype=np.uint8)
    places = {
        "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
        "TQ1_0": (52,), "TQ2_0": (64,), "IQ1_M": (),
    }.get(kind, (0,))  # fmt: skip
    for place in places:
        scale = rng.uniform(0.1, 1, (rows, blocks, 1)).astype(np.float16)
        raw[..., place : place + 2] = scale.view(np.uint8)
    if kind == "IQ1_M":  # its scale lies in the upper halves of four numbers
        raw[..., 49::2] = raw[..., 49::2] & 0x0F
        raw[..., 55] |= 0x30
    if kind == "MXFP4":  # its scale is a power of two by the exponent
        raw[..., 0] = rng.integers(110, 140, (rows, blocks))
    assert elements
    return raw.reshape(rows, -1)
