"""One GGUF file that llama.cpp loads beside the base: factors as float32, one alpha for all.

llama.cpp knows ``alpha/r`` alone: a scale of another rule (rsLoRA, a pattern of alphas) is folded
into alpha where all modules agree, else into B. q and k of the Llama family are permuted as its
converter does, for which the number of heads is needed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.text_writing import (
    Factors,
    folded,
    with_experts_stacked,
    writable,
)
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.gguf_names import (
    EMBEDDING,
    LEFT,
    PERMUTED,
    UNTANGLED,
    is_rotated,
    tensor_of,
)
from lora_analysis.storage.gguf_writing import gguf_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, LowRankUpdate

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


def write_gguf(
    adapter: Adapter,
    path: Path,
    *,
    architecture: str | None = None,
    heads: tuple[int, int] | None = None,
) -> Path:
    """Write one file: ``path`` where it ends in ``.gguf``, else a file in that folder.

    Parameters
    ----------
    adapter
        Every module a low-rank update of known scale.
    path
        Where to.
    architecture
        llama.cpp's name of the base's architecture, ``"llama"``; by default that of the file the
        adapter was read from, or of a base model that lies on this disk.
    heads
        The base's attention heads and key-value heads, by default from the same places.

    Raises
    ------
    InputError
        The architecture is not known, or has no tensor for a module; or q and k would have to be
        permuted by a number of heads that is not known.
    UnsupportedMethodError
        An update needs more than two factors and a scale.
    """
    updates = writable(adapter, _FORMAT)
    base = _base_facts(adapter)
    architecture = architecture or base.architecture
    if architecture is None:
        message = (
            f"{adapter.label}: GGUF files state the architecture of the base, which is not known. "
            "Pass architecture='llama', or whichever it is in llama.cpp."
        )
        raise InputError(message)
    heads = heads or base.heads
    alpha = _alpha(updates)
    factors = with_experts_stacked(folded(updates, lambda u: alpha / u.rank), _FORMAT)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, one in factors.items():
        tensors |= _module_tensors(name, one, architecture, heads)
    facts: dict[str, str | int | float] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "general.name": adapter.label,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    if heads is not None:  # llama.cpp passes it over; who reads the file needs it for q and k
        facts[f"{architecture}.attention.head_count"] = heads[0]
        facts[f"{architecture}.attention.head_count_kv"] = heads[1]
    if adapter.provenance.base_model:
        facts["general.base_model.0.name"] = adapter.provenance.base_model
    file = path if path.suffix == ".gguf" else path / _WEIGHTS_NAME
    return write_atomic(file, gguf_bytes(facts, tensors))


def gguf_notes(adapter: Adapter) -> list[str]:
    """Return what of the scales was folded into what."""
    updates = writable(adapter, _FORMAT)
    alpha = _alpha(updates)
    notes = []
    if adapter.config.get("use_rslora"):
        notes.append(
            f"GGUF cannot say rsLoRA: the scale is folded into alpha, {alpha:g}. ΔW is the same."
        )
    # Within what float32 rounds, it is the same scale.
    count = sum(
        not math.isclose(update.known_scale(), alpha / update.rank, rel_tol=1e-6)
        for update in updates.values()
    )
    if count:
        notes.append(
            f"GGUF states one alpha for all modules: the scale of {count} of {len(updates)} "
            "modules is folded into B. ΔW is the same."
        )
    return notes


def _alpha(updates: Mapping[str, LowRankUpdate]) -> float:
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


class _Base:
    """What is known of the base: its architecture in llama.cpp's words, and its heads."""

    __slots__ = ("architecture", "heads")

    def __init__(self, architecture: str | None, heads: tuple[int, int] | None) -> None:
        self.architecture = architecture
        self.heads = heads


def _base_facts(adapter: Adapter) -> _Base:
    """Return what the adapter's own file or a base on this disk says."""
    own = adapter.config.get("gguf_architecture")
    if isinstance(own, str) and own:
        heads = adapter.config.get("heads")
        return _Base(own, heads if isinstance(heads, tuple) else None)
    config = _base_config(adapter.provenance.base_model)
    queries = config.get("num_attention_heads")
    keys = config.get("num_key_value_heads", queries)
    known = isinstance(queries, int) and isinstance(keys, int)
    kind = _ARCHITECTURES.get(str(config.get("model_type")))
    return _Base(kind, (queries, keys) if known else None)  # type: ignore[arg-type]


def _base_config(base_model: str | None) -> dict[str, Any]:
    try:
        path = Path(base_model or "") / "config.json"
        return read_json_object(path) if base_model and path.is_file() else {}
    except (InputError, OSError, ValueError):
        return {}


def _module_tensors(
    name: str, one: Factors, architecture: str, heads: tuple[int, int] | None
) -> dict[str, NDArray[np.float32]]:
    tensor = tensor_of(name, architecture)
    if tensor is None or (one.layout == "embedding") != (tensor == EMBEDDING):
        message = (
            f"'{name}' (layout '{one.layout}') has no tensor in GGUF's architecture "
            f"'{architecture}' that is known here. It is not written."
        )
        raise InputError(message)
    a, b = one.a, one.b
    if tensor == EMBEDDING:
        a = np.ascontiguousarray(a.T)
    if architecture in UNTANGLED and tensor.endswith(".attn_qkv"):
        message = (
            f"'{name}' has the rows of q, k and v per head, GGUF's '{architecture}' in blocks. It "
            "is not written."
        )
        raise UnsupportedMethodError(message)
    if is_rotated(tensor) and architecture not in LEFT:
        b = _permuted(name, b, architecture, None if heads is None else heads["attn_k" in tensor])
    return {f"{tensor}.weight.lora_a": a, f"{tensor}.weight.lora_b": b}


def _permuted(
    name: str, b: NDArray[np.float32], architecture: str, heads: int | None
) -> NDArray[np.float32]:
    """Return B with the two halves of each head's rows in turn, as llama.cpp has them."""
    if architecture not in PERMUTED:
        message = f"Whether GGUF's '{architecture}' permutes the rows of '{name}' is not known."
        raise UnsupportedMethodError(message)
    rows, rank = b.shape
    if heads is None or rows % (2 * heads):
        stated = "is not known" if heads is None else f"{heads} does not divide them"
        message = (
            f"'{name}': llama.cpp permutes its {rows} rows by heads, whose number {stated}. Pass "
            "heads=(of queries, of keys)."
        )
        raise InputError(message)
    halves = b.reshape(heads, 2, rows // heads // 2, rank)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, rank)
