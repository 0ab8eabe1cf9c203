"""Which way round a base matrix is stored: ``[out, in]``, or ``[in, out]`` as GPT-2's Conv1D."""

from __future__ import annotations

import re
from typing import Final

from lora_analysis.errors import BaseWeightError

# Families of transformers whose blocks use Conv1D, and the modules of those blocks that do. The
# heads and embeddings of the same models are ordinary.
_CONV1D_FAMILIES: Final = frozenset(
    {
        "clvp",
        "clvp_decoder",
        "clvp_encoder",
        "decision_transformer",
        "gpt2",
        "imagegpt",
        "openai-gpt",
    }
)
_CONV1D_MODULES: Final = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})

# Tables with a row per entry: an update from entries to dimensions is shaped like their transpose.
_EMBEDDINGS: Final = frozenset(
    {
        "embed_in", "embed_tokens", "embeddings", "position_embeddings", "shared", "token_embd",
        "token_embedding", "token_type_embeddings", "word_embeddings", "wpe", "wte",
    }
)  # fmt: skip

# Families whose stacks of experts are [expert, in, out].
_TURNED_EXPERTS: Final = frozenset({"gpt_oss", "llama4", "llama4_text"})

# Families that use those names for ordinary linear layers.
_LINEAR_DESPITE_NAMES: Final = frozenset({"gpt_bigcode", "gpt_neo", "starcoder2"})

# Names that only denoisers of images and videos have; none of them uses Conv1D, and their files
# name no family.
_DENOISER: Final = re.compile(
    r"(^|\.)(to_(q|k|v|qkv|out\.\d)|add_[qkv]_proj|to_add_out|(double|single)_blocks\.\d"
    r"|(single_)?transformer_blocks\.\d|diffusion_model|attention\.(qkv|out))(\.|$)"
)


def is_transposed(
    name: str,
    stored: tuple[int, ...],
    *,
    asked: bool | None,
    known: bool | None,
    model_type: str | None,
    shape: tuple[int, int] | None,
    label: str,
) -> bool:
    """Say whether a stored matrix must be turned to become ``(d_out, d_in)``.

    The caller's word counts first, then what the source knows (a live module's class), then the
    family, then the update's shape. Whatever was decided must fit that shape.

    Raises
    ------
    BaseWeightError
        Nothing decides, or what was decided does not fit.
    """
    decided = next(
        (word for word in (asked, known, family_orientation(model_type, name)) if word is not None),
        None,
    )
    table = asked is None and known is None and not _EMBEDDINGS.isdisjoint(name.split(".")[-2:])
    if (decided is None or table) and shape is not None and shape[0] != shape[1]:
        decided = stored != tuple(shape)
    if decided is None:
        square = "is square and " if stored[0] == stored[-1] else ""
        family = f"family '{model_type}'" if model_type else "no config.json that names a family"
        message = (
            f"{label}: whether '{name}' {stored} is stored as [out, in] or [in, out] cannot be "
            f"known: it {square}comes with {family}. Pass transposed=False or transposed=True."
        )
        raise BaseWeightError(message)
    oriented = stored[::-1] if decided else stored
    if shape is not None and oriented != tuple(shape):
        way = "[in, out]" if decided else "[out, in]"
        message = (
            f"{label}: '{name}' {stored}, stored as {way}, is a weight of shape {oriented}; the "
            f"update has shape {tuple(shape)}. Is it from another base model?"
        )
        raise BaseWeightError(message)
    return decided


def family_orientation(model_type: str | None, name: str) -> bool | None:
    """Return what the family says about a tensor, None where it does not say.

    A family that is not listed may bring its own code; outside the module names that Conv1D is
    used under, all known ones store ``[out, in]``.
    """
    if model_type is None:
        return False if _DENOISER.search(name) else None
    segments = name.split(".")
    if segments[-2:-1] == ["experts"]:  # a stack, which has no ".weight"
        return model_type in _TURNED_EXPERTS
    if not _CONV1D_MODULES.intersection(segments[-3:]):
        return False
    if model_type in _CONV1D_FAMILIES:
        return True
    return False if model_type in _LINEAR_DESPITE_NAMES else None
