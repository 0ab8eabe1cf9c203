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
from lora_analysis.blocks import choose_names
from lora_analysis.edit.budgets import ranks_within
from lora_analysis.edit.interventions import derive_adapter
from lora_analysis.edit.truncation import (
    Truncation,
    check_size,
    distance_from_dense,
    leading_outline,
    leading_part,
    measure_truncation,
    small_distance,
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
from lora_analysis.formats.written import check_dtype, has_unknown_scale, round_update
from lora_analysis.patterns import near_names
from lora_analysis.results import frame
from lora_analysis.spectra import spectrum
from lora_analysis.storage.dtypes import narrowed_type

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
    rank_for: Mapping[str, int] | None = None,
    dtype: str | None = None,
    modules: str | Sequence[str] | None = None,
    transposed: bool | None = None,
    label: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ResizedAdapter:
    """Return the best low-rank approximation of a full fine-tune, and its error per module.

    ``ΔW = W_tuned - W_base`` of every weight matrix, truncated to its leading singular directions
    as by :func:`lora_analysis.resize_adapter`: no low-rank update of those ranks is closer.
    Parameters that are not matrices (biases, norms) and unchanged weights are excluded and named in
    the findings.

    Parameters
    ----------
    tuned, base
        The two models: anything :func:`lora_analysis.open_base` takes.
    rank, energy, budget, rank_for, dtype
        As for `resize_adapter`.
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
    unchanged = {
        name
        for finding in update.provenance.findings
        if finding.code == "unchanged-weights"
        for name in finding.fields["modules"]
    }
    changed = {name: update.lazy(name) for name in update if name not in unchanged}
    return resize_adapter(
        update.copy_with(updates=changed),
        rank=rank,
        energy=energy,
        budget=budget,
        rank_for=rank_for,
        dtype=dtype,
        progress=progress,
        workers=available_workers(),
    )


def resize_adapter(
    adapter: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    rank_for: Mapping[str, int] | None = None,
    dtype: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    workers: int | None = None,
) -> ResizedAdapter:
    """Return an adapter by the leading directions of each of its modules, and the error.

    Low-rank updates are read and measured now, and computed when a module of the result is
    accessed: the result holds no factors, and takes them from ``adapter`` each time. Each module
    as by :func:`lora_analysis.truncate`, with exactly one of rank, energy and budget. Modules keep
    their scale and the type of their file; the error includes the rounding to that type.

    Parameters
    ----------
    adapter
        Low-rank or dense updates, in any form that :func:`as_adapter` takes. An unknown scale
        stays unknown: a truncation does not need it, and errors over several modules take it to
        be the same in all of them.
    rank
        The same for every module; a module of a smaller numerical rank keeps that.
    energy
        Share of Σσ² that every module keeps at least.
    budget
        Parameters of all factors together (magnitudes and modules trained in full do not count);
        the rank of each module is chosen by `ranks_within`. A module of rank 0 is left out of the
        adapter.
    rank_for
        Ranks by pattern, for modules that get another one than ``rank`` or ``energy`` gives them.
        A pattern selects modules as ``modules`` does elsewhere: the end of a name, a regular
        expression, or a block or part of an image model. The first that matches counts.
    dtype
        Type to which factors are rounded, as for :func:`lora_analysis.write_adapter`. By default
        the one in which each module is stored; what is in memory in float64 is not rounded.
    progress
        Called with (what, done, total).
    workers
        Modules that are in memory at the same time; by default two, or one on a single CPU.

    Raises
    ------
    InputError
        As for `truncate`; the adapter has no modules; no direction fits into the budget; a
        pattern matches no module; or a number is too large for the type.
    ScaleError
        The scale of some modules is known and that of others is not: modules could not be
        compared with each other.

    Examples
    --------
    >>> A, B = np.eye(2, 5), np.eye(7, 2) * [4.0, 3.0]
    >>> updates = {name: LowRankUpdate(name, A, B, scale=2.0) for name in ("0.q_proj", "0.v_proj")}
    >>> small = resize_adapter(Adapter(updates, label="a"), rank=1, rank_for={"v_proj": 2})
    >>> [update.rank for update in small.adapter.values()]
    [1, 2]
    """
    check_size(rank=rank, energy=energy, budget=budget)
    adapter = as_adapter(adapter)
    if dtype is not None:
        check_dtype(dtype)
    if not len(adapter):
        message = f"{adapter.label} has no modules; there is nothing to resize."
        raise InputError(message)
    workers = workers or min(_WORKERS, available_workers())
    ranks = dict.fromkeys(adapter, rank) | _pattern_ranks(adapter, rank_for or {}, budget)
    if budget is not None:
        ranks = _ranks(adapter, budget, progress, workers)
    updates: dict[str, LowRankUpdate | LazyUpdate] = {}
    outlines: dict[str, UpdateOutline] = {}
    truncations = []
    statistics: list[ModuleStatistics] = []
    resize = partial(_resize_module, adapter, energy=energy, dtype=dtype)
    results = in_threads(resize, ranks.items(), workers=workers)
    for done, (update, truncation, measured) in enumerate(results, start=1):
        truncations.append(truncation)
        statistics.append(measured)
        outline = update.outline if isinstance(update, LazyUpdate) else UpdateOutline.of(update)
        outlines[truncation.module] = outline
        if truncation.rank:
            updates[truncation.module] = update
        if progress:
            progress("modules", done, len(ranks))
    if not has_unknown_scale(outlines):
        for outline in outlines.values():
            outline.known_scale()  # some are known: errors could not be compared with each other
    result = ResizedAdapter(adapter, tuple(truncations))
    new = derive_adapter(adapter, updates, _note(result, outlines))
    findings = new.provenance.findings
    checked = new.with_provenance(findings=(*findings, *sanity_findings(statistics, findings)))
    return replace(result, adapter=checked)


def _pattern_ranks(
    adapter: Adapter, rank_for: Mapping[str, int], budget: int | None
) -> dict[str, int]:
    """Return the rank of each module that a pattern matches."""
    for pattern, rank in rank_for.items():
        if budget is not None:
            message = "rank_for goes with rank or energy; a budget distributes the ranks itself."
            raise InputError(message)
        if rank != int(rank) or rank < 1:
            message = f"rank_for needs whole ranks of at least 1, got {rank!r} for '{pattern}'."
            raise InputError(message)
    ranks: dict[str, int] = {}
    for pattern, rank in rank_for.items():
        new = [module for module in choose_names(adapter, pattern) if module not in ranks]
        if not new:
            near = ", ".join(near_names(pattern, adapter)) or "none"
            message = (
                f"rank_for: '{pattern}' matches no module of {adapter.label}, or an earlier "
                f"pattern matches the same ones. Near names: {near}."
            )
            raise InputError(message)
        ranks |= dict.fromkeys(new, rank)
    return ranks


def _resize_module(
    adapter: Adapter, item: tuple[str, int | None], *, energy: float | None, dtype: str | None
) -> tuple[LowRankUpdate | LazyUpdate, Truncation, ModuleStatistics]:
    """Return one module at its rank (at 1 for rank 0), its error, and its statistics."""
    name, rank = item
    update = adapter[name]
    # A rank of its own goes before the energy of all.
    size = {"rank": rank or 1} if rank is not None else {"energy": energy}
    new: LowRankUpdate | LazyUpdate
    if not isinstance(update, LowRankUpdate):
        new, truncation = truncate(update, **size)
        if dtype is not None and rank != 0:
            new = round_update(new, dtype)
            truncation = replace(truncation, error_norm=distance_from_dense(update, new))
        statistics = module_statistics(update, norm=truncation.norm)
    else:
        truncation, count = measure_truncation(update, **size)
        statistics = module_statistics(update, norm=truncation.norm)
        if dtype is None and update.stored_dtype != "float64":
            dtype = narrowed_type(update.stored_dtype)
        outline = replace(leading_outline(update, count), scale=update.scale)
        if rank != 0:
            exact = leading_part(update, count, keep_scale=True)
            del update  # the numbers of a large module fit into memory once
            stored = round_update(exact, dtype) if dtype else exact
            outline = UpdateOutline.of(stored)
            # Rounding is orthogonal to what was cut off, but for the product of both roundings.
            error_norm = math.hypot(
                truncation.error_norm, small_distance(stored, exact, bound=1.0) or 0.0
            )
            truncation = replace(truncation, error_norm=error_norm)
        new = LazyUpdate(outline, partial(_load_leading, adapter, name, count, dtype))
    if rank == 0:
        truncation = replace(truncation, rank=0, error_norm=truncation.norm)
    return new, truncation, statistics


def _load_leading(adapter: Adapter, name: str, count: int, dtype: str | None) -> Update:
    """Load one module and return its leading directions, rounded to a type."""
    update = adapter[name]
    if isinstance(update, LowRankUpdate):
        update = leading_part(update, count, keep_scale=True)
        return round_update(update, dtype) if dtype else update
    return update


def _ranks(
    adapter: Adapter,
    budget: int,
    progress: Callable[[str, int, int], None] | None,
    workers: int,
) -> dict[str, int]:
    """Return the rank of each module within a budget, from the singular values of all."""

    def spectrum_and_cost(name: str) -> tuple[NDArray[np.float64], int]:
        update = adapter[name]
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


def _note(result: ResizedAdapter, outlines: Mapping[str, UpdateOutline]) -> str:
    dropped = sum(module.rank == 0 for module in result.modules)
    left_out = f"; {dropped} modules of which nothing was kept are left out" if dropped else ""
    dora = any(outline.variant for outline in outlines.values())
    unknown = any(outline.scale is None for outline in outlines.values())
    return (
        f"Made from {result.adapter.label} by its leading singular directions: "
        f"{result.parameters:,} of {result.given_parameters:,} parameters, relative error "
        f"{result.error:.3g}{left_out}."
        + (" For DoRA the errors are those of the low-rank part." if dora else "")
        + (" The scale is unknown; it is that of the source, not its alpha." if unknown else "")
    )
