"""``lora-analysis heatmap``: the paper's Figure 3 from two adapters, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_analysis.cli.options import modules_option, output_options, read_one, reading_options
from lora_analysis.cli.show import print_json


@click.command(name="heatmap")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Picture to write; .svg, .png or .pdf.",
)
@click.option(
    "--side",
    type=click.Choice(["input", "output"]),
    default="input",
    show_default=True,
    help="Right (input) or left (output) singular vectors.",
)
@click.option(
    "--factor",
    type=click.Choice(["delta", "A", "B"]),
    default="delta",
    show_default=True,
    help="Whose singular vectors; A on the input side is what the LoRA paper plots.",
)
@modules_option
@reading_options
@output_options
def command(
    a: str,
    b: str,
    *,
    output: Path,
    side: Any,
    factor: Any,
    modules: str | None,
    pair: Any,
    scale: float | None,
    alpha: float | None,
    form: str,
) -> None:
    """Draw φ(i, j) of adapters A and B: full grid, corner, and φ above chance.

    Without --module one middle layer of the first two types of module is drawn, as in the paper.
    """
    from lora_analysis.errors import InputError
    from lora_analysis.plots import figure_ranks, save_figure
    from lora_analysis.report.selection import common_modules, short_name, telling_modules
    from lora_analysis.studies import study

    adapters = [read_one(one, pair=pair, scale=scale, alpha=alpha) for one in (a, b)]
    result = study(adapters, modules=modules)
    first, second = result.adapters
    chosen = telling_modules(common_modules(result, first, second))
    if not chosen:
        message = f"{first} and {second} have no trained module in common to draw."
        raise InputError(message)
    grids = {
        short_name(name): result.grid(first, second, name, side=side, factor=factor)
        for name in chosen
    }
    kind = output.suffix.lstrip(".") or "svg"
    written = save_figure(figure_ranks(grids), output.with_suffix(""), [kind])[0]
    if form == "json":
        print_json({"figure": written, "modules": chosen, "side": side, "factor": factor})
    else:
        click.echo(written)
