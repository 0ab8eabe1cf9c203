"""One GGUF file that llama.cpp loads beside the base: factors as float32, one alpha for all.

llama.cpp knows ``alpha/r`` alone: a scale of another rule (rsLoRA, a pattern of alphas) is folded
into alpha where all modules agree, else into B. q and k of the Llama family are permuted as its
converter does, for which the number of heads is needed.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.text_writing import (
    PlannedFactors,
    folded,
    with_experts_stacked,
    writable,
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
    MissingExtraError
        The package ``gguf`` is not installed.
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
    factors = with_experts_stacked(folded(adapter, updates, lambda u: alpha / u.rank), _FORMAT)
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
    if heads is not None:  # llama.cpp passes it over; who reads the file needs it for q and k
        fields[f"{architecture}.attention.head_count"] = heads[0]
        fields[f"{architecture}.attention.head_count_kv"] = heads[1]
    if adapter.provenance.base_model:
        fields["general.base_model.0.name"] = adapter.provenance.base_model
    return {_WEIGHTS_NAME: gguf_content(tensors, fields)}


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


def _alpha(updates: Mapping[str, UpdateOutline]) -> float:
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
    name: str, planned: PlannedFactors, architecture: str, heads: tuple[int, int] | None
) -> list[OutputTensor]:
    tensor = tensor_of(name, architecture)
    if tensor is None or (planned.layout == "embedding") != (tensor == EMBEDDING):
        message = (
            f"'{name}' (layout '{planned.layout}') has no tensor in GGUF's architecture "
            f"'{architecture}' that is known here. It is not written."
        )
        raise InputError(message)
    if architecture in BLOCKED_QKV and tensor.endswith(".attn_qkv"):
        message = (
            f"'{name}' has the rows of q, k and v per head, GGUF's '{architecture}' in blocks. It "
            "is not written."
        )
        raise UnsupportedMethodError(message)
    permuted = None
    if is_q_or_k(tensor) and architecture not in UNPERMUTED:
        count = None if heads is None else heads["attn_k" in tensor]
        permuted = _heads_to_permute(name, planned.b[0], architecture, count)
    turned = tensor == EMBEDDING
    keys = f"{tensor}.weight.lora_a", f"{tensor}.weight.lora_b"
    shapes = {keys[0]: planned.a[::-1] if turned else planned.a, keys[1]: planned.b}
    return output_group(shapes, partial(_module_arrays, planned, keys, permuted, turned=turned))


def _module_arrays(
    planned: PlannedFactors, keys: tuple[str, str], heads: int | None, *, turned: bool
) -> dict[str, NDArray[np.float32]]:
    factors = planned.load()
    a, b = factors.a, factors.b
    if heads is not None:  # the two halves of each head's rows in turn, as llama.cpp has them
        rows, rank = b.shape
        halves = b.reshape(heads, 2, rows // heads // 2, rank)
        b = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, rank)
    return {keys[0]: np.ascontiguousarray(a.T) if turned else a, keys[1]: b}


def _heads_to_permute(name: str, rows: int, architecture: str, heads: int | None) -> int:
    """Return the number of heads by which B's rows are permuted; refuse what is not known."""
    if architecture not in PERMUTED:
        message = f"Whether GGUF's '{architecture}' permutes the rows of '{name}' is not known."
        raise UnsupportedMethodError(message)
    if heads is None or rows % (2 * heads):
        stated = "is not known" if heads is None else f"{heads} does not divide them"
        message = (
            f"'{name}': llama.cpp permutes its {rows} rows by heads, whose number {stated}. Pass "
            "heads=(of queries, of keys)."
        )
        raise InputError(message)
    return heads
