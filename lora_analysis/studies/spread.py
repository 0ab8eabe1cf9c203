"""A study's modules visited by an executor: each worker opens the adapters for itself."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_analysis.adapter import Adapter
from lora_analysis.bases import BaseWeights, check_experts, open_base
from lora_analysis.errors import IncompatibleError, InputError
from lora_analysis.execution.protocol import results_in_order
from lora_analysis.finding import Failure
from lora_analysis.pairwise import align_adapters
from lora_analysis.studies.bases import other_bases
from lora_analysis.studies.labels import with_label_facts
from lora_analysis.studies.relations import unique_labels
from lora_analysis.studies.sources import ReadLater, read_sources
from lora_analysis.studies.walk import Visit, Walk

if TYPE_CHECKING:
    from lora_analysis.execution.protocol import EventHandler, Executor

Source = Adapter | ReadLater | str | Path


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What a study was asked: all that it takes to open its adapters, here or in a worker."""

    adapters: tuple[Source, ...]
    reference: tuple[Source, ...]
    base: BaseWeights | str | Path | None
    label: str | None
    prefix: Mapping[str, str]
    walking: dict[str, Any]
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def opened(self) -> Opened:
        """Open the adapters and the base; raise if no adapter can be of this base."""
        unread: list[Failure] = []
        own = list(read_sources(self.adapters, unread))
        against = list(read_sources(self.reference, unread))
        labeled = [*with_label_facts(own, self.label), *with_label_facts(against, self.label)]
        named = align_adapters(unique_labels(labeled), prefix=self.prefix)
        base = open_base(self.base) if isinstance(self.base, str | Path) else self.base
        count = len(own)
        if base is not None:
            base = base.matched_to(labeled, prefix=self.prefix)
            fitting, misfits = _that_fit(named[:count], base)
            unread += misfits
            if misfits and not fitting:
                raise IncompatibleError(misfits[0].reason)
            named, count = [*fitting, *named[count:]], len(fitting)
        walk = Walk(named[:count], named[count:], base, **self.walking)
        return Opened(walk, named, count, base, unread)


def _that_fit(
    adapters: Sequence[Adapter], base: BaseWeights
) -> tuple[list[Adapter], list[Failure]]:
    """Return the adapters that can be of this base, and why others cannot.

    Those that name another base than the rest are not compared with this one.
    """
    elsewhere = other_bases({one.label: one.provenance.base_model for one in adapters}, base)
    fitting, failures = [], []
    for adapter in adapters:
        try:
            if adapter.label not in elsewhere:
                check_experts(adapter, base)
        except IncompatibleError as error:
            failures.append(Failure(adapter.label, str(error)))
        else:
            fitting.append(adapter)
    return fitting, failures


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """Adapters under their labels, ``own`` of them analyzed, then the reference; and the base."""

    walk: Walk
    named: list[Adapter]
    own: int
    base: BaseWeights | None
    unread: list[Failure]


@dataclass(frozen=True, slots=True)
class VisitModule:
    """The work of one module, for workers that know nothing of the study yet."""

    question: Question

    def __call__(self, module: str, _send_event: EventHandler) -> Visit:
        """Visit a module, having opened the adapters the first time."""
        token = self.question.token
        if token not in _held:
            _held.clear()
            _held[token] = self.question.opened().walk
        return _held[token].visit(module, blocks=False)


# The walk of the study that this process works for: executors may send the work with every cell.
_held: dict[str, Walk] = {}


def visits(executor: Executor, question: Question, modules: Sequence[str]) -> Iterator[Visit]:
    """Yield every module's visit, in their order, made by an executor.

    Raises
    ------
    InputError
        An adapter or the base is a value in memory, which no worker can open.
    """
    for one in (*question.adapters, *question.reference):
        if isinstance(one, Adapter):
            message = (
                f"{one.label} is in memory: with an executor, adapters are given by their "
                "sources, which every worker opens for itself."
            )
            raise InputError(message)
    if isinstance(question.base, BaseWeights):
        message = (
            f"The base {question.base.label} is open already: with an executor it is given by "
            "its source, which every worker opens for itself."
        )
        raise InputError(message)
    try:
        yield from results_in_order(executor.map(VisitModule(question), modules), modules)
    finally:
        _held.clear()
