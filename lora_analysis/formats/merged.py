"""Grouped factors of a fused weight: several low-rank updates stored as one pair.

loralib's ``MergedLinear`` adapts those of the equal row blocks of a fused weight (q, k and v of
GPT-2's ``c_attn``) that ``enable_lora`` names. With g enabled blocks, A is ``(r·g, d_in)`` and B
the enabled blocks' rows one below the other, ``(sum of their widths, r)``. Block j is
``B[its rows]·A[j·r:(j+1)·r]``; a block that is not enabled has no update. litgpt and AdapterHub
store the same; with grouped queries the widths differ. So did PEFT up to 0.2, whose adapters with
such modules are read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.formats.build import AdapterParts, build_adapter, stated_alpha
from lora_analysis.formats.factors import StoredPair, complete_pairs
from lora_analysis.formats.fused_parts import FUSED_PARTS
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME
from lora_analysis.formats.peft.tensor_keys import module_name, sort_keys
from lora_analysis.formats.side_tensors import side_findings
from lora_analysis.formats.stored import tensor
from lora_analysis.text import plural

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.formats.sources import AdapterFiles
    from lora_analysis.storage.tensors import NamedTensors

# Format of adapters of PEFT up to 0.2 with fused modules, in their provenance.
PEFT_MERGED: Final = "peft-merged"
_PARTS: Final = ("q", "k", "v")
# Fused weights that interleave q, k and v per head: the first third of the rows is not q.
_INTERLEAVED: Final = frozenset({"query_key_value"})
# Last segments of fused modules: shapes do not show that one block alone is enabled.
FUSED: Final = frozenset(
    {"c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "in_proj", "attn_qkv", "W_pack"}
)


def block_names(module: str, count: int) -> list[str]:
    """Return the names of a fused module's blocks: ``.q``, ``.k``, ``.v`` of three.

    They are ``.rows0``, ``.rows1`` and so on for a different number, and if q, k and v interleave
    per head so that no third of the rows is one of them.
    """
    if count == len(_PARTS) and not interleaves(module):
        return [f"{module}.{part}" for part in _PARTS]
    return [f"{module}.rows{index}" for index in range(count)]


def are_blocks(module: str, fused: Mapping[str, Any]) -> bool:
    """Return True if the parts of a fused weight are such blocks; ``fused`` is a config's entry."""
    third, rest = divmod(fused["rows"], len(_PARTS))
    names = block_names(module, len(_PARTS))
    blocks = {name: [[i * third, (i + 1) * third]] for i, name in enumerate(names)}
    return (
        rest == 0
        and module.rpartition(".")[2] in FUSED
        and all(blocks.get(f"{module}.{part}") == runs for part, runs in fused["parts"].items())
    )


def is_merged(tensors: NamedTensors, a: str, b: str) -> bool:
    """Return True if A has several times the rows that B has columns, as grouped factors do."""
    first, second = tensors.infos[a].shape, tensors.infos[b].shape
    if len(first) != 2 or len(second) < 2 or not second[1]:
        return False
    return first[0] > second[1] and first[0] % second[1] == 0


def split(
    tensors: NamedTensors,
    module: str,
    a: str,
    b: str,
    enabled: Sequence[bool],
    *,
    widths: Sequence[int] | None = None,
) -> list[StoredPair]:
    """Return the pairs of the enabled blocks.

    Parameters
    ----------
    tensors
        The file of the factors.
    module, a, b
        The fused module and its two tensors; B may have axes of length 1 at the end.
    enabled
        Per block of the weight, True if it has an update.
    widths
        Rows of every block, disabled ones included; equal by default.

    Raises
    ------
    InputError
        The shapes contradict ``enabled``.
    MalformedFileError
        The shapes do not fit each other.
    """
    groups = sum(enabled)
    stored_a, stored_b = tensors.infos[a].shape, tensors.infos[b].shape
    rank = stored_b[1] if len(stored_b) > 1 else 0
    if not groups or len(stored_a) != 2 or not rank or stored_a[0] != rank * groups:
        message = (
            f"{tensors.file_of(a)}: '{module}' has A {stored_a} and B {stored_b}, which does not "
            f"fit enable_lora={tuple(map(bool, enabled))}: A (r·{groups}, in), B (rows, r)."
        )
        raise InputError(message)
    rows = stored_b[0]
    sizes = [rows // groups] * groups
    if widths is not None:
        sizes = [width for width, on in zip(widths, enabled, strict=True) if on]
    if sum(sizes) != rows:
        message = (
            f"{tensors.file_of(b)}: B of '{module}' has {rows} rows, its {groups} enabled blocks "
            f"need {sizes}."
        )
        raise MalformedFileError(message)
    whole_b = tensor(b) if len(stored_b) == 2 else tensor(b).flatten()
    names = block_names(module, len(enabled))
    enabled_names = [name for name, on in zip(names, enabled, strict=True) if on]
    stops = list(accumulate(sizes))
    return [
        StoredPair(
            name,
            tensor(a).rows(slice(group * rank, (group + 1) * rank)),
            whole_b.rows(slice(stop - size, stop)),
        )
        for group, (name, size, stop) in enumerate(zip(enabled_names, sizes, stops, strict=True))
    ]


def split_fused(
    tensors: NamedTensors, module: str, a: str, b: str, enabled: Sequence[bool] | None
) -> tuple[list[StoredPair], dict[str, Any]] | None:
    """Return the pairs of a fused module's equal blocks and its entry in the adapter's config.

    The entry is that of `formats.fused_parts`, by which writers of formats without blocks join
    them. None for a plain module. One block alone is known by the module's name.

    Raises
    ------
    UnsupportedMethodError
        Factors are grouped, and nothing says which blocks are enabled.
    """
    merged = is_merged(tensors, a, b)
    if merged and enabled is None:
        raise enable_lora_error(tensors, module, a, b)
    if not enabled or not (merged or (sum(enabled) == 1 and module.rpartition(".")[2] in FUSED)):
        return None
    pairs = split(tensors, module, a, b, enabled)
    rows = tensors.infos[b].shape[0] // sum(enabled)
    names = [name.removeprefix(f"{module}.") for name in block_names(module, len(enabled))]
    parts = {
        name: [[i * rows, (i + 1) * rows]]
        for i, (name, on) in enumerate(zip(names, enabled, strict=True))
        if on
    }
    return pairs, {"rows": rows * len(enabled), "parts": parts}


def enable_lora_error(tensors: NamedTensors, module: str, a: str, b: str) -> UnsupportedMethodError:
    """Return the error for grouped factors whose blocks are not stated."""
    shapes = tensors.infos[a].shape, tensors.infos[b].shape
    groups = shapes[0][0] // shapes[1][1]
    return UnsupportedMethodError(
        f"{tensors.file_of(a)}: '{module}' has A {shapes[0]} and B {shapes[1]}: the factors of "
        f"{groups} blocks of a fused weight (loralib's MergedLinear), and the file does not state "
        "which. Pass enable_lora= as in training, for example (True, False, True) for q and v "
        "(command line: --enable-lora 1,0,1)."
    )


def merged_findings(module_count: int, *, interleaved: bool) -> list[Finding]:
    """Return the findings about fused modules that were split, if there are any."""
    if not module_count:
        return []
    fields = {"count": module_count, "modules": plural(module_count, "fused module")}
    findings = [Finding("fused-modules-split", fields)]
    return [*findings, Finding("interleaved-blocks")] if interleaved else findings


def interleaves(module: str) -> bool:
    """Return True if a fused module has q, k and v of each head together."""
    return module.rpartition(".")[2] in _INTERLEAVED


def read_merged_linear(files: AdapterFiles, options: ReadOptions) -> Adapter:
    """Read an adapter of PEFT up to 0.2 whose config says ``enable_lora``.

    Reference: PEFT 0.2, ``tuners/lora.py``, ``MergedLinear``: A ``(r·g, d_in)``, B
    ``(d_out/n·g, r, 1)``, a ``Conv1d``'s, for g of n blocks. Other modules of the same adapter are
    plain pairs. Its layer always had two groups, whatever ``enable_lora`` said; with another number
    it did not run.

    Raises
    ------
    MalformedFileError
        The config's fields are of wrong types, or the factors do not fit them.
    """
    raw, config_path = files.config or {}, files.config_path or files.path
    enabled, alpha = raw["enable_lora"], raw.get("lora_alpha")
    if not isinstance(enabled, list) or not all(isinstance(block, bool) for block in enabled):
        message = (
            f"{config_path}: enable_lora must be a list of true and false, found {enabled!r:.80}."
        )
        raise MalformedFileError(message)
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        message = f"{config_path}: lora_alpha must be a number, found {alpha!r:.80}."
        raise MalformedFileError(message)
    tensors = files.open(options)
    keys = sort_keys(files.weights, tensors.infos)
    if list(keys.factors) != [None]:
        message = f"{files.weights}: no LoRA factors found, or of several adapters."
        raise MalformedFileError(message)
    pairs: list[StoredPair] = []
    fused = {}
    for pair in complete_pairs(files.weights, keys.factors[None]):
        blocks = split_fused(tensors, pair.module, pair.a.name, pair.b.name, enabled)
        if blocks is None:
            pairs.append(pair)
        else:
            pairs += blocks[0]
            fused[pair.module] = blocks[1]
    saved = [module_name(key) for stored in keys.saved.values() for key in stored.values()]
    base_model = raw.get("base_model_name_or_path")
    parts = AdapterParts(
        pairs=pairs,
        scale=stated_alpha(alpha),
        reason=f"{CONFIG_NAME} states no lora_alpha",
        findings=(
            *merged_findings(len(fused), interleaved=any(map(interleaves, fused))),
            *side_findings("not analyzed", saved),
        ),
        files=(config_path,),
        base_model=base_model if isinstance(base_model, str) else None,
        config={FUSED_PARTS: fused} if fused else None,
    )
    return build_adapter(files.path, PEFT_MERGED, tensors, options, parts)
