"""``lora-analysis survey``: section 7 of the LoRA paper over the adapters of many authors."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from lora_analysis.cli.options import DONE, PARTLY_FAILED, VerbCommand, output_options, progress_bar
from lora_analysis.cli.show import print_json, print_table, print_text, records
from lora_analysis.text import overlap_number, printable

_OVERLAPS: Final = ("phi_1_1_output", "phi_r_r_output", "phi_r_r_input", "chance_r_r_output")


@click.command(name="survey", cls=VerbCommand)
@click.argument("authors", type=click.Path(dir_okay=False, path_type=Path), metavar="LIST")
@output_options("one line per author and base: name, distinct trainings, pairs")
def command(authors: Path, *, form: str) -> int:
    """Show how many directions the adapters of many authors use, and how alike they are.

    LIST is a TOML file with a table per author: [name], sources = ["folder", "file",
    "hf://owner/name"], and read options by their names on the command line (pair, scale, ...).
    Paths are relative to its folder.
    """
    from lora_analysis.survey import survey_authors

    with progress_bar(form) as progress:
        result = survey_authors(authors, progress=progress)
    for failure in result.failures:
        click.echo(printable(f"Left out: {failure}"), err=True)
    if form == "json":
        tables = {name: records(getattr(result, name)) for name in ("authors", "ranks", "pairs")}
        failures = [failure.to_dict() for failure in result.failures]
        print_json({**tables, "limits": result.limits(), "failures": failures})
    elif form == "quiet":
        for row in result.authors.to_dict("records"):
            click.echo(printable(f"{row['author']} {row['trainings']} {row['pairs']}"))
    else:
        ranks = [
            (
                row["author"], row["base"].rpartition("/")[2], row["trainings"], row["modules"],
                row["rank"], f"{row['stable_rank']:.1f}", f"{row['energy_rank_90']:g}",
            )
            for row in result.ranks.to_dict("records")
        ]  # fmt: skip
        columns = ("author", "base", "trainings", "modules", "r", "stable rank", "90 % energy")
        print_table(
            "How much of their rank they use: medians over modules", columns, ranks, numbers_from=2
        )
        compared = result.authors[result.authors["pairs"] > 0]
        pairs = [
            (
                row["author"], row["pairs"], row["shared_init"],
                *(overlap_number(row[name]) for name in _OVERLAPS),
            )
            for row in compared.to_dict("records")
        ]  # fmt: skip
        if pairs:
            click.echo()
            columns = ("author", "pairs", "same A", "φ(1, 1)", "φ(r, r)", "input φ(r, r)", "random")
            title = "How alike two trainings are: medians over pairs, output side"
            print_table(title, columns, pairs)
        click.echo()
        print_text(result.limits())
    return PARTLY_FAILED if result.failures else DONE
