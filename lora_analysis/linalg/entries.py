"""Statistics of a matrix's entries by which damage shows: one large entry, long runs of zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.linalg.constants import Float

# A single entry may be all that was learned if there are fewer than this.
FEW_ENTRIES: Final = 16


def peak_and_rest(values: NDArray[Any]) -> tuple[float, Float]:
    """Return the largest absolute entry, and all entries in float64 with that one set to zero.

    Parameters
    ----------
    values
        Real entries of any shape, at least one.

    Returns
    -------
    tuple
        The entry and a flat copy.
    """
    rest = values.astype(np.float64).ravel()
    index = int(np.argmax(np.abs(rest)))
    peak, rest[index] = abs(float(rest[index])), 0.0
    return peak, rest


def zero_runs(zeros: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first index of each run of True values, and the first index after it.

    Examples
    --------
    >>> starts, stops = zero_runs(np.array([True, True, False, True]))
    >>> starts.tolist(), stops.tolist()
    ([0, 3], [2, 4])
    """
    edges = np.flatnonzero(zeros[1:] != zeros[:-1]) + 1
    bounds = np.concatenate(([0], edges, [zeros.size]))
    is_run = zeros[bounds[:-1]]
    return bounds[:-1][is_run], bounds[1:][is_run]
