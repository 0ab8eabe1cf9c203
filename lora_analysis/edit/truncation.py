"""One update by its leading singular directions, and what that loses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_analysis import linalg
from lora_analysis.adapter import NOT_STORED, DenseUpdate, LowRankUpdate, UpdateOutline
from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.spectra import Spectrum, leading_spectrum, spectrum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from lora_analysis.adapter import Update

# Directions of a dense update looked for at first, where an energy share is asked of it.
_FIRST_LOOK = 16
# Relative difference of factors below which their Gram matrices give the distance.
_NEARLY_EQUAL = 1e-7
# Elements of a factor that are widened at a time.
_WIDENED = 1 << 16
# Rows of a dense update whose rest is formed at a time: about a million elements.
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Truncation:
    """What became of one module.

    ``given_rank`` and ``rank`` are those before and after; 0 after is a module that was left out.
    ``norm`` is ‖ΔW‖_F before and ``lost`` ``√(Σ_{i>k}σ²)``, the norm of what is gone, both in
    units of the scale where that is not known.
    """

    module: str
    shape: tuple[int, int]
    given_rank: int
    given_parameters: int
    rank: int
    norm: float
    lost: float

    @property
    def error(self) -> float:
        """``√(Σ_{i>k}σ²)/‖ΔW‖_F``, from 0 to 1; 0 where ΔW was zero."""
        return self.lost / self.norm if self.norm > 0 else 0.0

    @property
    def parameters(self) -> int:
        """Numbers in the two factors afterwards."""
        return self.rank * sum(self.shape)


def truncate(
    update: Update, *, rank: int | None = None, energy: float | None = None
) -> tuple[LowRankUpdate, Truncation]:
    """Return the best approximation of an update by fewer directions, and what it loses.

    With ``ΔW = U·diag(σ)·Vᵀ`` from its factors, ``B' = U_k·√σ_k`` and ``A' = √σ_k·V_kᵀ``: no
    matrix of rank k is closer in Frobenius or spectral norm (Eckart & Young). The scale is folded
    into the factors: that of the result is 1 and its alpha the new rank, or both stay unknown.

    Parameters
    ----------
    update
        Low-rank or dense.
    rank
        Directions to keep. One larger than the numerical rank is not filled up with zeros.
    energy
        Share of Σσ² to keep at least, in (0, 1], instead of a rank.

    Returns
    -------
    tuple
        The new update, of rank ``min(rank, numerical rank)``, in float64; and what was lost. An
        update that is zero becomes one of rank 1 with ``B = 0``. Of DoRA's the low-rank part is
        resized, the magnitude stays, and the error is the part's.

    Raises
    ------
    InputError
        Not exactly one of rank and energy is given, or it is out of its range.
    UnsupportedMethodError
        The update is a part of a method whose other part depends on the rank (KaSA).

    Notes
    -----
    ``O((d_out + d_in)·r² + r³)``; a dense update takes as many leading directions as it needs.

    Examples
    --------
    >>> A, B = np.eye(2, 5), np.eye(7, 2) * [4.0, 3.0]
    >>> small, lost = truncate(LowRankUpdate(name="q", A=A, B=B, scale=2.0), rank=1)
    >>> small.rank, small.scale, lost.error
    (1, 1.0, 0.6)
    """
    if isinstance(update, LowRankUpdate):
        lost, count = measure(update, rank=rank, energy=energy)
        return leading_part(update, count), lost
    check_size(rank=rank, energy=energy)
    kept = _kept(update, rank, energy)
    new = from_directions(update, kept.U, kept.S, kept.V)
    return new, _truncation(update, new.rank, kept.norm, kept.lost)


def measure(
    update: LowRankUpdate, *, rank: int | None = None, energy: float | None = None
) -> tuple[Truncation, int]:
    """Return what `truncate` would lose of a low-rank update, and how many directions it keeps.

    Parameters and errors are those of `truncate`. No singular vectors are computed. The count is 0
    for an update that is zero.
    """
    check_size(rank=rank, energy=energy)
    refuse_parts(update)
    found = spectrum(update, vectors=False)
    count = min(rank or found.energy_rank(energy or 1.0), found.numerical_rank)
    lost = _norm(found.S[count : found.numerical_rank])
    return _truncation(update, max(count, 1), found.norm, lost), count


def leading_outline(update: LowRankUpdate, count: int) -> UpdateOutline:
    """Return the outline of what `leading_part` makes of an update."""
    known = update.scale is not None
    rank = max(count, 1)
    return replace(
        UpdateOutline.of(update),
        rank=rank,
        scale=1.0 if known else None,
        alpha=float(rank) if known else None,
        stored_dtype="float64" if count else update.A.dtype.name,
    )


def leading_part(update: LowRankUpdate, count: int) -> LowRankUpdate:
    """Return an update by a number of its leading singular directions, balanced, of scale 1.

    At most its factors, those of the result and a few rows are in memory.
    """
    if not count:
        empty = np.zeros((0, 0))
        return from_directions(update, empty, np.zeros(0), empty)
    svd = linalg.factored_svd(update.B, update.A, vectors=count)
    scale = 1.0 if update.scale is None else update.scale
    root = np.sqrt(abs(scale) * svd.S[:count])
    B, V = np.asarray(svd.U), np.asarray(svd.V)
    B *= root
    V *= np.copysign(root, scale)
    new = leading_outline(update, count)
    return replace(
        update, A=V.T, B=B, scale=new.scale, alpha=new.alpha, stored_dtype="", stored_at=NOT_STORED
    )


def _truncation(update: Update, rank: int, norm: float, lost: float) -> Truncation:
    return Truncation(
        module=update.name,
        shape=update.shape,
        given_rank=update.rank,
        given_parameters=parameters_of(update),
        rank=rank,
        norm=norm,
        lost=lost,
    )


def relative_difference(one: Update, other: Update) -> float:
    """Return ``‖ΔW₁ - ΔW₂‖_F/‖ΔW₂‖_F``, of low-rank updates from their factors.

    0 where both are zero; the scales must be known. Accurate to about 1e-15 times the norms of
    the factors, however close the two are.
    """
    if isinstance(one, LowRankUpdate) and isinstance(other, LowRankUpdate):
        apart = _small_distance(one, other)
        if apart is None:
            scales = one.known_scale(), other.known_scale()
            B = np.hstack([scales[0] * one.B.astype(np.float64), -scales[1] * other.B])
            apart = _norm(linalg.factored_singular_values(B, np.vstack([one.A, other.A])))
    else:
        apart = float(np.linalg.norm(one.delta_weight() - other.delta_weight()))
    norm = spectrum(other, vectors=False).norm
    return apart / norm if norm > 0 else (0.0 if apart == 0 else float("inf"))


def _small_distance(one: LowRankUpdate, other: LowRankUpdate) -> float | None:
    """Return ``‖ΔW₁ - ΔW₂‖_F`` of updates whose factors are nearly equal, else None.

    ``s₁B₁A₁ - s₂B₂A₂ = s₁B₁(A₁ - A₂) + (s₁B₁ - s₂B₂)A₂``, whose norm follows from the Gram matrices
    of both sides, a few rows at a time. They lose half of the digits: with differences below 1e-7
    of the factors, 1e-15 of their norms.
    """
    if one.A.shape != other.A.shape or one.B.shape != other.B.shape:
        return None
    scales = one.known_scale(), other.known_scale()
    left = _gram_with_difference(one.B, other.B, *scales)
    right = _gram_with_difference(other.A.T, one.A.T, 1.0, 1.0)
    r = one.rank
    for gram in (left, right):
        if not np.trace(gram[r:, r:]) <= _NEARLY_EQUAL**2 * np.trace(gram[:r, :r]) < np.inf:
            return None
    # [s₁B₁, D_B] meets [-D_A; A₂]: the second side was made of A₂ first, and of A₂ - A₁.
    turned = np.roll(right, (r, r), (0, 1))
    turned[:r] *= -1
    turned[:, :r] *= -1
    return float(np.sqrt(max(np.sum(left * turned), 0.0)))


def _gram_with_difference(
    first: NDArray[np.floating], second: NDArray[np.floating], scale: float, other: float
) -> NDArray[np.float64]:
    """Return the Gram matrix of ``[s₁M₁, s₁M₁ - s₂M₂]`` for tall matrices, by blocks of rows."""
    total = np.zeros((2 * first.shape[1],) * 2)
    rows = max(1, _WIDENED // first.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at what comes out
        for top in range(0, len(first), rows):
            block = scale * first[top : top + rows].astype(np.float64)
            apart = block - other * second[top : top + rows]
            both = np.hstack([block, apart])
            total += both.T @ both
    return total


def check_size(**asked: float | None) -> None:
    """Raise unless exactly one of rank, energy, budget is given and lies in its range."""
    given = {key: value for key, value in asked.items() if value is not None}
    if len(given) != 1:
        message = f"Give exactly one of {', '.join(asked)}; got {', '.join(given) or 'none'}."
        raise InputError(message)
    ((key, value),) = given.items()
    whole = key != "energy"
    if whole and (value != int(value) or value < 1):
        message = f"{key} must be a whole number of at least 1, got {value!r}."
        raise InputError(message)
    if not whole and not 0 < value <= 1:
        message = f"An energy share lies in (0, 1], got {value!r}."
        raise InputError(message)


def refuse_parts(update: Update) -> None:
    """Raise for the part of a method whose other part depends on the directions of this one."""
    if isinstance(update, LowRankUpdate) and update.variant not in ("", "DoRA"):
        message = (
            f"'{update.name}' in {update.label or 'this adapter'} is a part of {update.variant}, "
            "whose other part depends on the rank. Edit its effective update instead "
            "(lora_analysis.effective_update, which needs the base)."
        )
        raise UnsupportedMethodError(message)


def parameters_of(update: Update) -> int:
    """Return how many numbers an update is stored in."""
    if isinstance(update, LowRankUpdate):
        return update.rank * sum(update.shape)
    return update.shape[0] * update.shape[1]


def from_directions(
    update: Update, U: NDArray[np.float64], S: NDArray[np.float64], V: NDArray[np.float64]
) -> LowRankUpdate:
    """Return ``U·diag(S)·Vᵀ`` as the new low-rank update of a module, balanced, of scale 1.

    ``S`` includes the scale, where it is known. Without directions B is zero.
    """
    known = not isinstance(update, LowRankUpdate) or update.scale is not None
    root = np.sqrt(S)
    A: NDArray[np.floating] = root[:, None] * V.T
    B = U * root
    if not len(S):
        B = np.zeros((update.shape[0], 1))
        A = update.A[:1] if isinstance(update, LowRankUpdate) else np.zeros((1, update.shape[1]))
    scale, alpha = (1.0, float(B.shape[1])) if known else (None, None)
    if isinstance(update, LowRankUpdate):
        return replace(
            update, A=A, B=B, scale=scale, alpha=alpha, stored_dtype="", stored_at=NOT_STORED
        )
    return LowRankUpdate(
        name=update.name,
        A=A,
        B=B,
        scale=scale,
        alpha=alpha,
        layout=update.layout,
        kernel=update.kernel,
        label=update.label,
    )


class _Kept(NamedTuple):
    """Leading directions, the norm of all, and of those that are not among them."""

    U: NDArray[np.float64]
    S: NDArray[np.float64]
    V: NDArray[np.float64]
    norm: float
    lost: float


def _kept(update: DenseUpdate, rank: int | None, energy: float | None) -> _Kept:
    if min(update.shape) > linalg.DENSE_SVD_LIMIT:
        return _kept_of_large(update, rank, energy)
    found = spectrum(update)
    k = min(rank or found.energy_rank(energy or 1.0), found.numerical_rank)
    return _Kept(*_leading(found, k), found.norm, _norm(found.S[k : found.numerical_rank]))


def _kept_of_large(update: DenseUpdate, rank: int | None, energy: float | None) -> _Kept:
    """Return the same by an iteration for the leading part; the rest is formed to be measured."""
    norm = float(np.sqrt(sum(float(np.vdot(part, part)) for _, part in _row_blocks(update))))
    full = min(update.shape)
    wanted = min(rank or _FIRST_LOOK, full)
    found = leading_spectrum(update, wanted)
    k = found.numerical_rank if energy is None else _count_for(found, energy * norm**2)
    while k is None:
        wanted = min(4 * wanted, full)
        found = leading_spectrum(update, wanted)
        k = _count_for(found, (energy or 1.0) * norm**2)
    u, s, v = _leading(found, k)
    rest = sum(float(np.sum((p - (u[at] * s) @ v.T) ** 2)) for at, p in _row_blocks(update))
    return _Kept(u, s, v, norm, float(np.sqrt(rest)))


def _count_for(found: Spectrum, energy: float) -> int | None:
    """Return how many leading directions hold an energy; None where those found do not."""
    held = np.cumsum(found.S**2)
    reached = int(np.searchsorted(held, energy * (1 - 1e-9))) + 1
    if reached <= len(held):
        return min(reached, found.numerical_rank)
    return found.numerical_rank if len(held) == min(found.shape) else None


def _leading(
    found: Spectrum, k: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    return found.vectors("output")[:, :k], found.S[:k], found.vectors("input")[:, :k]


def _row_blocks(update: DenseUpdate) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield a dense update some rows at a time, in float64."""
    rows = max(1, _BLOCK // update.shape[1])
    for top in range(0, update.shape[0], rows):
        at = slice(top, min(top + rows, update.shape[0]))
        yield at, update.delta[at].astype(np.float64)


def _norm(values: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(values))
