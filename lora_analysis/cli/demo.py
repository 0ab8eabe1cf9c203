"""``lora-analysis demo``: train, analyze and report on bundled data."""

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


@click.command(name="demo", cls=VerbCommand)
@demo_option
@device_option
@force_option
@click.option(
    "--text",
    is_flag=True,
    help="Use a pretrained sentence encoder and text of installed packages (extra demo-text).",
)
@output_options("the path of the report")
def command(output: Path, *, device: str, force: bool, text: bool, form: str) -> None:
    """Train 13 adapters on handwritten digits, analyze them and write the report.

    Rank 8 on three tasks with three seeds, ranks 4 and 64 on one task with two seeds; two to
    three minutes on two CPU cores. With --text, 10 adapters of a pretrained language model, about
    five minutes. An interrupted demo continues where it stopped.
    """
    from lora_analysis.demo import make_demo

    with progress_bar(form) as progress:
        result, path = make_demo(output, text=text, device=device, progress=progress, force=force)
    if form == "json":
        print_json({"report": path, **study_facts(result)})
    else:
        click.echo(path)
