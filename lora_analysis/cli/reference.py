"""``lora-analysis reference``: keep how alike unrelated adapters of one base are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from lora_analysis.cli.options import (
    DONE,
    PARTLY_FAILED,
    OutputPath,
    VerbCommand,
    force_option,
    label_option,
    modules_option,
    output_options,
    prefix_option,
    progress_bar,
)
from lora_analysis.cli.reading import Reading, reading_options
from lora_analysis.cli.show import print_facts, print_json, print_table, print_text
from lora_analysis.text import overlap_number, printable

if TYPE_CHECKING:
    from lora_analysis.studies.reference_levels import ReferenceLevel

# More pairs give no better quantiles, and cost memory.
_MAX_PAIRS: Final = 1770  # of 60 adapters


@click.command(name="reference", cls=VerbCommand)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "-o",
    "--output",
    type=OutputPath(dir_okay=False, path_type=Path),
    required=True,
    help="JSON file for the levels, for example gpt2.reference.json.",
)
@force_option
@label_option
@click.option(
    "--base",
    help="Base weights: the levels then hold for a range of ‖ΔW‖/‖W‖ instead of ‖ΔW‖.",
)
@modules_option
@prefix_option
@reading_options
@output_options("the path of the file")
def command(
    sources: tuple[str, ...],
    *,
    output: Path,
    force: bool,
    label: str | None,
    base: str | None,
    modules: str | None,
    prefixes: tuple[str, ...],
    reading: Reading,
    form: str,
) -> int:
    """Store how alike unrelated adapters of a base are, for compare and report --reference.

    The SOURCEs are adapters of several tasks, trained with different seeds on one base; those
    whose task is unknown count as unrelated. The file holds quantiles per module type, side and
    pair of ranks, and no weights. It gives a level to compare with; a test needs the adapters
    themselves.
    """
    from lora_analysis.storage.outputs import check_output_file
    from lora_analysis.storage.source_names import source_paths
    from lora_analysis.studies import study
    from lora_analysis.studies.reference_levels import write_reference

    check_output_file(output, force=force)
    with progress_bar(form) as progress:
        adapters, left_out = reading.read_all(sources, progress)
        inputs = [path for adapter in adapters for path in adapter.provenance.inputs]
        inputs += source_paths(base) if base else ()
        result = study(
            [],
            reference=adapters,  # pairs of unknown tasks are unrelated, as the caller states
            base=reading.open_base(base),
            modules=modules,
            prefix=prefixes,
            label=label,
            max_pairs=_MAX_PAIRS,
            progress=progress,
        )
        levels = write_reference(result, output, inputs=inputs, force=force)
    failures = [source.to_dict() for source in left_out]
    failures += [failure.to_dict() for failure in result.failures]
    for failure in result.failures:
        click.echo(printable(f"Left out: {failure.source}: {failure.reason}"), err=True)
    if form == "json":
        print_json(
            {
                "reference": output,
                "levels": [asdict(level) for level in levels],
                "failures": failures,
            }
        )
    elif form == "quiet":
        click.echo(output)
    else:
        _print_levels(levels, output)
    return PARTLY_FAILED if failures else DONE


def _print_levels(levels: tuple[ReferenceLevel, ...], output: Path) -> None:
    rows = [
        (
            level.module_type,
            level.side,
            f"{level.ranks[0]}, {level.ranks[1]}",
            level.pairs,
            level.tasks,
            *(overlap_number(value) for value in (level.median, level.maximum)),
            "" if level.is_usable else "not used",
        )
        for level in levels
    ]
    print_table(
        "T of unrelated pairs",
        ("module type", "side", "ranks", "pairs", "tasks", "median", "max", ""),
        rows,
    )
    click.echo()
    if not all(level.is_usable for level in levels):
        print_text("Levels of fewer than 10 pairs are stored, but not used.")
    print_facts([("written", output)])
