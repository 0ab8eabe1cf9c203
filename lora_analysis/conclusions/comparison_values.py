"""The outcome of a comparison: its values, the conclusion on one side, and a word for its size."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

import numpy as np

from lora_analysis.spectra import Side
from lora_analysis.studies.inference import TaskAgreement
from lora_analysis.studies.pair_classes import PairClass
from lora_analysis.studies.reference_test import ReferenceTest

# The output side leads: what an update writes is not diluted by its initial A.
SIDES_IN_ORDER: Final[tuple[Side, Side]] = ("output", "input")
LEVEL: Final = 0.05
# Difference between T of two tasks from which one number does not describe both.
TASKS_DIFFER: Final = 0.3
# Pairs of unknown relation are compared one by one up to this many, then together.
PAIRS_IN_WORDS: Final = 6
_SIZES: Final = (
    (0.9, "nearly the same"),
    (0.5, "largely the same"),
    (0.2, "partly the same"),
    (0.05, "weakly alike"),
    (-np.inf, "barely alike"),
)
NO_MORE_ALIKE: Final = "no more alike than unrelated adapters"

Kind = Literal["tasks", "rank", "ranks", "pair", "adapters"]


class Conclusion(StrEnum):
    """The outcome of a comparison on one side."""

    NEAR_DUPLICATE = "near-duplicate"
    MORE_ALIKE = "more alike than unrelated adapters"
    NOT_DISTINGUISHABLE = "not distinguishable from unrelated adapters"
    MORE_ALIKE_THAN_RANDOM = "more alike than random"
    NOT_DISTINGUISHABLE_FROM_RANDOM = "not distinguishable from random"
    TOO_FEW_RUNS = "too few runs"
    INCONCLUSIVE = "inconclusive"


class Reason(StrEnum):
    """Why a comparison has no stronger conclusion."""

    NONE = ""
    NO_REFERENCE = "no unrelated adapters to compare with"
    LEVEL_ONLY = "a reference file gives a level, but no test"
    NONE_AT_RANK = "no unrelated runs at this rank"
    FEW_REFERENCES = "fewer than five reference adapters of different tasks"
    FEW_RUNS = "so few runs cannot give p ≤ 0.05"
    UNEQUAL_TASKS = "not every task agrees more with itself than with every other task"
    TRAINING_STRENGTH = "trained more or less strongly than the references"
    OUTPUT_FIRST = "tested only if the output side shows a difference"
    RANKS_LAST = "tested only if both sides show a difference"
    SHARED_START = "shared initialization"
    ONE_SAMPLE = "one sample, not two"
    SHARED_SEED = "same seed, and so the same data order"
    WRONG_LABEL = "one update under two task names"
    STARTED_FROM_BASE = "both factors started from the base weights"
    DIFFERENT_BASE = "different base models"
    BASE_NOT_KNOWN = "the base models are not known to be the same"
    NO_USABLE_MODULE = "no module is usable in all pairs"


class TrainingStrength(StrEnum):
    """How strongly a pair was trained in comparison with the references of its test."""

    STRONGER = "more strongly than every reference"
    WEAKER = "less strongly than every reference"
    DIFFERENT = "differently from the references"


@dataclass(frozen=True, slots=True)
class Level:
    """T of the unrelated pairs that a comparison is judged by.

    ``adapters`` is None if the level comes from a reference file, which gives the smallest number
    of pairs behind the levels of the module types, and an upper bound of the maximum.
    """

    median: float
    maximum: float
    pairs: int
    adapters: int | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison on one side.

    Attributes
    ----------
    kind
        ``"tasks"``: replicates of all tasks against unrelated pairs; ``"rank"``: the same at one
        rank; ``"ranks"``: replicates at two different ranks (described, not tested); ``"pair"``:
        two adapters; ``"adapters"``: all pairs of unknown relation.
    subject
        What is compared, in words.
    side
        The side of the overlap.
    conclusion
        The outcome; None if the comparison is described only.
    reason
        Why there is no stronger conclusion.
    base
        The base model, if the study has several.
    ranks
        The rank or ranks that are compared, if the kind has them.
    members
        Labels of the two adapters of a pair.
    pair_class
        The class of a pair.
    pairs, modules
        Number of pairs behind the value, and of usable modules.
    mean_excess
        T: mean over usable modules of the excess of ω, mean over the pairs.
    quartiles
        Of the excess of ω over modules and pairs.
    omega, chance_omega
        Medians of ω and of its random baseline.
    angle
        Median over modules of arccos √φ(1, 1) in degrees; NaN if no first direction is defined.
    cosine
        Median signed cosine of ΔW: T is blind to its sign.
    unrelated
        T of the unrelated pairs; None without any.
    size
        T in words; "" without unrelated pairs.
    position
        (T − unrelated)/(replicate − unrelated) if the study has both.
    p, smallest_p
        p-value of the test, and the smallest one that the design allows; None without a test.
    significant
        Count and total of modules (of one pair; else of pairs with any module) whose ω exceeds
        that of random subspaces at a false discovery rate of 5 % over the modules of a pair.
    tasks
        Agreement of each task with itself and the others.
    reference_test
        The rank test of a pair.
    """

    kind: Kind
    subject: str
    side: Side
    conclusion: Conclusion | None
    reason: Reason
    base: str | None
    ranks: tuple[int, ...]
    members: tuple[str, ...]
    pair_class: PairClass | None
    pairs: int
    modules: int
    mean_excess: float
    quartiles: tuple[float, float]
    omega: float
    chance_omega: float
    angle: float
    cosine: float
    unrelated: Level | None
    size: str
    position: float | None = None
    p: float | None = None
    smallest_p: float | None = None
    significant: tuple[int, int] = (0, 0)
    tasks: tuple[TaskAgreement, ...] = ()
    reference_test: ReferenceTest | None = None

    @property
    def training_strength(self) -> TrainingStrength | None:
        """How strongly the pair was trained; None within the range of the references."""
        outside = self.reference_test.out_of_range if self.reference_test else ()
        if not outside:
            return None
        norms = [value for value in outside if value.quantity in ("norm", "relative_norm")]
        if norms and all(norm.value > norm.high for norm in norms):
            return TrainingStrength.STRONGER
        if norms and all(norm.value < norm.low for norm in norms):
            return TrainingStrength.WEAKER
        return TrainingStrength.DIFFERENT


def size_in_words(mean_excess: float, largest_unrelated: float | None) -> str:
    """Return the word for T; no word of likeness at or below the largest T of unrelated pairs.

    Detection and size are two statements: whether T can be due to chance is for a test to decide.
    """
    if largest_unrelated is None:
        return ""
    if mean_excess <= largest_unrelated:
        return NO_MORE_ALIKE
    return next(word for least, word in _SIZES if mean_excess >= least)
