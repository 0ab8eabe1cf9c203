"""A group of adapters: held-out shares and signed cosine, per module and over all modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from lora_analysis import chance
from lora_analysis.errors import InputError
from lora_analysis.formats import as_adapter, unique_labels
from lora_analysis.groups.common_directions import explained_shares, shared_inits
from lora_analysis.groups.merging import inner_products
from lora_analysis.groups.stacking import stack_directions
from lora_analysis.names import parse_prefixes
from lora_analysis.results import frame, short_repr
from lora_analysis.spectra import SIDES, Side, spectrum
from lora_analysis.studies.alignment import align_adapters
from lora_analysis.studies.module_walk import choose_modules, updates_by_shape, walk_modules

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter


@dataclass(frozen=True, slots=True, eq=False)
class GroupSimilarity:
    """N adapters as one group, in M modules.

    Attributes
    ----------
    labels, modules
        Names along the axes, N and M of them.
    directions
        ``(M,)``: k, the number of directions of the shared basis; 0 if the module has fewer than
        two trained members.
    dimensions
        ``(2, M)``: dimensions of the input and the output space.
    in_sample, held_out
        ``(2, M, N)``, the input side first: share of each member's energy in the leading k
        directions of all members, which is inflated, and of the others. NaN if a module is
        missing, untrained, alone, or of a different shape than in the first adapter that has it,
        or if the others have fewer than k directions.
    shared_init
        ``(M, N)``: whether the member has a shared initialization with another one, from which
        its input-side shares come.
    cosine
        ``(M,)``: energy-weighted signed cosine, ``Σ_{i<j}⟨ΔW_i, ΔW_j⟩ / Σ_{i<j}‖ΔW_i‖‖ΔW_j‖``;
        NaN if a scale is not known.
    total_cosine
        The same with both sums over all modules; NaN if a scale is not known.
    """

    labels: tuple[str, ...]
    modules: tuple[str, ...]
    directions: NDArray[np.intp]
    dimensions: NDArray[np.intp]
    in_sample: NDArray[np.float64]
    held_out: NDArray[np.float64]
    shared_init: NDArray[np.bool_]
    cosine: NDArray[np.float64]
    total_cosine: float

    __repr__ = short_repr

    def to_frame(self) -> pd.DataFrame:
        """Return one row per module, side and member with a share."""
        rows = [
            {
                "module": module,
                "side": side,
                "adapter": label,
                "directions": int(self.directions[m]),
                "held_out": self.held_out[s, m, n],
                "in_sample": self.in_sample[s, m, n],
                "chance": self.chance[s, m],
                "excess": self.excess[s, m, n],
                "shared_init": bool(self.shared_init[m, n]),
            }
            for m, module in enumerate(self.modules)
            for s, side in enumerate(SIDES)
            for n, label in enumerate(self.labels)
            if not np.isnan(self.in_sample[s, m, n])
        ]
        return frame(rows)

    @property
    def chance(self) -> NDArray[np.float64]:
        """``(2, M)``: random baseline of a held-out share, k/d; 0 without shares."""
        return self.directions / np.maximum(self.dimensions, 1)

    @property
    def excess(self) -> NDArray[np.float64]:
        """``(2, M, N)``: ``(share − chance)/(1 − chance)`` of the held-out shares."""
        expected = np.broadcast_to(self.chance[..., None], self.held_out.shape)
        return chance.excess(self.held_out, expected)

    def quartiles(
        self, quantity: Literal["excess", "held_out", "in_sample"] = "excess", side: Side = "output"
    ) -> NDArray[np.float64]:
        """Return lower quartile, median and upper quartile over modules, ``(3, N)``.

        Input-side values of members with a shared initialization are excluded; NaN if none is
        left. If modules differ in dimension, only the excess may be pooled.
        """
        values = getattr(self, quantity)[SIDES.index(side)]
        if side == "input":
            values = np.where(self.shared_init, np.nan, values)
        empty = np.isnan(values).all(axis=0)
        quartiles = np.nanquantile(np.where(empty, 0.0, values), (0.25, 0.5, 0.75), axis=0)
        return np.where(empty, np.nan, quartiles)


class _ModuleGroup(NamedTuple):
    """The results of one module; ``shares`` is ``(2, 2, n)``: in-sample and held-out, by side."""

    members: list[int]
    directions: int
    dimensions: tuple[int, int]
    shares: NDArray[np.float64]
    shared_init: NDArray[np.bool_]
    sums: tuple[float, float]


def group_similarity(
    adapters: Sequence[Any],
    *,
    k: int | None = None,
    modules: str | Sequence[str] | None = None,
    prefix: str | Sequence[str] | Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> GroupSimilarity:
    """Return the share of each adapter that a basis of the others explains, in every module.

    Parameters
    ----------
    adapters
        At least two, in any form that :func:`as_adapter` takes. They are read module by module, so
        that a hundred fit in memory.
    k
        Number of directions of the shared basis; by default the smallest numerical rank of a
        module's trained members.
    modules
        Suffixes of module names, or one regular expression; all modules by default.
    prefix
        Prefixes of module names and their replacements, as in `lora_analysis.pairwise.pairwise`.
    workers
        Number of threads; the CPUs of this process by default.
    progress
        Called with ("modules", done, total) after each module.

    Raises
    ------
    InputError
        Fewer than two adapters, no module matches, no module has two trained members, or k < 1.

    Notes
    -----
    A module costs O(d·R² + N·R³) per side with R = Σr: from about R = d/N on, the factorizations of
    N Gram matrices, one per member left out, dominate.
    """
    if len(adapters) < 2:
        message = f"A group needs at least two adapters, got {len(adapters)}."
        raise InputError(message)
    adapters = unique_labels([as_adapter(adapter) for adapter in adapters])
    adapters = align_adapters(adapters, prefix=parse_prefixes(prefix))
    chosen = choose_modules(adapters, modules)
    count = len(adapters)
    shares = np.full((2, 2, len(chosen), count), np.nan)
    shared = np.zeros((len(chosen), count), dtype=bool)
    directions = np.zeros(len(chosen), dtype=np.intp)
    dimensions = np.zeros((2, len(chosen)), dtype=np.intp)
    sums = np.zeros((2, len(chosen)))
    walk = walk_modules(
        lambda name: _analyze_group(adapters, name, k), chosen, workers=workers, progress=progress
    )
    for i, group in enumerate(walk):
        if group is not None:
            shares[:, :, i, group.members] = group.shares
            shared[i, group.members] = group.shared_init
            directions[i], dimensions[:, i] = group.directions, group.dimensions
            sums[:, i] = group.sums
    if not directions.any():
        message = (
            f"A group needs two trained adapters with one module in common: none of the "
            f"{len(chosen)} modules of the {count} adapters has them."
        )
        raise InputError(message)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = sums[0] / sums[1]
    return GroupSimilarity(
        labels=tuple(adapter.label for adapter in adapters),
        modules=tuple(chosen),
        directions=directions,
        dimensions=dimensions,
        in_sample=shares[0],
        held_out=shares[1],
        shared_init=shared,
        cosine=np.clip(cosine, -1.0, 1.0),
        total_cosine=float(sums[0].sum() / sums[1].sum()),
    )


def _analyze_group(adapters: Sequence[Adapter], name: str, k: int | None) -> _ModuleGroup | None:
    """Return the results of one module; None with fewer than two trained members."""
    members, updates = updates_by_shape(adapters, name)[0]
    spectra = [spectrum(update) for update in updates]
    ranks = [s.numerical_rank for s in spectra if not s.untrained]
    if len(ranks) < 2:
        return None
    count = min(ranks) if k is None else k
    stacks = {side: stack_directions(spectra, side) for side in SIDES}
    shares = np.full((2, 2, len(spectra)), np.nan)
    for i, side in enumerate(SIDES):
        explained = explained_shares(stacks[side], count)
        if explained.in_sample.shape[1] == count:
            shares[:, i] = explained.in_sample[:, -1], explained.held_out[:, -1]
    inner = inner_products(spectra, stacks)
    scaled = not any(s.in_units_of_scale for s in spectra if not s.untrained)
    products, norms = (total * inner.unit**2 if scaled else np.nan for total in inner.between)
    return _ModuleGroup(
        members,
        count,
        (stacks["input"].dimension, stacks["output"].dimension),
        shares,
        shared_inits(stacks["input"], updates),
        (products, norms),
    )
