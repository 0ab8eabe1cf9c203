"""What a study is asked for, and the adapters and base that it opens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Final

from lora_analysis.adapter import Adapter
from lora_analysis.bases import BaseWeights, as_base, check_experts
from lora_analysis.errors import IncompatibleError, InputError
from lora_analysis.finding import Failure
from lora_analysis.formats import (
    AdapterRef,
    as_adapter,
    expand_glob,
    find_adapters,
    read_adapter,
    skip_seen,
    unique_labels,
)
from lora_analysis.studies.base_models import other_bases, same_base, with_base_name
from lora_analysis.studies.labels import with_label_facts
from lora_analysis.studies.module_walk import align_adapters
from lora_analysis.studies.relations import ChosenPairs, choose_pairs
from lora_analysis.text import join_names

# Tables of more pairs are not read: these are the pairs of 40 adapters, in every module.
MAX_PAIRS: Final = 780
DRAWS: Final = 16


@dataclass(frozen=True, slots=True)
class ReadLater:
    """An adapter that was found, and the function that reads it, also in another process."""

    ref: AdapterRef
    read: Callable[[AdapterRef], Adapter]

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The path of the adapter, which no output may overwrite."""
        return (self.ref.path,)


# An adapter, a source of one or several, or an object in memory that `as_adapter` takes.
Source = Any


@dataclass(frozen=True, slots=True, eq=False)
class StudySpec:
    """What a study is asked for: everything that decides its numbers.

    Attributes are the parameters of `study`, where they are described; ``prefix`` is parsed.
    """

    adapters: tuple[Source, ...]
    base: Any = None
    reference: tuple[Source, ...] = ()
    modules: str | Sequence[str] | None = None
    prefix: Mapping[str, str] = field(default_factory=dict)
    transposed: bool | None = None
    draws: int = DRAWS
    weight_spectra: bool = False
    label: str | None = None
    across_bases: bool = False
    max_pairs: int = MAX_PAIRS

    def __post_init__(self) -> None:
        if self.max_pairs < 1:
            message = f"max_pairs must be at least 1, got {self.max_pairs}."
            raise InputError(message)

    def check_sources(self) -> None:
        """Raise if adapters or base are values in memory, which other processes cannot open.

        Raises
        ------
        InputError
            Naming the first of them.
        """
        for source in (*self.adapters, *self.reference):
            if not isinstance(source, str | PathLike | AdapterRef | ReadLater):
                name = source.label if isinstance(source, Adapter) else type(source).__name__
                message = (
                    f"{name} is in memory: with an executor, adapters are given by their "
                    "sources, which every worker opens for itself."
                )
                raise InputError(message)
        if self.base is not None and not isinstance(self.base, str | PathLike):
            name = getattr(self.base, "label", type(self.base).__name__)
            message = (
                f"The base {name} is open already: with an executor it is given by "
                "its source, which every worker opens for itself."
            )
            raise InputError(message)

    def open(self) -> OpenStudy:
        """Open the adapters and the base, and choose the pairs.

        Raises
        ------
        IncompatibleError
            No adapter can be an adapter of this base.
        InputError
            A reference adapter cannot serve as one, see `check_reference`.
        """
        unread: list[Failure] = []
        base = None if self.base is None else as_base(self.base)
        # Fine-tunes of a base that is given by its name are read again from the same one.
        given = self.base if isinstance(self.base, str | PathLike) else base
        analyzed = list(read_sources(self.adapters, unread, base=given))
        reference = list(read_sources(self.reference, unread, base=given))
        analyzed, reference = (
            [with_base_name(adapter, [*analyzed, *reference], base) for adapter in group]
            for group in (analyzed, reference)
        )
        labeled = with_label_facts([*analyzed, *reference], self.label)
        check_reference(labeled[: len(analyzed)], labeled[len(analyzed) :])
        aligned = align_adapters(unique_labels(labeled), prefix=self.prefix)
        count = len(analyzed)
        if base is not None:
            base = base.matched_to(labeled, prefix=self.prefix)
            fitting, misfits = [], []
            # Adapters that name a different base are not compared with this one.
            named = {a.label: a.provenance.base_model for a in aligned[:count]}
            unchecked = other_bases(named, base)
            for adapter in aligned[:count]:
                try:
                    if adapter.label not in unchecked:
                        check_experts(adapter, base)
                except IncompatibleError as error:
                    misfits.append(Failure(adapter.label, str(error)))
                else:
                    fitting.append(adapter)
            unread += misfits
            if misfits and not fitting:
                raise IncompatibleError(misfits[0].reason)
            aligned, count = [*fitting, *aligned[count:]], len(fitting)
        names = {a.label: a.provenance.base_model for a in aligned[:count]}
        return OpenStudy(
            spec=self,
            adapters=aligned,
            analyzed=count,
            base=base,
            measured=frozenset(names) - other_bases(names, base),
            pairs=choose_pairs(
                aligned[:count],
                aligned[count:],
                across_bases=self.across_bases,
                max_pairs=self.max_pairs,
            ),
            unread=tuple(unread),
        )

    def options(self) -> dict[str, object]:
        """Return the parameters of `study` other than adapters that are not the default."""
        base = self.base
        values = {
            "base": None
            if base is None
            else (str(base) if isinstance(base, str | PathLike) else ...),
            "modules": self.modules,
            "prefix": self.prefix or None,
            "transposed": self.transposed,
            "draws": self.draws if base is not None and self.draws != DRAWS else None,
            "weight_spectra": self.weight_spectra or None,
            "label": self.label,
            "across_bases": self.across_bases or None,
            "max_pairs": None if self.max_pairs == MAX_PAIRS else self.max_pairs,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, eq=False)
class OpenStudy:
    """The adapters, base and pairs of a study.

    Attributes
    ----------
    spec
        What was asked for.
    adapters
        Adapters with unique labels and common module names: analyzed ones, then the reference.
    analyzed
        Number of analyzed adapters.
    base
        The frozen weights, matched to the adapters' names; None without a base.
    measured
        Labels of the adapters that are compared with the base.
    pairs
        The pairs that are compared.
    unread
        Sources that could not be read, and adapters that do not fit the base.
    """

    spec: StudySpec
    adapters: Sequence[Adapter]
    analyzed: int
    base: BaseWeights | None
    measured: frozenset[str]
    pairs: ChosenPairs
    unread: tuple[Failure, ...]


def check_reference(analyzed: Sequence[Adapter], reference: Sequence[Adapter]) -> None:
    """Check that what is known about reference adapters does not contradict their use.

    Unrelated adapters have other tasks on the same base. What is not known is accepted, and so is
    an equal seed, which makes unrelated adapters more alike.

    Raises
    ------
    InputError
        Naming each reference adapter that is analyzed itself, has the task of an analyzed adapter,
        or has a different base than all of them.
    """
    files = {key: adapter.label for adapter in analyzed if (key := _file_key(adapter))}
    tasks: dict[str | None, list[str]] = {}
    for adapter in analyzed:
        tasks.setdefault(adapter.provenance.task, []).append(adapter.label)
    tasks.pop(None, None)
    reasons = []
    for adapter in reference:
        source = adapter.provenance
        bases = [same_base(source.base_model, a.provenance.base_model) for a in analyzed]
        if same := files.get(_file_key(adapter) or adapter):
            reasons.append(f"{adapter.label} is the analyzed adapter {same} itself")
        elif source.task in tasks:
            others = join_names(tasks[source.task])
            reasons.append(f"{adapter.label} has the task of {others} ('{source.task}')")
        elif bases and all(same is False for same in bases):
            reasons.append(f"{adapter.label} was trained on a different base ({source.base_model})")
    if reasons:
        them = "it" if len(reasons) == 1 else "them"
        message = (
            "Reference adapters must be unrelated (other tasks, same base), but "
            f"{'; '.join(reasons)}. Leave {them} out of reference= (command line: --reference). If "
            "a task is wrong, correct it with label= (command line: --label PATTERN), or ignore "
            "the names with label='none' (command line: --label none)."
        )
        raise InputError(message)


def _file_key(adapter: Adapter) -> Hashable | None:
    """Return a key that only the same adapter in the same file has; None for one in memory."""
    source = adapter.provenance
    if source.path is None or source.format == "memory":
        return None
    name = adapter.label.partition("#")[2] if source.source is None else source.source
    return source.path.resolve(), name.rpartition("#")[2] if "#" in name else ""


def read_sources(
    sources: Sequence[Source], failures: list[Failure], *, base: Any = None
) -> Iterator[Adapter]:
    """Yield every adapter of the sources in order, each once; full fine-tunes if a base is given.

    If a source leads to several adapters, those that cannot be read are added to ``failures``; the
    error of a source with a single adapter is raised.
    """
    seen: set[tuple[str, str | None]] = set()
    for source in sources:
        if isinstance(source, Adapter):
            yield source
        elif isinstance(source, ReadLater):
            try:
                yield source.read(source.ref)
            except InputError as error:
                failures.append(Failure(source.ref.source, str(error)))
        elif isinstance(source, AdapterRef):
            yield read_adapter(source, base=base)
        elif not isinstance(source, str | PathLike):
            yield as_adapter(source, base=base)
        else:
            paths = expand_glob(str(source))
            refs = [ref for path in paths for ref in find_adapters(path, base=base)]
            for ref in skip_seen(refs, seen):
                try:
                    yield read_adapter(ref, base=base)
                except InputError as error:
                    if len(refs) == 1:
                        raise
                    failures.append(Failure(ref.source, str(error)))
