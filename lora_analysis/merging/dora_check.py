"""DoRA's merge: each row of W + ΔW rescaled by one factor, which all its entries must allow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.merging.replay import (
    HALF_TYPES,
    Entries,
    Recipe,
    preimage,
    sum_bounds,
    unit_roundoff,
)
from lora_analysis.storage.dtypes import round_to

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import LowRankUpdate

# Factors are norms of rows: in float32, sums of thousands of squares.
_FLOAT32_TOLERANCE: Final = 1e-5
# The factor, the norm and the magnitude are each rounded once to half precision.
_ROUNDINGS: Final = 3
_BLOCK: Final = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class _Rescaled:
    """A weight before and after a merge of DoRA, and the factors that are expected of it."""

    update: LowRankUpdate
    W: NDArray[np.float32]
    after: NDArray[np.float32]
    expected: NDArray[np.float64]
    tolerance: float

    @property
    def by_rows(self) -> bool:
        """True if a factor belongs to a row, False if to a column."""
        return self.update.magnitude_side == "output"

    def fits(self, recipe: Recipe, rounded: Sequence[str], rows: slice) -> bool:
        """Return True if each line of some rows allows one factor that is near the expected one."""
        update = self.update
        A, B = update.A.astype(np.float64), update.B.astype(np.float64)
        low = self.expected * (1 - self.tolerance)
        high = self.expected * (1 + self.tolerance)
        for block in _row_blocks(self.W.shape, rows):
            entries = Entries(
                self.W[block].astype(np.float64), self.after[block].astype(np.float64),
                B[block] @ A, np.abs(B[block]) @ np.abs(A), update.known_scale(), update.rank,
            )  # fmt: skip
            least, most = _allowed_factors(entries, recipe, rounded)
            if self.by_rows:
                low[block] = np.maximum(low[block], least.max(axis=1))
                high[block] = np.minimum(high[block], most.min(axis=1))
            else:
                low, high = np.maximum(low, least.max(axis=0)), np.minimum(high, most.min(axis=0))
        return bool((low[rows] <= high[rows]).all() if self.by_rows else (low <= high).all())


def dora_fits(
    update: LowRankUpdate,
    W: NDArray[np.float32],
    after: NDArray[np.float32],
    candidates: Sequence[Recipe],
    merged_type: str,
) -> Recipe | None:
    """Return a recipe with which every row allows one factor near m/‖W + ΔW‖, None if none does.

    Parameters
    ----------
    update
        With magnitudes, of rows or of input channels.
    W, after
        ``(d_out, d_in)``: the weight before and after.
    candidates
        Recipes to try; W + ΔW may be rounded to half precision before it is rescaled.
    merged_type
        Type of the merged weight.
    """
    if update.magnitude is None:
        return None
    halves = [t for t in (update.stored_dtype, merged_type) if t in HALF_TYPES]
    tolerance = max(
        [_FLOAT32_TOLERANCE, *(2 * _ROUNDINGS * unit_roundoff(dtype) for dtype in halves)]
    )
    rescaled = _Rescaled(update, W, after, _expected_factors(update, W), tolerance)
    few = slice(0, min(len(W), max(1, _BLOCK // W.shape[1] // 16)))
    for recipe in candidates:
        for rounded in ((), *((dtype,) for dtype in HALF_TYPES)):
            if rescaled.fits(recipe, rounded, few) and rescaled.fits(
                recipe, rounded, slice(0, len(W))
            ):
                return recipe
    return None


def _expected_factors(update: LowRankUpdate, W: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return m/‖W + ΔW‖ per row, or per column: ``(d_out,)`` or ``(d_in,)``."""
    assert update.magnitude is not None
    by_rows = update.magnitude_side == "output"
    squares = np.zeros(W.shape[0] if by_rows else W.shape[1])
    A, B = update.A.astype(np.float64), update.known_scale() * update.B.astype(np.float64)
    for rows in _row_blocks(W.shape, slice(0, len(W))):
        block = np.square(W[rows] + B[rows] @ A)
        if by_rows:
            squares[rows] = block.sum(axis=1)
        else:
            squares += block.sum(axis=0)
    magnitude = update.magnitude.astype(np.float64)
    if not by_rows and (taps := math.prod(update.kernel)) > 1:
        squares = np.repeat(squares.reshape(-1, taps).sum(axis=1), taps)
        magnitude = np.repeat(magnitude, taps)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors: NDArray[np.float64] = magnitude / np.sqrt(squares)
    return factors


def _row_blocks(shape: tuple[int, ...], rows: slice) -> Iterator[slice]:
    step = max(1, _BLOCK // max(shape[1], 1))
    for start in range(rows.start, min(rows.stop, shape[0]), step):
        yield slice(start, min(start + step, rows.stop, shape[0]))


def _allowed_factors(
    entries: Entries, recipe: Recipe, rounded: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return for each entry the factors with which W + ΔW can round to W′."""
    below, above = sum_bounds(entries, recipe)
    for dtype in rounded:
        below, above = round_to(below, dtype), round_to(above, dtype)
    target_low, target_high = preimage(entries.merged, recipe.final)
    # The product of factor and sum is rounded to float32 first.
    slack = 2.0**-23 * np.abs(entries.merged)
    target_low, target_high = target_low - slack, target_high + slack
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = np.stack([t / s for t in (target_low, target_high) for s in (below, above)])
    through_zero = (below <= 0) & (above >= 0)
    least = np.where(through_zero, -np.inf, np.nanmin(quotients, axis=0))
    most = np.where(through_zero, np.inf, np.nanmax(quotients, axis=0))
    return least, most
