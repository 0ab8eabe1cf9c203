"""Sentences about adapters: what failed, what is untrained, how a pair started, what is missing."""

from __future__ import annotations

from collections.abc import Iterator

from lora_analysis.findings.levels import Finding, number, plural
from lora_analysis.studies import SHARED_SEED, Study

# What `overlaps.shared_seed` says about all pairs of other tasks and one seed in one sentence.
TOLD_TOGETHER = ("same initial A", "partly shared")


def failures(study: Study) -> Iterator[Finding]:
    """Name what could not be analysed, and why."""
    for one in study.failures:
        text = f"{one.source} could not be analysed: {one.reason}"
        yield Finding("failure", "not analysed", text, {"source": one.source})


def untrained(study: Study) -> Iterator[Finding]:
    """Name adapters and modules whose update is zero."""
    for row in study.runs.itertuples():
        missing = row.modules - row.trained_modules
        if not missing:
            continue
        text = (
            f"{row.adapter} is untrained: ΔW is zero in all {plural(row.modules, 'module')}, so it "
            "has no directions and takes part in no comparison."
            if missing == row.modules
            else f"{row.adapter}: ΔW is zero in {missing} of {plural(row.modules, 'module')}; they "
            "have no directions and are left out."
        )
        yield Finding("limit", "untrained", text, {"adapter": row.adapter, "modules": missing})


def file_notes(study: Study) -> Iterator[Finding]:
    """Pass on what the readers noticed in the files."""
    for adapter in study.adapters.values():
        for note in adapter.provenance.findings:
            yield Finding("limit", "file", f"{adapter.label}: {note}", {"adapter": adapter.label})


def mismatched(study: Study) -> Iterator[Finding]:
    """Name pairs that cannot be compared in some or all modules."""
    for row in study.pairs.itertuples():
        if row.mismatched_modules:
            text = (
                f"{row.a} and {row.b} differ in shape in "
                f"{plural(row.mismatched_modules, 'module')} of the same name: they adapt "
                "different base models and are not compared there."
            )
        elif not row.modules:
            text = f"{row.a} and {row.b} adapt no module in common: nothing can be compared."
        else:
            continue
        yield Finding("limit", "nothing in common", text, {"a": row.a, "b": row.b})


def starts(study: Study) -> Iterator[Finding]:
    """Say which pairs are not two samples, or share their start, where no seed explains it."""
    words = {
        "same run": "start from the same A and their B agrees too (median matched cosine {b}): one "
        "run, a continued run, or the same seed on the same task (or an init in which B starts "
        "from the seed too). They are one sample, not two, and count in no result.",
        "same initial A": "start from the same A in all {n} modules (same script, same seed), "
        "while B was learned apart (median matched cosine {b}). Their input-side overlap comes "
        "from the start and counts nowhere.",
        "partly shared": "start from the same A in {n} of {m} modules; these are left out on the "
        "input side.",
        "same input space": "span the same input space under other rows (a resized copy, or an "
        "init from data or from W). Their input-side overlap is not learned.",
        "undecidable": "have rank 1: whether they share their start cannot be told.",
    }
    for row in study.pairs.itertuples():
        told_together = row.relation == SHARED_SEED and row.start in TOLD_TOGETHER
        if row.start not in words or told_together:
            continue
        told = words[row.start].format(
            b=number(row.b_cosine or 0.0), n=row.shared_modules, m=row.modules
        )
        values = {"a": row.a, "b": row.b, "start": row.start, "modules": row.shared_modules}
        yield Finding("artefact", "shared start", f"{row.a} and {row.b} {told}", values)


def few_runs(study: Study) -> Iterator[Finding]:
    """Say which cells have too few seeds for an interval."""
    runs = study.runs.dropna(subset=["task", "rank", "seed"])
    if runs.empty:
        return
    counts = runs.groupby(["task", "rank"])["seed"].nunique()
    few = [f"{task} rank {int(rank)} ({n})" for (task, rank), n in counts.items() if n < 3]
    if few:
        text = (
            f"Fewer than three seeds: {', '.join(few)}. No interval over seeds is given for them; "
            "quartiles are over modules and describe this study only."
        )
        yield Finding("limit", "few runs", text)


def unmatched(study: Study) -> Iterator[Finding]:
    """Name modules without a weight in the base."""
    if study.unmatched:
        module, reason = next(iter(study.unmatched.items()))
        text = (
            f"{plural(len(study.unmatched), 'module')} could not be held against the base, "
            f"'{module}' among them: {reason}"
        )
        yield Finding("limit", "no base weight", text, {"modules": len(study.unmatched)})


def bases(study: Study) -> Iterator[Finding]:
    """Say that the adapters name more than one base model."""
    named = [str(one) for one in study.runs["base_model"].dropna().unique()]
    if len(named) > 1:
        text = (
            f"The adapters name {len(named)} base models ({', '.join(named[:4])}). Directions of "
            "different bases have nothing to do with each other, even where shapes agree."
        )
        yield Finding("limit", "several bases", text, {"bases": len(named)})
