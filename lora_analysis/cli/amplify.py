"""``lora-analysis amplify``: how an adapter amplifies its base weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from lora_analysis.cli.options import (
    DONE,
    FINE_TUNES,
    MODULES_SHOWN,
    PARTLY_FAILED,
    VerbCommand,
    modules_option,
    output_options,
    prefix_option,
    progress_bar,
    spectrum_option,
    transposed_option,
)
from lora_analysis.cli.reading import Reading, reading_options
from lora_analysis.cli.show import (
    decimals,
    print_finding,
    print_json,
    print_table,
    print_text,
    records,
)
from lora_analysis.text import plural, printable

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.adapter import Adapter
    from lora_analysis.studies import Study


@click.command(name="amplify", cls=VerbCommand)
@click.argument("source", metavar="ADAPTER")
@click.option(
    "--base",
    required=True,
    help=f"Base weights: a safetensors or GGUF file, or a model folder; {FINE_TUNES}",
)
@transposed_option
@click.option(
    "--draws", type=click.IntRange(0), default=16, show_default=True, help="Number of random draws."
)
@spectrum_option
@click.option(
    "--all",
    "every",
    is_flag=True,
    help="Show every module of an image model, not medians by block.",
)
@modules_option
@prefix_option
@reading_options
@output_options("the median amplification factor")
def command(
    source: str,
    *,
    every: bool,
    base: str,
    transposed: bool | None,
    draws: int,
    spectrum: bool,
    modules: str | None,
    prefixes: tuple[str, ...],
    reading: Reading,
    form: str,
) -> int:
    """Measure how ΔW amplifies directions of the base weight, per module (LoRA paper, Table 7).

    The amplification factor ‖ΔW‖/‖UᵀWV‖ proves little by itself: compare it with the factor of
    random directions of the same size. Enrichment is the ratio of the two. Before you call it
    specific to the adapter, compare it with the enrichment of random directions through W.
    """
    from lora_analysis.adapter import is_fine_tune
    from lora_analysis.blocks import locate_module
    from lora_analysis.conclusions import findings
    from lora_analysis.finding import FILE_CODES
    from lora_analysis.studies import study

    adapter = reading.read(source)
    if spectrum:
        _announce_duration(adapter)
    with progress_bar(form) as progress:
        result = study(
            [adapter],
            base=reading.open_base(base),
            transposed=transposed,
            modules=modules,
            prefix=prefixes,
            draws=draws,
            weight_spectra=spectrum,
            progress=progress,
        )
    table = _amplifications(result, adapter.label)
    full = table[table["at_rank"]]
    codes = FILE_CODES.keys() | _BASE_CODES
    shown_findings = [finding for finding in findings(result) if finding.code in codes]
    if form == "json":
        changes = {"changes": records(result.changes)} if spectrum else {}
        print_json(
            {
                "adapter": adapter.label,
                "base": base,
                "modules": records(
                    table.assign(block=[locate_module(name).block for name in table["module"]])
                ),
            }
            | _medians(full)
            | changes
            | {
                "left_out": _list_left_out(result),
                "findings": [finding.to_dict() for finding in shown_findings],
            }
            | {"base_findings": [f.to_dict() for f in result.base_findings()]}
        )
    elif form == "quiet":
        click.echo(decimals(float(full["amplification_factor"].median())))
    else:
        for finding in shown_findings:
            print_finding(finding.severity, finding.text)
        if shown_findings:
            click.echo()
        _print(adapter.label, full, every=every, tuned=is_fine_tune(adapter))
        if spectrum:
            _print_changes(adapter.label, result.changes, every=every)
    return PARTLY_FAILED if result.unmatched else DONE


def _list_left_out(result: Study) -> list[dict[str, str]]:
    """Return the modules that are not compared with the base, with the reason."""
    from lora_analysis.adapter import is_fine_tune

    measured = set(result.amplifications["module"])
    tuned = any(map(is_fine_tune, result.adapters.values()))
    unchanged = "unchanged" if tuned else "untrained"
    missing = [
        {"module": module, "code": "no-base-weight", "reason": reason}
        for module, reason in result.unmatched.items()
    ]
    for row in result.spectra.itertuples():
        if row.module in measured or row.module in result.unmatched:
            continue
        untrained = not row.numerical_rank
        code, reason = (
            (unchanged, "ΔW is zero") if untrained else ("unknown-scale", "its scale is unknown")
        )
        missing.append({"module": row.module, "code": code, "reason": reason})
    return missing


def _announce_duration(adapter: Adapter) -> None:
    """Announce on stderr how long W's full spectra take, if more than some seconds."""
    from lora_analysis.execution import available_workers
    from lora_analysis.linalg import gram_seconds
    from lora_analysis.storage.cache import cache_folder

    seconds = sum(gram_seconds(update.shape) for update in adapter.values()) / available_workers()
    if seconds > 5:
        click.echo(
            f"Full spectra of W take about {seconds / 60:.0f} min the first time; they are cached "
            f"in {cache_folder()}.",
            err=True,
        )


# Modules without a base weight whose reasons are printed; the others are counted.
_REASONS_SHOWN: Final = 8


def _amplifications(result: Study, label: str) -> pd.DataFrame:
    """Return the table; raise InputError with the reason if it is empty."""
    from lora_analysis.errors import InputError

    reasons = list(result.unmatched.values())
    for reason in reasons[:_REASONS_SHOWN]:
        click.echo(printable(f"Left out: {reason}"), err=True)
    if len(reasons) > _REASONS_SHOWN:
        more = plural(len(reasons) - _REASONS_SHOWN, "module")
        click.echo(f"Left out: {more} more; --format json has their reasons.", err=True)
    table = result.amplifications
    if not table.empty:
        return table
    unknown = bool(result.spectra["in_units_of_scale"].any())
    message = (
        f"The scale of {label} is not known, and the factor depends on it. Pass --scale or --alpha."
        if unknown
        else f"{label} is untrained: ΔW is zero in every module."
    )
    raise InputError(message)


def _medians(full: pd.DataFrame) -> dict[str, dict[str, float]]:
    columns = (
        "amplification_factor",
        "chance_factor",
        "enrichment",
        "enrichment_through_weight",
        "relative_norm",
    )
    return {"medians": {column: float(full[column].median()) for column in columns}}


# Findings of a study about the base weights that bear on the adapter's own numbers.
_BASE_CODES = ("different-base", "base-name-differs")
_NAMES = {
    "delta_norm": "‖ΔW‖",
    "weight_norm": "‖W‖",
    "projected": "ΔW's",
    "projected_weight": "W's",
    "projected_random": "random",
    "amplification_factor": "factor",
    "chance_factor": "random",
    "enrichment": "enrichment",
}


# What rounding leaves of ‖W‖ when it is taken along all directions there are.
_ALL_OF_IT = 1e-6


def _titled_rows(table: pd.DataFrame, *, every: bool) -> list[dict[str, Any]]:
    """Return the rows of a table with a title each: modules, or medians over an image's blocks."""
    from lora_analysis.blocks import group_modules, is_image, short_names

    modules = list(dict.fromkeys(table["module"]))
    if not is_image(modules):
        return records(table.assign(title=table["module"]))
    if every or len(modules) <= MODULES_SHOWN:
        return records(table.assign(title=table["module"].map(short_names(modules))))
    group_of = {
        name: f"{title} ({len(names)})"
        for title, names in group_modules(modules).items()
        for name in names
    }
    by = [table["module"].map(group_of).rename("title")]
    by += [table["side"]] if "side" in table else []
    return records(table.groupby(by, sort=False).median(numeric_only=True).reset_index())


def _print(label: str, full: pd.DataFrame, *, every: bool, tuned: bool) -> None:
    rows = _titled_rows(full, every=every)
    what = "" if len(rows) == len(full) else ", medians by block (every module: --all)"
    directions = "along its leading directions" if tuned else "at full rank"
    print_table(
        f"{label}: amplification {directions} (k = {_format_range(full['k'])}){what}",
        ("module" if not what else "block (modules)", *_NAMES.values()),
        [(row["title"], *(decimals(row[name]) for name in _NAMES)) for row in rows],
        footer=("median", *(decimals(full[name].median()) for name in _NAMES)),
    )
    click.echo()
    storages = sorted(set(full["storage"]) - {""})
    if storages:
        noise = full["noise"].median()
        moved = "an unknown part" if noise != noise else decimals(float(noise))  # noqa: PLR0124 - NaN
        print_text(
            f"W is quantized ({', '.join(storages)}): expected rounding error {moved} of ‖W‖, "
            "which alone gives an enrichment of that size."
        )
    print_text(
        "ΔW's, W's, random: ‖UᵀWV‖ with the top-k directions of each; random is the exact rms."
    )
    print_text(
        "factor = ‖ΔW‖ / ΔW's, followed by that of random directions, ‖ΔW‖ / random; enrichment = "
        "ΔW's / random."
    )
    through = float(full["enrichment_through_weight"].median())
    print_text(
        f"Control: random directions after one product with W have a median enrichment of "
        f"{decimals(through)}. The geometry of W gives that to anything that passes through it."
    )
    whole = int((full["projected"] / full["weight_norm"] > 1 - _ALL_OF_IT).sum())
    if whole:
        print_text(
            f"In {whole} of {len(full)} modules ΔW has as many directions as W: ΔW's is ‖W‖ "
            "and the enrichment is 1 by construction. --format json has every smaller k."
        )


_ENERGY = {
    "leading_energy": "leading",
    "trailing_energy": "trailing",
    "chance_energy": "random",
    "leading_p": "p",
    "off_principal": "off both",
    "chance_off_principal": "random",
}
_CHANGES = {
    "intruder_energy": "energy",
    "smallest_cosine": "cosine",
    "chance_cosine": "random",
    "largest_novelty": "novelty",
    "largest_drift": "drift",
    "direction_change": "direction",
}


def _print_changes(label: str, changes: pd.DataFrame, *, every: bool) -> None:
    from lora_analysis.chance import p_value_text

    if changes.empty:
        return
    k, span = (_format_range(changes[name]) for name in ("k", "span"))
    looked_at, random = int(changes["directions"].max()), changes["chance_novelty"].median()
    rows = _titled_rows(changes, every=every)
    click.echo()
    print_table(
        f"{label} in W's basis (k = {k})",
        ("module", "side", *_ENERGY.values()),
        [
            (
                row["title"],
                row["side"],
                *((p_value_text if x == "leading_p" else decimals)(row[x]) for x in _ENERGY),
            )
            for row in rows
        ],
    )
    click.echo()
    print_text(
        "leading, trailing: share of ‖ΔW‖² in W's first and last k directions, and off W's first k "
        "on both sides. p: probability that random directions reach the leading share; unrelated "
        "adapters may reach it too."
    )
    click.echo()
    print_table(
        f"The first {looked_at} singular directions of W + ΔW",
        ("module", "side", "intruders", *_CHANGES.values()),
        [
            (
                row["title"],
                row["side"],
                f"{row['intruders']:g}",
                *(decimals(row[x]) for x in _CHANGES),
            )
            for row in rows
        ],
    )
    click.echo()
    print_text(
        "intruders: directions whose cosine with each direction of W is below 0.5; energy = their "
        "share of the energy; cosine = smallest maximum cosine; random = maximum cosine of a "
        "random direction."
    )
    print_text(
        f"novelty = largest part outside W's first {span} directions (of a random direction "
        f"{decimals(random)}); an intruder without novelty only mixes them. drift = largest "
        "relative change of σ; direction = mean 1 − cos of W's rows (output) or columns (input)."
    )


def _format_range(values: pd.Series) -> str:
    """Return "8", or "4 to 8" where they differ."""
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"
