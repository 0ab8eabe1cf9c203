"""``lora-analysis report``: adapters in, one report out."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from lora_analysis.cli.options import (
    modules_option,
    output_options,
    progress_bar,
    read_all,
    reading_options,
)
from lora_analysis.cli.show import print_json


@click.command(name="report")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--base", help="Base weights: a safetensors file or model folder.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for report.html, figures/, tables/ and results.json.",
)
@click.option(
    "--as",
    "kind",
    type=click.Choice(["html", "md"]),
    default="html",
    show_default=True,
    help="One HTML file, or Markdown for a README or a model card.",
)
@click.option("--title", help="Heading of the report.")
@modules_option
@reading_options
@output_options
def command(
    sources: tuple[str, ...],
    *,
    base: str | None,
    output: Path,
    kind: Any,
    title: str | None,
    modules: str | None,
    pair: Any,
    scale: float | None,
    alpha: float | None,
    form: str,
) -> int:
    """Analyse the adapters at every SOURCE and write one self-contained HTML report.

    Adapters of other tasks on the same base, trained with other seeds, are the reference that
    every verdict is made against: give them too.
    """
    from lora_analysis.errors import SourceError
    from lora_analysis.report import write_report
    from lora_analysis.studies import study

    adapters, failures = read_all(sources, pair=pair, scale=scale, alpha=alpha)
    for one in failures:
        click.echo(f"Left out: {one.source}: {one.reason}", err=True)
    if not adapters:
        message = f"None of the {len(sources)} sources holds an adapter that can be read."
        raise SourceError(message)
    with progress_bar(form) as progress:
        result = study(adapters, base=base, modules=modules, failures=failures, progress=progress)
        for one in result.failures[len(failures) :]:
            click.echo(f"Left out: {one.source}: {one.reason}", err=True)
        path = write_report(result, output, title=title, command=_command_line(), form=kind)
    if form == "json":
        print_json(
            {
                "report": path,
                "adapters": list(result.adapters),
                "failures": [
                    {"source": one.source, "reason": one.reason} for one in result.failures
                ],
            }
        )
    else:
        click.echo(path)
    return 4 if result.failures else 0


def _command_line() -> str:
    return shlex.join(["lora-analysis", *sys.argv[1:]])
