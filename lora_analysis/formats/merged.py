"""Grouped factors of a fused weight: several low-rank updates stored as one pair.

loralib's ``MergedLinear`` adapts those of the equal row blocks of a fused weight (q, k and v of
GPT-2's ``c_attn``) that ``enable_lora`` names. With g enabled blocks, A is ``(r·g, d_in)`` and B
the enabled blocks' rows one below the other, ``(sum of their widths, r)``. Block j is
``B[its rows]·A[j·r:(j+1)·r]``; a block that is not enabled has no update. litgpt and AdapterHub
store the same; with grouped queries the widths differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.formats.factors import StoredPair
from lora_analysis.formats.stored import tensor
from lora_analysis.text import plural

if TYPE_CHECKING:
    from lora_analysis.storage.tensors import NamedTensors

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
    sizes = _sizes(tensors, module, b, enabled, widths)
    whole_b = tensor(b) if len(stored_b) == 2 else tensor(b).flattened()
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


def parts_of(
    tensors: NamedTensors,
    module: str,
    b: str,
    enabled: Sequence[bool],
    *,
    widths: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return the config's entry for a split weight, see `formats.fused_parts`.

    Writers of formats without blocks join them by it.
    """
    sizes = _sizes(tensors, module, b, enabled, widths)
    every = list(widths) if widths is not None else [sizes[0]] * len(enabled)
    edges = [0, *accumulate(every)]
    names = [name.removeprefix(f"{module}.") for name in block_names(module, len(enabled))]
    blocks = zip(names, enabled, edges, edges[1:], strict=False)
    return {
        "rows": edges[-1],
        "parts": {name: [[start, stop]] for name, on, start, stop in blocks if on},
    }


def _sizes(
    tensors: NamedTensors,
    module: str,
    b: str,
    enabled: Sequence[bool],
    widths: Sequence[int] | None,
) -> list[int]:
    """Return the rows of each enabled block, checked against B's."""
    rows = tensors.infos[b].shape[0]
    groups = sum(enabled)
    if widths is None:
        sizes = [rows // groups] * groups
    else:
        sizes = [width for width, on in zip(widths, enabled, strict=True) if on]
    if sum(sizes) != rows:
        message = (
            f"{tensors.file_of(b)}: B of '{module}' has {rows} rows, its {groups} enabled blocks "
            f"need {sizes}."
        )
        raise MalformedFileError(message)
    return sizes


def enable_needed(tensors: NamedTensors, module: str, a: str, b: str) -> UnsupportedMethodError:
    """Return the error for grouped factors whose blocks are not stated."""
    shapes = tensors.infos[a].shape, tensors.infos[b].shape
    groups = shapes[0][0] // shapes[1][1]
    return UnsupportedMethodError(
        f"{tensors.file_of(a)}: '{module}' has A {shapes[0]} and B {shapes[1]}: the factors of "
        f"{groups} blocks of a fused weight (loralib's MergedLinear), and the file does not state "
        "which. Pass enable_lora= as in training, for example (True, False, True) for q and v "
        "(command line: --enable-lora 1,0,1)."
    )


def merged_finding(module_count: int, *, interleaved: bool) -> list[Finding]:
    """Return the findings about fused modules that were split, if there are any."""
    if not module_count:
        return []
    fields = {"count": module_count, "modules": plural(module_count, "fused module")}
    findings = [Finding("fused-modules-split", fields)]
    return [*findings, Finding("interleaved-blocks")] if interleaved else findings


def interleaves(module: str) -> bool:
    """Return True if a fused module has q, k and v of each head together."""
    return module.rpartition(".")[2] in _INTERLEAVED
