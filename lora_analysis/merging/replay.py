"""Replay of a merge: which numbers W + c·ΔW can round to, and which strengths c a number allows.

A merge adds ΔW to W and rounds, once or several times. Rounding is monotone: if the exact ΔW is
known up to δ, every merged number lies between the replays of ΔW − δ and ΔW + δ, whatever order
the sums were computed in. No statistics are involved, so a healthy merge is never called wrong.

DoRA's merge rescales each row of W + ΔW by one factor, which all its entries must allow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.storage.dtypes import round_to

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import LowRankUpdate

HALF_TYPES: Final = ("bfloat16", "float16")
# Bits of the fraction, and the exponent of the smallest normal number.
_FORMATS: Final = {"bfloat16": (7, -126), "float16": (10, -14), "float32": (23, -126)}
# Unit roundoff of float32, in which every merge is computed at least.
_UNIT: Final = 2.0**-24
# Factors are norms of rows: in float32, sums of thousands of squares.
_FLOAT32_TOLERANCE: Final = 1e-5
# The factor, the norm and the magnitude are each rounded once to half precision.
_ROUNDINGS: Final = 3
_BLOCK: Final = 2**20


def spacing(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Return the distance of neighboring numbers of a type at some values."""
    fraction, smallest = _FORMATS[dtype]
    _, exponents = np.frexp(np.abs(values))
    steps: NDArray[np.float64] = np.ldexp(1.0, np.maximum(exponents - 1, smallest) - fraction)
    return steps


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where a merge rounds: the base weight, the product B·A, ΔW, and the sum.

    Parameters
    ----------
    base
        Type that W is loaded in; empty if it is the stored one.
    product
        Type that B·A is rounded to before it is scaled; empty if it is not.
    delta
        Types that ΔW is rounded to, in order.
    final
        Types that the sum is rounded to, in order; the last is the type of the merged weight.
    """

    base: str = ""
    product: str = ""
    delta: tuple[str, ...] = ()
    final: tuple[str, ...] = ("float32",)

    def __str__(self) -> str:
        parts = [f"W as {self.base}"] if self.base else []
        if self.product:
            parts.append(f"B·A rounded to {self.product}")
        parts += [f"ΔW rounded to {dtype}" for dtype in self.delta]
        parts += [f"sum rounded to {dtype}" for dtype in self.final]
        return ", ".join(parts)


def recipes(
    base_type: str, adapter_type: str, merged_type: str, *, loaded: Sequence[str] = ()
) -> list[Recipe]:
    """Return the recipes that make a weight of a type, the most common first.

    Parameters
    ----------
    base_type, adapter_type, merged_type
        Types of W, of the factors and of the merged weight.
    loaded
        Half-precision types that W may have been rounded to before.
    """
    halves = [dtype for dtype in (adapter_type, merged_type, base_type) if dtype in HALF_TYPES]
    rounded: list[tuple[str, tuple[str, ...]]] = [("", ())]
    rounded += [("", (dtype,)) for dtype in dict.fromkeys(halves)]
    if adapter_type in HALF_TYPES:
        others = [dtype for dtype in dict.fromkeys(halves) if dtype != adapter_type]
        twice = [(adapter_type, dtype) for dtype in others]
        rounded += [("", delta) for delta in twice]
        # A product in half precision, as on a GPU and of stacked experts.
        rounded += [(adapter_type, delta) for delta in ((adapter_type,), *twice)]
    finals: list[tuple[str, ...]] = [(merged_type,)]
    if merged_type in HALF_TYPES:
        finals += [(dtype, merged_type) for dtype in HALF_TYPES if dtype != merged_type]
    return [
        Recipe(base, of_product, delta, final)
        for final, base, (of_product, delta) in product(finals, ("", *loaded), rounded)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Some entries of a weight before and after a merge, and of the product that was added.

    Attributes
    ----------
    weight, merged
        ``(n,)``: W and W′.
    product, bound
        ``(n,)``: B·A in float64, and |B|·|A|, which bounds its terms.
    scale
        s of ΔW = s·B·A.
    rank
        Number of terms of each entry of B·A.
    """

    weight: NDArray[np.float64]
    merged: NDArray[np.float64]
    product: NDArray[np.float64]
    bound: NDArray[np.float64]
    scale: float
    rank: int

    @property
    def delta(self) -> NDArray[np.float64]:
        """ΔW."""
        return self.scale * self.product

    @property
    def error(self) -> NDArray[np.float64]:
        """δ: a float32 sum of the products, in any order, scaled, differs from ΔW by at most it."""
        return (self.rank + 3) * _UNIT * abs(self.scale) * self.bound

    def at(self, index: NDArray[np.intp] | slice) -> Entries:
        """Return some of the entries."""
        return Entries(
            self.weight[index], self.merged[index], self.product[index], self.bound[index],
            self.scale, self.rank,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.weight)


def sum_bounds(
    entries: Entries, recipe: Recipe, strengths: tuple[float, float] = (1.0, 1.0)
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the least and the largest value of W + c·ΔW before its last roundings.

    Parameters
    ----------
    entries
        W and B·A.
    recipe
        Roundings of the merge.
    strengths
        Least and largest c.
    """
    if recipe.product:
        error = (entries.rank + 3) * _UNIT * entries.bound
        products = [round_to(entries.product + sign * error, recipe.product) for sign in (-1, 1)]
        # The scale and the scaled product are rounded to float32 first.
        scales = [(1 + sign * 2 * _UNIT) * entries.scale * c for c in strengths for sign in (-1, 1)]
        values = [scale * rounded for scale in scales for rounded in products]
    else:
        delta, error = entries.delta, entries.error
        values = [c * delta + sign * abs(c) * error for c in strengths for sign in (-1, 1)]
    low, high = np.minimum.reduce(values), np.maximum.reduce(values)
    for dtype in recipe.delta:
        low, high = round_to(low, dtype), round_to(high, dtype)
    weight = round_to(entries.weight, recipe.base) if recipe.base else entries.weight
    slack = _UNIT * (np.abs(weight) + np.maximum(np.abs(low), np.abs(high)))
    return weight + low - slack, weight + high + slack


def misfits(
    entries: Entries, recipe: Recipe, strengths: tuple[float, float] = (1.0, 1.0)
) -> NDArray[np.bool_]:
    """Return True for each entry that no merge at these strengths can give, ``(n,)``."""
    low, high = sum_bounds(entries, recipe, strengths)
    for dtype in recipe.final:
        low, high = round_to(low, dtype), round_to(high, dtype)
    return (entries.merged < low) | (entries.merged > high)


def is_unchanged(entries: Entries, recipe: Recipe) -> NDArray[np.bool_]:
    """Return True for each entry that is W rounded as the recipe rounds, ``(n,)``."""
    weight = round_to(entries.weight, recipe.base) if recipe.base else entries.weight
    same: NDArray[np.bool_] = reduce(round_to, recipe.final, weight) == entries.merged
    return same


def preimage(
    values: NDArray[np.float64], dtypes: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return lower and upper bounds of the numbers that round to ``values`` through ``dtypes``."""
    low = high = values
    for dtype in reversed(dtypes):
        low = low - 0.5 * spacing(low, dtype)
        high = high + 0.5 * spacing(high, dtype)
    return low, high


def strength_interval(entries: Entries, recipe: Recipe) -> tuple[float, float] | None:
    """Return the strengths c with which a merge can give every entry, None if there are none.

    Each entry has an interval that contains every c with which the merge gives it; it is infinite
    if the entry decides nothing, because ΔW is within its own rounding error there.
    """
    low, high = preimage(entries.merged, recipe.final)
    weight = round_to(entries.weight, recipe.base) if recipe.base else entries.weight
    slack = 2 * _UNIT * (np.abs(entries.merged) + np.abs(weight))
    low, high = low - weight - slack, high - weight + slack  # of c·ΔW, rounded
    for dtype in reversed(recipe.delta):
        # Not below the spacing of subnormal numbers, which are as far apart as the smallest ones.
        low = low - 0.5 * spacing(low, dtype)
        high = high + 0.5 * spacing(high, dtype)
    delta, error = entries.delta, entries.error
    if recipe.product:
        error = error + abs(entries.scale) * 0.5 * spacing(entries.product, recipe.product) * 2
    decides = np.abs(delta) > 2 * error
    least = np.full(len(entries), -np.inf)
    most = np.full(len(entries), np.inf)
    size = np.abs(delta[decides])
    # Mirrored if ΔW is negative.
    negative = delta[decides] < 0
    lower = np.where(negative, -high[decides], low[decides])
    upper = np.where(negative, -low[decides], high[decides])
    small, large = size - error[decides], size + error[decides]
    least[decides] = np.minimum(lower / small, lower / large)
    most[decides] = np.maximum(upper / small, upper / large)
    lowest, highest = float(np.max(least, initial=-np.inf)), float(np.min(most, initial=np.inf))
    return (lowest, highest) if lowest <= highest else None


@lru_cache(maxsize=16)
def sample_positions(shape: tuple[int, int], count: int) -> NDArray[np.intp]:
    """Return sorted positions of the flattened matrix: all of them, or a fixed random draw."""
    total = shape[0] * shape[1]
    if total <= count:
        return np.arange(total)
    drawn = np.sort(np.random.default_rng(0).integers(0, total, size=count))
    return drawn[np.diff(drawn, prepend=-1) > 0]


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
            # The factors with which each entry of W + ΔW can round to W′.
            below, above = sum_bounds(entries, recipe)
            for dtype in rounded:
                below, above = round_to(below, dtype), round_to(above, dtype)
            target_low, target_high = preimage(entries.merged, recipe.final)
            # The product of factor and sum is rounded to float32 first.
            slack = 2.0**-23 * np.abs(entries.merged)
            targets = target_low - slack, target_high + slack
            with np.errstate(divide="ignore", invalid="ignore"):
                quotients = np.stack([t / s for t in targets for s in (below, above)])
            through_zero = (below <= 0) & (above >= 0)
            least = np.where(through_zero, -np.inf, np.nanmin(quotients, axis=0))
            most = np.where(through_zero, np.inf, np.nanmax(quotients, axis=0))
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
    # Neighboring numbers of a type with n bits of the fraction are 2^−n apart, relative to them.
    roundings = (_ROUNDINGS * 2.0 ** -_FORMATS[dtype][0] for dtype in halves)
    tolerance = max([_FLOAT32_TOLERANCE, *roundings])
    # m/‖W + ΔW‖ per row, or per column: (d_out,) or (d_in,).
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
    rescaled = _Rescaled(update, W, after, factors, tolerance)
    few = slice(0, min(len(W), max(1, _BLOCK // W.shape[1] // 16)))
    for recipe in candidates:
        for rounded in ((), *((dtype,) for dtype in HALF_TYPES)):
            if rescaled.fits(recipe, rounded, few) and rescaled.fits(
                recipe, rounded, slice(0, len(W))
            ):
                return recipe
    return None


def _row_blocks(shape: tuple[int, ...], rows: slice) -> Iterator[slice]:
    step = max(1, _BLOCK // max(shape[1], 1))
    for start in range(rows.start, min(rows.stop, shape[0]), step):
        yield slice(start, min(start + step, rows.stop, shape[0]))
