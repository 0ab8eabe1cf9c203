"""`study`: one walk over the modules of all adapters, and the tables of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pandas as pd

from lora_analysis.adapter import Adapter
from lora_analysis.blocks import locate_module
from lora_analysis.errors import BaseWeightError, SourceError
from lora_analysis.finding import Failure, quote_names
from lora_analysis.formats import is_adapter_like
from lora_analysis.names import match_names, parse_prefixes
from lora_analysis.progress import Progress
from lora_analysis.studies.base_identity import base_titles, resolve_keys
from lora_analysis.studies.module_analysis import ModuleResult, ModuleResults, analyze_module
from lora_analysis.studies.module_walk import choose_modules, walk_modules
from lora_analysis.studies.pair_classes import Exclusion, PairClass
from lora_analysis.studies.pair_tables import pair_tables
from lora_analysis.studies.reference_levels import is_reference_file, read_reference
from lora_analysis.studies.relations import earlier_checkpoints, keep_unrelated
from lora_analysis.studies.result import Study
from lora_analysis.studies.similarity_matrix import MOST_AT_ONCE, SimilarityMatrixSums
from lora_analysis.studies.spec import DRAWS, MAX_PAIRS, OpenStudy, Source, StudySpec
from lora_analysis.studies.table_rows import (
    AMPLIFICATION_COLUMNS,
    CHANGE_COLUMNS,
    amplification_rows,
)

if TYPE_CHECKING:
    from lora_analysis.bases import BaseWeights
    from lora_analysis.execution.protocol import Executor
    from lora_analysis.studies.similarity_matrix import SimilarityMatrix


def study(
    adapters: Sequence[Source],
    *,
    base: Any = None,
    reference: Sequence[Source] = (),
    modules: str | Sequence[str] | None = None,
    prefix: str | Sequence[str] | Mapping[str, str] | None = None,
    transposed: bool | None = None,
    failures: Sequence[Failure] = (),
    draws: int = DRAWS,
    weight_spectra: bool = False,
    label: str | None = None,
    across_bases: bool = False,
    max_pairs: int = MAX_PAIRS,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Study:
    """Compare adapters with each other and with their base, module by module.

    Parameters
    ----------
    adapters
        Adapters, or sources of one or several: files, folders, globs, repositories on a hub; also
        live models and whatever else :func:`as_adapter` takes.
    base
        The frozen weights, or their source, as for :func:`open_base`; a live model is one. Without
        it there are no amplifications.
    reference
        Adapters of other tasks on the same base, trained with other seeds. Pairs of an adapter and
        a reference, and of two references, are unrelated unless labels or weights contradict it,
        and conclusions compare with them (and with such pairs among ``adapters``). Adapters whose
        known task or base contradicts this are refused. A reference file (see `write_reference`)
        gives a level where there are no unrelated pairs.
    modules
        Suffixes of module names, or one regular expression; all modules by default.
    prefix
        Prefixes of module names and their replacements when names are matched, among adapters
        and with the base: ``"OLD=NEW"``, ``"OLD"`` to drop a prefix, or a mapping.
    transposed
        Whether the base stores its weights as ``[in, out]``, if neither its family nor the shapes
        decide.
    failures
        Adapters that could not be read, to be included in the report.
    draws
        Number of random directions per module for mean and spread, for weights whose shorter side
        is at most 1024; for larger ones there is only the exact root mean square.
    weight_spectra
        Whether to compare every update with the whole spectrum of W too, for the table
        ``changes``. This takes about half a minute per 4096 × 4096 weight on one core the first
        time (see `linalg.gram_seconds`); the SVD is cached on disk (see `spectra.weight_svd`).
    label
        Pattern that extracts task, rank, seed and step from adapter names, for example
        ``"{task}-r{rank}-s{seed}"``; ``*`` matches anything. It must match an adapter's label or
        the end of its path, and overrides the files. By default, tasks and seeds that no file
        states come from the names if one common pattern matches all of these adapters (see
        `studies.labels.COMMON_PATTERNS`); ``"none"`` prevents that.
    across_bases
        Whether adapters are compared too if their base models are different or not known to be
        the same, although directions of different bases are not comparable.
    max_pairs
        Maximum number of pairs in the tables of pairs. If there are more, pairs are chosen so that
        every adapter is in some (with 780 pairs: up to 1,200 adapters), with replicates and
        unrelated adapters where there are any; the similarity matrix contains all pairs.
    workers
        Number of threads; by default the CPUs of this process, and one beyond 1,000 adapters.
    executor
        How to run instead of threads: processes, or the machines of a cluster. Adapters and base
        are then given by their sources, which every worker opens for itself.
    progress
        Called with ("modules", done, total) after each module.

    Returns
    -------
    Study
        An adapter in which a module cannot be read (non-finite values, a damaged tensor) is
        left out completely and listed in ``failures``.

    Raises
    ------
    SourceError
        No adapter is left to analyze.
    BaseWeightError
        No module has a weight in the base.
    InputError
        A reference adapter is analyzed itself, has the task of an analyzed adapter, or a different
        base than all of them.

    Notes
    -----
    Every module of every adapter is read and factored once.
    """
    levels = [
        level
        for source in reference
        if is_reference_file(source)
        for level in read_reference(source)
    ]
    if is_adapter_like(adapters):
        adapters = [adapters]
    spec = StudySpec(
        adapters=tuple(adapters),
        base=base,
        reference=tuple(source for source in reference if not is_reference_file(source)),
        modules=modules,
        prefix=parse_prefixes(prefix),
        transposed=transposed,
        draws=draws,
        weight_spectra=weight_spectra,
        label=label,
        across_bases=across_bases,
        max_pairs=max_pairs,
    )
    opened = spec.open()
    labels = [adapter.label for adapter in opened.adapters]
    results, sums = _walk(spec, opened, workers=workers, executor=executor, progress=progress)
    failed = [Failure(*item) for item in results.failed.items()]
    left_out = (*failures, *opened.unread, *failed)
    if results.failed.keys() >= set(labels[: opened.analyzed] or labels):
        reasons = "; ".join(f"{item.source}: {item.reason}" for item in left_out)
        message = f"No adapter is left to analyze ({reasons or 'none was given'})."
        raise SourceError(message)
    readable = [i for i, name in enumerate(labels) if name not in results.failed]
    similarity_matrix = sums.similarity_matrix(readable)
    del sums  # as large as the similarity matrix
    return replace(
        _assemble(opened, results, left_out, similarity_matrix), reference_levels=tuple(levels)
    )


def _walk(
    spec: StudySpec,
    opened: OpenStudy,
    *,
    workers: int | None,
    executor: Executor | None,
    progress: Progress | None,
) -> tuple[ModuleResults, SimilarityMatrixSums]:
    """Analyze every module; contributions to the similarity matrix are summed as they come."""
    chosen = choose_modules(opened.adapters, spec.modules)
    labels = [adapter.label for adapter in opened.adapters]
    if executor is None:
        analyze = _Analyze(spec, opened)
        workers = workers or (1 if len(labels) > MOST_AT_ONCE else None)
    else:
        spec.check_sources()
        analyze = _Analyze(spec)
    sums = SimilarityMatrixSums(labels, [locate_module(name).name for name in chosen])
    results = []
    try:
        for result in walk_modules(
            analyze, chosen, workers=workers, executor=executor, progress=progress
        ):
            for contribution in result.similarity_matrix:
                sums.add(locate_module(result.module).name, contribution)
            result.similarity_matrix.clear()
            results.append(result)
    finally:
        _OPENED.clear()
    return ModuleResults.of(results), sums


@dataclass(slots=True)
class _Analyze:
    """The analysis of one module, for threads or for workers that open the study themselves."""

    spec: StudySpec
    opened: OpenStudy | None = None
    token: str = field(default_factory=lambda: uuid4().hex)

    def __call__(self, module: str) -> ModuleResult:
        """Analyze a module; a worker opens the adapters the first time."""
        if self.opened is not None:
            return analyze_module(self.opened, module)
        if self.token not in _OPENED:
            _OPENED.clear()
            _OPENED[self.token] = self.spec.open()
        return analyze_module(_OPENED[self.token], module, blocks=False)


# The study of which this process analyzes modules: executors may send the work with each module.
_OPENED: dict[str, OpenStudy] = {}


def _assemble(
    opened: OpenStudy,
    results: ModuleResults,
    left_out: tuple[Failure, ...],
    similarity_matrix: SimilarityMatrix,
) -> Study:
    """Return the study of the adapters that could be read."""
    unmatched = results.unmatched()
    if unmatched and not any(result.amplified for result in results.modules):
        raise _no_weight_error(next(iter(unmatched.values())), opened.adapters[0], opened.base)
    adapters = {a.label: a for a in opened.adapters if a.label not in results.failed}
    spectra = pd.DataFrame(results.spectrum_rows())
    tables = pair_tables(opened, results.modules, frozenset(results.failed))
    # The matrix has sums over all modules so far; which modules are usable the tables know.
    _add_statistics(similarity_matrix, tables.pairs)
    # Which pairs are unrelated is known only now: crossed values were computed for all candidates.
    amplified = keep_unrelated(results.amplified(), tables.pairs)
    amplifications = [row for value in amplified.values() for row in amplification_rows(value)]
    first_block = {opened.adapters[i].label for i in opened.pairs.blocks[0]}
    references = [adapter.label for adapter in opened.adapters[opened.analyzed :]]
    return Study(
        adapters=adapters,
        runs=_runs_table(list(adapters.values()), spectra, tables.exclusions),
        spectra=spectra,
        pairs=tables.pairs,
        similarities=tables.similarities,
        amplifications=pd.DataFrame(amplifications, columns=AMPLIFICATION_COLUMNS),
        changes=pd.DataFrame(results.change_rows(), columns=CHANGE_COLUMNS),
        failures=left_out,
        base=opened.base,
        reference=tuple(label for label in references if label in adapters),
        unmatched=unmatched,
        warnings=results.warnings(adapters),
        similarity_matrix=similarity_matrix,
        fully_compared=tuple(label for label in adapters if label in first_block),
        across_bases=opened.pairs.across_bases,
        left_out=tables.left_out,
        options=opened.spec.options(),
        _amplified=amplified,
    )


# Classes of pairs whose input sides agree because of how they started.
_SHARED_INIT_CLASSES = (
    PairClass.SHARED_INIT,
    PairClass.GRADIENTS_ALIKE,
    PairClass.SAME_RUN,
    PairClass.STARTED_FROM_BASE,
)


def _add_statistics(matrix: SimilarityMatrix, pairs: pd.DataFrame) -> None:
    """Replace values by T of the table of pairs, so that a pair has one value; in place.

    T is over the usable modules; the input side of pairs with a shared initialization is left
    out in all module types.
    """
    index = {label: i for i, label in enumerate(matrix.labels)}
    rows = pairs["a"].map(index).to_numpy(), pairs["b"].map(index).to_numpy()
    shared = pairs["pair_class"].isin(_SHARED_INIT_CLASSES).to_numpy()
    for side, planes in matrix.overlap.items():
        values = pairs[f"mean_excess_{side}"].to_numpy()
        if side == "input":
            values = np.where(shared, np.nan, values)
            i, j = (positions[shared] for positions in rows)
            planes[:, i, j] = planes[:, j, i] = np.nan
        is_known = ~np.isnan(values) | (shared & (side == "input"))
        i, j = (positions[is_known] for positions in rows)
        planes[0, i, j] = planes[0, j, i] = values[is_known]


def _no_weight_error(reason: str, adapter: Adapter, base: BaseWeights | None) -> BaseWeightError:
    """Return the error for a base without a weight for any module; it lists both sets of names."""
    modules = [] if base is None else base.modules
    text = f"{reason} No module of {adapter.label} has a weight there."
    if match_names(adapter, modules, fits=lambda *_: False).pairs:  # no prefix would help
        return BaseWeightError(text)
    return BaseWeightError(
        f"{text} {adapter.label} has {quote_names(list(adapter))}; the base has "
        f"{quote_names(modules) or 'no weights'}. If they are the same modules, pass prefix= "
        "(command line: --prefix OLD=NEW)."
    )


def _runs_table(
    adapters: Sequence[Adapter], spectra: pd.DataFrame, exclusions: Mapping[str, Exclusion]
) -> pd.DataFrame:
    """Return one row per adapter."""
    rows = []
    earlier = earlier_checkpoints(adapters)
    named = [adapter.provenance.base_model for adapter in adapters]
    names = base_titles(named)
    for adapter, base_key in zip(adapters, resolve_keys(named), strict=True):
        modules = spectra[spectra["adapter"] == adapter.label]
        source = adapter.provenance
        rows.append(
            {
                "adapter": adapter.label,
                "task": source.task,
                "rank": source.rank,
                "seed": source.seed,
                "step": source.step,
                "earlier": adapter.label in earlier,
                "excluded": exclusions.get(adapter.label, Exclusion.NONE),
                "format": source.format,
                "base_model": names[source.base_model],
                "base_key": base_key,
                "modules": len(modules),
                "trained_modules": int((modules["numerical_rank"] > 0).sum()),
                "norm": float(np.linalg.norm(modules["norm"])) if len(modules) else np.nan,
                "scale_known": not bool(modules["in_units_of_scale"].any()),
                **{f"metric_{name}": value for name, value in source.metrics.items()},
            }
        )
    return pd.DataFrame(rows)
