"""The command line: parse, call the library, print. One file per verb, imported when it is run.

Nothing is computed here. Data goes to stdout, everything else to stderr. Exit codes: 0 done (a
module left out by rule is a finding, not a failure), 1 a bug, 2 usage, 3 refused (input, a missing
extra, a folder in use, a full disk, memory), 4 done, but a source failed or a module could not be
read, matched or computed, 5 a check failed, 6 a check was inconclusive, 130 interrupted, 141 the
reader of stdout went away. Where several apply: 3, 5, 6, 4.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import click

from lora_analysis import __version__
from lora_analysis.cli.options import BUG, DONE, INTERRUPTED, READER_GONE, REFUSED
from lora_analysis.errors import (
    InputError,
    LoraAnalysisError,
    MissingExtraError,
    OutOfMemoryError,
    OutputError,
    named_error,
)
from lora_analysis.text import name_options, printable, printable_lines

# The help of the group needs one line per verb, and must not import what the verbs need.
VERBS = {
    "demo": "Train adapters on bundled data, analyze them and write the report.",
    "train": "Train an adapter on your own data and a transformers model.",
    "sweep": "Train every combination of the ranks, seeds, tasks and options in a TOML file.",
    "inspect": "Show format, modules, ranks, scale and singular values of an adapter.",
    "compare": "Compare the subspaces of two adapters, module by module.",
    "heatmap": "Draw the rank-overlap heat map of two adapters.",
    "amplify": "Measure how an adapter amplifies directions of its base weights.",
    "merge-check": "Check whether an adapter is in a merged model, and at what strength.",
    "report": "Analyze adapters and write one self-contained HTML report.",
    "reference": "Store how alike unrelated adapters of a base are.",
    "reproduce": "Draw the figures of the LoRA paper's section 7 from the demo's adapters.",
    "survey": "Show how many directions the adapters of many authors use, and how alike they are.",
    "resize": "Reduce an adapter's rank by truncated SVD and report the error.",
    "convert": "Convert an adapter to another format.",
    "extract": "Extract the best low-rank approximation of a full fine-tune.",
    "doctor": "Show versions, devices and installed extras.",
}


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """End quietly if stdout was closed; click itself would end with 1, "unexpected"."""
    try:
        yield
    except BrokenPipeError:
        # Buffered output is flushed at exit and needs an open file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(READER_GONE) from None


class _Verbs(click.Group):
    """A group whose commands live one to a file and are imported on use."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _reader_may_leave():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _reader_may_leave():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        command = import_module(f"lora_analysis.cli.{cmd_name.replace('-', '_')}").command
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command; name near ones if there is none of this name."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            from lora_analysis.patterns import did_you_mean

            ctx.fail(f"No such command '{printable(args[0])}'.{did_you_mean(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


_HELP = """What did a LoRA adapter learn, seen from its weights?

SOURCE is an adapter: its folder or file, a folder that holds several, or a repository on a hub
(hf://owner/name[@revision][/path], or owner/name if no local path has that name).
"""


@click.group(cls=_Verbs, help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lora-analysis")
def group() -> None:
    """Group all commands; each is imported when it runs."""


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; errors are printed to stderr in one line.

    ``arguments`` default to those of the process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        result: Any = group.main(given, prog_name="lora-analysis", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("Interrupted. Finished results are kept.", INTERRUPTED)
    except Exception as error:  # the last line of defense is the one place for it
        if "--debug" in given:
            raise
        verb = next((word for word in given if word in VERBS), "lora-analysis")
        typed = error if isinstance(error, LoraAnalysisError) else named_error(error, verb)
        if typed is not None:
            # Input, disk, memory or a missing extra is to blame; anything else is a bug.
            refusals = InputError | OutputError | OutOfMemoryError | MissingExtraError
            code = REFUSED if isinstance(typed, refusals) else BUG
            return _fail(printable(f"Error: {name_options(str(typed))}"), code)
        what = printable(f"Unexpected {type(error).__name__}: {error}")
        return _fail(f"{what}\nRun again with --debug.", BUG)
    return result if isinstance(result, int) else DONE


def _fail(message: str, code: int) -> int:
    click.echo(printable_lines(message), err=True)
    return code


def main() -> NoReturn:
    """Run the program and leave the process with its exit code."""
    sys.exit(run())
