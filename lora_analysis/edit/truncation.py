"""Truncate one update to its leading singular directions, and measure the error."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis import linalg
from lora_analysis.adapter import NOT_STORED, ROW_ORDERS, DenseUpdate, LowRankUpdate, UpdateOutline
from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats import as_update
from lora_analysis.spectra import Spectrum, leading_spectrum, spectrum, update_svd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from lora_analysis.adapter import Update

# Leading directions of a dense update computed first if an energy share is requested.
_FIRST_COUNT = 16
# Relative difference of factors below which their Gram matrices give the distance.
_NEARLY_EQUAL = 1e-7
# Elements of a factor that are widened at a time.
_WIDENED = 1 << 15
# Elements of a dense update that are processed at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Truncation:
    """Sizes and error of one truncated module.

    ``given_rank`` and ``rank`` are those before and after; 0 after is a module that was left out.
    ``norm`` is ‖ΔW‖_F before and ``error_norm`` ``√(Σ_{i>k}σ²)``, the norm of the difference, in
    units of the scale if that is unknown.
    """

    module: str
    shape: tuple[int, int]
    given_rank: int
    given_parameters: int
    rank: int
    norm: float
    error_norm: float

    @property
    def error(self) -> float:
        """``√(Σ_{i>k}σ²)/‖ΔW‖_F``, from 0 to 1; 0 if ΔW was zero."""
        return self.error_norm / self.norm if self.norm > 0 else 0.0

    @property
    def parameters(self) -> int:
        """Number of parameters in the two factors afterwards."""
        return self.rank * sum(self.shape)


def truncate(
    update: Any, *, rank: int | None = None, energy: float | None = None
) -> tuple[LowRankUpdate, Truncation]:
    """Return the best approximation of an update by fewer directions, and its error.

    With ``ΔW = U·diag(σ)·Vᵀ`` from its factors, ``B' = U_k·√σ_k`` and ``A' = √σ_k·V_kᵀ``: no
    matrix of rank k is closer in Frobenius or spectral norm (Eckart & Young). The scale is folded
    into the factors: that of the result is 1 and its alpha the new rank, or both stay unknown.

    Parameters
    ----------
    update
        Low-rank or dense, in any form that :func:`as_update` takes.
    rank
        Number of directions to keep. One above the numerical rank is not padded with zeros.
    energy
        Share of Σσ² to keep at least, in (0, 1], instead of a rank.

    Returns
    -------
    tuple
        The new update, of rank ``min(rank, numerical rank)``, in float64; and its error. An
        update that is zero becomes one of rank 1 with ``B = 0``. For DoRA the low-rank part is
        truncated, the magnitude stays, and the error is that of the part.

    Raises
    ------
    InputError
        Not exactly one of rank and energy is given, or it is out of its range.
    UnsupportedMethodError
        The update is a part of a method whose other part depends on the rank (KaSA).

    Notes
    -----
    ``O((d_out + d_in)·r² + r³)``; for a dense update, as many leading directions as are needed.

    Examples
    --------
    >>> A, B = np.eye(2, 5), np.eye(7, 2) * [4.0, 3.0]
    >>> small, truncation = truncate(LowRankUpdate(name="q", A=A, B=B, scale=2.0), rank=1)
    >>> small.rank, small.scale, truncation.error
    (1, 1.0, 0.6)
    """
    update = as_update(update)
    if isinstance(update, LowRankUpdate):
        truncation, count = measure_truncation(update, rank=rank, energy=energy)
        return leading_part(update, count), truncation
    check_size(rank=rank, energy=energy)
    if min(update.shape) > linalg.DENSE_SVD_LIMIT:
        # The leading part is iterated; the rest is formed block by block to measure it.
        norm = math.sqrt(sum(float(np.vdot(part, part)) for _, part in _row_blocks(update)))
        full = min(update.shape)
        count = min(rank or _FIRST_COUNT, full)
        leading = leading_spectrum(update, count)
        k = leading.numerical_rank if energy is None else _energy_count(leading, energy * norm**2)
        while k is None:
            count = min(4 * count, full)
            leading = leading_spectrum(update, count)
            k = _energy_count(leading, (energy or 1.0) * norm**2)
        U, S, V = _leading_vectors(leading, k)
        blocks = (block - (U[rows] * S) @ V.T for rows, block in _row_blocks(update))
        error_norm = math.sqrt(sum(float(np.sum(rest**2)) for rest in blocks))
    else:
        whole = spectrum(update)
        k = min(rank or whole.energy_rank(energy or 1.0), whole.numerical_rank)
        U, S, V = _leading_vectors(whole, k)
        norm, error_norm = whole.norm, float(np.linalg.norm(whole.S[k : whole.numerical_rank]))
    new = from_directions(update, U, S, V)
    return new, _truncation(update, new.rank, norm, error_norm)


def measure_truncation(
    update: LowRankUpdate, *, rank: int | None = None, energy: float | None = None
) -> tuple[Truncation, int]:
    """Return the error of `truncate` for a low-rank update, and the number of directions kept.

    Parameters and errors are those of `truncate`. No singular vectors are computed. The count is 0
    for an update that is zero.
    """
    check_size(rank=rank, energy=energy)
    refuse_partial_methods(update)
    whole = spectrum(update, vectors=False)
    count = min(rank or whole.energy_rank(energy or 1.0), whole.numerical_rank)
    error_norm = float(np.linalg.norm(whole.S[count : whole.numerical_rank]))
    return _truncation(update, max(count, 1), whole.norm, error_norm), count


def leading_outline(update: LowRankUpdate, count: int) -> UpdateOutline:
    """Return the outline of the result of `leading_part`."""
    has_scale = update.scale is not None
    rank = max(count, 1)
    return replace(
        UpdateOutline.of(update),
        rank=rank,
        scale=1.0 if has_scale else None,
        alpha=float(rank) if has_scale else None,
        stored_dtype="float64" if count else update.A.dtype.name,
    )


def leading_part(update: LowRankUpdate, count: int, *, keep_scale: bool = False) -> LowRankUpdate:
    """Return an update by a number of its leading singular directions, balanced.

    Its scale is 1, or that of the update. At most its factors, those of the result and a few rows
    are in memory.
    """
    new = leading_outline(update, count)
    fields: dict[str, Any] = {"scale": new.scale, "alpha": new.alpha}
    if keep_scale and update.scale is not None:
        fields = {"scale": update.scale, "alpha": update.scale * new.rank}
    if not count:
        empty = np.zeros((0, 0))
        return replace(from_directions(update, empty, np.zeros(0), empty), **fields)
    svd = update_svd(update, vectors=count)
    scale = 1.0 if update.scale is None or keep_scale else update.scale
    root = np.sqrt(abs(scale) * svd.S[:count])
    B, V = np.asarray(svd.U), np.asarray(svd.V)
    B *= root
    V *= np.copysign(root, scale)
    return replace(update, A=V.T, B=B, stored_dtype="", stored_at=NOT_STORED, **fields)


def _truncation(update: Update, rank: int, norm: float, error_norm: float) -> Truncation:
    d_out, d_in = update.shape
    low_rank = isinstance(update, LowRankUpdate)
    return Truncation(
        module=update.name,
        shape=update.shape,
        given_rank=update.rank,
        given_parameters=update.rank * (d_out + d_in) if low_rank else d_out * d_in,
        rank=rank,
        norm=norm,
        error_norm=error_norm,
    )


def relative_difference(update: Update, reference: Update) -> float:
    """Return ``‖ΔW₁ - ΔW₂‖_F/‖ΔW₂‖_F``, for low-rank updates from their factors.

    0 if both are zero. The scales must be known, or unknown and the same. Accurate to about 1e-15
    times the norms of the factors, however close the two are.
    """
    if isinstance(update, LowRankUpdate) and isinstance(reference, LowRankUpdate):
        distance = small_distance(update, reference)
        if distance is None:
            scales = _common_scales(update, reference)
            B = np.hstack([scales[0] * update.B.astype(np.float64), -scales[1] * reference.B])
            A = np.vstack([update.A, reference.A])
            distance = float(np.linalg.norm(linalg.factored_singular_values(B, A)))
    else:
        distance = float(np.linalg.norm(update.delta_weight() - reference.delta_weight()))
    norm = spectrum(reference, vectors=False).norm
    return distance / norm if norm > 0 else (0.0 if distance == 0 else float("inf"))


def small_distance(
    update: LowRankUpdate, reference: LowRankUpdate, *, bound: float = _NEARLY_EQUAL
) -> float | None:
    """Return ``‖ΔW₁ - ΔW₂‖_F`` of updates whose factors are nearly equal, else None.

    ``s₁B₁A₁ - s₂B₂A₂ = s₁B₁(A₁ - A₂) + (s₁B₁ - s₂B₂)A₂``, whose norm follows from the Gram matrices
    of both sides, a few rows at a time. They lose half of the digits: with differences below 1e-7
    of the factors, 1e-15 of their norms.
    """
    if update.A.shape != reference.A.shape or update.B.shape != reference.B.shape:
        return None
    scales = _common_scales(update, reference)
    left = _gram_with_difference(update.B, reference.B, *scales)
    right = _gram_with_difference(reference.A.T, update.A.T, 1.0, 1.0)
    r = update.rank
    for gram in (left, right):
        if not np.trace(gram[r:, r:]) <= bound**2 * np.trace(gram[:r, :r]) < np.inf:
            return None
    # [s₁B₁, D_B] meets [-D_A; A₂]: the second side was made of A₂ first, and of A₂ - A₁.
    swapped = np.roll(right, (r, r), (0, 1))
    swapped[:r] *= -1
    swapped[:, :r] *= -1
    return float(np.sqrt(max(np.sum(left * swapped), 0.0)))


def _common_scales(update: LowRankUpdate, reference: LowRankUpdate) -> tuple[float, float]:
    """Return two scales, 1 for both if they are unknown."""
    if update.scale is None and reference.scale is None:
        return 1.0, 1.0
    return update.known_scale(), reference.known_scale()


def _gram_with_difference(
    first: NDArray[np.floating], second: NDArray[np.floating], scale: float, other: float
) -> NDArray[np.float64]:
    """Return the Gram matrix of ``[s₁M₁, s₁M₁ - s₂M₂]`` for tall matrices, by blocks of rows."""
    gram = np.zeros((2 * first.shape[1],) * 2)
    rows = max(1, _WIDENED // first.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):  # the caller checks the result
        for top in range(0, len(first), rows):
            block = scale * first[top : top + rows].astype(np.float64)
            difference = block - other * second[top : top + rows]
            pair = np.hstack([block, difference])
            gram += pair.T @ pair
    return gram


def distance_from_dense(update: DenseUpdate, approximation: LowRankUpdate) -> float:
    """Return ``‖ΔW - s·B·A‖_F``, some rows at a time."""
    B = approximation.known_scale() * approximation.B.astype(np.float64)
    A = approximation.A.astype(np.float64)
    blocks = (block - B[rows] @ A for rows, block in _row_blocks(update))
    return math.hypot(*(float(np.linalg.norm(block)) for block in blocks))


def check_size(**options: float | None) -> None:
    """Raise unless exactly one of rank, energy, budget is given and in its range."""
    given = {key: value for key, value in options.items() if value is not None}
    if len(given) != 1:
        message = f"Give exactly one of {', '.join(options)}; got {', '.join(given) or 'none'}."
        raise InputError(message)
    ((key, value),) = given.items()
    if key == "energy" and not 0 < value <= 1:
        message = f"energy must be in (0, 1], got {value!r}."
        raise InputError(message)
    if key != "energy" and (value != int(value) or value < 1):
        message = f"{key} must be a whole number of at least 1, got {value!r}."
        raise InputError(message)


def refuse_partial_methods(update: Update) -> None:
    """Raise for a part of a method whose other part depends on the directions of this one."""
    if not isinstance(update, LowRankUpdate) or update.variant in ("", "DoRA"):
        return
    if update.variant in ROW_ORDERS:
        message = (
            f"'{update.name}' in {update.label or 'this adapter'} was read with its "
            f"{update.variant}. Pass heads= (command line: --heads), the heads of the base, to "
            "read them in the model's."
        )
    else:
        message = (
            f"'{update.name}' in {update.label or 'this adapter'} is a part of {update.variant}, "
            "whose other part depends on the rank. Edit its effective update instead "
            "(lora_analysis.effective_update, which needs the base)."
        )
    raise UnsupportedMethodError(message)


def from_directions(
    update: Update, U: NDArray[np.float64], S: NDArray[np.float64], V: NDArray[np.float64]
) -> LowRankUpdate:
    """Return ``U·diag(S)·Vᵀ`` as the new low-rank update of a module, balanced, of scale 1.

    ``S`` includes the scale, if it is known. Without directions B is zero.
    """
    root = np.sqrt(S)
    A: NDArray[np.floating] = root[:, None] * V.T
    B = U * root
    if not len(S):
        B = np.zeros((update.shape[0], 1))
        A = update.A[:1] if isinstance(update, LowRankUpdate) else np.zeros((1, update.shape[1]))
    alpha = float(B.shape[1])
    if isinstance(update, DenseUpdate):
        return LowRankUpdate(
            name=update.name,
            A=A,
            B=B,
            scale=1.0,
            alpha=alpha,
            layout=update.layout,
            kernel=update.kernel,
            label=update.label,
        )
    scale = None if update.scale is None else 1.0
    new_alpha = None if update.scale is None else alpha
    return replace(
        update, A=A, B=B, scale=scale, alpha=new_alpha, stored_dtype="", stored_at=NOT_STORED
    )


Directions = tuple["NDArray[np.float64]", "NDArray[np.float64]", "NDArray[np.float64]"]


def _energy_count(leading: Spectrum, energy: float) -> int | None:
    """Return the number of leading directions with an energy; None if there are too few."""
    energies = np.cumsum(leading.S**2)
    count = int(np.searchsorted(energies, energy * (1 - 1e-9))) + 1
    if count <= len(energies):
        return min(count, leading.numerical_rank)
    return leading.numerical_rank if len(energies) == min(leading.shape) else None


def _leading_vectors(leading: Spectrum, k: int) -> Directions:
    return leading.vectors("output")[:, :k], leading.S[:k], leading.vectors("input")[:, :k]


def _row_blocks(update: DenseUpdate) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield a dense update some rows at a time, in float64."""
    height = max(1, _BLOCK // update.shape[1])
    for top in range(0, update.shape[0], height):
        rows = slice(top, min(top + height, update.shape[0]))
        yield rows, update.delta[rows].astype(np.float64)
