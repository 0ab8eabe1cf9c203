"""Detect a shared initialization: an artifact that makes unrelated adapters look alike.

A moves little in training. Two unrelated adapters whose scripts ran with the same seed share
their initial A and so most of their input directions: overlaps of 0.93 to 0.998 on real pairs
whose output sides agree no better than random subspaces. The rules below separate such pairs from
independent ones, first by the individual rows of A and, if these were mixed, by its row space.

In simulations of training (d = 192, three learning rates, rows that kept a cosine of 0.97 to 0.86
with their initial values) none of 264 pairs of other tasks and seeds was flagged from rank 4 on,
72 of which had one side resized by SVD and 78 both. At rank 2, 4 of 18 had one flagged module of
six. Of pairs with one initialization, all 60 of equal ranks were found, and all 72 of which one
side was resized (2 of them only if the tasks are known to differ).

What the rules cannot see: an adapter whose rank was reduced far below that of its training keeps
what was learned and little of its initialization. If both sides were resized the spans agree only
in part: 20 of 78 such pairs were found, 48 more if the tasks are known to differ, and 10 (32 or 64
to 8 directions after strong training) not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.errors import IncompatibleError
from lora_analysis.init_evidence import ModuleInit, rows_agree, unit_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import LowRankUpdate


class InitRelation(StrEnum):
    """How the initial factors of two adapters are related."""

    INDEPENDENT = "independent"  # no module has a shared initialization
    PARTLY_SHARED = "partly shared"  # fewer than half do; these are excluded on the input side
    SHARED = "shared initialization"  # at least half do, and B was learned apart
    SAME_RUN = "same training run"  # at least half do, and B agrees too: one run, or continued
    SAME_SPACE = "same input space"  # rows differ, spans agree: resized, or derived from data or W
    UNDECIDED = "undecided"  # spans agree in part: shared if the tasks are known to differ
    INCONCLUSIVE = "inconclusive"  # rank 1 on both sides leaves no other row to compare with
    NOT_APPLICABLE = "not applicable"  # no low-rank factors


# Share of the testable modules from which an initialization is shared as a whole.
SHARED_FROM = 0.5
# Cosine of the second factor (B) from which two adapters are from the same training run.
SAME_RUN = 0.4
# Excess agreement of row spaces from which they are one; of other tasks, from which they may be.
SAME_SPACE = 0.3
SAME_SPACE_OF_OTHER_TASKS = 0.1
# Excess of the output side over the input side from which the spans may have been learned.
_LEARNED_MORE = 0.2
# φ_input(r, r) from which spans are one where the excess is not defined (ranks below 4).
_SIMILAR_SPACE = 0.7
# Mean cosine of rows that does not contradict an initialization that other modules share.
_CONSISTENT = 0.5
# Rank 1 on both sides: cosine in every module, and the fewest modules.
_RANK_ONE_COSINE = 0.9
_RANK_ONE_MODULES = 3


@dataclass(frozen=True, slots=True)
class SharedInit:
    """The conclusion on the initialization of a pair of adapters, and the numbers behind it.

    Attributes
    ----------
    kind
        How the initial factors are related.
    modules
        Names of the modules with a shared initialization, in order.
    compared
        Number of testable modules.
    other_cosine
        c′: median over the shared modules of the matched cosine of B, times the sign of the
        cosine of the rows; None if there are none. Negative for the negated copy of a run,
        ``−ΔW``: its absolute value is compared with `SAME_RUN`.
    sign
        −1 if the rows of A are negated in most of the shared modules, 1 if not, 0 if there are
        none.
    row_space
        L: median over the testable modules of `weaker_half_excess` of the row spaces of A; None
        where it is defined in none.
    other_space
        The same of the column spaces of B. If both spaces agree while tasks and seeds differ,
        both factors started from the base weight (PiSSA and its kind).
    """

    kind: InitRelation
    modules: tuple[str, ...]
    compared: int
    other_cosine: float | None = None
    sign: int = 0
    row_space: float | None = None
    other_space: float | None = None

    @property
    def share(self) -> float:
        """Share of the testable modules that have a shared initialization."""
        return len(self.modules) / self.compared if self.compared else 0.0

    @property
    def contaminates_input(self) -> bool:
        """True if the input-side overlap may come from the initialization alone in all modules."""
        return self.kind in (
            InitRelation.SHARED,
            InitRelation.SAME_RUN,
            InitRelation.SAME_SPACE,
            InitRelation.UNDECIDED,
        )

    @property
    def other_agrees(self) -> bool:
        """True if the second factor agrees, too: one run, or a start of both from the base."""
        if self.other_cosine is not None and self.share >= SHARED_FROM:
            return abs(self.other_cosine) >= SAME_RUN
        if self.kind is not InitRelation.SAME_SPACE or self.other_space is None:
            return False
        return self.other_space >= SAME_SPACE

    def for_tasks(self, *, differ: bool | None) -> SharedInit:
        """Return the conclusion with what is known of the tasks; None if nothing is.

        Row spaces that agree in part (`InitRelation.UNDECIDED`) are of one initialization if the
        tasks differ. If the task is the same they may have been learned; so may spans with an L
        above 0.3, if the output side, which has no initialization, agrees clearly more.
        """
        if differ is None or self.kind not in (InitRelation.UNDECIDED, InitRelation.SAME_SPACE):
            return self
        if differ:
            return replace(self, kind=InitRelation.SAME_SPACE)
        if self.kind is InitRelation.UNDECIDED or self._may_be_learned:
            part = InitRelation.PARTLY_SHARED if self.modules else InitRelation.INDEPENDENT
            return replace(self, kind=part)
        return self

    @property
    def _may_be_learned(self) -> bool:
        """True if learning is enough to explain how far the row spaces agree."""
        if self.row_space is None or self.other_space is None:
            return False
        return self.row_space < self.other_space - _LEARNED_MORE


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
    apart = unit_rows(a) - unit_rows(b)
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
        φ_input(r, r) of the same modules, to detect the same span with different rows where
        `ModuleInit.row_space` is defined in none. Values of ranks close to the dimension should
        be left out: they are large by chance.

    Notes
    -----
    The first that fits:

    - *shared*: at least half of the testable modules are flagged; *same run* if also ``|c′| ≥ .4``.
    - *same space*: L ≥ .3; *undecided*: L ≥ .1, unless the output side agrees more by .2
      (`SharedInit.for_tasks` decides). Learned directions agree on the output side first: without
      this condition independent adapters of one task or of very different ranks reach L = .1 to .3.
    - *partly shared*: some modules are flagged.

    Rank 1 in every module: shared if ``|c| ≥ .9`` in all, of one sign, in at least three modules.
    Labels are not known here: whether the same seed explains a shared initialization, and whether
    a shared initialization of both factors is one run or a start from the base weight, is for the
    caller to decide, from ``share``, ``other_cosine``, ``row_space``, ``other_space`` and ``sign``.
    """
    if not modules:
        return SharedInit(InitRelation.NOT_APPLICABLE, (), 0)
    testable = [module for module in modules if module.ranks != (1, 1)]
    if not testable:
        return _classify_rank_one(modules)
    row_space = _median(testable, lambda module: module.row_space)
    evidence = replace(
        _shared_modules(_flagged_modules(testable), len(testable)),
        row_space=row_space,
        other_space=_median(testable, lambda module: module.other_space),
    )
    if evidence.share >= SHARED_FROM:
        return evidence
    if _is_same_space(row_space, input_similarity):
        return replace(evidence, kind=InitRelation.SAME_SPACE)
    is_partly_same = row_space is not None and row_space >= SAME_SPACE_OF_OTHER_TASKS
    if is_partly_same and not evidence._may_be_learned:
        return replace(evidence, kind=InitRelation.UNDECIDED)
    return evidence


def _classify_rank_one(modules: Sequence[ModuleInit]) -> SharedInit:
    """Return the conclusion at rank 1: only modules that all agree, with one sign, are evidence."""
    cosines = np.array([module.row_cosine for module in modules])
    has_one_sign = abs(np.sign(cosines).sum()) == len(cosines)
    is_alike = np.abs(cosines).min() >= _RANK_ONE_COSINE and has_one_sign
    if is_alike and len(modules) >= _RANK_ONE_MODULES:
        return _shared_modules(modules, len(modules))
    return SharedInit(InitRelation.INCONCLUSIVE, (), len(modules))


def _flagged_modules(testable: Sequence[ModuleInit]) -> Sequence[ModuleInit]:
    """Return the modules with a shared initialization; all of them if the pair is one run."""
    # A negated copy is negated in every module; a single negative cosine is one that was learned.
    negative = [module for module in testable if _is_negative(module)]
    is_negated = all(module.row_cosine < 0 for module in testable)
    if is_negated and len(negative) >= SHARED_FROM * len(testable):
        flagged = negative
    else:
        flagged = [module for module in testable if module.shared and module.row_cosine > 0]
    # If training has aligned the rows of a small rank, q is as large as c and z is small, while
    # rows and columns of two adapters of one run agree all the same.
    other = float(np.median(_matched_others(testable)))
    is_consistent = all(
        module.shared or abs(module.row_cosine) >= _CONSISTENT for module in testable
    )
    return testable if flagged and abs(other) >= SAME_RUN and is_consistent else flagged


def _is_same_space(row_space: float | None, input_similarity: Sequence[float]) -> bool:
    """Return True if the spans of A agree as a whole, by L or, where it is undefined, by φ."""
    if row_space is None and len(input_similarity):
        return float(np.median(input_similarity)) >= _SIMILAR_SPACE
    return row_space is not None and row_space >= SAME_SPACE


def _is_negative(module: ModuleInit) -> bool:
    if module.row_cosine >= 0 or module.z is None:
        return False
    return module.shared or bool(rows_agree(-module.row_cosine, -module.z))


def _median(
    modules: Sequence[ModuleInit], value: Callable[[ModuleInit], float | None]
) -> float | None:
    values = [number for module in modules if (number := value(module)) is not None]
    return float(np.median(values)) if values else None


def _shared_modules(shared: Sequence[ModuleInit], compared: int) -> SharedInit:
    """Return the conclusion from the flagged modules alone."""
    if not shared:
        return SharedInit(InitRelation.INDEPENDENT, (), compared)
    names = tuple(module.module for module in shared)
    cosines = np.array([module.row_cosine for module in shared])
    other = float(np.median(_matched_others(shared)))
    if len(shared) < SHARED_FROM * compared:
        kind = InitRelation.PARTLY_SHARED
    else:
        kind = InitRelation.SAME_RUN if abs(other) >= SAME_RUN else InitRelation.SHARED
    sign = 1 if np.median(cosines) >= 0 else -1
    return SharedInit(kind, names, compared, other, sign)


def _matched_others(modules: Sequence[ModuleInit]) -> list[float]:
    """Return c′ of each module with the sign of its rows: (A, B) and (−A, −B) are one update."""
    return [float(np.copysign(1.0, m.row_cosine)) * m.other_cosine for m in modules]
