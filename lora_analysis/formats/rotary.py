"""Rows of q and k that a trainer or converter has put into another order, head by head.

Meta's rotary embedding turns neighboring rows of a head together, Hugging Face's row i of its
first half with row i of its second. Weights that went from one to the other have their rows
permuted, and so has B of an update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_analysis.formats.stored import StoredFactor


def in_halves(b: StoredFactor, rows: int, rank: int, heads: int) -> StoredFactor:
    """Return B whose heads have neighboring rows in pairs, in the order of two halves.

    Parameters
    ----------
    b
        ``(rows, rank)``; the rows divide by ``2·heads``.
    rows, rank, heads
        Its shape, and how many heads the rows are of.
    """
    in_pairs = b.reshaped(heads, rows // heads // 2, 2, rank)
    return in_pairs.transposed(0, 2, 1, 3).reshaped(rows, rank)


def vector_in_halves(norms: StoredFactor, rows: int, heads: int) -> StoredFactor:
    """Return one number per row, put into the same order."""
    in_pairs = norms.reshaped(heads, rows // heads // 2, 2)
    return in_pairs.transposed(0, 2, 1).reshaped(rows)
