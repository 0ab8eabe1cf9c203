"""Shared by the kernels: the element type, its rounding unit, the array namespace."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)


def namespace(array: Any) -> Any:
    """Return the module whose functions fit an array, by the array API standard.

    numpy itself for its arrays (a wrapper would only cost its import), the wrapped torch for
    tensors.
    """
    if isinstance(array, np.ndarray | np.generic):
        return np
    from array_api_compat import array_namespace

    return array_namespace(array)
