"""Options and small services that several verbs share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from lora_analysis.progress import Progress

Command = TypeVar("Command", bound=Callable[..., Any])
# More modules than this are summed up by type unless --all asks for each.
MODULES_SHOWN = 48


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


def device_option(command: Command) -> Command:
    """Add ``--device``."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        help="auto, cpu, cuda or mps; auto takes a GPU where there is one.",
    )(command)


def demo_option(command: Command) -> Command:
    """Add ``--output``, the folder of a demo."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path("lora-analysis-demo"),
        show_default=True,
        help="Folder of the demo: its trained adapters lie in runs/, and are used again.",
    )(command)


def force_option(command: Command) -> Command:
    """Add ``--force``."""
    return click.option(
        "--force",
        is_flag=True,
        help="Replace files at the output that this program did not write, or that were edited.",
    )(command)


def modules_option(command: Command) -> Command:
    """Add ``--module``."""
    return click.option(
        "--module",
        "modules",
        metavar="PATTERN",
        help="Only these modules: a name, the end of one, or a regular expression.",
    )(command)


def prefix_option(command: Command) -> Command:
    """Add ``--prefix``."""
    return click.option(
        "--prefix",
        "prefixes",
        metavar="OLD=NEW",
        multiple=True,
        help="Replace the prefix OLD of module names with NEW (OLD alone: remove it), if the names "
        "alone do not tell which modules match. May be given several times.",
    )(command)


def label_option(command: Command) -> Command:
    """Add ``--label``."""
    return click.option(
        "--label",
        metavar="PATTERN",
        help="What names say of task, rank, seed and step: '{task}-r{rank}-s{seed}' (*: anything).",
    )(command)


def reference_option(command: Command) -> Command:
    """Add ``--reference``."""
    return click.option(
        "--reference",
        "references",
        metavar="SOURCE",
        multiple=True,
        help="Adapters of other tasks on the same base, trained with other seeds; verdicts are "
        "made against them. May be given several times.",
    )(command)


def transposed_option(command: Command) -> Command:
    """Add ``--transposed/--not-transposed``."""
    return click.option(
        "--transposed/--not-transposed",
        default=None,
        help="Whether the base stores its weights as [in, out]; by default its shapes and "
        "model type decide.",
    )(command)


@contextmanager
def progress_bar(form: str) -> Iterator[Progress]:
    """Give a function (what, done, total) that draws a bar on stderr, if that is a terminal."""
    if form != "human" or not sys.stderr.isatty():
        yield lambda _what, _done, _total: None
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rate]}", markup=False),
        rich_progress.TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    console = Console(stderr=True)
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, rate="")
            speed = bar.tasks[tasks[what]].speed
            rate = f"{speed:.1f}/s" if speed else ""
            bar.update(tasks[what], completed=done, total=total, rate=rate)

        yield advance
