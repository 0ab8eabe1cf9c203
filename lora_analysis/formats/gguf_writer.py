"""One GGUF file that llama.cpp loads with the base: one alpha for all modules.

llama.cpp has only ``alpha/r``: a scale of a different rule (rsLoRA, a pattern of alphas) is folded
into alpha if all modules agree, else into B. q and k of the Llama family are permuted as its
converter does, which takes the number of heads.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.text_writing import (
    PlannedFactors,
    fold_scales,
    folding_note,
    stack_experts,
    text_outlines,
)
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.gguf_names import (
    BLOCKED_QKV,
    EMBEDDING,
    PERMUTED,
    UNPERMUTED,
    is_q_or_k,
    tensor_of,
)
from lora_analysis.storage.tensor_writer import OutputTensor, gguf_content, output_group

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, UpdateOutline
    from lora_analysis.storage.atomic import Content

_FORMAT: Final = "GGUF"
_WEIGHTS_NAME: Final = "adapter.gguf"
# model_type of a config.json → llama.cpp's name of the architecture.
_ARCHITECTURES: Final = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi": "phi2",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "stablelm": "stablelm",
}


def contents(
    adapter: Adapter,
    *,
    architecture: str | None = None,
    heads: tuple[int, int] | None = None,
) -> dict[str, Content]:
    """Return ``adapter`` as one GGUF file, by its name.

    Parameters
    ----------
    adapter
        Every module a low-rank update of known scale.
    architecture
        llama.cpp's name of the base's architecture, ``"llama"``; by default that of the file the
        adapter was read from, or of a base model on this disk.
    heads
        The base's attention heads and key-value heads, by default from the same places.

    Raises
    ------
    InputError
        The architecture is not known, or has no tensor for a module; or q and k would have to be
        permuted by a number of heads that is not known.
    UnsupportedMethodError
        An update needs more than two factors and a scale.
    MissingExtraError
        The package ``gguf`` is not installed.
    """
    updates = text_outlines(adapter, _FORMAT)
    base_architecture, base_heads = _base_facts(adapter)
    architecture, heads = architecture or base_architecture, heads or base_heads
    if architecture is None:
        message = (
            f"{adapter.label}: GGUF files state the architecture of the base, which is not known. "
            "Pass architecture='llama', or whichever it is in llama.cpp."
        )
        raise InputError(message)
    alpha = _common_alpha(updates)
    scales = {name: alpha / update.rank for name, update in updates.items()}
    factors = stack_experts(fold_scales(adapter, updates, scales), _FORMAT)
    tensors: list[OutputTensor] = []
    for name, planned in factors.items():
        tensors += _module_tensors(name, planned, architecture, heads)
    fields: dict[str, str | int | float] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "general.name": adapter.label,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    if heads is not None:  # llama.cpp ignores it; readers of the file need it for q and k
        fields[f"{architecture}.attention.head_count"] = heads[0]
        fields[f"{architecture}.attention.head_count_kv"] = heads[1]
    if adapter.provenance.base_model:
        fields["general.base_model.0.name"] = adapter.provenance.base_model
    return {_WEIGHTS_NAME: gguf_content(tensors, fields)}


def gguf_notes(adapter: Adapter) -> list[str]:
    """Return sentences on scales that were folded into alpha or B."""
    updates = text_outlines(adapter, _FORMAT)
    alpha = _common_alpha(updates)
    scales = {name: alpha / update.rank for name, update in updates.items()}
    notes = []
    if adapter.config.get("use_rslora"):
        notes.append(
            f"GGUF cannot express rsLoRA: the scale is folded into alpha, {alpha:g}. ΔW is the "
            "same."
        )
    return notes + folding_note(updates, scales, _FORMAT, "alpha")


def _common_alpha(updates: Mapping[str, UpdateOutline]) -> float:
    """Return the alpha that serves most modules, as float32 holds it; never zero.

    llama.cpp takes an alpha of zero for a scale of one.
    """
    counts: dict[float, int] = {}
    for update in updates.values():
        with np.errstate(over="ignore", under="ignore"):
            alpha = float(np.float32(update.known_scale() * update.rank))
        if np.isfinite(alpha) and abs(alpha) >= np.finfo(np.float32).tiny:
            counts[alpha] = counts.get(alpha, 0) + 1
    return max(counts, key=lambda alpha: counts[alpha], default=1.0)


def _base_facts(adapter: Adapter) -> tuple[str | None, tuple[int, int] | None]:
    """Return llama.cpp's name of the base's architecture and its heads, None if not known.

    They come from the file the adapter was read from, or from the config of a base on this disk.
    """
    architecture = adapter.config.get("gguf_architecture")
    if isinstance(architecture, str) and architecture:
        heads = adapter.config.get("heads")
        return architecture, heads if isinstance(heads, tuple) else None
    base = adapter.provenance.base_model or ""
    config: dict[str, Any] = {}
    with suppress(InputError, OSError, ValueError):
        path = Path(base) / "config.json"
        config = read_json_object(path) if base and path.is_file() else {}
    queries = config.get("num_attention_heads")
    keys = config.get("num_key_value_heads", queries)
    counts = (queries, keys) if isinstance(queries, int) and isinstance(keys, int) else None
    return _ARCHITECTURES.get(str(config.get("model_type"))), counts


def _module_tensors(
    name: str, planned: PlannedFactors, architecture: str, heads: tuple[int, int] | None
) -> list[OutputTensor]:
    tensor = tensor_of(name, architecture)
    if tensor is None or (planned.layout == "embedding") != (tensor == EMBEDDING):
        message = (
            f"'{name}' (layout '{planned.layout}') has no known tensor in GGUF's "
            f"architecture '{architecture}'. It is not written."
        )
        raise InputError(message)
    if architecture in BLOCKED_QKV and tensor.endswith(".attn_qkv"):
        message = (
            f"'{name}' has the rows of q, k and v head by head; GGUF's '{architecture}' has them "
            "in blocks. It is not written."
        )
        raise UnsupportedMethodError(message)
    permuted = None
    if is_q_or_k(tensor) and architecture not in UNPERMUTED:
        rows = planned.b[0]
        if architecture not in PERMUTED:
            message = f"Whether GGUF's '{architecture}' permutes the rows of '{name}' is not known."
            raise UnsupportedMethodError(message)
        permuted = None if heads is None else heads["attn_k" in tensor]
        if permuted is None or rows % (2 * permuted):
            reason = "is not known" if permuted is None else f"{permuted} does not divide them"
            message = (
                f"'{name}': llama.cpp permutes its {rows} rows by heads, whose number {reason}. "
                "Pass heads=(of queries, of keys)."
            )
            raise InputError(message)
    turned = tensor == EMBEDDING
    keys = f"{tensor}.weight.lora_a", f"{tensor}.weight.lora_b"
    shapes = {keys[0]: planned.a[::-1] if turned else planned.a, keys[1]: planned.b}
    produce = partial(_module_arrays, planned, keys, permuted, turned=turned)
    return output_group(shapes, produce, dtype=planned.dtype)


def _module_arrays(
    planned: PlannedFactors, keys: tuple[str, str], heads: int | None, *, turned: bool
) -> dict[str, NDArray[Any]]:
    factors = planned.load(planned.dtype)
    a, b = factors.a, factors.b
    if heads is not None:  # the two halves of each head's rows in turn, as llama.cpp has them
        rows, rank = b.shape
        halves = b.reshape(heads, 2, rows // heads // 2, rank)
        b = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, rank)
    return {keys[0]: np.ascontiguousarray(a.T) if turned else a, keys[1]: b}
