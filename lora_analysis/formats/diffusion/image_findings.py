"""Signs of fused and split projections in the factors of image models."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_analysis.formats.factors import StoredPair
    from lora_analysis.storage.tensors import NamedTensors

# Fused projections of FLUX: three parts of equal width, or q, k, v and the MLP's four widths.
_FUSED: Final = (
    (re.compile(r".*(img|txt)_attn[._]qkv"), (1, 1, 1)),
    (re.compile(r".*single_blocks[._]\d+[._]linear1"), (1, 1, 1, 4)),
)
_SPLIT: Final = re.compile(r"(?P<before>.*[._])(?P<letter>[qkv])(?P<after>_proj)?")


def block_findings(tensors: NamedTensors, pairs: Sequence[StoredPair]) -> list[Finding]:
    """Return a finding if B of fused projections is block-diagonal, as split_qkv leaves it.

    sd-scripts trains q, k, v (and the MLP) of FLUX separately, with ``alpha/r`` each, and saves
    them as one pair of rank 3r or 4r with the unchanged alpha. Every loader, its own too, then
    computes ``alpha/(3r)``. One module of each kind is checked: the option holds for a file.
    """
    findings = []
    for pattern, widths in _FUSED:
        fused = [pair for pair in pairs if pattern.fullmatch(pair.module)]
        if fused and _is_block_diagonal(fused[0].b.read(tensors), widths):
            fields = {"count": len(fused), "module": fused[0].module, "parts": len(widths)}
            findings.append(Finding("split-qkv", fields))
    return findings


def _is_block_diagonal(b: NDArray[np.floating], widths: Sequence[int]) -> bool:
    """Return True if B is zero outside its blocks, and in none of them."""
    unit, rank, n = sum(widths), b.shape[1], len(widths)
    if rank % n or b.shape[0] % unit:
        return False
    outside = b.copy()
    top = 0
    for k, width in enumerate(widths):
        rows = slice(top, top + width * b.shape[0] // unit)
        block = outside[rows, k * rank // n : (k + 1) * rank // n]
        if not block.any():
            return False
        block[:] = 0
        top = rows.stop
    return not outside.any()


def copied_findings(tensors: NamedTensors, pairs: Sequence[StoredPair]) -> list[Finding]:
    """Return a finding if q, k and v have one and the same A.

    Converters that split a fused projection copy its A to each part; the input subspaces of the
    parts are then identical, which training did not do. All are compared only if the first are.
    """
    groups: dict[tuple[str, str], list[StoredPair]] = {}
    for pair in pairs:
        if match := _SPLIT.fullmatch(pair.module):
            groups.setdefault((match["before"], match["after"] or ""), []).append(pair)
    first = next((group for group in groups.values() if len(group) > 1), [])
    if len({_digest(tensors, pair) for pair in first}) != 1 or not first[0].a.read(tensors).any():
        return []
    alike: dict[bytes, list[str]] = {}
    for pair in pairs:
        alike.setdefault(_digest(tensors, pair), []).append(pair.module)
    copied = [modules for modules in alike.values() if len(modules) > 1]
    return [Finding("copied-a", {"count": sum(map(len, copied)), "modules": copied[0]})]


def _digest(tensors: NamedTensors, pair: StoredPair) -> bytes:
    """Return a hash of the shape and the numbers of A."""
    import hashlib  # reading most adapters needs no hash

    a = np.ascontiguousarray(pair.a.read(tensors))
    return hashlib.sha256(repr(a.shape).encode() + a.tobytes()).digest()
