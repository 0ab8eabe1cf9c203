"""``lora-analysis reproduce``: the LoRA paper's figures from the demo's adapters."""

from __future__ import annotations

from pathlib import Path

import click

from lora_analysis.cli.options import (
    VerbCommand,
    demo_option,
    device_option,
    force_option,
    output_options,
    progress_bar,
)
from lora_analysis.cli.show import print_json, study_facts


@click.command(name="reproduce", cls=VerbCommand)
@demo_option
@device_option
@force_option
@output_options("the path of the page")
def command(output: Path, *, device: str, force: bool, form: str) -> None:
    """Draw the figures of the LoRA paper's section 7 and appendix H, its values in the captions.

    Figures 3, 4, 6, 7 and 8 in the paper's panel layout as SVG, PNG and PDF, Tables 6 and 7, and
    one page with all of them.
    """
    from lora_analysis.reproduction import make_reproduction

    with progress_bar(form) as progress:
        result, path = make_reproduction(output, device=device, progress=progress, force=force)
    if form == "json":
        print_json({"page": path, **study_facts(result)})
    else:
        click.echo(path)
