"""Every pair of many updates of one module: one product a side, whatever their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_analysis import chance, linalg
from lora_analysis.adapter import LowRankUpdate, Update
from lora_analysis.errors import IncompatibleError
from lora_analysis.shared_init import InitEvidence, InitRows, init_evidence
from lora_analysis.spectra import SIDES, Side, Spectrum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _Sums = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

# Up to so many directions their products are made at once: BLAS then computes half of them.
_AT_ONCE = 2048
# Beyond, so many rows of products at a time: they are reduced before the next are made, and what
# lies left of their own columns is known from those before.
_ROWS = 128
_EVIDENCE = ("row_cosine", "cross_cosine", "z", "other_cosine")


@dataclass(frozen=True, slots=True, eq=False)
class PairValues:
    """One side of N updates of one module; every array is ``(N, N)``, symmetric.

    NaN wherever an update is untrained. The diagonal holds an update against itself.

    Attributes
    ----------
    phi_1_1, phi_r_r
        φ(1, 1), and φ at both numerical ranks.
    omega
        The energy-weighted overlap ω.
    chance_r_r, chance_omega
        Isotropic chance of the latter two; that of φ(1, 1) is 1/dimension.
    dimension
        Of the space the directions live in.
    """

    phi_1_1: NDArray[np.float64]
    phi_r_r: NDArray[np.float64]
    omega: NDArray[np.float64]
    chance_r_r: NDArray[np.float64]
    chance_omega: NDArray[np.float64]
    dimension: int

    @property
    def excess_r_r(self) -> NDArray[np.float64]:
        """``(φ − chance)/(1 − chance)`` at both ranks: what may be averaged over modules."""
        return chance.excess(self.phi_r_r, self.chance_r_r)


@dataclass(frozen=True, slots=True, eq=False)
class ModulePairs:
    """Every pair of N updates of one module.

    Attributes
    ----------
    sides
        φ and ω of the input and of the output side.
    cosine
        Signed cosine of the updates, ``(N, N)``; NaN wherever one is untrained.
    ranks, norms
        Numerical rank and ‖ΔW‖_F of each update, ``(N,)``.
    start
        Whether the pairs share their start, NaN with dense updates; None if not asked for.
    """

    module: str
    sides: Mapping[Side, PairValues]
    cosine: NDArray[np.float64]
    ranks: NDArray[np.intp]
    norms: NDArray[np.float64]
    start: InitEvidence | None = None


def module_pairs(
    spectra: Sequence[Spectrum], updates: Sequence[Update] | None = None
) -> ModulePairs:
    """Return φ(1, 1), φ(r, r), ω and the signed cosine of every pair of updates of one module.

    Parameters
    ----------
    spectra
        Of ΔW, all of one shape; ranks may differ.
    updates
        The same updates, for the evidence of a shared start; without them there is none.

    Raises
    ------
    IncompatibleError
        The shapes differ.

    Notes
    -----
    One product ``(Σr, d)·(d, Σr)`` a side, of which half is computed, and O((Σr)²) beside it.
    """
    shapes = {one.shape for one in spectra}
    if len(shapes) != 1:
        message = (
            f"The updates of '{spectra[0].name}' have shapes {sorted(shapes)}. "
            "All must adapt the same weight."
        )
        raise IncompatibleError(message)
    ranks = np.array([one.numerical_rank for one in spectra])
    energy, signed = _weights(spectra)
    sums = _reduced(spectra, ranks, energy, signed)
    trained = ranks > 0
    lost = ~np.logical_and.outer(trained, trained)
    participation = np.array([one.participation_ratio for one in spectra])
    d_out, d_in = spectra[0].shape
    sides = {
        side: _pair_values(values, ranks, participation, dimension, lost)
        for side, values, dimension in zip(SIDES, sums[:2], (d_in, d_out), strict=True)
    }
    return ModulePairs(
        module=spectra[0].name,
        sides=sides,
        cosine=np.where(lost, np.nan, np.clip(sums[2], -1.0, 1.0)),
        ranks=ranks,
        norms=np.array([one.norm for one in spectra]),
        start=None if updates is None else updates_start(updates),
    )


def _weights(spectra: Sequence[Spectrum]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the columns' weights in ω and in the cosine, each update's to norm one."""
    energy, signed = [], []
    for one in spectra:
        s = one.S[: one.numerical_rank]
        relative = s / (s[0] if s.size else 1.0)
        energy.append(relative**2 / (np.linalg.norm(relative**2) if s.size else 1.0))
        signed.append(relative / (np.linalg.norm(relative) if s.size else 1.0))
    return np.concatenate(energy), np.concatenate(signed)


def _reduced(
    spectra: Sequence[Spectrum],
    ranks: NDArray[np.intp],
    energy: NDArray[np.float64],
    signed: NDArray[np.float64],
) -> tuple[_Sums, _Sums, NDArray[np.float64]]:
    """Return per side (first squares, sums of squares, weighted sums), and the cosines.

    All are sums over blocks of ``U₁ᵀU₂``, made for some members and all that follow at a time.
    """
    count = len(spectra)
    bases = [np.vstack([one.vectors(side).T for one in spectra]) for side in SIDES]  # (Σr, d)
    found = np.zeros((7, count, count))
    for block in _blocks(ranks):
        pairs = np.ix_(block.here, block.following)
        grams = [basis[block.own] @ basis[block.rest].T for basis in bases]
        found[6][pairs] = block.summed(block.weighted(grams[0] * grams[1], signed))
        for at, gram in enumerate(grams):
            np.square(gram, out=gram)
            found[3 * at][pairs] = gram[np.ix_(block.rows, block.columns)]
            found[3 * at + 1][pairs] = block.summed(gram)
            found[3 * at + 2][pairs] = block.summed(block.weighted(gram, energy))
    for one in found:
        lower = np.tril_indices(count, -1)
        one[lower] = one.T[lower]
    return (found[0], found[1], found[2]), (found[3], found[4], found[5]), found[6]


class PairBlock(NamedTuple):
    """Some updates of one module against all that follow them, and themselves.

    Attributes
    ----------
    rows, columns
        Places of the h trained updates and of the f trained ones from the first of them on.
    cosine
        ``(h, f)``: signed cosine of the updates.
    excess
        Per side ``(h, f)``: ω above isotropic chance, ``(ω − c)/(1 − c)``.
    shared
        ``(h, f)``: whether a pair starts from the same rows.
    """

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    cosine: NDArray[np.float64]
    excess: Mapping[Side, NDArray[np.float64]]
    shared: NDArray[np.bool_]


def pair_blocks(
    spectra: Sequence[Spectrum], updates: Sequence[LowRankUpdate]
) -> Iterator[PairBlock]:
    """Yield `module_pairs` of low-rank updates block by block: no matrix of all pairs is made.

    Every pair of trained updates is in one block, some in both orders.
    """
    ranks = np.array([one.numerical_rank for one in spectra])
    energy, signed = _weights(spectra)
    participation = np.array([one.participation_ratio for one in spectra])
    d_out, d_in = spectra[0].shape
    bases = [np.vstack([one.vectors(side).T for one in spectra]) for side in SIDES]  # (Σr, d)
    rows = InitRows(updates)
    for block in _blocks(ranks):
        grams = [basis[block.own] @ basis[block.rest].T for basis in bases]
        cosine = block.summed(block.weighted(grams[0] * grams[1], signed))
        excess: dict[Side, NDArray[np.float64]] = {}
        for side, gram, dimension in zip(SIDES, grams, (d_in, d_out), strict=True):
            omega = block.summed(block.weighted(np.square(gram, out=gram), energy))
            pairs = np.outer(participation[block.here], participation[block.following])
            by_chance = np.minimum(np.sqrt(pairs) / dimension, 1.0)
            excess[side] = chance.excess(np.minimum(omega, 1.0), by_chance)
        shared = rows.shared(block.here, block.following)
        cosine = np.clip(cosine, -1.0, 1.0, out=cosine)
        yield PairBlock(block.here, block.following, cosine, excess, shared)


class _Block(NamedTuple):
    """Products of the directions of some members with those of all that follow.

    ``here`` and ``following`` are the trained ones among them, ``rows`` and ``columns`` where the
    directions of each begin.
    """

    own: slice
    rest: slice
    here: NDArray[np.intp]
    following: NDArray[np.intp]
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]

    def weighted(
        self, matrix: NDArray[np.float64], weights: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Multiply by the weights of both directions, in place."""
        matrix *= weights[self.own, None]
        matrix *= weights[self.rest]
        return matrix

    def summed(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum over the directions of each pair, ``(here, following)``."""
        by_column = np.add.reduceat(matrix, self.columns, axis=1)
        return np.add.reduceat(by_column, self.rows, axis=0)


def _block(ranks: NDArray[np.intp], members: Sequence[int]) -> _Block:
    starts, trained = np.cumsum(ranks) - ranks, np.flatnonzero(ranks)
    low, high = int(starts[members[0]]), int(starts[members[-1]] + ranks[members[-1]])
    following = trained[trained >= members[0]]  # what lies before is known by symmetry
    here = following[following <= members[-1]]
    return _Block(
        slice(low, high),
        slice(low, None),
        here,
        following,
        starts[here] - low,
        starts[following] - low,
    )


def _blocks(ranks: NDArray[np.intp]) -> Iterator[_Block]:
    """Yield blocks in which every pair of trained updates is met."""
    for members in _chunks(ranks):
        block = _block(ranks, members)
        if block.here.size:
            yield block


def _chunks(ranks: NDArray[np.intp]) -> Iterator[list[int]]:
    """Yield runs of updates whose products are made together."""
    members: list[int] = []
    rows = _ROWS if ranks.sum() > _AT_ONCE else _AT_ONCE
    for at in range(len(ranks)):
        members.append(at)
        if ranks[members].sum() >= rows:
            yield members
            members = []
    if members:
        yield members


def _pair_values(
    sums: _Sums,
    ranks: NDArray[np.intp],
    participation: NDArray[np.float64],
    dimension: int,
    lost: NDArray[np.bool_],
) -> PairValues:
    first, squares, weighted = sums
    smaller = np.maximum(np.minimum.outer(ranks, ranks), 1)

    def known(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(lost, np.nan, np.minimum(values, 1.0))

    return PairValues(
        phi_1_1=known(first),
        phi_r_r=known(squares / smaller),
        omega=known(weighted),
        chance_r_r=known(np.maximum.outer(ranks, ranks) / dimension),
        chance_omega=known(np.sqrt(np.outer(participation, participation)) / dimension),
        dimension=dimension,
    )


def updates_start(updates: Sequence[Update]) -> InitEvidence:
    """Return the evidence of a shared start; dense updates have none, and NaN for it."""
    members = [at for at, one in enumerate(updates) if isinstance(one, LowRankUpdate)]
    shape = (len(updates), len(updates))
    shared = np.zeros(shape, dtype=bool)
    found = {name: np.full(shape, np.nan) for name in _EVIDENCE}
    if members:
        block = np.ix_(members, members)
        # mypy knows no list of a narrower type by its condition.
        known = init_evidence([updates[at] for at in members])  # type: ignore[misc]
        shared[block] = known.shared
        for name, values in found.items():
            values[block] = getattr(known, name)
    return InitEvidence(**found, shared=shared)


def pair_angles(
    spectra: Sequence[Spectrum], side: Side
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the smallest and the largest principal angle of every pair, at the numerical ranks.

    Returns
    -------
    tuple of ndarray
        ``(N, N)`` each, symmetric, in radians; NaN where an update is untrained.
    """
    ranks = np.array([one.numerical_rank for one in spectra])
    smallest, largest = np.full((2, len(spectra), len(spectra)), np.nan)
    same = np.flatnonzero(ranks)
    smallest[same, same] = largest[same, same] = 0.0
    for rank, other in combinations_with_replacement(np.unique(ranks[same]), 2):
        left, right, cosines = _cosines(spectra, ranks, (rank, other), side)
        for found, end in ((smallest, 0), (largest, -1)):
            angles = np.arccos(np.minimum(cosines[:, end], 1.0))
            found[left, right] = found[right, left] = angles
    # A cosine near 1 has lost the angle's digits: those few are taken from the sines.
    for a, b in zip(*np.nonzero(np.triu(smallest < 0.1, 1)), strict=True):
        exact = linalg.principal_angles(spectra[a].vectors(side), spectra[b].vectors(side))
        smallest[a, b] = smallest[b, a] = exact[0]
        largest[a, b] = largest[b, a] = exact[-1]
    return smallest, largest


def _cosines(
    spectra: Sequence[Spectrum], ranks: NDArray[np.intp], kinds: tuple[int, int], side: Side
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Return every pair of two ranks, and the cosines of its principal angles, falling."""
    rows, columns = (np.flatnonzero(ranks == rank) for rank in kinds)
    left = np.vstack([spectra[at].vectors(side).T for at in rows.tolist()])
    alike = kinds[0] == kinds[1]
    right = left if alike else np.vstack([spectra[at].vectors(side).T for at in columns.tolist()])
    gram = (left @ right.T).reshape(len(rows), kinds[0], len(columns), kinds[1])
    own, others = np.indices((len(rows), len(columns))).reshape(2, -1)
    if alike:
        own, others = np.triu_indices(len(rows), 1)
    pairs = gram.transpose(0, 2, 1, 3)[own, others]
    cosines = np.asarray(np.linalg.svd(pairs, compute_uv=False), np.float64)
    return rows[own], columns[others], cosines
