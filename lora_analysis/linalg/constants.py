"""What every kernel here shares: the element type and its rounding unit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
