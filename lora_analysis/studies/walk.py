"""One pass over the modules, gathering what the tables are made of."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from lora_analysis import linalg
from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate
from lora_analysis.amplify import Amplification, amplification
from lora_analysis.bases import BaseWeights
from lora_analysis.errors import BaseWeightError, InputError
from lora_analysis.initialisation import ModuleStart, SharedStart, judge_start, module_start
from lora_analysis.spectra import Spectrum, spectrum
from lora_analysis.studies.relations import REFERENCE, Relation, relation
from lora_analysis.studies.rows import similarity_rows, spectrum_row

# Up to this size of the smaller side, W's own singular values and random draws cost little next
# to the rest; beyond it they are left out (the root mean square of random directions is exact).
SMALL_WEIGHT = 1024


@dataclass(slots=True)
class Pair:
    """What is gathered about one pair while the modules go by."""

    a: Adapter
    b: Adapter
    relation: Relation
    starts: list[ModuleStart] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    common: int = 0
    mismatched: list[str] = field(default_factory=list)
    products: list[tuple[float, float, float]] = field(default_factory=list)

    def add(
        self, updates: Mapping[str, LowRankUpdate | DenseUpdate], spectra: Mapping[str, Spectrum]
    ) -> None:
        """Compare the two in one module, if both have it and it has one shape."""
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


class Walk:
    """One pass over the modules: never more than one module of every adapter in memory."""

    def __init__(
        self,
        adapters: Sequence[Adapter],
        reference: Sequence[Adapter],
        base: BaseWeights | None,
        *,
        draws: int,
        transposed: bool | None,
    ) -> None:
        self.adapters = (*adapters, *reference)
        self.analysed = {adapter.label for adapter in adapters}
        self.base = base
        self.draws = draws
        self.transposed = transposed
        self.failed: dict[str, str] = {}
        self.unmatched: dict[str, str] = {}
        self.spectra: list[dict[str, Any]] = []
        self.pairs = [Pair(a, b, relation(a, b)) for a, b in combinations(adapters, 2)]
        # The user says that these are unrelated; how they are related to each other is not asked.
        self.pairs += [Pair(a, b, REFERENCE) for a in adapters for b in reference]
        self.amplified: dict[tuple[str, str], Amplification] = {}

    def visit(self, module: str) -> None:
        """Read, factor and compare one module of every adapter."""
        updates = dict(self._load(module))
        spectra = {label: spectrum(update) for label, update in updates.items()}
        self.spectra += [spectrum_row(updates[label], value) for label, value in spectra.items()]
        for pair in self.pairs:
            pair.add(updates, spectra)
        if self.base is not None:
            own = [s for s in spectra.values() if s.label in self.analysed and not s.untrained]
            self._amplify(module, own)

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
            try:
                weight = self.base.weight(  # type: ignore[union-attr]  # asked for with a base only
                    module, shape=group[0].shape, transposed=self.transposed
                )
            except BaseWeightError as error:
                self.unmatched[module] = str(error)
                continue
            small = min(weight.shape) <= SMALL_WEIGHT
            most = max(s.numerical_rank for s in group)
            values = linalg.leading_singular_values(weight.array(), most) if small else None
            for value in group:
                self.amplified[value.label, module] = amplification(
                    value,
                    weight,
                    draws=self.draws if small else 0,
                    # Own draws for every module, the same ones in every run.
                    seed=zlib.crc32(module.encode()),
                    weight_values=values,
                    weight_directions=False,
                )


def _by_shape(spectra: Sequence[Spectrum]) -> list[list[Spectrum]]:
    groups: dict[tuple[int, int], list[Spectrum]] = {}
    for value in spectra:
        groups.setdefault(value.shape, []).append(value)
    return list(groups.values())
