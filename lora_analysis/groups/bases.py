"""What the members of a group have in common: a shared basis, and the union of their subspaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_analysis import linalg
from lora_analysis.errors import DegenerateSubspaceError, InputError
from lora_analysis.groups.shares import Shares
from lora_analysis.groups.stacking import Directions, Stack, resolved_directions, stacked
from lora_analysis.studies.pair_products import updates_init_evidence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Update
    from lora_analysis.spectra import Side, Spectrum


@dataclass(frozen=True, slots=True, eq=False)
class SharedBasis:
    """The directions that hold most energy of N updates, and how much of each member's.

    Every member counts with energy one, however large it is.

    Attributes
    ----------
    basis
        ``(d, K)``, orthonormal, strongest first.
    eigenvalues
        ``(K,)``, descending: the energy of all trained members along each direction.
    in_sample
        ``(N, K)``: share of each member's energy in the leading k directions, rising in k. The
        member itself is in the basis, so the mean is at least 1/N at a member's rank, however
        unrelated they are: never a result by itself.
    held_out
        ``(N, K)``: the same with the basis of the other members, beside its chance k/d. NaN
        where the others have no k directions.
    degenerate
        ``(K,)``: whether the leading k directions are arbitrary, since eigenvalues k and k + 1
        coincide.
    held_out_degenerate
        ``(N, K)``: the same of the bases without each member.
    shared_init
        ``(N,)``: whether a member starts from the same A as another trained one, which alone
        makes them alike on the input side; None where no updates were given.
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

    @property
    def explained(self) -> NDArray[np.float64]:
        """``(K,)``: share of all members' energy in the leading k directions (in-sample)."""
        return np.asarray(np.nanmean(self.in_sample, axis=0))


class Explained(NamedTuple):
    """The leading directions of a stack, and the shares that they explain, up to K of them."""

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
    """Return the directions that hold most energy of N updates of one module, held out too.

    The leading eigenvectors of ``Σ_i ΔW_iᵀΔW_i/‖ΔW_i‖_F²`` (input side; the other product on the
    output side), and the share of each member's energy that the first 1, 2, … K of them hold:
    once with all members in the basis, once with each left out in turn. The first is inflated
    and approaches 1 with K whatever the members are; the second has the chance k/d.

    Parameters
    ----------
    spectra
        Of one module and shape, with vectors; ranks and scales may differ. Untrained members
        give NaN and do not enter the basis.
    side
        ``"input"``: directions in R^d_in; ``"output"``: in R^d_out.
    k
        How many directions; by default all that are resolved.
    updates
        The same updates, to mark those that share their initial A.

    Raises
    ------
    InputError
        Fewer than two trained members, a spectrum without vectors, k < 1, or another number of
        updates than of spectra.
    IncompatibleError
        The shapes differ.
    DegenerateSubspaceError
        k exceeds the directions that the members resolve.

    Notes
    -----
    All shares come from one Gram matrix of the R = Σr weighted directions, in float64:
    O(d·R²) once and O(R³) for each member. Its eigenvalues are squares, so directions below 1e-5
    of the strongest are not resolved and left out; the error of a share at k is about
    1e-15·λ₁/λ_k.
    """
    stack = stacked(spectra, side)
    found = explained(stack, k)
    values, vectors, degenerate = found.directions
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
        labels=tuple(one.label for one in spectra),
        basis=_basis(stack.directions * stack.weights, values, vectors),
        eigenvalues=values,
        in_sample=found.in_sample,
        held_out=Shares(found.held_out, directions, stack.dimension, stack.singular_values),
        degenerate=degenerate,
        held_out_degenerate=found.held_out_degenerate,
        shared_init=None if updates is None else shared_inits(stack, updates),
    )


def explained(stack: Stack, k: int | None) -> Explained:
    """Return the shares of every member at 1…k directions, fewer where no more are resolved."""
    if k is not None and k < 1:
        message = f"A shared basis needs k >= 1 directions, got k = {k}."
        raise InputError(message)
    gram = stack.weighted_gram
    common = resolved_directions(gram, k)
    shape = (len(stack.own), len(common.values))
    in_sample, held_out = np.full((2, *shape), np.nan)
    degenerate = np.zeros(shape, dtype=bool)
    for at in stack.trained:
        own = stack.own[at]
        in_sample[at] = _rising(common.values * np.sum(common.vectors[own] ** 2, axis=0))
        others = np.delete(np.arange(len(gram)), own)
        values, vectors, ties = resolved_directions(gram[np.ix_(others, others)], shape[1])
        energy = np.sum((vectors.T @ gram[np.ix_(others, own)]) ** 2, axis=1) / values
        held_out[at, : len(values)] = _rising(energy)
        degenerate[at, : len(values)] = ties
    return Explained(common, in_sample, held_out, degenerate)


def _rising(energy: NDArray[np.float64]) -> NDArray[np.float64]:
    # Rounding may exceed 1 by a few ulp where all energy is explained.
    return np.minimum(np.cumsum(energy), 1.0)


def _basis(
    directions: NDArray[np.float64], values: NDArray[np.float64], vectors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the orthonormal directions ``(d, K)`` that belong to eigenvectors of their Gram."""
    # Vectors of small eigenvalues have lost orthogonality to the leading ones: given back by QR.
    q, _ = np.linalg.qr(directions @ (vectors / np.sqrt(values)))
    return np.asarray(q * linalg.column_signs(q))


def shared_inits(stack: Stack, updates: Sequence[Update]) -> NDArray[np.bool_]:
    """Return, for each member, whether it starts from the same A as another trained one."""
    if len(updates) != len(stack.own):
        message = (
            f"The start of {len(stack.own)} members was asked for with {len(updates)} updates. "
            "Give the update of every spectrum, in the same order."
        )
        raise InputError(message)
    alike = updates_init_evidence(updates).shared.copy()
    np.fill_diagonal(alike, val=False)
    trained = np.zeros(len(updates), dtype=bool)
    trained[stack.trained] = True
    return np.asarray((alike & trained).any(axis=1) & trained)


@dataclass(frozen=True, slots=True, eq=False)
class UnionSubspace:
    """The span of the top-k directions of all members, and how much of each lies in it.

    Attributes
    ----------
    k
        Directions of each member that span the union.
    basis
        ``(d, n)``, orthonormal, the directions most members share first.
    energy
        ``(N,)``: share of each member's whole energy in the union; the member's own top-k are in
        it, so this is at least their share.
    held_out
        ``(N,)``: the same in the union of the others, beside its chance, their dimension/d.
    """

    module: str
    side: Side
    labels: tuple[str, ...]
    k: int
    basis: NDArray[np.float64]
    energy: NDArray[np.float64]
    held_out: Shares

    @property
    def dimension(self) -> int:
        """Of the union: between k and k times the number of trained members."""
        return int(self.basis.shape[1])


def union_subspace(spectra: Sequence[Spectrum], side: Side, *, k: int) -> UnionSubspace:
    """Return the span of the top-k directions of N updates of one module.

    Its dimension tells how many directions the group uses: k where all members share them, N·k
    where none does. Beside it, how much of each member's energy (all its directions, not only
    its top-k) lies in it, and in the union of the other members.

    Parameters
    ----------
    spectra, side
        As for `shared_basis`.
    k
        Directions taken from every trained member.

    Raises
    ------
    InputError, IncompatibleError
        As for `shared_basis`.
    DegenerateSubspaceError
        k exceeds a trained member's numerical rank, or cuts between equal singular values.

    Notes
    -----
    The dimension is a numerical rank: it counts eigenvalues of the Gram matrix of the N·k unit
    vectors above 1e-10 of the largest, so two directions less than 2e-5 apart are one.
    """
    stack = stacked(spectra, side)
    for at in stack.trained:
        spectra[at].basis(side, k)  # refuses a k that a member does not define
    top = tuple(own[:k] for own in stack.own)
    every = np.concatenate(top)
    union = resolved_directions(stack.gram[np.ix_(every, every)])
    shares = np.full((2, len(spectra)), np.nan)
    dimensions = np.zeros(len(spectra), dtype=np.intp)
    for at in stack.trained:
        others = np.concatenate([own for other, own in enumerate(top) if other != at])
        rest = resolved_directions(stack.gram[np.ix_(others, others)])
        shares[0, at] = _share_in_span(stack, every, union, stack.own[at])
        shares[1, at] = _share_in_span(stack, others, rest, stack.own[at])
        dimensions[at] = len(rest.values)
    return UnionSubspace(
        module=spectra[0].name,
        side=side,
        labels=tuple(one.label for one in spectra),
        k=k,
        basis=_basis(stack.directions[:, every], union.values, union.vectors),
        energy=shares[0],
        held_out=Shares(shares[1], dimensions, stack.dimension, stack.singular_values),
    )


def _share_in_span(
    stack: Stack, columns: NDArray[np.intp], span: Directions, own: NDArray[np.intp]
) -> float:
    """Return the share of a member's energy in the span of some columns."""
    product = span.vectors.T @ (stack.gram[np.ix_(columns, own)] * stack.weights[own])  # (n, r)
    return min(float(np.sum(product**2 / span.values[:, None])), 1.0)
