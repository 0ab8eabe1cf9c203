"""Energy of each adapter that parts common to the others hold, one module at a time.

For every split of the members into a basis and the others, each adapter outside the basis is
explained by the mean of the basis, by its leading matrices, and by its joint leading directions.
Everything follows from the singular vectors: ΔW is never formed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from lora_analysis import chance
from lora_analysis.spectra import spectrum
from lora_analysis.studies.module_walk import updates_by_shape
from lora_analysis.studies.pair_classes import ModuleExclusion

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter
    from lora_analysis.spectra import Spectrum

# What may explain an adapter: the mean of the others; k matrices of the others, as they are and
# beyond their mean; and their joint k directions of both sides together, and of each side.
PARTS: Final = ("mean", "matrices", "matrices_beyond_mean", "directions", "input", "output")
# A larger group is left out in so many parts, instead of one adapter at a time: each part costs
# an eigendecomposition over the directions of all others.
MOST_FOLDS: Final = 16
# Random subsets of each smaller size.
_SUBSETS: Final = 4
# Two form the smallest basis, and one is explained.
FEWEST: Final = 3
# A module needs ROOM·k dimensions on both sides: in fewer, random subspaces overlap.
ROOM: Final = 4
# Eigenvalues of Gram matrices below this share of the largest are not resolved.
_RESOLVED: Final = 1e-10
# Draws of the eigenvalues of random matrices.
_DRAWS: Final = 8


class BasisSplit(NamedTuple):
    """The members that form a basis, and those that it has to explain, by position."""

    size: int
    basis: NDArray[np.intp]
    outside: NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class ModuleShares:
    """Shares of energy in one module of N members, followed by T adapters of other groups.

    Attributes
    ----------
    shares
        ``(P, S, N + T)``: mean over the splits of a size of the share that each of `PARTS` holds,
        signed for the mean; NaN for adapters that are never outside a basis, and without the
        module.
    chance
        ``(P, S)``: its mean for random directions (exact).
    variance
        ``(P,)``: the variance of one share at the largest size, for random directions.
    cosines
        ``(N, N)``: signed cosines of the members; NaN without the module.
    explained, explained_chance
        ``(N,)``: cumulated share of all members' energy in their own leading matrices, and its mean
        for random matrices; None if a member lacks the module.
    """

    module: str
    shares: NDArray[np.float64]
    chance: NDArray[np.float64]
    variance: NDArray[np.float64]
    cosines: NDArray[np.float64]
    explained: NDArray[np.float64] | None
    explained_chance: NDArray[np.float64] | None


def group_sizes(count: int) -> tuple[int, ...]:
    """Return the sizes of a basis from ``count`` members: powers of two, and the largest."""
    largest = count - -(-count // min(count, MOST_FOLDS))
    return (*(2**i for i in range(1, 20) if 2**i < largest), largest)


def group_splits(count: int) -> list[BasisSplit]:
    """Return the splits of ``count`` members, the same in every run.

    At the largest size, every member is outside once: alone up to `MOST_FOLDS` members, else
    together with as few others as possible.
    """
    rng = np.random.default_rng(0)
    *smaller, largest = group_sizes(count)
    splits = []
    for index, size in enumerate(smaller):
        for _ in range(_SUBSETS):
            order = rng.permutation(count)
            splits.append(BasisSplit(index, order[:size], order[size:]))
    for outside in np.array_split(rng.permutation(count), min(count, MOST_FOLDS)):
        basis = np.setdiff1d(rng.permutation(count), outside, assume_unique=True)
        splits.append(BasisSplit(len(smaller), basis[:largest], outside))
    return splits


class _Frames(NamedTuple):
    """The singular vectors of all adapters on one side, next to each other."""

    vectors: NDArray[np.float64]
    weights: NDArray[np.float64]
    columns: Sequence[NDArray[np.intp]]
    gram: NDArray[np.float64] | None

    @classmethod
    def of(cls, vectors: NDArray[np.float64], spectra: Sequence[Spectrum]) -> _Frames:
        """Return frames, with the products of all vectors if these are fewer than dimensions."""
        ends = np.cumsum([s.numerical_rank for s in spectra])
        columns = [
            np.arange(end - s.numerical_rank, end) for end, s in zip(ends, spectra, strict=True)
        ]
        # σ beyond the numerical rank are rounding errors: the others are scaled to norm one.
        values = [s.S[: s.numerical_rank] / s.S[0] for s in spectra]
        weights = np.concatenate([part / np.linalg.norm(part) for part in values])
        few = vectors.shape[1] <= vectors.shape[0]
        return cls(vectors, weights, columns, vectors.T @ vectors if few else None)

    def products(self, columns: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the products of some vectors with all of them."""
        if self.gram is not None:
            return self.gram[columns]
        return self.vectors[:, columns].T @ self.vectors

    def project(self, basis: NDArray[np.intp], k: int) -> NDArray[np.float64] | None:
        """Project all weighted vectors on the leading k directions of some adapters, ``(k, R)``.

        None if these adapters do not have k directions.
        """
        columns = np.concatenate([self.columns[i] for i in basis.tolist()])
        if len(columns) < k:
            return None
        weights = self.weights[columns]
        if self.gram is not None:
            rows = weights[:, None] * self.gram[columns]  # (R_J, R)
            values, vectors = _leading(rows[:, columns] * weights, k)
        else:
            weighted = self.vectors[:, columns] * weights
            values, vectors = _leading(weighted @ weighted.T, k)
        if values[-1] <= _RESOLVED * values[0]:
            return None
        if self.gram is not None:
            return np.asarray((vectors / np.sqrt(values)).T @ rows * self.weights)
        return np.asarray(vectors.T @ self.vectors * self.weights)


def _leading(matrix: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], ...]:
    """Return the k leading eigenvalues and eigenvectors of a symmetric matrix, descending."""
    from scipy.linalg import eigh

    size = len(matrix)
    values, vectors = eigh(matrix, subset_by_index=(size - k, size - 1), check_finite=False)
    return values[::-1], vectors[:, ::-1]


def module_shares(
    adapters: Sequence[Adapter], count: int, splits: Sequence[BasisSplit], k: int, module: str
) -> ModuleShares | ModuleExclusion:
    """Return the shares of one module, or why it is left out.

    It needs three trained members of one shape, and 4k dimensions on both sides.

    Parameters
    ----------
    adapters
        The members of the group, then the adapters of other groups.
    count
        Number of members.
    splits
        From `group_splits`.
    k
        Number of matrices, and of directions of each side.
    module
        Name of the module.
    """
    spectra = _usable_spectra(adapters, count, k, module)
    if isinstance(spectra, ModuleExclusion):
        return spectra
    present = np.array(list(spectra), dtype=np.intp)
    values = list(spectra.values())
    shape = values[0].shape
    output = _Frames.of(np.hstack([s.vectors("output") for s in values]), values)
    inputs = _Frames.of(np.hstack([s.vectors("input") for s in values]), values)
    cosines = _cosines(output, inputs)
    row = np.full(len(adapters), -1)
    row[present] = np.arange(len(present))
    sizes = max(split.size for split in splits) + 1
    sums, counts = np.zeros((2, len(PARTS), sizes, len(adapters)))
    expected, expected_counts = np.zeros((2, len(PARTS), sizes))
    strangers = np.arange(count, len(adapters))
    for split in splits:
        basis = row[split.basis][row[split.basis] >= 0]
        outside = np.concatenate([split.outside, strangers])
        outside = outside[row[outside] >= 0]
        if len(basis) < 2 or not len(outside):
            continue
        shares, by_chance = np.full((len(PARTS), len(outside)), np.nan), np.full(len(PARTS), np.nan)
        shares[:3], by_chance[:3] = _matrix_shares(cosines, basis, row[outside], k, shape)
        shares[3:], by_chance[3:] = _direction_shares(output, inputs, basis, row[outside], k)
        defined = ~np.isnan(shares)
        sums[:, split.size, outside] += np.where(defined, shares, 0.0)
        counts[:, split.size, outside] += defined
        expected[:, split.size] += np.nan_to_num(by_chance)
        expected_counts[:, split.size] += ~np.isnan(by_chance)
    members = present[present < count]
    plane = np.full((count, count), np.nan)
    plane[np.ix_(members, members)] = cosines[: len(members), : len(members)]
    whole = len(members) == count
    with np.errstate(invalid="ignore"):
        return ModuleShares(
            module=module,
            shares=sums / counts,
            chance=expected / expected_counts,
            variance=_variance(values[: len(members)], shape, k),
            cosines=plane,
            explained=_explained(plane) if whole else None,
            explained_chance=_explained_by_chance(count, shape, module) if whole else None,
        )


def _usable_spectra(
    adapters: Sequence[Adapter], count: int, k: int, module: str
) -> dict[int, Spectrum] | ModuleExclusion:
    """Return the spectra of trained updates by position, of the shape that most members have."""
    by_shape = updates_by_shape(adapters, module)
    same = max(by_shape, key=lambda group: sum(i < count for i in group.members), default=None)
    if same is None:
        return ModuleExclusion.NOT_IN_ALL
    if min(same.updates[0].shape) < ROOM * k:
        return ModuleExclusion.NO_ROOM
    every = {i: spectrum(u) for i, u in zip(same.members, same.updates, strict=True)}
    trained = {i: s for i, s in every.items() if not s.untrained and s.numerical_rank}
    if sum(i < count for i in trained) < FEWEST:
        return ModuleExclusion.NOT_IN_ALL
    return trained


def _cosines(output: _Frames, inputs: _Frames) -> NDArray[np.float64]:
    """Return the signed cosines of all updates, ``(n, n)``."""
    starts = [columns[0] for columns in output.columns]
    rows = []
    for columns in output.columns:
        product = output.products(columns) * inputs.products(columns)
        product *= output.weights[columns, None] * output.weights
        rows.append(np.add.reduceat(product.sum(axis=0), starts))
    cosines = np.stack(rows)
    return np.asarray((cosines + cosines.T) / 2)


def _matrix_shares(
    cosines: NDArray[np.float64],
    basis: NDArray[np.intp],
    outside: NDArray[np.intp],
    k: int,
    shape: tuple[int, int],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the shares that the mean and the leading matrices of a basis hold, by chance too."""
    n, space = len(basis), float(shape[0]) * shape[1]
    H = cosines[np.ix_(outside, basis)]
    K = cosines[np.ix_(basis, basis)]
    by_row, mean_square = K.mean(axis=1), float(K.mean())
    signed = np.zeros(len(outside))
    K_centered, H_centered = K, H
    if mean_square > _RESOLVED / n:  # else the basis cancels, and has no mean
        signed = H.mean(axis=1) / np.sqrt(mean_square)
        K_centered = K - np.outer(by_row, by_row) / mean_square
        H_centered = H - np.outer(H.mean(axis=1), by_row) / mean_square
    shares, by_chance = [signed * np.abs(signed)], [0.0]
    for gram, rows in ((K, H), (K_centered, H_centered)):
        values, vectors = np.linalg.eigh(gram)
        chosen = np.flatnonzero(values > _RESOLVED * n)[::-1][:k]
        energy = (rows @ vectors[:, chosen]) ** 2 / values[chosen]
        shares.append(energy.sum(axis=1))
        by_chance.append(len(chosen) / space)
    return np.stack(shares), np.array(by_chance)


def _direction_shares(
    output: _Frames,
    inputs: _Frames,
    basis: NDArray[np.intp],
    outside: NDArray[np.intp],
    k: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the shares in the joint directions of a basis: both sides, input, and output."""
    left, right = output.project(basis, k), inputs.project(basis, k)
    shares = np.full((3, len(outside)), np.nan)
    if left is None or right is None:
        return shares, np.full(3, np.nan)
    for i, index in enumerate(outside):
        columns = output.columns[index]
        joint = left[:, columns] @ (right[:, columns] / output.weights[columns]).T  # (k, k)
        shares[:, i] = [np.sum(block**2) for block in (joint, right[:, columns], left[:, columns])]
    d_out, d_in = len(output.vectors), len(inputs.vectors)
    return shares, np.array([k / d_out * k / d_in, k / d_in, k / d_out])


def _variance(members: Sequence[Spectrum], shape: tuple[int, int], k: int) -> NDArray[np.float64]:
    """Return the variance of a member's shares for random directions, in the order of `PARTS`.

    Exact for directions. A cosine with a fixed matrix has the variance 1/D, D = d_out·d_in, and an
    excess kurtosis of at most 6/PR: these are upper bounds of its square and of sums of k squares.
    """
    fourth = float(np.mean([1 / s.participation_ratio for s in members]))
    space = float(shape[0]) * shape[1]
    matrices = (2 * k + 6 * k**2 * fourth) / space**2
    sides = [
        float(chance.one_sided_energy_variance(1.0, fourth, dimension, k))
        for dimension in (shape[1], shape[0])
    ]
    joint = float(chance.projected_energy_variance(1.0, fourth, shape, k))
    return np.array([(3 + 6 * fourth) / space**2, matrices, matrices, joint, *sides])


def _explained(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.cumsum(np.linalg.eigvalsh(cosines)[::-1]) / len(cosines)


def _explained_by_chance(count: int, shape: tuple[int, int], module: str) -> NDArray[np.float64]:
    """Return `_explained` of random matrices, a mean over draws.

    The Gram matrix of N Gaussian vectors of R^D is L·Lᵀ with normal entries below the diagonal of L
    and chi-distributed ones on it (Bartlett): the vectors need not be drawn.
    """
    rng = np.random.default_rng(zlib.crc32(module.encode()))
    freedom = float(shape[0]) * shape[1] - np.arange(count)
    draws = []
    for _ in range(_DRAWS):
        L = np.tril(rng.standard_normal((count, count)), -1)
        L[np.diag_indices(count)] = np.sqrt(rng.chisquare(np.maximum(freedom, 1.0)))
        L /= np.linalg.norm(L, axis=1, keepdims=True)
        draws.append(_explained(L @ L.T))
    return np.asarray(np.mean(draws, axis=0))
