"""From a module's name to where its weight lies: a tensor, a part of one, one of a stack, several.

Tried in order, each only if the one before gave nothing: the module's own tensor, as it is named
before anything is rewritten; a matrix in a stack of experts; rows of a fused tensor; several
tensors that make a fused module; the embedding that a head is tied to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lora_analysis.bases.fused import homes_of_part, parts_of_fused
from lora_analysis.bases.naming import TensorNames
from lora_analysis.names import strip_wrappers

_EXPERT: Final = re.compile(r"(.*\.experts)\.(\d{1,9})\.(\w+)")
# "experts.gate_up_proj.3" and "experts.gate_up_proj[3]" are expert 3 of that parameter.
_STACKED: Final = re.compile(r"(.*\.experts)\.(\w+)(?:\.(\d{1,9})|\[(\d{1,9})\])")
_OF_GATE_UP: Final = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up"}
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
    """Tensors that may hold a module's weight; one must be chosen by shape.

    ``index`` names the matrix of a stack; ``home`` and ``part`` the fused module and the part of it
    that is meant.
    """

    tensors: tuple[str, ...]
    index: int | None = None
    home: str = ""
    part: str | None = None


class Locator:
    """Finds modules in a base.

    Parameters
    ----------
    names
        The base's tensors.
    shape_of
        Stored shape of a tensor.
    config
        The model's configuration; ``tie_word_embeddings`` is asked of it.
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
        """Return where a module's rows lie, in order; more than one where several tensors make it.

        Raises
        ------
        BaseWeightError
            Nowhere; the message lists near names.
        """
        named = strip_wrappers(module)
        spellings = [named]  # a module may itself be called "experts.down_projs.3"
        if match := _STACKED.fullmatch(named):
            spellings.append(f"{match[1]}.{match[3] or match[4]}.{match[2]}")
        for search in (self._whole, self._part, self._joined, self._embedding):
            for spelling in spellings:
                if located := search(spelling):
                    return [located] if isinstance(located, Located) else located
        raise self._names.missing(module)

    def _whole(self, wanted: str) -> Located | None:
        """Return the module's own tensor, or the stack of experts that holds it."""
        if tensors := self._names.find(wanted):
            return Located(tuple(tensors))
        if match := _EXPERT.fullmatch(wanted):
            index = int(match[2])
            stacks = tuple(
                name
                for name in self._names.find(f"{match[1]}.{match[3]}")
                if len(self._shape_of(name)) == 3 and index < self._shape_of(name)[0]
            )
            if stacks:
                return Located(stacks, index)
        return None

    def _part(self, wanted: str) -> Located | None:
        for spelling in self._names.spellings(wanted):
            for home, part in (*self._homes(spelling), *self._names.flat_homes(spelling)):
                if held := self._whole(home):
                    return Located(held.tensors, held.index, home, part)
        return None

    @staticmethod
    def _homes(wanted: str) -> Sequence[tuple[str, str]]:
        if (match := _EXPERT.fullmatch(wanted)) and match[3] in _OF_GATE_UP:
            return [(f"{match[1]}.{match[2]}.gate_up_proj", _OF_GATE_UP[match[3]])]
        return homes_of_part(wanted)

    def _joined(self, wanted: str) -> list[Located]:
        for spelling in self._names.spellings(wanted):
            parts = [self._whole(part) for part in parts_of_fused(spelling)]
            found = [part for part in parts if part is not None]
            if found and len(found) == len(parts):
                return found
        return []

    def _embedding(self, wanted: str) -> Located | None:
        """Return the embedding, for a head whose tensor is absent because the two are one."""
        path, _, last = wanted.rpartition(".")
        shared = self._tied and _HEAD.fullmatch(wanted) is not None
        for name in _EMBEDDINGS:
            # T5's encoder and decoder both embed by `shared`.
            if shared or (name == "shared" and last == "embed_tokens"):
                tensors = self._names.find(name) or self._names.find(f"{path}.{name}")
                if tensors:
                    return Located(tuple(tensors))
        return None
