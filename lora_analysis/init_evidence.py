"""Evidence of a shared initialization in one module, for all pairs of its updates at once.

A moves little in training, and learning does not bring row k of one adapter into agreement with
row k of another. Rows that agree one by one come from the same random draw; spans that agree even
in their weakest common directions come from one initialization whose rows were mixed, as a resize
by SVD does. ``shared_init`` turns the evidence of all modules into the conclusion on a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
    updates: Sequence[LowRankUpdate], *, factor: Literal["A", "B"] | None = None
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
        return _evidence(updates, factor)
    from_a = _evidence(updates, "A")
    embeddings = all(update.layout == "embedding" for update in updates)
    if not embeddings or len({update.shape for update in updates}) > 1:
        return from_a
    return max(from_a, _evidence(updates, "B"), key=_agreement)


def _agreement(evidence: InitEvidence) -> tuple[int, float, float]:
    """Return a key that is larger for the factor that was drawn than for a learned one."""
    # Rows of zeros are those of a factor that is not trained yet: they were not drawn either.
    zero = float(np.sum(1 - np.diagonal(evidence.row_cosine)))
    correlated = zero + float(np.nansum(np.diagonal(evidence.cross_cosine)))
    cosines = float(np.abs(np.triu(evidence.row_cosine, 1)).sum())
    return int(evidence.shared.sum()), -correlated, cosines


def _evidence(updates: Sequence[LowRankUpdate], factor: Literal["A", "B"]) -> InitEvidence:
    rows = [unit_rows(u.A if factor == "A" else u.B.T) for u in updates]
    others = [unit_rows(u.B.T if factor == "A" else u.A) for u in updates]
    ranks = np.array([len(matrix) for matrix in rows])
    n = np.minimum.outer(ranks, ranks)
    matched, matched_squares = _matched_sums(rows)
    rest = np.outer(ranks, ranks) - n
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = np.maximum(_block_squares(rows, ranks) - matched_squares, 0.0)
        cross = np.sqrt(squares / np.where(rest > 0, rest, np.nan))
    cosine = matched / n
    z = np.sqrt(n) * cosine / np.maximum(cross, 1 / np.sqrt(rows[0].shape[1]))
    singular = _are_singular_vectors(rows, others)
    comparable = len({matrix.shape[1] for matrix in others}) == 1
    return InitEvidence(
        row_cosine=cosine,
        cross_cosine=cross,
        z=z,
        other_cosine=_matched_sums(others)[0] / n if comparable else np.zeros_like(cosine),
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
    rows: Sequence[NDArray[np.float64]], columns: Sequence[NDArray[np.float64]]
) -> NDArray[np.bool_]:
    """Return a mask of updates whose rows of A and columns of B are all orthogonal, ``(N,)``."""

    def correlation(unit: NDArray[np.float64]) -> float:
        """Return the root mean square cosine of different rows, over that of random ones."""
        gram = unit @ unit.T
        others = len(unit) * (len(unit) - 1)
        squares = np.sum(np.square(gram)) - np.sum(np.square(np.diagonal(gram)))
        return float(np.sqrt(max(squares, 0.0) / others * unit.shape[1]))

    return np.array(
        [
            len(a) > 1 and max(correlation(a), correlation(b)) < _ORTHOGONAL
            for a, b in zip(rows, columns, strict=True)
        ]
    )


class InitRows:
    """The rows of A of many updates, to find shared initializations for some pairs at a time.

    Not for embeddings: the factor to compare depends on all of their pairs.
    """

    def __init__(self, updates: Sequence[LowRankUpdate]) -> None:
        rows = [unit_rows(update.A) for update in updates]
        self._ranks = np.array([len(matrix) for matrix in rows])
        self._starts = np.cumsum(self._ranks) - self._ranks
        self._rows = np.concatenate(rows)
        columns = [unit_rows(update.B.T) for update in updates]
        self._singular = _are_singular_vectors(rows, columns)

    def shared(self, a: NDArray[np.intp], b: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return a mask of pairs with a shared initialization, ``(len(a), len(b))``.

        The rule is that of `init_evidence`.
        """
        rows_a, starts_a = self._rows_of(a)
        rows_b, starts_b = self._rows_of(b)
        products = rows_a @ rows_b.T
        matched, matched_squares = np.zeros((2, len(a), len(b)))
        for k in range(min(self._ranks[a].max(), self._ranks[b].max())):
            i, j = np.flatnonzero(self._ranks[a] > k), np.flatnonzero(self._ranks[b] > k)
            pairs = np.ix_(i, j)
            kth = products[np.ix_(starts_a[i] + k, starts_b[j] + k)]
            matched[pairs] += kth
            matched_squares[pairs] += kth**2
        np.square(products, out=products)
        by_column = np.add.reduceat(products, starts_b, axis=1)
        squares = np.add.reduceat(by_column, starts_a, axis=0)
        n = np.minimum.outer(self._ranks[a], self._ranks[b])
        rest = np.outer(self._ranks[a], self._ranks[b]) - n
        with np.errstate(divide="ignore", invalid="ignore"):
            rest_squares = np.maximum(squares - matched_squares, 0.0)
            cross = np.sqrt(rest_squares / np.where(rest > 0, rest, np.nan))
        cosine = matched / n
        z = np.sqrt(n) * cosine / np.maximum(cross, 1 / np.sqrt(self._rows.shape[1]))
        singular = np.logical_and.outer(self._singular[a], self._singular[b])
        return _are_shared(cosine, z, n, singular)

    def _rows_of(self, members: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        ranks = self._ranks[members]
        starts = np.cumsum(ranks) - ranks
        indices = np.repeat(self._starts[members] - starts, ranks) + np.arange(ranks.sum())
        return self._rows[indices], starts


def unit_rows(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the rows scaled to norm one; rows of zeros stay zero."""
    rows = np.array(matrix, dtype=np.float64, order="C")
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(length > 0, length, 1.0)
    return rows


def _matched_sums(
    rows: Sequence[NDArray[np.float64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return, for every pair, the sums of row k times row k and of its square, ``(N, N)`` each."""
    sums, squares = np.zeros((2, len(rows), len(rows)))
    for k in range(max(map(len, rows))):
        members = [i for i, matrix in enumerate(rows) if len(matrix) > k]
        kth = np.stack([rows[i][k] for i in members])
        products = kth @ kth.T
        sums[np.ix_(members, members)] += products
        squares[np.ix_(members, members)] += products**2
    return sums, squares


def _block_squares(
    rows: Sequence[NDArray[np.float64]], ranks: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Return, for every pair, the sum of squares over all products of their rows, ``(N, N)``."""
    every = np.concatenate(rows)
    starts = np.cumsum(ranks) - ranks
    squares = np.empty((len(rows), len(rows)))
    for i, (start, rank) in enumerate(zip(starts, ranks, strict=True)):
        products = every[start : start + rank] @ every[start:].T  # earlier pairs by symmetry
        sums = np.add.reduceat(np.sum(products**2, axis=0), starts[i:] - start)
        squares[i, i:] = squares[i:, i] = sums
    return squares


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
    return _optional(float(weaker_half_excess(cosines, ranks, a.shape[1])))


def _optional(value: float) -> float | None:
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
    """Return the evidence on the pair (a, b) from that on every pair.

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
        row_space=None if row_space is None else _optional(row_space),
        other_space=None if other_space is None else _optional(other_space),
    )
