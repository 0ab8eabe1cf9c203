"""All pairs of adapters in every module, as arrays: each update is factored once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.formats import as_adapter, unique_labels
from lora_analysis.names import parse_prefixes
from lora_analysis.results import frame, short_repr
from lora_analysis.spectra import SIDES, Side
from lora_analysis.studies.module_walk import (
    align_adapters,
    choose_modules,
    updates_by_shape,
    walk_modules,
)
from lora_analysis.studies.pair_products import ModulePairs, module_pairs, module_products
from lora_analysis.studies.similarity_matrix import ALL, ModuleContribution, SimilarityMatrixSums

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter
    from lora_analysis.progress import Progress

_QUANTITIES = ("phi_1_1", "phi_r_r", "omega", "excess_r_r")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PairwiseSimilarity:
    """Similarity of all pairs of N adapters in M modules.

    Attributes
    ----------
    labels, modules
        Names along the axes, N and M of them.
    phi_1_1, phi_r_r, omega, excess_r_r
        ``(2, M, N, N)``, the input side first; NaN if a module is missing, untrained, or of a
        different shape than in the first adapter that has it.
    cosine
        ``(M, N, N)``: signed cosine.
    total_cosine
        ``(N, N)``: signed cosine over all common modules together.
    shared_init
        ``(M, N, N)``: whether the module has a shared initialization, from which its input-side
        numbers come.
    """

    labels: tuple[str, ...]
    modules: tuple[str, ...]
    phi_1_1: NDArray[np.float64]
    phi_r_r: NDArray[np.float64]
    omega: NDArray[np.float64]
    excess_r_r: NDArray[np.float64]
    cosine: NDArray[np.float64]
    total_cosine: NDArray[np.float64]
    shared_init: NDArray[np.bool_]

    __repr__ = short_repr

    def to_frame(self) -> pd.DataFrame:
        """Return one row per module, side and pair, the order of `labels` in each pair."""
        rows = [
            {
                "module": module,
                "side": side,
                "a": self.labels[i],
                "b": self.labels[j],
                "phi_1_1": self.phi_1_1[s, m, i, j],
                "phi_r_r": self.phi_r_r[s, m, i, j],
                "omega": self.omega[s, m, i, j],
                "excess_r_r": self.excess_r_r[s, m, i, j],
                "cosine": self.cosine[m, i, j],
                "shared_init": bool(self.shared_init[m, i, j]),
            }
            for m, module in enumerate(self.modules)
            for s, side in enumerate(SIDES)
            for i, j in combinations(range(len(self.labels)), 2)
        ]
        return frame(rows)

    def median(self, quantity: str = "omega", side: Side = "output") -> NDArray[np.float64]:
        """Return the median over modules of one quantity on one side, ``(N, N)``.

        Input-side values of modules with a shared initialization are excluded; NaN if none is left.
        """
        values = getattr(self, quantity)[SIDES.index(side)]
        if side == "input":
            values = np.where(self.shared_init, np.nan, values)
        empty = np.isnan(values).all(axis=0)
        return np.where(empty, np.nan, np.nanmedian(np.where(empty, 0.0, values), axis=0))


def pairwise(
    adapters: Sequence[Any],
    *,
    modules: str | Sequence[str] | None = None,
    prefix: str | Sequence[str] | Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PairwiseSimilarity:
    """Compare all pairs of adapters in every module: N factorizations per module, not N².

    Parameters
    ----------
    adapters
        At least two, in any form that :func:`as_adapter` takes. They are read module by module, so
        that a hundred fit in memory.
    modules
        Suffixes of module names, or one regular expression; all modules by default.
    prefix
        Prefixes of module names and their replacements for matching: ``"OLD=NEW"``, ``"OLD"`` to
        drop a prefix, or a mapping; for adapters whose names differ by more than wrappers, model
        classes and components.
    workers
        Number of threads; the CPUs of this process by default.
    progress
        Called with ("modules", done, total) after each module.

    Raises
    ------
    InputError
        Fewer than two adapters, or no module matches.
    """
    if len(adapters) < 2:
        message = f"Pairs need at least two adapters, got {len(adapters)}."
        raise InputError(message)
    adapters = unique_labels([as_adapter(adapter) for adapter in adapters])
    adapters = align_adapters(adapters, prefix=parse_prefixes(prefix))
    chosen = choose_modules(adapters, modules)
    labels = tuple(adapter.label for adapter in adapters)
    planes = (len(chosen), len(labels), len(labels))
    values = np.full((len(_QUANTITIES), len(SIDES), *planes), np.nan)
    cosine = np.full(planes, np.nan)
    shared = np.zeros(planes, dtype=bool)
    sums = SimilarityMatrixSums(labels, [ALL] * len(chosen))
    walk = walk_modules(partial(_first_shape, adapters), chosen, workers=workers, progress=progress)
    for index, (members, pairs) in enumerate(walk):
        block = np.ix_(members, members)
        for q, quantity in enumerate(_QUANTITIES):
            for s, side in enumerate(SIDES):
                values[q, s, index][block] = getattr(pairs.sides[side], quantity)
        cosine[index][block] = pairs.cosine
        if pairs.init is not None:
            shared[index][block] = pairs.init.shared
        sums.add(ALL, ModuleContribution.of(members, pairs))
    total = sums.similarity_matrix(range(len(labels))).matrix("cosine")
    quantities = dict(zip(_QUANTITIES, values, strict=True))
    return PairwiseSimilarity(
        labels=labels,
        modules=tuple(chosen),
        **quantities,
        cosine=cosine,
        total_cosine=total,
        shared_init=shared,
    )


def _first_shape(adapters: Sequence[Adapter], module: str) -> tuple[list[int], ModulePairs]:
    """Return the pairs of one module among the adapters that have the shape of the first one."""
    members, updates = updates_by_shape(adapters, module)[0]
    return members, module_pairs(module_products(updates, vectors=False), updates)
