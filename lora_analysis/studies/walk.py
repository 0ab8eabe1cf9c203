"""One pass over the modules, gathering what the tables are made of."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_analysis import linalg
from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate
from lora_analysis.amplify import Amplification, amplifications, weight_basis_energy
from lora_analysis.bases import BaseWeights, Weight
from lora_analysis.effective import effective_update
from lora_analysis.errors import BaseWeightError, InputError
from lora_analysis.finding import Finding
from lora_analysis.formats.sanity_checks import (
    ModuleStatistics,
    module_statistics,
    sanity_findings,
)
from lora_analysis.intruders import intruder_dimensions
from lora_analysis.pairwise import ModulePairs, module_pairs, pair_angles
from lora_analysis.shared_init import InitEvidence, ModuleInit, module_start_of
from lora_analysis.spectra import SIDES, Spectrum, spectrum, weight_svd
from lora_analysis.studies.bases import other_bases
from lora_analysis.studies.representative_modules import choose_pairs
from lora_analysis.studies.rows import change_rows, spectrum_row
from lora_analysis.studies.similarity_matrix import BlockedContribution, ModuleContribution
from lora_analysis.weight_changes import magnitude_direction

# Up to this size of the smaller side, W's own singular values and random draws cost little next
# to the rest; beyond it they are left out (the root mean square of random directions is exact).
SMALL_WEIGHT = 1024

Angles = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Group:
    """The adapters that have one module in one shape, and all of their pairs.

    ``place`` gives an adapter's row in ``pairs``, -1 for those that are not in the group.
    """

    place: NDArray[np.intp]
    pairs: ModulePairs
    angles: tuple[Angles, Angles]
    ranks: NDArray[np.intp]
    degeneracy: NDArray[np.object_]

    def start(self, a: int, b: int) -> ModuleInit | None:
        """Return the evidence on two adapters' start; None where one is dense, or not here."""
        i, j = int(self.place[a]), int(self.place[b])
        evidence = self.pairs.start
        if i < 0 or j < 0 or evidence is None or np.isnan(evidence.row_cosine[i, j]):
            return None
        ranks = int(self.ranks[i]), int(self.ranks[j])
        return module_start_of(evidence, i, j, self.pairs.module, ranks)


@dataclass(slots=True)
class Visit:
    """What one module gave. No factors or vectors are kept."""

    module: str
    spectra: list[dict[str, Any]] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    similarity_matrix: list[ModuleContribution | BlockedContribution] = field(default_factory=list)
    amplified: dict[tuple[str, str], Amplification] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    statistics: dict[str, ModuleStatistics] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unmatched: str | None = None


class Walk:
    """Which adapters are compared, and what is gathered from each module.

    ``pairs`` holds the two places in ``adapters`` of every pair that is compared, ``relations``
    how they are related; ``across`` counts the pairs of different bases, which are not. Only
    adapters at ``tabulated`` places get into the tables of pairs: all, up to ``most``.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        reference: Sequence[Adapter],
        base: BaseWeights | None,
        *,
        draws: int,
        transposed: bool | None,
        weight_spectra: bool,
        across_bases: bool,
        most: int,
    ) -> None:
        self.adapters = (*adapters, *reference)
        named = {adapter.label: adapter.provenance.base_model for adapter in adapters}
        self.analyzed = set(named)
        self.measured = self.analyzed - other_bases(named, base)
        self.base = base
        self.draws = draws
        self.transposed = transposed
        self.weight_spectra = weight_spectra
        self.visits: list[Visit] = []
        chosen = choose_pairs(adapters, reference, across_bases=across_bases, most=most)
        self.tabulated, self.pairs = chosen.tabulated, chosen.pairs
        self.relations, self.across = chosen.relations, chosen.across

    @property
    def paired(self) -> set[Adapter]:
        """The adapters in the tables of pairs."""
        return {self.adapters[at] for at in self.tabulated}

    @property
    def failed(self) -> dict[str, str]:
        """Adapters in which a module could not be read, and why."""
        return {label: why for visit in self.visits for label, why in visit.failed.items()}

    @property
    def warnings(self) -> dict[str, tuple[Finding, ...]]:
        """Findings of the sanity checks, by adapter; each is decided over all its modules."""
        by_label: dict[str, list[ModuleStatistics]] = {}
        for visit in self.visits:
            for label, statistics in visit.statistics.items():
                by_label.setdefault(label, []).append(statistics)
        known = {adapter.label: adapter.provenance.findings for adapter in self.adapters}
        warnings = {
            label: sanity_findings(modules, known[label]) for label, modules in by_label.items()
        }
        return {label: findings for label, findings in warnings.items() if findings}

    @property
    def unmatched(self) -> dict[str, str]:
        """Modules without a weight in the base, and why."""
        return {one.module: one.unmatched for one in self.visits if one.unmatched}

    @property
    def amplified(self) -> dict[tuple[str, str], Amplification]:
        """Every amplification, by adapter and module."""
        return {key: one for visit in self.visits for key, one in visit.amplified.items()}

    def visit(self, module: str, *, blocks: bool = True) -> Visit:
        """Read, factor and compare one module of every adapter.

        ``blocks`` leaves the comparison of many adapters to the calling process.
        """
        visit = Visit(module)
        updates = dict(self._load(module, visit.failed))
        spectra = {at: spectrum(update) for at, update in updates.items()}
        visit.statistics = {
            value.label: module_statistics(updates[at], norm=value.norm)
            for at, value in spectra.items()
        }
        visit.spectra = [spectrum_row(updates[at], value) for at, value in spectra.items()]
        for members in _by_shape(spectra):
            visit.similarity_matrix.append(
                self._in_similarity_matrix(members, spectra, updates, visit, blocks=blocks)
            )
        if self.base is not None:
            by_label = {s.label: updates[at] for at, s in spectra.items()}
            by_weight: dict[str, list[Spectrum]] = {}
            for at, s in spectra.items():
                if s.label in self.measured and not s.untrained:
                    by_weight.setdefault(_base_name(updates[at]) or module, []).append(s)
            for name, own in by_weight.items():
                self._amplify(module, name, own, visit, by_label)
        return visit

    def _in_similarity_matrix(
        self,
        members: Sequence[int],
        spectra: Mapping[int, Spectrum],
        updates: Mapping[int, LowRankUpdate | DenseUpdate],
        visit: Visit,
        *,
        blocks: bool,
    ) -> ModuleContribution | BlockedContribution:
        """Return a module's contribution to the similarity matrix; add tabulated pairs."""
        large = blocks and BlockedContribution.fits([updates[at] for at in members])
        chosen = set(self.tabulated)
        compared = [at for at in members if at in chosen] if large else members
        part: ModuleContribution | BlockedContribution
        if compared:
            own = [updates[at] for at in compared]
            pairs = module_pairs([spectra[at] for at in compared], own)
            if group := self._compared({at: spectra[at] for at in compared}, updates, pairs):
                visit.groups.append(group)
        if large:
            factors = [one for at in members if isinstance(one := updates[at], LowRankUpdate)]
            places = np.array(members, dtype=np.intp)
            part = BlockedContribution(places, [spectra[at] for at in members], factors)
        else:
            part = ModuleContribution.of(members, pairs)
        return part

    def _load(
        self, module: str, failed: dict[str, str]
    ) -> Iterator[tuple[int, LowRankUpdate | DenseUpdate]]:
        for at, adapter in enumerate(self.adapters):
            if module in adapter:
                try:
                    yield at, adapter[module]
                except InputError as error:
                    failed[adapter.label] = str(error)

    def _compared(
        self,
        spectra: Mapping[int, Spectrum],
        updates: Mapping[int, LowRankUpdate | DenseUpdate],
        pairs: ModulePairs,
    ) -> Group | None:
        chosen = set(self.tabulated)
        kept = [(row, at) for row, at in enumerate(spectra) if at in chosen]
        if not kept:
            return None
        members = [at for _, at in kept]
        values = [spectra[at] for at in members]
        place = np.full(len(self.adapters), -1)
        place[members] = np.arange(len(members))
        return Group(
            place=place,
            pairs=pairs if len(kept) == len(spectra) else _part(pairs, [row for row, _ in kept]),
            angles=(pair_angles(values, SIDES[0]), pair_angles(values, SIDES[1])),
            ranks=np.array([updates[at].rank for at in members]),
            degeneracy=np.array([_first_direction(one) for one in values], dtype=object),
        )

    def _amplify(
        self,
        module: str,
        name: str,
        spectra: Sequence[Spectrum],
        visit: Visit,
        updates: Mapping[str, LowRankUpdate | DenseUpdate],
    ) -> None:
        """Hold the updates of a module against the base's weight called ``name``."""
        known = [s for s in spectra if not s.in_units_of_scale]
        for members in _by_shape(dict(enumerate(known))):
            group = [known[at] for at in members]
            try:
                weight = self.base.weight(  # type: ignore[union-attr]  # asked for with a base only
                    name, shape=group[0].shape, transposed=self.transposed
                )
            except BaseWeightError as error:
                visit.unmatched = str(error)
                continue
            small = min(weight.shape) <= SMALL_WEIGHT
            most = max(s.numerical_rank for s in group)
            values = linalg.leading_singular_values(weight.array(), most) if small else None
            found = amplifications(
                group,
                weight,
                draws=self.draws if small else 0,
                # Own draws for every module, the same ones in every run.
                seed=zlib.crc32(module.encode()),
                weight_values=values,
                weight_directions=False,
            )
            visit.amplified |= {(one.label, module): one for one in found}
            if self.weight_spectra:
                visit.changes += _changes(group, updates, weight)


def _part(pairs: ModulePairs, rows: Sequence[int]) -> ModulePairs:
    """Return the pairs of some of the updates."""
    plane = np.ix_(rows, rows)
    start = pairs.start
    return replace(
        pairs,
        sides={
            side: replace(
                values,
                phi_1_1=values.phi_1_1[plane],
                phi_r_r=values.phi_r_r[plane],
                omega=values.omega[plane],
                chance_r_r=values.chance_r_r[plane],
                chance_omega=values.chance_omega[plane],
            )
            for side, values in pairs.sides.items()
        },
        cosine=pairs.cosine[plane],
        ranks=pairs.ranks[rows],
        norms=pairs.norms[rows],
        start=None
        if start is None
        else InitEvidence(
            start.row_cosine[plane],
            start.cross_cosine[plane],
            start.z[plane],
            start.other_cosine[plane],
            start.shared[plane],
        ),
    )


def _changes(
    spectra: Sequence[Spectrum],
    updates: Mapping[str, LowRankUpdate | DenseUpdate],
    weight: Weight,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of what every update makes of one weight, whose spectrum is found once."""
    whole = weight_svd(weight)
    for one in spectra:
        change = effective_update(updates[one.label], weight)  # of DoRA more than the low-rank part
        yield from change_rows(
            weight_basis_energy(one, whole),
            intruder_dimensions(change, weight, weight=whole),
            magnitude_direction(change, weight),
        )


def _base_name(update: LowRankUpdate | DenseUpdate) -> str:
    """Return the name of the base's weight where it is not the module's."""
    return update.base_name if isinstance(update, LowRankUpdate) else ""


def _by_shape(spectra: Mapping[int, Spectrum]) -> list[list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for at, value in spectra.items():
        groups.setdefault(value.shape, []).append(at)
    return list(groups.values())


def _first_direction(value: Spectrum) -> str:
    """Return the degeneracy of the first direction: "degenerate", "nearly degenerate" or ""."""
    if value.untrained:
        return ""
    return (
        "degenerate"
        if value.degenerate[0]
        else "nearly degenerate"
        if value.nearly_degenerate[0]
        else ""
    )
