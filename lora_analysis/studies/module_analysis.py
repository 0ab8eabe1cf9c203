"""Analysis of one module of all adapters: spectra, pairs, similarity matrix, amplification.

Every update is read and factored once; no factors or singular vectors are kept in the result.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
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
from lora_analysis.formats.sanity_checks import ModuleStatistics, module_statistics
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
from lora_analysis.studies.table_rows import Degeneracy, change_rows, spectrum_row
from lora_analysis.weight_changes import magnitude_direction, share_changed_in_bfloat16

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Update
    from lora_analysis.bases import Weight
    from lora_analysis.studies.spec import OpenStudy

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
        `Degeneracy` of the first direction of each update, ``(N,)``.
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
    block_of = {i: number for number, block in enumerate(study.pairs.blocks) for i in block}
    by_position: dict[int, tuple[Update, Spectrum]] = {}
    for members, updates in updates_by_shape(study.adapters, module, result.failed):
        large = blocks and BlockedContribution.fits(updates)
        products = module_products(
            updates,
            vectors=large or study.base is not None,
            all_dense_vectors=study.spec.weight_spectra,
        )
        spectra = products.spectra
        by_position |= dict(zip(members, zip(updates, spectra, strict=True), strict=True))
        pairs = None if large else module_pairs(products, updates)
        if pairs is None:
            factors = [update for update in updates if isinstance(update, LowRankUpdate)]
            positions = np.array(members, dtype=np.intp)
            result.similarity_matrix.append(BlockedContribution(positions, spectra, factors))
        else:
            result.similarity_matrix.append(ModuleContribution.of(members, pairs))
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
                some = pairs if is_whole else _selected(pairs, rows)
            result.groups.append(
                _pair_group(
                    some,
                    chosen,
                    of_block,
                    positions=[members[row] for row in rows],
                    count=len(study.adapters),
                )
            )
    in_order = dict(sorted(by_position.items()))
    for update, values in in_order.values():
        result.statistics[values.label] = module_statistics(update, norm=values.norm)
        result.spectra.append(spectrum_row(update, values))
    if study.base is not None:
        _compare_with_base(study, result, in_order)
    return result


def _pair_group(
    pairs: ModulePairs,
    products: ModuleProducts,
    updates: Sequence[Update],
    *,
    positions: Sequence[int],
    count: int,
) -> PairGroup:
    spectra = products.spectra
    index = np.full(count, -1)
    index[list(positions)] = np.arange(len(positions))
    # Singular values up to the numerical ranks, (N, r), filled with zeros.
    stacked = np.zeros((len(spectra), max(*(s.numerical_rank for s in spectra), 1)))
    degeneracy = np.full(len(spectra), Degeneracy.NONE, dtype=object)
    for i, s in enumerate(spectra):
        stacked[i, : s.numerical_rank] = s.S[: s.numerical_rank]
        if not s.untrained and s.degenerate[0]:
            degeneracy[i] = Degeneracy.FULL
        elif not s.untrained and s.nearly_degenerate[0]:
            degeneracy[i] = Degeneracy.NEARLY
    return PairGroup(
        index=index,
        pairs=pairs,
        angles=(
            pair_angles(products, SIDES[0], updates),
            pair_angles(products, SIDES[1], updates),
        ),
        ranks=np.array([update.rank for update in updates]),
        degeneracy=degeneracy,
        energies=Energies.of_spectrum(stacked),
    )


def _selected(pairs: ModulePairs, rows: Sequence[int]) -> ModulePairs:
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


def _compare_with_base(
    study: OpenStudy, result: ModuleResult, updates: Mapping[int, tuple[Update, Spectrum]]
) -> None:
    """Add amplifications and changes of W, one weight of the base and one shape at a time."""
    groups: dict[tuple[str, tuple[int, int]], dict[int, tuple[Update, Spectrum]]] = {}
    for position, (update, values) in updates.items():
        if not values.untrained:
            name = update.base_name if isinstance(update, LowRankUpdate) else ""
            group = groups.setdefault((name or result.module, values.shape), {})
            group[position] = update, values
    candidates = candidate_pairs(study.pairs)
    for (name, shape), members in groups.items():
        # A full fine-tune is compared in as many directions as the highest rank of LoRA has: all
        # of its directions span the whole space.
        ranks = [s.numerical_rank for _, s in members.values() if not s.is_dense]
        k = max(ranks, default=FINE_TUNE_DIRECTIONS)
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
        pairs = [(a, b) for a, b in candidates if a in members and b in members]
        crossed = {position for pair in pairs for position in pair}
        order = [*measured, *sorted(crossed - set(measured))]
        whole = [members[position][1] for position in order]
        spectra = [values.leading(k) if values.is_dense else values for values in whole]
        small = min(weight.shape) <= SMALL_WEIGHT
        most = max(values.numerical_rank for values in spectra[: len(measured)])
        amplified = amplifications(
            spectra[: len(measured)],
            weight,
            draws=study.spec.draws if small else 0,
            # Different draws for every module, the same in every run.
            seed=zlib.crc32(result.module.encode()),
            weight_values=linalg.leading_singular_values(weight.array(), most) if small else None,
            weight_directions=False,
            partners=spectra[len(measured) :],
            unrelated=[(order.index(a), order.index(b)) for a, b in pairs],
            through_weight=_THROUGH_SMALL if small else _THROUGH_LARGE,
        )
        amplified = [
            # ‖ΔW‖ is that of all directions, not of those that are compared.
            replace(values, relative_norm=complete.norm / values.weight_norm)
            if complete.is_dense and values.weight_norm
            else values
            for values, complete in zip(amplified, whole, strict=False)
        ]
        result.amplified |= {(values.label, result.module): values for values in amplified}
        if study.spec.weight_spectra:
            result.changes += _weight_changes([members[i] for i in measured], weight, k)


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
