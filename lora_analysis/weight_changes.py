"""Change of W by ΔW: of its rows and columns in magnitude and direction, of its stored entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.adapter import DenseUpdate, Update, check_weight_shape
from lora_analysis.bases import as_weight
from lora_analysis.formats import as_update
from lora_analysis.results import short_repr
from lora_analysis.spectra import SIDES, Side
from lora_analysis.storage.dtypes import round_to

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from lora_analysis.bases import Weight


@dataclass(frozen=True, slots=True, eq=False)
class VectorChange:
    """The change of W's vectors along one axis.

    Attributes
    ----------
    magnitude
        ``(d,)``: ``‖w + δ‖ − ‖w‖`` of every vector.
    direction
        ``(d,)``: ``1 − cos(w + δ, w)``, in [0, 2]; NaN if either is zero.
    """

    magnitude: NDArray[np.float64]
    direction: NDArray[np.float64]

    __repr__ = short_repr

    @property
    def mean_magnitude(self) -> float:
        """ΔM: mean of ``|magnitude|``."""
        return float(np.mean(np.abs(self.magnitude)))

    @property
    def mean_direction(self) -> float:
        """ΔD: mean of the direction's change, over vectors for which it is defined."""
        defined = self.direction[~np.isnan(self.direction)]
        return float(defined.mean()) if defined.size else float("nan")

    @property
    def correlation(self) -> float:
        """Pearson correlation of ``|magnitude|`` and direction; NaN if either is constant."""
        defined = ~np.isnan(self.direction)
        a, b = np.abs(self.magnitude[defined]), self.direction[defined]
        if len(a) < 2 or not (np.ptp(a) > 0 and np.ptp(b) > 0):
            return float("nan")
        return float(np.corrcoef(a, b)[0, 1])


Changes = Mapping[Side, VectorChange]


def magnitude_direction(update: Update, W: Weight | NDArray[np.floating]) -> Changes:
    """Return the change in magnitude and direction of W's vectors from W to W + ΔW.

    The decomposition of DoRA (Liu et al., arXiv 2402.09353, section 3.2), in which LoRA and full
    fine-tuning differ. ``"output"`` has one vector per output feature, a row of W, whose norm is
    DoRA's magnitude in PEFT. ``"input"`` has one per input feature, a column, as in that paper.

    Parameters
    ----------
    update
        A low-rank update of known scale, or a dense one.
    W
        The frozen weight as ``(d_out, d_in)``, in any form that :func:`as_weight` takes.

    Raises
    ------
    IncompatibleError
        The shapes differ.
    ScaleError
        The scale of the update is unknown.

    Notes
    -----
    One pass over W in blocks, in float64; ΔW is never formed whole. 1 − cos is computed from
    ``‖w‖²‖δ‖² − (w·δ)²``, which is accurate for small angles.
    """
    update, W = as_update(update), as_weight(W)
    check_weight_shape(update, W)
    d_out, d_in = update.shape
    # Sums of w·w, w·δ and δ·δ for every vector.
    by_row, by_column = np.zeros((3, d_out)), np.zeros((3, d_in))
    for rows, columns, block in _blocks(W):
        delta = _delta_block(update, rows, columns)
        for i, (a, b) in enumerate(((block, block), (block, delta), (delta, delta))):
            product = a * b
            by_row[i, rows] += product.sum(axis=1)
            by_column[i, columns] += product.sum(axis=0)
    sums = dict(zip(SIDES, (by_column, by_row), strict=True))
    return {side: _change(*sums[side]) for side in SIDES}


def share_changed_in_bfloat16(update: Update, W: Weight | NDArray[np.floating]) -> float:
    """Return the share of entries in which W and W + ΔW differ once they are stored as bfloat16.

    A change below half a spacing of W's entry, 0.2 to 0.4 % of it, mostly vanishes: the share tells
    how sparse an update looks in a copy of half precision, not how sparse it is.

    Parameters
    ----------
    update, W
        As for `magnitude_direction`.

    Raises
    ------
    IncompatibleError, ScaleError
        As for `magnitude_direction`.
    """
    update, W = as_update(update), as_weight(W)
    check_weight_shape(update, W)
    changed = 0
    for rows, columns, block in _blocks(W):
        tuned = block + _delta_block(update, rows, columns)
        before, after = (round_to(values, "bfloat16") for values in (block, tuned))
        changed += int(np.count_nonzero(before != after))
    return changed / (update.shape[0] * update.shape[1])


def _blocks(
    W: Weight | NDArray[np.floating],
) -> Iterator[tuple[slice, slice, NDArray[np.float64]]]:
    if not isinstance(W, np.ndarray):
        for rows, columns, tile in W.blocks():
            yield rows, columns, tile.astype(np.float64)
        return
    height = max(1, (1 << 20) // W.shape[1])
    for start in range(0, W.shape[0], height):
        rows = slice(start, min(start + height, W.shape[0]))
        yield rows, slice(0, W.shape[1]), W[rows].astype(np.float64)


def _delta_block(update: Update, rows: slice, columns: slice) -> NDArray[np.float64]:
    if isinstance(update, DenseUpdate):
        return update.delta[rows, columns].astype(np.float64)
    B, A = update.B[rows].astype(np.float64), update.A[:, columns].astype(np.float64)
    return np.asarray(update.known_scale() * (B @ A))


def _change(
    ww: NDArray[np.float64], wd: NDArray[np.float64], dd: NDArray[np.float64]
) -> VectorChange:
    """Return the change of vectors from ``w·w``, ``w·δ`` and ``δ·δ``."""
    before = np.sqrt(ww)
    change = 2 * wd + dd  # ‖w + δ‖² − ‖w‖²
    after = np.sqrt(np.maximum(ww + change, 0.0))
    total = before + after
    magnitude = np.where(total > 0, change / np.where(total > 0, total, 1.0), 0.0)
    sizes = before * after
    dot = ww + wd  # w·(w + δ)
    # 1 − cos = sin²/(1 + cos), with ‖w‖²‖w + δ‖²·sin² = ‖w‖²‖δ‖² − (w·δ)².
    square = np.maximum(ww * dd - wd**2, 0.0)
    defined = sizes > 0
    scale = np.where(defined, sizes * (sizes + np.abs(dot)), 1.0)
    direction = np.where(dot >= 0, square / scale, 2.0 - square / scale)
    return VectorChange(magnitude, np.where(defined, direction, np.nan))
