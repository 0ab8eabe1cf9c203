"""Weights as other libraries quantize and store them, or, where none is light, by their layouts.

GPTQ and AWQ are packed here by their layouts: no library that writes them installs without a
compiler. Their packers loop element by element and share no code with the readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def write_base(folder: Path, tensors: dict[str, Any], **quantization: Any) -> Path:
    """Write tensors as a llama's single safetensors file, with a quantization_config."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"model_type": "llama"}
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    stored = {
        name: torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, np.ndarray)
        else value.contiguous()
        for name, value in tensors.items()
    }
    save_file(stored, folder / "model.safetensors")
    return folder


def bitsandbytes_4bit(
    W: torch.Tensor, kind: str, *, nested: bool, path: str = "q"
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what bitsandbytes stores, and what it decodes.

    It decodes one row of all numbers: its CPU kernel begins a block of scales with every row,
    where its own quantizer, and its kernel for GPUs, let blocks run on from row to row.
    """
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(W, quant_type=kind, compress_statistics=nested)
    stored = {f"{path}.weight": packed}
    stored |= {f"{path}.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    state.shape = torch.Size([W.numel()])
    return stored, bnb.dequantize_4bit(packed, state).reshape(W.shape)


def bitsandbytes_int8(
    W: torch.Tensor, path: str = "q"
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what bitsandbytes stores, and what it decodes."""
    import bitsandbytes.functional as bnb

    codes, scales, _ = bnb.int8_vectorwise_quant(W.half())
    stored = {
        f"{path}.weight": codes,
        f"{path}.SCB": scales,
        f"{path}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return stored, bnb.int8_vectorwise_dequant(codes, scales)


def round_to_groups(
    W: np.ndarray, bits: int, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Round ``(in, out)`` to integers by group of inputs: codes, scales, zeros, values."""
    top = 2**bits - 1
    count = int(groups.max()) + 1
    codes = np.zeros(W.shape, np.int64)
    scales = np.zeros((count, W.shape[1]), np.float16)
    zeros = np.zeros((count, W.shape[1]), np.int64)
    values = np.zeros_like(W)
    for group in range(count):
        own = groups == group
        low, high = np.minimum(W[own].min(0), 0), np.maximum(W[own].max(0), 0)
        scales[group] = (high - low) / top
        scale = scales[group].astype(np.float32)
        zeros[group] = np.clip(np.round(-low / scale), 0, top)
        codes[own] = np.clip(np.round(W[own] / scale + zeros[group]), 0, top)
        values[own] = (codes[own] - zeros[group]) * scale
    return codes, scales, zeros, values


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack ``(n, m)`` codes along the first axis into 32-bit words, lowest bits first."""
    n, m = codes.shape
    words = np.zeros((n * bits // 32, m), np.uint32)
    for i in range(n):
        for bit in range(bits):
            at = i * bits + bit
            words[at // 32] |= (((codes[i] >> bit) & 1) << (at % 32)).astype(np.uint32)
    return words.view(np.int32)


def gptq(
    W: np.ndarray, *, bits: int, group: int, order: np.ndarray | None = None, version: int = 1
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return what GPTQ stores of ``(out, in)``, rounded to nearest, and the values.

    ``order`` names the group of each input, as activation ordering does. Version 1 stores zeros
    less one.
    """
    groups = np.arange(W.shape[1]) // group if order is None else order
    codes, scales, zeros, values = round_to_groups(W.T, bits, groups)
    stored_zeros = (zeros - 1) % 2**bits if version == 1 else zeros
    stored = {
        "q.qweight": pack_rows(codes, bits),
        "q.qzeros": pack_rows(stored_zeros.T, bits).T,
        "q.scales": scales,
        "q.g_idx": groups.astype(np.int32),
    }
    return stored, values.T


def awq(W: np.ndarray, *, group: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return what AWQ's gemm layout stores of ``(out, in)``, rounded to nearest, and the values."""
    groups = np.arange(W.shape[1]) // group
    codes, scales, zeros, values = round_to_groups(W.T, 4, groups)

    def pack(matrix: np.ndarray) -> np.ndarray:
        words = np.zeros((matrix.shape[0], matrix.shape[1] // 8), np.uint32)
        for column in range(words.shape[1]):
            for place, source in enumerate(AWQ_ORDER):
                words[:, column] |= (matrix[:, 8 * column + source] << (4 * place)).astype(
                    np.uint32
                )
        return words.view(np.int32)

    return {"q.qweight": pack(codes), "q.qzeros": pack(zeros), "q.scales": scales}, values.T


def fp8_blocks(
    W: torch.Tensor, block: tuple[int, int]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return W in fp8 with a scale per block, as DeepSeek stores it, and the values, by loops."""
    height, width = block
    rows, columns = -(-W.shape[0] // height), -(-W.shape[1] // width)
    scales = torch.zeros(rows, columns)
    codes = torch.zeros(W.shape, dtype=torch.float8_e4m3fn)
    values = torch.zeros_like(W)
    for i in range(rows):
        for j in range(columns):
            own = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = W[own].abs().max() / 448
            codes[own] = (W[own] / scales[i, j]).to(torch.float8_e4m3fn)
            values[own] = codes[own].float() * scales[i, j]
    return {"q.weight": codes, "q.weight_scale_inv": scales}, values


E2M1_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def comfy_mark(**stated: Any) -> torch.Tensor:
    """Return what ComfyUI stores as ``X.comfy_quant``: the bytes of a JSON object."""
    return torch.tensor(list(json.dumps(stated).encode()), dtype=torch.uint8)


def mxfp8(
    W: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, block: tuple[int, int] = (1, 32)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, exponents + 127 for each block, and values, block by block.

    The exponent is rounded up, so that no value is cut off.
    """
    height, width = block
    rows, columns = -(-W.shape[0] // height), -(-W.shape[1] // width)
    exponents = torch.zeros(rows, columns, dtype=torch.uint8)
    codes, values = torch.zeros(W.shape, dtype=dtype), torch.zeros_like(W)
    for i in range(rows):
        for j in range(columns):
            own = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            largest = float(W[own].abs().max()) / torch.finfo(dtype).max
            exponent = int(np.ceil(np.log2(largest)))
            exponents[i, j] = exponent + 127
            codes[own] = (W[own] / 2.0**exponent).to(dtype)
            values[own] = codes[own].float() * 2.0**exponent
    return codes, exponents, values


def nearest_e2m1(value: float) -> int:
    """Return the 4-bit code whose value is nearest; the high bit is the sign."""
    size = min(range(8), key=lambda code: abs(E2M1_SIZES[code] - abs(value)))
    return size + (8 if value < 0 else 0)


def four_bit_blocks(
    W: np.ndarray, run: int, scale_of: Callable[[float], float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, scales (from the largest of a run) and values of E2M1 numbers, run by run."""
    codes = np.zeros(W.shape, np.uint8)
    scales = np.zeros((W.shape[0], W.shape[1] // run))
    values = np.zeros_like(W)
    for i in range(W.shape[0]):
        for j in range(scales.shape[1]):
            own = slice(j * run, (j + 1) * run)
            scales[i, j] = scale_of(float(np.abs(W[i, own]).max()))
            for column in range(own.start, own.stop):
                code = nearest_e2m1(W[i, column] / scales[i, j])
                codes[i, column] = code
                size = E2M1_SIZES[code % 8] * scales[i, j]
                values[i, column] = -size if code >= 8 else size
    return codes, scales, values


def pack_nibbles(codes: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    """Pack two codes of a row into a byte."""
    first, second = codes[:, ::2], codes[:, 1::2]
    return first << 4 | second if high_first else first | second << 4


def in_tiles(scales: torch.Tensor) -> torch.Tensor:
    """Return scales in the order of cuBLAS, by loops: tiles of 128 × 4, rows 32 apart together."""
    rows, columns = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    flat = torch.zeros(rows * columns, dtype=scales.dtype)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            tile = (i // 128) * (columns // 4) + j // 4
            flat[tile * 512 + (i % 32) * 16 + (i % 128) // 32 * 4 + j % 4] = scales[i, j]
    return flat.reshape(rows, columns)
