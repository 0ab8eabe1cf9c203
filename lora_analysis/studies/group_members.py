"""The independent members of a group: copies and adapters with one start are one sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies.base_models import base_keys
from lora_analysis.studies.pair_classes import ONE_SAMPLE, Exclusion, PairClass
from lora_analysis.studies.relations import Relation
from lora_analysis.studies.similarity_matrix import DUPLICATE_COSINE, MOSTLY_SHARED

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies.result import Study

# Fewer adapters than this do not allow p ≤ .05 by flipping signs.
FEWEST_MEMBERS: Final = 6
# |cosine| of two adapters from which they are versions of one, whatever else differs.
_ONE_UPDATE: Final = 0.9
_RELATED: Final = ONE_SAMPLE | {
    PairClass.CHECKPOINT,
    PairClass.STARTED_FROM_BASE,
    PairClass.WRONG_LABEL,
    PairClass.GRADIENTS_ALIKE,
    PairClass.SHARED_INIT,
    PairClass.SAME_DATA_ORDER,
}
# Spans of A that agree are a shared initialization, unless those of B agree nearly as much: then
# they were learned.
_LEARNED: Final = 0.5


class Removal(NamedTuple):
    """Why an adapter is not a member of a group, and the member that it is related to, if any."""

    reason: str
    partner: str | None = None

    def __str__(self) -> str:
        return self.reason if self.partner is None else f"{self.reason} with {self.partner}"


class GroupMembers(NamedTuple):
    """The members of a group, adapters of other groups, known tasks, and the removed adapters.

    ``shared_init`` is set if members stayed that share an initialization or parts of both factors.
    """

    members: Sequence[str]
    others: Sequence[str]
    tasks: Sequence[str]
    removed: Mapping[str, Removal]
    shared_init: bool


def choose_members(
    study: Study, members: Sequence[str] | None, *, remove_related: bool
) -> GroupMembers:
    """Return the members, the adapters of other groups (one per task), and the removed ones."""
    unknown = [label for label in members or () if label not in study.adapters]
    if unknown:
        message = f"The study has no adapter {unknown[0]!r}."
        raise InputError(message)
    candidates = list(
        dict.fromkeys(members or [a for a in study.runs["adapter"] if a not in study.reference])
    )
    unfit = _unfit_adapters(study, candidates)
    related = _related_pairs(study) if remove_related else {}
    chosen, removed = _select_independent(candidates, unfit, related)
    shared_init = False
    if len(chosen) < FEWEST_MEMBERS:
        # Without adapters that have only parts of their factors in common there would be no group.
        by_update = _related_by_update(study, related)
        more, still_removed = _select_independent(candidates, unfit, by_update)
        if len(more) > len(chosen):
            chosen, removed, shared_init = more, still_removed, True
    task_of = study.runs.set_index("adapter")["task"]
    tasks = sorted(set(task_of[chosen].dropna()))
    rest = task_of.drop(list({*candidates, *unfit}))
    others = _choose_others(rest, study.reference, set(tasks), chosen, related)
    return GroupMembers(chosen, others, tasks, removed, shared_init)


def _unfit_adapters(study: Study, candidates: Sequence[str]) -> dict[str, Removal]:
    """Return the adapters that cannot be in the group: of another base, untrained, or earlier."""
    keys = base_keys(study)
    bases = [keys[label] for label in candidates if keys[label]]
    most_frequent = max(bases, key=bases.count, default=None)
    unfit: dict[str, Removal] = {}
    for label, excluded in zip(study.runs["adapter"], study.runs["excluded"], strict=True):
        if keys[label] not in (None, most_frequent):
            unfit[label] = Removal("different base")
        elif excluded in (Exclusion.UNTRAINED, Exclusion.EARLIER):
            unfit[label] = Removal(str(excluded))
    return unfit


def _select_independent(
    labels: Sequence[str],
    unfit: Mapping[str, Removal],
    related: Mapping[tuple[str, str], PairClass],
) -> tuple[list[str], dict[str, Removal]]:
    """Return the first adapters of which no two are related, and why each other is removed."""
    chosen: list[str] = []
    removed: dict[str, Removal] = {}
    for label in labels:
        relatives = [member for member in chosen if (label, member) in related]
        if label in unfit:
            removed[label] = unfit[label]
        elif relatives:
            removed[label] = Removal(str(related[label, relatives[0]]), relatives[0])
        else:
            chosen.append(label)
    return chosen, removed


def _related_by_update(
    study: Study, related: Mapping[tuple[str, str], PairClass]
) -> dict[tuple[str, str], PairClass]:
    """Return the related pairs without those that have only parts of their factors in common.

    A shared A bears on the input side alone, and shared parts of both factors are just what a
    common mean looks like if the factors were stacked.
    """
    table = study.pairs.set_index(["a", "b"])
    labeled = table.index[table["relation"] == Relation.SAME_RUN]
    one_update = set(table.index[table["total_cosine"].abs() >= _ONE_UPDATE]) | set(labeled)
    by_factors = (PairClass.SHARED_INIT, PairClass.STARTED_FROM_BASE, PairClass.SAME_RUN)
    return {
        (a, b): of_pair
        for (a, b), of_pair in related.items()
        if of_pair not in by_factors or {(a, b), (b, a)} & one_update
    }


def _choose_others(
    task_of: pd.Series,
    references: Collection[str],
    tasks: set[str],
    members: Sequence[str],
    related: Mapping[tuple[str, str], PairClass],
) -> list[str]:
    """Return adapters of other groups: the first of each further task, unrelated to all chosen."""
    others: list[str] = []
    for label, task in task_of.items():
        has_task = isinstance(task, str)
        # An analyzed adapter without a task can be of this group, a reference cannot.
        is_other = task not in tasks if has_task else label in references
        if is_other and not any((label, a) in related for a in (*members, *others)):
            others.append(str(label))
            tasks |= {task} if has_task else set()
    return others


def _related_pairs(study: Study) -> dict[tuple[str, str], PairClass]:
    """Return the pairs that are not two independent adapters, in both orders, with the class."""
    related: dict[tuple[str, str], PairClass] = {}
    matrix = study.similarity_matrix
    if matrix is not None:  # all pairs, those without a row in the table too
        cosine = matrix.matrix("cosine")
        for mask, of_pair in (
            (matrix.shared >= MOSTLY_SHARED, PairClass.SHARED_INIT),
            (cosine <= -DUPLICATE_COSINE, PairClass.NEGATED_COPY),
            (cosine >= DUPLICATE_COSINE, PairClass.NEAR_DUPLICATE),
        ):
            for i, j in zip(*np.nonzero(mask), strict=True):
                if i != j:
                    related[matrix.labels[i], matrix.labels[j]] = of_pair
    pairs = study.pairs[study.pairs["pair_class"].isin(_RELATED)]
    by_side = study.similarities.pivot_table(
        index=["a", "b"], columns="side", values="excess_omega", aggfunc="mean"
    )
    for row in pairs.itertuples():
        of_pair = row.pair_class
        if row.initialization in (InitRelation.SAME_SPACE, InitRelation.UNDECIDED):
            sides = by_side.loc[(row.a, row.b)]
            by_init = of_pair in (PairClass.SHARED_INIT, PairClass.SAME_RUN)
            if by_init and sides["output"] >= _LEARNED * sides["input"]:
                continue
        related[row.a, row.b] = related[row.b, row.a] = of_pair
    return related
