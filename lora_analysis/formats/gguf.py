"""LoRA adapters as llama.cpp reads them, in GGUF: ``<tensor>.lora_a`` and ``<tensor>.lora_b``.

Reference: llama.cpp, ``convert_lora_to_gguf.py`` and ``src/llama-adapter.cpp``. A is
``(r, d_in)``, B ``(d_out, r)``, those of a stack of experts with one more axis in front; A of the
token embedding is stored transposed, ``(entries, r)``. ``s = alpha/r``, or 1 where alpha is 0. Of
the Llama family, q and k have the two halves of each head's rows interleaved; that is undone where
the number of heads is known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.adapter import LLAMA_CPP_ROWS
from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.formats.build import AdapterParts, build_adapter
from lora_analysis.formats.factors import StatedScale, StoredPair, scale_from_alpha, split_stack
from lora_analysis.formats.key_scheme import KeyPattern, StoredModules, has_factors, sort_keys
from lora_analysis.formats.side_tensors import side_findings
from lora_analysis.formats.sources import AdapterFiles, AdapterRef, Format
from lora_analysis.formats.stored import deinterleave_heads
from lora_analysis.storage.gguf import GGUFTensors, is_gguf
from lora_analysis.storage.gguf_names import (
    BLOCKED_QKV,
    EMBEDDING,
    PERMUTED,
    UNPERMUTED,
    is_q_or_k,
    is_stored_transposed,
    module_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.options import ReadOptions

_KEY: Final = KeyPattern(re.compile(r"(?P<module>.+)\.weight\.lora_(?P<role>[ab])"))
_ALPHA: Final = "adapter.lora.alpha"
_TOKENS: Final = "adapter.alora.invocation_tokens"
# What an update is a part of whose rows are in an order that is not the model's.


@dataclass(slots=True)
class _Content:
    """The pairs of a file, and the modules that findings name."""

    pairs: list[StoredPair] = field(default_factory=list)
    undone: list[str] = field(default_factory=list)
    permuted: list[str] = field(default_factory=list)
    untangled: list[str] = field(default_factory=list)
    transposed: bool | None = False


class _GGUF(Format):
    """Any GGUF file is located; one without factors is not listed, and refused by its type."""

    name = "gguf"

    def locate(self, path: Path, options: ReadOptions) -> AdapterFiles | None:  # noqa: ARG002
        return AdapterFiles(path, path) if is_gguf(path) else None

    def find(self, files: AdapterFiles, options: ReadOptions) -> list[AdapterRef]:
        try:
            is_adapter = has_factors(GGUFTensors.open(files.path).infos, [_KEY])
        except InputError:
            is_adapter = False
        return super().find(files, options) if is_adapter else []

    def read(self, files: AdapterFiles, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG002
        """Read an adapter.

        Raises
        ------
        MalformedFileError
            The file is damaged, or a module has one factor only.
        UnsupportedMethodError
            It is a model, or an adapter of another kind.
        """
        tensors = GGUFTensors.open(files.path)
        _check_type(files.path, tensors)
        stored = sort_keys(StoredModules(files, tensors, options), (_KEY,))
        facts = tensors.facts
        architecture = str(facts.get("general.architecture", ""))
        content = _Content()
        rows = _Rows(architecture, _heads(facts, architecture, options))
        pairs = stored.pairs()
        if architecture == "gpt2":
            content.transposed = _are_transposed(tensors, pairs)
        for plain in pairs:
            _add(content, tensors, plain, rows)
        alpha = facts.get(_ALPHA)
        base = facts.get("general.base_model.0.repo_url") or facts.get("general.base_model.0.name")
        uses_file_scale = options.scale is None and options.alpha is None
        parts = AdapterParts(
            pairs=content.pairs,
            scale=lambda _pair, rank: _scale(alpha, rank),
            findings=(
                *_findings(content, facts, architecture, uses_file_scale=uses_file_scale),
                *side_findings("norms trained in full or other vectors", stored.others),
            ),
            base_model=base if isinstance(base, str) else None,
            config={"gguf_architecture": architecture, "heads": rows.heads},
        )
        return build_adapter(files.path, self.name, tensors, options, parts)


FORMAT: Final = _GGUF()


def _check_type(path: Path, tensors: GGUFTensors) -> None:
    kind = tensors.facts.get("adapter.type")
    if has_factors(tensors.infos, [_KEY]) and kind in (None, "lora"):
        return
    if kind not in (None, "lora"):
        message = f"{path}: a GGUF adapter of type {kind!r:.40}; only 'lora' is read."
        raise UnsupportedMethodError(message)
    what = tensors.facts.get("general.type", "model")
    message = (
        f"{path}: a GGUF file of type {what!r:.40} with {len(tensors.infos)} tensors, of which "
        "none is a LoRA factor (<tensor>.weight.lora_a). A model is given as base, with open_base "
        "or --base."
    )
    raise UnsupportedMethodError(message)


def _scale(alpha: Any, rank: int) -> StatedScale:
    """Return llama.cpp's multiplier: alpha over rank, or 1 where alpha is 0 or missing."""
    if isinstance(alpha, int | float) and alpha:
        return scale_from_alpha(float(alpha), rank, "metadata")
    return StatedScale(1.0, None, "metadata")


def _heads(
    facts: Mapping[str, Any], architecture: str, options: ReadOptions
) -> tuple[int, int] | None:
    """Return the heads of queries and of keys that the caller or the file states."""
    if options.heads is not None:
        return options.heads
    queries = facts.get(f"{architecture}.attention.head_count")
    keys = facts.get(f"{architecture}.attention.head_count_kv", queries)
    if isinstance(queries, int) and isinstance(keys, int) and min(queries, keys) > 0:
        return queries, keys
    return None


@dataclass(frozen=True, slots=True)
class _Rows:
    """The order of B's rows: architecture, and heads of q and of k if they are known."""

    architecture: str
    heads: tuple[int, int] | None


def _are_transposed(tensors: GGUFTensors, pairs: list[StoredPair]) -> bool | None:
    """Return True if the converter transposed GPT-2's factors, None if no shape tells.

    All factors of a file must be alike.
    """
    shapes = {
        p.module: (tensors.infos[p.b.name].shape, tensors.infos[p.a.name].shape) for p in pairs
    }
    answers = {
        is_stored_transposed(module, (b[0], a[-1]))
        for module, (b, a) in shapes.items()
        if len(a) == len(b) == 2 and module.startswith("blk.")
    }
    if answers >= {True, False}:
        message = f"{tensors.path}: some factors of GPT-2 are transposed and others are not."
        raise MalformedFileError(message)
    if not answers:
        return False
    return next((answer for answer in answers if answer is not None), None)


def _add(content: _Content, tensors: GGUFTensors, plain: StoredPair, rows: _Rows) -> None:
    """Add the pair of one tensor, or of each expert that it stacks."""
    tensor, module = plain.module, module_of(plain.module, rows.architecture)
    a, b = plain.a, plain.b
    if content.transposed and tensor.startswith("blk."):
        a, b = b.transpose(), a.transpose()
    variant = ""
    if is_q_or_k(tensor) and rows.architecture not in UNPERMUTED:
        heads = None
        if rows.heads is not None and rows.architecture in PERMUTED:
            heads = rows.heads[tensor.endswith("attn_k")]
        if heads is None:
            content.permuted.append(module)
            variant = LLAMA_CPP_ROWS
        else:
            shape = tensors.infos[b.name].shape
            if len(shape) != 2 or shape[0] % (2 * heads):
                message = (
                    f"{tensors.path}: '{b.name}' has shape {shape}; its rows do not divide into "
                    f"{heads} heads of two halves. Are heads= those of this base?"
                )
                raise MalformedFileError(message)
            # Each head's rows as in the model: its first half, then its second.
            b = deinterleave_heads(b, shape, heads)
            content.undone.append(module)
    elif tensor.endswith(".attn_qkv") and rows.architecture in BLOCKED_QKV:
        content.untangled.append(module)
        variant = LLAMA_CPP_ROWS
    pair = StoredPair(module, a, b, variant=variant)
    if tensor == EMBEDDING:
        pair = replace(pair, a=a.transpose(), layout="embedding")
    if len(tensors.infos[a.name].shape) == 3:
        content.pairs += split_stack(tensors, pair, mark=".experts.", names=("A", "B"))
    else:
        content.pairs.append(pair)


def _findings(
    content: _Content, facts: Mapping[str, Any], architecture: str, *, uses_file_scale: bool
) -> list[str]:
    findings = []
    alpha = facts.get(_ALPHA)
    if uses_file_scale and not alpha:
        reason = "no adapter.lora.alpha is stated" if alpha is None else "adapter.lora.alpha is 0"
        findings.append(
            f"The scale is 1, as llama.cpp applies it: {reason}. Training may have had another."
        )
    if content.transposed:
        findings.append(
            "A and B were exchanged and transposed, because llama.cpp's converter transposes "
            "GPT-2's factors."
        )
    if content.transposed is None:
        findings.append(
            "Input and output side may be exchanged: llama.cpp's converter transposes GPT-2's "
            "factors, and no matrix here has a shape that shows it. Singular values do not depend "
            "on it."
        )
    if content.undone:
        findings.append(
            f"The rows of B of {len(content.undone)} q and k modules are put back from llama.cpp's "
            "order to the model's."
        )
    if content.permuted:
        why = (
            "the number of heads is not stated: pass heads=(of queries, of keys) (command line: "
            "--heads 32,8)"
            if architecture in PERMUTED
            else f"whether architecture '{architecture}' permutes them is not known"
        )
        findings.append(
            f"Output side not to be used: the rows of B of {len(content.permuted)} q and k modules "
            f"(first: '{content.permuted[0]}') may be permuted by head, and {why}. Singular values "
            "and the input side do not depend on it."
        )
    if content.untangled:
        findings.append(
            f"Output side not to be used: the fused q, k, v rows of {len(content.untangled)} "
            "modules are in blocks here and per head in the model."
        )
    if tokens := facts.get(_TOKENS):
        findings.append(f"aLoRA: the update acts only after the invocation tokens {tokens!r:.60}.")
    return findings
