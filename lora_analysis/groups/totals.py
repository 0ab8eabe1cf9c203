"""A group of whole adapters: held-out shares and signed cosine, module by module and in all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lora_analysis import chance
from lora_analysis.errors import InputError
from lora_analysis.groups.bases import explained, shared_inits
from lora_analysis.groups.merging import inner_products
from lora_analysis.groups.stacking import stacked
from lora_analysis.names import parse_prefixes
from lora_analysis.spectra import SIDES, Side, spectrum
from lora_analysis.studies.alignment import align_adapters
from lora_analysis.studies.module_walk import choose_modules, updates_by_shape, walk_modules

if TYPE_CHECKING:
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
        ``(M,)``: k, the directions of the shared basis at which the shares are taken; 0 where
        the module has no two trained members.
    dimensions
        ``(2, M)``: of the input and the output space.
    in_sample, held_out
        ``(2, M, N)``, the input side first: share of each member's energy in the leading k
        directions of all members, which is inflated, and of the others alone. NaN where a module
        is missing or untrained, of another shape than the first adapter's that has it, alone, or
        where the others have no k directions.
    shared_init
        ``(M, N)``: whether the member starts from the same A as another; its input-side shares
        come from the start.
    cosine
        ``(M,)``: energy-weighted signed cosine, ``Σ_{i<j}⟨ΔW_i, ΔW_j⟩ / Σ_{i<j}‖ΔW_i‖‖ΔW_j‖``;
        NaN where a scale is not known.
    total_cosine
        The same with both sums over all modules; NaN where a scale is not known.
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

    @property
    def chance(self) -> NDArray[np.float64]:
        """``(2, M)``: isotropic chance of a held-out share, k/d; 0 where there is none."""
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

        Input-side values of members with a shared start are left out; NaN where none is left.
        Where modules differ in dimension only the excess may be taken together.
        """
        values = getattr(self, quantity)[SIDES.index(side)]
        if side == "input":
            values = np.where(self.shared_init, np.nan, values)
        lost = np.isnan(values).all(axis=0)
        found = np.nanquantile(np.where(lost, 0.0, values), (0.25, 0.5, 0.75), axis=0)
        return np.where(lost, np.nan, found)


class _Visit(NamedTuple):
    """One module; ``shares`` is ``(2, 2, n)``: in-sample and held out, both sides."""

    members: list[int]
    directions: int
    dimensions: tuple[int, int]
    shares: NDArray[np.float64]
    shared_init: NDArray[np.bool_]
    sums: tuple[float, float]


def group_similarity(
    adapters: Sequence[Adapter],
    *,
    k: int | None = None,
    modules: str | Sequence[str] | None = None,
    prefix: str | Sequence[str] | Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> GroupSimilarity:
    """Return how much of each adapter a basis shared by the others explains, in every module.

    Parameters
    ----------
    adapters
        At least two. They are read module by module, so that a hundred fit in memory.
    k
        Directions of the shared basis; by default the smallest numerical rank among a module's
        trained members.
    modules
        The end of module names, or one regular expression; all by default.
    prefix
        As for :func:`lora_analysis.pairwise`: what stands for the beginning of module names.
    workers
        Threads over modules; the CPUs of this process by default.
    progress
        Called with ("modules", done, total) after each module.

    Raises
    ------
    InputError
        Fewer than two adapters, no module matches, no module has two trained members, or k < 1.

    Notes
    -----
    A module costs O(d·R² + N·R³) a side with R = Σr: the factorizations of N Gram matrices, one
    for each member left out, lead from about R = d/N on.
    """
    if len(adapters) < 2:
        message = f"A group needs at least two adapters, got {len(adapters)}."
        raise InputError(message)
    adapters = align_adapters(adapters, prefix=parse_prefixes(prefix))
    chosen = choose_modules(adapters, modules)
    count = len(adapters)
    shares = np.full((2, 2, len(chosen), count), np.nan)
    shared = np.zeros((len(chosen), count), dtype=bool)
    directions = np.zeros(len(chosen), dtype=np.intp)
    dimensions = np.zeros((2, len(chosen)), dtype=np.intp)
    sums = np.zeros((2, len(chosen)))
    walk = walk_modules(
        lambda name: _visit(adapters, name, k), chosen, workers=workers, progress=progress
    )
    for at, visit in enumerate(walk):
        if visit is not None:
            shares[:, :, at, visit.members] = visit.shares
            shared[at, visit.members] = visit.shared_init
            directions[at], dimensions[:, at] = visit.directions, visit.dimensions
            sums[:, at] = visit.sums
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


def _visit(adapters: Sequence[Adapter], name: str, k: int | None) -> _Visit | None:
    """Return what one module gives; None where it has no two trained members."""
    members, updates = updates_by_shape(adapters, name)[0]
    spectra = [spectrum(one) for one in updates]
    ranks = [one.numerical_rank for one in spectra if not one.untrained]
    if len(ranks) < 2:
        return None
    wanted = min(ranks) if k is None else k
    stacks = {side: stacked(spectra, side) for side in SIDES}
    shares = np.full((2, 2, len(spectra)), np.nan)
    for at, side in enumerate(SIDES):
        found = explained(stacks[side], wanted)
        if found.in_sample.shape[1] == wanted:
            shares[:, at] = found.in_sample[:, -1], found.held_out[:, -1]
    inner = inner_products(spectra, stacks)
    known = not any(one.in_units_of_scale for one in spectra if not one.untrained)
    together, apart = (part * inner.unit**2 if known else np.nan for part in inner.between)
    return _Visit(
        members,
        wanted,
        (stacks["input"].dimension, stacks["output"].dimension),
        shares,
        shared_inits(stacks["input"], updates),
        (together, apart),
    )
