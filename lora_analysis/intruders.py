"""Intruder dimensions of W + ΔW, drift of W's spectrum, rotation of its leading directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis import chance, linalg
from lora_analysis.adapter import DenseUpdate, LowRankUpdate, check_weight_shape
from lora_analysis.bases import as_weight
from lora_analysis.errors import IncompatibleError, InputError
from lora_analysis.formats import as_update
from lora_analysis.results import frame, short_repr
from lora_analysis.spectra import SIDES, Side, weight_svd
from lora_analysis.text import html_table

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from lora_analysis.linalg import DenseSVD


@dataclass(frozen=True, slots=True, eq=False)
class IntruderSide:
    """The leading singular vectors of W + ΔW on one side, compared with those of W.

    Attributes
    ----------
    max_cosine
        ``(k,)``: ``max_i |cos(y_j, x_i)|``, for all singular vectors x_i of W up to its
        numerical rank; the vectors that LAPACK returns beyond it are arbitrary.
    nearest
        ``(k,)``: the i of that maximum, from 1; 0 if W is zero.
    novelty
        ``(k,)``: ``1 − ‖X_Kᵀy_j‖²``, the part of y_j outside W's leading ``span`` directions. A
        mixture of W's directions is an intruder by its cosines, but has no novelty.
    chance_maximum
        Median of the largest cosine of a random direction.
    chance_novelty
        Mean novelty of a random direction, ``1 − K/d``.
    rotation
        ``(k,)``: principal angles between W's top-k directions and those of W + ΔW, ascending.
    """

    max_cosine: NDArray[np.float64]
    nearest: NDArray[np.intp]
    novelty: NDArray[np.float64]
    chance_maximum: float
    chance_novelty: float
    rotation: NDArray[np.float64]

    __repr__ = short_repr


@dataclass(frozen=True, slots=True, eq=False)
class IntruderReport:
    """Change of W's leading singular directions when ΔW is added.

    Attributes
    ----------
    epsilon
        Cosine below which a direction is an intruder.
    span
        K, the number of W's directions to which novelty refers.
    S, weight_values
        ``(k,)``: leading singular values of W + ΔW, and of W.
    sides
        Results for the input and the output side.
    """

    module: str
    label: str
    epsilon: float
    span: int
    S: NDArray[np.float64]
    weight_values: NDArray[np.float64]
    sides: Mapping[Side, IntruderSide]

    @property
    def drift(self) -> NDArray[np.float64]:
        """``(k,)``: σ_j(W + ΔW)/σ_j(W) − 1, NaN if σ_j(W) is zero."""
        nonzero = self.weight_values > 0
        return np.where(nonzero, self.S / np.where(nonzero, self.weight_values, 1.0) - 1.0, np.nan)

    __repr__ = short_repr

    def to_frame(self) -> pd.DataFrame:
        """Return one row per side and direction j of W + ΔW."""
        rows = [
            {
                "side": side,
                "j": j + 1,
                "sigma": self.S[j],
                "weight_sigma": self.weight_values[j],
                "max_cosine": values.max_cosine[j],
                "chance_maximum": values.chance_maximum,
                "nearest": values.nearest[j],
                "novelty": values.novelty[j],
                "intruder": self.intruders(side)[j],
            }
            for side, values in self.sides.items()
            for j in range(len(self.S))
        ]
        return frame(rows)

    def intruders(self, side: Side) -> NDArray[np.bool_]:
        """Return ``(k,)``: True for directions that resemble none of W's."""
        return self.sides[side].max_cosine < self.epsilon

    def count(self, side: Side) -> int:
        """Return the number of intruders among the k directions."""
        return int(self.intruders(side).sum())

    def _repr_html_(self) -> str:
        rows = [
            (side, self.count(side), self.energy_share(side), values.max_cosine.min(),
             values.chance_maximum, values.novelty.max())
            for side, values in self.sides.items()
        ]  # fmt: skip
        columns = ("side", "intruders", "energy", "smallest cosine", "random", "largest novelty")
        title = f"First {len(self.S)} directions of W + ΔW, {self.module}, {self.label}"
        return html_table(title, columns, rows)

    def energy_share(self, side: Side) -> float:
        """Return the intruders' share of the k directions' energy, Σσ² over Σσ²; NaN for 0."""
        energy = self.S**2
        total = float(energy.sum())
        return float(energy[self.intruders(side)].sum()) / total if total else float("nan")


def intruder_dimensions(
    update: Any,
    W: Any,
    *,
    k: int = 10,
    epsilon: float = 0.5,
    span: int | None = None,
    weight: DenseSVD | None = None,
) -> IntruderReport:
    """Return the leading singular directions of W + ΔW that resemble no singular direction of W.

    y_j is an intruder if ``max_i |cos(y_j, x_i)| < ε`` over all singular vectors x_i of W, leading
    and trailing (Shuttleworth et al., arXiv 2410.21228, with k = 10 and ε = 0.5), on either side.
    The report also has what the count does not show: the intruders' energy, the values of a random
    direction, and the novelty, since an update inside W's span makes intruders by mixing.

    Parameters
    ----------
    update
        A low-rank update of known scale, or a dense one, in any form that :func:`as_update` takes.
    W
        The frozen weight as ``(d_out, d_in)``, in any form that :func:`as_weight` takes.
    k
        Number of leading directions of W + ΔW to test; at most min(d_out, d_in).
    epsilon
        Cosine below which a direction is an intruder.
    span
        K of the novelty: 10·k by default, at most half of W's directions.
    weight
        W's SVD by `spectra.weight_svd`, if it was computed before.

    Raises
    ------
    IncompatibleError
        The shapes of ΔW, W and its SVD differ.
    ScaleError
        The scale of the update is unknown.
    InputError
        k or span below 1, or epsilon outside (0, 1].
    BaseWeightError
        W holds values that are not finite.

    Notes
    -----
    W's whole SVD is the expensive step (see `spectra.weight_svd`) and serves every adapter of the
    base. A low-rank update is then added in W's coordinates, in O(d²·r + k·d·r²): a fraction
    of a second for 4096 × 4096, with vectors accurate to 1e-14 over their relative gap. The leading
    directions of W and a dense update are iterated, see `linalg.leading_svd`.
    """
    if k < 1 or not 0 < epsilon <= 1:
        message = f"Intruders need k >= 1 and 0 < epsilon <= 1, got k = {k}, epsilon = {epsilon}."
        raise InputError(message)
    update, W = as_update(update), as_weight(W)
    check_weight_shape(update, W)
    if isinstance(update, LowRankUpdate):
        update.known_scale()  # before the expensive step
    svd = weight_svd(W) if weight is None else weight
    if (shape := (len(svd.U), len(svd.V))) != update.shape:
        message = (
            f"'{update.name}' in {update.label or 'this adapter'} updates a weight of shape "
            f"{update.shape}, but the SVD given is of {shape}. Is it another base model?"
        )
        raise IncompatibleError(message)
    n = len(svd.S)
    count = min(k, n)
    K = max(min(10 * count if span is None else span, n // 2 if span is None else n), 1)
    # The leading directions of W + ΔW, in W's coordinates.
    if isinstance(update, DenseUpdate):
        tuned = (W if isinstance(W, np.ndarray) else W.array()).astype(np.float64)
        tuned += update.delta
        leading = linalg.leading_svd(tuned, count)
        left, right = _coordinates(svd.U, leading.U), _coordinates(svd.V, leading.V)
    else:
        B = _coordinates(svd.U, update.known_scale() * update.B.astype(np.float64))
        A = _coordinates(svd.V, update.A.astype(np.float64).T)
        if len(B) < len(A):
            leading = linalg.modified_svd(svd.S, A, B, count)
            left, right = leading.V, leading.U
        else:
            leading = linalg.modified_svd(svd.S, B, A, count)
            left, right = leading.U, leading.V
    sides = {"input": (right, update.shape[1]), "output": (left, update.shape[0])}
    return IntruderReport(
        module=update.name,
        label=update.label,
        epsilon=epsilon,
        span=K,
        S=leading.S,
        weight_values=svd.S[:count],
        sides={side: _side(*sides[side], svd.S, K) for side in SIDES},
    )


def _coordinates(basis: NDArray[np.float64], vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return vectors in a basis, and rows for the complement of its span.

    Only lengths and angles outside the span matter: the triangular factor has them all.
    """
    inside = basis.T @ vectors
    if basis.shape[0] == basis.shape[1]:
        return inside
    return np.vstack([inside, np.linalg.qr(vectors - basis @ inside, mode="r")])


def _side(
    coordinates: NDArray[np.float64], dimension: int, values: NDArray[np.float64], span: int
) -> IntruderSide:
    squares = coordinates**2  # (n or more, k)
    rank = int(np.count_nonzero(values > dimension * linalg.EPS * values[0]))
    leading = squares[:rank]
    # From the part outside the span, so that novelty near 0 keeps its digits.
    outside, inside = squares[span:].sum(axis=0), squares[:span].sum(axis=0)
    return IntruderSide(
        max_cosine=np.sqrt(leading.max(axis=0, initial=0.0)),
        nearest=leading.argmax(axis=0) + 1 if rank else np.zeros(squares.shape[1], dtype=np.intp),
        novelty=outside / (outside + inside),
        chance_maximum=chance.largest_cosine_median(max(rank, 1), dimension),
        chance_novelty=1 - span / dimension,
        rotation=linalg.principal_angles(np.eye(*squares.shape), coordinates),
    )
