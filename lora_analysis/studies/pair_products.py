"""Similarity of every pair of many updates of one module, from one product per side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lora_analysis import chance, linalg
from lora_analysis.adapter import DenseUpdate, LowRankUpdate, Update
from lora_analysis.errors import IncompatibleError
from lora_analysis.init_evidence import (
    EVIDENCE,
    InitEvidence,
    InitRows,
    init_evidence,
    weaker_half_excess,
)
from lora_analysis.similarity import FINE_TUNE_DIRECTIONS
from lora_analysis.spectra import SIDES, Side, Spectrum, delta_spectrum, partial_spectrum, spectrum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _Sums = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

# Up to this many directions, all products are one matrix product, of which BLAS computes half.
_AT_ONCE = 2048
# Beyond that, this many rows of products at a time: they are reduced before the next are computed,
# and the part left of their own columns is known from earlier rows.
_ROWS = 128
# Smaller side of a dense update from which not all of its singular vectors are computed.
_LARGE_DENSE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class PairValues:
    """Similarities on one side of N updates of one module; every array is ``(N, N)``, symmetric.

    NaN for pairs with an untrained update. The diagonal compares an update with itself.

    Attributes
    ----------
    phi_1_1, phi_r_r
        φ(1, 1), and φ at the numbers of directions in `ModulePairs.directions`.
    omega
        The energy-weighted overlap ω.
    chance_r_r, chance_omega
        Random baselines of the latter two (isotropic); that of φ(1, 1) is 1/dimension.
    dimension
        Dimension of the space of the directions.
    """

    phi_1_1: NDArray[np.float64]
    phi_r_r: NDArray[np.float64]
    omega: NDArray[np.float64]
    chance_r_r: NDArray[np.float64]
    chance_omega: NDArray[np.float64]
    dimension: int

    @property
    def excess_r_r(self) -> NDArray[np.float64]:
        """``(φ − chance)/(1 − chance)`` at both ranks: the form to average over modules."""
        return chance.excess(self.phi_r_r, self.chance_r_r)


@dataclass(frozen=True, slots=True, eq=False)
class ModulePairs:
    """Similarities of every pair of N updates of one module.

    Attributes
    ----------
    sides
        φ and ω of the input and of the output side.
    cosine
        Signed cosine of the updates, ``(N, N)``; NaN for pairs with an untrained update.
    ranks, norms
        Numerical rank and ‖ΔW‖_F of each update, ``(N,)``.
    directions
        ``(N, N)``: the number of leading directions of the first update in φ(r, r) with the second
        one: all that it has, see `directions_of_pairs`.
    init
        Evidence of a shared initialization, NaN for dense updates; None if not requested.
    """

    module: str
    sides: Mapping[Side, PairValues]
    cosine: NDArray[np.float64]
    ranks: NDArray[np.intp]
    norms: NDArray[np.float64]
    directions: NDArray[np.intp]
    init: InitEvidence | None = None


def directions_of_pairs(spectra: Sequence[Spectrum]) -> NDArray[np.intp]:
    """Return the number of leading directions of each update in a comparison with each other one.

    The numerical rank, or of a dense update as many as the other one has: all of its directions
    span the whole space. Of two dense ones at most `FINE_TUNE_DIRECTIONS`.

    Returns
    -------
    NDArray
        ``(N, N)``; 0 for an untrained update.
    """
    ranks = np.array([s.numerical_rank for s in spectra])
    dense = np.array([s.is_dense for s in spectra])
    allowed = np.where(dense, FINE_TUNE_DIRECTIONS, ranks)  # to a dense update by each other one
    limits = np.broadcast_to(allowed, (len(ranks), len(ranks)))
    return np.where(dense[:, None], np.minimum(limits, ranks[:, None]), ranks[:, None])


@dataclass(frozen=True, slots=True, eq=False)
class ModuleProducts:
    """Spectra of N updates of one module, and the products that similarities are made of.

    Attributes
    ----------
    spectra
        Spectra of ΔW; without vectors if ``directions`` follow from the factors alone.
    directions
        Per side ``(Σk, Σk)``: products of all singular vectors up to the numerical ranks. None if
        there are too many for one matrix.
    factors
        ``(Σr, Σr)``: products of the rows of all A, and of the columns of all B; None if they
        were not needed.
    deltas
        Large dense ΔW by position, whose spectra have the vectors of leading directions only.
    """

    spectra: Sequence[Spectrum]
    directions: Mapping[Side, NDArray[np.float64]] | None
    factors: Mapping[Literal["A", "B"], NDArray[np.float64]] | None = None
    deltas: Mapping[int, NDArray[np.floating]] = field(default_factory=dict)

    def selected(self, rows: Sequence[int]) -> ModuleProducts:
        """Return the spectra of some of the updates and the products of their directions."""
        spectra = [self.spectra[row] for row in rows]
        if self.directions is None:
            deltas = {i: self.deltas[row] for i, row in enumerate(rows) if row in self.deltas}
            return ModuleProducts(spectra, None, deltas=deltas)
        ranks = np.array([s.numerical_rank for s in self.spectra])
        index = _direction_indices(ranks, rows)
        plane = np.ix_(index, index)
        return ModuleProducts(spectra, {s: gram[plane] for s, gram in self.directions.items()})

    def overlap_grid(self, a: int, b: int, side: Side) -> NDArray[np.float64]:
        """Return φ(i, j) of two of the updates, as `linalg.overlap_grid`."""
        if self.directions is None:
            gram = self.spectra[a].vectors(side).T @ self.spectra[b].vectors(side)
        else:
            ranks = np.array([s.numerical_rank for s in self.spectra])
            index = (_direction_indices(ranks, [member]) for member in (a, b))
            gram = self.directions[side][np.ix_(*index)]
        return linalg.overlap_grid(gram)


def _direction_indices(
    ranks: NDArray[np.intp], members: Sequence[int] | NDArray[np.intp]
) -> NDArray[np.intp]:
    """Return the positions of the directions of some updates among those of all."""
    stops = np.cumsum(ranks)
    return np.concatenate([np.arange(stops[i] - ranks[i], stops[i]) for i in members])


def module_products(
    updates: Sequence[Update], *, vectors: bool, all_dense_vectors: bool = False
) -> ModuleProducts:
    """Return the spectra of one module's updates, and inner products of their singular vectors.

    Parameters
    ----------
    updates
        The updates.
    vectors
        Whether the spectra need singular vectors. If False, the products of the singular vectors
        follow from those of the factors if these are well conditioned: no vector is computed.
    all_dense_vectors
        Whether large dense updates need all of their singular vectors. If False, they have as many
        as `directions_of_pairs` counts at most.
    """
    if not vectors and (joint := _joint_products(updates)) is not None:
        return joint
    k = max([u.rank for u in updates if isinstance(u, LowRankUpdate)] + [FINE_TUNE_DIRECTIONS])
    deltas: dict[int, NDArray[np.floating]] = {}
    if not all_dense_vectors and min(updates[0].shape) >= max(_LARGE_DENSE, 16 * k):
        deltas = {
            i: update.delta
            for i, update in enumerate(updates)
            if isinstance(update, DenseUpdate) and update.delta.any()
        }
    spectra = [
        partial_spectrum(update, k + 1)  # and the gap to the next one
        if isinstance(update, DenseUpdate) and i in deltas
        else spectrum(update)
        for i, update in enumerate(updates)
    ]
    if deltas:
        return ModuleProducts(spectra, None, deltas=deltas)
    if sum(s.numerical_rank for s in spectra) > _AT_ONCE:
        return ModuleProducts(spectra, None)
    bases = zip(SIDES, _stacked_bases(spectra), strict=True)
    products: dict[Side, NDArray[np.float64]] = {side: basis @ basis.T for side, basis in bases}
    return ModuleProducts(spectra, products)


def _joint_products(updates: Sequence[Update]) -> ModuleProducts | None:
    """Return the products from those of the factors; None if that loses digits or takes longer."""
    plain = [u for u in updates if isinstance(u, LowRankUpdate) and u.kronecker is None]
    ranks = [update.rank for update in plain]
    if len(plain) < len(updates) or sum(ranks) > _AT_ONCE or max(ranks) > min(plain[0].shape):
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # extreme factors are refused by the SVD
        B_gram = linalg.joint_gram([update.B.T for update in plain])
        A_gram = linalg.joint_gram([update.A for update in plain])
    joint = linalg.joint_svd(B_gram, A_gram, ranks)
    if joint is None:
        return None
    spectra = [delta_spectrum(*pair) for pair in zip(plain, joint.svds, strict=True)]
    trained = [np.arange(rank) < s.numerical_rank for rank, s in zip(ranks, spectra, strict=True)]
    index = np.flatnonzero(np.concatenate(trained))
    whole = index.size == len(A_gram)
    directions: dict[Side, NDArray[np.float64]] = {
        side: gram if whole else gram[np.ix_(index, index)]
        for side, gram in zip(SIDES, (joint.right, joint.left), strict=True)
    }
    return ModuleProducts(spectra, directions, {"A": A_gram, "B": B_gram})


def module_pairs(
    spectra: Sequence[Spectrum] | ModuleProducts, updates: Sequence[Update] | None = None
) -> ModulePairs:
    """Return φ(1, 1), φ(r, r), ω and the signed cosine of every pair of updates of one module.

    Parameters
    ----------
    spectra
        Spectra of ΔW, all of one shape; ranks may differ. Or their products at once.
    updates
        The same updates, for the evidence of a shared initialization; None leaves it out.

    Raises
    ------
    IncompatibleError
        The shapes differ.

    Notes
    -----
    One product ``(Σr, d)·(d, Σr)`` per side, of which half is computed, and O((Σr)²) more.
    """
    products = spectra if isinstance(spectra, ModuleProducts) else ModuleProducts(spectra, None)
    spectra = products.spectra
    shapes = {s.shape for s in spectra}
    if len(shapes) != 1:
        message = (
            f"The updates of '{spectra[0].name}' have shapes {sorted(shapes)}. "
            "All must adapt the same weight."
        )
        raise IncompatibleError(message)
    ranks = np.array([s.numerical_rank for s in spectra])
    sums = _similarity_sums(products, ranks)
    directions = directions_of_pairs(spectra)
    for (_, squares, _), side in zip(sums[:2], SIDES, strict=True):
        for a, b in _pairs_of_dense(spectra):
            left, right = spectra[a].vectors(side), spectra[b].vectors(side)
            gram = left[:, : directions[a, b]].T @ right[:, : directions[b, a]]
            squares[a, b] = squares[b, a] = np.square(gram).sum()
    trained = ranks > 0
    untrained = ~np.logical_and.outer(trained, trained)
    participation = np.array([s.participation_ratio for s in spectra])
    d_out, d_in = spectra[0].shape
    sides = {
        side: _pair_values(values, directions, participation, dimension, untrained)
        for side, values, dimension in zip(SIDES, sums[:2], (d_in, d_out), strict=True)
    }
    return ModulePairs(
        module=spectra[0].name,
        sides=sides,
        cosine=np.where(untrained, np.nan, np.clip(sums[2], -1.0, 1.0)),
        ranks=ranks,
        norms=np.array([s.norm for s in spectra]),
        directions=directions,
        init=None if updates is None else _init_evidence(updates, products.factors),
    )


def _init_evidence(
    updates: Sequence[Update], products: Mapping[Literal["A", "B"], NDArray[np.float64]] | None
) -> InitEvidence:
    """Return the evidence of a shared initialization of every pair, NaN for dense updates."""
    shape = len(updates), len(updates)
    arrays = {name: np.full(shape, np.nan) for name in EVIDENCE}
    every = InitEvidence(**arrays, shared=np.zeros(shape, dtype=bool), factor="A")
    low_rank = [(i, u) for i, u in enumerate(updates) if isinstance(u, LowRankUpdate)]
    if not low_rank:
        return every
    evidence = init_evidence([update for _, update in low_rank], products=products)
    members = [i for i, _ in low_rank]
    for name in (*EVIDENCE, "shared"):
        getattr(every, name)[np.ix_(members, members)] = getattr(evidence, name)
    return replace(every, factor=evidence.factor)


def _similarity_sums(
    products: ModuleProducts, ranks: NDArray[np.intp]
) -> tuple[_Sums, _Sums, NDArray[np.float64]]:
    """Return the sums of `_reduced_products`, those of large dense updates from ΔW itself.

    For these, with ``e = Σσ⁴``: ω is ``‖ΔW₁ᵀΔW₂‖²/√(e₁e₂)`` on the output side and
    ``‖ΔW₁ΔW₂ᵀ‖²/√(e₁e₂)`` on the input side, and no singular vector is needed. Their sums of
    squares stay zero, see `directions_of_pairs`.
    """
    spectra, deltas = products.spectra, products.deltas
    if not deltas:
        return _reduced_products(products, ranks, *_direction_weights(spectra))
    count = len(spectra)
    sums = np.zeros((7, count, count))
    others = [i for i in range(count) if i not in deltas]
    if others:
        some = products.selected(others)
        of_others = _reduced_products(some, ranks[others], *_direction_weights(some.spectra))
        sums[np.ix_(range(7), others, others)] = [*of_others[0], *of_others[1], of_others[2]]
    for a in deltas:
        D, s = deltas[a].astype(np.float64), spectra[a]
        for b in range(count):
            if spectra[b].untrained or (b in deltas and b < a):
                continue
            t = spectra[b]
            other = deltas.get(b) if b != a else D
            T = t.S[: t.numerical_rank]
            if other is None:
                left, right = t.vectors("output") * T, t.vectors("input") * T
                against_left, against_right = D.T @ left, D @ right
                product = float((t.vectors("output") * against_right).sum())
            else:
                M = other.astype(np.float64, copy=False)
                against_left, against_right = D.T @ M, D @ M.T
                product = float(np.vdot(D, M))
            energies = float(np.linalg.norm(s.S**2) * np.linalg.norm(t.S**2))
            first = [float(s.vectors(side)[:, 0] @ t.vectors(side)[:, 0]) ** 2 for side in SIDES]
            values = [
                first[0],
                0.0,
                float(np.linalg.norm(against_right)) ** 2 / energies,
                first[1],
                0.0,
                float(np.linalg.norm(against_left)) ** 2 / energies,
                product / (s.norm * t.norm),
            ]
            sums[:, a, b] = sums[:, b, a] = values
    return (sums[0], sums[1], sums[2]), (sums[3], sums[4], sums[5]), sums[6]


def _pairs_of_dense(spectra: Sequence[Spectrum]) -> list[tuple[int, int]]:
    """Return the pairs of trained updates, of which at least one is dense."""
    trained = [i for i, s in enumerate(spectra) if not s.untrained]
    return [
        (a, b)
        for a, b in combinations_with_replacement(trained, 2)
        if spectra[a].is_dense or spectra[b].is_dense
    ]


def _direction_weights(
    spectra: Sequence[Spectrum],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the weights of the directions in ω and in the cosine, of norm one per update."""
    energy, signed = [], []
    for values in spectra:
        s = values.S[: values.numerical_rank]
        relative = s / (s[0] if s.size else 1.0)
        energy.append(relative**2 / (np.linalg.norm(relative**2) if s.size else 1.0))
        signed.append(relative / (np.linalg.norm(relative) if s.size else 1.0))
    return np.concatenate(energy), np.concatenate(signed)


def _reduced_products(
    products: ModuleProducts,
    ranks: NDArray[np.intp],
    energy: NDArray[np.float64],
    signed: NDArray[np.float64],
) -> tuple[_Sums, _Sums, NDArray[np.float64]]:
    """Return per side (first squares, sums of squares, weighted sums), and the cosines.

    All are sums over blocks of ``U₁ᵀU₂``, computed for some updates and all later ones at a time.
    """
    count, directions = len(ranks), products.directions
    bases = [] if directions else _stacked_bases(products.spectra)
    sums = np.zeros((7, count, count))
    for block in _blocks(ranks):
        pairs = np.ix_(block.members, block.following)
        if directions is None:
            grams = [basis[block.rows] @ basis[block.columns].T for basis in bases]
        else:  # copies, since they are reduced in place
            grams = [directions[side][block.rows, block.columns].copy() for side in SIDES]
        sums[6][pairs] = block.sum_by_pair(block.weight_directions(grams[0] * grams[1], signed))
        for s, gram in enumerate(grams):
            np.square(gram, out=gram)
            sums[3 * s][pairs] = gram[np.ix_(block.row_starts, block.column_starts)]
            sums[3 * s + 1][pairs] = block.sum_by_pair(gram)
            sums[3 * s + 2][pairs] = block.sum_by_pair(block.weight_directions(gram, energy))
    lower = np.tril_indices(count, -1)
    for plane in sums:
        plane[lower] = plane.T[lower]
    return (sums[0], sums[1], sums[2]), (sums[3], sums[4], sums[5]), sums[6]


def _stacked_bases(spectra: Sequence[Spectrum]) -> list[NDArray[np.float64]]:
    """Return all singular vectors of each side as rows, ``(Σr, d)``."""
    return [np.vstack([s.vectors(side).T for s in spectra]) for side in SIDES]


class PairBlock(NamedTuple):
    """Some updates of one module compared with themselves and all later ones.

    Attributes
    ----------
    rows, columns
        Positions of h trained updates, and of the f trained ones from the first of them on.
    cosine
        ``(h, f)``: signed cosine of the updates.
    excess
        Per side ``(h, f)``: excess of ω over the random baseline c, ``(ω − c)/(1 − c)``.
    shared
        ``(h, f)``: whether a pair has a shared initialization.
    """

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    cosine: NDArray[np.float64]
    excess: Mapping[Side, NDArray[np.float64]]
    shared: NDArray[np.bool_]


def pair_blocks(
    spectra: Sequence[Spectrum], updates: Sequence[LowRankUpdate]
) -> Iterator[PairBlock]:
    """Yield `module_pairs` of low-rank updates block by block, without a matrix of all pairs.

    Every pair of trained updates is in one block, some in both orders.
    """
    ranks = np.array([s.numerical_rank for s in spectra])
    energy, signed = _direction_weights(spectra)
    participation = np.array([s.participation_ratio for s in spectra])
    d_out, d_in = spectra[0].shape
    bases = _stacked_bases(spectra)
    init_rows = InitRows(updates)
    for block in _blocks(ranks):
        grams = [basis[block.rows] @ basis[block.columns].T for basis in bases]
        cosine = block.sum_by_pair(block.weight_directions(grams[0] * grams[1], signed))
        excess: dict[Side, NDArray[np.float64]] = {}
        for side, gram, dimension in zip(SIDES, grams, (d_in, d_out), strict=True):
            omega = block.sum_by_pair(block.weight_directions(np.square(gram, out=gram), energy))
            pairs = np.outer(participation[block.members], participation[block.following])
            baseline = np.minimum(np.sqrt(pairs) / dimension, 1.0)
            excess[side] = chance.excess(np.minimum(omega, 1.0), baseline)
        shared = init_rows.shared(block.members, block.following)
        cosine = np.clip(cosine, -1.0, 1.0, out=cosine)
        yield PairBlock(block.members, block.following, cosine, excess, shared)


class _Block(NamedTuple):
    """Which products of directions belong together: of some updates with all later ones.

    ``rows`` and ``columns`` are the directions of all of them; ``members`` and ``following`` the
    positions of the trained updates among them, whose directions begin at ``row_starts`` and
    ``column_starts`` within the block.
    """

    rows: slice
    columns: slice
    members: NDArray[np.intp]
    following: NDArray[np.intp]
    row_starts: NDArray[np.intp]
    column_starts: NDArray[np.intp]

    def weight_directions(
        self, matrix: NDArray[np.float64], weights: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Multiply by the weights of both directions, in place."""
        matrix *= weights[self.rows, None]
        matrix *= weights[self.columns]
        return matrix

    def sum_by_pair(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum over the directions of each pair, ``(members, following)``."""
        by_column = np.add.reduceat(matrix, self.column_starts, axis=1)
        return np.add.reduceat(by_column, self.row_starts, axis=0)


def _blocks(ranks: NDArray[np.intp]) -> Iterator[_Block]:
    """Yield blocks that cover every pair of trained updates."""
    starts, trained = np.cumsum(ranks) - ranks, np.flatnonzero(ranks)
    rows = _ROWS if ranks.sum() > _AT_ONCE else _AT_ONCE
    first = 0
    for last in range(len(ranks)):
        if last < len(ranks) - 1 and ranks[first : last + 1].sum() < rows:
            continue
        low, high = int(starts[first]), int(starts[last] + ranks[last])
        following = trained[trained >= first]  # pairs with earlier ones are known by symmetry
        members = following[following <= last]
        if members.size:
            yield _Block(
                slice(low, high),
                slice(low, None),
                members,
                following,
                starts[members] - low,
                starts[following] - low,
            )
        first = last + 1


def _pair_values(
    sums: _Sums,
    directions: NDArray[np.intp],
    participation: NDArray[np.float64],
    dimension: int,
    untrained: NDArray[np.bool_],
) -> PairValues:
    first, squares, weighted = sums
    smaller = np.maximum(np.minimum(directions, directions.T), 1)

    def defined(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(untrained, np.nan, np.minimum(values, 1.0))

    return PairValues(
        phi_1_1=defined(first),
        phi_r_r=defined(squares / smaller),
        omega=defined(weighted),
        chance_r_r=defined(np.maximum(directions, directions.T) / dimension),
        chance_omega=defined(np.sqrt(np.outer(participation, participation)) / dimension),
        dimension=dimension,
    )


class PairAngles(NamedTuple):
    """Principal angles of every pair of N updates on one side; each ``(N, N)``, symmetric.

    NaN for pairs with an untrained update.

    Attributes
    ----------
    smallest, largest
        Smallest and largest principal angle of the directions that `directions_of_pairs` counts,
        in radians.
    weaker_half
        `weaker_half_excess`: how far the spans agree in the weaker half of their directions. On
        the input side of an update with independent columns of B it is that of the rows of A.
        NaN also on the diagonal and where it is not defined (small ranks, or near the dimension).
    phi_n_n
        φ(n, n), n the smaller of the two numerical ranks: do the strongest directions of the
        larger update agree with those of the smaller one.
    """

    smallest: NDArray[np.float64]
    largest: NDArray[np.float64]
    weaker_half: NDArray[np.float64]
    phi_n_n: NDArray[np.float64]


def pair_angles(
    products: Sequence[Spectrum] | ModuleProducts,
    side: Side,
    updates: Sequence[Update] | None = None,
) -> PairAngles:
    """Return the smallest and the largest principal angle of every pair, and the weaker half.

    ``updates`` are needed for spectra without vectors: small angles are computed from vectors.
    """
    if not isinstance(products, ModuleProducts):
        products = ModuleProducts(products, None)
    spectra = products.spectra
    angles = PairAngles(*np.full((4, len(spectra), len(spectra)), np.nan))
    trained = np.flatnonzero([s.numerical_rank for s in spectra])
    angles.smallest[trained, trained] = angles.largest[trained, trained] = 0.0
    _set_angles_of_dense(angles, spectra, side)
    _set_angles_of_low_rank(angles, products, side)
    _refine_small_angles(angles, spectra, side, updates)
    return angles


def _set_angles_of_dense(angles: PairAngles, spectra: Sequence[Spectrum], side: Side) -> None:
    """Set the angles of pairs with a dense update, one pair at a time."""
    directions = directions_of_pairs(spectra)
    for a, b in _pairs_of_dense(spectra):
        if a == b:
            continue
        left = spectra[a].vectors(side)[:, : directions[a, b]]
        right = spectra[b].vectors(side)[:, : directions[b, a]]
        theta = linalg.principal_angles(left, right)
        angles.smallest[a, b] = angles.smallest[b, a] = theta[0]
        angles.largest[a, b] = angles.largest[b, a] = theta[-1]
        n = min(left.shape[1], right.shape[1])
        phi = np.square(left[:, :n].T @ right[:, :n]).sum() / n
        angles.phi_n_n[a, b] = angles.phi_n_n[b, a] = phi


def _set_angles_of_low_rank(angles: PairAngles, products: ModuleProducts, side: Side) -> None:
    """Set the angles of pairs of low-rank updates, all pairs of two ranks at once."""
    spectra = products.spectra
    dimension = spectra[0].shape[1 if side == "input" else 0]
    low_ranks = np.array([0 if s.is_dense else s.numerical_rank for s in spectra])
    sizes = np.unique(low_ranks[low_ranks > 0]).tolist()
    for two_ranks in combinations_with_replacement(sizes, 2):
        members = [np.flatnonzero(low_ranks == rank) for rank in two_ranks]
        left, right, cosines, phi = _pair_cosines(products, members, two_ranks, side)
        angles.phi_n_n[left, right] = angles.phi_n_n[right, left] = phi
        for values, end in ((angles.smallest, 0), (angles.largest, -1)):
            theta = np.arccos(np.minimum(cosines[:, end], 1.0))
            values[left, right] = values[right, left] = theta
        excess = weaker_half_excess(cosines, two_ranks, dimension)
        angles.weaker_half[left, right] = angles.weaker_half[right, left] = excess


def _refine_small_angles(
    angles: PairAngles,
    spectra: Sequence[Spectrum],
    side: Side,
    updates: Sequence[Update] | None,
) -> None:
    """Compute small angles again from the sines: a cosine near 1 has lost their digits."""
    dense = np.array([s.is_dense for s in spectra])
    is_small = np.triu(angles.smallest < 0.1, 1) & ~np.logical_or.outer(dense, dense)
    pairs = [(int(a), int(b)) for a, b in zip(*np.nonzero(is_small), strict=True)]
    vectors = {}
    for i in {*sum(pairs, ())}:
        has_vectors = spectra[i].U is not None or not updates
        of_update = spectra[i] if has_vectors else spectrum(updates[i])  # type: ignore[index]
        vectors[i] = of_update.vectors(side)
    for a, b in pairs:
        exact = linalg.principal_angles(vectors[a], vectors[b])
        angles.smallest[a, b] = angles.smallest[b, a] = exact[0]
        angles.largest[a, b] = angles.largest[b, a] = exact[-1]


def _pair_cosines(
    products: ModuleProducts,
    members: Sequence[NDArray[np.intp]],
    two_ranks: tuple[int, int],
    side: Side,
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """Return all pairs of updates of two ranks, the cosines of their angles, and φ(n, n)."""
    rows, columns = members
    same = two_ranks[0] == two_ranks[1]
    if products.directions is None:
        spectra = products.spectra
        left = np.vstack([spectra[i].vectors(side).T for i in rows.tolist()])
        right = left if same else np.vstack([spectra[i].vectors(side).T for i in columns.tolist()])
        gram = left @ right.T
    else:
        ranks = np.array([s.numerical_rank for s in products.spectra])
        index = [_direction_indices(ranks, some) for some in members]
        gram = products.directions[side][np.ix_(*index)]
    gram = gram.reshape(len(rows), two_ranks[0], len(columns), two_ranks[1])
    i, j = np.indices((len(rows), len(columns))).reshape(2, -1)
    if same:
        i, j = np.triu_indices(len(rows), 1)
    pairs = gram.transpose(0, 2, 1, 3)[i, j]
    n = min(two_ranks)
    cosines = np.asarray(np.linalg.svd(pairs, compute_uv=False), np.float64)
    phi = np.square(pairs[:, :n, :n]).sum(axis=(1, 2)) / n
    return rows[i], columns[j], cosines, phi
