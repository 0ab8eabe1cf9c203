"""``lora-analysis heatmap``: the LoRA paper's Figure 3 from two adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.options import (
    OutputPath,
    VerbCommand,
    fine_tune_base_option,
    force_option,
    label_option,
    labeled_pair,
    modules_option,
    output_options,
    prefix_option,
    progress_bar,
    task_and_seed_options,
)
from lora_analysis.cli.reading import Reading, reading_options
from lora_analysis.cli.show import print_json
from lora_analysis.progress import Progress
from lora_analysis.text import printable

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter, Update


def _check_colormap(_context: Any, _parameter: Any, name: str | None) -> str | None:
    if name is not None:
        from lora_analysis.errors import InputError
        from lora_analysis.plots.heatmap import colormap

        try:
            colormap(name)
        except InputError as error:
            raise click.BadParameter(str(error)) from error
    return name


def _parse_vmax(_context: Any, _parameter: Any, text: str | None) -> float | str | None:
    if text is None or text == "auto":
        return text
    try:
        vmax = float(text)
    except ValueError:
        vmax = math.nan
    if not 0 < vmax < math.inf:
        message = f"{text!r} is neither a positive number nor auto."
        raise click.BadParameter(message)
    return vmax


@click.command(name="heatmap", cls=VerbCommand)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "-o",
    "--output",
    type=OutputPath(dir_okay=False, path_type=Path),
    required=True,
    help="Figure to write: .svg, .png or .pdf.",
)
@force_option
@click.option(
    "--side",
    type=click.Choice(["input", "output"]),
    help="Side: left (output) or right (input) singular vectors. By default output, with --of A "
    "input.",
)
@click.option(
    "--of",
    type=click.Choice(["delta", "A", "B"]),
    default="delta",
    show_default=True,
    help="Singular vectors of ΔW, A or B. The LoRA paper plots those of A, input side.",
)
@fine_tune_base_option
@modules_option
@click.option("--title", help="Heading of the figure. By default the adapters, side and vectors.")
@click.option(
    "--width",
    type=click.FloatRange(1, 40),
    default=7.0,
    show_default=True,
    help="Width in inches: 3.3 for one column of a paper, 7 for two, 10 to 13 for a slide. Text "
    "grows with it.",
)
@click.option(
    "--dpi",
    type=click.IntRange(20, 2400),
    default=200,
    show_default=True,
    help="Resolution of PNG, and of the heat-maps inside SVG and PDF.",
)
@click.option(
    "--cmap",
    callback=_check_colormap,
    help="Colormap of φ, by matplotlib's name. [default: viridis]",
)
@click.option(
    "--vmax",
    metavar="FLOAT|auto",
    callback=_parse_vmax,
    help="φ of the last color. By default 1, so that figures can be compared; auto: the largest "
    "value, and the color bar says so.",
)
@prefix_option
@label_option
@task_and_seed_options
@reading_options
@output_options("the path of the figure")
def command(
    a: str,
    b: str,
    *,
    output: Path,
    force: bool,
    side: Any,
    of: Any,
    base: str | None,  # noqa: ARG001 - for reading
    modules: str | None,
    title: str | None,
    width: float,
    dpi: int,
    cmap: str | None,
    vmax: Any,
    prefixes: tuple[str, ...],
    label: str | None,
    tasks: tuple[str, ...],
    seeds: tuple[int, ...],
    reading: Reading,
    form: str,
) -> None:
    """Draw φ(i, j) of adapters A and B: full grid, corner, and excess over random.

    As in the LoRA paper, one middle layer of the first two module types is drawn; select others
    with --module.
    """
    from lora_analysis.blocks import short_names
    from lora_analysis.formats import unique_labels
    from lora_analysis.names import parse_prefixes
    from lora_analysis.pairwise import MATCHING_CODES, align_adapters
    from lora_analysis.plots import figure_ranks, save_figure
    from lora_analysis.similarity import compared_directions, subspace_similarity
    from lora_analysis.spectra import default_side
    from lora_analysis.storage.outputs import check_output_file, output_file
    from lora_analysis.studies import relation, with_label_facts

    side = side or default_side(of)
    kind = output.suffix.lstrip(".") or "svg"
    target = output.with_suffix(f".{kind}")
    check_output_file(target, force=force)
    adapters = labeled_pair([reading.read(source) for source in (a, b)], label, tasks, seeds)
    if label is None:
        adapters = with_label_facts(adapters, None)
    first, second = align_adapters(unique_labels(adapters), prefix=parse_prefixes(prefixes))
    with progress_bar(form) as progress:
        seen: dict[str, tuple[Update, Update]] = {}
        chosen = _choose_modules(first, second, modules, progress, seen)
        titles = short_names([name for name in first if name in second])
        grids = {
            titles[name]: subspace_similarity(
                *updates, side=side, of=of, k=compared_directions(*updates)
            )
            for name, updates in chosen.items()
        }
        inputs = [*first.provenance.inputs, *second.provenance.inputs]
        with output_file(target, inputs=inputs, force=force):
            figure = figure_ranks(grids, title=title, width=width, cmap=cmap, vmax=vmax)
            written = save_figure(figure, output.with_suffix(""), [kind], dpi=dpi)[0]
    findings = _findings(first, second, seen)
    if form == "json":
        left_out = [
            {"module": name, "reason": _reason_not_drawn(*updates)}
            for name, updates in seen.items()
            if name not in chosen
        ]
        print_json(
            {
                "figure": written,
                "modules": list(chosen),
                "side": side,
                "of": of,
                "adapters": [_adapter_facts(adapter) for adapter in (first, second)],
                "relation": relation(first, second),
                "left_out": left_out,
                "findings": findings,
            }
        )
    else:
        for finding in findings:
            if finding["severity"] == "damage" or finding["code"] in MATCHING_CODES:
                click.echo(printable(f"{finding['adapter']}: {finding['text']}"), err=True)
        click.echo(written)


def _adapter_facts(adapter: Adapter) -> dict[str, Any]:
    source = adapter.provenance
    facts = {name: getattr(source, name) for name in ("task", "rank", "seed", "step", "base_model")}
    return {"adapter": adapter.label, **facts}


def _choose_modules(
    a: Adapter,
    b: Adapter,
    pattern: str | None,
    progress: Progress,
    seen: dict[str, tuple[Update, Update]],
) -> dict[str, tuple[Update, Update]]:
    """Return the modules to draw; updates that are read on the way are added to ``seen``."""
    from lora_analysis.blocks import choose_names
    from lora_analysis.errors import InputError
    from lora_analysis.report.representatives import representative_modules

    common = [name for name in a if name in b]
    left = choose_names(common, pattern)
    if common and not left:
        message = (
            f"No common module matches '{pattern}'. There are {len(common)}: {_list_some(common)}."
        )
        raise InputError(message)
    while left:
        chosen = representative_modules(left)
        for name in chosen:
            if name not in seen:
                seen[name] = (a[name], b[name])
            progress("modules", len(seen), len(common))
        unusable = [name for name in chosen if _reason_not_drawn(*seen[name])]
        if not unusable:
            return {name: seen[name] for name in chosen}
        left = [name for name in left if name not in unusable]
    message = f"{a.label} and {b.label} have no trained module in common to draw."
    if not common:
        message += (
            f" {a.label} has {_list_some(list(a))}; {b.label} has {_list_some(list(b))}. If they "
            "are the same modules, pass --prefix OLD=NEW."
        )
    raise InputError(message)


def _reason_not_drawn(a: Update, b: Update) -> str:
    """Return the reason two updates cannot be drawn; empty if they can."""
    from lora_analysis.adapter import DenseUpdate
    from lora_analysis.spectra import spectrum

    if a.shape != b.shape:
        return f"the shapes differ: {a.shape} and {b.shape}"
    untrained = [
        update.label
        for update in (a, b)
        if (
            not update.delta.any()
            if isinstance(update, DenseUpdate)
            else spectrum(update, vectors=False).untrained
        )
    ]
    return f"ΔW is zero in {' and '.join(untrained)}" if untrained else ""


def _findings(
    a: Adapter, b: Adapter, seen: dict[str, tuple[Update, Update]]
) -> list[dict[str, Any]]:
    """Return the findings about the two files and the modules that were read."""
    from lora_analysis.formats.sanity_checks import check_updates

    pairs = zip(*seen.values(), strict=True)
    return [
        {"adapter": adapter.label, **finding.to_dict()}
        for adapter, updates in zip((a, b), pairs, strict=True)
        for finding in (
            *adapter.provenance.findings,
            *check_updates(updates, adapter.provenance.findings),
        )
    ]


def _list_some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
