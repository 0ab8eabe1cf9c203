"""Find the tensors of a module's weight: one tensor, a part, one of a stack, or several.

Tried in order until one succeeds: the module's own tensor, by its name before anything is
rewritten; a matrix in a stack of experts; rows of a fused tensor; several tensors that make a fused
module; the embedding that a head is tied to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lora_analysis.bases.fused import fused_with_part, parts_of_fused
from lora_analysis.bases.tensor_names import TensorNames
from lora_analysis.names import strip_wrappers

_EXPERT: Final = re.compile(r"(.*\.experts)\.(\d{1,9})\.(\w+)")
# "experts.gate_up_proj.3" and "experts.gate_up_proj[3]" are expert 3 of that parameter.
_STACKED: Final = re.compile(r"(.*\.experts)\.(\w+)(?:\.(\d{1,9})|\[(\d{1,9})\])")
_GATE_UP_PARTS: Final = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up"}
_HEAD: Final = re.compile(
    r"output|(.*\.)?(lm_head|lm_head\.decoder|embed_out|output_layer|predictions\.decoder"
    r"|vocab_projector)"
)
_EMBEDDINGS: Final = (
    "embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "token_embd", "tok_embeddings",
    "tokens_embed", "word_embedding", "embeddings", "embedding",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Located:
    """Tensors that may contain a module's weight; the shape selects one.

    ``index`` is the matrix of a stack; ``fused`` and ``part`` are the fused module and the part of
    it that the module is.
    """

    tensors: tuple[str, ...]
    index: int | None = None
    fused: str = ""
    part: str | None = None


class Locator:
    """Lookup of modules in a base.

    Parameters
    ----------
    names
        The base's tensors.
    shape_of
        Function that returns the stored shape of a tensor.
    config
        The model's configuration, for ``tie_word_embeddings``.
    """

    def __init__(
        self,
        names: TensorNames,
        shape_of: Callable[[str], tuple[int, ...]],
        config: Mapping[str, Any],
    ) -> None:
        self._names = names
        self._shape_of = shape_of
        self._tied = config.get("tie_word_embeddings") is not False

    def locate(self, module: str) -> list[Located]:
        """Return the locations of a module's rows, in order; several if several tensors make it.

        Raises
        ------
        BaseWeightError
            No tensor belongs to the module; the message lists near names.
        """
        stripped = strip_wrappers(module)
        spellings = [stripped]  # a module may itself be called "experts.down_projs.3"
        if match := _STACKED.fullmatch(stripped):
            spellings.append(f"{match[1]}.{match[3] or match[4]}.{match[2]}")
        for search in (self._whole, self._part, self._joined, self._embedding):
            for spelling in spellings:
                if located := search(spelling):
                    return [located] if isinstance(located, Located) else located
        raise self._names.missing(module)

    def _whole(self, name: str) -> Located | None:
        """Return the module's own tensor, or the stack of experts that contains it."""
        if tensors := self._names.find(name):
            return Located(tuple(tensors))
        if match := _EXPERT.fullmatch(name):
            index = int(match[2])
            stacks = tuple(
                tensor
                for tensor in self._names.find(f"{match[1]}.{match[3]}")
                if len(self._shape_of(tensor)) == 3 and index < self._shape_of(tensor)[0]
            )
            if stacks:
                return Located(stacks, index)
        return None

    def _part(self, name: str) -> Located | None:
        for spelling in self._names.spellings(name):
            for fused, part in (*self._fused(spelling), *self._names.flat_fused(spelling)):
                if whole := self._whole(fused):
                    return Located(whole.tensors, whole.index, fused, part)
        return None

    @staticmethod
    def _fused(name: str) -> Sequence[tuple[str, str]]:
        if (match := _EXPERT.fullmatch(name)) and match[3] in _GATE_UP_PARTS:
            return [(f"{match[1]}.{match[2]}.gate_up_proj", _GATE_UP_PARTS[match[3]])]
        return fused_with_part(name)

    def _joined(self, name: str) -> list[Located]:
        for spelling in (*self._names.spellings(name), *self._names.flat_joined(name)):
            parts = [self._whole(part) for part in parts_of_fused(spelling)]
            located = [part for part in parts if part is not None]
            if located and len(located) == len(parts):
                return located
        return []

    def _embedding(self, head: str) -> Located | None:
        """Return the embedding, for a tied head, which has no tensor."""
        path, _, last = head.rpartition(".")
        shared = self._tied and _HEAD.fullmatch(head) is not None
        for name in _EMBEDDINGS:
            # T5's encoder and decoder both embed by `shared`.
            if shared or (name == "shared" and last == "embed_tokens"):
                tensors = self._names.find(name) or self._names.find(f"{path}.{name}")
                if tensors:
                    return Located(tuple(tensors))
        return None
