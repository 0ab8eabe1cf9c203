"""Options of a command that reads adapters, and the sources that cannot be read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.options import UNUSUAL_FILES, GroupedOption
from lora_analysis.errors import InputError, SourceError
from lora_analysis.finding import Failure
from lora_analysis.formats.options import CommandLineOption, ReadOptions
from lora_analysis.progress import Progress
from lora_analysis.text import printable

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter
    from lora_analysis.bases import BaseWeights
    from lora_analysis.formats import AdapterRef
    from lora_analysis.studies import ReadLater


@dataclass(frozen=True, slots=True)
class Reading:
    """Reads the adapters of a command with its read options and base weights.

    ``base`` is the model that full fine-tunes among the sources are compared with.
    """

    options: ReadOptions = field(default_factory=ReadOptions)
    trained_on: str | None = None
    base: str | None = None
    _opened: dict[str, BaseWeights] = field(default_factory=dict, repr=False, compare=False)

    def read(self, source: str | AdapterRef) -> Adapter:
        """Read the one adapter at ``source``, as the change of the weight if the base is named."""
        from lora_analysis.errors import UnsupportedMethodError
        from lora_analysis.formats import load_adapter

        options = replace(self.options, base=self.base or self.trained_on)
        base = self.open_base(self.trained_on)
        if base is None:
            return load_adapter(source, options)
        from lora_analysis.effective import effective_adapter, initial_factors_from_base

        try:
            adapter = load_adapter(source, options)
        except UnsupportedMethodError:
            if options.initial is not None:
                raise
            initial = initial_factors_from_base(base)
            adapter = load_adapter(source, replace(options, initial=initial))
        return effective_adapter(adapter, base)

    def open_base(self, source: str | None) -> BaseWeights | None:
        """Open the base at ``source``, once for all adapters; None without one.

        Pickles are read if they are allowed.
        """
        from lora_analysis.bases import open_base

        if source is None:
            return None
        if source not in self._opened:
            self._opened[source] = open_base(source, allow_pickle=self.options.allow_pickle)
        return self._opened[source]

    def find(self, sources: Iterable[str], left_out: list[Failure]) -> list[AdapterRef]:
        """Return every adapter found at the sources, once; a source without one is left out."""
        from lora_analysis.formats import find_sources

        return find_sources(
            sources,
            left_out,
            pair=self.options.pair,
            allow_pickle=self.options.allow_pickle,
            base=self.base or self.trained_on,
        )

    def read_each(
        self, sources: Iterable[str], left_out: list[Failure], progress: Progress
    ) -> Iterator[Adapter]:
        """Yield every adapter found at the sources; those that cannot be read are left out."""
        refs = self.find(sources, left_out)
        for done, ref in enumerate(refs, start=1):
            try:
                adapter = self.read(ref)
            except InputError as error:
                left_out.append(Failure(ref.source, str(error), error))
            else:
                yield adapter
            progress("adapters", done, len(refs))

    def read_all(
        self, sources: Iterable[str], progress: Progress
    ) -> tuple[list[Adapter], list[Failure]]:
        """Return the adapters at the sources in natural order of their labels, and those left out.

        Raises
        ------
        InputError
            None of them can be read.
        """
        from lora_analysis.patterns import natural_key

        left_out: list[Failure] = []
        adapters = list(self.read_each(sources, left_out, progress))
        print_left_out(left_out, some=bool(adapters))
        return sorted(adapters, key=lambda adapter: natural_key(adapter.label)), left_out

    def defer_reading(
        self, sources: Iterable[str], _progress: Progress
    ) -> tuple[list[ReadLater], list[Failure]]:
        """Return the adapters of `read_all` unread, for workers that read for themselves.

        Raises
        ------
        InputError
            None of the sources leads to an adapter.
        """
        from lora_analysis.patterns import natural_key
        from lora_analysis.studies import ReadLater

        left_out: list[Failure] = []
        refs = self.find(sources, left_out)
        print_left_out(left_out, some=bool(refs))
        refs.sort(key=lambda ref: natural_key(ref.label))
        return [ReadLater(ref, self.read) for ref in refs], left_out


def print_left_out(left_out: list[Failure], *, some: bool) -> None:
    """Print the sources that were left out on stderr; raise if there is not ``some`` left.

    Raises
    ------
    InputError
        The one error, or if there are several, that nothing is left.
    """
    if len(left_out) == 1 and not some:
        raise left_out[0].error or SourceError(left_out[0].reason)
    for failure in left_out:
        click.echo(printable(f"Left out: {failure}"), err=True)
    if not some:
        message = f"None of the {len(left_out)} adapters and sources can be used."
        raise SourceError(message)


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the read options, passed to the command as ``reading``."""
    names = [option.name for option in fields(ReadOptions) if option.metadata]

    @functools.wraps(command)
    def with_reading(*args: Any, trained_on: str | None, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in names}
        if values["scale"] is not None and values["alpha"] is not None:
            message = "--scale is the multiplier itself, --alpha gives alpha / rank: pass one."
            raise click.UsageError(message)
        reading = Reading(ReadOptions(**values), trained_on, kwargs.get("base"))
        return command(*args, reading=reading, **kwargs)

    wrapped = click.option(
        "--trained-on",
        cls=GroupedOption,
        section=UNUSUAL_FILES,
        metavar="BASE",
        help="Base weights that training started from. Computes the change of the whole weight "
        "(DoRA, KaSA), or subtracts the initial product (PiSSA, OLoRA).",
    )(with_reading)
    for option in reversed(fields(ReadOptions)):
        if option.metadata:
            wrapped = _click_option(option.name, option.metadata["command_line"])(wrapped)
    return wrapped


def _click_option(name: str, option: CommandLineOption) -> Callable[..., Any]:
    """Return the decorator that adds the option of one field of `ReadOptions`."""
    kind: Any = None
    if option.choices:
        kind = click.Choice(option.choices)
    elif option.minimum is not None:
        kind = click.IntRange(min=option.minimum)
    elif option.parse in (float, int):
        kind = option.parse

    def parse(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else option.parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    is_flag = option.parse is bool
    return click.option(
        f"--{name.replace('_', '-')}",
        cls=GroupedOption,
        section=UNUSUAL_FILES,
        type=kind,
        is_flag=is_flag,
        metavar=option.metavar,
        callback=None if kind or is_flag else parse,
        help=option.help,
    )
