"""``lora-analysis inspect``: what is in an adapter, read with numpy alone."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.exit_codes import DONE, PARTLY_FAILED
from lora_analysis.cli.options import MODULES_SHOWN, modules_option, output_options, progress_bar
from lora_analysis.cli.reading import (
    LeftOut,
    Reading,
    ReadingCommand,
    reading_options,
    say_left_out,
)
from lora_analysis.cli.show import (
    decimals,
    print_facts,
    print_finding,
    print_json,
    print_table,
    sparkline,
)
from lora_analysis.finding import Finding
from lora_analysis.text import printable

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter

# Rank from which threads over modules pay.
_WORTH_THREADS = 32


@click.command(name="inspect", cls=ReadingCommand)
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
    reading: Reading,
    form: str,
) -> int:
    """Say what is in each SOURCE: format, modules, ranks, where the scale came from, spectrum.

    A folder that holds several adapters is listed, one line each.
    """
    from lora_analysis.errors import InputError

    documents: list[dict[str, Any]] = []
    left_out: list[LeftOut] = []
    with progress_bar(form) as progress:
        for adapter in reading.read_each(sources, left_out, progress):
            try:
                documents.append(_describe(adapter, modules))
            except InputError as error:
                left_out.append(LeftOut(adapter.label, error))
    say_left_out(left_out, some=bool(documents))
    if form == "json":
        print_json({"adapters": documents, "failures": [one.to_dict() for one in left_out]})
    elif form == "quiet":
        for one in documents:
            click.echo(printable(one["label"]))
    elif len(documents) + len(left_out) == 1:
        _print_one(documents[0], every=every)
    else:
        _print_several(documents)
    return PARTLY_FAILED if left_out else DONE


def _describe(adapter: Adapter, pattern: str | None) -> dict[str, Any]:
    from lora_analysis.execution import in_threads, keep_freed_memory
    from lora_analysis.formats.sanity_checks import sanity_findings

    keep_freed_memory()
    source = adapter.provenance
    # Factors of few columns take less time than two threads lose to each other.
    workers = 1 if source.rank is not None and source.rank < _WORTH_THREADS else None
    walk = in_threads(partial(_module_facts, adapter), _chosen(adapter, pattern), workers=workers)
    facts = list(walk)
    warnings = sanity_findings((one.pop("statistics") for one in facts), source.findings)
    findings = (*source.findings, *warnings, *_below_precision(facts))
    return {
        "label": adapter.label,
        "path": source.place,
        "revision": source.revision,
        "format": source.format,
        "base_model": source.base_model,
        "task": source.task,
        "seed": source.seed,
        "step": source.step,
        "norm": sum(one["norm"] ** 2 for one in facts) ** 0.5,
        "scale_known": not any(one["in_units_of_scale"] for one in facts),
        "untrained_modules": sum(one["untrained"] for one in facts),
        "saved_modules": sorted(adapter.saved_modules),
        "findings": [finding.to_dict() for finding in findings],
        "modules": facts,
    }


def _chosen(adapter: Adapter, pattern: str | None) -> list[str]:
    from lora_analysis.errors import InputError
    from lora_analysis.patterns import choose_names

    names = choose_names(adapter, pattern)
    if not names:
        message = (
            f"No module of {adapter.label} matches '{pattern}'. It has {len(adapter)} modules, "
            f"for example '{next(iter(adapter), '')}'."
        )
        raise InputError(message)
    return names


def _module_facts(adapter: Adapter, name: str) -> dict[str, Any]:
    """Read one module and return what is said of it."""
    from lora_analysis.formats.sanity_checks import module_statistics
    from lora_analysis.patterns import module_type
    from lora_analysis.spectra import spectrum

    update = adapter[name]
    value = spectrum(update, vectors=False)
    return {
        "module": value.name,
        "module_type": module_type(value.name),
        "shape": list(value.shape),
        "rank": value.rank,
        "numerical_rank": value.numerical_rank,
        "untrained": value.untrained,
        "scale": getattr(update, "scale", None),
        "scale_origin": adapter.provenance.scale_origin.get(name, "unknown"),
        "alpha": getattr(update, "alpha", None),
        "variant": getattr(update, "variant", ""),
        "stored_dtype": value.stored_dtype,
        "rounding_error": value.rounding_error,
        "in_units_of_scale": value.in_units_of_scale,
        "norm": value.norm,
        "effective_rank": value.effective_rank,
        "stable_rank": value.stable_rank,
        "energy_rank_90": value.energy_rank(0.9),
        "singular_values": value.S,
        "statistics": module_statistics(update, norm=value.norm),
    }


def _how_many(kinds: list[str]) -> str:
    """Return the number of modules, by type where a type has several."""
    return f"{len(kinds)} ({_counted(kinds)})" if len(set(kinds)) < len(kinds) else str(len(kinds))


def _counted(values: list[Any]) -> str:
    """Return "8" where all agree, else "8 (20), 16 (4)"."""
    counts = Counter(values)
    if len(counts) == 1:
        return str(values[0])
    return ", ".join(f"{value} ({count})" for value, count in counts.most_common())


def _scales(facts: list[dict[str, Any]]) -> str:
    return _counted([_scale(one) for one in facts])


def _scale(fact: dict[str, Any]) -> str:
    if fact["scale"] is None:
        return "unknown" if fact["in_units_of_scale"] else "1 (a dense update)"
    return f"{fact['scale']:.4g} from {fact['scale_origin']}"


def _below_precision(facts: list[dict[str, Any]]) -> list[Finding]:
    """Return the finding about modules whose small σ are those of the stored type's rounding."""
    coarse = [one for one in facts if one["rounding_error"] >= 1]
    if not coarse:
        return []
    worst = max(coarse, key=lambda one: one["rounding_error"])
    fields = {
        "count": len(coarse),
        "total": len(facts),
        "dtype": worst["stored_dtype"],
        "module": worst["module"],
        "ratio": worst["rounding_error"],
    }
    return [Finding("below-precision", fields)]


# What a run says of itself, shown where any says it.
_RUN = ("task", "seed", "step")


def _print_several(documents: list[dict[str, Any]]) -> None:
    known = [name for name in _RUN if any(one[name] is not None for one in documents)]
    columns = ["adapter", *known, "format", "modules", "rank", "scale", "‖ΔW‖"]
    rows = [
        [
            one["label"],
            *("" if one[name] is None else one[name] for name in known),
            one["format"],
            len(one["modules"]),
            _counted([m["rank"] for m in one["modules"]]),
            _scales(one["modules"]),
            decimals(one["norm"]),
        ]
        for one in documents
    ]
    if any(one["untrained_modules"] for one in documents):
        columns.append("untrained")
        for row, one in zip(rows, documents, strict=True):
            row.append(one["untrained_modules"] or "")
    title = "1 adapter" if len(documents) == 1 else f"{len(documents)} adapters"
    print_table(title, columns, rows, numbers_from=2 + len(known), cut_names=False)
    for one in documents:
        for finding in one["findings"]:
            if finding["severity"] == "damage":
                print_finding("damage", f"{one['label']}: {finding['text']}")


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
        *((name, one[name]) for name in _RUN if one[name] is not None),
        ("modules", _how_many([m["module_type"] for m in facts])),
        ("rank", _counted([m["rank"] for m in facts])),
        ("scale", _scales(facts)),
        ("stored as", _counted([m["stored_dtype"] for m in facts])),
        ("‖ΔW‖", decimals(one["norm"]) + ("" if one["scale_known"] else " × the unknown scale")),
    ]
    if one["saved_modules"]:
        lines.append(("also saved", ", ".join(one["saved_modules"])))
    if state:
        lines.append(("state", state))
    lines += [(_heading(finding), finding["text"]) for finding in one["findings"]]
    print_facts(lines)
    click.echo()
    by_type = len(facts) > MODULES_SHOWN and not every
    (_print_types if by_type else _print_modules)(facts)


def _heading(finding: dict[str, Any]) -> str:
    return "damage" if finding["severity"] == "damage" else "note"


_MEASURES = ("effective", "stable", "90 %", "‖ΔW‖")


def _cells(fact: dict[str, Any]) -> tuple[object, ...]:
    rank, used = fact["rank"], fact["numerical_rank"]
    return (
        rank if rank == used else f"{used} of {rank}",
        f"{fact['effective_rank']:.1f}",
        f"{fact['stable_rank']:.2f}",
        fact["energy_rank_90"],
        decimals(fact["norm"]),
        "untrained" if fact["untrained"] else sparkline(fact["singular_values"], 8),
    )


def _print_modules(facts: list[dict[str, Any]]) -> None:
    columns = ("module", "rank", *_MEASURES, "σ")
    print_table("", columns, [(one["module"], *_cells(one)) for one in facts])


def _print_types(facts: list[dict[str, Any]]) -> None:
    """Print the median over layers for each type of module."""
    import numpy as np

    rows = []
    for kind in dict.fromkeys(one["module_type"] for one in facts):
        own = [one for one in facts if one["module_type"] == kind]
        keys = ("numerical_rank", "effective_rank", "stable_rank", "energy_rank_90", "norm")
        medians = [decimals(float(np.median([one[key] for one in own]))) for key in keys]
        rows.append((f"{kind} ({len(own)})", _counted([one["rank"] for one in own]), *medians))
    columns = ("modules", "rank", "numerical", *_MEASURES)
    print_table("median over layers (every module: --all)", columns, rows)
