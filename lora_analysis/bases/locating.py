"""Find the tensors of a module's weight: one tensor, a part, one of a stack, or several.

Tried in order until one succeeds: the module's own tensor, by its name before anything is
rewritten; a matrix in a stack of experts; rows of a fused tensor; several tensors that make a fused
module; the embedding that a head is tied to. `check_experts` compares the number of experts of a
base with that of an adapter's stacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.bases.fused import fused_with_part, parts_of_fused
from lora_analysis.bases.tensor_names import TensorNames
from lora_analysis.errors import IncompatibleError
from lora_analysis.names import strip_wrappers

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter
    from lora_analysis.bases.base_weights import BaseWeights

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

_EXPERTS: Final = re.compile(r"(?:.*\.)?(?:experts|moe)\.\w+(?:\.weight)?")
_NUMBERED: Final = re.compile(r"(?P<owner>.*\.experts)\.(?P<index>\d{1,9})\..+")
_FIELDS: Final = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts",
)  # fmt: skip
_SHARED: Final = re.compile(r"(^|\.)shared_experts?\.")
# Codes of findings on adapters with the factors of all experts in one stack.
_STACK_CODES: Final = ("expert-order", "expert-stack", "expert-factors-shared")


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
        for search in (
            self._locate_whole,
            self._locate_part,
            self._locate_joined,
            self._locate_embedding,
        ):
            for spelling in spellings:
                if located := search(spelling):
                    return [located] if isinstance(located, Located) else located
        raise self._names.missing_error(module)

    def _locate_whole(self, name: str) -> Located | None:
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

    def _locate_part(self, name: str) -> Located | None:
        for spelling in self._names.spellings(name):
            candidates = fused_with_part(spelling)
            if (match := _EXPERT.fullmatch(spelling)) and match[3] in _GATE_UP_PARTS:
                fused = f"{match[1]}.{match[2]}.gate_up_proj"
                candidates = [(fused, _GATE_UP_PARTS[match[3]])]
            for fused, part in (*candidates, *self._names.flat_fused(spelling)):
                if whole := self._locate_whole(fused):
                    return Located(whole.tensors, whole.index, fused, part)
        return None

    def _locate_joined(self, name: str) -> list[Located]:
        for spelling in (*self._names.spellings(name), *self._names.flat_joined(name)):
            parts = [self._locate_whole(part) for part in parts_of_fused(spelling)]
            located = [part for part in parts if part is not None]
            if located and len(located) == len(parts):
                return located
        return []

    def _locate_embedding(self, head: str) -> Located | None:
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


def check_experts(adapter: Adapter, base: BaseWeights) -> None:
    """Raise if an adapter stacks the factors of another number of experts than the base has.

    The file alone does not determine the number: rows of A can be 4 experts of rank 2 or 8 of rank
    1, and the wrong choice makes every update wrong, with plausible shapes.

    Raises
    ------
    IncompatibleError
        The numbers differ; the message names both.
    """
    for finding in adapter.provenance.findings:
        if finding.code not in _STACK_CODES:
            continue
        experts = finding.fields["experts"]
        expected = _count_experts(base)
        if expected is None or experts == expected:
            continue
        names = ", ".join(f"'{name}'" for name in finding.fields["parameters"])
        message = (
            f"{adapter.label} holds factors of {experts} experts ({names}), the base {base.label} "
            f"has {expected}. Is it another base? If the trainer scaled the rank per expert, so "
            "that the config's r is not the rank of one, pass the number of experts: "
            f"experts={expected} (command line: --experts {expected})."
        )
        raise IncompatibleError(message)


def _count_experts(base: BaseWeights) -> int | None:
    """Return the number of experts of a layer; None if there are none, or layers differ.

    By the first axis of the stacks, else the numbers in names, else the config.
    """
    stacks: set[int] = set()
    numbered: dict[str, int] = {}
    for name in base.names:
        if _SHARED.search(name):
            continue
        if match := _NUMBERED.fullmatch(name):
            owner = match["owner"]
            numbered[owner] = max(numbered.get(owner, 0), int(match["index"]) + 1)
        elif _EXPERTS.fullmatch(name) and len(shape := base.stored_shape(name)) >= 3:
            stacks.add(shape[0])
    counts = stacks or set(numbered.values())
    if counts:
        return counts.pop() if len(counts) == 1 else None
    nested = [value for value in base.config.values() if isinstance(value, dict)]
    counts = {
        value
        for fields in (base.config, *nested)
        for key in _FIELDS
        if type(value := fields.get(key)) is int
    }
    return counts.pop() if len(counts) == 1 and min(counts) > 0 else None
