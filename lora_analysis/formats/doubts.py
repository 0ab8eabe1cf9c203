"""Numbers that may be damage: what a flipped bit or a wrong type makes of a factor.

Nothing in a file of tensors is a checksum. Most damage leaves numbers that nobody can tell from
learned ones; these can be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.adapter import LowRankUpdate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, Update

# The largest of a million normal numbers is 5 times their root mean square, in factors of real
# files 3 to 7 times.
_OUTLYING: Final = 1000.0
# Alphas of a few hundred over a rank of 1 are met.
_LARGE_SCALE: Final = 1e4
_LARGE: Final = 1e4
# Of fewer numbers than these, one may well be all that matters.
_FEW: Final = 16
# Adam's first step already moves B by the learning rate.
_NOTHING: Final = 1e-20


def doubts(update: Update) -> list[str]:
    """Return a sentence on each factor with numbers that training hardly leaves, and on the scale.

    One number above 1e4, or a thousand times the root mean square of the other non-zero ones (a
    flipped bit of an exponent), or none above 1e-20 though some are not zero (bytes read as
    another type). Of a dense update, on a number above 1e4 alone: a fine-tune may move a few rows.
    """
    if not isinstance(update, LowRankUpdate):
        largest = float(np.max(np.abs(update.delta)))
        return [_large("ΔW", update.name, largest)] if largest > _LARGE else []
    scale = update.scale
    large = []
    if scale is not None and abs(scale) > _LARGE_SCALE:
        large = [f"The scale of '{update.name}' is {scale:.3g}. Is its alpha damaged?"]
    found = (_doubt(role, update.name, one) for role, one in (("A", update.A), ("B", update.B)))
    return large + [sentence for sentence in found if sentence]


def _large(role: str, name: str, value: float) -> str:
    return f"{role} of '{name}' holds a number of {value:.3g}. Is the file damaged?"


def with_doubts(adapter: Adapter) -> Adapter:
    """Return the adapter with what is doubted in its numbers among its findings."""
    said = [doubt for update in adapter.values() for doubt in doubts(update)]
    return adapter.described(findings=(*adapter.provenance.findings, *said)) if said else adapter


def _doubt(role: str, name: str, values: NDArray[np.floating[Any]]) -> str:
    flat = values.ravel(order="K")
    largest = max(float(flat.max()), -float(flat.min()))
    if largest == 0:
        return ""
    if largest < _NOTHING:
        return (
            f"{role} of '{name}' holds no number above {largest:.1g}; trained factors are not so "
            "small. Is the file damaged?"
        )
    if largest > _LARGE:
        return _large(role, name, largest)
    sizes = np.abs(flat)
    # A mean is at most the root mean square: with this much in the others, there is no doubt.
    if float(sizes.sum()) > largest * (1 + flat.size / _OUTLYING):
        return ""
    others = np.sort(sizes[sizes > 0].astype(np.float64))[:-1]
    if others.size < _FEW:
        return ""
    ratio = largest / float(np.sqrt(np.mean(np.square(others))))
    if ratio < _OUTLYING:
        return ""
    return (
        f"{role} of '{name}' holds a number of {largest:.3g}, {ratio:,.0f} times the root mean "
        "square of the others. Is the file damaged?"
    )
