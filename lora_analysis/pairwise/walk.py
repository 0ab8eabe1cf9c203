"""Every pair of many adapters: one walk over their modules, each update factored once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.execution import in_threads
from lora_analysis.names import parse_prefixes
from lora_analysis.pairwise.alignment import align_adapters
from lora_analysis.pairwise.products import ModulePairs, module_pairs
from lora_analysis.patterns import choose_names, natural_key
from lora_analysis.spectra import SIDES, Side, spectrum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, Update


@dataclass(frozen=True, slots=True, eq=False)
class PairwiseSimilarity:
    """N adapters against each other in M modules.

    Attributes
    ----------
    labels, modules
        Names along the axes, N and M of them.
    phi_1_1, phi_r_r, omega, excess_r_r
        ``(2, M, N, N)``, the input side first; NaN where a module is missing or untrained, or of
        another shape than the first adapter's that has it.
    cosine
        ``(M, N, N)``.
    total_cosine
        ``(N, N)``: signed cosine over all common modules at once.
    shared_init
        ``(M, N, N)``, whether the module starts from the same rows; input-side numbers of those
        come from the start.
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

    def median(self, quantity: str = "omega", side: Side = "output") -> NDArray[np.float64]:
        """Return the median over modules of one quantity on one side, ``(N, N)``.

        Input-side values of modules with a shared start are left out; NaN where none is left.
        """
        values = getattr(self, quantity)[SIDES.index(side)]
        if side == "input":
            values = np.where(self.shared_init, np.nan, values)
        lost = np.isnan(values).all(axis=0)
        return np.where(lost, np.nan, np.nanmedian(np.where(lost, 0.0, values), axis=0))


def pairwise(
    adapters: Sequence[Adapter],
    *,
    modules: str | Sequence[str] | None = None,
    prefix: str | Sequence[str] | Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> PairwiseSimilarity:
    """Compare every pair of adapters in every module: N factorizations a module, never N².

    Parameters
    ----------
    adapters
        At least two. They are read module by module, so that a hundred fit in memory.
    modules
        The end of module names, or one regular expression; all by default.
    prefix
        Beginning of module names and what stands for it when names are matched: ``"OLD=NEW"``,
        ``"OLD"`` for names without it, or a mapping; for adapters whose names differ by more than
        wrappers, model classes and components.
    workers
        Threads over modules; the CPUs of this process by default.
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
    adapters = align_adapters(adapters, prefix=parse_prefixes(prefix))
    chosen = chosen_modules(adapters, modules)
    count = len(adapters)
    sides = np.full((4, 2, len(chosen), count, count), np.nan)
    cosine = np.full((len(chosen), count, count), np.nan)
    shared = np.zeros((len(chosen), count, count), dtype=bool)
    inner = np.zeros((count, count))
    squares = np.zeros((count, count))
    walk = in_threads(lambda name: _visit(adapters, name), chosen, workers=workers)
    for at, (members, pairs) in enumerate(walk):
        block = np.ix_(members, members)
        for s, side in enumerate(SIDES):
            for q, name in enumerate(("phi_1_1", "phi_r_r", "omega", "excess_r_r")):
                sides[q, s, at][block] = getattr(pairs.sides[side], name)
        cosine[at][block] = pairs.cosine
        if pairs.start is not None:
            shared[at][block] = pairs.start.shared
        inner[block] += np.nan_to_num(pairs.cosine) * np.outer(pairs.norms, pairs.norms)
        squares[block] += np.where(np.isnan(pairs.cosine), 0.0, pairs.norms[:, None] ** 2)
        if progress:
            progress("modules", at + 1, len(chosen))
    with np.errstate(divide="ignore", invalid="ignore"):
        total = inner / np.sqrt(squares * squares.T)
    return PairwiseSimilarity(
        labels=tuple(adapter.label for adapter in adapters),
        modules=tuple(chosen),
        phi_1_1=sides[0],
        phi_r_r=sides[1],
        omega=sides[2],
        excess_r_r=sides[3],
        cosine=cosine,
        total_cosine=total,
        shared_init=shared,
    )


def chosen_modules(adapters: Sequence[Adapter], pattern: str | Sequence[str] | None) -> list[str]:
    """Return the names of modules that any adapter has and the pattern means, in order.

    Raises
    ------
    InputError
        None matches.
    """
    names = sorted({name for adapter in adapters for name in adapter}, key=natural_key)
    chosen = choose_names(names, pattern)
    if not chosen:
        message = f"No module of the {len(adapters)} adapters matches {pattern!r}."
        raise InputError(message)
    return chosen


def updates_of_one_shape(adapters: Sequence[Adapter], name: str) -> tuple[list[int], list[Update]]:
    """Return which adapters have the module in its first shape, and their updates, read now."""
    updates = {at: adapter[name] for at, adapter in enumerate(adapters) if name in adapter}
    shape = next(iter(updates.values())).shape
    members = [at for at, update in updates.items() if update.shape == shape]
    return members, [updates[at] for at in members]


def _visit(adapters: Sequence[Adapter], name: str) -> tuple[list[int], ModulePairs]:
    members, updates = updates_of_one_shape(adapters, name)
    return members, module_pairs([spectrum(one) for one in updates], updates)
