"""ΔW in W's singular basis: the share of its energy in W's leading and trailing directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import chance, linalg
from lora_analysis.errors import DegenerateSubspaceError, IncompatibleError
from lora_analysis.results import frame, short_repr
from lora_analysis.spectra import SIDES, Side, Spectrum, spectrum
from lora_analysis.text import html_table

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from lora_analysis.adapter import Update
    from lora_analysis.linalg import DenseSVD

# Numbers of one block of cumulated products.
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class BasisSide:
    """ΔW's energy along W's singular directions on one side.

    Attributes
    ----------
    share
        ``(n,)``: ``‖x_iᵀΔW‖²/‖ΔW‖²`` (output side; ``‖ΔW·x_i‖²`` on the input side) for W's i-th
        direction.
    outside
        The share outside all n of them, where d exceeds n.
    dimension
        d: of the space the directions live in.
    """

    share: NDArray[np.float64]
    outside: float
    dimension: int

    __repr__ = short_repr

    @property
    def leading(self) -> NDArray[np.float64]:
        """``(n,)``: the share in W's top-k directions, for k = 1…n; by chance k/d."""
        return np.cumsum(self.share)

    @property
    def trailing(self) -> NDArray[np.float64]:
        """``(n,)``: the share in W's last k directions, for k = 1…n; by chance k/d."""
        return np.cumsum(self.share[::-1])


@dataclass(frozen=True, slots=True, eq=False)
class WeightBasisEnergy:
    """ΔW in the basis of W's singular directions, over W's whole spectrum.

    Attributes
    ----------
    S, weight_values
        Singular values of ΔW, and all of W, ``(n,)``.
    sides
        The energy on the input and on the output side.
    off_principal
        ``(n,)``: the share of ‖ΔW‖² outside W's top-k directions on both sides at once,
        ``‖(I − U_kU_kᵀ)·ΔW·(I − V_kV_kᵀ)‖²/‖ΔW‖²``, for k = 1…n.
    """

    module: str
    label: str
    S: NDArray[np.float64]
    weight_values: NDArray[np.float64]
    sides: Mapping[Side, BasisSide]
    off_principal: NDArray[np.float64]

    __repr__ = short_repr

    def to_frame(self) -> pd.DataFrame:
        """Return one row per side and number k of W's directions."""
        n = len(self.weight_values)
        rows = [
            {
                "side": side,
                "k": k + 1,
                "weight_sigma": self.weight_values[k],
                "share": energy.share[k],
                "leading": leading[k],
                "trailing": trailing[k],
                "chance": (k + 1) / energy.dimension,
                "off_principal": self.off_principal[k],
            }
            for side, energy in self.sides.items()
            for leading, trailing in [(energy.leading, energy.trailing)]
            for k in range(n)
        ]
        return frame(rows)

    def _repr_html_(self) -> str:
        k = min(len(self.S), len(self.weight_values))
        rows = [
            (side, k, energy.leading[k - 1], energy.trailing[k - 1], k / energy.dimension)
            for side, energy in self.sides.items()
        ]
        columns = ("side", "k", "in W's first k", "in W's last k", "random")
        title = f"Share of ‖ΔW‖² in W's basis, {self.module}, {self.label}"
        return html_table(title, columns, rows)

    @property
    def chance_off_principal(self) -> NDArray[np.float64]:
        """``(n,)``: what random directions give on average, (1 − k/d_out)(1 − k/d_in)."""
        k = np.arange(1, len(self.weight_values) + 1)
        sides = [self.sides[side].dimension for side in SIDES]
        return np.asarray((1 - k / sides[0]) * (1 - k / sides[1]))

    def p_value(self, side: Side) -> NDArray[np.float64]:
        """Return ``(n,)``: P(share of random directions in W's top-k ≥ share of ΔW).

        A small p-value means "not isotropic" and no more: it does not compare with unrelated
        adapters. In [1e-4, 1], see `chance.p_is_bound` and `chance.one_sided_energy_p_value`.
        """
        energy = self.sides[side]
        k = np.arange(1, len(energy.share) + 1)
        return chance.one_sided_energy_p_value(
            energy.leading * energy.dimension / k, self.S, energy.dimension, k
        )

    def band(self, side: Side, level: float) -> NDArray[np.float64]:
        """Return ``(n,)``: the share in k directions that random ones stay below at ``level``."""
        energy = self.sides[side]
        k = np.arange(1, len(energy.share) + 1)
        return chance.one_sided_energy_quantile(self.S, energy.dimension, k, level)


def weight_basis_energy(update: Update | Spectrum, weight: DenseSVD) -> WeightBasisEnergy:
    """Return the distribution of ΔW's energy over W's singular directions, on both sides.

    ``‖U_kᵀ·ΔW‖_F²/‖ΔW‖_F²`` with W's top-k left singular vectors, and the same on the right: of
    which Figure 8 of LoRA (arXiv 2106.09685) is one point. W fixes the directions, so chance is
    k/d; ΔW's few directions make it vary a lot: hold it against ``band``.

    Parameters
    ----------
    update
        An update, or its spectrum with vectors. The scale does not matter.
    weight
        W's whole SVD, by `spectra.weight_svd`.

    Raises
    ------
    IncompatibleError
        ΔW and W have different shapes.
    DegenerateSubspaceError
        The update is untrained: there is no energy to share.

    Notes
    -----
    O((d_out + d_in)·n·r).
    """
    spectral = spectrum(update)
    shape = len(weight.U), len(weight.V)
    if spectral.shape != shape:
        message = (
            f"'{spectral.name}' in {spectral.label or 'this adapter'} updates a weight of shape "
            f"{spectral.shape}, the SVD given is of {shape} as (d_out, d_in)."
        )
        raise IncompatibleError(message)
    if spectral.untrained:
        message = f"'{spectral.name}' in {spectral.label or 'this adapter'} is untrained: ΔW is 0."
        raise DegenerateSubspaceError(message)
    s = spectral.S[: spectral.numerical_rank] / spectral.norm
    P, Q = weight.U.T @ spectral.vectors("output"), weight.V.T @ spectral.vectors("input")  # (n, r)
    shares = {"input": (Q * s) ** 2, "output": (P * s) ** 2}
    dimensions = dict(zip(SIDES, shape[::-1], strict=True))
    sides: dict[Side, BasisSide] = {}
    for side in SIDES:
        share = shares[side].sum(axis=1)
        outside = max(0.0, 1.0 - float(share.sum())) if dimensions[side] > len(weight.S) else 0.0
        sides[side] = BasisSide(share, outside, dimensions[side])
    core = _leading_blocks(P * s, Q)
    elsewhere = 1.0 - sides["input"].leading - sides["output"].leading + core
    return WeightBasisEnergy(
        module=spectral.name,
        label=spectral.label,
        S=spectral.S[: spectral.numerical_rank],
        weight_values=weight.S,
        sides=sides,
        off_principal=np.maximum(elsewhere, 0.0),
    )


def _leading_blocks(P: NDArray[np.float64], Q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``‖(P·Qᵀ)[:k, :k]‖_F²`` for every k, from r × r products cumulated over k."""
    n, rank = P.shape
    if 4 * rank > n:  # then one product of matrices is quicker
        return np.diagonal(linalg.cumulative_overlap(P @ Q.T))
    totals = np.zeros((2, rank, rank))
    captured = np.empty(n)
    rows = max(1, _BLOCK // rank**2)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        sums = []
        for total, factor in zip(totals, (P[part], Q[part]), strict=True):
            growing = np.cumsum(factor[:, :, None] * factor[:, None, :], axis=0) + total
            total[...] = growing[-1]
            sums.append(growing)
        captured[part] = np.einsum("kab,kab->k", *sums)
    return captured
