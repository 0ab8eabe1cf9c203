"""Analysis of one module of all adapters: spectra, pairs, similarity matrix, amplification.

Every update is read and factored once; no factors or singular vectors are kept in the result.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis import linalg
from lora_analysis.adapter import LowRankUpdate
from lora_analysis.amplify import Amplification, amplifications, weight_basis_energy
from lora_analysis.chance.moments import Energies
from lora_analysis.edit.interventions import noise_of_update
from lora_analysis.effective import effective_update
from lora_analysis.errors import BaseWeightError
from lora_analysis.formats.sanity_checks import (
    ModuleStatistics,
    module_statistics,
    sanity_findings,
)
from lora_analysis.init_evidence import EVIDENCE, ModuleInit, pair_init
from lora_analysis.intruders import intruder_dimensions
from lora_analysis.similarity import FINE_TUNE_DIRECTIONS
from lora_analysis.spectra import SIDES, Spectrum, update_norm, weight_svd
from lora_analysis.studies.module_walk import updates_by_shape
from lora_analysis.studies.pair_products import (
    ModulePairs,
    ModuleProducts,
    PairAngles,
    module_pairs,
    module_products,
    pair_angles,
)
from lora_analysis.studies.relations import candidate_pairs
from lora_analysis.studies.similarity_matrix import BlockedContribution, ModuleContribution
from lora_analysis.studies.table_rows import DegeneracyLevel, change_rows, spectrum_row
from lora_analysis.weight_changes import magnitude_direction, share_changed_in_bfloat16

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, Update
    from lora_analysis.bases import Weight
    from lora_analysis.finding import Finding
    from lora_analysis.studies.spec import OpenStudy

    # Updates of one module and their spectra, by the position of the adapter.
    _Updates = dict[int, tuple[Update, Spectrum]]

# Up to this length of its shorter side, the singular values of W and random draws are cheap;
# beyond it they are left out (the root mean square of random directions is exact without).
SMALL_WEIGHT = 1024
# Draws of random directions through W, for weights up to this length and for larger ones.
_THROUGH_SMALL, _THROUGH_LARGE = 4, 1


@dataclass(frozen=True, slots=True)
class PairGroup:
    """All pairs of a block of adapters that have one module in one shape.

    Attributes
    ----------
    index
        Row of each adapter in ``pairs``; -1 for adapters that are not in the group.
    pairs
        The similarities.
    angles
        Principal angles of the input and of the output side.
    ranks
        Stored ranks of the updates, ``(N,)``.
    degeneracy
        `DegeneracyLevel` of the first direction of each update, ``(N,)``.
    energies
        Energies of the directions of each update, ``(N,)``.
    """

    index: NDArray[np.intp]
    pairs: ModulePairs
    angles: tuple[PairAngles, PairAngles]
    ranks: NDArray[np.intp]
    degeneracy: NDArray[np.object_]
    energies: Energies

    def init(self, i: int, j: int) -> ModuleInit | None:
        """Return the evidence on the initialization of a pair of rows; None if one is dense."""
        evidence = self.pairs.init
        if evidence is None or np.isnan(evidence.row_cosine[i, j]):
            return None
        ranks = int(self.ranks[i]), int(self.ranks[j])
        spaces = [float(angles.weaker_half[i, j]) for angles in self.angles]
        return pair_init(evidence, i, j, self.pairs.module, ranks, spaces=(spaces[0], spaces[1]))


@dataclass(slots=True)
class ModuleResult:
    """The results for one module of all adapters."""

    module: str
    spectra: list[dict[str, Any]] = field(default_factory=list)
    groups: list[PairGroup] = field(default_factory=list)
    similarity_matrix: list[ModuleContribution | BlockedContribution] = field(default_factory=list)
    amplified: dict[tuple[str, str], Amplification] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    statistics: dict[str, ModuleStatistics] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unmatched: str | None = None


@dataclass(frozen=True, slots=True)
class ModuleResults:
    """The results for all modules, of the adapters in which every module could be read.

    Attributes
    ----------
    modules
        The results for one module each, of all adapters.
    failed
        Adapters in which a module could not be read, with the reason.
    """

    modules: Sequence[ModuleResult]
    failed: Mapping[str, str]

    @classmethod
    def of(cls, modules: Sequence[ModuleResult]) -> ModuleResults:
        """Return the results of all modules together."""
        return cls(modules, {label: why for m in modules for label, why in m.failed.items()})

    def spectrum_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the table of spectra."""
        return self._readable(row for module in self.modules for row in module.spectra)

    def change_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the table of weight changes."""
        return self._readable(row for module in self.modules for row in module.changes)

    def _readable(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if row["adapter"] not in self.failed]

    def amplified(self) -> dict[tuple[str, str], Amplification]:
        """Return the amplifications by adapter and module."""
        by_key = (item for module in self.modules for item in module.amplified.items())
        return {key: value for key, value in by_key if key[0] not in self.failed}

    def unmatched(self) -> dict[str, str]:
        """Return the modules without a weight in the base, with the reason."""
        return {result.module: result.unmatched for result in self.modules if result.unmatched}

    def warnings(self, adapters: Mapping[str, Adapter]) -> dict[str, tuple[Finding, ...]]:
        """Return the findings on implausible values, of the adapters that have any."""
        statistics: dict[str, list[ModuleStatistics]] = {}
        for result in self.modules:
            for label, of_module in result.statistics.items():
                if label in adapters:
                    statistics.setdefault(label, []).append(of_module)
        warnings = {
            label: sanity_findings(modules, adapters[label].provenance.findings)
            for label, modules in statistics.items()
        }
        return {label: findings for label, findings in warnings.items() if findings}


def analyze_module(study: OpenStudy, module: str, *, blocks: bool = True) -> ModuleResult:
    """Read, factor and compare one module of all adapters.

    Parameters
    ----------
    study
        Adapters, base and options.
    module
        Name of the module.
    blocks
        Whether many adapters may be compared in blocks in the calling process, later.
    """
    result = ModuleResult(module)
    by_position: dict[int, tuple[Update, Spectrum]] = {}
    for members, updates in updates_by_shape(study.adapters, module, result.failed):
        large = blocks and BlockedContribution.fits(updates)
        products = module_products(
            updates,
            vectors=large or study.base is not None,
            all_dense_vectors=study.spec.weight_spectra,
        )
        by_position |= dict(zip(members, zip(updates, products.spectra, strict=True), strict=True))
        pairs = None if large else module_pairs(products, updates)
        result.similarity_matrix.append(_contribution(members, updates, products, pairs))
        result.groups += _pair_groups(study, members, updates, products, pairs)
    in_order = dict(sorted(by_position.items()))
    for update, values in in_order.values():
        result.statistics[values.label] = module_statistics(update, norm=values.norm)
        result.spectra.append(spectrum_row(update, values))
    if study.base is not None:
        _compare_with_base(study, result, in_order)
    return result


def _contribution(
    members: Sequence[int],
    updates: Sequence[Update],
    products: ModuleProducts,
    pairs: ModulePairs | None,
) -> ModuleContribution | BlockedContribution:
    """Return the similarities of updates of one shape for the matrix; in blocks without pairs."""
    if pairs is not None:
        return ModuleContribution.of(members, pairs)
    factors = [update for update in updates if isinstance(update, LowRankUpdate)]
    return BlockedContribution(np.array(members, dtype=np.intp), products.spectra, factors)


def _pair_groups(
    study: OpenStudy,
    members: Sequence[int],
    updates: Sequence[Update],
    products: ModuleProducts,
    pairs: ModulePairs | None,
) -> Iterator[PairGroup]:
    """Yield the pairs of updates of one shape, one block of compared adapters at a time."""
    block_of = {i: number for number, block in enumerate(study.pairs.blocks) for i in block}
    rows_of_blocks: dict[int, list[int]] = {}
    for row, member in enumerate(members):
        if member in block_of:
            rows_of_blocks.setdefault(block_of[member], []).append(row)
    for rows in rows_of_blocks.values():
        of_block = [updates[row] for row in rows]
        is_whole = len(rows) == len(members)
        chosen = products if is_whole else products.selected(rows)
        if pairs is None:
            some = module_pairs(chosen, of_block)
        else:
            some = pairs if is_whole else _select_pairs(pairs, rows)
        positions = [members[row] for row in rows]
        yield _pair_group(some, chosen, of_block, positions=positions, count=len(study.adapters))


def _pair_group(
    pairs: ModulePairs,
    products: ModuleProducts,
    updates: Sequence[Update],
    *,
    positions: Sequence[int],
    count: int,
) -> PairGroup:
    """Return the pairs of the adapters at some ``positions`` among ``count`` adapters."""
    spectra = products.spectra
    index = np.full(count, -1)
    index[list(positions)] = np.arange(len(positions))
    # Singular values up to the numerical ranks, (N, r), filled with zeros.
    stacked = np.zeros((len(spectra), max(*(s.numerical_rank for s in spectra), 1)))
    for i, s in enumerate(spectra):
        stacked[i, : s.numerical_rank] = s.S[: s.numerical_rank]
    return PairGroup(
        index=index,
        pairs=pairs,
        angles=(
            pair_angles(products, SIDES[0], updates),
            pair_angles(products, SIDES[1], updates),
        ),
        ranks=np.array([update.rank for update in updates]),
        degeneracy=np.array([_first_degeneracy(s) for s in spectra], dtype=object),
        energies=Energies.of_spectrum(stacked),
    )


def _first_degeneracy(values: Spectrum) -> DegeneracyLevel:
    """Return how well the first direction of an update is defined."""
    if values.untrained:
        return DegeneracyLevel.NONE
    if values.degenerate[0]:
        return DegeneracyLevel.FULL
    return DegeneracyLevel.NEARLY if values.nearly_degenerate[0] else DegeneracyLevel.NONE


def _select_pairs(pairs: ModulePairs, rows: Sequence[int]) -> ModulePairs:
    """Return the pairs of some of the updates."""
    plane = np.ix_(rows, rows)

    def planes(value: object, *names: str) -> dict[str, Any]:
        return {name: getattr(value, name)[plane] for name in names}

    return replace(
        pairs,
        sides={
            side: replace(
                values,
                **planes(values, "phi_1_1", "phi_r_r", "omega", "chance_r_r", "chance_omega"),
            )
            for side, values in pairs.sides.items()
        },
        cosine=pairs.cosine[plane],
        ranks=pairs.ranks[rows],
        directions=pairs.directions[plane],
        norms=pairs.norms[rows],
        init=None
        if pairs.init is None
        else replace(pairs.init, **planes(pairs.init, *EVIDENCE, "shared")),
    )


def _compare_with_base(study: OpenStudy, result: ModuleResult, updates: _Updates) -> None:
    """Add amplifications and changes of W, one weight of the base and one shape at a time."""
    for (name, shape), members in _trained_by_weight(result.module, updates).items():
        measured = [
            position
            for position, (_, values) in members.items()
            if values.label in study.measured and not values.in_units_of_scale
        ]
        if not measured:
            continue
        try:
            weight = study.base.weight(  # type: ignore[union-attr]  # called with a base only
                name, shape=shape, transposed=study.spec.transposed
            )
        except BaseWeightError as error:
            result.unmatched = str(error)
            continue
        # A full fine-tune is compared in as many directions as the highest rank of LoRA has: all
        # of its directions span the whole space.
        ranks = [s.numerical_rank for _, s in members.values() if not s.is_dense]
        k = max(ranks, default=FINE_TUNE_DIRECTIONS)
        result.amplified |= {
            (values.label, result.module): values
            for values in _amplifications(
                study, result.module, weight, members, measured=measured, k=k
            )
        }
        if study.spec.weight_spectra:
            result.changes += _weight_changes([members[i] for i in measured], weight, k)


def _trained_by_weight(
    module: str, updates: _Updates
) -> dict[tuple[str, tuple[int, int]], _Updates]:
    """Return the trained updates of each weight of the base, by its name and their shape."""
    by_weight: dict[tuple[str, tuple[int, int]], _Updates] = {}
    for position, (update, values) in updates.items():
        if not values.untrained:
            name = update.base_name if isinstance(update, LowRankUpdate) else ""
            of_weight = by_weight.setdefault((name or module, values.shape), {})
            of_weight[position] = update, values
    return by_weight


def _amplifications(
    study: OpenStudy,
    module: str,
    weight: Weight,
    members: _Updates,
    *,
    measured: Sequence[int],
    k: int,
) -> list[Amplification]:
    """Return the amplifications of one weight by the measured ones of its updates."""
    pairs = [(a, b) for a, b in candidate_pairs(study.pairs) if a in members and b in members]
    partners = {position for pair in pairs for position in pair} - set(measured)
    order = [*measured, *sorted(partners)]
    complete = [members[position][1] for position in order]
    spectra = [values.leading(k) if values.is_dense else values for values in complete]
    small = min(weight.shape) <= SMALL_WEIGHT
    most = max(values.numerical_rank for values in spectra[: len(measured)])
    results = amplifications(
        spectra[: len(measured)],
        weight,
        draws=study.spec.draws if small else 0,
        # Different draws for every module, the same in every run.
        seed=zlib.crc32(module.encode()),
        weight_values=linalg.leading_singular_values(weight.array(), most) if small else None,
        weight_directions=False,
        partners=spectra[len(measured) :],
        unrelated=[(order.index(a), order.index(b)) for a, b in pairs],
        through_weight=_THROUGH_SMALL if small else _THROUGH_LARGE,
    )
    return [
        # ‖ΔW‖ is that of all directions, not of those that are compared.
        replace(result, relative_norm=values.norm / result.weight_norm)
        if values.is_dense and result.weight_norm
        else result
        for result, values in zip(results, complete[: len(measured)], strict=True)
    ]


def _weight_changes(
    updates: Sequence[tuple[Update, Spectrum]], weight: Weight, k: int
) -> list[dict[str, Any]]:
    """Return the rows of the changes of one weight by each update, from one SVD of the weight."""
    W = weight.array()
    decomposed = weight_svd(W)
    size = float(np.linalg.norm(decomposed.S))
    rows: list[dict[str, Any]] = []
    for update, values in updates:
        change = effective_update(update, W)  # for DoRA more than the low-rank part
        noise = noise_of_update(change, values.name)
        rows += change_rows(
            weight_basis_energy(values, decomposed),
            intruder_dimensions(change, W, weight=decomposed),
            magnitude_direction(change, W),
            k=min(k if values.is_dense else values.numerical_rank, len(decomposed.S)),
            relative_change=update_norm(change) / size if size else np.nan,
            changed_in_bfloat16=share_changed_in_bfloat16(change, W),
            noise=intruder_dimensions(noise, W, weight=decomposed),
            noise_in_bfloat16=share_changed_in_bfloat16(noise, W),
        )
    return rows
