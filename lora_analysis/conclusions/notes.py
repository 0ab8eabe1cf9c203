"""Sentences about adapters: what failed, what is untrained, how a pair started, what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lora_analysis.conclusions.levels import PAIRS_IN_WORDS, Finding, Kind, number
from lora_analysis.conclusions.runs import some
from lora_analysis.finding import Finding as FileFinding
from lora_analysis.finding import Severity, listed
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation, Study
from lora_analysis.text import plural

if TYPE_CHECKING:
    import pandas as pd

_KIND_OF: Mapping[Severity, Kind] = {
    "result": "result",
    "artifact": "artifact",
    "limit": "limit",
    "damage": "damage",
}
# Sentences of readers that have no code yet: each may say something else.
_UNCODED = "file-note"
# What `overlaps.shared_seed` says about all pairs of other tasks and one seed in one sentence.
TOLD_TOGETHER = (InitRelation.SHARED, InitRelation.PARTLY_SHARED)


def failures(study: Study) -> Iterator[Finding]:
    """Name what could not be analyzed, and why: together what has one reason."""
    by_reason: dict[str, list[str]] = {}
    for one in study.failures:
        reason = one.reason.removeprefix(f"{one.source}: ")
        by_reason.setdefault(reason, []).append(one.source)
    for reason, sources in by_reason.items():
        text = f"{some(sources, at_most=12)} could not be analyzed: {reason}"
        yield Finding("failure", "not analyzed", text, {"adapters": len(sources)})


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


def damaged(study: Study) -> Iterator[Finding]:
    """Name adapters with numbers that training hardly leaves; nothing else about them is safe."""
    for note, labels in _by_note(study).items():
        if note.severity == "damage":
            who = some(labels)
            text = f"{who}: {note.text} Results from these modules of {who} are unreliable."
            yield _of_files(note, labels, text, topic="damaged numbers")


def file_artifacts(study: Study) -> Iterator[Finding]:
    """Pass on artifacts in the files: an A that a conversion has copied."""
    yield from _noted(study, "artifact")


def file_notes(study: Study) -> Iterator[Finding]:
    """Pass on what else the readers and the sanity checks noticed in the files."""
    yield from _noted(study, "limit", "result")


def _noted(study: Study, *severities: Severity) -> Iterator[Finding]:
    by_code: dict[str, list[tuple[FileFinding, list[str]]]] = {}
    for note, labels in _by_note(study).items():
        if note.severity in severities:
            by_code.setdefault(note.code, []).append((note, labels))
    for code, notes in by_code.items():
        if code != _UNCODED and len(notes) > PAIRS_IN_WORDS:
            every = list(dict.fromkeys(label for _, labels in notes for label in labels))
            notes[:] = [(notes[0][0], every)]
        for note, labels in notes:
            yield _of_files(note, labels, f"{some(labels)}: {note.text}", topic="file")


def _by_note(study: Study) -> dict[FileFinding, list[str]]:
    """Return each finding about files once, with all the adapters it is about."""
    labels: dict[FileFinding, list[str]] = {}
    for label, adapter in study.adapters.items():
        for note in (*adapter.provenance.findings, *study.warnings.get(label, ())):
            labels.setdefault(note, []).append(label)
    return labels


def _of_files(note: FileFinding, labels: list[str], text: str, *, topic: str) -> Finding:
    kind = _KIND_OF[note.severity]
    return Finding(kind, topic, text, {"adapters": list(labels), **note.fields}, code=note.code)


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
            if shared := _alike(study, row.a, row.b):
                text += (
                    f" {plural(shared, 'module')} have the same shapes under other names. "
                    f"{_first_names(study, row.a)}; {_first_names(study, row.b)}. If they are the "
                    "same modules, pass prefix= (command line: --prefix OLD=NEW)."
                )
        else:
            continue
        yield Finding("limit", "nothing in common", text, {"a": row.a, "b": row.b})


def _alike(study: Study, a: str, b: str) -> int:
    """Return how many modules of two adapters agree in shape; 0 unless all of one adapter do."""
    shapes = study.spectra.groupby("adapter")[["d_out", "d_in"]]
    counts = [Counter(map(tuple, shapes.get_group(label).to_numpy())) for label in (a, b)]
    shared = (counts[0] & counts[1]).total()
    return shared if shared == min(count.total() for count in counts) else 0


def _first_names(study: Study, label: str) -> str:
    return f"{label} has {listed(list(study.adapters[label]))}"


def starts(study: Study) -> Iterator[Finding]:
    """Say which pairs are not two samples, or share their start, where no seed explains it."""
    words = {
        InitRelation.SAME_RUN: "start from the same A and their B agrees too "
        "(median matched cosine {b}): one "
        "run, a continued run, or the same seed on the same task (or an init in which B starts "
        "from the seed too). They are one sample, not two, and count in no result.",
        InitRelation.SHARED: "start from the same A in all {n} modules (same script, same seed), "
        "while B was learned apart (median matched cosine {b}). Their input-side overlap comes "
        "from the start and counts nowhere.",
        InitRelation.PARTLY_SHARED: "start from the same A in {n} of {m} modules; these "
        "are left out on the "
        "input side.",
        InitRelation.SAME_SPACE: "span the same input space under other rows (a "
        "resized copy, or an "
        "init from data or from W). Their input-side overlap is not learned.",
        InitRelation.INCONCLUSIVE: "have rank 1: whether they share their start cannot be told.",
    }
    told = study.pairs[study.pairs["initialization"].isin(words)]
    together = (told["relation"] == Relation.SHARED_SEED) & told["initialization"].isin(
        TOLD_TOGETHER
    )
    told = told[~together & ~told["relation"].isin([Relation.SAME_RUN])]
    for start, rows in told.groupby("initialization", sort=False):
        if len(rows) > PAIRS_IN_WORDS:
            yield _many_starts(str(start), rows, words[start])
            continue
        for row in rows.itertuples():
            said = words[start].format(
                b=number(row.b_cosine or 0.0), n=row.shared_init_modules, m=row.modules
            )
            values = {
                "a": row.a,
                "b": row.b,
                "initialization": start,
                "modules": row.shared_init_modules,
            }
            yield Finding("artifact", "shared start", f"{row.a} and {row.b} {said}", values)


def _many_starts(start: str, rows: pd.DataFrame, words: str) -> Finding:
    """Return one sentence for many pairs of one kind of start; table ``pairs`` names them all."""
    own = [
        number(float(rows[name].median()))
        for name in ("b_cosine", "shared_init_modules", "modules")
    ]
    said = words.format(b=own[0], n=own[1], m=own[2])
    first = rows.iloc[0]
    who = f"{len(rows)} pairs ({first['a']} and {first['b']} among them)"
    values: dict[str, float | int | str | None] = {"initialization": start, "pairs": len(rows)}
    return Finding("artifact", "shared start", f"{who} {said}", values)


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
