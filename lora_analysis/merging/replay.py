"""Replay of a merge: which numbers W + c·ΔW can round to, and which strengths c a number allows.

A merge adds ΔW to W and rounds, once or several times. Rounding is monotone: if the exact ΔW is
known up to δ, every merged number lies between the replays of ΔW − δ and ΔW + δ, whatever order
the sums were computed in. No statistics are involved, so a healthy merge is never called wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.storage.dtypes import round_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HALF_TYPES: Final = ("bfloat16", "float16")
# Bits of the fraction, and the exponent of the smallest normal number.
_FORMATS: Final = {"bfloat16": (7, -126), "float16": (10, -14), "float32": (23, -126)}
_LARGEST_FLOAT16: Final = 65504.0
# Unit roundoff of float32, in which every merge is computed at least.
_UNIT: Final = 2.0**-24


def spacing(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Return the distance of neighboring numbers of a type at some values."""
    fraction, smallest = _FORMATS[dtype]
    _, exponents = np.frexp(np.abs(values))
    steps: NDArray[np.float64] = np.ldexp(1.0, np.maximum(exponents - 1, smallest) - fraction)
    return steps


def unit_roundoff(dtype: str) -> float:
    """Return half of the relative distance of neighboring numbers of a type."""
    return 2.0 ** -(_FORMATS[dtype][0] + 1)


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
    """Return for each entry if the merge at these strengths cannot have given it, ``(n,)``."""
    low, high = sum_bounds(entries, recipe, strengths)
    for dtype in recipe.final:
        low, high = round_to(low, dtype), round_to(high, dtype)
    return (entries.merged < low) | (entries.merged > high)


def unchanged(entries: Entries, recipe: Recipe) -> NDArray[np.bool_]:
    """Return for each entry if it is W, rounded as the recipe rounds, ``(n,)``."""
    weight = round_to(entries.weight, recipe.base) if recipe.base else entries.weight
    same: NDArray[np.bool_] = reduce(round_to, recipe.final, weight) == entries.merged
    return same


def preimage(
    values: NDArray[np.float64], dtypes: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return bounds of all numbers that rounding to some types in order takes to the values."""
    low = high = values
    for dtype in reversed(dtypes):
        low = low - 0.5 * spacing(low, dtype)
        high = high + 0.5 * spacing(high, dtype)
    return low, high


def allowed_strengths(
    entries: Entries, recipe: Recipe
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return for each entry an interval that contains every c with which the merge gives it.

    Infinite for entries that decide nothing, because ΔW is within its own rounding error there.
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
    return least, most


def strength_interval(entries: Entries, recipe: Recipe) -> tuple[float, float] | None:
    """Return the strengths that every entry allows, None if there is none."""
    least, most = allowed_strengths(entries, recipe)
    low, high = float(np.max(least, initial=-np.inf)), float(np.min(most, initial=np.inf))
    return (low, high) if low <= high else None


@lru_cache(maxsize=16)
def sample_positions(shape: tuple[int, int], count: int) -> NDArray[np.intp]:
    """Return sorted positions of the flattened matrix: all of them, or a fixed random draw."""
    total = shape[0] * shape[1]
    if total <= count:
        return np.arange(total)
    drawn = np.sort(np.random.default_rng(0).integers(0, total, size=count))
    return drawn[np.diff(drawn, prepend=-1) > 0]
