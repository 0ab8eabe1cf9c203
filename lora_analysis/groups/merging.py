"""Interference of the members of a group when they are merged, as a description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from lora_analysis import linalg
from lora_analysis.errors import InputError, ScaleError
from lora_analysis.groups.stacking import Stack, stack_directions
from lora_analysis.results import short_repr
from lora_analysis.spectra import SIDES, Side

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_analysis.spectra import Spectrum


@dataclass(frozen=True, slots=True, eq=False)
class SubspaceAlignment:
    """Share of each member that the leading directions of the merged update keep, on one side.

    Attributes
    ----------
    values
        ``(N,)``, in [0, 1]: ``‖Π_k ΔW_i‖_F/‖ΔW_i‖_F``, a ratio of norms, not of energies. The
        member is part of the merged update, so unrelated members exceed the random baseline too.
        NaN for an untrained member, and for all members if they cancel.
    chance
        √(k/d): the root mean square for random directions.
    directions
        k, the number of directions of the merged update; 0 if the members cancel.
    degenerate
        Whether the k-th and the next singular value of the merged update coincide.
    """

    values: NDArray[np.float64]
    chance: float
    directions: int
    degenerate: bool

    __repr__ = short_repr


@dataclass(frozen=True, slots=True, eq=False)
class Interference:
    """How N updates of one module add up when they are merged.

    Attributes
    ----------
    cosine
        ``Σ_{i<j}⟨ΔW_i, ΔW_j⟩ / Σ_{i<j}‖ΔW_i‖‖ΔW_j‖``, in [−1, 1].
    cosine_spread
        Its standard deviation for independent random directions (exact); the mean is 0.
    norm_ratio
        ``‖Σ ΔW_i‖²/Σ‖ΔW_i‖²``: 0 if the members cancel, 1 if they are orthogonal, N if they are
        equal.
    sti
        Singular Task Interference, in the units of σ; 0 if all directions used are orthogonal on
        either side.
    relative_sti
        The same over Σσ of the directions used: independent of the members' norms.
    alignment
        The Subspace Alignment Ratio (SAR) of both sides.
    """

    module: str
    labels: tuple[str, ...]
    cosine: float
    cosine_spread: float
    norm_ratio: float
    sti: float
    relative_sti: float
    alignment: Mapping[Side, SubspaceAlignment]


class InnerProducts(NamedTuple):
    """⟨ΔW_i, ΔW_j⟩ and ‖ΔW_i‖, divided by the power of ``unit`` that fits; 0 if untrained."""

    values: NDArray[np.float64]
    norms: NDArray[np.float64]
    unit: float

    @property
    def between(self) -> tuple[float, float]:
        """``Σ_{i<j}⟨ΔW_i, ΔW_j⟩`` and ``Σ_{i<j}‖ΔW_i‖‖ΔW_j‖``."""
        above = np.triu_indices(len(self.norms), 1)
        return float(self.values[above].sum()), float(np.outer(self.norms, self.norms)[above].sum())


def interference(
    spectra: Sequence[Spectrum], *, k: int | None = None, epsilon: float = 0.05
) -> Interference:
    """Return how N updates of one module add up when they are merged by sum or mean.

    This describes the weights; it does not predict what merging does to a model's accuracy.

    STI is ``‖(UᵀU − I) Σ (VᵀV − I)‖₁`` with U, V and Σ the members' top-k singular vectors and
    values side by side (Gargiulo et al., CVPR 2025, arXiv 2412.00081), ‖·‖₁ being the sum of
    absolute entries: the paper leaves the norm at that symbol, and its code does not compute STI.

    SAR projects each member on the top-k singular vectors of the merged update, k the smallest
    whose relative error of approximation ``‖M − M_k‖_F/‖M‖_F`` is at most ε (Marczak et al.,
    arXiv 2502.04959, equations 5 and 6, left vectors alone). Their script for figure 3a cuts
    where ``‖M_k‖_F/‖M‖_F`` exceeds 0.95 instead, and takes one direction less: its k is smaller.

    Parameters
    ----------
    spectra
        Spectra of ΔW of one module and shape, with vectors. Untrained members add nothing.
    k
        Directions of each member in STI; by default all up to its numerical rank.
    epsilon
        ε, in (0, 1).

    Raises
    ------
    InputError
        Fewer than two trained members, a spectrum without vectors, or ε out of range.
    IncompatibleError
        The shapes differ.
    ScaleError
        The scale of a trained member is not known, so its weight in the sum is not known either.
    DegenerateSubspaceError
        k exceeds a trained member's numerical rank, or cuts between equal singular values.

    Notes
    -----
    O((d_in + d_out)·R² + R³) with R = Σr; neither an update nor the merged one is formed.
    """
    if not 0 < epsilon < 1:
        message = f"epsilon is a relative error in (0, 1), got {epsilon}."
        raise InputError(message)
    stacks = {side: stack_directions(spectra, side) for side in SIDES}
    _check_scales(spectra)
    inner = inner_products(spectra, stacks)
    together, apart = inner.between
    squares = float(np.sum(inner.norms**2))
    pairs = np.triu(np.outer(inner.norms, inner.norms), 1)
    d_out, d_in = spectra[0].shape
    sti, total = _singular_task_interference(spectra, stacks, k, inner.unit)
    return Interference(
        module=spectra[0].name,
        labels=tuple(s.label for s in spectra),
        cosine=float(np.clip(together / apart, -1.0, 1.0)),
        cosine_spread=float(np.linalg.norm(pairs) / apart / np.sqrt(float(d_out) * d_in)),
        norm_ratio=max(float(inner.values.sum()) / squares, 0.0),
        sti=sti * inner.unit,
        relative_sti=sti / total,
        alignment=_alignment(spectra, stacks, inner, epsilon),
    )


def _check_scales(spectra: Sequence[Spectrum]) -> None:
    unknown = [s for s in spectra if s.in_units_of_scale and not s.untrained]
    if unknown:
        message = (
            f"How the updates of '{unknown[0].name}' add up depends on their scales, and that of "
            f"{unknown[0].label or 'one of them'} is not known. Give alpha or scale when reading."
        )
        raise ScaleError(message)


def inner_products(spectra: Sequence[Spectrum], stacks: Mapping[Side, Stack]) -> InnerProducts:
    """Return ``⟨ΔW_i, ΔW_j⟩ = Σ_ab σ_a τ_b (u_aᵀu_b)(v_aᵀv_b)`` of all members, ``(N, N)``."""
    stack = stacks["input"]
    norms = np.array([s.norm for s in spectra])
    unit = float(norms.max())  # so that squares of extreme norms do not overflow
    relative = np.where([s.untrained for s in spectra], 0.0, norms / unit)
    member = np.zeros((len(stack.weights), len(spectra)))
    for i, columns in enumerate(stack.columns):
        member[columns, i] = stack.weights[columns] * relative[i]
    product = stack.gram * stacks["output"].gram
    return InnerProducts(member.T @ product @ member, relative, unit)


def _singular_task_interference(
    spectra: Sequence[Spectrum], stacks: Mapping[Side, Stack], k: int | None, unit: float
) -> tuple[float, float]:
    """Return STI and Σσ of the directions used, both over ``unit``."""
    stack = stacks["input"]
    if k is not None:
        for i in stack.trained:
            spectra[i].basis("output", k)  # raises if k is not defined for a member
    used = np.concatenate([columns[:k] for columns in stack.columns])
    values = np.concatenate([s.S[: s.numerical_rank][:k] / unit for s in spectra])
    left, right = (
        stacks[side].gram[np.ix_(used, used)] - np.eye(len(used)) for side in ("output", "input")
    )
    # Within a member these are zero up to rounding, which must not add up.
    for columns in stack.columns:
        block = np.isin(used, columns)
        left[np.ix_(block, block)] = right[np.ix_(block, block)] = 0.0
    return float(np.abs((left * values) @ right).sum()), float(values.sum())


def _alignment(
    spectra: Sequence[Spectrum],
    stacks: Mapping[Side, Stack],
    inner: InnerProducts,
    epsilon: float,
) -> dict[Side, SubspaceAlignment]:
    """Return the SAR of both sides, from the SVD of the merged update's stacked factors."""
    sigma = np.concatenate([s.S[: s.numerical_rank] / inner.unit for s in spectra])
    merged = linalg.factored_svd(
        stacks["output"].directions * sigma, np.ascontiguousarray(stacks["input"].directions.T)
    )
    # Norm of the remainder after k = 0, 1, … directions, summed from the smallest.
    left = np.sqrt(np.append(np.cumsum(merged.S[::-1] ** 2)[::-1], 0.0))
    rounding = 8 * len(sigma) * linalg.EPS * float(inner.norms.sum())
    count = int(np.argmax(left <= epsilon * left[0])) if left[0] > rounding else 0
    following = merged.S[count] if 0 < count < len(merged.S) else -np.inf
    degenerate = count > 0 and bool(merged.S[count - 1] - following <= rounding)
    bases = cast("tuple[NDArray[np.float64], ...]", (merged.V, merged.U))
    return {
        side: SubspaceAlignment(
            values=_kept_norms(stacks[side], basis[:, :count]),
            chance=float(np.sqrt(count / stacks[side].dimension)),
            directions=count,
            degenerate=degenerate,
        )
        for side, basis in zip(SIDES, bases, strict=True)
    }


def _kept_norms(stack: Stack, basis: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the norm of each member within a basis over its norm; NaN for an untrained member."""
    norms = np.full(len(stack.columns), np.nan)
    if basis.shape[1]:
        overlaps = (basis.T @ stack.directions) * stack.weights  # (k, R)
        for i in stack.trained:
            norms[i] = min(float(np.linalg.norm(overlaps[:, stack.columns[i]])), 1.0)
    return norms
