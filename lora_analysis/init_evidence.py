"""Evidence of a shared initialization in one module, for all pairs of its updates at once.

A moves little in training, and learning does not bring row k of one adapter into agreement with
row k of another. Rows that agree one by one come from the same random draw; spans that agree even
in their weakest common directions come from one initialization whose rows were mixed, as a resize
by SVD does. ``shared_init`` turns the evidence of all modules into the conclusion on a pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lora_analysis import chance, linalg
from lora_analysis.adapter import LowRankUpdate

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# The arrays of `InitEvidence` that are numbers.
EVIDENCE = ("row_cosine", "cross_cosine", "z", "other_cosine")
# Fewer common rows than this may agree with a negative sign by learning.
_LEAST_NEGATED = 4
# Cosine of rows that are singular vectors from which they are of one training.
_SINGULAR_COSINE = 0.9
# Rows whose cosines are below this share of those of random rows were made orthogonal.
_ORTHOGONAL = 0.3
# Rows whose cosines with all others are computed at a time.
_ROWS = 512
# A span has no weaker half to speak of below this rank.
_LEAST_RANK = 4


@dataclass(frozen=True, slots=True)
class ModuleInit:
    """The evidence from one module.

    Attributes
    ----------
    row_cosine
        c: mean cosine of row k of one initial factor with row k of the other; negative if one of
        them is negated.
    cross_cosine
        q: root mean square cosine of rows k and l ≠ k; None where both ranks are 1.
    z
        ``√n·c/max(q, 1/√d)`` over the n common rows; None where q is.
    other_cosine
        c′: mean cosine of column k with column k of the second factor (B).
    shared
        Whether the module has a shared initialization.
    row_space, other_space
        `weaker_half_excess` of the spans of the initial factor and of the second factor; None
        where it is not defined.
    """

    module: str
    ranks: tuple[int, int]
    row_cosine: float
    cross_cosine: float | None
    z: float | None
    other_cosine: float
    shared: bool
    row_space: float | None = None
    other_space: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class InitEvidence:
    """The evidence of one module for every pair of N updates: symmetric arrays ``(N, N)``.

    ``row_cosine``, ``cross_cosine``, ``z``, ``other_cosine`` and ``shared`` are those of
    `ModuleInit`, with NaN for its None; the diagonal compares an update with itself. ``factor`` is
    the factor whose rows are compared: the one that is initialized non-zero.
    """

    row_cosine: NDArray[np.float64]
    cross_cosine: NDArray[np.float64]
    z: NDArray[np.float64]
    other_cosine: NDArray[np.float64]
    shared: NDArray[np.bool_]
    factor: Literal["A", "B"] = "A"


def init_evidence(
    updates: Sequence[LowRankUpdate],
    *,
    factor: Literal["A", "B"] | None = None,
    products: Mapping[Literal["A", "B"], NDArray[np.float64]] | None = None,
) -> InitEvidence:
    """Return the evidence, for every pair, that two updates have a shared initialization.

    Parameters
    ----------
    updates
        Updates of one module, with one d_in; ranks may differ, and B may be untrained.
    factor
        The factor that is initialized non-zero. By default A; for embeddings the factor in which
        more pairs agree: PEFT draws their B and sets A to zero, mlx-lm does the opposite, and a
        factor that is learned from zero does not agree row by row. If none agree, the factor whose
        own rows are closer to orthogonal: learned rows are correlated. An orthogonal
        initialization draws both factors, and either may be passed.
    products
        Products of the rows of all A and of the columns of all B, ``(Σr, Σr)``, if they are at
        hand.

    Notes
    -----
    Shared if c ≥ .2 and z ≥ 5, or c ≥ .5 and z ≥ 4. c alone is not enough: learned rows correlate
    with each other. q, the same cosine over rows with different indices, is the value that
    independent rows of these factors give. From four common rows on the sign is free: (A, B) and
    (−A, −B) are one update, and a negated copy, ``−ΔW``, may have either factor negated. Two or
    three learned rows agree up to a sign too often (6 of 108 modules of rank 2 in simulations of
    independent adapters; none of 540 from rank 4 on).

    Rows that are singular vectors, as extraction and resizing by SVD leave them, carry no draw: of
    one task they agree by learning, in the order of the singular values. If both updates are
    stored in that form, ``|c| ≥ .9`` is needed, too.

    One product over all rows: O((Σr)²·d).
    """
    if factor is not None:
        return _evidence(updates, factor, products)
    from_a = _evidence(updates, "A", products)
    embeddings = all(update.layout == "embedding" for update in updates)
    if not embeddings or len({update.shape for update in updates}) > 1:
        return from_a
    return max(from_a, _evidence(updates, "B", products), key=_agreement)


def _agreement(evidence: InitEvidence) -> tuple[int, float, float]:
    """Return a key that is larger for the factor that was drawn than for a learned one."""
    # Rows of zeros are those of a factor that is not trained yet: they were not drawn either.
    zero = float(np.sum(1 - np.diagonal(evidence.row_cosine)))
    correlated = zero + float(np.nansum(np.diagonal(evidence.cross_cosine)))
    cosines = float(np.abs(np.triu(evidence.row_cosine, 1)).sum())
    return int(evidence.shared.sum()), -correlated, cosines


def _evidence(
    updates: Sequence[LowRankUpdate],
    factor: Literal["A", "B"],
    products: Mapping[Literal["A", "B"], NDArray[np.float64]] | None,
) -> InitEvidence:
    other: Literal["A", "B"] = "B" if factor == "A" else "A"
    ranks = np.array([update.rank for update in updates])
    sums, others = (
        _unit_sums(ranks, products[name])
        if products
        else _row_sums([update.A if name == "A" else update.B.T for update in updates])
        for name in (factor, other)
    )
    n = np.minimum.outer(ranks, ranks)
    dimension = updates[0].shape[1 if factor == "A" else 0]
    cosine = sums.matched / n
    cross = _cross_cosine(sums, ranks, ranks)
    z = np.sqrt(n) * cosine / np.maximum(cross, 1 / np.sqrt(dimension))
    widths = [
        [update.shape[1 if name == "A" else 0] for update in updates] for name in (factor, other)
    ]
    singular = _are_singular_vectors(ranks, (sums, others), widths)
    return InitEvidence(
        row_cosine=cosine,
        cross_cosine=cross,
        z=z,
        other_cosine=others.matched / n if len(set(widths[1])) == 1 else np.zeros_like(cosine),
        shared=_are_shared(cosine, z, n, np.logical_and.outer(singular, singular)),
        factor=factor,
    )


def rows_agree(cosine: ArrayLike, z: ArrayLike) -> NDArray[np.bool_]:
    """Return True if the rows agree one by one, by c and z of `init_evidence`."""
    cosine, z = np.asarray(cosine), np.asarray(z)
    agree: NDArray[np.bool_] = ((cosine >= 0.2) & (z >= 5)) | ((cosine >= 0.5) & (z >= 4))
    return agree


def _are_shared(
    cosine: NDArray[np.float64],
    z: NDArray[np.float64],
    common: NDArray[np.intp],
    singular: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Apply the rule of `init_evidence` to pairs with so many common rows."""
    clear = rows_agree(cosine, z) | (rows_agree(-cosine, -z) & (common >= _LEAST_NEGATED))
    clear &= ~singular | (np.abs(cosine) >= _SINGULAR_COSINE)
    # Rows equal to the last digits need no statistics: a file and its copy, a frozen A.
    shared: NDArray[np.bool_] = clear | (np.abs(cosine) > 1 - 1e-6)
    return shared


def _are_singular_vectors(
    ranks: NDArray[np.intp], sides: Sequence[_Sums], widths: Sequence[Sequence[int]]
) -> NDArray[np.bool_]:
    """Return a mask of updates whose rows of A and columns of B are all orthogonal, ``(N,)``.

    ``sides`` are the sums over the rows of both factors, ``widths`` the lengths of these.
    """
    others = np.where(ranks > 1, ranks * (ranks - 1), 1)
    # Root mean square cosine of different rows, over that of random ones.
    correlations = [
        np.sqrt(np.maximum(np.diagonal(sums.squares - sums.matched_squares), 0) / others * width)
        for sums, width in zip(sides, widths, strict=True)
    ]
    singular: NDArray[np.bool_] = (ranks > 1) & (np.maximum(*correlations) < _ORTHOGONAL)
    return singular


class InitRows:
    """The rows of A of many updates, to find shared initializations for some pairs at a time.

    Not for embeddings: the factor to compare depends on all of their pairs.
    """

    def __init__(self, updates: Sequence[LowRankUpdate]) -> None:
        self._rows = [unit_rows(update.A) for update in updates]
        self._ranks = np.array([update.rank for update in updates])
        alone = [
            _are_singular_vectors(
                np.array([u.rank]),
                (_row_sums([u.A]), _row_sums([u.B.T])),
                [[n] for n in u.shape[::-1]],
            )
            for u in updates
        ]
        self._singular = np.concatenate(alone)

    def shared(self, a: NDArray[np.intp], b: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return a mask of pairs with a shared initialization, ``(len(a), len(b))``.

        The rule is that of `init_evidence`.
        """
        rows_a, rows_b = (np.concatenate([self._rows[i] for i in members]) for members in (a, b))
        ranks_a, ranks_b = self._ranks[a], self._ranks[b]
        sums = _block_sums(rows_a @ rows_b.T, ranks_a, ranks_b)
        n = np.minimum.outer(ranks_a, ranks_b)
        cosine = sums.matched / n
        cross = _cross_cosine(sums, ranks_a, ranks_b)
        z = np.sqrt(n) * cosine / np.maximum(cross, 1 / np.sqrt(rows_a.shape[1]))
        singular = np.logical_and.outer(self._singular[a], self._singular[b])
        return _are_shared(cosine, z, n, singular)


def unit_rows(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the rows scaled to norm one; rows of zeros stay zero."""
    rows = np.array(matrix, dtype=np.float64, order="C")
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(length > 0, length, 1.0)
    return rows


class _Sums(NamedTuple):
    """Sums over the cosines of the rows of pairs of updates, one array ``(N₁, N₂)`` each.

    ``matched`` and ``matched_squares`` are over row k with row k, ``squares`` over all rows.
    """

    matched: NDArray[np.float64]
    matched_squares: NDArray[np.float64]
    squares: NDArray[np.float64]


def _cross_cosine(
    sums: _Sums, ranks_a: NDArray[np.intp], ranks_b: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Return the root mean square cosine of rows k and l ≠ k; NaN where there are none."""
    rest = np.outer(ranks_a, ranks_b) - np.minimum.outer(ranks_a, ranks_b)
    squares = np.maximum(sums.squares - sums.matched_squares, 0.0)
    return np.sqrt(squares / np.where(rest > 0, rest, np.nan))


def _row_sums(matrices: Sequence[NDArray[np.floating]]) -> _Sums:
    """Return the sums for every pair of some matrices; 0 for matrices with rows of two lengths."""
    rows = [unit_rows(matrix) for matrix in matrices]
    ranks = np.array([len(matrix) for matrix in rows])
    widths = np.array([matrix.shape[1] for matrix in rows])
    sums = _Sums(*np.zeros((3, len(rows), len(rows))))
    for width in np.unique(widths):
        members = np.flatnonzero(widths == width)
        every = np.concatenate([rows[i] for i in members])
        stops = np.cumsum(ranks[members])
        # A few hundred rows at a time with all later ones; earlier pairs by symmetry.
        groups = np.split(np.arange(len(members)), np.flatnonzero(np.diff(stops // _ROWS)) + 1)
        for group in groups:
            low, high = stops[group[0]] - ranks[members[group[0]]], stops[group[-1]]
            later = members[group[0] :]
            block = _block_sums(
                every[low:high] @ every[low:].T, ranks[members[group]], ranks[later]
            )
            for plane, values in zip(sums, block, strict=True):
                plane[np.ix_(members[group], later)] = values
                plane[np.ix_(later, members[group])] = values.T
    return sums


def _unit_sums(ranks: NDArray[np.intp], products: NDArray[np.float64]) -> _Sums:
    """Return the sums for every pair, from the products of all rows, ``(Σr, Σr)``."""
    length = np.sqrt(np.diagonal(products))
    length = np.where(length > 0, length, 1.0)
    return _block_sums(products / (length[:, None] * length), ranks, ranks)


def _block_sums(
    cosines: NDArray[np.float64], ranks_a: NDArray[np.intp], ranks_b: NDArray[np.intp]
) -> _Sums:
    """Return the sums of each pair from the cosines of all rows, which are overwritten."""
    starts_a, starts_b = (np.cumsum(ranks) - ranks for ranks in (ranks_a, ranks_b))
    matched, matched_squares = np.zeros((2, len(ranks_a), len(ranks_b)))
    # Rows k of the updates that have so many: as many gathers as there are different ranks.
    steps = np.unique(np.concatenate([ranks_a, ranks_b]))
    for low, high in itertools.pairwise([0, *steps.tolist()]):
        i, j = np.flatnonzero(ranks_a >= high), np.flatnonzero(ranks_b >= high)
        k = np.arange(low, high)
        values = cosines[starts_a[i, None, None] + k, starts_b[None, j, None] + k]  # (i, j, k)
        pairs = np.ix_(i, j)
        matched[pairs] += values.sum(axis=-1)
        matched_squares[pairs] += np.square(values).sum(axis=-1)
    np.square(cosines, out=cosines)
    by_column = np.add.reduceat(cosines, starts_b, axis=1)
    return _Sums(matched, matched_squares, np.add.reduceat(by_column, starts_a, axis=0))


def weaker_half_excess(
    cosines: NDArray[np.float64], ranks: tuple[int, int], dimension: int
) -> NDArray[np.float64]:
    """Return L: how far two spans agree even in their weaker half, as excess over random spans.

    The mean of the ⌊n/2⌋ smallest squared cosines of the n principal angles, less the mean c that
    random subspaces give, over 1 − c: 1 for equal spans, 0 for random ones on average. Learning
    aligns the leading directions of two adapters; the weaker half agrees only if the spans are
    of one initialization.

    Parameters
    ----------
    cosines
        Cosines of the principal angles, descending along the last axis, ``(…, n)``.
    ranks
        Dimensions of the two subspaces; n is the smaller.
    dimension
        Dimension of their space.

    Returns
    -------
    ndarray
        ``(…)``; NaN if n < 4, or if the ranks add up to more than half of the dimension: random
        spans agree too much there.
    """
    half = min(ranks) // 2
    if min(ranks) < _LEAST_RANK or 2 * sum(ranks) > dimension:
        return np.full(cosines.shape[:-1], np.nan)
    weaker = np.mean(np.minimum(cosines[..., -half:], 1.0) ** 2, axis=-1)
    return chance.excess(weaker, chance.weaker_half_mean(dimension, *ranks))


def _space_excess(a: NDArray[np.floating], b: NDArray[np.floating]) -> float | None:
    """Return `weaker_half_excess` of two row spaces; None if it is not defined."""
    if a.shape[1] != b.shape[1]:
        return None
    bases = []
    for matrix in (a, b):
        vectors, values = linalg.tall_svd(matrix.T)
        bases.append(vectors[:, values > values[0] * 1e-12])
    cosines = np.asarray(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False), np.float64)
    ranks = bases[0].shape[1], bases[1].shape[1]
    return _none_if_nan(float(weaker_half_excess(cosines, ranks, a.shape[1])))


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else value


def module_init(a: LowRankUpdate, b: LowRankUpdate) -> ModuleInit:
    """Return the evidence of `init_evidence` for one pair of updates, which have one d_in."""
    evidence = init_evidence([a, b])
    spaces = _space_excess(a.A, b.A), _space_excess(a.B.T, b.B.T)
    return pair_init(evidence, 0, 1, a.name, (a.rank, b.rank), spaces=spaces)


def pair_init(
    evidence: InitEvidence,
    a: int,
    b: int,
    module: str,
    ranks: tuple[int, int],
    *,
    spaces: tuple[float | None, float | None],
) -> ModuleInit:
    """Return the evidence for pair (a, b).

    Parameters
    ----------
    evidence
        The evidence on every pair.
    a, b
        Positions of the two updates in it.
    module
        Name of the module.
    ranks
        Stored ranks of the two updates.
    spaces
        `weaker_half_excess` of the input and of the output side; None or NaN if not defined.
    """
    row_space, other_space = spaces if evidence.factor == "A" else spaces[::-1]
    has_other_rows = ranks != (1, 1)
    return ModuleInit(
        module=module,
        ranks=ranks,
        row_cosine=float(evidence.row_cosine[a, b]),
        cross_cosine=float(evidence.cross_cosine[a, b]) if has_other_rows else None,
        z=float(evidence.z[a, b]) if has_other_rows else None,
        other_cosine=float(evidence.other_cosine[a, b]),
        shared=bool(evidence.shared[a, b]),
        row_space=None if row_space is None else _none_if_nan(row_space),
        other_space=None if other_space is None else _none_if_nan(other_space),
    )
