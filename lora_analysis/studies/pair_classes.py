"""The class of each pair of adapters, and the population that it counts in on each side.

One table, made once for a study and read by everything that pools pairs: conclusions,
permutations, tables, figures and maxima. A near-duplicate, a shared initialization, a label and a
base model bind all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal

from lora_analysis.shared_init import InitRelation
from lora_analysis.spectra import Side
from lora_analysis.studies.relations import Relation

if TYPE_CHECKING:
    import pandas as pd

Population = Literal["replicate", "unrelated", ""]


class PairClass(StrEnum):
    """What two adapters are to each other; a pair has the first class that applies."""

    DIFFERENT_BASE = "different base"
    BASE_NOT_KNOWN = "base not known to be the same"
    CHECKPOINT = "earlier checkpoint"  # of a run of which the study has a later one
    STARTED_FROM_BASE = "both factors started from the base"  # PiSSA without its flag
    NEAR_DUPLICATE = "near-duplicate"
    NEGATED_COPY = "negated copy"
    CONTAINED = "contained"  # a resized copy, a stack, a merge, a continued run
    SAME_RUN = "same training run"
    WRONG_LABEL = "one update under two task names"
    GRADIENTS_ALIKE = "shared initialization, gradients alike"
    SHARED_INIT = "shared initialization"
    SAME_DATA_ORDER = "same data order"  # one task and seed at two ranks, or trained twice
    SAME_SEED = "different task, same seed"
    UNRELATED = "unrelated"
    REPLICATE = "replicate"
    UNKNOWN = "unknown"


# The two adapters of such a pair are one sample.
ONE_SAMPLE: Final = frozenset(
    [PairClass.NEAR_DUPLICATE, PairClass.NEGATED_COPY, PairClass.CONTAINED, PairClass.SAME_RUN]
)


class Exclusion(StrEnum):
    """Why all pairs of an adapter are left out of every population."""

    NONE = ""
    EARLIER = "earlier checkpoint"
    UNTRAINED = "untrained"
    ONE_SAMPLE = "one sample with another adapter"
    CONFLICTING_LABELS = "a copy of an adapter with a different task name"
    OTHER_MODULES = "adapts different modules"


class ModuleExclusion(StrEnum):
    """Why a module counts in no pair on a side."""

    NOT_IN_ALL = "not trained in all adapters, or in different shapes"
    NO_ROOM = "too few dimensions: random subspaces already overlap"
    SHARED_INIT = "shared initialization"


# |cosine| of ΔW from which a module is a copy, and the share of the modules that must be copies:
# a large head that was trained from new must not hide one.
COPY_COSINE: Final = 0.99
_COPIED_MODULES: Final = 0.9
# Median of min(φ_input, φ_output)(n, n); pairs from different initializations reach 0.40.
_CONTAINED: Final = 0.9
# The same of φ at both ranks: a stack of adapters includes all directions of each of them, which
# learning does not bring about.
_INCLUDED: Final = 0.98
# Excess overlap of the row spaces of A and of the column spaces of B that only a start from the
# base gives to adapters of different tasks and seeds.
_BASE_SPACES: Final = 0.5
# |c′|, the matched cosine of the second factor, from which two updates are beyond doubt one.
_ONE_UPDATE: Final = 0.9


@dataclass(frozen=True, slots=True)
class PairEvidence:
    """What the class of a pair is decided from.

    Attributes
    ----------
    relation
        What the labels say.
    same_task, same_seed
        Whether task and seed agree; None if one is unknown.
    reference
        Whether the caller passed one of the adapters as a reference.
    one_study
        Whether the adapters come from one folder or repository.
    copied, negated
        Shares of the common modules whose ΔW have a cosine of at least 0.99, or at most −0.99.
    containment
        Median over modules of min(φ_input, φ_output)(n, n), n the smaller rank; NaN if no module
        has room to tell (a rank above a quarter of the dimension).
    inclusion
        The same of φ at both ranks.
    initialization
        The conclusion on the initial factors.
    second_factor_agrees
        Whether the second factor agrees, too, in rows or in its span.
    b_cosine
        |c′|: median matched cosine of the second factor over modules with a shared initialization.
    both_spaces
        Smaller of the excess overlaps of the row spaces of A and the column spaces of B.
    """

    relation: Relation
    same_task: bool | None = None
    same_seed: bool | None = None
    reference: bool = False
    one_study: bool = True
    copied: float = 0.0
    negated: float = 0.0
    containment: float = float("nan")
    inclusion: float = float("nan")
    initialization: InitRelation = InitRelation.NOT_APPLICABLE
    second_factor_agrees: bool = False
    b_cosine: float = 0.0
    both_spaces: float = 0.0

    @property
    def shares_init(self) -> bool:
        """True if at least half of the testable modules have a shared initialization."""
        return self.initialization in (InitRelation.SHARED, InitRelation.SAME_RUN)

    @property
    def shares_space(self) -> bool:
        """True if A spans the same space in other rows, or if that is undecided."""
        return self.initialization in (InitRelation.SAME_SPACE, InitRelation.UNDECIDED)

    @property
    def second_starts_with_first(self) -> bool:
        """True if both factors agree, row by row or in their spans."""
        return self.second_factor_agrees or self.both_spaces >= _BASE_SPACES


@dataclass(frozen=True, slots=True)
class ClassifiedPair:
    """The class of a pair, and the population that it counts in on each side."""

    pair_class: PairClass
    populations: Mapping[Side, Population] = field(
        default_factory=lambda: {"input": "", "output": ""}
    )


def classify_pairs(evidence: Sequence[PairEvidence]) -> list[ClassifiedPair]:
    """Return the classes of all pairs on one base model.

    Rows of A shared between different known seeds and tasks show that both factors started from
    the base (PiSSA without its flag), if most such pairs do: one pair alone may be a copy under a
    wrong label. In such a study nothing can be concluded, so pairs of one task get the same class.
    """
    strangers = [e for e in evidence if e.same_task is False and e.same_seed is False]
    count = sum(pair.second_starts_with_first for pair in strangers)
    from_base = count >= 2 and 2 * count >= len(strangers)
    classified = []
    for pair in evidence:
        of_pair = _pair_class(pair, from_base=from_base)
        output: Population = ""
        if of_pair is PairClass.UNRELATED:
            output = "unrelated"
        elif of_pair is PairClass.REPLICATE and not pair.reference:
            output = "replicate"
        elif of_pair is PairClass.SHARED_INIT:
            # Only the input side comes from the start; which population the output side is of
            # follows from the labels, as without it.
            if _class_by_labels(pair) is PairClass.UNRELATED:
                output = "unrelated"
            elif pair.same_task and pair.same_seed is False and not pair.reference:
                output = "replicate"
        input_side = "" if of_pair is PairClass.SHARED_INIT else output
        classified.append(ClassifiedPair(of_pair, {"input": input_side, "output": output}))
    return classified


def _pair_class(pair: PairEvidence, *, from_base: bool) -> PairClass:
    if pair.relation is Relation.OTHER_BASE:
        return PairClass.DIFFERENT_BASE
    if pair.relation is Relation.BASE_NOT_KNOWN_SAME:
        return PairClass.BASE_NOT_KNOWN
    if pair.relation is Relation.SAME_RUN:
        return PairClass.SAME_RUN
    if pair.relation is Relation.EARLIER:
        return PairClass.CHECKPOINT
    if from_base and pair.second_starts_with_first:
        return PairClass.STARTED_FROM_BASE
    if pair.copied + pair.negated >= _COPIED_MODULES:
        return PairClass.NEGATED_COPY if pair.negated > pair.copied else PairClass.NEAR_DUPLICATE
    if pair.containment >= _CONTAINED or pair.inclusion >= _INCLUDED:
        return PairClass.CONTAINED
    return _class_by_init(pair) or _class_by_labels(pair)


def _class_by_init(pair: PairEvidence) -> PairClass | None:
    """Return the class that a shared initialization gives; None if there is none."""
    if (pair.shares_init or pair.shares_space) and pair.second_factor_agrees:
        if pair.same_task is not False:
            return PairClass.SAME_RUN
        is_one_update = pair.b_cosine >= _ONE_UPDATE
        return PairClass.WRONG_LABEL if is_one_update else PairClass.GRADIENTS_ALIKE
    if pair.shares_init or pair.shares_space:
        return PairClass.SHARED_INIT
    return None


def _class_by_labels(pair: PairEvidence) -> PairClass:
    if pair.reference and pair.same_task is not True and pair.same_seed is not True:
        return PairClass.UNRELATED
    if pair.same_task is None:
        return PairClass.UNKNOWN
    if pair.same_seed is None:
        is_independent = pair.initialization is InitRelation.INDEPENDENT
        apart = pair.same_task is False and is_independent and not pair.one_study
        return PairClass.UNRELATED if apart else PairClass.UNKNOWN
    if pair.same_task:
        return PairClass.SAME_DATA_ORDER if pair.same_seed else PairClass.REPLICATE
    return PairClass.SAME_SEED if pair.same_seed else PairClass.UNRELATED


def have_conflicting_tasks(pairs: pd.DataFrame, runs: pd.DataFrame) -> pd.Series:
    """Return a mask of the pairs that are one sample, or one update, under two task names."""
    task = runs.set_index("adapter")["task"]
    a, b = pairs["a"].map(task), pairs["b"].map(task)
    is_one = pairs["pair_class"].isin([*ONE_SAMPLE, PairClass.WRONG_LABEL])
    return is_one & a.notna() & b.notna() & (a != b)


def one_sample_exclusions(
    pairs: Iterable[tuple[str, str, PairClass]],
    tasks: Mapping[str, str | None],
    reference: Collection[str] = (),
) -> dict[str, Exclusion]:
    """Return the adapters that are left out because they are one sample with another one.

    Of several adapters that are one sample, the first one counts. If their task names differ, at
    least one of the names is wrong, and none of them counts; but a reference never excludes an
    adapter that is analyzed.

    Parameters
    ----------
    pairs
        Labels of both adapters and the class.
    tasks
        The known task of each adapter, analyzed ones first.
    reference
        Labels of the adapters that serve as the reference only.
    """
    groups: dict[str, set[str]] = {}
    for a, b, of_pair in pairs:
        if of_pair in ONE_SAMPLE or of_pair is PairClass.WRONG_LABEL:
            merged = groups.get(a, {a}) | groups.get(b, {b})
            groups |= dict.fromkeys(merged, merged)
    exclusions = {}
    for label in tasks:
        group = groups.get(label, {label})
        rivals = group if label in reference else group.difference(reference)
        if len({tasks[member] for member in rivals} - {None}) > 1:
            exclusions[label] = Exclusion.CONFLICTING_LABELS
        elif label != next(member for member in tasks if member in group):
            exclusions[label] = Exclusion.ONE_SAMPLE
    return exclusions
