"""One walk over modules × adapters: studies, all pairs and groups read every module once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from lora_analysis.blocks import choose_names
from lora_analysis.errors import InputError, SourceError
from lora_analysis.execution import in_threads
from lora_analysis.execution.protocol import results_in_order
from lora_analysis.patterns import natural_key

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter, Update
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
