"""Grouped factors of a fused weight: several low-rank updates stored as one pair.

loralib's ``MergedLinear`` adapts some of the equal row blocks of a fused weight (q, k and v of
GPT-2's ``c_attn``), as ``enable_lora`` says. With g enabled blocks, A is ``(r·g, d_in)`` and B the
enabled blocks' rows one below the other, ``(sum of their widths, r)``. Block j is
``B[its rows]·A[j·r:(j+1)·r]``; a block that is not enabled has no update. litgpt and AdapterHub
store the same; with grouped queries the widths differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.formats.factors import StoredPair
from lora_analysis.formats.stored import StoredFactor, tensor

if TYPE_CHECKING:
    from lora_analysis.storage.tensors import NamedTensors

_PARTS: Final = ("q", "k", "v")
# Fused weights whose q, k and v lie per head between each other: a third of the rows is not q.
_INTERLEAVED: Final = frozenset({"query_key_value"})
# Last segments of fused modules: where one block alone is enabled, no shape tells.
FUSED: Final = frozenset(
    {"c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "in_proj", "attn_qkv", "W_pack"}
)


def block_names(module: str, count: int) -> list[str]:
    """Return the names of a fused module's blocks: ``.q``, ``.k``, ``.v`` of three.

    Of another number, and where q, k and v interleave per head so that a third of the rows is
    none of them, ``.rows0``, ``.rows1`` and so on.
    """
    if count == len(_PARTS) and module.rpartition(".")[2] not in _INTERLEAVED:
        return [f"{module}.{part}" for part in _PARTS]
    return [f"{module}.rows{index}" for index in range(count)]


def are_blocks(module: str, stated: Mapping[str, Any]) -> bool:
    """Say whether the parts of a fused weight, as a config states them, are such blocks."""
    third, rest = divmod(stated["rows"], len(_PARTS))
    blocks = {
        name: [[at * third, (at + 1) * third]]
        for at, name in enumerate(block_names(module, len(_PARTS)))
    }
    return (
        rest == 0
        and module.rpartition(".")[2] in FUSED
        and all(blocks.get(f"{module}.{part}") == runs for part, runs in stated["parts"].items())
    )


def is_merged(tensors: NamedTensors, a: str, b: str) -> bool:
    """Say whether A has several times the rows that B has columns, as grouped factors do."""
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
        Where the factors lie.
    module, a, b
        The fused module and its two tensors; B may have axes of length 1 at the end.
    enabled
        Per block of the weight whether it has an update.
    widths
        Rows of every block, of the disabled too; equal ones by default.

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
            f"{tensors.file_of(a)}: '{module}' has A {stored_a} and B {stored_b}, which is not "
            f"what enable_lora={tuple(map(bool, enabled))} makes: A (r·{groups}, in), B (rows, r)."
        )
        raise InputError(message)
    sizes = _sizes(tensors, module, b, enabled, widths)
    matrix = tensor(b) if len(stored_b) == 2 else tensor(b).flattened()
    return _blocks(module, (tensor(a), matrix), enabled, sizes, rank)


def parts_of(
    tensors: NamedTensors,
    module: str,
    b: str,
    enabled: Sequence[bool],
    *,
    widths: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return what an adapter's config says of a split weight, see `formats.fused_parts`.

    By it the writers of other formats put the blocks together again.
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


def _blocks(
    module: str,
    factors: tuple[StoredFactor, StoredFactor],
    enabled: Sequence[bool],
    sizes: Sequence[int],
    rank: int,
) -> list[StoredPair]:
    names = [
        name for name, on in zip(block_names(module, len(enabled)), enabled, strict=True) if on
    ]
    pairs, top = [], 0
    for group, (name, height) in enumerate(zip(names, sizes, strict=True)):
        own_a = factors[0].rows(slice(group * rank, (group + 1) * rank))
        own_b = factors[1].rows(slice(top, top + height))
        pairs.append(StoredPair(name, own_a, own_b))
        top += height
    return pairs


def enable_needed(tensors: NamedTensors, module: str, a: str, b: str) -> UnsupportedMethodError:
    """Return the error for grouped factors of which nothing says to which blocks they belong."""
    shapes = tensors.infos[a].shape, tensors.infos[b].shape
    groups = shapes[0][0] // shapes[1][1]
    return UnsupportedMethodError(
        f"{tensors.file_of(a)}: '{module}' has A {shapes[0]} and B {shapes[1]}: the factors of "
        f"{groups} blocks of a fused weight (loralib's MergedLinear), and nothing says which. "
        "Pass enable_lora= as in training, say (True, False, True) for q and v (command line: "
        "--enable-lora 1,0,1)."
    )


def merged_finding(module_count: int, *, interleaved: bool) -> list[str]:
    """Return the sentences on fused modules that were split."""
    if not module_count:
        return []
    found = [f"The grouped factors of {module_count} fused modules are read block by block."]
    if interleaved:
        found.append(
            "query_key_value interleaves q, k and v per head in every model that has it: the "
            "blocks of rows that were trained are none of them, and are called rows0, rows1, ..."
        )
    return found


def interleaves(module: str) -> bool:
    """Say whether a fused module keeps q, k and v of each head together."""
    return module.rpartition(".")[2] in _INTERLEAVED
