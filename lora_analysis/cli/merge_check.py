"""``lora-analysis merge-check``: is an adapter in a merged model, or what would a merge keep."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lora_analysis.cli.options import (
    CHECK_FAILED,
    DONE,
    INCONCLUSIVE,
    MODULES_SHOWN,
    PARTLY_FAILED,
    VerbCommand,
    exit_code,
    modules_option,
    output_options,
    progress_bar,
    transposed_option,
)
from lora_analysis.cli.reading import Reading, reading_options
from lora_analysis.cli.show import decimals, print_finding, print_json, print_table, print_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_analysis.merging import MergeCheck, MergeForecast

_TYPES = ("float32", "float16", "bfloat16")


@click.command(name="merge-check", cls=VerbCommand)
@click.argument("source", metavar="ADAPTER")
@click.option("--base", required=True, help="Base weights that the adapter was trained on.")
@click.option("--merged", help="The merged model. Without it, what a merge would keep is computed.")
@click.option(
    "--dtype",
    type=click.Choice(_TYPES),
    help="Type of the merged weights, for the forecast.  [default: the base's]",
)
@click.option("--all", "every", is_flag=True, help="Show every module.")
@modules_option
@transposed_option
@reading_options
@output_options("the conclusion; without --merged the least share of ΔW that a module keeps")
def command(
    source: str,
    *,
    base: str,
    merged: str | None,
    dtype: str | None,
    every: bool,
    modules: str | None,
    transposed: bool | None,
    reading: Reading,
    form: str,
) -> int:
    """Check whether ADAPTER is in a merged model, at what strength, and what else differs.

    Each merged weight is compared with every value that a correct merge could produce, number by
    number; a weight that does not fit is compared with the results of known mistakes. Exits with
    0 if the adapter is applied, 5 if it is not or something else differs, and 6 if the numbers
    cannot tell. Without --merged, computes what a merge into a type would keep of ΔW.
    """
    from lora_analysis.merging import merge_check, merge_forecast

    if merged is not None and dtype is not None:
        message = "--dtype belongs to the forecast; the type of --merged is that of its weights."
        raise click.UsageError(message)
    adapter = reading.read(source)
    with progress_bar(form) as progress:
        if merged is None:
            forecasts = merge_forecast(
                adapter, reading.open_base(base), dtype=dtype, transposed=transposed,
                modules=modules, progress=progress,
            )  # fmt: skip
            _print_forecast(adapter.label, forecasts, form, every=every)
            return DONE
        result = merge_check(
            adapter, reading.open_base(base), reading.open_base(merged), transposed=transposed,
            modules=modules, progress=progress,
        )  # fmt: skip
    _print_check(result, form, every=every)
    codes = [PARTLY_FAILED] if result.is_partial else []
    if result.is_failed:
        codes.append(CHECK_FAILED)
    elif result.is_inconclusive:
        codes.append(INCONCLUSIVE)
    return exit_code(codes)


def _print_check(result: MergeCheck, form: str, *, every: bool) -> None:
    from lora_analysis.merging.model_check import module_row

    rows = [module_row(module) for module in result.modules]
    if form == "json":
        print_json(
            {
                "adapter": result.adapter,
                "base": result.base,
                "merged": result.merged,
                "conclusion": str(result.conclusion),
                "strength": result.strength(),
                "modules": rows,
                "tensors": [asdict(tensor) for tensor in result.tensors],
                "equal_tensors": result.equal,
                "unmatched": [{"module": m, "reason": r} for m, r in result.unmatched.items()],
                "findings": [finding.to_dict() for finding in result.findings()],
            }
        )
        return
    if form == "quiet":
        click.echo(str(result.conclusion))
        return
    counts = ", ".join(f"{count} {name}" for name, count in result.counts().items())
    print_text(f"{result.adapter} in {result.merged}: {result.conclusion} ({counts}).")
    click.echo()
    for finding in result.findings():
        print_finding(finding.severity, finding.text)
    if not every and len(rows) > MODULES_SHOWN:
        rows = [row for row in rows if row["conclusion"] != "applied"][:MODULES_SHOWN]
    if rows:
        click.echo()
        print_table(
            "",
            ("module", "conclusion", "strength", "‖ΔW‖/‖W‖"),
            [
                (
                    row["module"],
                    row["conclusion"],
                    _interval(row["strength_low"], row["strength_high"]),
                    decimals(row["change"]),
                )
                for row in rows
            ],
            numbers_from=2,
        )


def _interval(low: float, high: float) -> str:
    """Return an interval as its middle and half of its width."""
    if not abs(low + high) < float("inf"):
        return "–"
    return f"{(low + high) / 2:.5g} ± {(high - low) / 2:.1g}"


def _print_forecast(
    label: str, forecasts: Sequence[MergeForecast], form: str, *, every: bool
) -> None:
    from lora_analysis.merging import forecast_findings

    findings = list(forecast_findings(label, forecasts))
    if form == "json":
        print_json(
            {
                "adapter": label,
                "modules": [asdict(forecast) for forecast in forecasts],
                "findings": [finding.to_dict() for finding in findings],
            }
        )
        return
    if form == "quiet":
        click.echo(decimals(min(forecast.retained for forecast in forecasts)))
        return
    for finding in findings:
        print_finding(finding.severity, finding.text)
    rows = forecasts
    if not every and len(forecasts) > MODULES_SHOWN:
        rows = sorted(forecasts, key=lambda forecast: forecast.retained)[:MODULES_SHOWN]
    click.echo()
    print_table(
        "" if len(rows) == len(forecasts) else f"the {len(rows)} modules that keep least",
        ("module", "type", "kept", "unchanged", "noise", "rounding", "‖ΔW‖/‖W‖"),
        [
            (
                forecast.module, forecast.dtype, f"{forecast.retained:.0%}",
                f"{forecast.unchanged:.0%}", decimals(forecast.noise),
                decimals(forecast.rounding), decimals(forecast.change),
            )
            for forecast in rows
        ],
        numbers_from=2,
    )  # fmt: skip
    click.echo()
    print_text(
        "kept: component of what a merge adds along ΔW. unchanged: entries that stay as they are. "
        "noise: what is added besides, over ‖ΔW‖. rounding: what storing W in this type changes by "
        "itself, over ‖ΔW‖."
    )
