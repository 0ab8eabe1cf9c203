"""Weights as other libraries quantise and store them, or, where none is light, by their layouts.

GPTQ and AWQ are packed here by their layouts: no library that writes them installs without a
compiler. Their packers loop element by element and share no code with the readers.
"""

from __future__ import annotations

import json
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
    where its own quantiser, and its kernel for GPUs, let blocks run on from row to row.
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
