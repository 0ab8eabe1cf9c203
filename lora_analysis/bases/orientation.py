"""Orientation of stored base matrices: ``[out, in]``, or ``[in, out]`` as in GPT-2's Conv1D."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from lora_analysis.errors import BaseWeightError

# Modules that read hidden states and modules that write them, by the last segment of the name.
_ROLES: Final[Mapping[str, Literal["reads", "writes"]]] = {
    **dict.fromkeys(
        (
            "c_fc", "dense_h_to_4h", "embed_out", "fc1", "gate_proj", "gate_up_proj", "k_proj",
            "key", "lin1", "lm_head", "q_proj", "qkv_proj", "query", "query_key_value", "up_proj",
            "v_proj", "value", "w1", "w3", "wi", "wi_0", "wi_1",
        ),
        "reads",
    ),
    **dict.fromkeys(
        ("dense_4h_to_h", "down_proj", "fc2", "lin2", "o_proj", "out_proj", "w2", "wo"), "writes"
    ),
}  # fmt: skip

# Families of transformers whose blocks use Conv1D, and the modules of those blocks that do. The
# heads and embeddings of the same models are ordinary.
_CONV1D_FAMILIES: Final = frozenset(
    {
        "clvp", "clvp_decoder", "clvp_encoder", "decision_transformer", "gpt2", "imagegpt",
        "openai-gpt",
    }
)  # fmt: skip
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

# Names that only denoisers of images and videos have; none of these models uses Conv1D, and their
# files name no family.
_DENOISER: Final = re.compile(
    r"(^|\.)(to_(q|k|v|qkv|out\.\d)|add_[qkv]_proj|to_add_out|(double|single)_blocks\.\d"
    r"|(single_)?transformer_blocks\.\d|diffusion_model|attention\.(qkv|out))(\.|$)"
)


def is_transposed(
    name: str,
    stored: tuple[int, ...],
    *,
    requested: bool | None,
    source: bool | None,
    model_type: str | None,
    shape: tuple[int, int] | None,
    label: str,
    evidence: Evidence | None,
) -> bool:
    """Return True if a stored matrix must be transposed to become ``(d_out, d_in)``.

    The caller's request decides first, then the source (a live module's class), then the family,
    then the update's shape, then the other matrices of the file. The decision must fit the shape,
    and a decision by family must agree with the other matrices.

    Raises
    ------
    BaseWeightError
        Nothing decides, or the decision does not fit.
    """
    family = family_orientation(model_type, name)
    decided = next((choice for choice in (requested, source, family) if choice is not None), None)
    is_given = requested is not None or source is not None
    table = not is_given and is_table(name)
    # The other matrices of the file decide for this one too, unless the caller or source did.
    others = evidence.decided if evidence and not is_given else None
    if (decided is None or table) and shape is not None and shape[0] != shape[1]:
        decided = stored != tuple(shape)
    elif decided is None:
        decided = others
    elif evidence and others not in (None, decided) and not table:
        way, other = ("[in, out]", "[out, in]") if others else ("[out, in]", "[in, out]")
        listed = " and ".join(f"'{example}'" for example in (evidence.turned or evidence.plain)[:2])
        origin = f"family '{model_type}'" if model_type else "its kind of model"
        option = "--transposed" if others else "--not-transposed"
        message = (
            f"{label}: {origin} stores '{name}' {stored} as {other}, but the other "
            f"matrices of the file are stored as {way} (by {listed}): every weight seems "
            f"transposed, square ones too. Pass transposed={others} (command line: "
            f"{option}) if that is intended."
        )
        raise BaseWeightError(message)
    if decided is None:
        square = "is square and " if stored[0] == stored[-1] else ""
        origin = f"family '{model_type}'" if model_type else "no config.json that names a family"
        message = (
            f"{label}: whether '{name}' {stored} is stored as [out, in] or [in, out] cannot be "
            f"known: it {square}comes with {origin}. Pass transposed=True or "
            "False (command line: --transposed or --not-transposed)."
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


@dataclass(frozen=True, slots=True)
class Evidence:
    """Matrices of a file whose shape determines how they are stored.

    Attributes
    ----------
    plain, turned
        Names of those stored as ``[out, in]``, and as ``[in, out]``.
    """

    plain: tuple[str, ...]
    turned: tuple[str, ...]

    @property
    def decided(self) -> bool | None:
        """True for ``[in, out]``, False for ``[out, in]``, None if they differ or are too few."""
        if bool(self.plain) == bool(self.turned):
            return None
        return bool(self.turned)


def is_table(name: str) -> bool:
    """Return True for embeddings, whose update may be shaped like their transpose."""
    return not _EMBEDDINGS.isdisjoint(name.split(".")[-2:])


def is_conv1d(name: str) -> bool:
    """Return True for the modules that GPT-2 and similar models implement as Conv1D."""
    return not _CONV1D_MODULES.isdisjoint(name.split(".")[-3:])


def evidence_of(
    names: Iterable[str],
    shape_of: Callable[[str], tuple[int, ...]],
    config: Mapping[str, Any],
    *,
    conv1d: bool,
) -> Evidence:
    """Return the evidence in a file's matrices for the orientation that they are stored in.

    A bias is as long as its matrix has outputs; modules with well-known names have one side of the
    model's width. Square matrices and tables are no evidence.

    Parameters
    ----------
    names, shape_of
        The stored tensors and their shapes.
    config
        The model's configuration, for its width.
    conv1d
        True for the modules that GPT-2 and similar models implement as Conv1D, False for all
        others.
    """
    names = set(names)
    # Of the hidden states.
    widths = (
        part[key]
        for part in (config, config.get("text_config"))
        if isinstance(part, Mapping)
        for key in ("hidden_size", "d_model", "n_embd", "dim")
        if isinstance(part.get(key), int)
    )
    width = next(widths, None)
    examples: dict[bool, list[str]] = {False: [], True: []}
    for name in names:
        module = name.removesuffix(".weight")
        shape = shape_of(name)
        if module == name or is_conv1d(name) != conv1d or is_table(name):
            continue
        if len(shape) != 2 or shape[0] == shape[1]:
            continue
        bias = f"{module}.bias"
        outputs = shape_of(bias) if bias in names else ()
        role = _ROLES.get(module.rpartition(".")[2])
        if len(outputs) == 1 and outputs[0] in shape:
            examples[outputs[0] == shape[1]].append(name)
        elif role is not None and width in shape:
            examples[(width == shape[0]) == (role == "reads")].append(name)
    return Evidence(tuple(sorted(examples[False])), tuple(sorted(examples[True])))


def family_orientation(model_type: str | None, name: str) -> bool | None:
    """Return True if the family stores a tensor as ``[in, out]``, None if it is not known.

    A family that is not listed may have its own code; except for the module names that Conv1D is
    used under, all known families store ``[out, in]``.
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
