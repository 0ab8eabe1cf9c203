"""``lora-analysis inspect``: the contents of adapters, read with numpy alone."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.options import (
    DONE,
    MODULES_SHOWN,
    PARTLY_FAILED,
    VerbCommand,
    fine_tune_base_option,
    modules_option,
    output_options,
    progress_bar,
)
from lora_analysis.cli.reading import (
    Reading,
    print_left_out,
    reading_options,
)
from lora_analysis.cli.show import (
    decimals,
    print_facts,
    print_finding,
    print_json,
    print_table,
    sparkline,
)
from lora_analysis.finding import Failure, Finding
from lora_analysis.text import printable

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter

# Rank from which threads over modules are worth their cost.
_WORTH_THREADS = 32


@click.command(name="inspect", cls=VerbCommand)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--all", "every", is_flag=True, help="Show every module, however many.")
@fine_tune_base_option
@modules_option
@reading_options
@output_options("the labels of the adapters")
def command(
    sources: tuple[str, ...],
    *,
    every: bool,
    base: str | None,  # noqa: ARG001 - for reading
    modules: str | None,
    reading: Reading,
    form: str,
) -> int:
    """Show format, modules, ranks, scale (and where it was found) and singular values.

    A SOURCE that holds several adapters is listed, one line each.
    """
    from lora_analysis.errors import InputError

    documents: list[dict[str, Any]] = []
    left_out: list[Failure] = []
    with progress_bar(form) as progress:
        for adapter in reading.read_each(sources, left_out, progress):
            try:
                documents.append(_describe(adapter, modules))
            except InputError as error:
                left_out.append(Failure(adapter.label, str(error), error))
    print_left_out(left_out, some=bool(documents))
    if form == "json":
        print_json({"adapters": documents, "failures": [failure.to_dict() for failure in left_out]})
    elif form == "quiet":
        for document in documents:
            click.echo(printable(document["label"]))
    elif len(documents) + len(left_out) == 1:
        _print_adapter(documents[0], every=every)
    else:
        _print_list(documents)
    return PARTLY_FAILED if left_out else DONE


def _print_list(documents: list[dict[str, Any]]) -> None:
    """Print one line per adapter, then the findings about damage."""
    stated_facts = [name for name in _RUN if any(d[name] is not None for d in documents)]
    columns = ["adapter", *stated_facts, "format", "modules", "rank", "scale", "‖ΔW‖"]
    rows = [
        [
            document["label"],
            *("" if document[name] is None else document[name] for name in stated_facts),
            document["format"],
            len(document["modules"]),
            _count_values([m["rank"] for m in document["modules"]]),
            _describe_scales(document["modules"]),
            decimals(document["norm"]),
        ]
        for document in documents
    ]
    with_zeros = [document for document in documents if document["untrained_modules"]]
    if with_zeros:
        words = dict.fromkeys(_zero_word(document["modules"]) for document in with_zeros)
        columns.append(" or ".join(words))
        for row, document in zip(rows, documents, strict=True):
            row.append(document["untrained_modules"] or "")
    title = "1 adapter" if len(documents) == 1 else f"{len(documents)} adapters"
    print_table(title, columns, rows, numbers_from=2 + len(stated_facts), cut_names=False)
    for document in documents:
        for finding in document["findings"]:
            if finding["severity"] == "damage":
                print_finding("damage", f"{document['label']}: {finding['text']}")


def _describe(adapter: Adapter, pattern: str | None) -> dict[str, Any]:
    from lora_analysis.blocks import choose_names
    from lora_analysis.errors import InputError
    from lora_analysis.execution import in_threads, keep_freed_memory
    from lora_analysis.formats.sanity_checks import sanity_findings

    keep_freed_memory()
    source = adapter.provenance
    # For factors with few columns, threads cost more time than they save.
    workers = 1 if source.rank is not None and source.rank < _WORTH_THREADS else None
    names = choose_names(adapter, pattern)
    if not names:
        message = (
            f"No module of {adapter.label} matches '{pattern}'. It has {len(adapter)} modules, "
            f"for example '{next(iter(adapter), '')}'."
        )
        raise InputError(message)
    walk = in_threads(partial(_module_facts, adapter), names, workers=workers)
    facts = list(walk)
    warnings = sanity_findings((fact.pop("statistics") for fact in facts), source.findings)
    findings = [*source.findings, *warnings]
    coarse = [fact for fact in facts if fact["rounding_error"] >= 1]
    if coarse:  # singular values below storage precision
        worst = max(coarse, key=lambda fact: fact["rounding_error"])
        fields = {
            "count": len(coarse),
            "total": len(facts),
            "dtype": worst["stored_dtype"],
            "module": worst["module"],
            "ratio": worst["rounding_error"],
        }
        findings.append(Finding("below-precision", fields))
    return {
        "label": adapter.label,
        "path": source.location,
        "revision": source.revision,
        "format": source.format,
        "base_model": source.base_model,
        "task": source.task,
        "seed": source.seed,
        "step": source.step,
        "norm": sum(fact["norm"] ** 2 for fact in facts) ** 0.5,
        "scale_known": not any(fact["in_units_of_scale"] for fact in facts),
        "untrained_modules": sum(fact["untrained"] for fact in facts),
        "saved_modules": sorted(adapter.saved_modules),
        "findings": [finding.to_dict() for finding in findings],
        "blocks": _block_rows(facts),
        "modules": facts,
    }


def _module_facts(adapter: Adapter, name: str) -> dict[str, Any]:
    """Read one module and return its facts."""
    from lora_analysis.blocks import locate_module
    from lora_analysis.formats.sanity_checks import module_statistics
    from lora_analysis.spectra import spectrum

    update = adapter[name]
    value = spectrum(update, vectors=False)
    where = locate_module(value.name)
    return {
        "module": value.name,
        "component": where.component,
        "block": where.block,
        "part": where.part,
        "module_type": where.name,
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


def _block_rows(facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per block of an image model; none for other models."""
    import numpy as np

    from lora_analysis.blocks import group_modules, is_image

    by_name = {fact["module"]: fact for fact in facts}
    if not is_image(by_name):
        return []
    total = sum(fact["norm"] ** 2 for fact in facts)
    rows = []
    for title, names in group_modules(by_name).items():
        of_block = [by_name[name] for name in names]
        squares = sum(fact["norm"] ** 2 for fact in of_block)
        medians = {
            key: float(np.median([fact[key] for fact in of_block]))
            for key in ("effective_rank", "stable_rank", "energy_rank_90")
        }
        rows.append(
            {
                "block": title,
                "modules": len(names),
                "rank": _count_values([fact["rank"] for fact in of_block]),
                "norm": squares**0.5,
                "share": squares / total if total else 0.0,
                **medians,
            }
        )
    return rows


def _count_values(values: list[Any]) -> str:
    """Return "8" if all agree, else "8 (20), 16 (4)"."""
    counts = Counter(values)
    if len(counts) == 1:
        return str(values[0])
    return ", ".join(f"{value} ({count})" for value, count in counts.most_common())


def _describe_scales(facts: list[dict[str, Any]]) -> str:
    return _count_values([_describe_scale(fact) for fact in facts])


def _describe_scale(fact: dict[str, Any]) -> str:
    if fact["scale"] is None:
        return "1 (a dense update)" if _is_dense(fact) else "unknown"
    return f"{fact['scale']:.4g} from {fact['scale_origin']}"


# Facts about a training run, shown if any adapter states them.
_RUN = ("task", "seed", "step")


def _print_adapter(document: dict[str, Any], *, every: bool) -> None:
    """Print the facts about one adapter, and a table of its modules or of groups of them."""
    from lora_analysis.blocks import is_image, short_names

    facts = document["modules"]
    print_facts(_adapter_lines(document, facts))
    click.echo()
    if len(facts) > MODULES_SHOWN and not every:
        _print_groups(document["blocks"], facts)
        return
    names = [fact["module"] for fact in facts]
    titles = short_names(names) if is_image(names) else dict(zip(names, names, strict=True))
    columns = ("module", "rank", *_MEASURES, "σ")
    print_table("", columns, [(titles[fact["module"]], *_module_cells(fact)) for fact in facts])


def _adapter_lines(
    document: dict[str, Any], facts: list[dict[str, Any]]
) -> list[tuple[str, object]]:
    """Return the facts about one adapter as pairs of a title and a text."""
    unit = "" if document["scale_known"] else " × the unknown scale"
    lines: list[tuple[str, object]] = [
        ("adapter", document["label"]),
        ("path", document["path"]),
        ("format", document["format"]),
        ("base model", document["base_model"] or "not stated"),
        *((name, document[name]) for name in _RUN if document[name] is not None),
        ("modules", _count_modules(facts)),
        ("rank", _count_values([fact["rank"] for fact in facts])),
        ("scale", _describe_scales(facts)),
        ("stored as", _count_values([fact["stored_dtype"] for fact in facts])),
        ("‖ΔW‖", decimals(document["norm"]) + unit),
    ]
    if document["saved_modules"]:
        lines.append(("also saved", ", ".join(document["saved_modules"])))
    untrained, zero = document["untrained_modules"], _zero_word(facts)
    if untrained == len(facts):
        lines.append(("state", f"{zero}: ΔW is zero in every module"))
    elif untrained:
        lines.append(("state", f"{untrained} of {len(facts)} modules {zero}"))
    lines += [
        ("damage" if finding["severity"] == "damage" else "note", finding["text"])
        for finding in document["findings"]
    ]
    return lines


def _count_modules(facts: list[dict[str, Any]]) -> str:
    """Return the number of modules, by component or, if there are no components, by type."""
    components = Counter(fact["component"] for fact in facts if fact["component"])
    if len(components) == 1:
        return f"{len(facts)} ({next(iter(components))})"
    if components:
        counts = ", ".join(f"{component}: {count}" for component, count in components.items())
        return f"{len(facts)} ({counts})"
    kinds = [fact["module_type"] for fact in facts]
    has_repeated = len(set(kinds)) < len(kinds)
    return f"{len(kinds)} ({_count_values(kinds)})" if has_repeated else str(len(kinds))


def _zero_word(facts: list[dict[str, Any]]) -> str:
    """Return the word for zero updates: a full fine-tune left these weights alone."""
    return "unchanged" if all(map(_is_dense, facts)) else "untrained"


def _is_dense(fact: dict[str, Any]) -> bool:
    return fact["scale"] is None and not fact["in_units_of_scale"]


_MEASURES = ("effective", "stable", "90 %", "‖ΔW‖")


def _module_cells(fact: dict[str, Any]) -> tuple[object, ...]:
    rank, used = fact["rank"], fact["numerical_rank"]
    return (
        rank if rank == used else f"{used} of {rank}",
        f"{fact['effective_rank']:.1f}",
        f"{fact['stable_rank']:.2f}",
        fact["energy_rank_90"],
        decimals(fact["norm"]),
        _zero_word([fact]) if fact["untrained"] else sparkline(fact["singular_values"], 8),
    )


def _print_groups(blocks: list[dict[str, Any]], facts: list[dict[str, Any]]) -> None:
    """Print the blocks of an image model, of other models the types of modules, with medians."""
    import numpy as np

    rows: list[tuple[object, ...]] = []
    if blocks:
        rows += [
            (
                row["block"],
                row["modules"],
                row["rank"],
                decimals(row["norm"]),
                f"{row['share']:.1%}",
                f"{row['effective_rank']:.1f}",
                f"{row['stable_rank']:.2f}",
                f"{row['energy_rank_90']:g}",
            )
            for row in blocks
        ]
        title = "‖ΔW‖ by block, its share of ‖ΔW‖², and median ranks (every module: --all)"
        print_table(title, ("block", "modules", "rank", "‖ΔW‖", "share", *_MEASURES[:3]), rows)
        return
    for kind in dict.fromkeys(fact["module_type"] for fact in facts):
        rows_of_type = [fact for fact in facts if fact["module_type"] == kind]
        keys = ("numerical_rank", "effective_rank", "stable_rank", "energy_rank_90", "norm")
        medians = [decimals(float(np.median([fact[key] for fact in rows_of_type]))) for key in keys]
        rows.append(
            (
                f"{kind} ({len(rows_of_type)})",
                _count_values([fact["rank"] for fact in rows_of_type]),
                *medians,
            )
        )
    columns = ("modules", "rank", "numerical", *_MEASURES)
    print_table("median over layers (every module: --all)", columns, rows)
