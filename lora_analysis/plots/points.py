"""Points of many modules in groups: the marks that the strip plots share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Finite values of one group, in the given order, and how many were not finite."""

    label: str
    values: NDArray[np.float64]
    dropped: int

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median, third quartile; NaN for an empty group."""
        if not self.values.size:
            return (np.nan, np.nan, np.nan)
        low, middle, high = np.quantile(self.values, (0.25, 0.5, 0.75))
        return float(low), float(middle), float(high)

    @property
    def median(self) -> float:
        """The median; NaN for an empty group."""
        return self.quartiles[1]


def group(label: str, values: ArrayLike) -> Group:
    """Return a group of the finite values."""
    array = np.atleast_1d(np.asarray(values, dtype=np.float64)).ravel()
    finite = array[np.isfinite(array)]
    return Group(label, finite, array.size - finite.size)


def groups(values: Mapping[str, ArrayLike]) -> tuple[Group, ...]:
    """Return one group per entry, in the mapping's order."""
    return tuple(group(label, entry) for label, entry in values.items())


def dropped_note(all_groups: tuple[Group, ...]) -> str:
    """Return a note on the number of values that are not drawn; empty if there are none."""
    missing = sum(g.dropped for g in all_groups)
    total = missing + sum(len(g.values) for g in all_groups)
    return f"{missing} of {total} values are not finite and not drawn" if missing else ""
