"""`study`, and the tables it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lora_analysis.adapter import Adapter
from lora_analysis.bases import BaseWeights
from lora_analysis.errors import BaseWeightError, InputError, SourceError
from lora_analysis.execution import in_threads
from lora_analysis.finding import Failure, listed
from lora_analysis.names import match_names, parse_prefixes
from lora_analysis.patterns import choose_names, module_type, natural_key
from lora_analysis.progress import Progress
from lora_analysis.studies.pairs import pair_tables
from lora_analysis.studies.relations import earlier_checkpoints, shown_base
from lora_analysis.studies.result import Study
from lora_analysis.studies.rows import (
    AMPLIFICATION_COLUMNS,
    CHANGE_COLUMNS,
    amplification_rows,
)
from lora_analysis.studies.similarity_matrix import (
    MOST_AT_ONCE,
    SimilarityMatrix,
    SimilarityMatrixSums,
)
from lora_analysis.studies.spread import Question, Source, visits
from lora_analysis.studies.walk import Walk

if TYPE_CHECKING:
    from lora_analysis.execution.protocol import Executor


# Pairs of more adapters fill tables that nobody reads: 40 have 780 pairs, in every module.
MOST_IN_PAIRS = 40
DRAWS = 16


def _runs_table(adapters: Sequence[Adapter], spectra: pd.DataFrame) -> pd.DataFrame:
    rows = []
    earlier = earlier_checkpoints(adapters)
    for adapter in adapters:
        own = spectra[spectra["adapter"] == adapter.label]
        source = adapter.provenance
        rows.append(
            {
                "adapter": adapter.label,
                "task": source.task,
                "rank": source.rank,
                "seed": source.seed,
                "step": source.step,
                "earlier": adapter.label in earlier,
                "format": source.format,
                "base_model": shown_base(source.base_model),
                "modules": len(own),
                "trained_modules": int((own["numerical_rank"] > 0).sum()),
                "norm": float(np.linalg.norm(own["norm"])) if len(own) else np.nan,
                "scale_known": not bool(own["in_units_of_scale"].any()),
                **{f"metric_{name}": value for name, value in source.metrics.items()},
            }
        )
    return pd.DataFrame(rows)


def _chosen_modules(adapters: Sequence[Adapter], pattern: str | Sequence[str] | None) -> list[str]:
    names = sorted({name for adapter in adapters for name in adapter}, key=natural_key)
    if not names:
        message = f"No adapter is left to analyze: {len(adapters)} given, with no module in any."
        raise SourceError(message)
    chosen = choose_names(names, pattern)
    if not chosen:
        shown = ", ".join(names[:4])
        message = f"No module matches {pattern!r}. The adapters have {len(names)}: {shown}, ..."
        raise InputError(message)
    return chosen


def study(
    adapters: Sequence[Source],
    *,
    base: BaseWeights | str | Path | None = None,
    reference: Sequence[Source] = (),
    modules: str | Sequence[str] | None = None,
    prefix: str | Sequence[str] | Mapping[str, str] | None = None,
    transposed: bool | None = None,
    failures: Sequence[Failure] = (),
    draws: int = DRAWS,
    weight_spectra: bool = False,
    label: str | None = None,
    across_bases: bool = False,
    most_in_pairs: int = MOST_IN_PAIRS,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Study:
    """Compare adapters pair by pair and hold them against their base, module by module.

    Parameters
    ----------
    adapters
        Adapters, or sources of one or several: files, folders, globs, repositories on a hub.
    base
        The frozen weights, or their source; without it nothing is said about amplification.
    reference
        Adapters of other tasks on the same base, trained with other seeds. They are compared with
        those analyzed, not with each other, and every verdict is made against these pairs (and
        against such pairs among ``adapters``, where task and seed are known).
    modules
        The end of module names, or one regular expression; all by default.
    prefix
        Beginning of module names and what stands for it when names are matched, among adapters
        and with the base: ``"OLD=NEW"``, ``"OLD"`` for names without it, or a mapping.
    transposed
        Whether the base stores its weights as ``[in, out]``, where neither its family nor the
        shapes say so.
    failures
        Adapters that could not be read, to be carried into the report.
    draws
        Random directions drawn per module for mean and spread, for weights whose smaller side is
        at most 1024; beyond that only their exact root mean square is given.
    weight_spectra
        Whether to hold every update against W's whole spectrum too, for the table ``changes``.
        That takes about half a minute per 4096 × 4096 weight on one core the first time (see
        `linalg.gram_seconds`), and is kept on disk (see `spectra.weight_svd`).
    label
        What names say where files do not, as ``"{task}-r{rank}-s{seed}"``; ``{step}`` too, and
        ``*`` for anything. It must fit an adapter's label or the end of its path.
    across_bases
        Whether adapters that name different base models are compared too; their directions have
        nothing to do with each other.
    most_in_pairs
        Beyond so many adapters the tables of pairs hold a choice of them, some of every task and
        rank; the similarity matrix holds all.
    workers
        Threads over modules; by default the CPUs of this process, and one beyond 1,000 adapters.
    executor
        Who visits the modules in place of threads: processes, or the machines of a cluster.
        Adapters and base are then given by their sources, which every worker opens for itself.
    progress
        Called with ("modules", done, total) after each module.

    Returns
    -------
    Study
        An adapter in which a module cannot be read (non-finite values, a damaged tensor) is
        left out whole and named in ``failures``.

    Raises
    ------
    SourceError
        No adapter is left to analyze.
    BaseWeightError
        No module has a weight in the base.

    Notes
    -----
    Every module of every adapter is read and factored once.
    """
    walking = {
        "draws": draws,
        "transposed": transposed,
        "weight_spectra": weight_spectra,
        "across_bases": across_bases,
        "most": most_in_pairs,
    }
    prefixes = parse_prefixes(prefix)
    question = Question(tuple(adapters), tuple(reference), base, label, prefixes, walking)
    opened = question.opened()
    walk, named, unread = opened.walk, opened.named, [*failures, *opened.unread]
    analyzed = named[: opened.own]
    chosen = _chosen_modules(named, modules)
    sums = SimilarityMatrixSums(
        [one.label for one in named], [module_type(name) for name in chosen]
    )
    if executor is None:
        at_once = workers or (1 if len(named) > MOST_AT_ONCE else None)
        visited = in_threads(walk.visit, chosen, workers=at_once)
    else:
        visited = visits(executor, question, chosen)
    for done, visit in enumerate(visited, start=1):
        walk.visits.append(visit)
        for part in visit.similarity_matrix:
            sums.add(module_type(visit.module), part)
        visit.similarity_matrix.clear()
        if progress:
            progress("modules", done, len(chosen))
    failed, unmatched = walk.failed, walk.unmatched
    kept = [adapter for adapter in named if adapter.label not in failed]
    lost = [*unread, *(Failure(label, reason) for label, reason in failed.items())]
    if not any(adapter in kept for adapter in analyzed):
        reasons = "; ".join(f"{one.source}: {one.reason}" for one in lost) or "none was given"
        message = f"No adapter is left to analyze ({reasons})."
        raise SourceError(message)
    if unmatched and not walk.amplified:
        raise _no_weight(next(iter(unmatched.values())), analyzed[0], opened.base)
    similarity_matrix = sums.similarity_matrix(
        [at for at, one in enumerate(named) if one.label not in failed]
    )
    del sums  # as large as the similarity matrix
    asked = {
        "base": base and (str(base) if isinstance(base, str | Path) else ...),
        "modules": modules,
        "prefix": prefixes or None,
        "transposed": transposed,
        "draws": draws if base and draws != DRAWS else None,
        "weight_spectra": weight_spectra or None,
        "label": label,
        "across_bases": across_bases or None,
    }
    options = {name: value for name, value in asked.items() if value is not None}
    return _assemble(
        walk, kept, lost, opened.base, similarity_matrix=similarity_matrix, options=options
    )


def _no_weight(reason: str, adapter: Adapter, base: BaseWeights | None) -> BaseWeightError:
    """Return the error for a base that holds no module's weight; it lists both sets of names."""
    modules = [] if base is None else base.modules
    text = f"{reason} No module of {adapter.label} has a weight there."
    if match_names(adapter, modules, fits=lambda *_: False).pairs:  # no prefix would help
        return BaseWeightError(text)
    return BaseWeightError(
        f"{text} {adapter.label} has {listed(list(adapter))}; the base has "
        f"{listed(modules) or 'no weights'}. If they are the same modules, pass prefix= (command "
        "line: --prefix OLD=NEW)."
    )


def _assemble(
    walk: Walk,
    kept: Sequence[Adapter],
    lost: Sequence[Failure],
    base: BaseWeights | None,
    *,
    similarity_matrix: SimilarityMatrix,
    options: Mapping[str, object],
) -> Study:
    failed = walk.failed
    rows = (row for visit in walk.visits for row in visit.spectra)
    spectra = pd.DataFrame([row for row in rows if row["adapter"] not in failed])
    pairs, similarities = pair_tables(walk)
    amplified = {key: one for key, one in walk.amplified.items() if key[0] not in failed}
    return Study(
        adapters={adapter.label: adapter for adapter in kept},
        runs=_runs_table(kept, spectra),
        spectra=spectra,
        pairs=pairs,
        similarities=similarities,
        amplifications=pd.DataFrame(
            [row for one in amplified.values() for row in amplification_rows(one)],
            columns=AMPLIFICATION_COLUMNS,
        ),
        changes=pd.DataFrame(
            [row for visit in walk.visits for row in visit.changes if row["adapter"] not in failed],
            columns=CHANGE_COLUMNS,
        ),
        failures=tuple(lost),
        base=base,
        reference=tuple(a.label for a in kept if a.label not in walk.analyzed),
        unmatched=walk.unmatched,
        warnings={label: said for label, said in walk.warnings.items() if label not in failed},
        similarity_matrix=similarity_matrix,
        tabulated=tuple(one.label for one in kept if one in walk.paired),
        across_bases=walk.across,
        options=options,
        _amplified=amplified,
    )
