"""Detect a shared initialization: an artifact that makes unrelated adapters look alike.

A moves little in training. Two unrelated adapters whose scripts ran with the same seed share
their initial A and so most of their input directions: overlaps of 0.93 to 0.998 on real pairs
whose output sides agree no better than random subspaces. The rule below separates such pairs from
independent ones by the individual rows of A, which learning does not bring into agreement.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

import numpy as np

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.errors import IncompatibleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class InitRelation(StrEnum):
    """How the initial factors of two adapters are related."""

    INDEPENDENT = "independent"  # no module has a shared initialization
    PARTLY_SHARED = "partly shared"  # some do; these are excluded on the input side
    SHARED = "shared initialization"  # all do, and B was learned apart: same script, same seed
    SAME_RUN = "same training run"  # all do, and B agrees too: one run twice, or continued
    SAME_SPACE = "same input space"  # rows differ, spans agree: resized, or derived from data or W
    INCONCLUSIVE = "inconclusive"  # rank 1 on both sides leaves no other row to compare with
    NOT_APPLICABLE = "not applicable"  # no low-rank factors


# No pair of independent adapters was found whose spans agree this well while rows differ.
SAME_SPACE = 0.7
# Median cosine of the second factor (B) from which two adapters are from the same training run.
SAME_RUN = 0.4
# Mean cosine of rows that does not contradict an initialization that other modules share.
_CONSISTENT = 0.5


@dataclass(frozen=True, slots=True)
class ModuleInit:
    """The evidence from one module.

    Attributes
    ----------
    row_cosine
        c: mean cosine of row k of one initial factor with row k of the other.
    cross_cosine
        q: root mean square cosine of rows k and l ≠ k; None where both ranks are 1.
    z
        ``√n·c/max(q, 1/√d)`` over the n common rows; None where q is.
    other_cosine
        Mean cosine of column k with column k of the second factor (B).
    shared
        Whether the module has a shared initialization.
    """

    module: str
    ranks: tuple[int, int]
    row_cosine: float
    cross_cosine: float | None
    z: float | None
    other_cosine: float
    shared: bool


@dataclass(frozen=True, slots=True)
class SharedInit:
    """The conclusion on the initialization of a pair of adapters.

    Attributes
    ----------
    kind
        How the initial factors are related.
    modules
        Names of the modules with a shared initialization, in order.
    compared
        Number of modules compared.
    other_cosine
        Median over the shared modules of the matched cosine of B; None if there are none.
    """

    kind: InitRelation
    modules: tuple[str, ...]
    compared: int
    other_cosine: float | None = None

    @property
    def contaminates_input(self) -> bool:
        """True if the input-side overlap may come from the initialization alone in all modules."""
        return self.kind in (InitRelation.SHARED, InitRelation.SAME_RUN, InitRelation.SAME_SPACE)


@dataclass(frozen=True, slots=True, eq=False)
class InitEvidence:
    """The evidence of one module for every pair of N updates: symmetric arrays ``(N, N)``.

    ``row_cosine``, ``cross_cosine``, ``z``, ``other_cosine`` and ``shared`` are those of
    `ModuleInit`, with NaN for its None; the diagonal compares an update with itself.
    """

    row_cosine: NDArray[np.float64]
    cross_cosine: NDArray[np.float64]
    z: NDArray[np.float64]
    other_cosine: NDArray[np.float64]
    shared: NDArray[np.bool_]


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
        factor that is learned from zero does not agree row by row. An orthogonal initialization
        draws both factors, and either may be passed.

    Notes
    -----
    c alone is not enough: learned rows correlate with each other. q, the same cosine over rows
    with different indices, is the value that independent rows of these factors give. One product
    over all rows: O((Σr)²·d).
    """
    if factor is not None:
        return _evidence(updates, factor)
    from_a = _evidence(updates, "A")
    embeddings = all(update.layout == "embedding" for update in updates)
    if not embeddings or len({update.shape for update in updates}) > 1:
        return from_a

    def agreement(evidence: InitEvidence) -> tuple[int, float]:
        return int(evidence.shared.sum()), float(np.nansum(np.triu(evidence.z, 1)))

    return max(from_a, _evidence(updates, "B"), key=agreement)


def _evidence(updates: Sequence[LowRankUpdate], factor: Literal["A", "B"]) -> InitEvidence:
    rows = [_unit_rows(u.A if factor == "A" else u.B.T) for u in updates]
    others = [_unit_rows(u.B.T if factor == "A" else u.A) for u in updates]
    ranks = np.array([len(matrix) for matrix in rows])
    n = np.minimum.outer(ranks, ranks)
    matched, matched_squares = _matched_sums(rows)
    rest = np.outer(ranks, ranks) - n
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = np.maximum(_block_squares(rows, ranks) - matched_squares, 0.0)
        cross = np.sqrt(squares / np.where(rest > 0, rest, np.nan))
    cosine = matched / n
    z = np.sqrt(n) * cosine / np.maximum(cross, 1 / np.sqrt(rows[0].shape[1]))
    comparable = len({matrix.shape[1] for matrix in others}) == 1
    return InitEvidence(
        row_cosine=cosine,
        cross_cosine=cross,
        z=z,
        other_cosine=_matched_sums(others)[0] / n if comparable else np.zeros_like(cosine),
        shared=_are_shared(cosine, z),
    )


def _are_shared(cosine: NDArray[np.float64], z: NDArray[np.float64]) -> NDArray[np.bool_]:
    clear = ((cosine >= 0.2) & (z >= 5)) | ((cosine >= 0.5) & (z >= 4))
    # Rows equal to the last digits need no statistics: a file and its copy, a frozen A.
    shared: NDArray[np.bool_] = clear | (cosine > 1 - 1e-6)
    return shared


class InitRows:
    """The rows of A of many updates, to find shared initializations for some pairs at a time.

    Not for embeddings: the factor to compare depends on all of their pairs.
    """

    def __init__(self, updates: Sequence[LowRankUpdate]) -> None:
        rows = [_unit_rows(update.A) for update in updates]
        self._ranks = np.array([len(matrix) for matrix in rows])
        self._starts = np.cumsum(self._ranks) - self._ranks
        self._rows = np.concatenate(rows)

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
        return _are_shared(cosine, z)

    def _rows_of(self, members: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        ranks = self._ranks[members]
        starts = np.cumsum(ranks) - ranks
        indices = np.repeat(self._starts[members] - starts, ranks) + np.arange(ranks.sum())
        return self._rows[indices], starts


def _unit_rows(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
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


def module_init(a: LowRankUpdate, b: LowRankUpdate) -> ModuleInit:
    """Return the evidence of `init_evidence` for one pair of updates, which have one d_in."""
    return pair_init(init_evidence([a, b]), 0, 1, a.name, (a.rank, b.rank))


def pair_init(
    evidence: InitEvidence, a: int, b: int, module: str, ranks: tuple[int, int]
) -> ModuleInit:
    """Return the evidence on the pair (a, b) from that on every pair."""
    has_other_rows = ranks != (1, 1)
    return ModuleInit(
        module=module,
        ranks=ranks,
        row_cosine=float(evidence.row_cosine[a, b]),
        cross_cosine=float(evidence.cross_cosine[a, b]) if has_other_rows else None,
        z=float(evidence.z[a, b]) if has_other_rows else None,
        other_cosine=float(evidence.other_cosine[a, b]),
        shared=bool(evidence.shared[a, b]),
    )


@dataclass(frozen=True, slots=True)
class Drift:
    """How far A moved from its initial value.

    Attributes
    ----------
    angular
        ``1 − cos(A, A₀)`` over all entries, in [0, 2]: 0 if only the size of A changed.
    row_angular
        Mean over rows of ``1 − cos`` of row k of A and row k of A₀.
    radial
        ``‖A‖/‖A₀‖ − 1``: negative if weight decay shrank A.
    """

    angular: float
    row_angular: float
    radial: float


def drift(update: LowRankUpdate, initial: NDArray[np.floating]) -> Drift:
    """Return how far A moved from its initial value, in direction and in size.

    Parameters
    ----------
    update
        The trained update.
    initial
        The initial A, ``(r, d_in)``.

    Raises
    ------
    IncompatibleError
        The shapes differ.
    """
    if initial.shape != update.A.shape:
        message = (
            f"The initial A of '{update.name}' is {initial.shape}, the trained one "
            f"{update.A.shape}. Was it drawn for another rank?"
        )
        raise IncompatibleError(message)
    trained, start = update.A.astype(np.float64), initial.astype(np.float64)
    sizes = np.linalg.norm(trained), np.linalg.norm(start)
    whole = [matrix.reshape(1, -1) for matrix in (trained, start)]
    return Drift(
        angular=float(_one_minus_cosines(*whole)[0]),
        row_angular=float(np.mean(_one_minus_cosines(trained, start))),
        radial=float(sizes[0] / sizes[1] - 1) if sizes[1] else float("inf"),
    )


def _one_minus_cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 − cos of paired rows; half the squared distance of unit rows keeps small ones."""
    apart = _unit_rows(a) - _unit_rows(b)
    return np.asarray(np.sum(apart**2, axis=1) / 2)


def classify_init(
    modules: Sequence[ModuleInit], input_similarity: Sequence[float] = ()
) -> SharedInit:
    """Return how the initializations of two adapters are related.

    Parameters
    ----------
    modules
        One `ModuleInit` per common low-rank module. Modules of rank 1 on both sides are
        inconclusive by themselves and are ignored if there are others.
    input_similarity
        φ_input(r, r) of the same modules, to detect the same span with different rows. Values
        of ranks close to the dimension should be left out: they are large by chance.
    """
    if not modules:
        return SharedInit(InitRelation.NOT_APPLICABLE, (), 0)
    decidable = [module for module in modules if module.ranks != (1, 1)]
    if not decidable:
        return _classify_rank_one(modules)
    shared = [module for module in decidable if module.shared]
    if shared:
        same_run = _is_consistent_with_one_run(decidable)
        return _classify_shared(decidable if same_run else shared, len(decidable))
    if len(input_similarity) and float(np.median(input_similarity)) >= SAME_SPACE:
        return SharedInit(InitRelation.SAME_SPACE, (), len(decidable))
    return SharedInit(InitRelation.INDEPENDENT, (), len(decidable))


def _classify_rank_one(modules: Sequence[ModuleInit]) -> SharedInit:
    """Classify a pair of rank 1: only many modules of one sign show a shared initialization."""
    cosines = np.array([module.row_cosine for module in modules])
    strong = np.abs(cosines) >= 0.5
    if strong.sum() >= 6 and abs(np.sign(cosines[strong]).sum()) == strong.sum():
        shared = [module for module, is_strong in zip(modules, strong, strict=True) if is_strong]
        return _classify_shared(shared, len(modules))
    return SharedInit(InitRelation.INCONCLUSIVE, (), len(modules))


def _classify_shared(shared: Sequence[ModuleInit], compared: int) -> SharedInit:
    names = tuple(module.module for module in shared)
    other = float(np.median([module.other_cosine for module in shared]))
    kind = InitRelation.SAME_RUN if other >= SAME_RUN else InitRelation.SHARED
    if len(shared) < compared:
        kind = InitRelation.PARTLY_SHARED
    return SharedInit(kind, names, compared, other)


def _is_consistent_with_one_run(modules: Sequence[ModuleInit]) -> bool:
    """Return True if the inconclusive modules are consistent with a single run.

    If training has aligned the rows of a small rank, q is as large as c and z is small, while
    rows and columns of the two adapters agree all the same.
    """
    rest = [module for module in modules if not module.shared]
    other = float(np.median([module.other_cosine for module in modules]))
    return other >= SAME_RUN and all(module.row_cosine >= _CONSISTENT for module in rest)
