"""Common directions of a group: a shared basis, and the union of the members' subspaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_analysis import linalg
from lora_analysis.errors import DegenerateSubspaceError, InputError
from lora_analysis.groups.shares import Shares
from lora_analysis.groups.stacking import Directions, Stack, resolved_directions, stack_directions
from lora_analysis.results import short_repr
from lora_analysis.studies.pair_products import updates_init_evidence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Update
    from lora_analysis.spectra import Side, Spectrum


@dataclass(frozen=True, slots=True, eq=False)
class SharedBasis:
    """The directions with most energy of N updates, and the share of each member's energy in them.

    Every member is scaled to energy one.

    Attributes
    ----------
    basis
        ``(d, K)``, orthonormal, strongest first.
    eigenvalues
        ``(K,)``, descending: the energy of all trained members along each direction.
    in_sample
        ``(N, K)``: share of each member's energy in the leading k directions, increasing in k. The
        member itself is in the basis, so the mean is at least 1/N at a member's rank even for
        unrelated members: never a result by itself.
    held_out
        ``(N, K)``: the same with the basis of the other members; random baseline k/d. NaN if the
        others have fewer than k directions.
    degenerate
        ``(K,)``: whether the leading k directions are arbitrary because eigenvalues k and k + 1
        coincide.
    held_out_degenerate
        ``(N, K)``: the same for the bases without each member.
    shared_init
        ``(N,)``: whether a member has a shared initialization with another trained member, which
        by itself makes them similar on the input side; None without updates.
    """

    module: str
    side: Side
    labels: tuple[str, ...]
    basis: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]
    in_sample: NDArray[np.float64]
    held_out: Shares
    degenerate: NDArray[np.bool_]
    held_out_degenerate: NDArray[np.bool_]
    shared_init: NDArray[np.bool_] | None = None

    __repr__ = short_repr

    @property
    def explained(self) -> NDArray[np.float64]:
        """``(K,)``: share of all members' energy in the leading k directions (in-sample)."""
        return np.asarray(np.nanmean(self.in_sample, axis=0))


class Explained(NamedTuple):
    """The K leading directions of a stack, and the shares that the first 1…K explain."""

    directions: Directions
    in_sample: NDArray[np.float64]
    held_out: NDArray[np.float64]
    held_out_degenerate: NDArray[np.bool_]


def shared_basis(
    spectra: Sequence[Spectrum],
    side: Side,
    *,
    k: int | None = None,
    updates: Sequence[Update] | None = None,
) -> SharedBasis:
    """Return the directions with most energy of N updates of one module, and held-out shares.

    The leading eigenvectors of ``Σ_i ΔW_iᵀΔW_i/‖ΔW_i‖_F²`` (input side; the other product on the
    output side), and the share of each member's energy in the first 1, 2, … K of them: once with
    all members in the basis, once with each left out in turn. The first is inflated and approaches
    1 with K for any members; the second has the random baseline k/d.

    Parameters
    ----------
    spectra
        Spectra of one module and shape, with vectors; ranks and scales may differ. Untrained
        members have NaN and are not in the basis.
    side
        ``"input"``: directions in R^d_in; ``"output"``: in R^d_out.
    k
        Number of directions; by default all that are resolved.
    updates
        The same updates, to detect shared initializations.

    Raises
    ------
    InputError
        Fewer than two trained members, a spectrum without vectors, k < 1, or not one
        update per spectrum.
    IncompatibleError
        The shapes differ.
    DegenerateSubspaceError
        k exceeds the directions that the members resolve.

    Notes
    -----
    All shares come from one Gram matrix of the R = Σr weighted directions, in float64:
    O(d·R²) once and O(R³) for each member. Its eigenvalues are squares, so directions below 1e-5
    of the strongest are not resolved and omitted; the error of a share at k is about
    1e-15·λ₁/λ_k.
    """
    stack = stack_directions(spectra, side)
    shares = explained_shares(stack, k)
    values, vectors, degenerate = shares.directions
    count = len(values)
    if k is not None and k > count:
        message = (
            f"A shared {side} basis of {k} directions of '{spectra[0].name}' is undefined: its "
            f"{len(stack.trained)} trained members resolve {count}. Use k <= {count}."
        )
        raise DegenerateSubspaceError(message)
    directions = np.arange(1, count + 1)
    return SharedBasis(
        module=spectra[0].name,
        side=side,
        labels=tuple(s.label for s in spectra),
        basis=_basis(stack.directions * stack.weights, values, vectors),
        eigenvalues=values,
        in_sample=shares.in_sample,
        held_out=Shares(shares.held_out, directions, stack.dimension, stack.singular_values),
        degenerate=degenerate,
        held_out_degenerate=shares.held_out_degenerate,
        shared_init=None if updates is None else shared_inits(stack, updates),
    )


def explained_shares(stack: Stack, k: int | None) -> Explained:
    """Return the shares of every member at 1…k directions, or as many as are resolved."""
    if k is not None and k < 1:
        message = f"A shared basis needs k >= 1 directions, got k = {k}."
        raise InputError(message)
    gram = stack.weighted_gram
    common = resolved_directions(gram, k)
    shape = (len(stack.columns), len(common.values))
    in_sample, held_out = np.full((2, *shape), np.nan)
    degenerate = np.zeros(shape, dtype=bool)
    for i in stack.trained:
        member = stack.columns[i]
        in_sample[i] = _cumulative(common.values * np.sum(common.vectors[member] ** 2, axis=0))
        others = np.delete(np.arange(len(gram)), member)
        values, vectors, ties = resolved_directions(gram[np.ix_(others, others)], shape[1])
        energy = np.sum((vectors.T @ gram[np.ix_(others, member)]) ** 2, axis=1) / values
        held_out[i, : len(values)] = _cumulative(energy)
        degenerate[i, : len(values)] = ties
    return Explained(common, in_sample, held_out, degenerate)


def _cumulative(energy: NDArray[np.float64]) -> NDArray[np.float64]:
    # Rounding may exceed 1 by a few ulp if all energy is explained.
    return np.minimum(np.cumsum(energy), 1.0)


def _basis(
    directions: NDArray[np.float64], values: NDArray[np.float64], vectors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the orthonormal directions ``(d, K)`` that belong to eigenvectors of their Gram."""
    # Vectors of small eigenvalues are not orthogonal to the leading ones: QR restores that.
    q, _ = np.linalg.qr(directions @ (vectors / np.sqrt(values)))
    return np.asarray(q * linalg.column_signs(q))


def shared_inits(stack: Stack, updates: Sequence[Update]) -> NDArray[np.bool_]:
    """Return a mask of the members that share an initialization with another trained member."""
    if len(updates) != len(stack.columns):
        message = (
            f"There are {len(stack.columns)} spectra and {len(updates)} updates. "
            "Give the update of every spectrum, in the same order."
        )
        raise InputError(message)
    shared = updates_init_evidence(updates).shared.copy()
    np.fill_diagonal(shared, val=False)
    trained = np.zeros(len(updates), dtype=bool)
    trained[stack.trained] = True
    return np.asarray((shared & trained).any(axis=1) & trained)


@dataclass(frozen=True, slots=True, eq=False)
class UnionSubspace:
    """The span of the top-k directions of all members, and the energy of each member in it.

    Attributes
    ----------
    k
        Number of directions of each member that span the union.
    basis
        ``(d, n)``, orthonormal, directions shared by most members first.
    energy
        ``(N,)``: share of each member's whole energy in the union; the member's own top-k are in
        it, so this is at least their share.
    held_out
        ``(N,)``: the same in the union of the others; random baseline: their dimension/d.
    """

    module: str
    side: Side
    labels: tuple[str, ...]
    k: int
    basis: NDArray[np.float64]
    energy: NDArray[np.float64]
    held_out: Shares

    __repr__ = short_repr

    @property
    def dimension(self) -> int:
        """Dimension of the union: between k and k times the number of trained members."""
        return int(self.basis.shape[1])


def union_subspace(spectra: Sequence[Spectrum], side: Side, *, k: int) -> UnionSubspace:
    """Return the span of the top-k directions of N updates of one module.

    Its dimension is k if all members share their directions, N·k if none does. The result also has
    the share of each member's energy (of all its directions, not only the top-k) in the union, and
    in the union of the other members.

    Parameters
    ----------
    spectra, side
        As for `shared_basis`.
    k
        Number of directions of every trained member.

    Raises
    ------
    InputError, IncompatibleError
        As for `shared_basis`.
    DegenerateSubspaceError
        k exceeds a trained member's numerical rank, or cuts between equal singular values.

    Notes
    -----
    The dimension is a numerical rank: it counts eigenvalues of the Gram matrix of the N·k unit
    vectors above 1e-10 of the largest, so directions less than 2e-5 apart count once.
    """
    stack = stack_directions(spectra, side)
    for i in stack.trained:
        spectra[i].basis(side, k)  # raises if k is not defined for a member
    top = tuple(columns[:k] for columns in stack.columns)
    every = np.concatenate(top)
    union = resolved_directions(stack.gram[np.ix_(every, every)])
    shares = np.full((2, len(spectra)), np.nan)
    dimensions = np.zeros(len(spectra), dtype=np.intp)
    for i in stack.trained:
        others = np.concatenate([columns for j, columns in enumerate(top) if j != i])
        rest = resolved_directions(stack.gram[np.ix_(others, others)])
        shares[0, i] = _share_in_span(stack, every, union, stack.columns[i])
        shares[1, i] = _share_in_span(stack, others, rest, stack.columns[i])
        dimensions[i] = len(rest.values)
    return UnionSubspace(
        module=spectra[0].name,
        side=side,
        labels=tuple(s.label for s in spectra),
        k=k,
        basis=_basis(stack.directions[:, every], union.values, union.vectors),
        energy=shares[0],
        held_out=Shares(shares[1], dimensions, stack.dimension, stack.singular_values),
    )


def _share_in_span(
    stack: Stack, columns: NDArray[np.intp], span: Directions, member: NDArray[np.intp]
) -> float:
    """Return the share of a member's energy in the span of some columns."""
    product = span.vectors.T @ (
        stack.gram[np.ix_(columns, member)] * stack.weights[member]
    )  # (n, r)
    return min(float(np.sum(product**2 / span.values[:, None])), 1.0)
