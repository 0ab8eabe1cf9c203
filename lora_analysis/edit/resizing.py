"""A whole adapter in fewer parameters: to a rank, an energy share, or a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis import linalg
from lora_analysis.adapter import Adapter, DenseUpdate, LazyUpdate, LowRankUpdate, UpdateOutline
from lora_analysis.bases import read_fine_tune
from lora_analysis.edit.budgets import ranks_within
from lora_analysis.edit.derived_adapter import derive_adapter
from lora_analysis.edit.truncation import (
    Truncation,
    check_size,
    leading_outline,
    leading_part,
    measure_truncation,
    relative_difference,
    truncate,
)
from lora_analysis.errors import InputError
from lora_analysis.execution import available_workers, in_threads
from lora_analysis.formats import as_adapter
from lora_analysis.formats.sanity_checks import (
    ModuleStatistics,
    module_statistics,
    sanity_findings,
)
from lora_analysis.results import frame
from lora_analysis.spectra import spectrum
from lora_analysis.storage.dtypes import narrow, narrowed_type, widened

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from lora_analysis.adapter import Update

# Memory limits this: more modules at a time would be faster only if many CPUs were idle.
_WORKERS = 2


@dataclass(frozen=True, slots=True, eq=False)
class ResizedAdapter:
    """A truncated adapter and the error per module; modules left out have rank 0."""

    adapter: Adapter
    modules: tuple[Truncation, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per module, with its ranks and error."""
        names = ("module", "given_rank", "rank", "norm", "error", "parameters", "given_parameters")
        return frame([{name: getattr(module, name) for name in names} for module in self.modules])

    def __repr__(self) -> str:
        return (
            f"<ResizedAdapter {self.adapter.label!r}: {len(self.modules)} modules, "
            f"{self.parameters:,} of {self.given_parameters:,} parameters, error {self.error:.3g}>"
        )

    @property
    def norm(self) -> float:
        """‖ΔW‖_F of all modules together, before."""
        return math.hypot(*(module.norm for module in self.modules))

    @property
    def error_norm(self) -> float:
        """Norm of the difference: squares add over modules as they do over directions."""
        return math.hypot(*(module.error_norm for module in self.modules))

    @property
    def error(self) -> float:
        """``√(Σ error_norm²)/√(Σ‖ΔW‖²)`` over all modules."""
        return self.error_norm / self.norm if self.norm > 0 else 0.0

    @property
    def parameters(self) -> int:
        """Number of parameters in all factors afterwards."""
        return sum(module.parameters for module in self.modules)

    @property
    def given_parameters(self) -> int:
        """Number of parameters in all factors (or dense updates) before."""
        return sum(module.given_parameters for module in self.modules)


def approximate_fine_tune(
    tuned: Any,
    base: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    modules: str | Sequence[str] | None = None,
    transposed: bool | None = None,
    label: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ResizedAdapter:
    """Return the best low-rank approximation of a full fine-tune, and its error per module.

    ``ΔW = W_tuned - W_base`` of every weight matrix, truncated to its leading singular directions
    as by :func:`lora_analysis.resize_adapter`: no low-rank update of those ranks is closer.
    Parameters that are not matrices (biases, norms) are excluded and named in the findings.

    Parameters
    ----------
    tuned, base
        The two models: anything :func:`lora_analysis.open_base` takes.
    rank, energy, budget
        Exactly one of them, as for `resize_adapter`.
    modules, transposed, label
        As for :func:`lora_analysis.read_fine_tune`.
    progress
        Called with (what, done, total).

    Raises
    ------
    InputError
        As raised by `read_fine_tune` and `resize_adapter`.
    """
    update = read_fine_tune(
        tuned, base, modules=modules, transposed=transposed, label=label, progress=progress
    )
    return resize_adapter(
        update,
        rank=rank,
        energy=energy,
        budget=budget,
        progress=progress,
        workers=available_workers(),
    )


def resize_adapter(
    adapter: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    like_source: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    workers: int | None = None,
) -> ResizedAdapter:
    """Return an adapter by the leading directions of each of its modules, and the error.

    Low-rank updates are read and measured now, and computed when a module of the result is
    accessed: the result holds no factors, and takes them from ``adapter`` each time. Each module
    as by :func:`lora_analysis.truncate`, with exactly one of rank, energy and budget.

    Parameters
    ----------
    adapter
        Low-rank or dense updates, every scale known, in any form that :func:`as_adapter` takes.
    rank
        The same for every module; a module of a smaller numerical rank keeps that.
    energy
        Share of Σσ² that every module keeps at least.
    budget
        Parameters of all factors together (magnitudes and modules trained in full do not count);
        the rank of each module is chosen by `ranks_within`. A module of rank 0 is left out of the
        adapter.
    like_source
        True to store factors as the source does: the scale of each module stays, and
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
        The scale of a module is unknown: modules could not be compared with each other.
    """
    check_size(rank=rank, energy=energy, budget=budget)
    adapter = as_adapter(adapter)
    if not len(adapter):
        message = f"{adapter.label} has no modules; there is nothing to resize."
        raise InputError(message)
    workers = workers or min(_WORKERS, available_workers())
    ranks = dict.fromkeys(adapter, rank)
    if budget is not None:
        ranks = _ranks(adapter, budget, progress, workers)
    updates: dict[str, LowRankUpdate | LazyUpdate] = {}
    truncations = []
    statistics: list[ModuleStatistics] = []
    resize = partial(_resize_module, adapter, energy=energy, like_source=like_source)
    results = in_threads(resize, ranks.items(), workers=workers)
    for done, (update, truncation, measured) in enumerate(results, start=1):
        truncations.append(truncation)
        statistics.append(measured)
        if update is not None:
            updates[truncation.module] = update
        if progress:
            progress("modules", done, len(ranks))
    result = ResizedAdapter(adapter, tuple(truncations))
    new = derive_adapter(adapter, updates, _note(result, updates))
    findings = new.provenance.findings
    checked = new.with_provenance(findings=(*findings, *sanity_findings(statistics, findings)))
    return replace(result, adapter=checked)


def _resize_module(
    adapter: Adapter, item: tuple[str, int | None], *, energy: float | None, like_source: bool
) -> tuple[LowRankUpdate | LazyUpdate | None, Truncation, ModuleStatistics]:
    """Return one module at its rank (None for rank 0), its error, and its statistics."""
    name, rank = item
    update = _load_scaled(adapter, name)
    new: LowRankUpdate | LazyUpdate
    if isinstance(update, LowRankUpdate):
        truncation, count = measure_truncation(update, rank=1 if rank == 0 else rank, energy=energy)
        outline = leading_outline(update, count)
        if like_source and rank != 0:
            stored = _as_stored(leading_part(update, count), update)
            outline = UpdateOutline.of(stored)
            error_norm = truncation.norm * relative_difference(stored, update)
            truncation = replace(truncation, error_norm=error_norm)
        load = partial(_load_leading, adapter, name, count, like_source=like_source)
        new = LazyUpdate(outline, load)
    else:
        new, truncation = truncate(update, rank=1 if rank == 0 else rank, energy=energy)
    statistics = module_statistics(update, norm=truncation.norm)
    if rank == 0:
        return None, replace(truncation, rank=0, error_norm=truncation.norm), statistics
    return new, truncation, statistics


def _load_leading(adapter: Adapter, name: str, count: int, *, like_source: bool) -> Update:
    """Load one module and return its leading directions."""
    update = adapter[name]
    if not isinstance(update, LowRankUpdate):
        return update
    leading = leading_part(update, count)
    return _as_stored(leading, update) if like_source else leading


def _as_stored(new: LowRankUpdate, source: LowRankUpdate) -> LowRankUpdate:
    """Return a new update with the scale of its source, rounded to the source's type."""
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


def _load_scaled(adapter: Adapter, name: str) -> Update:
    """Load one module; raise if its scale is unknown."""
    update = adapter[name]
    if isinstance(update, LowRankUpdate):
        update.known_scale()
    return update


def _ranks(
    adapter: Adapter,
    budget: int,
    progress: Callable[[str, int, int], None] | None,
    workers: int,
) -> dict[str, int]:
    """Return the rank of each module within a budget, from the singular values of all."""

    def spectrum_and_cost(name: str) -> tuple[NDArray[np.float64], int]:
        update = _load_scaled(adapter, name)
        cost = sum(update.shape)
        if isinstance(update, DenseUpdate):
            most = max(1, min(budget // cost, *update.shape))  # more cannot fit into the budget
            return linalg.leading_singular_values(update.delta, most), cost
        whole = spectrum(update, vectors=False)
        return whole.S[: whole.numerical_rank], cost

    values, costs = {}, {}
    results = in_threads(spectrum_and_cost, adapter, workers=workers)
    for done, (name, (sigma, cost)) in enumerate(zip(adapter, results, strict=True), start=1):
        values[name], costs[name] = sigma, cost
        if progress:
            progress("spectra", done, len(adapter))
    return ranks_within(budget, values, costs)


def _note(result: ResizedAdapter, updates: dict[str, LowRankUpdate | LazyUpdate]) -> str:
    dropped = sum(module.rank == 0 for module in result.modules)
    left_out = f"; {dropped} modules of which nothing was kept are left out" if dropped else ""
    outlines = (u.outline if isinstance(u, LazyUpdate) else u for u in updates.values())
    dora = any(outline.variant for outline in outlines)
    return (
        f"Made from {result.adapter.label} by its leading singular directions: "
        f"{result.parameters:,} of {result.given_parameters:,} parameters, relative error "
        f"{result.error:.3g}{left_out}."
    ) + (" For DoRA the errors are those of the low-rank part." if dora else "")
