"""The spectrum of an update: singular values and vectors of ΔW, and the ranks read from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from lora_analysis import linalg
from lora_analysis.adapter import DenseUpdate, LowRankUpdate, Update
from lora_analysis.errors import DegenerateSubspaceError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Side = Literal["input", "output"]
Factor = Literal["delta", "A", "B"]

SIDES: tuple[Side, Side] = ("input", "output")

# Relative gaps below this let rounding or a few training steps turn the subspace: "soft".
SOFT_GAP = 0.05

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
        Left singular vectors, ``(d_out, k)``; None for ``factor="A"``.
    S
        Singular values, ``(k,)``, descending, with k = min(r, d_out, d_in). For ``"delta"`` they
        include the scale, unless ``in_units_of_scale``.
    V
        Right singular vectors, ``(d_in, k)``; None for ``factor="B"``.
    factor
        Whose singular vectors: ``"delta"`` (ΔW), ``"A"`` or ``"B"`` alone.
    numerical_rank
        How many singular values stand above the error of the arithmetic; 0 is "untrained".
    rank
        The rank the adapter was given.
    in_units_of_scale
        True where the scale is not known: S must then be multiplied by it.
    """

    name: str
    U: NDArray[np.float64] | None
    S: NDArray[np.float64]
    V: NDArray[np.float64] | None
    factor: Factor
    numerical_rank: int
    rank: int
    shape: tuple[int, int]
    in_units_of_scale: bool = False
    stored_dtype: str = "float32"
    label: str = ""

    def __post_init__(self) -> None:
        for array in (self.U, self.S, self.V):
            if array is not None:
                array.flags.writeable = False

    @property
    def untrained(self) -> bool:
        """True where ΔW is zero to the accuracy of the arithmetic: no direction exists."""
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
    def undefined(self) -> NDArray[np.bool_]:
        """For each i, whether the gap is below the resolution of the stored type."""
        stored = _STORED_EPS.get(self.stored_dtype, _STORED_EPS["float32"])
        # Values that coincide exactly come out of the SVD a few ulp apart.
        return self.gaps < max(stored, 4 * self.rank * linalg.EPS)

    @property
    def soft(self) -> NDArray[np.bool_]:
        """For each i, whether the gap is below 0.05: the top-i subspace may be turned by noise."""
        return self.gaps < SOFT_GAP

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

    def energy_rank(self, share: float) -> int:
        """Return the smallest k whose leading directions hold ``share`` of Σσ²; 0 if untrained."""
        if not 0 < share <= 1:
            message = f"An energy share lies in (0, 1], got {share}."
            raise InputError(message)
        if self.untrained:
            return 0
        energy = np.cumsum(self._relative**2)
        # A hair below the share, so that share = 1 is not lost to rounding of the total.
        return int(np.searchsorted(energy, share * energy[-1] * (1 - 4 * linalg.EPS))) + 1

    def vectors(self, side: Side) -> NDArray[np.float64]:
        """Return the singular vectors of one side up to the numerical rank, ``(d, n)``.

        Raises
        ------
        InputError
            The factor has no vectors on that side (A: input only, B: output only).
        """
        check_side(side, self.factor)
        basis = self.V if side == "input" else self.U
        return cast("NDArray[np.float64]", basis)[:, : self.numerical_rank]

    def basis(self, side: Side, k: int) -> NDArray[np.float64]:
        """Return the top-k directions of one side as orthonormal columns, ``(d, k)``.

        Raises
        ------
        DegenerateSubspaceError
            k exceeds the numerical rank, or the k-th and the next singular value coincide to
            the resolution of the stored type.
        """
        vectors = self.vectors(side)
        if k < 1:
            message = f"A subspace needs k >= 1 directions, got k = {k}."
            raise InputError(message)
        if k > self.numerical_rank:
            raise DegenerateSubspaceError(self._beyond_rank(side, k))
        if self.undefined[k - 1]:
            message = (
                f"Top-{k} {side} subspace of '{self.name}' in {self.label or 'the update'} is "
                f"undefined: sigma_{k} and sigma_{k + 1} differ by {self.gaps[k - 1]:.1e} "
                f"(relative), less than {self.stored_dtype} resolves. Choose another k."
            )
            raise DegenerateSubspaceError(message)
        return vectors[:, :k]

    def _beyond_rank(self, side: Side, k: int) -> str:
        where = f"Top-{k} {side} subspace of '{self.name}' in {self.label or 'the update'}"
        if self.untrained:
            return f"{where} is undefined: the update is zero (untrained: B starts at zero)."
        found = f"its numerical rank is {self.numerical_rank}"
        if k <= len(self.S):
            found += f" (sigma_{k} is {self.S[k - 1] / self.S[0]:.0e} x sigma_1)"
        return f"{where} is undefined: {found}. Use k <= {self.numerical_rank}."


def _entropy_rank(weights: NDArray[np.float64]) -> float:
    if not weights.size:
        return 0.0
    p = weights / weights.sum()
    p = p[p > 0]  # squares of tiny values may underflow
    return float(np.exp(-np.sum(p * np.log(p))))


def check_side(side: str, factor: str) -> None:
    """Raise InputError unless ``side`` and ``factor`` name something that exists."""
    if side not in SIDES:
        message = f"side must be 'input' or 'output', got {side!r}."
        raise InputError(message)
    allowed = {"delta": SIDES, "A": ("input",), "B": ("output",)}
    if factor not in allowed:
        message = f"factor must be 'delta', 'A' or 'B', got {factor!r}."
        raise InputError(message)
    if side not in allowed[factor]:
        message = (
            f"factor={factor!r} has no {side} side: A spans input directions only, B output "
            f"directions only. Use side={allowed[factor][0]!r}, or factor='delta'."
        )
        raise InputError(message)


def _numerical_rank(S: NDArray[np.float64], rank: int, factor_norms: float) -> int:
    """Count singular values above the arithmetic's error, ``4r·2⁻⁵²·‖B‖₂‖A‖₂``.

    The stored factors are the adapter: the cut lies at the error of float64 arithmetic on them,
    never at the resolution of the stored type, which would call half-precision files untrained.
    Zero wherever ‖BA‖_F ≤ 2⁻⁵²·‖B‖_F‖A‖_F, since no σ is then above r·2⁻⁵²·‖B‖₂‖A‖₂.
    """
    return int(np.count_nonzero(4 * rank * linalg.EPS * factor_norms < S))


def _delta_spectrum(update: LowRankUpdate) -> Spectrum:
    svd = linalg.factored_svd(
        update.B.astype(np.float64, copy=False), update.A.astype(np.float64, copy=False)
    )
    scale = 1.0 if update.scale is None else update.scale
    found = _numerical_rank(svd.S, update.rank, float(svd.B_norm * svd.A_norm))
    return Spectrum(
        name=update.name,
        U=svd.U,
        S=abs(scale) * svd.S,
        V=svd.V if scale >= 0 else -svd.V,
        factor="delta",
        numerical_rank=found if scale != 0 else 0,
        rank=update.rank,
        shape=update.shape,
        in_units_of_scale=update.scale is None,
        stored_dtype=update.stored_dtype,
        label=update.label,
    )


def _factor_spectrum(update: LowRankUpdate, factor: Literal["A", "B"]) -> Spectrum:
    """Return the spectrum of one factor alone: right vectors of A, or left vectors of B."""
    matrix = (update.A.T if factor == "A" else update.B).astype(np.float64)
    q, r = np.linalg.qr(matrix)
    left, values, _ = np.linalg.svd(r, full_matrices=False)
    vectors = q @ left
    vectors = vectors * linalg.column_signs(vectors)
    cut = 4 * update.rank * linalg.EPS * values[0]
    return Spectrum(
        name=update.name,
        U=vectors if factor == "B" else None,
        S=values,
        V=vectors if factor == "A" else None,
        factor=factor,
        numerical_rank=int(np.count_nonzero(values > cut)),
        rank=update.rank,
        shape=update.shape,
        stored_dtype=update.stored_dtype,
        label=update.label,
    )


def _dense_spectrum(update: DenseUpdate) -> Spectrum:
    u, s, vt = np.linalg.svd(update.delta.astype(np.float64), full_matrices=False)
    sign = linalg.column_signs(u)
    return Spectrum(
        name=update.name,
        U=u * sign,
        S=s,
        V=vt.T * sign,
        factor="delta",
        numerical_rank=int(np.count_nonzero(s > max(update.shape) * linalg.EPS * s[0])),
        rank=update.rank,
        shape=update.shape,
        stored_dtype=update.stored_dtype,
        label=update.label,
    )


def spectrum(update: Update | Spectrum, *, factor: Factor = "delta") -> Spectrum:
    """Return the singular values and vectors of ΔW = s·B·A, or of one factor alone.

    ΔW is never formed: QR of both factors and the SVD of an r × r core, in float64. The absolute
    error of each singular value is about 1e-15·s‖B‖₂‖A‖₂.

    Parameters
    ----------
    update
        A low-rank or dense update; a Spectrum is given back as it is if its factor fits.
    factor
        ``"delta"`` for ΔW; ``"A"`` for the right singular vectors of A alone (what the LoRA paper
        plots), ``"B"`` for the left ones of B alone. Those two depend on how ΔW is split into
        factors; only the span of all r directions does not.

    Raises
    ------
    InputError
        An unknown factor, or a factor of a dense update.

    Notes
    -----
    O((d_out + d_in)·r² + r³) for a low-rank update.

    Examples
    --------
    >>> import numpy as np
    >>> update = LowRankUpdate(name="q", A=np.eye(2, 5), B=2 * np.eye(7, 2), scale=0.5)
    >>> spectrum(update).S
    array([1., 1.])
    """
    if isinstance(update, Spectrum):
        if update.factor != factor:
            message = f"This spectrum is of factor {update.factor!r}, asked for {factor!r}."
            raise InputError(message)
        return update
    if factor not in ("delta", "A", "B"):
        message = f"factor must be 'delta', 'A' or 'B', got {factor!r}."
        raise InputError(message)
    if isinstance(update, DenseUpdate):
        if factor != "delta":
            message = f"'{update.name}' is a dense update and has no factor {factor}."
            raise InputError(message)
        return _dense_spectrum(update)
    return _delta_spectrum(update) if factor == "delta" else _factor_spectrum(update, factor)


def singular_values(update: Update) -> NDArray[np.float64]:
    """Return the singular values of ΔW, descending, ``(min(r, d_out, d_in),)``; no vectors.

    In units of the scale where it is not known.

    Examples
    --------
    >>> import numpy as np
    >>> singular_values(LowRankUpdate(name="q", A=np.eye(2, 5), B=np.eye(7, 2), scale=3.0))
    array([3., 3.])
    """
    if isinstance(update, DenseUpdate):
        return np.linalg.svd(update.delta.astype(np.float64), compute_uv=False)
    scale = 1.0 if update.scale is None else abs(update.scale)
    return scale * linalg.factored_singular_values(
        update.B.astype(np.float64, copy=False), update.A.astype(np.float64, copy=False)
    )
