"""Tensor names of a PEFT file, sorted by adapter, module and role."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from lora_analysis.errors import MalformedFileError, UnsupportedMethodError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_analysis.formats.factors import FactorRole

Part = Literal["A", "B", "singular values", "rank divisor", "diagonal", "magnitude"]

PREFIX: Final = "base_model.model."

# Roles of the tensors of an adapted module, by a segment of the key.
_PARTS: Final[dict[str, Part]] = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_E": "singular values",
    "ranknum": "rank divisor",
    "lora_diag": "diagonal",
    "lora_magnitude_vector": "magnitude",
}
_FACTOR = re.compile(
    r".+\.(lora_[AB](\.[^.]+)?\.weight|lora_embedding_[AB](\.[^.]+)?|lora_E(\.[^.]+)?)"
)
_LORA_BIAS = re.compile(r"(?P<module>.+)\.lora_B(\.[^.]+)?\.bias")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(\.(?P<adapter>[^.]+))?\.(?P<rest>[^.]+)")

# Wrappers that torch.compile, FSDP and data parallelism put into names.
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
    r"|^(module\.)+(?=(_\w+\.)*base_model\.)"
)
# Tinker's name of the head of a language model, which no model of transformers has.
_HEAD = re.compile(r"(?:model\.)*(?:language_model\.)?(?:model\.)*unembed_tokens")
# VeLoRA stores it for its backward pass; the update does not depend on it.
_TRAINING_ONLY = "lora_velora_embed"
BASE_BIASES: Final = "trained biases of the base"
_FACTOR_BIASES: Final = "biases of factor B (lora_bias)"
_TOKENS: Final = "replaced token embeddings"
_FACTORS_IN_FULL: Final = "factors on a module that is also trained in full"
# Tensors that a model needs to compute the same; the rest is the base's or for training.
ALTERING: Final = frozenset({BASE_BIASES, _FACTOR_BIASES, _FACTORS_IN_FULL, _TOKENS})

# A key segment that starts so belongs to a method whose update is not s·B·A. Segments, not
# substrings: 'poly_lora_A' and 'vera_A' look like plain factors otherwise.
_OTHER_METHODS: Final = {
    "lora_": "another layout or variant of LoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "vera_": "VeRA",
    "pvera_": "PVeRA",
    "ia3_": "IA3",
    "hra_": "HRA",
    "fourierft_": "FourierFT",
    "vblora_": "VB-LoRA",
    "unilora_": "UniLoRA",
    "randlora_": "RandLoRA",
    "miss_": "MiSS",
    "bone_": "Bone",
    "shira_": "SHiRA",
    "c3a_": "C3A",
    "ln_tuning_": "LN tuning",
    "hira_": "HiRA",
    "gralora_": "GraLoRA",
    "delora_": "DeLoRA",
    "lily_": "LILY",
    "poly_": "Poly",
    "tinylora_": "TinyLoRA",
    "psoft_": "PSOFT",
    "osf_": "OSF",
    "frod_": "FroD",
    "glora_": "GLoRA",
    "waveft_": "WaveFT",
    "adamss_": "AdaMSS",
    "beft_": "BEFT",
    "deft_": "DEFT",
    "peanut_": "PEANuT",
    "adaption_": "adaption prompts",
    "trainable_tokens": "trainable tokens",
    "road_": "RoAd",
    "prompt_embeddings": "prompt tuning",
}


@dataclass(slots=True)
class SortedKeys:
    """The tensor names of one file, sorted by their roles.

    ``factors``: adapter name (None if keys state none) → module → role → tensor name. A
    module's name ends with ``.base_layer`` if factors lie inside those of the same module.
    ``extras``: the same for tensors that some methods store next to the two factors.
    ``saved``: adapter name → tensor name in the base model → tensor name in the file.
    ``full``: names, in the base model, of further tensors of modules that are trained in full.
    ``notes``: kind of tensors that are not analyzed → their names.
    """

    factors: dict[str | None, dict[str, dict[FactorRole, str]]] = field(default_factory=dict)
    extras: dict[str | None, dict[str, dict[Part, str]]] = field(default_factory=dict)
    saved: dict[str | None, dict[str, str]] = field(default_factory=dict)
    full: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, key: str) -> None:
        """Remember a tensor that is reported and left alone."""
        self.notes.setdefault(what, []).append(key)


def has_factors(keys: Iterable[str]) -> bool:
    """Return True if any tensor name is that of a PEFT factor."""
    return any(_FACTOR.fullmatch(key) for key in keys)


def module_name(key: str) -> str:
    """Return a module name as the base model has it: wrapper prefixes and layers stripped."""
    name = _WRAPPERS.sub("", key).removeprefix(PREFIX).replace(".base_layer.", ".")
    return "lm_head" if _HEAD.fullmatch(name) else name


def sort_keys(path: object, keys: Iterable[str]) -> SortedKeys:
    """Sort the tensor names of a PEFT file.

    Raises
    ------
    UnsupportedMethodError
        A key belongs to a method whose update is not ``s·B·A``.
    """
    to = SortedKeys()
    for key in keys:
        plain = _WRAPPERS.sub("", key).removeprefix(PREFIX)
        segments = plain.split(".")
        # Before these three (parameter, adapter's name, ".weight") come names of the base.
        last = segments[-3:]
        if "original_module" in segments:
            to.note("frozen copies of modules trained in full", key)
        elif not _PARTS.keys().isdisjoint(segments):
            _sort_part(path, key, plain, to)
        elif segments[-1] == "trainable_tokens_delta":
            to.note(_TOKENS, key)
        elif _TRAINING_ONLY in last:
            to.note("VeLoRA's projection of activations, used in training only", key)
        elif mark := next((m for s in last for m in _OTHER_METHODS if s.startswith(m)), None):
            message = (
                f"{path}: tensor '{key}' belongs to {_OTHER_METHODS[mark]}. Only plain LoRA on "
                "matrices, s·B·A, is read."
            )
            raise UnsupportedMethodError(message)
        elif "base_layer" in segments:
            what = BASE_BIASES if segments[-1] == "bias" else "copies of base weights"
            to.note(what, key)
        elif match := _SAVED.fullmatch(plain):
            name = f"{match['module']}.{match['rest']}"
            to.saved.setdefault(match["adapter"], {})[name] = key
        else:
            to.saved.setdefault(None, {})[plain] = key
    return to


def _sort_part(path: object, key: str, plain: str, to: SortedKeys) -> None:
    """File one key that has a segment of an adapted module."""
    segments = plain.split(".")
    last = max(i for i, segment in enumerate(segments) if segment in _PARTS)
    module, after = ".".join(segments[:last]), segments[last + 1 :]
    if "modules_to_save" in segments:
        to.full.append(plain.replace(".modules_to_save", ""))
        to.note(_FACTORS_IN_FULL, key)
    elif _LORA_BIAS.fullmatch(plain):
        to.note(_FACTOR_BIASES, key)
    elif not module or len(after) > 2 or (len(after) == 2 and after[1] != "weight"):
        message = (
            f"{path}: tensor '{key}' is not <module>.lora_A.weight or <module>.lora_B.weight, with "
            "or without an adapter's name. Is it from another trainer?"
        )
        raise UnsupportedMethodError(message)
    else:
        adapter = after[0] if after and after[0] != "weight" else None
        part = _PARTS[segments[last]]
        modules = (to.factors if part in ("A", "B") else to.extras).setdefault(adapter, {})
        stored: dict[Part, str] = modules.setdefault(module_name(module), {})  # type: ignore[assignment]
        if part in stored:
            message = f"{path}: '{stored[part]}' and '{key}' are both factor {part} of one module."
            raise MalformedFileError(message)
        stored[part] = key
