"""Modules of many adapters: one name for each, and one walk that reads every module once.

Names are matched by their identities (`lora_analysis.names`) for each adapter as a whole, and are
those of one of the files. The base is still searched for the name in the adapter's own file.
Studies, all pairs and groups take the same walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

from lora_analysis.adapter import Adapter, LowRankUpdate, Update
from lora_analysis.blocks import choose_names
from lora_analysis.errors import InputError, SourceError
from lora_analysis.execution import in_threads
from lora_analysis.execution.protocol import results_in_order
from lora_analysis.family_names import Rewrite, spellings_of
from lora_analysis.finding import Finding
from lora_analysis.names import (
    NameMatch,
    Prefixes,
    identify,
    is_flattened,
    match_names,
    possible_prefixes,
)
from lora_analysis.patterns import natural_key

if TYPE_CHECKING:
    from lora_analysis.execution.protocol import EventHandler, Executor
    from lora_analysis.progress import Progress


Result = TypeVar("Result")


def choose_modules(adapters: Sequence[Adapter], pattern: str | Sequence[str] | None) -> list[str]:
    """Return the names of modules of any adapter that match a pattern, in natural order.

    Raises
    ------
    SourceError
        No adapter has a module.
    InputError
        No module matches.
    """
    names = sorted({name for adapter in adapters for name in adapter}, key=natural_key)
    if not names:
        message = f"No adapter is left to analyze: {len(adapters)} given, with no module in any."
        raise SourceError(message)
    chosen = choose_names(names, pattern)
    if not chosen:
        first = ", ".join(names[:4])
        message = f"No module matches {pattern!r}. The adapters have {len(names)}: {first}, ..."
        raise InputError(message)
    return chosen


class SameShape(NamedTuple):
    """Updates of one module that have one shape, and the positions of their adapters."""

    members: list[int]
    updates: list[Update]


def updates_by_shape(
    adapters: Sequence[Adapter], module: str, failures: MutableMapping[str, str] | None = None
) -> list[SameShape]:
    """Return the updates of one module by shape, read now, in the order of the adapters.

    Parameters
    ----------
    adapters
        Adapters under aligned names; those without the module are left out.
    module
        Name of the module.
    failures
        Receives the error text of each adapter whose module cannot be read, by label; None raises
        the error.
    """
    groups: dict[tuple[int, int], SameShape] = {}
    for index, adapter in enumerate(adapters):
        if module not in adapter:
            continue
        try:
            update = adapter[module]
        except InputError as error:
            if failures is None:
                raise
            failures[adapter.label] = str(error)
            continue
        group = groups.setdefault(update.shape, SameShape([], []))
        group.members.append(index)
        group.updates.append(update)
    return list(groups.values())


def walk_modules(
    analyze: Callable[[str], Result],
    modules: Sequence[str],
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Yield the result of each module, in order.

    Parameters
    ----------
    analyze
        Function of a module's name; for an executor it must be picklable.
    modules
        Names of the modules.
    workers
        Number of threads; the CPUs of this process by default.
    executor
        Processes or machines that run ``analyze`` instead of threads.
    progress
        Called with ("modules", done, total) after each module.
    """
    results = (
        in_threads(analyze, modules, workers=workers)
        if executor is None
        else results_in_order(executor.map(_ExecutorWork(analyze), modules), modules)
    )
    for done, result in enumerate(results, start=1):
        yield result
        if progress:
            progress("modules", done, len(modules))


@dataclass(frozen=True, slots=True)
class _ExecutorWork(Generic[Result]):
    """A function of a module in the form that executors call."""

    analyze: Callable[[str], Result]

    def __call__(self, module: str, _send_event: EventHandler) -> Result:
        return self.analyze(module)


# Findings on how modules were matched.
MATCHING_CODES: Final = ("names-matched", "names-prefix", "names-ambiguous", "names-hidden")


def align_adapters(adapters: Sequence[Adapter], *, prefix: Prefixes | None = None) -> list[Adapter]:
    """Return the adapters with one name for each module that several of them adapt.

    The name is that of the first adapter with dots in its names. Adapters whose names are equal
    already are returned unchanged; the others get a finding on the names that were matched, or on
    several prefixes that fit equally well, of which none was chosen.

    Parameters
    ----------
    adapters
        Adapters of one model.
    prefix
        Prefix of module names → its replacement in the comparison (`names.parse_prefixes`).
    """
    first: dict[frozenset[str], Adapter] = {}
    for adapter in adapters:
        first.setdefault(frozenset(adapter), adapter)
    if len(first) < 2:  # most of a thousand adapters have the same names
        return list(adapters)
    shapes, paths = _Shapes(), _NamePaths()
    owners: dict[str, Adapter] = {}
    spellings: dict[Rewrite, None] = {}
    matches: dict[frozenset[str], NameMatch] = {}
    # Names with dots first: they contain layer and type, and become the common names.
    for names, adapter in sorted(first.items(), key=lambda item: any(map(is_flattened, item[0]))):
        spellings |= dict.fromkeys(spellings_of(names))
        if prefix or (not names <= owners.keys() and (spellings or paths.may_match(names))):
            matches[names] = match_names(
                adapter,
                owners,
                fits=partial(shapes.fit, adapter, owners),
                prefix=prefix,
                spellings=list(spellings),
            )
        matched = matches[names].pairs if names in matches else {}
        for name in adapter:
            if name not in matched and name not in owners:
                owners[name] = adapter
                paths.add(name)
    by_adapter = (matches.get(frozenset(adapter)) for adapter in adapters)
    return [
        adapter if match is None else _rename_modules(adapter, match)
        for adapter, match in zip(adapters, by_adapter, strict=True)
    ]


class _NamePaths:
    """Paths of modules, and their remainders after a prefix, for a fast check of many names."""

    def __init__(self) -> None:
        self._paths: set[str] = set()
        self._rests: set[str] = set()

    def add(self, name: str) -> None:
        """Add a name."""
        for path, rests in self._read(name):
            self._paths.add(path)
            self._rests.update(rests)

    def may_match(self, names: Iterable[str]) -> bool:
        """Return True if an identity or a prefix may map one of the names to an added one."""
        return any(
            path in self._rests or not self._paths.isdisjoint(rests)
            for name in names
            for path, rests in self._read(name)
        )

    @staticmethod
    def _read(name: str) -> Iterator[tuple[str, list[str]]]:
        for flat in (False, True):
            path = identify(name, flat=flat).name
            rests = [rest for _, rest in possible_prefixes(path, "_" if flat else ".")]
            yield path, [path, *(identify(rest, flat=flat).name for rest in rests)]


class _Shapes:
    """Shapes of updates, read once, and only if names differ."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[int, str], tuple[int, int] | None] = {}

    def fit(self, adapter: Adapter, others: Mapping[str, Adapter], name: str, other: str) -> bool:
        """Return True if two modules have one shape, or one of them cannot be read."""
        shapes = (self._shape(adapter, name), self._shape(others[other], other))
        return None in shapes or shapes[0] == shapes[1]

    def _shape(self, adapter: Adapter, name: str) -> tuple[int, int] | None:
        key = (id(adapter), name)
        if key not in self._shapes:
            try:
                self._shapes[key] = adapter[name].shape
            except InputError:  # the walk over modules reports it
                self._shapes[key] = None
        return self._shapes[key]


def _rename_modules(adapter: Adapter, match: NameMatch) -> Adapter:
    """Return the adapter under the common names, with findings on the names that were matched."""
    pairs = {name: match.pairs.get(name, name) for name in adapter}
    # The caller's prefix may map a module to the name of a different module.
    targets = {target for name, target in pairs.items() if name in match.pairs}
    hidden = [name for name in adapter if name not in match.pairs and name in targets]
    updates: dict[str, Callable[[], Update]] = {}
    for name, target in pairs.items():
        if name not in hidden:
            updates[target] = (
                partial(adapter.__getitem__, name)
                if name == target
                else partial(rename_update, adapter, name, target)
            )
    findings = _match_findings(match, pairs, hidden)
    if not findings:
        return adapter
    source = adapter.provenance
    origins = {pairs.get(name, name): origin for name, origin in source.scale_origin.items()}
    return Adapter(
        updates,
        label=adapter.label,
        provenance=replace(
            source,
            scale_origin=origins,
            findings=(*source.findings, *findings),
            file_names={
                pairs[name]: source.file_names.get(name, name)
                for name in adapter
                if name not in hidden and pairs[name] != source.file_names.get(name, name)
            },
        ),
        saved_modules=adapter.saved_modules,
        config=adapter.config,
        side_tensors=adapter.side_tensors,
    )


def _match_findings(
    match: NameMatch, pairs: Mapping[str, str], hidden: Sequence[str]
) -> list[Finding]:
    """Return the findings on the modules of one adapter that got another name, or none."""
    changed = [name for name, target in pairs.items() if target != name]
    findings = []
    if changed:
        fields = {"count": len(changed), "total": len(pairs), "module": changed[0]}
        findings.append(Finding("names-matched", fields | {"shown": pairs[changed[0]]}))
    if match.decided:
        findings.append(Finding("names-prefix", {"prefixes": list(match.decided)}))
    if match.ambiguous:
        findings.append(Finding("names-ambiguous", {"prefixes": list(match.ambiguous)}))
    if hidden:
        findings.append(Finding("names-hidden", {"modules": hidden}))
    return findings


def rename_update(adapter: Adapter, name: str, target: str) -> Update:
    """Return a module of an adapter under a different name; its weight in the base is the same."""
    update = adapter[name]
    if isinstance(update, LowRankUpdate):
        return replace(update, name=target, base_name=update.base_name or name)
    return replace(update, name=target)
