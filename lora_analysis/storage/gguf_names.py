"""Names of modules and order of rows in files of llama.cpp's converter, by architecture.

Reference: ``gguf-py/gguf/tensor_mapping.py`` and the model classes of ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

# Architectures whose converter interleaves the two halves of each head's q and k rows, and those
# whose rows it leaves as they are. For others it is not known.
PERMUTED: Final = frozenset(
    {
        "llama", "arcee", "arctic", "granite", "granitemoe", "llama-embed", "minicpm", "mistral3",
        "nanbeige", "olmo", "smollm3",
    }
)  # fmt: skip
UNPERMUTED: Final = frozenset(
    {
        "apertus", "bert", "bloom", "cohere2", "command-r", "falcon", "gemma", "gemma2", "gemma3",
        "gpt-oss",
        "gpt2", "gptneox", "llama4", "mpt", "nomic-bert", "olmo2", "olmoe", "phi2", "phi3", "qwen",
        "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "stablelm", "starcoder2", "t5",
        "t5encoder",
    }
)  # fmt: skip
# Architectures whose fused q, k, v rows the converter reorders from heads to blocks.
BLOCKED_QKV: Final = frozenset({"bloom", "gptneox", "falcon"})

EMBEDDING: Final = "token_embd"
_BLOCK: Final = re.compile(r"blk\.(?P<index>\d+)\.(?P<part>[a-z0-9_]+)")
_LAYER: Final = re.compile(
    r"(?:base_model\.model\.)?(?:model|transformer|gpt_neox)\.(?:layers|h)"
    r"\.(?P<index>\d+)\.(?P<part>[a-z0-9_.]+)"
)

_LLAMA_PARTS: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    # Stacks of all experts: in module names, the number of the expert follows "experts".
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}


@dataclass(frozen=True, slots=True)
class _Family:
    """Module names of architectures: prefix of blocks, modules of a block, modules outside."""

    prefix: str
    parts: dict[str, str]
    outside: dict[str, str]


_LLAMA: Final = _Family(
    "model.layers", _LLAMA_PARTS, {EMBEDDING: "model.embed_tokens", "output": "lm_head"}
)
_PHI3: Final = _Family(
    "model.layers",
    {
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    _LLAMA.outside,
)
_GPT2: Final = _Family(
    "transformer.h",
    {
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    {EMBEDDING: "transformer.wte", "output": "lm_head"},
)
_NEOX_PARTS: Final = {
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_GPTNEOX: Final = _Family(
    "gpt_neox.layers", _NEOX_PARTS, {EMBEDDING: "gpt_neox.embed_in", "output": "embed_out"}
)
# BLOOM and Falcon share the names of their blocks.
_BLOOM: Final = _Family(
    "transformer.h",
    _NEOX_PARTS
    | {"attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense"},
    {EMBEDDING: "transformer.word_embeddings", "output": "lm_head"},
)
_PHI2: Final = _Family(
    "model.layers",
    _LLAMA_PARTS | {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
    _LLAMA.outside,
)
_FAMILIES: Final = {
    **dict.fromkeys(
        (
            "llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "olmoe", "gemma",
            "gemma2", "gemma3", "mistral3", "olmo", "olmo2", "stablelm", "command-r",
            "cohere2", "granite", "minicpm", "arcee", "smollm3", "nanbeige", "llama-embed",
        ),
        _LLAMA,
    ),
    "phi3": _PHI3,
    "phi2": _PHI2,
    "gpt2": _GPT2,
    "gptneox": _GPTNEOX,
    "bloom": _BLOOM,
    "falcon": _BLOOM,
}  # fmt: skip


def module_of(tensor: str, architecture: str) -> str:
    """Return the original model's name for a GGUF tensor (its name without ``.weight``).

    The name is returned unchanged if the table lacks the architecture or the tensor.
    """
    family = _FAMILIES.get(architecture)
    if family is None:
        return tensor
    if match := _BLOCK.fullmatch(tensor):
        part = family.parts.get(match["part"])
        return tensor if part is None else f"{family.prefix}.{match['index']}.{part}"
    return family.outside.get(tensor, tensor)


def tensor_of(module: str, architecture: str) -> str | None:
    """Return the name of a module's tensor in a GGUF file, None if it is not known."""
    if _BLOCK.fullmatch(module):
        return module
    family = _FAMILIES.get(architecture)
    if family is None:
        return None
    if match := _LAYER.fullmatch(module):
        names = {module_part: part for part, module_part in family.parts.items()}
        part = names.get(match["part"])
        inside = module.startswith((family.prefix, f"base_model.model.{family.prefix}"))
        return f"blk.{match['index']}.{part}" if part and inside else None
    return {outside: name for name, outside in family.outside.items()}.get(module)


# Rows over columns of GPT-2's matrices, which are not square.
_GPT2_HEIGHTS: Final = {"attn_qkv": (3, 1), "ffn_up": (4, 1), "ffn_down": (1, 4)}


def is_stored_transposed(tensor: str, shape: tuple[int, int]) -> bool | None:
    """Return True if a GPT-2 update of shape ``(d_out, d_in)`` is stored transposed.

    llama.cpp's converter transposes GPT-2's weights, which the model stores as ``[in, out]``, and
    transposes a LoRA's factors too, although PEFT stores those as in any other model. None if the
    shape does not decide.
    """
    match = _BLOCK.fullmatch(tensor)
    heights = _GPT2_HEIGHTS.get(match["part"]) if match else None
    if heights is None:
        return None
    up, across = heights
    if shape[0] * across == shape[1] * up:
        return False
    return True if shape[1] * across == shape[0] * up else None


def is_q_or_k(tensor: str) -> bool:
    """Return True if a tensor (without ``.weight``) is q or k of a block."""
    return tensor.startswith("blk.") and tensor.endswith((".attn_q", ".attn_k"))
