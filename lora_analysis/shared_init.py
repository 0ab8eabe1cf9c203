"""Do two adapters share their initial factor? The artifact that makes strangers look alike.

A moves little in training. Two unrelated adapters whose scripts ran with the same seed share
their initial A and so most of their input directions: overlaps of 0.93 to 0.998 on real pairs
whose output sides agree no better than chance. The rule below tells such pairs from independent
ones by the rows of A themselves, one by one, which no learning brings into line.
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


# A pair of spans this alike without alike rows was not found among independent adapters.
SAME_SPACE = 0.7
# Median cosine of the other factor from which two adapters are not two samples.
SAME_RUN = 0.4
# Mean cosine of rows that is no contradiction to a start that other modules share.
_ALIKE = 0.5


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
        Mean cosine of column k with column k of the other factor (B).
    shared
        Whether the module starts from the same rows.
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
    """The verdict on a pair of adapters.

    Attributes
    ----------
    kind
        One of the outcomes; see the module's text.
    modules
        Names of the modules that share their start, in order.
    compared
        How many modules were compared.
    other_cosine
        Median over the shared modules of the matched cosine of B; None if there are none.
    """

    kind: InitRelation
    modules: tuple[str, ...]
    compared: int
    other_cosine: float | None = None

    @property
    def contaminates_input(self) -> bool:
        """True where an input-side overlap of all modules may come from the start alone."""
        return self.kind in (InitRelation.SHARED, InitRelation.SAME_RUN, InitRelation.SAME_SPACE)


@dataclass(frozen=True, slots=True, eq=False)
class InitEvidence:
    """The evidence of one module for every pair of N updates: symmetric arrays ``(N, N)``.

    ``row_cosine``, ``cross_cosine``, ``z``, ``other_cosine`` and ``shared`` are those of
    `ModuleInit`, with NaN for its None; the diagonal holds an update against itself.
    """

    row_cosine: NDArray[np.float64]
    cross_cosine: NDArray[np.float64]
    z: NDArray[np.float64]
    other_cosine: NDArray[np.float64]
    shared: NDArray[np.bool_]


def init_evidence(
    updates: Sequence[LowRankUpdate], *, factor: Literal["A", "B"] | None = None
) -> InitEvidence:
    """Return the evidence, for every pair, that two updates of one module share their start.

    Parameters
    ----------
    updates
        Of one module, with one d_in; ranks may differ, and B may be untrained.
    factor
        The factor that starts non-zero. By default A, and of an embedding that of the two in which
        more pairs agree: PEFT starts its B at random and its A at zero, mlx-lm the other way
        round, and what is learned from zero agrees in no pair's rows. After an orthogonal init
        both start non-zero, and either may be asked.

    Notes
    -----
    c alone is not enough: learned rows correlate with each other. q, the same cosine over rows
    that do not belong together, is what independent rows of these very factors give. One product
    over all rows: O((Σr)²·d).
    """
    if factor is not None:
        return _evidence(updates, factor)
    found = _evidence(updates, "A")
    if not all(one.layout == "embedding" for one in updates) or len({u.shape for u in updates}) > 1:
        return found
    other = _evidence(updates, "B")
    return max(
        found, other, key=lambda one: (one.shared.sum(), float(np.nansum(np.triu(one.z, 1))))
    )


def _evidence(updates: Sequence[LowRankUpdate], factor: Literal["A", "B"]) -> InitEvidence:
    rows = [_unit_rows(one.A if factor == "A" else one.B.T) for one in updates]
    others = [_unit_rows(one.B.T if factor == "A" else one.A) for one in updates]
    ranks = np.array([len(one) for one in rows])
    n = np.minimum.outer(ranks, ranks)
    matched, matched_squares = _matched_sums(rows)
    rest = np.outer(ranks, ranks) - n
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = np.maximum(_block_squares(rows, ranks) - matched_squares, 0.0)
        cross = np.sqrt(squares / np.where(rest > 0, rest, np.nan))
    cosine = matched / n
    z = np.sqrt(n) * cosine / np.maximum(cross, 1 / np.sqrt(rows[0].shape[1]))
    alike = len({one.shape[1] for one in others}) == 1
    return InitEvidence(
        row_cosine=cosine,
        cross_cosine=cross,
        z=z,
        other_cosine=_matched_sums(others)[0] / n if alike else np.zeros_like(cosine),
        shared=_are_shared(cosine, z),
    )


def _are_shared(cosine: NDArray[np.float64], z: NDArray[np.float64]) -> NDArray[np.bool_]:
    clear = ((cosine >= 0.2) & (z >= 5)) | ((cosine >= 0.5) & (z >= 4))
    # The same rows to the last digits need no statistics: a file against itself, a frozen A.
    shared: NDArray[np.bool_] = clear | (cosine > 1 - 1e-6)
    return shared


class InitRows:
    """The rows of A of many updates: which pairs share their start, some pairs at a time.

    For matrices; of an embedding, which factor is to be asked depends on all pairs.
    """

    def __init__(self, updates: Sequence[LowRankUpdate]) -> None:
        rows = [_unit_rows(one.A) for one in updates]
        self._ranks = np.array([len(one) for one in rows])
        self._starts = np.cumsum(self._ranks) - self._ranks
        self._rows = np.concatenate(rows)

    def shared(self, a: NDArray[np.intp], b: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return whether updates ``a`` share their start with updates ``b``, ``(len(a), len(b))``.

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
        places = np.repeat(self._starts[members] - starts, ranks) + np.arange(ranks.sum())
        return self._rows[places], starts


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
        members = [at for at, one in enumerate(rows) if len(one) > k]
        kth = np.stack([rows[at][k] for at in members])
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
    found = np.empty((len(rows), len(rows)))
    for at, (start, rank) in enumerate(zip(starts, ranks, strict=True)):
        products = every[start : start + rank] @ every[start:].T  # those before are known
        sums = np.add.reduceat(np.sum(products**2, axis=0), starts[at:] - start)
        found[at, at:] = found[at:, at] = sums
    return found


def module_start(a: LowRankUpdate, b: LowRankUpdate) -> ModuleInit:
    """Return the evidence that ``a`` and ``b`` started from the same rows of A.

    Of one pair what `init_evidence` says of many; ``a`` and ``b`` have one d_in.
    """
    evidence = init_evidence([a, b])
    return module_start_of(evidence, 0, 1, a.name, (a.rank, b.rank))


def module_start_of(
    evidence: InitEvidence, a: int, b: int, module: str, ranks: tuple[int, int]
) -> ModuleInit:
    """Return the evidence about the pair (a, b) out of that about every pair."""
    known = ranks != (1, 1)
    return ModuleInit(
        module=module,
        ranks=ranks,
        row_cosine=float(evidence.row_cosine[a, b]),
        cross_cosine=float(evidence.cross_cosine[a, b]) if known else None,
        z=float(evidence.z[a, b]) if known else None,
        other_cosine=float(evidence.other_cosine[a, b]),
        shared=bool(evidence.shared[a, b]),
    )


@dataclass(frozen=True, slots=True)
class Drift:
    """How far A moved from where training started.

    Attributes
    ----------
    angular
        ``1 − cos(A, A₀)`` over all entries, in [0, 2]: 0 where A only changed its size.
    row_angular
        The same row by row, mean over rows: a row of one is not a row of the other.
    radial
        ``‖A‖/‖A₀‖ − 1``: negative where weight decay shrank A.
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
        The A it started from, ``(r, d_in)``.

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
    now, then = update.A.astype(np.float64), initial.astype(np.float64)
    sizes = np.linalg.norm(now), np.linalg.norm(then)
    whole = [m.reshape(1, -1) for m in (now, then)]
    return Drift(
        angular=float(_one_minus_cosines(*whole)[0]),
        row_angular=float(np.mean(_one_minus_cosines(now, then))),
        radial=float(sizes[0] / sizes[1] - 1) if sizes[1] else float("inf"),
    )


def _one_minus_cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 − cos of paired rows; half the squared distance of unit rows keeps small ones."""
    apart = _unit_rows(a) - _unit_rows(b)
    return np.asarray(np.sum(apart**2, axis=1) / 2)


def _rank_one_verdict(starts: Sequence[ModuleInit]) -> SharedInit:
    """Judge a pair whose ranks are 1: only many modules of one sign can show a shared start."""
    cosines = np.array([start.row_cosine for start in starts])
    strong = np.abs(cosines) >= 0.5
    if strong.sum() >= 6 and abs(np.sign(cosines[strong]).sum()) == strong.sum():
        flagged = [start for start, is_strong in zip(starts, strong, strict=True) if is_strong]
        return _verdict(flagged, len(starts))
    return SharedInit(InitRelation.INCONCLUSIVE, (), len(starts))


def _verdict(flagged: Sequence[ModuleInit], compared: int) -> SharedInit:
    names = tuple(start.module for start in flagged)
    other = float(np.median([start.other_cosine for start in flagged]))
    if len(flagged) < compared:
        return SharedInit(InitRelation.PARTLY_SHARED, names, compared, other)
    kind: InitRelation = InitRelation.SAME_RUN if other >= SAME_RUN else InitRelation.SHARED
    return SharedInit(kind, names, compared, other)


def _is_one_run(starts: Sequence[ModuleInit]) -> bool:
    """Say whether the modules that are not clear agree as one run's do.

    Where training has drawn the rows of a small rank together, q is as large as c and z says
    nothing, while rows and columns agree all the same.
    """
    rest = [start for start in starts if not start.shared]
    other = float(np.median([start.other_cosine for start in starts]))
    return other >= SAME_RUN and all(start.row_cosine >= _ALIKE for start in rest)


def classify_init(
    starts: Sequence[ModuleInit], input_similarity: Sequence[float] = ()
) -> SharedInit:
    """Return the verdict on a pair of adapters from the evidence of their common modules.

    Parameters
    ----------
    starts
        One `ModuleInit` per common low-rank module. Among others, modules of rank 1 on both
        sides are passed over: alone they cannot tell.
    input_similarity
        φ_input(r, r) of the same modules, to recognize the same span under other rows. Values
        where a rank comes near the dimension should be left out: they are large by chance.
    """
    if not starts:
        return SharedInit(InitRelation.NOT_APPLICABLE, (), 0)
    decidable = [start for start in starts if start.ranks != (1, 1)]
    if not decidable:
        return _rank_one_verdict(starts)
    flagged = [start for start in decidable if start.shared]
    if flagged:
        return _verdict(decidable if _is_one_run(decidable) else flagged, len(decidable))
    if len(input_similarity) and float(np.median(input_similarity)) >= SAME_SPACE:
        return SharedInit(InitRelation.SAME_SPACE, (), len(decidable))
    return SharedInit(InitRelation.INDEPENDENT, (), len(decidable))
