"""What a study is: its adapters and every result about them, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from lora_analysis.adapter import Adapter
from lora_analysis.amplify import Amplification
from lora_analysis.bases import BaseWeights
from lora_analysis.bases.sanity_checks import weight_findings
from lora_analysis.finding import Failure, Finding
from lora_analysis.similarity import SimilarityGrid, subspace_similarity
from lora_analysis.spectra import Side, Spectrum, VectorsOf, spectrum
from lora_analysis.studies.inference import RunInference, run_inference
from lora_analysis.studies.relations import Relation
from lora_analysis.studies.similarity_matrix import SimilarityMatrix
from lora_analysis.text import html_table

# Rows that a notebook shows.
SHOWN = 40


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """Adapters and every result about them, as tables.

    Attributes
    ----------
    adapters
        Those that were analyzed, by label.
    runs
        One row per adapter: task, rank, seed, step (``earlier`` where a later checkpoint of the
        same run is here), modules, norm, metrics of its training.
    spectra
        One row per adapter and module: ranks, norms, leading singular values.
    pairs
        One row per pair of adapters: their relation, and whether they share their start.
    similarities
        One row per pair, module and side: φ(1, 1), φ(r, r), ω with their chance, angles, cosine;
        the isotropic p-value of φ(r, r), and its q-value over the modules of one pair and side.
    amplifications
        One row per adapter, module and k; empty without a base.
    changes
        One row per adapter, module and side, where W's whole spectra were asked for: ΔW's energy
        in W's leading and trailing directions, intruder dimensions, drift and rotation of W's
        top, and how W's vectors change in magnitude and direction. For DoRA and KaSA all but the
        energy is of the change that the model really has, see `effective_update`.
    failures
        What could not be analyzed.
    base
        The frozen weights, if given.
    reference
        Labels of the adapters that serve as the reference alone.
    unmatched
        Modules without a fitting weight in the base, and why.
    warnings
        Findings about numbers that may be damage, by adapter, see `formats.sanity_checks`.
    similarity matrix
        Every adapter against every other in one matrix per quantity and type of module.
    tabulated
        Labels of the adapters in ``pairs`` and ``similarities``: all of them, up to a number.
    across_bases
        Pairs of adapters of different base models, which are not compared.
    options
        What `study` was asked for beside its adapters, where that is not the default.
    """

    adapters: Mapping[str, Adapter]
    runs: pd.DataFrame
    spectra: pd.DataFrame
    pairs: pd.DataFrame
    similarities: pd.DataFrame
    amplifications: pd.DataFrame
    changes: pd.DataFrame
    failures: tuple[Failure, ...] = ()
    base: BaseWeights | None = None
    reference: tuple[str, ...] = ()
    unmatched: Mapping[str, str] = field(default_factory=dict)
    warnings: Mapping[str, tuple[Finding, ...]] = field(default_factory=dict)
    similarity_matrix: SimilarityMatrix | None = None
    tabulated: tuple[str, ...] = ()
    across_bases: int = 0
    options: Mapping[str, object] = field(default_factory=dict)
    _amplified: Mapping[tuple[str, str], Amplification] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        known = [c for c in ("task", "rank", "seed", "step") if self.runs[c].notna().any()]
        columns = ["adapter", *known, "modules", "norm"]
        rows = [[row[c] for c in columns] for row in self.runs.head(SHOWN).to_dict("records")]
        left = len(self.runs) - len(rows)
        note = f"{self.compared_pairs} pairs compared" + (f"; {left} more adapters" if left else "")
        title = f"Study of {len(self.adapters)} adapters"
        return html_table(title, columns, rows, f"{note}. write_report(study, path) shows all.")

    @property
    def compared_pairs(self) -> int:
        """How many pairs have a number: both trained, in a module that both have."""
        return int(self.similarities.groupby(["a", "b"]).ngroups) if len(self.similarities) else 0

    def grid(
        self, a: str, b: str, module: str, *, side: Side = "input", of: VectorsOf = "delta"
    ) -> SimilarityGrid:
        """Return φ(i, j) of two adapters by label for one module, computed now."""
        return subspace_similarity(
            self.adapters[a][module], self.adapters[b][module], side=side, of=of
        )

    def spectrum(self, label: str, module: str) -> Spectrum:
        """Return the spectrum of one module of one adapter, computed now."""
        return spectrum(self.adapters[label][module])

    def amplification(self, label: str, module: str) -> Amplification:
        """Return the amplification of one module of one adapter; KeyError without a base."""
        return self._amplified[label, module]

    def amplified(self) -> list[Amplification]:
        """Return every amplification, module by module; empty without a base."""
        return list(self._amplified.values())

    def base_findings(self) -> tuple[Finding, ...]:
        """Return what is wrong, or unusual, about the base: its files, and the weights read."""
        if self.base is None:
            return ()
        read = (one.weight_statistics for one in self._amplified.values())
        columns = self.spectra[["module", "d_out", "d_in"]].drop_duplicates("module")
        shapes = {row.module: (int(row.d_out), int(row.d_in)) for row in columns.itertuples()}
        return (
            *self.base.findings,
            *self.base.orientation_findings(shapes),
            *weight_findings((one for one in read if one is not None), self.base.label),
        )

    def select(self, relation: Relation, side: Side) -> pd.DataFrame:
        """Return the rows of ``similarities`` with one relation and side."""
        table = self.similarities
        return table[(table["relation"] == relation) & (table["side"] == side)]

    def run_inference(
        self,
        *,
        quantity: str = "omega",
        side: Side = "output",
        rank: int | None = None,
        base: str | None = None,
    ) -> RunInference:
        """Return whether runs of one task agree more than runs of others; see `run_inference`."""
        return run_inference(self, quantity=quantity, side=side, rank=rank, base=base)
