"""Chance of ‖UᵀWV‖ and its kin: what random directions give against a fixed matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def projected_norm_rms(
    weight_norm: float, shape: tuple[int, int], k: ArrayLike
) -> NDArray[np.float64]:
    """Return the root mean square of ‖UᵀWV‖_F for k random directions on each side (exact).

    ``‖W‖_F·k / sqrt(d_out·d_in)``: E‖UᵀWV‖_F² = k²‖W‖_F²/(d_out·d_in) for Haar U and V.
    """
    directions: NDArray[np.float64] = np.asarray(k, dtype=np.float64)
    return directions * (weight_norm / float(np.sqrt(float(shape[0] * shape[1]))))
