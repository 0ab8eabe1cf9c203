"""Options shared by several commands, and the exit codes of every verb."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from lora_analysis.progress import Progress

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter


Command = TypeVar("Command", bound=Callable[..., Any])
# Beyond this number, modules are summarized by type unless --all is given.
MODULES_SHOWN = 48


# Title of the options that only unusual files need; they are last in every help text.
UNUSUAL_FILES = "Reading unusual files"
# Options of every verb, which stand after its own.
_SHARED = ("force", "form", "debug")


class GroupedOption(click.Option):
    """An option that stands in a section of the help text."""

    def __init__(self, *args: Any, section: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class VerbCommand(click.Command):
    """A command whose help text has sections, the options that most users need first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write required options, then the others as declared, then sections by title."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        params = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        for param in sorted(params, key=lambda p: (p.is_eager, p.name in _SHARED, not p.required)):
            record = param.get_help_record(ctx)
            if record is not None:
                title = getattr(param, "section", "") or "Options"
                sections.setdefault(title, []).append(record)
        for title in sorted(sections, key=lambda title: title == UNUSUAL_FILES):
            with formatter.section(title):
                formatter.write_dl(sections[title])


def output_options(quiet: str) -> Callable[[Command], Command]:
    """Return a decorator that adds ``--format`` and ``--debug``.

    ``quiet`` names what the command prints with ``--format quiet``.
    """

    def decorate(command: Command) -> Command:
        command = click.option(
            "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
        )(command)
        return click.option(
            "--format",
            "form",
            type=click.Choice(["human", "json", "quiet"]),
            default="human",
            show_default=True,
            help=f"human: for reading; json: one document with everything; quiet: only {quiet}.",
        )(command)

    return decorate


# What every --base does with a source that is a whole model.
FINE_TUNES: Final = "a source that is a whole model is read as its difference to them."


def device_option(command: Command) -> Command:
    """Add ``--device``."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        help="Device: cpu, cuda or mps; auto uses a GPU if there is one.",
    )(command)


def tracker_option(command: Command) -> Command:
    """Add ``--tracker``."""
    return click.option(
        "--tracker",
        "trackers",
        multiple=True,
        help="Experiment tracker: tensorboard, trackio or wandb; can be repeated.",
    )(command)


def demo_option(command: Command) -> Command:
    """Add ``--output``, the folder of a demo."""
    return click.option(
        "-o",
        "--output",
        type=OutputPath(file_okay=False, path_type=Path),
        default=Path("lora-analysis-demo"),
        show_default=True,
        help="Folder of the demo; adapters already trained in its runs/ are reused.",
    )(command)


class OutputPath(click.Path):
    """A path to write; an empty one, which would name the current folder, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if not os.fspath(value):
            self.fail("the name is empty.", param, ctx)
        return super().convert(value, param, ctx)


def force_option(command: Command) -> Command:
    """Add ``--force``."""
    return click.option(
        "--force",
        is_flag=True,
        help="Replace output files that this program did not write or that were edited since.",
    )(command)


def modules_option(command: Command) -> Command:
    """Add ``--module``."""
    return click.option(
        "--module",
        "modules",
        metavar="PATTERN",
        help="Select modules by name, end of the name, or regular expression; in image models also "
        "by block or part: IN04, attn2, 'text encoder', 'IN04 attn1.to_q'.",
    )(command)


def fine_tune_base_option(command: Command) -> Command:
    """Add ``--base`` of a command that needs it for full fine-tunes alone."""
    return click.option("--base", help=f"Base weights: {FINE_TUNES}")(command)


def spectrum_option(command: Command) -> Command:
    """Add ``--spectrum``."""
    return click.option(
        "--spectrum",
        is_flag=True,
        help="Also compare with W's full spectrum: ΔW's energy in W's leading and trailing "
        "directions, intruder dimensions, drift of W's singular values and rotation of its "
        "vectors. Takes half a minute per 4096 × 4096 weight the first time; cached in "
        "$LORA_ANALYSIS_CACHE.",
    )(command)


def prefix_option(command: Command) -> Command:
    """Add ``--prefix``."""
    return click.option(
        "--prefix",
        "prefixes",
        cls=GroupedOption,
        section=UNUSUAL_FILES,
        metavar="OLD=NEW",
        multiple=True,
        help="Replace the prefix OLD of module names with NEW (OLD alone: remove it) to match "
        "modules of differently named models. Repeatable.",
    )(command)


def label_option(command: Command) -> Command:
    """Add ``--label``."""
    return click.option(
        "--label",
        metavar="PATTERN",
        help="Pattern that extracts task, rank, seed and step from adapter names, for example "
        "'{task}-r{rank}-s{seed}'; * matches anything. By default common patterns are tried if no "
        "file states task and seed; 'none' turns that off.",
    )(command)


def reference_option(command: Command) -> Command:
    """Add ``--reference``."""
    return click.option(
        "--reference",
        "references",
        metavar="SOURCE",
        multiple=True,
        help="Unrelated adapters to compare with (other tasks and seeds, same base), or a file "
        "from `lora-analysis reference`. Adapters with the task of an analyzed one are refused. "
        "Without a reference, only random subspaces serve as a baseline. Repeatable.",
    )(command)


def task_and_seed_options(command: Command) -> Command:
    """Add ``--task`` and ``--seed`` of two adapters, see `labeled_pair`."""
    for name, metavar, kind in (("seed", "NUMBER", click.IntRange(min=0)), ("task", "NAME", str)):
        command = click.option(
            f"--{name}",
            f"{name}s",
            metavar=metavar,
            type=kind,
            multiple=True,
            callback=_check_two_values,
            help=f"{name.capitalize()} of A and of B: pass it twice, in this order, or once for "
            "both. Overrides files and names.",
        )(command)
    return command


def _check_two_values(
    _ctx: click.Context, param: click.Parameter, values: tuple[Any, ...]
) -> tuple[Any, ...]:
    if len(values) > 2:
        message = f"there are two adapters, but {len(values)} values of {param.opts[0]}"
        raise click.BadParameter(message)
    return values * 2 if len(values) == 1 else values


def labeled_pair(
    adapters: Sequence[Adapter], label: str | None, tasks: Sequence[str], seeds: Sequence[int]
) -> list[Adapter]:
    """Return two adapters with what ``--label`` extracts, overridden by ``--task``, ``--seed``."""
    from lora_analysis.studies import with_label_facts

    result = list(adapters) if label is None else with_label_facts(adapters, label)
    for name, values in (("task", tasks), ("seed", seeds)):
        if values:
            pairs = zip(result, values, strict=True)
            result = [adapter.with_provenance(**{name: value}) for adapter, value in pairs]
    return result


def transposed_option(command: Command) -> Command:
    """Add ``--transposed/--not-transposed``."""
    return click.option(
        "--transposed/--not-transposed",
        cls=GroupedOption,
        section=UNUSUAL_FILES,
        default=None,
        help="Orientation of the base's weights: stored as [in, out] or not. By default decided "
        "from shapes and model type.",
    )(command)


@contextmanager
def progress_bar(form: str) -> Iterator[Progress]:
    """Yield a progress callback that draws a bar on stderr if that is a terminal."""
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


DONE: Final = 0  # a module left out by rule is a finding, not a failure
BUG: Final = 1
USAGE: Final = 2  # click's own
REFUSED: Final = 3  # input, a missing extra, a folder in use, a full disk
PARTLY_FAILED: Final = 4  # a source failed, or a module was not read, matched or computed
CHECK_FAILED: Final = 5
INCONCLUSIVE: Final = 6
INTERRUPTED: Final = 130
# 128 + SIGPIPE: what a shell reports if a pager or `head` closed the pipe.
READER_GONE: Final = 141

_PRECEDENCE: Final = (REFUSED, CHECK_FAILED, INCONCLUSIVE, PARTLY_FAILED)


def exit_code(codes: Iterable[int]) -> int:
    """Return the code that takes precedence, `DONE` if there is none.

    Examples
    --------
    >>> exit_code([PARTLY_FAILED, CHECK_FAILED])
    5
    """
    given = set(codes)
    return next((code for code in _PRECEDENCE if code in given), DONE)
