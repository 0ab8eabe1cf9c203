"""Findings about groups of adapters: duplicates, shared initializations, outliers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lora_analysis.conclusions.levels import Finding, number
from lora_analysis.conclusions.runs import some
from lora_analysis.studies import Study
from lora_analysis.studies.relations import base_key
from lora_analysis.text import plural

# Times the median norm of the others from which an adapter is called diverged.
EXPLODED = 10.0


def duplicates(study: Study) -> Iterator[Finding]:
    """Name adapters that are one update, up to length."""
    if study.similarity_matrix is None or len(study.adapters) < 2:
        return
    norms = dict(zip(study.similarity_matrix.labels, study.similarity_matrix.norms, strict=True))
    for names in study.similarity_matrix.duplicates():
        own = [norms[name] for name in names]
        text = (
            f"{some(list(names))} are near-duplicates: the signed cosine of their whole updates is "
            f"0.99 or more (largest norm {number(max(own) / min(own))} times the smallest). They "
            "are one sample, whatever their names say."
        )
        yield Finding("artifact", "near-duplicates", text, {"adapters": len(names)})


def diverged(study: Study) -> Iterator[Finding]:
    """Name adapters whose norm is far from the others', or beyond that of W itself.

    Only adapters of the same modules of one base are held against each other, and no checkpoint
    that its run has left behind: norms grow in training.
    """
    known = study.runs[study.runs["scale_known"] & (study.runs["trained_modules"] > 0)]
    modules = study.spectra.groupby("adapter")["module"].agg(lambda own: hash(frozenset(own)))
    kinds = known["adapter"].map(modules).astype(str) + known["base_model"].map(
        base_key, na_action="ignore"
    ).map(str)
    against = study.amplifications
    against = against[against["at_rank"]] if len(against) else against
    for row in known.itertuples():
        alike = (kinds == kinds[row.Index]) & (known["adapter"] != row.adapter)
        others = known.loc[alike & ~known["earlier"], "norm"]
        usual = float(others.median()) if len(others) >= 2 else np.nan
        said = []
        if row.norm >= EXPLODED * usual:
            said.append(f"{number(row.norm / usual)} times the median of the others like it")
        relative = float(against.loc[against["adapter"] == row.adapter, "relative_norm"].median())
        if relative >= 1:
            said.append(f"{number(relative)} times ‖W‖, median over modules")
        if said:
            text = (
                f"{row.adapter} has probably diverged: ‖ΔW‖ is {number(row.norm)}, "
                f"{' and '.join(said)}. Its directions are real, its training is in doubt."
            )
            yield Finding("artifact", "diverged", text, {"adapter": row.adapter, "norm": row.norm})


def degenerate(study: Study) -> Iterator[Finding]:
    """Say how many first directions are not defined, or not well, and so count nowhere."""
    rows = study.similarities
    rows = rows[rows["side"] == "output"]
    counts = rows["degeneracy_1_1"].value_counts()
    undefined, soft = (int(counts.get(kind, 0)) for kind in ("degenerate", "nearly degenerate"))
    if undefined + soft:
        text = (
            f"In {undefined + soft} of {plural(len(rows), 'comparison')} a first direction is not "
            f"well defined (σ₁ and σ₂ coincide in {undefined}, differ by less than 5 % in {soft}): "
            "noise may turn it, so φ(1,1) counts nowhere there."
        )
        yield Finding("artifact", "degenerate directions", text, {"undefined": undefined})
