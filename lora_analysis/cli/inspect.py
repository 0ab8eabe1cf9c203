"""``lora-analysis inspect``: what is in an adapter, read with numpy alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.options import modules_option, output_options, reading_options
from lora_analysis.cli.show import decimals, print_facts, print_json, print_table, sparkline

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter
    from lora_analysis.spectra import Spectrum

# More modules than this are summed up by type unless --all asks for each.
MODULES_SHOWN = 48


@click.command(name="inspect")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--all", "every", is_flag=True, help="Show every module, however many.")
@modules_option
@reading_options
@output_options
def command(
    sources: tuple[str, ...],
    *,
    every: bool,
    modules: str | None,
    pair: Any,
    scale: float | None,
    alpha: float | None,
    form: str,
) -> int:
    """Say what is in each SOURCE: format, modules, ranks, where the scale came from, spectrum.

    A folder that holds several adapters is listed, one line each.
    """
    from lora_analysis.errors import InputError
    from lora_analysis.formats import find_adapters, read_adapter

    documents, failures = [], []
    for source in sources:
        try:
            adapters = [
                read_adapter(one, pair=pair, scale=scale, alpha=alpha)
                for one in find_adapters(source, pair=pair)
            ]
            several = len(adapters) > 1 or len(sources) > 1
            documents += [_describe(one, modules, brief=several) for one in adapters]
        except InputError as error:
            if len(sources) == 1:
                raise
            failures.append({"source": source, "reason": str(error)})
    _print(documents, failures, form, every=every)
    if failures:
        return 4 if documents else 3
    return 0


def _spectra(adapter: Adapter, pattern: str | None) -> Iterator[Spectrum]:
    from lora_analysis.errors import InputError
    from lora_analysis.patterns import matches_target
    from lora_analysis.spectra import spectrum

    names = [name for name in adapter if pattern is None or matches_target(name, pattern)]
    if not names:
        message = (
            f"No module of {adapter.label} matches '{pattern}'. It has {len(adapter)} modules, "
            f"for example '{next(iter(adapter), '')}'."
        )
        raise InputError(message)
    for name in names:
        yield spectrum(adapter[name])


def _module_facts(adapter: Adapter, value: Spectrum) -> dict[str, Any]:
    from lora_analysis.patterns import module_type

    update = adapter[value.name]
    return {
        "module": value.name,
        "module_type": module_type(value.name),
        "shape": list(value.shape),
        "rank": value.rank,
        "numerical_rank": value.numerical_rank,
        "untrained": value.untrained,
        "scale": getattr(update, "scale", None),
        "scale_origin": adapter.provenance.scale_origin.get(value.name, "unknown"),
        "alpha": getattr(update, "alpha", None),
        "stored_dtype": value.stored_dtype,
        "in_units_of_scale": value.in_units_of_scale,
        "norm": value.norm,
        "effective_rank": value.effective_rank,
        "stable_rank": value.stable_rank,
        "energy_rank_90": value.energy_rank(0.9),
        "singular_values": value.S,
    }


def _describe(adapter: Adapter, pattern: str | None, *, brief: bool) -> dict[str, Any]:
    source = adapter.provenance
    facts = [_module_facts(adapter, value) for value in _spectra(adapter, pattern)]
    return {
        "label": adapter.label,
        "path": source.path,
        "format": source.format,
        "base_model": source.base_model,
        "task": source.task,
        "seed": source.seed,
        "brief": brief,
        "norm": sum(one["norm"] ** 2 for one in facts) ** 0.5,
        "scale_known": not any(one["in_units_of_scale"] for one in facts),
        "untrained_modules": sum(one["untrained"] for one in facts),
        "saved_modules": sorted(adapter.saved_modules),
        "findings": list(source.findings),
        "modules": facts,
    }


def _counted(values: list[Any]) -> str:
    """Return "8" where all agree, else "8 (20), 16 (4)"."""
    counts = Counter(values)
    if len(counts) == 1:
        return str(values[0])
    return ", ".join(f"{value} ({count})" for value, count in counts.most_common())


def _scales(facts: list[dict[str, Any]]) -> str:
    words = [
        "unknown"
        if one["scale"] is None
        else f"{decimals(one['scale'])} from {one['scale_origin']}"
        for one in facts
    ]
    return _counted(words)


def _print(
    documents: list[dict[str, Any]], failures: list[dict[str, str]], form: str, *, every: bool
) -> None:
    for one in failures:
        click.echo(f"{one['source']}: {one['reason']}", err=True)
    if form == "json":
        print_json({"adapters": documents, "failures": failures})
    elif form == "quiet":
        for one in documents:
            click.echo(one["label"])
    elif len(documents) == 1 and not documents[0]["brief"]:
        _print_one(documents[0], every=every)
    else:
        _print_several(documents)


def _print_several(documents: list[dict[str, Any]]) -> None:
    rows = [
        (
            one["label"],
            one["format"],
            len(one["modules"]),
            _counted([m["rank"] for m in one["modules"]]),
            _scales(one["modules"]),
            decimals(one["norm"]),
            one["untrained_modules"] or "",
        )
        for one in documents
    ]
    columns = ("adapter", "format", "modules", "rank", "scale", "‖ΔW‖", "untrained")
    print_table(f"{len(documents)} adapters", columns, rows, numbers_from=2)


def _print_one(one: dict[str, Any], *, every: bool) -> None:
    facts = one["modules"]
    untrained = one["untrained_modules"]
    state = "untrained: ΔW is zero in every module" if untrained == len(facts) else ""
    if 0 < untrained < len(facts):
        state = f"{untrained} of {len(facts)} modules untrained"
    lines: list[tuple[str, object]] = [
        ("adapter", one["label"]),
        ("path", one["path"]),
        ("format", one["format"]),
        ("base model", one["base_model"] or "not stated"),
        ("modules", f"{len(facts)} ({_counted([m['module_type'] for m in facts])})"),
        ("rank", _counted([m["rank"] for m in facts])),
        ("scale", _scales(facts)),
        ("stored as", _counted([m["stored_dtype"] for m in facts])),
        ("‖ΔW‖", decimals(one["norm"]) + ("" if one["scale_known"] else " × the unknown scale")),
    ]
    if one["saved_modules"]:
        lines.append(("also saved", ", ".join(one["saved_modules"])))
    if state:
        lines.append(("state", state))
    lines += [("note", finding) for finding in one["findings"]]
    print_facts(lines)
    click.echo()
    by_type = len(facts) > MODULES_SHOWN and not every
    (_print_types if by_type else _print_modules)(facts)


_COLUMNS = ("rank", "numerical", "effective", "stable", "90 %", "‖ΔW‖", "σ")


def _cells(fact: dict[str, Any]) -> tuple[object, ...]:
    return (
        fact["rank"],
        fact["numerical_rank"],
        f"{fact['effective_rank']:.1f}",
        f"{fact['stable_rank']:.2f}",
        fact["energy_rank_90"],
        decimals(fact["norm"]),
        "untrained" if fact["untrained"] else sparkline(fact["singular_values"], 10),
    )


def _print_modules(facts: list[dict[str, Any]]) -> None:
    print_table("", ("module", *_COLUMNS), [(one["module"], *_cells(one)) for one in facts])


def _print_types(facts: list[dict[str, Any]]) -> None:
    """Print the median over layers for each type of module."""
    import numpy as np

    rows = []
    for kind in dict.fromkeys(one["module_type"] for one in facts):
        own = [one for one in facts if one["module_type"] == kind]
        keys = ("numerical_rank", "effective_rank", "stable_rank", "energy_rank_90", "norm")
        medians = [decimals(float(np.median([one[key] for one in own]))) for key in keys]
        rows.append((f"{kind} ({len(own)})", _counted([one["rank"] for one in own]), *medians))
    print_table("median over layers (every module: --all)", ("modules", *_COLUMNS[:-1]), rows)
