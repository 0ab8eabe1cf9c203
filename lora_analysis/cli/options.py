"""Options and small services that several verbs share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_analysis.errors import InputError

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter
    from lora_analysis.studies import Failure

Command = TypeVar("Command", bound=Callable[..., Any])


def output_options(command: Command) -> Command:
    """Add ``--format`` and ``--debug``."""
    formats = click.Choice(["human", "json", "quiet"])
    command = click.option(
        "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
    )(command)
    return click.option(
        "--format",
        "form",
        type=formats,
        default="human",
        show_default=True,
        help="human: tables; json: one document; quiet: the essential value alone.",
    )(command)


def reading_options(command: Command) -> Command:
    """Add ``--pair``, ``--scale`` and ``--alpha``: what a file itself may not say."""
    command = click.option(
        "--alpha", type=float, help="LoRA alpha; the scale is alpha / rank of each module."
    )(command)
    command = click.option(
        "--scale", type=float, help="The multiplier of B·A, where the file does not give it."
    )(command)
    return click.option(
        "--pair",
        metavar="A,B",
        callback=_pair,
        help="Names of bare factor pairs, A first: 'w_a_{name},w_b_{name}'.",
    )(command)


def modules_option(command: Command) -> Command:
    """Add ``--module``."""
    return click.option(
        "--module",
        "modules",
        metavar="PATTERN",
        help="Only these modules: a name, the end of one, or a regular expression.",
    )(command)


def _pair(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    parts = value.split(",")
    if len(parts) != 2 or any(part.count("{name}") != 1 for part in parts):
        message = "two names separated by a comma, each with {name} once: 'w_a_{name},w_b_{name}'"
        raise click.BadParameter(message)
    return tuple(part.strip() for part in parts)


def read_one(source: str, *, pair: Any, scale: float | None, alpha: float | None) -> Adapter:
    """Read the one adapter at ``source``."""
    from lora_analysis.formats import read_adapter

    return read_adapter(source, pair=pair, scale=scale, alpha=alpha)


def read_all(
    sources: Sequence[str], *, pair: Any, scale: float | None, alpha: float | None
) -> tuple[list[Adapter], list[Failure]]:
    """Read every adapter found at the sources, in natural order of their labels.

    What cannot be read is returned beside them.
    """
    from lora_analysis.formats import find_adapters, read_adapter
    from lora_analysis.patterns import natural_key
    from lora_analysis.studies import Failure

    adapters, failures = [], []
    for source in sources:
        try:
            found = find_adapters(source, pair=pair)
        except InputError as error:
            failures.append(Failure(source, str(error)))
            continue
        for one in found:
            try:
                adapters.append(read_adapter(one, pair=pair, scale=scale, alpha=alpha))
            except InputError as error:
                failures.append(Failure(one.source, str(error)))
    return sorted(adapters, key=lambda one: natural_key(one.label)), failures


@contextmanager
def progress_bar(form: str) -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (what, done, total) that draws a bar on stderr, if that is a terminal."""
    if form != "human" or not sys.stderr.isatty():
        yield lambda _what, _done, _total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, rate="")
            speed = bar.tasks[tasks[what]].speed
            rate = f"{speed:.1f}/s" if speed else ""
            bar.update(tasks[what], completed=done, total=total, rate=rate)

        yield advance
