"""The result of a study: its adapters, its tables, and what can be computed from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lora_analysis.adapter import Adapter, DenseUpdate
from lora_analysis.amplify import Amplification
from lora_analysis.bases import BaseWeights
from lora_analysis.bases.sanity_checks import weight_findings
from lora_analysis.errors import MalformedFileError
from lora_analysis.finding import Failure, Finding
from lora_analysis.progress import Progress
from lora_analysis.similarity import SimilarityGrid, compared_directions, subspace_similarity
from lora_analysis.spectra import SIDES, Side, Spectrum, VectorsOf, spectrum
from lora_analysis.storage.outputs import output_folder
from lora_analysis.studies.group_analysis import GroupAnalysis, group_analysis_of
from lora_analysis.studies.inference import RunInference, run_inference
from lora_analysis.studies.pair_classes import ModuleExclusion, Population
from lora_analysis.studies.pair_products import module_products
from lora_analysis.studies.reference_levels import ReferenceLevel
from lora_analysis.studies.relations import Relation
from lora_analysis.studies.saved_sources import SavedBase, base_document, saved_adapter
from lora_analysis.studies.similarity_matrix import SimilarityMatrix
from lora_analysis.studies.study_files import DOCUMENT, KIND, StudyWriter, read_study_files
from lora_analysis.text import html_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Rows that a notebook shows.
_MAX_ROWS = 40


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Study:
    """Adapters and all results about them, as tables.

    Attributes
    ----------
    adapters
        The adapters by label, analyzed ones before the reference.
    runs
        One row per adapter: task, rank, seed, step (``earlier`` if the study has a later
        checkpoint of the same run), modules, norm, metrics of its training; ``excluded`` is why
        no pair of the adapter counts in a population, see `Exclusion`.
    spectra
        One row per adapter and module: ranks, norms, leading singular values.
    pairs
        One row per pair of adapters: what the labels say (``relation``), its class and the
        population that it counts in on each side (see `PairClass`), and T, the mean over usable
        modules of the excess of ω (``mean_excess_output``, ``mean_excess_input``).
    similarities
        One row per pair, module and side: φ(1, 1), φ(r, r) and ω with their random baselines,
        angles, cosine; the p-value of ω against random subspaces (at least 1e-4: ``p_is_bound``),
        and its q-value over the modules of one pair and side; ``usable`` if the module counts.
    amplifications
        One row per adapter, module and k; empty without a base. ``enrichment_crossed`` and
        ``enrichment_through_weight`` are the controls of ``enrichment``: with U or V of unrelated
        adapters (median), and of random directions through W.
    changes
        One row per adapter, module and side if ``weight_spectra`` was requested: energy of ΔW in
        leading and trailing directions of W, intruder dimensions, drift and rotation of the top
        of W, and changes of the vectors of W in magnitude and direction. For DoRA and KaSA all but
        the energy refer to the change of the weight in use, see `effective_update`.
    failures
        Sources and adapters that could not be analyzed.
    base
        The frozen weights, if given.
    reference
        Labels of the adapters that serve as the reference only.
    unmatched
        Modules without a fitting weight in the base, with the reason.
    warnings
        Findings on values that may be damaged, by adapter, see `formats.sanity_checks`.
    similarity_matrix
        All pairs of adapters in one matrix per quantity and type of module.
    fully_compared
        Labels of adapters of which every pair is in ``pairs`` and ``similarities``: all of them, or
        beyond ``max_pairs`` pairs a choice.
    across_bases
        Number of pairs of adapters of different base models, which are not compared.
    left_out
        Modules that do not count on a side, with the reason: one set for all pairs of one base.
    reference_levels
        Levels of unrelated adapters from a reference file, see `read_reference`.
    options
        Parameters of `study` other than the adapters, if they differ from the default.
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
    fully_compared: tuple[str, ...] = ()
    across_bases: int = 0
    left_out: Mapping[Side, Mapping[str, ModuleExclusion]] = field(default_factory=dict)
    reference_levels: tuple[ReferenceLevel, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    _amplified: Mapping[tuple[str, str], Amplification] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"<Study of {len(self.adapters)} adapters: {self.compared_pairs} pairs compared in "
            f"{self.spectra['module'].nunique()} modules>"
        )

    def _repr_html_(self) -> str:
        facts = [c for c in ("task", "rank", "seed", "step") if self.runs[c].notna().any()]
        columns = ["adapter", *facts, "modules", "norm"]
        rows = [[row[c] for c in columns] for row in self.runs.head(_MAX_ROWS).to_dict("records")]
        left = len(self.runs) - len(rows)
        note = f"{self.compared_pairs} pairs compared" + (f"; {left} more adapters" if left else "")
        title = f"Study of {len(self.adapters)} adapters"
        return html_table(title, columns, rows, f"{note}. write_report(study, path) shows all.")

    @property
    def compared_pairs(self) -> int:
        """Number of pairs with a value: both trained, in a module that both have."""
        return int(self.similarities.groupby(["a", "b"]).ngroups) if len(self.similarities) else 0

    def grid(
        self, a: str, b: str, module: str, *, side: Side | None = None, of: VectorsOf = "delta"
    ) -> SimilarityGrid:
        """Return φ(i, j) of two adapters by label for one module, computed now.

        The side is output by default, for ``of="A"`` input; see `subspace_similarity`. Of a full
        fine-tune as many directions as `similarity.compared_directions` counts.
        """
        updates = self.adapters[a][module], self.adapters[b][module]
        return subspace_similarity(*updates, side=side, of=of, k=compared_directions(*updates))

    def phi(
        self, pairs: Sequence[tuple[str, str]], module: str
    ) -> dict[tuple[str, str, Side], NDArray[np.float64]]:
        """Return φ(i, j) of some pairs of labels for one module, by pair and side, computed now.

        Each is ``grid(a, b, module, side=side).values``; every update is factored only once.
        """
        labels = list(dict.fromkeys(label for pair in pairs for label in pair))
        updates = [self.adapters[label][module] for label in labels]
        dense = any(isinstance(update, DenseUpdate) for update in updates)
        if dense or len({update.shape for update in updates}) > 1:
            return {
                (*pair, side): self.grid(*pair, module, side=side).values
                for pair in pairs
                for side in SIDES
            }
        products = module_products(updates, vectors=False)
        return {
            (a, b, side): products.overlap_grid(labels.index(a), labels.index(b), side)
            for a, b in pairs
            for side in SIDES
        }

    def spectrum(self, label: str, module: str) -> Spectrum:
        """Return the spectrum of one module of one adapter, computed now."""
        return spectrum(self.adapters[label][module])

    def amplification(self, label: str, module: str) -> Amplification:
        """Return the amplification of one module of one adapter; KeyError without a base."""
        return self._amplified[label, module]

    def amplified(self) -> list[Amplification]:
        """Return all amplifications, module by module; empty without a base."""
        return list(self._amplified.values())

    def base_findings(self) -> tuple[Finding, ...]:
        """Return findings on the files of the base and on the weights that were read."""
        if self.base is None:
            return ()
        statistics = (result.weight_statistics for result in self._amplified.values())
        return (
            *self.base.findings,
            *self.base.orientation_findings(self._shapes()),
            *weight_findings((s for s in statistics if s is not None), self.base.label),
        )

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape ``(d_out, d_in)`` of each module."""
        rows = self.spectra[["module", "d_out", "d_in"]].drop_duplicates("module")
        return {row.module: (int(row.d_out), int(row.d_in)) for row in rows.itertuples()}

    def select(self, relation: Relation, side: Side) -> pd.DataFrame:
        """Return the rows of ``similarities`` with one relation and side."""
        table = self.similarities
        return table[(table["relation"] == relation) & (table["side"] == side)]

    def population(self, name: Population, side: Side) -> pd.DataFrame:
        """Return the rows of ``similarities`` that count: usable modules of pairs of one kind.

        Parameters
        ----------
        name
            ``"replicate"`` (one task, different seeds) or ``"unrelated"`` (different tasks and
            seeds, or a reference adapter).
        side
            The side of the overlap.
        """
        table = self.similarities
        chosen = (table["population"] == name) & (table["side"] == side) & table["usable"]
        return table[chosen]

    def run_inference(
        self, *, side: Side = "output", rank: int | None = None, base: str | None = None
    ) -> RunInference:
        """Test if runs of one task agree more than runs of different ones; see `run_inference`."""
        return run_inference(self, side=side, rank=rank, base=base)

    def group_analysis(
        self,
        members: Sequence[str] | None = None,
        *,
        k: int | None = None,
        modules: str | Sequence[str] | None = None,
        modules_per_type: int | None = None,
        remove_related: bool = True,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> GroupAnalysis:
        """Test what a group shares: a mean, a subspace, or nothing.

        Each member is left out in turn, and explained by what the others have in common. Shares
        are compared with random directions of the same spectra, and with adapters of other groups
        in the same bases: the reference, and of the analyzed adapters that are not members one per
        other task.

        Parameters
        ----------
        members
            Labels of the group; by default all analyzed adapters of the most frequent base.
        k
            Number of matrices, and of directions of each side; by default the median numerical
            rank, at most 8.
        modules
            Suffixes of module names, or one regular expression; all modules by default.
        modules_per_type
            Maximum number of modules of each type, evenly over the model; all by default.
        remove_related
            Whether only one adapter is used of near-duplicates, contained adapters, one training
            run, one data order, and shared initializations. They are not independent members.
        workers
            Number of threads; the CPUs of this process by default.
        progress
            Called with ("modules", done, total) after each module.

        Returns
        -------
        GroupAnalysis
            The conclusion, its sentence, and the shares.

        Raises
        ------
        InputError
            An unknown label, fewer than three independent members, no module that three of them
            have in one shape, or k < 1.

        Notes
        -----
        Adapters are read and factored again, module by module. The joint directions of R vectors
        cost O(R³) for each adapter left out; beyond 16 adapters, sixteenths are left out instead.
        """
        return group_analysis_of(
            self,
            members,
            k=k,
            modules=modules,
            modules_per_type=modules_per_type,
            remove_related=remove_related,
            workers=workers,
            progress=progress,
        )

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the study into a folder, from which `load` restores it.

        All tables, the similarity matrix and the amplifications are stored, and the sources of the
        adapters and the base; their weights are not.

        Parameters
        ----------
        path
            The folder: absent, empty, or with a saved study, which is replaced.
        force
            Whether files of others may be replaced at the names that are written.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        OccupiedError
            The folder holds other files, or is or lies inside an adapter or the base.
        InUseError
            Another process writes there.
        OutputError
            The disk refused.
        """
        folder = Path(path)
        inputs = [file for adapter in self.adapters.values() for file in adapter.inputs]
        base = None
        if self.base is not None:
            inputs += self.base.inputs
            base = base_document(self.base, self._shapes())
        content = {name: getattr(self, name) for name in _SAVED}
        adapters = []
        for label, adapter in self.adapters.items():
            source = adapter.provenance
            options = source.read_options.values()
            # Without a source if its options cannot be written.
            if not all(isinstance(value, int | float | str | tuple | Path) for value in options):
                source = replace(source, source=None, read_options={})
            adapters.append((label, source, tuple(adapter)))
        with output_folder(
            folder, kind=KIND, verb="Study.save", inputs=inputs, force=force
        ) as staging:
            StudyWriter().write(staging, {**content, "adapters": adapters, "base": base})
        return folder

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Study:
        """Read a study that `save` wrote.

        Tables and results are those that were saved, to the bit. Adapters and base are read from
        their sources when they are needed, for example by `grid` and `spectrum`. Loading executes
        nothing from the file, so that a file from an unknown author can be loaded.

        Parameters
        ----------
        path
            The folder.
        allow_pickle
            Whether adapters and base may be read from files of ``torch.save``, as in
            `read_adapter`.

        Returns
        -------
        Study
            Reading an update raises SourceError if the adapter was in memory, cannot be read any
            more, or is not the one that was analyzed.

        Raises
        ------
        SourceError
            The folder has no saved study.
        UnfinishedError
            Saving was interrupted.
        MalformedFileError
            A file is damaged, or from a different version.
        """
        folder = Path(path)
        content = read_study_files(folder)
        try:
            documents, base = content.pop("adapters"), content.pop("base")
            for name in _TABLES:
                content[name] = pd.DataFrame(content[name])
            adapters = {
                str(label): saved_adapter(
                    str(label), provenance, modules, content["spectra"], allow_pickle=allow_pickle
                )
                for label, provenance, modules in documents
            }
            prefix = content["options"].get("prefix")
            if base is not None:
                base = SavedBase(base, adapters.values(), prefix, allow_pickle=allow_pickle)
            return cls(adapters=adapters, base=base, **content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = f"{folder / DOCUMENT} is damaged: {type(error).__name__}: {error}."
            raise MalformedFileError(message) from error


_SAVED = tuple(f.name for f in fields(Study) if f.name not in ("adapters", "base"))
_TABLES = ("runs", "spectra", "pairs", "similarities", "amplifications", "changes")
