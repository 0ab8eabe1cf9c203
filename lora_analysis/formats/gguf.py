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

from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.formats.assembly import assembled, beside_finding
from lora_analysis.formats.factors import (
    FactorRole,
    StatedScale,
    StoredPair,
    complete_pairs,
    scale_from_alpha,
)
from lora_analysis.formats.rotary import in_halves
from lora_analysis.formats.sources import AdapterRef, ReadOptions, label_of
from lora_analysis.storage.gguf import GGUFTensors, is_gguf
from lora_analysis.storage.gguf_names import (
    BLOCKED_QKV,
    EMBEDDING,
    PERMUTED,
    UNPERMUTED,
    is_q_or_k,
    is_turned,
    module_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.stored import StoredFactor

NAME: Final = "gguf"

_KEY: Final = re.compile(r"(?P<tensor>.+)\.weight\.lora_(?P<role>[ab])")
_MAX_EXPERTS: Final = 4096
_EXPERTS: Final = ".experts."
_ALPHA: Final = "adapter.lora.alpha"
_TOKENS: Final = "adapter.alora.invocation_tokens"
# What an update is a part of whose rows are in an order that is not the model's.
PERMUTED_ROWS: Final = "rows in llama.cpp's order"


def recognizes(path: Path, options: ReadOptions) -> bool:  # noqa: ARG001 - content alone decides
    """Say whether a file is GGUF; whether it is an adapter, reading it says."""
    return is_gguf(path)


def _is_adapter(path: Path) -> bool:
    if not is_gguf(path):
        return False
    try:
        return any(map(_KEY.fullmatch, GGUFTensors.open(path).infos))
    except InputError:
        return False


def find(path: Path, options: ReadOptions) -> list[AdapterRef]:  # noqa: ARG001 - as above
    """Return the file, where it holds factors."""
    return [AdapterRef(path, NAME, label_of(path))] if _is_adapter(path) else []


@dataclass(slots=True)
class _Found:
    """The pairs of a file, and the modules of which something has to be said."""

    pairs: list[StoredPair] = field(default_factory=list)
    undone: list[str] = field(default_factory=list)
    permuted: list[str] = field(default_factory=list)
    untangled: list[str] = field(default_factory=list)
    turned: bool | None = False


def read(path: Path, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG001 - unnamed
    """Read an adapter.

    Raises
    ------
    MalformedFileError
        The file is damaged, or a module has one factor only.
    UnsupportedMethodError
        It is a model, or an adapter of another kind.
    """
    tensors = GGUFTensors.open(path)
    _check_type(path, tensors)
    factors: dict[str, dict[FactorRole, str]] = {}
    others = []
    for key in tensors.infos:
        if match := _KEY.fullmatch(key):
            role: FactorRole = "A" if match["role"] == "a" else "B"
            factors.setdefault(match["tensor"], {})[role] = key
        else:
            others.append(key)
    architecture = str(tensors.facts.get("general.architecture", ""))
    found = _Found()
    rows = _Rows(architecture, _heads(tensors.facts, architecture, options))
    plain_pairs = complete_pairs(path, factors, lambda t, r: f"{t}.weight.lora_{r.lower()}")
    if architecture == "gpt2":
        found.turned = _turned(tensors, plain_pairs)
    for plain in plain_pairs:
        _add(found, tensors, plain, rows)
    alpha = tensors.facts.get(_ALPHA)
    base = tensors.facts.get("general.base_model.0.repo_url") or tensors.facts.get(
        "general.base_model.0.name"
    )
    own_scale = options.scale is None and options.alpha is None
    return assembled(
        path,
        NAME,
        tensors,
        found.pairs,
        lambda _pair, rank: _scale(alpha, rank),
        options=options,
        missing="",
        findings=(
            *(_alpha_findings(alpha) if own_scale else []),
            *_row_findings(found, architecture),
            *_token_finding(tensors.facts),
            *beside_finding("norms trained in full or other vectors", others),
        ),
        base_model=base if isinstance(base, str) else None,
        config={"gguf_architecture": architecture, "heads": rows.heads},
    )


def _check_type(path: Path, tensors: GGUFTensors) -> None:
    kind = tensors.facts.get("adapter.type")
    if any(map(_KEY.fullmatch, tensors.infos)) and kind in (None, "lora"):
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


def _alpha_findings(alpha: Any) -> list[str]:
    if not alpha:
        stated = "no adapter.lora.alpha is stated" if alpha is None else "adapter.lora.alpha is 0"
        return [
            f"The scale is 1, as llama.cpp applies it: {stated}. Training may have had another."
        ]
    return []


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
    """What has happened to the order of B's rows."""

    architecture: str
    heads: tuple[int, int] | None

    def heads_of(self, tensor: str) -> int | None:
        return None if self.heads is None else self.heads[tensor.endswith("attn_k")]


def _turned(tensors: GGUFTensors, pairs: list[StoredPair]) -> bool | None:
    """Say whether GPT-2's factors were turned by the converter; all of a file alike."""
    shapes = {
        p.module: (tensors.infos[p.b.name].shape, tensors.infos[p.a.name].shape) for p in pairs
    }
    told = {
        is_turned(module, (b[0], a[-1]))
        for module, (b, a) in shapes.items()
        if len(a) == len(b) == 2 and module.startswith("blk.")
    }
    if told >= {True, False}:
        message = f"{tensors.path}: some factors of GPT-2 lie transposed and others do not."
        raise MalformedFileError(message)
    if not told:
        return False
    return next((one for one in told if one is not None), None)


def _add(found: _Found, tensors: GGUFTensors, plain: StoredPair, rows: _Rows) -> None:
    """Add the pair of one tensor, or of each expert that it stacks."""
    tensor, module = plain.module, module_of(plain.module, rows.architecture)
    a, b = plain.a, plain.b
    if found.turned and tensor.startswith("blk."):
        a, b = b.transposed(), a.transposed()
    variant = ""
    if is_q_or_k(tensor) and rows.architecture not in UNPERMUTED:
        heads = rows.heads_of(tensor) if rows.architecture in PERMUTED else None
        if heads is None:
            found.permuted.append(module)
            variant = PERMUTED_ROWS
        else:
            b = _undone(tensors, b, heads)
            found.undone.append(module)
    elif tensor.endswith(".attn_qkv") and rows.architecture in BLOCKED_QKV:
        found.untangled.append(module)
        variant = PERMUTED_ROWS
    pair = StoredPair(module, a, b, variant=variant)
    if tensor == EMBEDDING:
        pair = replace(pair, a=a.transposed(), layout="embedding")
    if len(tensors.infos[a.name].shape) == 3:
        found.pairs += _experts(tensors, pair)
    else:
        found.pairs.append(pair)


def _undone(tensors: GGUFTensors, b: StoredFactor, heads: int) -> StoredFactor:
    """Return B with each head's rows as in the model: its first half, then its second."""
    shape = tensors.infos[b.name].shape
    if len(shape) != 2 or shape[0] % (2 * heads):
        message = (
            f"{tensors.path}: '{b.name}' has shape {shape}; its rows do not divide into {heads} "
            "heads of two halves. Are heads= those of this base?"
        )
        raise MalformedFileError(message)
    return in_halves(b, *shape, heads)


def _experts(tensors: GGUFTensors, pair: StoredPair) -> Iterator[StoredPair]:
    a, b = (tensors.infos[factor.name].shape for factor in (pair.a, pair.b))
    if len(b) != 3 or a[0] != b[0] or a[0] > _MAX_EXPERTS:
        message = (
            f"{tensors.path}: '{pair.module}' has A {a} and B {b}; a stack of experts needs "
            f"(E, r, in) and (E, out, r), with at most {_MAX_EXPERTS:,} experts."
        )
        raise MalformedFileError(message)
    for expert in range(a[0]):
        a_e, b_e = pair.a.at(expert), pair.b.at(expert)
        if _EXPERTS in pair.module:
            own = pair.module.replace(_EXPERTS, f"{_EXPERTS}{expert}.")
            yield replace(pair, module=own, a=a_e, b=b_e)
        else:
            own, base_name = f"{pair.module}.{expert}", f"{pair.module}[{expert}]"
            yield replace(pair, module=own, base_name=base_name, a=a_e, b=b_e)


def _row_findings(found: _Found, architecture: str) -> list[str]:
    findings = []
    if found.turned:
        findings.append(
            "A and B are taken for each other, transposed: llama.cpp's converter turns GPT-2's."
        )
    if found.turned is None:
        findings.append(
            "Input and output side may be exchanged: llama.cpp's converter turns GPT-2's factors, "
            "and no matrix here is of a shape that tells. Singular values do not depend on it."
        )
    if found.undone:
        findings.append(
            f"The rows of B of {len(found.undone)} q and k modules are put back from llama.cpp's "
            "order to the model's."
        )
    if found.permuted:
        why = (
            "the number of heads is not stated: pass heads=(of queries, of keys) (command line: "
            "--heads 32,8)"
            if architecture in PERMUTED
            else f"whether architecture '{architecture}' permutes them is not known"
        )
        findings.append(
            f"Output side not to be used: the rows of B of {len(found.permuted)} q and k modules "
            f"(first: '{found.permuted[0]}') may be permuted by head, and {why}. Singular values "
            "and the input side do not depend on it."
        )
    if found.untangled:
        findings.append(
            f"Output side not to be used: the fused q, k, v rows of {len(found.untangled)} modules "
            "are in blocks here and per head in the model."
        )
    return findings


def _token_finding(facts: Mapping[str, Any]) -> list[str]:
    tokens = facts.get(_TOKENS)
    if not tokens:
        return []
    return [f"aLoRA: the update acts only after the invocation tokens {tokens!r:.60}."]
