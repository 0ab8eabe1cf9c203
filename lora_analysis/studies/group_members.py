"""The independent members of a group: copies and adapters with one start are one sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies.base_models import base_keys
from lora_analysis.studies.pair_classes import ONE_SAMPLE, Exclusion, PairClass
from lora_analysis.studies.relations import Relation
from lora_analysis.studies.similarity_matrix import DUPLICATE_COSINE, MOSTLY_SHARED

if TYPE_CHECKING:
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


class Group(NamedTuple):
    """The members of a group, the adapters of other groups, known tasks, and who was removed.

    ``shared_init`` is set if members stayed that share an initialization or parts of both factors.
    """

    members: list[str]
    others: list[str]
    tasks: list[str]
    removed: dict[str, str]
    shared_init: bool = False


def choose_members(study: Study, members: Sequence[str] | None, *, remove_related: bool) -> Group:
    """Return the members, the adapters of other groups (one per task), and the removed ones."""
    unknown = [label for label in members or () if label not in study.adapters]
    if unknown:
        message = f"The study has no adapter {unknown[0]!r}."
        raise InputError(message)
    runs = study.runs.set_index("adapter")
    given = list(dict.fromkeys(members or [a for a in runs.index if a not in study.reference]))
    keys = base_keys(study)
    bases = [keys[label] for label in given if keys[label]]
    base = max(bases, key=bases.count, default=None)
    reasons: dict[str, str] = {}
    for label in runs.index:
        if keys[label] not in (None, base):
            reasons[label] = "different base"
        elif runs.loc[label, "excluded"] in (Exclusion.UNTRAINED, Exclusion.EARLIER):
            reasons[label] = str(runs.loc[label, "excluded"])
    related = _related_pairs(study) if remove_related else {}
    group = _independent(given, reasons, related)
    if len(group.members) < FEWEST_MEMBERS:
        # Without adapters that have only parts of their factors in common there would be no group.
        # A shared A bears on the input side alone, and shared parts of both factors are just what a
        # common mean looks like if the factors were stacked.
        table = study.pairs.set_index(["a", "b"])
        labeled = table.index[table["relation"] == Relation.SAME_RUN]
        one_update = set(table.index[table["total_cosine"].abs() >= _ONE_UPDATE]) | set(labeled)
        by_factors = (PairClass.SHARED_INIT, PairClass.STARTED_FROM_BASE, PairClass.SAME_RUN)
        alike = {
            (a, b)
            for (a, b), of_pair in related.items()
            if of_pair in by_factors and not {(a, b), (b, a)} & one_update
        }
        apart = {pair: of_pair for pair, of_pair in related.items() if pair not in alike}
        larger = _independent(given, reasons, apart)
        if len(larger.members) > len(group.members):
            group = larger._replace(shared_init=True)
    group.tasks.extend(sorted(set(runs.loc[group.members, "task"].dropna())))
    tasks = set(group.tasks)
    for label in runs.index.difference([*given, *reasons], sort=False):
        task = runs.loc[label, "task"]
        has_task = isinstance(task, str)
        # An analyzed adapter without a task can be of this group, a reference cannot.
        is_other = task not in tasks if has_task else label in study.reference
        if is_other and not any((label, a) in related for a in (*group.members, *group.others)):
            group.others.append(label)
            tasks |= {task} if has_task else set()  # one adapter of each task
    return group


def _independent(
    labels: Sequence[str], reasons: Mapping[str, str], related: Mapping[tuple[str, str], PairClass]
) -> Group:
    """Return the first adapters of which no two are related, and the reason for the others."""
    group = Group([], [], [], {})
    for label in labels:
        copies = [other for other in group.members if (label, other) in related]
        if label in reasons:
            group.removed[label] = reasons[label]
        elif copies:
            group.removed[label] = f"{related[label, copies[0]]} with {copies[0]}"
        else:
            group.members.append(label)
    return group


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
