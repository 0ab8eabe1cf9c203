"""``lora-analysis reproduce``: the paper's figures from the demo's adapters."""

from __future__ import annotations

from pathlib import Path

import click

from lora_analysis.cli.options import output_options, progress_bar
from lora_analysis.cli.show import print_json


@click.command(name="reproduce")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("lora-analysis-demo"),
    show_default=True,
    help="Folder of a demo; its trained adapters (runs/) are used, and trained where missing.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda or mps; auto takes a GPU where there is one.",
)
@output_options
def command(output: Path, *, device: str, form: str) -> None:
    """Draw section 7 and appendix H of the LoRA paper, with its own values in the captions.

    Figures 3, 4, 6, 7 and 8 in the paper's panel layout as SVG, PNG and PDF, Tables 6 and 7, and
    one page with all of them.
    """
    from lora_analysis.reproduction import run_reproduction

    with progress_bar(form) as progress:
        path = run_reproduction(output, device=device, progress=progress)
    if form == "json":
        print_json({"page": path})
    else:
        click.echo(path)
