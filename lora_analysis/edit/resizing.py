"""A whole adapter in fewer parameters: to a rank, an energy share, or a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import linalg
from lora_analysis.adapter import Adapter, DenseUpdate, LazyUpdate, LowRankUpdate, UpdateOutline
from lora_analysis.edit.budgets import ranks_within
from lora_analysis.edit.derived import derived
from lora_analysis.edit.truncation import (
    Truncation,
    check_size,
    leading_outline,
    leading_part,
    measure,
    relative_difference,
    truncate,
)
from lora_analysis.errors import InputError
from lora_analysis.execution import available_workers, in_threads
from lora_analysis.formats.sanity_checks import (
    ModuleStatistics,
    module_statistics,
    sanity_findings,
)
from lora_analysis.spectra import spectrum
from lora_analysis.storage.dtypes import narrow, narrowed_type, widened

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from lora_analysis.adapter import Update

# Memory counts here: more modules at a time would be quicker only if many CPUs had nothing to do.
_WORKERS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Resized:
    """An adapter made smaller, and per module what that lost; modules left out have rank 0."""

    adapter: Adapter
    modules: tuple[Truncation, ...]

    @property
    def norm(self) -> float:
        """‖ΔW‖_F of all modules together, before."""
        return math.hypot(*(one.norm for one in self.modules))

    @property
    def lost(self) -> float:
        """Norm of all that is gone: squares add over modules as they do over directions."""
        return math.hypot(*(one.lost for one in self.modules))

    @property
    def error(self) -> float:
        """``√(Σ lost²)/√(Σ‖ΔW‖²)`` over all modules."""
        return self.lost / self.norm if self.norm > 0 else 0.0

    @property
    def parameters(self) -> int:
        """Numbers in all factors afterwards."""
        return sum(one.parameters for one in self.modules)

    @property
    def given_parameters(self) -> int:
        """Numbers in all factors (or dense updates) before."""
        return sum(one.given_parameters for one in self.modules)


def resize_adapter(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    like_source: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    workers: int | None = None,
) -> Resized:
    """Return an adapter by the leading directions of each of its modules, and what was lost.

    Low-rank updates are read and measured now, and computed when a module of the result is asked
    for: the result holds no factors, and takes them from ``adapter`` each time. Each module as by
    :func:`lora_analysis.truncate`, exactly one of the three given:

    Parameters
    ----------
    adapter
        Low-rank or dense updates, every scale known.
    rank
        The same for every module; one of a smaller numerical rank keeps that.
    energy
        Share of Σσ² that every module keeps at least.
    budget
        Numbers in all factors together (magnitudes and modules trained in full do not count); the
        rank of each module is chosen by `ranks_within`. A module of which nothing is kept is left
        out of the adapter.
    like_source
        Whether factors are made as the source stores them: the scale of each module stays, and
        numbers are rounded to the type of its file, which is part of the error. For writers that
        keep that type (kohya, flux, diffusers).
    progress
        Called with (what, done, total).
    workers
        Modules that are in memory at the same time; by default two, or one on a single CPU.

    Raises
    ------
    InputError
        As for `truncate`; the adapter has no modules; no direction fits into the budget; or a
        number is too large for the type of the source.
    ScaleError
        The scale of a module is not known: modules could not be weighed against each other.
    """
    check_size(rank=rank, energy=energy, budget=budget)
    if not len(adapter):
        message = f"{adapter.label} has no modules; there is nothing to resize."
        raise InputError(message)
    workers = workers or min(_WORKERS, available_workers())
    ranks = dict.fromkeys(adapter, rank)
    if budget is not None:
        ranks = _ranks(adapter, budget, progress, workers)
    new: dict[str, LowRankUpdate | LazyUpdate] = {}
    modules = []
    one_module = partial(_resized, adapter, energy=energy, like_source=like_source)
    statistics: list[ModuleStatistics] = []
    results = in_threads(one_module, ranks.items(), workers=workers)
    for done, (update, lost, measured) in enumerate(results, start=1):
        modules.append(lost)
        statistics.append(measured)
        if update is not None:
            new[lost.module] = update
        if progress:
            progress("modules", done, len(ranks))
    dora = any((u.outline if isinstance(u, LazyUpdate) else u).variant for u in new.values())
    sentence = _sentence(adapter, modules, dora=dora)
    made = derived(adapter, new, sentence)
    known = made.provenance.findings
    findings = (*known, *sanity_findings(statistics, known))
    return Resized(made.described(findings=findings), tuple(modules))


def _resized(
    adapter: Adapter, item: tuple[str, int | None], *, energy: float | None, like_source: bool
) -> tuple[LowRankUpdate | LazyUpdate | None, Truncation, ModuleStatistics]:
    """Return one module at its rank (None with 0, if all of it is lost), and its statistics."""
    name, rank = item
    update = _known(adapter[name])
    new: LowRankUpdate | LazyUpdate
    if isinstance(update, LowRankUpdate):
        lost, count = measure(update, rank=1 if rank == 0 else rank, energy=energy)
        outline = leading_outline(update, count)
        if like_source and rank != 0:
            stored = _as_stored(leading_part(update, count), update)
            outline = UpdateOutline.of(stored)
            lost = replace(lost, lost=lost.norm * relative_difference(stored, update))
        load = partial(_leading, adapter, name, count, like_source=like_source)
        new = LazyUpdate(outline, load)
    else:
        new, lost = truncate(update, rank=1 if rank == 0 else rank, energy=energy)
    statistics = module_statistics(update, norm=lost.norm)
    if rank == 0:
        return None, replace(lost, rank=0, lost=lost.norm), statistics
    return new, lost, statistics


def _leading(adapter: Adapter, name: str, count: int, *, like_source: bool) -> Update:
    """Return one module by its leading directions, computed when it is asked for."""
    update = adapter[name]
    if not isinstance(update, LowRankUpdate):
        return update
    leading = leading_part(update, count)
    return _as_stored(leading, update) if like_source else leading


def _as_stored(new: LowRankUpdate, source: LowRankUpdate) -> LowRankUpdate:
    """Return a new update with the scale of its source and numbers that the source's type holds."""
    scale = source.known_scale() or 1.0
    root = math.sqrt(abs(scale))
    dtype = narrowed_type(source.stored_dtype)
    A, B = new.A / root, new.B / math.copysign(root, scale)
    return replace(
        new,
        A=widened(narrow(A, dtype, f"A of '{new.name}'"), dtype),
        B=widened(narrow(B, dtype, f"B of '{new.name}'"), dtype),
        scale=scale,
        alpha=scale * new.rank,
        stored_dtype=dtype,
    )


def _known(update: Update) -> Update:
    if isinstance(update, LowRankUpdate):
        update.known_scale()
    return update


def _ranks(
    adapter: Adapter,
    budget: int,
    progress: Callable[[str, int, int], None] | None,
    workers: int,
) -> dict[str, int]:
    values, costs = {}, {}
    found = in_threads(partial(_values, adapter, budget), adapter, workers=workers)
    for done, (name, (sigma, cost)) in enumerate(zip(adapter, found, strict=True), start=1):
        values[name], costs[name] = sigma, cost
        if progress:
            progress("spectra", done, len(adapter))
    return ranks_within(budget, values, costs)


def _values(adapter: Adapter, budget: int, name: str) -> tuple[NDArray[np.float64], int]:
    """Return the singular values of one module that a budget can hold, and one direction's cost."""
    update = _known(adapter[name])
    cost = sum(update.shape)
    most = max(1, min(budget // cost, *update.shape))
    if isinstance(update, DenseUpdate):
        return linalg.leading_singular_values(update.delta, most), cost
    found = spectrum(update, vectors=False)
    return found.S[: found.numerical_rank], cost


def _sentence(adapter: Adapter, modules: list[Truncation], *, dora: bool) -> str:
    before = sum(one.given_parameters for one in modules)
    after = sum(one.parameters for one in modules)
    out = sum(one.rank == 0 for one in modules)
    left_out = f"; {out} modules of which nothing was kept are left out" if out else ""
    norm, lost = (math.hypot(*(getattr(m, key) for m in modules)) for key in ("norm", "lost"))
    error = lost / norm if norm > 0 else 0.0
    return (
        f"Made from {adapter.label} by its leading singular directions: {after:,} of {before:,} "
        f"parameters, relative error {error:.3g}{left_out}."
    ) + (" Of DoRA the errors are those of the low-rank part." if dora else "")
