"""Findings about the adapters themselves: failures, damage, outliers, what is known about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from math import comb
from typing import Any

import numpy as np

from lora_analysis.adapter import is_fine_tune
from lora_analysis.conclusions.comparison_values import PAIRS_IN_WORDS
from lora_analysis.finding import Finding
from lora_analysis.studies import Study
from lora_analysis.studies.base_models import pairs_across_bases

# Times the median norm of the others from which an adapter is called diverged.
DIVERGED = 10.0


def report_failures(study: Study) -> Iterator[Finding]:
    """Report what could not be analyzed, and why: together what has one reason."""
    by_reason: dict[str, list[str]] = {}
    for failure in study.failures:
        reason = failure.reason.removeprefix(f"{failure.source}: ")
        by_reason.setdefault(reason, []).append(failure.source)
    for reason, sources in by_reason.items():
        yield Finding("not-analyzed", {"sources": sources, "reason": reason})


def report_damaged_files(study: Study) -> Iterator[Finding]:
    """Report adapters with damaged numbers or files; no other result about them is safe."""
    for finding, labels in _findings_about_files(study).items():
        if finding.severity == "damage":
            yield finding.of_adapters(labels)


def report_file_notes(study: Study, severities: Collection[str]) -> Iterator[Finding]:
    """Report what readers and sanity checks noticed; the first stands for many of one code."""
    by_code: dict[str, list[tuple[Finding, list[str]]]] = {}
    for finding, labels in _findings_about_files(study).items():
        if finding.severity in severities:
            by_code.setdefault(finding.code, []).append((finding, labels))
    for code, group in by_code.items():
        # Each "file-note" may be about something else.
        if code != "file-note" and len(group) > PAIRS_IN_WORDS:
            every = dict.fromkeys(label for _, labels in group for label in labels)
            group[:] = [(group[0][0], list(every))]
        for finding, labels in group:
            yield finding.of_adapters(labels)


def _findings_about_files(study: Study) -> dict[Finding, list[str]]:
    """Return each finding about files once, with the labels of all adapters that have it."""
    labels: dict[Finding, list[str]] = {}
    for label, adapter in study.adapters.items():
        for finding in (*adapter.provenance.findings, *study.warnings.get(label, ())):
            labels.setdefault(finding, []).append(label)
    return labels


def report_untrained(study: Study) -> Iterator[Finding]:
    """Report adapters and modules whose update is zero; a full fine-tune's reader names those."""
    for row in study.runs.itertuples():
        if is_fine_tune(study.adapters[row.adapter]):
            continue
        missing = row.modules - row.trained_modules
        if missing == row.modules:
            fields = {"adapter": row.adapter, "modules": int(row.modules)}
            yield Finding("untrained-adapter", fields)
        elif missing:
            fields = {"adapter": row.adapter, "modules": int(row.modules)}
            yield Finding("untrained-modules", {**fields, "untrained": int(missing)})


def report_diverged(study: Study) -> Iterator[Finding]:
    """Report adapters whose norm is far from the others', or larger than that of W itself.

    Only adapters of the same modules of one base are compared, and no earlier checkpoint of a
    run: norms grow in training.
    """
    runs = study.runs[study.runs["scale_known"] & (study.runs["trained_modules"] > 0)]
    modules = study.spectra.groupby("adapter")["module"].agg(lambda names: hash(frozenset(names)))
    groups = runs["adapter"].map(modules).astype(str) + runs["base_key"].map(str)
    against = study.amplifications
    against = against[against["at_rank"]] if len(against) else against
    for row in runs.itertuples():
        comparable = (groups == groups[row.Index]) & (runs["adapter"] != row.adapter)
        norms = runs.loc[comparable & ~runs["earlier"], "norm"]
        usual = float(norms.median()) if len(norms) >= 2 else np.nan
        relative = float(against.loc[against["adapter"] == row.adapter, "relative_norm"].median())
        is_outlier, exceeds_weight = row.norm >= DIVERGED * usual, relative >= 1
        if is_outlier or exceeds_weight:
            yield Finding(
                "diverged",
                {
                    "adapter": row.adapter,
                    "norm": float(row.norm),
                    "ratio": float(row.norm / usual) if is_outlier else None,
                    "relative_norm": relative if exceeds_weight else None,
                },
            )


def report_base_models(study: Study) -> Iterator[Finding]:
    """Report the base models of the adapters if there are several, or if it is not known."""
    runs = study.runs
    pairs = pairs_across_bases(study)
    if pairs.different:
        bases = [
            {"base": str(rows["base_model"].iloc[0]), "adapters": len(rows)}
            for _, rows in runs.groupby("base_key", sort=False)
        ]
        left_out = sum(not compared for compared in pairs.different.values())
        yield Finding(
            "several-bases",
            {
                "count": len(bases),
                "bases": bases,
                "excluded_pairs": left_out or None,
                "compared_pairs": len(pairs.different) - left_out or None,
            },
        )
    fields: dict[str, Any] = dict.fromkeys(("bases", "excluded_pairs", "compared_pairs", "unnamed"))
    if pairs.not_known:
        labels = {label for pair in pairs.not_known for label in pair}
        left_out = sum(not compared for compared in pairs.not_known.values())
        fields_of_pairs = {
            "bases": sorted(set(runs.loc[runs["adapter"].isin(labels), "base_model"])),
            "excluded_pairs": left_out or None,
            "compared_pairs": len(pairs.not_known) - left_out or None,
        }
        yield Finding("base-not-known-same", fields | fields_of_pairs)
    unnamed = list(runs.loc[runs["base_key"].isna(), "adapter"])
    if unnamed and len(runs) > 1:
        yield Finding("base-not-known-same", fields | {"unnamed": unnamed})


def report_unknown_tasks(study: Study) -> Iterator[Finding]:
    """Report the adapters whose task or seed is unknown, if there are several adapters.

    Adapters whose name does not fit the user's pattern have a finding that says so.
    """
    runs = study.runs[~study.runs["adapter"].isin(study.reference)]
    unknown = [
        label
        for label in runs.loc[runs["task"].isna() | runs["seed"].isna(), "adapter"]
        if all(note.code != "label-misfit" for note in study.adapters[label].provenance.findings)
    ]
    if len(runs) > 1 and unknown:
        fields = {"count": len(unknown), "total": len(runs), "unlabeled": unknown}
        yield Finding("unknown-task-or-seed", fields)


def report_sampled_pairs(study: Study) -> Iterator[Finding]:
    """Report that the tables of pairs hold a sample of the pairs."""
    count = len(study.adapters)
    if len(study.fully_compared) < count:
        fields = {"compared": len(study.pairs), "total": comb(count, 2), "count": count}
        yield Finding("sampled-pairs", fields | {"together": len(study.fully_compared)})


def report_incomparable_pairs(study: Study) -> Iterator[Finding]:
    """Report pairs that cannot be compared in some or all modules."""
    for row in study.pairs.itertuples():
        fields = {"a": row.a, "b": row.b}
        if row.mismatched_modules:
            modules = int(row.mismatched_modules)
            yield Finding("different-shapes", {**fields, "modules": modules})
        elif not row.modules:
            names = {name: list(study.adapters[label]) for name, label in fields.items()}
            shapes = study.spectra.groupby("adapter")[["d_out", "d_in"]]
            counts = [
                Counter(map(tuple, shapes.get_group(label).to_numpy())) for label in (row.a, row.b)
            ]
            # Names alone differ if all modules of one adapter agree in shape with the other's.
            shared = (counts[0] & counts[1]).total()
            is_alike = shared == min(count.total() for count in counts)
            yield Finding(
                "no-common-module",
                {
                    **fields,
                    "alike": (shared or None) if is_alike else None,
                    **{f"modules_{name}": modules for name, modules in names.items()},
                },
            )
