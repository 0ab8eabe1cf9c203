"""Results of comparing ΔW with W."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.results import frame, short_repr
from lora_analysis.text import html_table

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from lora_analysis.amplify.streaming import Precision
    from lora_analysis.bases.sanity_checks import WeightStatistics


@dataclass(frozen=True, slots=True, eq=False)
class RandomDirections:
    """‖UᵀWV‖_F over seeded draws of uniform directions, for every k.

    Attributes
    ----------
    mean, spread
        ``(n,)``: mean and standard deviation over the draws; NaN without draws.
    rms
        ``(n,)``: the exact root mean square, ``‖W‖_F·k/√(d_out·d_in)``.
    draws
        How many draws.
    norms
        ``(draws, n)``: the draws themselves.
    """

    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    rms: NDArray[np.float64]
    draws: int
    norms: NDArray[np.float64]

    __repr__ = short_repr


@dataclass(frozen=True, slots=True, eq=False)
class CrossedEnrichment:
    """Enrichment of directions that no single update has: U of one update, V of another.

    Attributes
    ----------
    partners
        Labels of the other updates of the same module, P of them.
    output
        ``(P, n)``: ``‖U_kᵀWV′_k‖_F`` over its random root mean square, with U of this update and
        V′ of the partner; NaN where the partner has fewer than k directions.
    input
        ``(P, n)``: the same with U′ of the partner and V of this update.
    """

    partners: tuple[str, ...]
    output: NDArray[np.float64]
    input: NDArray[np.float64]

    __repr__ = short_repr

    @property
    def median(self) -> NDArray[np.float64]:
        """``(n,)``: median over the partners and both ways to cross; NaN where there is none."""
        values = np.concatenate([self.output, self.input])
        present = ~np.isnan(values).all(axis=0)
        medians = np.full(values.shape[1], np.nan)
        medians[present] = np.nanmedian(values[:, present], axis=0)
        return medians

    def select(self, partners: Collection[str]) -> CrossedEnrichment:
        """Return the values with some of the partners."""
        rows = [i for i, partner in enumerate(self.partners) if partner in partners]
        names = tuple(self.partners[i] for i in rows)
        return CrossedEnrichment(names, self.output[rows], self.input[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Amplification:
    """One update compared with its frozen weight, for every k up to n, its numerical rank.

    Every array over k has shape ``(n,)``; entry ``k-1`` uses the top-k singular directions of
    ΔW. The last entry is the LoRA paper's number.

    Attributes
    ----------
    core
        ``UᵀWV``, ``(n, n)``.
    S
        Singular values of ΔW, ``(n,)``.
    weight_norm, relative_norm
        ‖W‖_F and ‖ΔW‖_F/‖W‖_F.
    projected
        ‖U_kᵀWV_k‖_F: W seen through ΔW's own directions.
    weight_top
        √Σ_{i≤k}σ_i(W)²: W through its own top-k directions; None if not asked for.
    random
        W through random directions.
    amplification_factor
        ``√Σ_{i≤k}σ_i(ΔW)² / projected_k``.
    chance_factor
        The same with the random root mean square below: what random directions would score.
    enrichment
        ``projected_k / random rms``, a ratio of norms; its square is a ratio of energies and has
        mean 1 for random directions. The part of the amplification factor that is not merely the
        size of ΔW. Compare it with ``crossed`` and ``enrichment_through_weight`` before calling it
        specific to this update.
    input_enrichment
        ``‖W·V_k‖_F`` over its random root mean square: the input side alone. Its square has mean
        1 for random directions.
    output_enrichment
        ``‖U_kᵀ·W‖_F`` over the same; None if not asked for.
    precision
        Type of the products with W, ``"float64"`` or ``"float32"``.
    storage
        How W is quantized ("bitsandbytes nf4"), empty if it is stored as plain numbers.
    noise
        Expected ‖rounding error of W‖_F/‖W‖_F (`Weight.noise`), None if it is not quantized or
        not known. Such an error is no more aligned with ΔW than random directions are: it moves
        ``enrichment`` at k by about ``noise/k``, and where that is weaker, to about ``noise``.
    weight_statistics
        What the pass counted of a stored W, for `bases.sanity_checks`; None for an array.
    crossed
        Enrichment with the directions of unrelated updates; None if not asked for.
    enrichment_through_weight
        ``(n,)``: enrichment of random directions after one product with W, ``U = orth(W·G)`` and
        ``V = orth(Wᵀ·H)`` with Gaussian G and H, mean over the draws. It is what W's spectrum
        gives to any directions that passed through it. None if not asked for, NaN beyond
        `controls.MOST_THROUGH_WEIGHT` directions.
    """

    module: str
    label: str
    core: NDArray[np.float64]
    S: NDArray[np.float64]
    weight_norm: float
    relative_norm: float
    projected: NDArray[np.float64]
    weight_top: NDArray[np.float64] | None
    random: RandomDirections
    amplification_factor: NDArray[np.float64]
    chance_factor: NDArray[np.float64]
    enrichment: NDArray[np.float64]
    input_enrichment: NDArray[np.float64]
    output_enrichment: NDArray[np.float64] | None
    precision: Precision
    storage: str = ""
    noise: float | None = None
    weight_statistics: WeightStatistics | None = None
    crossed: CrossedEnrichment | None = None
    enrichment_through_weight: NDArray[np.float64] | None = None

    def _repr_html_(self) -> str:
        if not len(self.S):
            return html_table(f"Amplification, {self.module}, {self.label}: untrained", (), ())
        columns = ("k", "‖UᵀWV‖", "random ‖UᵀWV‖", "factor", "random factor", "enrichment")
        rows = [
            (k, self.projected[k - 1], self.random.rms[k - 1], self.amplification_factor[k - 1],
             self.chance_factor[k - 1], self.enrichment[k - 1])
            for k in dict.fromkeys((1, len(self.S)))
        ]  # fmt: skip
        return html_table(f"Amplification, {self.module}, {self.label}", columns, rows)

    __repr__ = short_repr

    def summary(self) -> dict[str, float]:
        """Return the numbers at all n directions, for tables over modules."""
        if not len(self.S):
            return {"k": 0}
        return {
            "k": len(self.S),
            "factor": float(self.amplification_factor[-1]),
            "random factor": float(self.chance_factor[-1]),
            "enrichment": float(self.enrichment[-1]),
        }

    def to_frame(self) -> pd.DataFrame:
        """Return one row per number of directions k."""
        columns = {
            "k": self.k,
            "sigma": self.S,
            "projected": self.projected,
            "random_rms": self.random.rms,
            "weight_top": self.weight_top,
            "amplification_factor": self.amplification_factor,
            "chance_factor": self.chance_factor,
            "enrichment": self.enrichment,
            "input_enrichment": self.input_enrichment,
            "output_enrichment": self.output_enrichment,
            "enrichment_through_weight": self.enrichment_through_weight,
        }
        present = {name: values for name, values in columns.items() if values is not None}
        return frame(
            [dict(zip(present, row, strict=True)) for row in zip(*present.values(), strict=True)]
        )

    @property
    def p_value(self) -> NDArray[np.float64]:
        """``(n,)``: P(‖UᵀWV‖ of random directions ≥ projected), one-sided, from the draws.

        ``(b + 1)/(N + 1)``; with 16 draws no smaller than .06. NaN without draws.
        """
        above = np.sum(self.random.norms >= self.projected, axis=0)
        p = (above + 1) / (self.random.draws + 1)
        return p if self.random.draws else np.full(len(self.S), np.nan)

    @property
    def k(self) -> NDArray[np.intp]:
        """1…n, the number of directions behind each entry."""
        return np.arange(1, len(self.S) + 1)
