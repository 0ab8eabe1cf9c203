"""``lora-analysis report``: one report on any number of adapters."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.options import (
    DONE,
    FINE_TUNES,
    PARTLY_FAILED,
    OutputPath,
    VerbCommand,
    force_option,
    label_option,
    modules_option,
    output_options,
    prefix_option,
    progress_bar,
    reference_option,
    spectrum_option,
    transposed_option,
)
from lora_analysis.cli.reading import Reading, reading_options
from lora_analysis.cli.show import print_json, study_facts
from lora_analysis.text import printable

if TYPE_CHECKING:
    from lora_analysis.execution.protocol import Executor


def _formats(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    formats = tuple(filter(None, (name.strip() for name in value.split(","))))
    unknown = [name for name in formats if name not in ("svg", "png", "pdf")]
    if unknown:
        message = f"{', '.join(unknown)} is not one of svg, png, pdf"
        raise click.BadParameter(message)
    return formats


@click.command(name="report", cls=VerbCommand)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@reference_option
@click.option(
    "--base",
    help=f"Base weights: a safetensors or GGUF file, or a model folder; {FINE_TUNES}",
)
@spectrum_option
@transposed_option
@click.option(
    "-o",
    "--output",
    type=OutputPath(file_okay=False, path_type=Path),
    required=True,
    help="Folder for report.html, figures/, tables/ and results.json; replaces an earlier report.",
)
@force_option
@click.option(
    "--as",
    "kind",
    type=click.Choice(["html", "md"]),
    default="html",
    show_default=True,
    help="Format: one HTML file, or Markdown for a README or a model card.",
)
@click.option("--title", help="Heading of the report.")
@click.option(
    "--figures",
    default="svg,png,pdf",
    show_default=True,
    metavar="FORMATS",
    callback=_formats,
    help="Formats of the files in figures/; empty for none.",
)
@click.option(
    "--max-pairs",
    type=click.IntRange(min=1),
    help="Maximum number of pairs to compare module by module, by default 780. If there are more, "
    "pairs are chosen so that every adapter is in some; the similarity matrix has all pairs.",
)
@click.option("--parquet", is_flag=True, help="Write tables/ as Parquet too (extra: parquet).")
@modules_option
@prefix_option
@label_option
@click.option(
    "--across-bases",
    is_flag=True,
    help="Also compare adapters of different base models; by default they are grouped by base.",
)
@click.option(
    "--executor",
    "kind_of_executor",
    type=click.Choice(["threads", "process", "ray"]),
    default="threads",
    show_default=True,
    help="How to run in parallel: threads, processes or a Ray cluster.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Number of parallel workers.")
@click.option(
    "--address", help="Address of a Ray cluster; by default one is started on this machine."
)
@reading_options
@output_options("the path of the report")
def command(
    sources: tuple[str, ...],
    *,
    references: tuple[str, ...],
    base: str | None,
    spectrum: bool,
    transposed: bool | None,
    output: Path,
    force: bool,
    kind: Any,
    title: str | None,
    figures: tuple[str, ...],
    max_pairs: int | None,
    parquet: bool,
    modules: str | None,
    prefixes: tuple[str, ...],
    label: str | None,
    across_bases: bool,
    kind_of_executor: str,
    workers: int | None,
    address: str | None,
    reading: Reading,
    form: str,
) -> int:
    """Analyze the adapters at every SOURCE and write one self-contained HTML report.

    Conclusions beyond "more alike than random" need unrelated adapters (other tasks and seeds,
    same base): among the sources, if their tasks and seeds are known, or given with --reference.
    """
    from lora_analysis.report import write_report
    from lora_analysis.report.report_folder import check_report_folder
    from lora_analysis.storage.source_names import source_paths
    from lora_analysis.studies import MAX_PAIRS, Failure, study
    from lora_analysis.studies.reference_levels import is_reference_file

    if spectrum and base is None:
        message = "--spectrum compares with the base weights: pass --base."
        raise click.UsageError(message)
    with progress_bar(form) as progress:
        executor = _executor(kind_of_executor, workers, address)
        find = reading.read_all if executor is None else reading.defer_reading
        adapters, left_out = find(sources, progress)
        files = [source for source in references if is_reference_file(source)]
        unread = [source for source in references if source not in files]
        others, more = find(unread, progress) if unread else ([], [])
        inputs = [path for adapter in (*adapters, *others) for path in adapter.inputs]
        inputs += map(Path, files)
        inputs += source_paths(base) if base else ()
        check_report_folder(output, inputs=inputs, force=force)
        failures = [Failure(failure.source, failure.reason) for failure in left_out + more]
        result = study(
            adapters,
            reference=[*others, *files],
            # Passed by name if possible: the report's lines of Python repeat it.
            base=reading.open_base(base) if reading.options.allow_pickle else base,
            transposed=transposed,
            weight_spectra=spectrum,
            modules=modules,
            prefix=prefixes,
            label=label,
            across_bases=across_bases,
            max_pairs=max_pairs or MAX_PAIRS,
            failures=failures,
            workers=workers,
            executor=executor,
            progress=progress,
        )
        for failure in result.failures[len(failures) :]:
            click.echo(printable(f"Left out: {failure.source}: {failure.reason}"), err=True)
        path = write_report(
            result,
            output,
            title=title,
            command=shlex.join(["lora-analysis", *sys.argv[1:]]),
            form=kind,
            parquet=parquet,
            figures=figures,
            progress=progress,
            force=force,
        )
    if form == "json":
        print_json({"report": path, **study_facts(result)})
    else:
        click.echo(path)
    return PARTLY_FAILED if result.failures or result.unmatched else DONE


def _executor(kind: str, workers: int | None, address: str | None) -> Executor | None:
    """Return the requested executor; None for threads, which need none."""
    if kind == "process":
        from lora_analysis.execution import available_workers
        from lora_analysis.execution.processes import ProcessExecutor

        return ProcessExecutor(workers or available_workers())
    if kind == "ray":
        from lora_analysis.execution.cluster import RayExecutor

        return RayExecutor(address=address, workers=workers, gpus=0)
    return None
