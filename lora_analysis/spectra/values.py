"""`Spectrum`: singular values and vectors of one update, and the ranks read from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from lora_analysis import linalg
from lora_analysis.errors import DegenerateSubspaceError, InputError
from lora_analysis.results import curve, frame
from lora_analysis.text import html_facts

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

Side = Literal["input", "output"]
VectorsOf = Literal["delta", "A", "B"]

SIDES: tuple[Side, Side] = ("input", "output")

# Rounding or a few training steps can rotate a subspace whose relative gap is below this.
NEARLY_DEGENERATE_GAP = 0.05

_STORED_EPS = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float8_e4m3fn": 2.0**-3,
    "float8_e5m2": 2.0**-2,
}


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Singular values and vectors of one update (or of one of its factors).

    Attributes
    ----------
    U
        Left singular vectors, ``(d_out, k)``; None for ``of="A"``, or if not asked for.
    S
        Singular values, ``(k,)``, descending, with k = min(r, d_out, d_in). For ``"delta"`` they
        include the scale, unless ``in_units_of_scale``.
    V
        Right singular vectors, ``(d_in, k)``; None for ``of="B"``, or if not asked for.
    of
        Whose singular vectors: ``"delta"`` (ΔW), ``"A"`` or ``"B"`` alone.
    numerical_rank
        How many singular values stand above the error of the arithmetic; 0 is "untrained".
    rank
        The rank the adapter was given.
    factor_condition
        κ(B̂) + κ(Â), the conditions of the factors with unit columns and rows; NaN for a dense
        update and for one factor alone.
    in_units_of_scale
        True if the scale is not known: S must then be multiplied by it.
    """

    name: str
    U: NDArray[np.float64] | None
    S: NDArray[np.float64]
    V: NDArray[np.float64] | None
    of: VectorsOf
    numerical_rank: int
    rank: int
    shape: tuple[int, int]
    in_units_of_scale: bool = False
    stored_dtype: str = "float32"
    label: str = ""
    factor_condition: float = float("nan")

    def __post_init__(self) -> None:
        for array in (self.U, self.S, self.V):
            if array is not None:
                array.flags.writeable = False

    @property
    def is_dense(self) -> bool:
        """True for the spectrum of a dense update, which has every direction there is."""
        return self.of == "delta" and bool(np.isnan(self.factor_condition))

    @property
    def untrained(self) -> bool:
        """True if ΔW is zero to the accuracy of the arithmetic: no direction exists."""
        return self.numerical_rank == 0

    @property
    def norm(self) -> float:
        """Frobenius norm, √Σσ²."""
        largest = float(self.S[0])
        return largest * float(np.linalg.norm(self.S / largest)) if largest > 0 else 0.0

    @property
    def _relative(self) -> NDArray[np.float64]:
        """σ/σ₁ up to the numerical rank: its squares neither over- nor underflow."""
        s = self.S[: self.numerical_rank]
        return s / s[:1]

    @property
    def gaps(self) -> NDArray[np.float64]:
        """Relative gaps ``(σ_i − σ_{i+1})/σ_i`` up to the numerical rank; the last one is 1.

        A top-i subspace is as well defined as its gap is large.
        """
        s = self.S[: self.numerical_rank]
        return 1.0 - np.append(s[1:], 0.0) / s

    @property
    def rounding_error(self) -> float:
        """η: how far the stored type may have moved each σ, relative, against before rounding.

        ``½·eps(stored)·√r·(κ(B̂) + κ(Â))``; where r exceeds a dimension, with
        ``2‖B‖₂‖A‖₂/σ_min`` in the bracket's place, since κ is infinite there. From 1 on the
        smallest singular values are those of the rounding, not of the training. NaN if there
        is no bound (dense, untrained).
        """
        if self.untrained:
            return float("nan")
        return 0.5 * self._stored_eps * float(np.sqrt(self.rank)) * self.factor_condition

    @property
    def below_precision(self) -> bool:
        """True if the smallest singular values are below storage precision (η ≥ 1)."""
        return self.rounding_error >= 1

    @property
    def _stored_eps(self) -> float:
        return _STORED_EPS.get(self.stored_dtype, _STORED_EPS["float32"])

    @property
    def degenerate(self) -> NDArray[np.bool_]:
        """For each i, whether the gap is below the rounding of the stored type."""
        # Values that coincide exactly come out of the SVD a few ulp apart.
        return self.gaps < max(self._stored_eps, 4 * self.rank * linalg.EPS)

    @property
    def nearly_degenerate(self) -> NDArray[np.bool_]:
        """For each i, whether the gap is below 0.05: the top-i subspace may be turned by noise."""
        return self.gaps < NEARLY_DEGENERATE_GAP

    @property
    def effective_rank(self) -> float:
        """``exp(−Σ p ln p)`` with ``p = σ/Σσ`` (Roy & Vetterli 2007); 0 if untrained."""
        return _entropy_rank(self._relative)

    @property
    def effective_rank_energy(self) -> float:
        """The same exponential entropy with ``p = σ²/Σσ²``; 0 if untrained."""
        return _entropy_rank(self._relative**2)

    @property
    def stable_rank(self) -> float:
        """``‖ΔW‖_F²/σ₁²``; 0 if untrained."""
        return 0.0 if self.untrained else float(np.sum((self.S / self.S[0]) ** 2))

    @property
    def participation_ratio(self) -> float:
        """``(Σσ²)²/Σσ⁴``: how many equal directions would spread the energy alike."""
        if self.untrained:
            return 0.0
        energy = (self.S / self.S[0]) ** 2
        return float(np.sum(energy) ** 2 / np.sum(energy**2))

    @property
    def energy_shares(self) -> NDArray[np.float64]:
        """``Σ_{i≤k}σ_i²/Σσ²`` for k = 1…numerical rank, rising to exactly 1; empty if untrained."""
        energy = np.cumsum(self._relative**2)
        return energy / energy[-1:]

    def energy_rank(self, share: float) -> int:
        """Return the smallest k whose leading directions hold ``share`` of Σσ²; 0 if untrained."""
        if not 0 < share <= 1:
            message = f"The energy share must be in (0, 1], got {share}."
            raise InputError(message)
        # A hair below the share: one that falls on a step is not lost to rounding.
        below = np.searchsorted(self.energy_shares, share * (1 - 4 * linalg.EPS))
        return 0 if self.untrained else int(below) + 1

    def _repr_html_(self) -> str:
        of = "ΔW" if self.of == "delta" else self.of
        facts = [
            ("shape", " × ".join(map(str, self.shape))),
            ("rank", self.rank),
            ("numerical rank", self.numerical_rank),
            ("effective rank", self.effective_rank),
            ("stable rank", self.stable_rank),
            ("directions for 90 % of the energy", self.energy_rank(0.9)),
            ("norm, in units of the scale" if self.in_units_of_scale else "norm", self.norm),
            ("leading singular values", ", ".join(f"{sigma:.3g}" for sigma in self.S[:6])),
        ]
        table = html_facts(f"Spectrum of {of}, {self.name}, {self.label}", facts)
        return table + curve(self.S, self.numerical_rank)

    def __repr__(self) -> str:
        of = "ΔW" if self.of == "delta" else self.of
        shape = " × ".join(map(str, self.shape))
        unit = " in units of the scale" if self.in_units_of_scale else ""
        return (
            f"<Spectrum of {of}, {self.name!r} in {self.label or 'update'!r}: {shape}, rank "
            f"{self.rank}, numerical rank {self.numerical_rank}, norm {self.norm:.4g}{unit}>"
        )

    def leading(self, k: int) -> Spectrum:
        """Return the ``k`` strongest directions alone, at most the numerical rank of them."""
        count = max(min(k, self.numerical_rank), 1)
        U, V = (None if basis is None else basis[:, :count] for basis in (self.U, self.V))
        rank = min(self.numerical_rank, count)
        return replace(self, U=U, S=self.S[:count], V=V, numerical_rank=rank)

    def summary(self) -> dict[str, float]:
        """Return a few numbers of the spectrum, for tables over modules."""
        return {
            "rank": self.rank,
            "numerical rank": self.numerical_rank,
            "norm": self.norm,
            "σ₁": float(self.S[0]),
            "stable rank": self.stable_rank,
            "effective rank": self.effective_rank,
        }

    def to_frame(self) -> pd.DataFrame:
        """Return one row per singular value, up to the numerical rank."""
        count = self.numerical_rank
        columns = (range(1, count + 1), self.S, self.gaps, self.energy_shares)
        rows = zip(*(values[:count] for values in columns), strict=True)
        names = ("i", "sigma", "gap", "energy_share")
        return frame([dict(zip(names, row, strict=True)) for row in rows], names)

    def vectors(self, side: Side) -> NDArray[np.float64]:
        """Return the singular vectors of one side up to the numerical rank, ``(d, n)``.

        Raises
        ------
        InputError
            The factor has no vectors on that side (A: input only, B: output only), or the
            spectrum was computed without vectors.
        """
        check_side(side, self.of)
        basis = self.V if side == "input" else self.U
        if basis is None:
            message = (
                f"The {side} directions of '{self.name}' in {self.label or 'the update'} were "
                "asked for, but its spectrum was computed with vectors=False."
            )
            raise InputError(message)
        return basis[:, : self.numerical_rank]

    def basis(self, side: Side, k: int) -> NDArray[np.float64]:
        """Return the top-k directions of one side as orthonormal columns, ``(d, k)``.

        Raises
        ------
        DegenerateSubspaceError
            k exceeds the numerical rank, or the k-th and the next singular value coincide to
            the rounding of the stored type.
        """
        vectors = self.vectors(side)
        if k < 1:
            message = f"A subspace needs k >= 1 directions, got k = {k}."
            raise InputError(message)
        subspace = f"Top-{k} {side} subspace of '{self.name}' in {self.label or 'the update'}"
        if self.untrained:
            message = f"{subspace} is undefined: the update is zero (untrained: B starts at zero)."
            raise DegenerateSubspaceError(message)
        if k > self.numerical_rank:
            reason = f"its numerical rank is {self.numerical_rank}"
            if k <= len(self.S):
                reason += f" (sigma_{k} is {self.S[k - 1] / self.S[0]:.0e} x sigma_1)"
            message = f"{subspace} is undefined: {reason}. Use k <= {self.numerical_rank}."
            raise DegenerateSubspaceError(message)
        if self.degenerate[k - 1]:
            message = (
                f"{subspace} is undefined: sigma_{k} and sigma_{k + 1} differ by "
                f"{self.gaps[k - 1]:.1e} (relative), less than {self.stored_dtype} resolves. "
                "Choose another k."
            )
            raise DegenerateSubspaceError(message)
        return vectors[:, :k]


def _entropy_rank(weights: NDArray[np.float64]) -> float:
    if not weights.size:
        return 0.0
    p = weights / weights.sum()
    p = p[p > 0]  # squares of tiny values may underflow
    return float(np.exp(-np.sum(p * np.log(p))))


def default_side(of: str) -> Side:
    """Return the side that is compared by default: output, input for the vectors of A."""
    return "input" if of == "A" else "output"


def check_side(side: str, of: str) -> None:
    """Raise InputError unless ``side`` and ``of`` name something that exists."""
    if side not in SIDES:
        message = f"side must be 'input' or 'output', got {side!r}."
        raise InputError(message)
    allowed = {"delta": SIDES, "A": ("input",), "B": ("output",)}
    if of not in allowed:
        message = f"of must be 'delta', 'A' or 'B', got {of!r}."
        raise InputError(message)
    if side not in allowed[of]:
        message = (
            f"of={of!r} has no {side} side: A spans input directions only, B output "
            f"directions only. Use side={allowed[of][0]!r}, or of='delta'."
        )
        raise InputError(message)
