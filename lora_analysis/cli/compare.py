"""``lora-analysis compare``: are two adapters alike, and in which modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from lora_analysis.cli.compare_modules import (
    SIDES,
    SortKey,
    modules_table,
    norms_by_module,
    print_modules,
)
from lora_analysis.cli.options import (
    DONE,
    FINE_TUNES,
    PARTLY_FAILED,
    VerbCommand,
    label_option,
    labeled_pair,
    modules_option,
    output_options,
    prefix_option,
    progress_bar,
    reference_option,
    task_and_seed_options,
    transposed_option,
)
from lora_analysis.cli.reading import Reading, reading_options
from lora_analysis.cli.show import (
    decimals,
    print_facts,
    print_finding,
    print_json,
    print_text,
    records,
)
from lora_analysis.text import join_names, overlap_number, plural, printable

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter
    from lora_analysis.conclusions import Comparison, Finding
    from lora_analysis.finding import Failure
    from lora_analysis.progress import Progress
    from lora_analysis.studies import Study

# Modules named in one line before the number of the others.
_NAMED: Final = 6


@click.command(name="compare", cls=VerbCommand)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@reference_option
@click.option(
    "--base",
    help="Base weights, to show the relative change ‖ΔW‖/‖W‖ of every module: a safetensors or "
    f"GGUF file, or a model folder; {FINE_TUNES}",
)
@click.option(
    "--sort",
    type=click.Choice(["norm", "relative", "omega", "excess", "cosine", "module"]),
    help="Order of the modules. By default the relative change if a base is given, else ‖ΔW‖.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Number of modules to show from either end of the order.",
)
@click.option("--all", "every", is_flag=True, help="Show every module, however many.")
@modules_option
@prefix_option
@label_option
@task_and_seed_options
@transposed_option
@reading_options
@output_options("the median ω on the output side")
def command(
    a: str,
    b: str,
    *,
    references: tuple[str, ...],
    base: str | None,
    sort: SortKey | None,
    top: int,
    every: bool,
    modules: str | None,
    prefixes: tuple[str, ...],
    label: str | None,
    tasks: tuple[str, ...],
    seeds: tuple[int, ...],
    transposed: bool | None,
    reading: Reading,
    form: str,
) -> int:
    """Compare adapters A and B: how similar they are, how certain that is, and in which modules.

    Without --reference the comparison is with random subspaces. Unrelated adapters of one base
    often exceed those too: five adapters of other tasks, given with --reference, allow a test.
    """
    from lora_analysis.conclusions import comparisons, findings
    from lora_analysis.studies import study

    if sort == "relative" and base is None:
        message = "--sort relative needs the base weights: pass --base."
        raise click.UsageError(message)
    adapters = labeled_pair([reading.read(source) for source in (a, b)], label, tasks, seeds)
    with progress_bar(form) as progress:
        reference, unread = _read_references(references, reading, label, progress)
        result = study(
            adapters,
            reference=reference,
            base=reading.open_base(base),
            transposed=transposed,
            draws=0,
            modules=modules,
            prefix=prefixes,
            label=None if label is None else "none",  # applied above
            across_bases=True,  # two adapters that are named are compared
            progress=progress,
        )
    pair = _check_pair(result)
    conclusions = [c for c in comparisons(result) if c.members == pair]
    about_pair, next_steps, others = _sort_findings(findings(result), conclusions)
    missing = _list_left_out(result, pair)
    failures = [source.to_dict() for source in unread]
    failures += [failure.to_dict() for failure in result.failures]
    if form == "json":
        every_finding = [*about_pair, *next_steps, *others]
        print_json(
            _json_document(result, pair, conclusions)
            | {
                "findings": [finding.to_dict() for finding in every_finding],
                "left_out": missing,
                "failures": failures,
            }
        )
    elif form == "quiet":
        click.echo(decimals(conclusions[0].omega if conclusions else None))
    else:
        table = modules_table(result, pair)
        _print_conclusions(about_pair, next_steps, conclusions, len(table))
        click.echo()
        _print_adapters(result, pair, conclusions)
        _print_others(others, missing, every=every)
        if len(table):
            order: SortKey = sort or ("norm" if base is None else "relative")
            print_modules(table, order, len(table) if every else top, has_base=base is not None)
    mismatched = any(module["code"] == "shape-mismatch" for module in missing)
    return PARTLY_FAILED if failures or mismatched or result.unmatched else DONE


def _read_references(
    references: Sequence[str], reading: Reading, label: str | None, progress: Progress
) -> tuple[list[Adapter | str], list[Failure]]:
    """Return reference adapters and files, and the sources that could not be read."""
    from lora_analysis.studies import with_label_facts
    from lora_analysis.studies.reference_levels import is_reference_file

    files = [source for source in references if is_reference_file(source)]
    sources = [source for source in references if source not in files]
    unrelated, unread = reading.read_all(sources, progress) if sources else ([], [])
    if label is not None:
        unrelated = with_label_facts(unrelated, label)
    return [*unrelated, *files], unread


def _check_pair(result: Study) -> tuple[str, str]:
    """Return the labels of A and B; name references that could not be analyzed on stderr.

    Raises
    ------
    InputError
        A or B could not be analyzed.
    IncompatibleError
        No module can be compared.
    """
    from lora_analysis.errors import IncompatibleError, InputError
    from lora_analysis.finding import quote_names

    if len(result.adapters) - len(result.reference) < 2:
        raise InputError(" ".join(failure.reason for failure in result.failures))
    for failure in result.failures:
        click.echo(printable(f"Left out: {failure.source}: {failure.reason}"), err=True)
    a, b = list(result.adapters)[:2]
    pair = result.pairs.iloc[0]
    if not pair["modules"]:
        names = " ".join(
            f"{label} adapts {plural(len(result.adapters[label]), 'module')}: "
            f"{quote_names(list(result.adapters[label]), _NAMED)}."
            for label in (a, b)
        )
        message = (
            f"{a} and {b} have different shapes in all {pair['mismatched_modules']} common "
            f"modules, so they are adapters of different models and cannot be compared. {names}"
            if pair["mismatched_modules"]
            else f"{a} and {b} adapt no module in common. {names} If they are the same modules "
            "under different names, pass --prefix OLD=NEW."
        )
        raise IncompatibleError(message)
    return a, b


# Findings that a comparison of two adapters does not repeat or that are about single adapters.
_NOT_ABOUT_THE_PAIR: Final = frozenset(
    [
        "directions-by-energy", "accuracy", "unknown-task-or-seed", "reference-pairs",
        "pairs-left-out", "largest-overlap", "overlap-of-ranks",
        "single-tasks", "amplification", "amplification-at-equal-k", "no-base-weight",
        "enrichment-specific", "enrichment-not-specific", "enrichment-untested",
    ]
)  # fmt: skip
_NEXT_STEPS: Final = (
    "no-reference-pairs",
    "no-level-for-pair",
    "more-references-needed",
    "other-references-needed",
)


def _sort_findings(
    every: Sequence[Finding], conclusions: Sequence[Comparison]
) -> tuple[list[Finding], list[Finding], list[Finding]]:
    """Return the conclusions on the pair, what a stronger one needs, and other findings."""
    from lora_analysis.conclusions import Reason

    subjects = {comparison.subject for comparison in conclusions}
    # For the same run or a shared initialization, references would add nothing.
    needed = (
        Reason.NO_REFERENCE,
        Reason.LEVEL_ONLY,
        Reason.FEW_REFERENCES,
        Reason.TRAINING_STRENGTH,
    )
    needs_references = any(comparison.reason in needed for comparison in conclusions)
    about_pair, next_steps, others = [], [], []
    for finding in every:
        if "conclusion" in finding.fields:
            if finding.fields["kind"] == "pair" and finding.fields["compared"] in subjects:
                about_pair.append(finding)
        elif finding.code in _NEXT_STEPS:
            next_steps += [finding] if needs_references else []
        elif finding.code not in _NOT_ABOUT_THE_PAIR:
            others.append(finding)
    return about_pair, next_steps, others


def _list_left_out(result: Study, pair: tuple[str, str]) -> list[dict[str, str]]:
    """Return the modules that are not compared, or do not count, with the reason."""
    from lora_analysis.adapter import is_fine_tune

    rows: dict[str, list[Any]] = {}
    for row in result.spectra.itertuples():
        if row.adapter in pair:
            rows.setdefault(row.module, []).append(row)
    missing = []
    for module, of_module in rows.items():
        untrained = [row.adapter for row in of_module if not row.numerical_rank]
        shapes = dict.fromkeys((row.d_out, row.d_in) for row in of_module)
        if len(of_module) == 1:
            missing.append((module, "only-in-one", f"only {of_module[0].adapter} adapts it"))
        elif len(shapes) > 1:
            different = " and ".join(map(str, shapes))
            missing.append((module, "shape-mismatch", f"the shapes differ: {different}"))
        elif untrained:
            tuned = all(is_fine_tune(result.adapters[label]) for label in untrained)
            code, what = ("unchanged", "unchanged") if tuned else ("untrained", "ΔW is zero")
            missing.append((module, code, f"{what} in {' and '.join(untrained)}"))
    left_out = [{"module": name, "code": code, "reason": reason} for name, code, reason in missing]
    left_out += [
        {"module": module, "code": "not-usable", "side": side, "reason": reason}
        for side in SIDES
        for module, reason in result.left_out.get(side, {}).items()
        if module in rows
    ]
    left_out += [
        {"module": module, "code": "no-base-weight", "reason": reason}
        for module, reason in result.unmatched.items()
        if module in rows
    ]
    return left_out


def _json_document(
    result: Study, pair: tuple[str, str], conclusions: Sequence[Comparison]
) -> dict[str, Any]:
    """Return the pair, its conclusions and all columns of its modules for JSON output."""
    from lora_analysis.blocks import locate_module
    from lora_analysis.conclusions import comparison_fields

    pairs, rows = (
        table[(table["a"] == pair[0]) & (table["b"] == pair[1])]
        for table in (result.pairs, result.similarities)
    )
    rows = rows.assign(
        block=[locate_module(name).block for name in rows["module"]],
        **{
            name: rows["module"].map(values)
            for name, values in norms_by_module(result, pair).items()
        },
    )
    runs = result.runs[result.runs["adapter"].isin([*pair, *result.reference])]
    return {
        "pair": records(pairs)[0],
        "comparisons": [comparison_fields(comparison) for comparison in conclusions],
        "adapters": records(runs),
        "reference": list(result.reference),
        "modules": records(rows),
    }


def _print_conclusions(
    findings: Sequence[Finding],
    next_steps: Sequence[Finding],
    conclusions: Sequence[Comparison],
    modules: int,
) -> None:
    """Print the conclusion on each side, output first, the signed cosine, and what to do next."""
    facts = [(f"{f.fields['side']} side".capitalize(), f.statement) for f in findings]
    if conclusions and modules:
        cosine = overlap_number(conclusions[0].cosine)
        count = plural(modules, "module")
        facts.append(("Cosine", f"{cosine} (signed; median over {count}; random 0)."))
    facts += [("Next step", finding.statement) for finding in next_steps]
    if facts:
        print_facts(facts)


def _print_adapters(
    result: Study, pair: tuple[str, str], conclusions: Sequence[Comparison]
) -> None:
    """Print what A and B are, and how they are related."""
    runs = result.runs.set_index("adapter")
    facts: list[tuple[str, object]] = []
    for name, label in zip("AB", pair, strict=True):
        row = runs.loc[label]
        parts = [
            f"{fact} {int(row[fact]) if fact != 'task' else row[fact]}"
            for fact in ("task", "rank", "seed", "step")
            if row[fact] is not None and row[fact] == row[fact]
        ]
        unit = "" if row["scale_known"] else " in units of its unknown scale"
        parts += [plural(int(row["modules"]), "module"), f"‖ΔW‖ {decimals(row['norm'])}{unit}"]
        facts.append((name, f"{label} ({', '.join(parts)})"))
    row = result.pairs.iloc[0]
    labels = "" if row["relation"] in ("unknown", row["pair_class"]) else f" ({row['relation']})"
    related = "relation unknown" if row["pair_class"] == "unknown" else row["pair_class"]
    text = f"{related}{labels}; initialization: {row['initialization']}; "
    facts.append(("A, B", text + plural(int(row["modules"]), "common module")))
    test = next((c.reference_test for c in conclusions if c.reference_test), None)
    if test:
        facts.append(("References", f"{join_names(test.references, _NAMED)} (one per task)"))
    print_facts(facts)


def _print_others(
    findings: Sequence[Finding], missing: Sequence[dict[str, str]], *, every: bool
) -> None:
    """Print the other findings, and name the modules that are not compared, by reason."""
    if findings:
        click.echo()
    for finding in findings:
        print_finding(finding.severity, finding.text)
    by_reason: dict[str, list[str]] = {}
    for module in missing:
        if module["code"] != "not-usable":  # a finding names these
            by_reason.setdefault(module["reason"], []).append(module["module"])
    for reason, names in by_reason.items():
        print_text(f"Not compared: {join_names(names, len(names) if every else _NAMED)} ({reason})")
