"""Strings that lead to adapters: files, folders of several, globs, repositories on a hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_analysis.adapter import Adapter
from lora_analysis.errors import InputError
from lora_analysis.finding import Failure
from lora_analysis.formats import AdapterRef, each_once, expanded, find_adapters, read_adapter


@dataclass(frozen=True, slots=True)
class ReadLater:
    """An adapter that was found, and how it is to be read, here or in another process."""

    ref: AdapterRef
    read: Callable[[AdapterRef], Adapter]

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Where it lies, which no output may touch."""
        return (self.ref.path,)


def read_sources(
    sources: Iterable[Adapter | ReadLater | str | Path], failures: list[Failure]
) -> Iterator[Adapter]:
    """Yield every adapter the sources lead to, in their order, once however often it is named.

    Of several at one source, those that cannot be read are added to ``failures``; a source that
    leads to one alone raises what is wrong with it.
    """
    known: set[tuple[str, str | None]] = set()
    for one in sources:
        if isinstance(one, Adapter):
            yield one
            continue
        if isinstance(one, ReadLater):
            try:
                yield one.read(one.ref)
            except InputError as error:
                failures.append(Failure(one.ref.source, str(error)))
            continue
        found = [ref for place in expanded(str(one)) for ref in find_adapters(place)]
        for ref in each_once(found, known):
            try:
                yield read_adapter(ref)
            except InputError as error:
                if len(found) == 1:
                    raise
                failures.append(Failure(ref.source, str(error)))
