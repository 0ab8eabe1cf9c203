"""Many adapters: which pairs are compared, module by module, as labelled tables.

Nothing is judged here. `findings` turns these tables into sentences, `report` shows both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from lora_analysis import chance, linalg
from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate
from lora_analysis.amplify import Amplification, amplification
from lora_analysis.bases import BaseWeights, open_base
from lora_analysis.errors import InputError, SourceError
from lora_analysis.formats import read_adapter
from lora_analysis.initialisation import ModuleStart, SharedStart, judge_start, module_start
from lora_analysis.patterns import layer_index, matches_target, module_type, natural_key
from lora_analysis.similarity import (
    SimilarityGrid,
    energy_overlap,
    principal_angles,
    signed_cosine,
    subspace_similarity,
)
from lora_analysis.spectra import SIDES, Factor, Side, Spectrum, spectrum

if TYPE_CHECKING:
    from collections.abc import Mapping

Relation = Literal[
    "same task, other rank",
    "same task, other seed",
    "same task, other rank and seed",
    "same task, rank and seed",
    "other task, other seed",
    "other task, same seed",
    "unknown",
]
REFERENCE: Relation = "other task, other seed"
SHARED_SEED: Relation = "other task, same seed"

# W's own singular values are found without asking up to this size of the smaller side.
WEIGHT_SVD_LIMIT = 1024

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Failure:
    """An adapter that could not be analysed, and why."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """Adapters and every result about them, as tables.

    Attributes
    ----------
    adapters
        Those that were analysed, by label.
    runs
        One row per adapter: task, rank, seed, modules, norm, metrics of its training.
    spectra
        One row per adapter and module: ranks, norms, leading singular values.
    pairs
        One row per pair of adapters: their relation, and whether they share their start.
    similarities
        One row per pair, module and side: φ(1, 1), φ(r, r), ω with their chance, angles, cosine.
    amplifications
        One row per adapter, module and k; empty without a base.
    failures
        What could not be analysed.
    base
        The frozen weights, if given.
    """

    adapters: Mapping[str, Adapter]
    runs: pd.DataFrame
    spectra: pd.DataFrame
    pairs: pd.DataFrame
    similarities: pd.DataFrame
    amplifications: pd.DataFrame
    failures: tuple[Failure, ...] = ()
    base: BaseWeights | None = None
    _amplified: Mapping[tuple[str, str], Amplification] = field(default_factory=dict)

    def grid(
        self, a: str, b: str, module: str, *, side: Side = "input", factor: Factor = "delta"
    ) -> SimilarityGrid:
        """Return φ(i, j) of two adapters by label for one module, computed now."""
        return subspace_similarity(
            self.adapters[a][module], self.adapters[b][module], side=side, factor=factor
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

    def select(self, relation: Relation, side: Side) -> pd.DataFrame:
        """Return the rows of ``similarities`` with one relation and side."""
        table = self.similarities
        return table[(table["relation"] == relation) & (table["side"] == side)]


def unique_labels(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters with labels made unique by a number where two are the same."""
    seen: dict[str, int] = {}
    result = []
    for adapter in adapters:
        seen[adapter.label] = count = seen.get(adapter.label, 0) + 1
        result.append(adapter if count == 1 else adapter.relabelled(f"{adapter.label} ({count})"))
    return result


def relation(a: Adapter, b: Adapter) -> Relation:
    """Return how two adapters are related, from task, rank and seed; "unknown" without them."""
    one, two = a.provenance, b.provenance
    if None in (one.task, two.task, one.seed, two.seed):
        return "unknown"
    if one.task != two.task:
        return SHARED_SEED if one.seed == two.seed else REFERENCE
    if one.seed == two.seed:
        return "same task, rank and seed" if one.rank == two.rank else "same task, other rank"
    return "same task, other seed" if one.rank == two.rank else "same task, other rank and seed"


def _spectrum_row(update: Spectrum) -> dict[str, Any]:
    s = update.S
    return {
        "adapter": update.label,
        "module": update.name,
        "module_type": module_type(update.name),
        "layer": layer_index(update.name),
        "d_out": update.shape[0],
        "d_in": update.shape[1],
        "rank": update.rank,
        "numerical_rank": update.numerical_rank,
        "effective_rank": update.effective_rank,
        "stable_rank": update.stable_rank,
        "energy_rank_90": update.energy_rank(0.9),
        "energy_rank_99": update.energy_rank(0.99),
        "participation_ratio": update.participation_ratio,
        "norm": update.norm,
        "sigma_1": float(s[0]),
        "in_units_of_scale": update.in_units_of_scale,
        "stored_dtype": update.stored_dtype,
    }


def _scale_of(update: LowRankUpdate | DenseUpdate) -> dict[str, float | None]:
    if isinstance(update, DenseUpdate):
        return {"scale": 1.0, "alpha": None}
    return {"scale": update.scale, "alpha": update.alpha}


def similarity_rows(a: Spectrum, b: Spectrum) -> list[dict[str, Any]]:
    """Return one row per side for two trained updates of one module (see `Study`)."""
    cosine = signed_cosine(a, b)
    rows = []
    for side in SIDES:
        grid = subspace_similarity(a, b, side=side)
        i, j = grid.values.shape
        angles = principal_angles(a, b, side=side, k=(i, j))
        rows.append(
            {
                "module": a.name,
                "module_type": module_type(a.name),
                "layer": layer_index(a.name),
                "side": side,
                "dimension": grid.dimension,
                "rank_a": i,
                "rank_b": j,
                "phi_1_1": grid.at(1, 1),
                "chance_1_1": float(grid.chance[0, 0]),
                "ill_defined_1_1": grid.ill_defined(1, 1),
                "phi_r_r": grid.at(i, j),
                "chance_r_r": float(grid.chance[-1, -1]),
                "excess_r_r": float(grid.excess[-1, -1]),
                "omega": energy_overlap(a, b, side=side),
                "omega_chance": chance.energy_overlap_mean(
                    grid.dimension, (a.participation_ratio, b.participation_ratio)
                ),
                "smallest_angle": float(angles[0]),
                "largest_angle": float(angles[-1]),
                "signed_cosine": cosine,
            }
        )
    return rows


@dataclass(slots=True)
class _Pair:
    """What is gathered about one pair while the modules go by."""

    a: Adapter
    b: Adapter
    starts: list[ModuleStart] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    common: int = 0
    mismatched: list[str] = field(default_factory=list)
    products: list[tuple[float, float, float]] = field(default_factory=list)

    def add(
        self, updates: Mapping[str, LowRankUpdate | DenseUpdate], spectra: Mapping[str, Spectrum]
    ) -> None:
        if self.a.label not in updates or self.b.label not in updates:
            return
        one, two = updates[self.a.label], updates[self.b.label]
        if one.shape != two.shape:
            self.mismatched.append(one.name)
            return
        self.common += 1
        if isinstance(one, LowRankUpdate) and isinstance(two, LowRankUpdate):
            self.starts.append(module_start(one, two))
        first, second = spectra[self.a.label], spectra[self.b.label]
        if first.untrained or second.untrained:
            return
        self.rows += similarity_rows(first, second)
        cosine = self.rows[-1]["signed_cosine"]
        self.products.append((cosine * first.norm * second.norm, first.norm, second.norm))

    def start(self) -> SharedStart:
        """Return the verdict on the pair's start; wide adapters fill the space by chance."""
        spans = [
            row["phi_r_r"]
            for row in self.rows
            if row["side"] == "input" and row["chance_r_r"] <= 0.35
        ]
        return judge_start(self.starts, spans)

    def total_cosine(self) -> float:
        """Return the signed cosine of the two updates over all common modules at once."""
        if not self.products:
            return float("nan")
        inner, norm_a, norm_b = np.array(self.products).T
        return float(inner.sum() / (np.linalg.norm(norm_a) * np.linalg.norm(norm_b)))


def _pair_tables(pairs: Iterable[_Pair]) -> tuple[pd.DataFrame, pd.DataFrame]:
    summaries, rows = [], []
    for pair in pairs:
        start = pair.start()
        names = {"a": pair.a.label, "b": pair.b.label, "relation": relation(pair.a, pair.b)}
        shared = set(start.modules)
        summaries.append(
            {
                **names,
                "modules": pair.common,
                "mismatched_modules": len(pair.mismatched),
                "start": start.kind,
                "shared_modules": len(start.modules),
                "b_cosine": start.other_cosine,
                "total_cosine": pair.total_cosine(),
            }
        )
        rows += [
            {
                **names,
                **row,
                "start": start.kind,
                "shared_start": row["module"] in shared or start.contaminates_input,
            }
            for row in pair.rows
        ]
    return pd.DataFrame(summaries), pd.DataFrame(rows)


def _amplification_rows(result: Amplification) -> Iterator[dict[str, Any]]:
    for at, k in enumerate(result.k):
        yield {
            "adapter": result.label,
            "module": result.module,
            "module_type": module_type(result.module),
            "layer": layer_index(result.module),
            "k": int(k),
            "at_rank": bool(k == len(result.S)),
            "projected": result.projected[at],
            "projected_weight": np.nan if result.weight_top is None else result.weight_top[at],
            "projected_random": result.random.rms[at],
            "delta_norm": float(np.linalg.norm(result.S[:k])),
            "weight_norm": result.weight_norm,
            "relative_norm": result.relative_norm,
            "amplification_factor": result.amplification_factor[at],
            "chance_factor": result.chance_factor[at],
            "enrichment": result.enrichment[at],
        }


class _Walk:
    """One pass over the modules: never more than one module of every adapter in memory."""

    def __init__(self, adapters: Sequence[Adapter], base: BaseWeights | None, draws: int) -> None:
        self.adapters = adapters
        self.base = base
        self.draws = draws
        self.failed: dict[str, str] = {}
        self.spectra: list[dict[str, Any]] = []
        self.pairs = [_Pair(a, b) for a, b in combinations(adapters, 2)]
        self.amplified: dict[tuple[str, str], Amplification] = {}

    def visit(self, module: str) -> None:
        updates = dict(self._load(module))
        spectra = {label: spectrum(update) for label, update in updates.items()}
        self.spectra += [
            _spectrum_row(value) | _scale_of(updates[label]) for label, value in spectra.items()
        ]
        for pair in self.pairs:
            pair.add(updates, spectra)
        if self.base is not None:
            self._amplify(module, [s for s in spectra.values() if not s.untrained])

    def _load(self, module: str) -> Iterator[tuple[str, LowRankUpdate | DenseUpdate]]:
        for adapter in self.adapters:
            if adapter.label in self.failed or module not in adapter:
                continue
            try:
                yield adapter.label, adapter[module]
            except InputError as error:
                self.failed[adapter.label] = str(error)

    def _amplify(self, module: str, spectra: Sequence[Spectrum]) -> None:
        known = [s for s in spectra if not s.in_units_of_scale]
        for group in _by_shape(known):
            weight = self.base.weight(module, shape=group[0].shape)  # type: ignore[union-attr]
            wanted = min(weight.shape) <= WEIGHT_SVD_LIMIT
            most = max(s.numerical_rank for s in group)
            values = linalg.leading_singular_values(weight.array(), most) if wanted else None
            for value in group:
                self.amplified[value.label, module] = amplification(
                    value,
                    weight,
                    draws=self.draws,
                    weight_values=values,
                    weight_directions=False,
                )


def _by_shape(spectra: Sequence[Spectrum]) -> list[list[Spectrum]]:
    groups: dict[tuple[int, int], list[Spectrum]] = {}
    for value in spectra:
        groups.setdefault(value.shape, []).append(value)
    return list(groups.values())


def _runs_table(adapters: Sequence[Adapter], spectra: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for adapter in adapters:
        own = spectra[spectra["adapter"] == adapter.label]
        source = adapter.provenance
        rows.append(
            {
                "adapter": adapter.label,
                "task": source.task,
                "rank": source.rank,
                "seed": source.seed,
                "format": source.format,
                "base_model": source.base_model,
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
    if pattern is None:
        return names
    chosen = [name for name in names if matches_target(name, pattern)]
    if not chosen:
        shown = ", ".join(names[:4])
        message = f"No module matches {pattern!r}. The adapters have {len(names)}: {shown}, ..."
        raise InputError(message)
    return chosen


def study(
    adapters: Sequence[Adapter | str | Path],
    *,
    base: BaseWeights | str | Path | None = None,
    modules: str | Sequence[str] | None = None,
    failures: Sequence[Failure] = (),
    draws: int = 16,
    progress: Progress | None = None,
) -> Study:
    """Compare adapters pair by pair and hold them against their base, module by module.

    Parameters
    ----------
    adapters
        Adapters, or sources that `read_adapter` takes.
    base
        The frozen weights, or their source; without it nothing is said about amplification.
    modules
        Names by suffix, or one regular expression; all by default.
    failures
        Adapters that could not be read, to be carried into the report.
    draws
        Random directions drawn per module for mean and spread.
    progress
        Called with ("module", done, total) after each module.

    Returns
    -------
    Study
        An adapter in which a module cannot be read (non-finite values, a damaged tensor) is
        left out whole and named in ``failures``.

    Raises
    ------
    SourceError
        No adapter is left to analyse.

    Notes
    -----
    Every module of every adapter is read and factored once.
    """
    read = [one if isinstance(one, Adapter) else read_adapter(one) for one in adapters]
    named = unique_labels(read)
    opened = open_base(base) if isinstance(base, str | Path) else base
    walk = _Walk(named, opened, draws)
    chosen = _chosen_modules(named, modules)
    for done, module in enumerate(chosen, start=1):
        walk.visit(module)
        if progress:
            progress("module", done, len(chosen))
    kept = [adapter for adapter in named if adapter.label not in walk.failed]
    lost = [*failures, *(Failure(label, reason) for label, reason in walk.failed.items())]
    if not kept:
        reasons = "; ".join(f"{one.source}: {one.reason}" for one in lost) or "none was given"
        message = f"No adapter is left to analyse ({reasons})."
        raise SourceError(message)
    return _assemble(walk, kept, lost, opened)


def _assemble(
    walk: _Walk, kept: Sequence[Adapter], lost: Sequence[Failure], base: BaseWeights | None
) -> Study:
    spectra = pd.DataFrame([row for row in walk.spectra if row["adapter"] not in walk.failed])
    pairs, similarities = _pair_tables(
        pair for pair in walk.pairs if {pair.a.label, pair.b.label}.isdisjoint(walk.failed)
    )
    amplified = {key: one for key, one in walk.amplified.items() if key[0] not in walk.failed}
    return Study(
        adapters={adapter.label: adapter for adapter in kept},
        runs=_runs_table(kept, spectra),
        spectra=spectra,
        pairs=pairs,
        similarities=similarities,
        amplifications=pd.DataFrame(
            [row for one in amplified.values() for row in _amplification_rows(one)]
        ),
        failures=tuple(lost),
        base=base,
        _amplified=amplified,
    )
