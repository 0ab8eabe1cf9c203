"""What happened to one weight: is an update in it, at what strength, and how it was rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.adapter import DenseUpdate, LowRankUpdate
from lora_analysis.effective import effective_update
from lora_analysis.errors import ScaleError
from lora_analysis.merging.replay import (
    HALF_TYPES,
    Entries,
    Recipe,
    dora_fits,
    is_unchanged,
    misfits,
    recipes,
    sample_positions,
    spacing,
    strength_interval,
    sum_bounds,
)
from lora_analysis.storage.dtypes import round_float32, round_to

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Update
    from lora_analysis.bases import Weight

# Entries that hypotheses are tried on before they are confirmed on all.
SAMPLE: Final = 2**16
# Entries that are replayed at a time.
_REPLAYED: Final = 2**17
_FLOAT_TYPES: Final = ("bfloat16", "float16", "float32", "float64")
# ΔW of this many spacings stands out of the rounding enough to estimate its strength.
_CLEAR: Final = 5
# Coefficients of single directions that count as 0 or 1.
_NEAR: Final = 0.2
_TWICE: Final = 2.0
# A strength below this is not a strength where rounding explains the difference.
_NEGLIGIBLE: Final = 0.02
# Cosine of W′ − W with the update of another module from which on that module is tried.
_RELATED: Final = 0.1


class MergeConclusion(StrEnum):
    """What was done to a weight."""

    APPLIED = "applied"
    WRONG_STRENGTH = "wrong strength"
    TWICE = "applied twice"
    PARTLY = "partly applied"
    ABSENT = "absent"
    RESTORED = "restored after a merge"
    CHANGED = "changed otherwise"
    INCONCLUSIVE = "inconclusive"


class Cause(StrEnum):
    """The likely cause of a conclusion, if there is a known one."""

    NOTHING_TO_SEE = "a correct merge changes no entry of this type"
    QUANTIZED = "the merged weight is quantized: its rounding is not replayed"
    NO_UPDATE = "ΔW is zero"
    UNSCALED = "the scale was left out"
    SCALED_TWICE = "the scale was applied twice"
    NOT_DIVIDED = "α was used in place of α/r"
    RSLORA_AS_LORA = "α/r was used in place of α/√r"
    LORA_AS_RSLORA = "α/√r was used in place of α/r"
    NEGATED = "ΔW was subtracted"
    MERGED_TWICE = "it was merged into a model that it was already in"
    SOME_RANKS = "only some of the rank's directions were added"
    SOME_ROWS = "only some rows have it"
    SOME_COLUMNS = "only some columns have it"
    WITHOUT_MAGNITUDE = "the low-rank part was added without DoRA's magnitudes"
    TRANSPOSED = "the transpose of ΔW was added"
    OTHER_MODULE = "the update of another module was added"
    NOT_FINITE = "the merged weight holds numbers that are not finite"


@dataclass(frozen=True, slots=True)
class ModuleMerge:
    """The conclusion about one adapted weight.

    Attributes
    ----------
    module, tensor
        Name in the adapter, and of the tensor (or part of one) in the merged model.
    conclusion, cause
        What was done, and why, if a cause is known.
    recipe
        Where the merge rounded, if the update was applied; empty else.
    strength
        Least and largest multiple of ΔW that the numbers allow; None if none explains them.
    change
        ‖ΔW‖/‖W‖.
    detail
        The strength as a number for `MergeConclusion.WRONG_STRENGTH`, the directions, the share of
        rows or the name of the other module.
    """

    module: str
    tensor: str
    conclusion: MergeConclusion
    cause: Cause | None = None
    recipe: str = ""
    strength: tuple[float, float] | None = None
    change: float = float("nan")
    detail: str = ""

    @property
    def resolution(self) -> float:
        """The smallest difference in strength that would have shown; NaN if it is not known."""
        if self.strength is None or self.conclusion is not MergeConclusion.APPLIED:
            return float("nan")
        return max(self.strength[1] - 1, 1 - self.strength[0])


class Factored:
    """An update as the product and the scale that a merge adds.

    Parameters
    ----------
    update
        A low-rank update with a known scale, or a dense one.
    """

    def __init__(self, update: Update) -> None:
        self.update = update
        if isinstance(update, LowRankUpdate):
            self.scale = update.known_scale()
            self.rank = update.rank
            self.A, self.B = update.A.astype(np.float64), update.B.astype(np.float64)
        else:
            self.scale, self.rank = 1.0, 1

    def products(
        self, rows: NDArray[np.intp], columns: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return B·A and |B|·|A| at single entries, each ``(n,)``."""
        if isinstance(self.update, DenseUpdate):
            values = self.update.delta[rows, columns].astype(np.float64)
            return values, np.abs(values)
        terms = self.terms(rows, columns)
        return terms.sum(axis=1), np.abs(terms).sum(axis=1)

    def terms(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the terms of B·A at single entries, ``(n, r)``."""
        return self.B[rows] * self.A[:, columns].T

    def tile(self, rows: slice, columns: slice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return B·A and |B|·|A| of a tile of the weight."""
        if isinstance(self.update, DenseUpdate):
            values = self.update.delta[rows, columns].astype(np.float64)
            return values, np.abs(values)
        A, B = self.A[:, columns], self.B[rows]
        return B @ A, np.abs(B) @ np.abs(A)

    def float32_tile(self, rows: slice, columns: slice) -> NDArray[np.float32]:
        """Return ΔW of a tile of the weight, computed in float32 as a merge does."""
        if isinstance(self.update, DenseUpdate):
            return self.update.delta[rows, columns].astype(np.float32)
        A, B = self.update.A[:, columns], self.update.B[rows]
        scaled = np.float32(self.scale) * B.astype(np.float32, copy=False)
        delta: NDArray[np.float32] = scaled @ A.astype(np.float32, copy=False)
        return delta

    def computed_in(self, dtype: str) -> Iterator[tuple[str, Factored]]:
        """Yield the factors rounded to half precision, with the scale left apart, in B and in A.

        A merge of a model that was cast together with its adapter rounds there, and so does one
        that scales a factor before the product.
        """
        update = self.update
        if not isinstance(update, LowRankUpdate):
            return
        A, B = round_to(self.A, dtype), round_to(self.B, dtype)
        cast = replace(update, A=A, B=B, stored_dtype=dtype)
        if update.stored_dtype != dtype:
            yield f"A and B rounded to {dtype}", Factored(cast)
        if math.frexp(abs(self.scale))[0] == 0.5:
            return  # a power of two scales without rounding
        plain = replace(cast, scale=1.0, alpha=None)
        for b in [B] if update.stored_dtype == dtype else [self.B, B]:
            scaled = replace(plain, B=round_to(self.scale * b, dtype))
            yield f"A and s·B rounded to {dtype}", Factored(scaled)
        for a in [A] if update.stored_dtype == dtype else [self.A, A]:
            scaled = replace(plain, A=round_to(self.scale * a, dtype))
            yield f"s·A and B rounded to {dtype}", Factored(scaled)

    def transposed(self) -> Factored:
        """Return the update with its transpose as ΔW."""
        plain: dict[str, Any] = {"layout": "linear", "kernel": ()}
        if isinstance(self.update, DenseUpdate):
            return Factored(replace(self.update, delta=self.update.delta.T, **plain))
        A, B = self.update.B.T, self.update.A.T
        return Factored(replace(self.update, A=A, B=B, magnitude=None, **plain))


Confirm = Callable[[Entries], "NDArray[np.bool_]"]
Fails = Callable[[Entries, Recipe], "NDArray[np.bool_]"]


class MergedWeight:
    """W and W′ of one module: sampled entries for hypotheses, tiles for their confirmation.

    Parameters
    ----------
    before, after
        The weight in the base and in the merged model, of one shape.
    """

    def __init__(self, before: Weight, after: Weight) -> None:
        self.after = after
        self.shape = after.shape
        self.W = before.array()
        positions = sample_positions(self.shape, SAMPLE)
        self.rows, self.columns = np.divmod(positions, self.shape[1])
        self.merged = np.empty(len(positions))
        exact = dict.fromkeys(HALF_TYPES, after.stored_dtype not in HALF_TYPES)
        self.is_identical = self.is_finite = True
        for rows, columns, tile in after.blocks(check=False):
            # One pass; comparing each value takes two.
            square = float(np.vdot(values := tile.ravel(order="K"), values))
            self.is_finite &= math.isfinite(square) or bool(np.isfinite(tile).all())
            inside = np.flatnonzero(
                (self.rows >= rows.start)
                & (self.rows < rows.stop)
                & (self.columns >= columns.start)
                & (self.columns < columns.stop)
            )
            self.merged[inside] = tile[
                self.rows[inside] - rows.start, self.columns[inside] - columns.start
            ]
            # The first row decides it for most: a merge changes some entry of it.
            before_tile = self.W[rows, columns]
            self.is_identical = (
                self.is_identical
                and np.array_equal(tile[:1], before_tile[:1])
                and np.array_equal(tile, before_tile)
            )
            for dtype, so_far in exact.items():
                exact[dtype] = so_far and _is_exact(tile, dtype)
        self.merged_type = _effective_type(after.stored_dtype, exact)
        self.base_type = before.stored_dtype
        if self.base_type not in HALF_TYPES:
            self.base_type = _effective_type(
                self.base_type, {dtype: _is_exact(self.W, dtype) for dtype in HALF_TYPES}
            )

    def sample(self, factored: Factored) -> Entries:
        """Return the sampled entries, with the product of an update."""
        products, bounds = factored.products(self.rows, self.columns)
        weight = self.W[self.rows, self.columns].astype(np.float64)
        return Entries(weight, self.merged, products, bounds, factored.scale, factored.rank)

    def tiles(self, factored: Factored) -> Iterator[tuple[slice, slice, Entries]]:
        """Yield all entries, tile by tile, with the product of an update."""
        for rows, columns, tile in self.after.blocks(check=False):
            values, bounds = factored.tile(rows, columns)
            weight = self.W[rows, columns].astype(np.float64).ravel()
            merged = tile.astype(np.float64).ravel()
            yield (
                rows,
                columns,
                Entries(
                    weight, merged, values.ravel(), bounds.ravel(), factored.scale, factored.rank
                ),
            )

    def is_replayed(self, factored: Factored, recipe: Recipe, strength: float) -> bool:
        """Return True if no entry contradicts a merge at one strength, as `misfits` decides.

        What one float32 replay gives is within the bounds, so only entries that differ from it
        take bounds of their own.
        """
        for rows, columns, tile in self.after.blocks(check=False):
            # Some rows at a time: what is computed from them stays in the cache.
            height = max(1, _REPLAYED // tile.shape[1])
            for top in range(rows.start, rows.stop, height):
                stop = min(top + height, rows.stop)
                part = slice(top, stop)
                merged = tile[top - rows.start : stop - rows.start]
                weight = self.W[part, columns]
                replayed = factored.float32_tile(part, columns)
                if strength != 1:
                    replayed = np.float32(strength) * replayed
                for dtype in recipe.delta:
                    replayed = round_float32(replayed, dtype)
                loaded = round_float32(weight, recipe.base) if recipe.base else weight
                replayed = reduce(round_float32, recipe.final, replayed + loaded)
                different = np.flatnonzero(replayed != merged)
                for chosen in np.array_split(different, 1 + len(different) // SAMPLE):
                    i, j = np.divmod(chosen, merged.shape[1])
                    products, bounds = factored.products(top + i, columns.start + j)
                    before, after = (values[i, j].astype(np.float64) for values in (weight, merged))
                    entries = Entries(
                        before, after, products, bounds, factored.scale, factored.rank
                    )
                    if misfits(entries, recipe, (strength, strength)).any():
                        return False
        return True

    def failing_lines(
        self, factored: Factored, fails: Confirm
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return the rows and the columns in which an entry fails, ``(d_out,)`` and ``(d_in,)``."""
        in_rows, in_columns = np.zeros(self.shape[0], bool), np.zeros(self.shape[1], bool)
        for rows, columns, entries in self.tiles(factored):
            failing = fails(entries).reshape(rows.stop - rows.start, -1)
            in_rows[rows] |= failing.any(axis=1)
            in_columns[columns] |= failing.any(axis=0)
        return in_rows, in_columns


def _is_exact(values: NDArray[np.float32], dtype: str) -> bool:
    if dtype == "bfloat16":
        return not (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFF)).any()
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def _effective_type(stored: str, exact: Mapping[str, bool]) -> str:
    """Return the type that the numbers have: a float32 file may hold half precision."""
    if stored in HALF_TYPES:
        return stored
    return next((dtype for dtype in HALF_TYPES if exact[dtype]), "float32")


def check_module(
    module: str,
    update: Update,
    before: Weight,
    after: Weight,
    others: Mapping[str, Callable[[], Update]],
) -> ModuleMerge:
    """Conclude what happened to one weight.

    Parameters
    ----------
    module
        Name in the adapter.
    update
        Its update, with a known scale; DoRA's magnitudes are taken into account.
    before, after
        The weight in the base and in the merged model.
    others
        Updates of other modules of the same shape, which may have been added here by mistake.
    """
    weight = MergedWeight(before, after)
    added = update
    if isinstance(update, LowRankUpdate) and update.variant not in ("", "DoRA"):
        added = effective_update(update, before)  # DoRA's part is checked with its magnitudes
    factored = Factored(added)
    sampled = weight.sample(factored)
    norm = float(np.linalg.norm(weight.W))
    result = ModuleMerge(
        module, after.name, MergeConclusion.CHANGED,
        change=_norm(update) / norm if norm else math.inf,
    )  # fmt: skip
    if not np.any(sampled.product) and not _norm(update):
        identical = weight.is_identical
        conclusion = MergeConclusion.INCONCLUSIVE if identical else MergeConclusion.CHANGED
        return replace(result, conclusion=conclusion, cause=Cause.NO_UPDATE if identical else None)
    if not weight.is_finite:
        return replace(result, cause=Cause.NOT_FINITE)
    if after.storage or after.stored_dtype not in _FLOAT_TYPES:
        if weight.is_identical:
            return replace(result, conclusion=MergeConclusion.ABSENT, cause=Cause.QUANTIZED)
        strength, error = _least_squares(sampled)
        return replace(
            result, conclusion=MergeConclusion.INCONCLUSIVE, cause=Cause.QUANTIZED,
            detail=f"close to {strength:.3g} ± {2 * error:.1g} times ΔW",
        )  # fmt: skip
    types = (weight.base_type, update.stored_dtype, weight.merged_type)
    case = _Case(result, weight, factored, sampled, recipes(*types), others, [])
    dora = update if isinstance(update, LowRankUpdate) and update.variant == "DoRA" else None
    if dora is None and (concluded := _check_whole(case)) is not None:
        return concluded
    # W may also have been loaded in another type, which takes a pass over it to tell.
    loaded = [dtype for dtype in HALF_TYPES if not _is_exact(weight.W, dtype)]
    case = replace(case, candidates=recipes(*types, loaded=loaded), loaded=loaded)
    if dora is not None:
        return _check_dora(case, dora)
    for rule in (
        _check_whole, _check_rounded_factors, _check_strength, _check_twice, _check_lines,
        _check_ranks, _check_other_updates, _check_restored, _check_rounded_mistakes,
    ):  # fmt: skip
        if (concluded := rule(case)) is not None:
            return concluded
    steps = spacing(sampled.weight, weight.merged_type)
    if float(np.sqrt(np.mean((sampled.delta / steps) ** 2))) < _CLEAR:
        return result
    strength, error = _least_squares(sampled)
    detail = f"close to {strength:.3g} ± {2 * error:.1g} times ΔW, not exactly"
    return replace(result, detail=detail)


def _norm(update: Update) -> float:
    if isinstance(update, DenseUpdate):
        return float(np.linalg.norm(update.delta))
    B, A = update.B.astype(np.float64), update.A.astype(np.float64)
    square = float(np.sum((B.T @ B) * (A @ A.T)))
    return abs(update.known_scale()) * math.sqrt(max(square, 0.0))


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """One weight, and an update whose merge into it is tried."""

    result: ModuleMerge
    weight: MergedWeight
    factored: Factored
    sampled: Entries
    candidates: Sequence[Recipe]
    others: Mapping[str, Callable[[], Update]]
    loaded: Sequence[str]

    def of(self, factored: Factored) -> _Case:
        """Return the same weight with another update."""
        return replace(self, factored=factored, sampled=self.weight.sample(factored))

    @property
    def difference(self) -> NDArray[np.float64]:
        """Return W′ − W at the sampled entries."""
        return self.sampled.merged - self.sampled.weight

    def find_recipe(
        self,
        fails: Fails,
        candidates: Sequence[Recipe] | None = None,
        strengths: tuple[float, float] = (1.0, 1.0),
    ) -> Recipe | None:
        """Return the first recipe with which no entry fails, sampled ones first."""
        few = self.sampled.at(slice(None, None, max(1, len(self.sampled) // 2048)))
        at_one_strength = fails is misfits and strengths[0] == strengths[1]
        if fails is misfits:
            fails = partial(misfits, strengths=strengths)
        for recipe in self.candidates if candidates is None else candidates:
            if fails(few, recipe).any() or fails(self.sampled, recipe).any():
                continue
            if at_one_strength and not recipe.product:
                fits = self.weight.is_replayed(self.factored, recipe, strengths[0])
            else:
                entries = (entries for _, _, entries in self.weight.tiles(self.factored))
                fits = not any(fails(tile, recipe).any() for tile in entries)
            if fits:
                return recipe
        return None


def _check_whole(case: _Case) -> ModuleMerge | None:
    """Conclude that the update is in the weight, that it is not, or that either may be."""
    applied = case.find_recipe(misfits)
    absent = case.candidates[0] if case.weight.is_identical else case.find_recipe(_is_changed)
    if applied is not None and absent is not None:
        return replace(
            case.result, conclusion=MergeConclusion.INCONCLUSIVE, cause=Cause.NOTHING_TO_SEE,
            strength=strength_interval(case.sampled, applied),
        )  # fmt: skip
    if applied is not None:
        return replace(
            case.result, conclusion=MergeConclusion.APPLIED, recipe=str(applied),
            strength=strength_interval(case.sampled, applied),
        )  # fmt: skip
    if absent is not None:
        interval = strength_interval(case.sampled, absent)
        return replace(case.result, conclusion=MergeConclusion.ABSENT, strength=interval)
    return None


def _with_rounded_factors(case: _Case) -> Iterator[tuple[str, _Case]]:
    """Yield the case with factors that half precision has rounded, and how."""
    adapter_type = case.factored.update.stored_dtype
    base_type, merged_type = case.weight.base_type, case.weight.merged_type
    for dtype in HALF_TYPES:
        if dtype not in (base_type, adapter_type, merged_type):
            continue
        candidates: dict[Recipe, None] = {}
        for of_factors in (dtype, adapter_type):
            tried = recipes(base_type, of_factors, merged_type, loaded=case.loaded)
            candidates |= dict.fromkeys(tried)
        for rounding, factored in case.factored.computed_in(dtype):
            yield rounding, replace(case.of(factored), candidates=list(candidates))


def _check_rounded_factors(case: _Case) -> ModuleMerge | None:
    """Conclude that the update was added with factors that half precision had rounded before."""
    for rounding, rounded in _with_rounded_factors(case):
        if (recipe := rounded.find_recipe(misfits)) is not None:
            return replace(
                case.result, conclusion=MergeConclusion.APPLIED, recipe=f"{rounding}, {recipe}",
                strength=strength_interval(rounded.sampled, recipe),
            )  # fmt: skip
    return None


def _check_rounded_mistakes(case: _Case) -> ModuleMerge | None:
    """Conclude as the rules for exact factors do, with factors that half precision has rounded."""
    if not _is_related(case):
        return None
    for _, rounded in _with_rounded_factors(case):
        for rule in (_check_strength, _check_twice, _check_lines, _check_ranks):
            if (concluded := rule(rounded)) is not None:
                return concluded
    return None


def _is_related(case: _Case) -> bool:
    """Return True if the difference has a component along the update."""
    delta, difference = case.sampled.delta, case.difference
    size = float(np.linalg.norm(delta) * np.linalg.norm(difference))
    return size > 0 and abs(float(delta @ difference)) > _RELATED * size


def _is_changed(entries: Entries, recipe: Recipe) -> NDArray[np.bool_]:
    return ~is_unchanged(entries, recipe)


def _check_strength(case: _Case) -> ModuleMerge | None:
    """Conclude that a multiple of the update was added, and which."""
    intervals = [(recipe, strength_interval(case.sampled, recipe)) for recipe in case.candidates]
    possible = [(recipe, interval) for recipe, interval in intervals if interval is not None]
    # Multiples of ΔW that known mistakes make, with the mistake; the first cause of each counts.
    scale, rank = case.factored.scale, case.factored.rank
    root = math.sqrt(rank)
    mistakes: list[tuple[float, Cause | None]] = [(_TWICE, None), (0.5, None), (-1, Cause.NEGATED)]
    if scale:
        mistakes.append((1 / scale, Cause.UNSCALED))
        mistakes += [(scale, Cause.SCALED_TWICE), (scale**2, Cause.SCALED_TWICE)]
    mistakes += [(1 / root, Cause.RSLORA_AS_LORA), (root, Cause.LORA_AS_RSLORA)]
    mistakes.append((rank, Cause.NOT_DIVIDED))
    named: dict[float, Cause | None] = {}
    for strength, cause in mistakes:
        if not math.isclose(strength, 1):
            named.setdefault(float(strength), cause)
    for strength, cause in named.items():
        fitting = [recipe for recipe, (low, high) in possible if low <= strength <= high]
        pair = (strength, strength)
        recipe = case.find_recipe(misfits, candidates=fitting, strengths=pair)
        if recipe is not None:
            wrong = MergeConclusion.TWICE if strength == _TWICE else MergeConclusion.WRONG_STRENGTH
            return replace(
                case.result, conclusion=wrong, cause=cause, detail=f"{strength:.6g}",
                strength=strength_interval(case.sampled, recipe),
            )  # fmt: skip
    for recipe, interval in possible:
        low, high = interval
        if not math.isfinite(low + high) or low <= 1 <= high:
            continue
        if max(-low, high) < _NEGLIGIBLE and (restored := _check_restored(case)):
            return restored
        if case.find_recipe(misfits, candidates=[recipe], strengths=interval):
            near = next((strength for strength in named if low <= strength <= high), None)
            wrong = MergeConclusion.TWICE if near == _TWICE else MergeConclusion.WRONG_STRENGTH
            return replace(
                case.result, conclusion=wrong, cause=named.get(near) if near else None,
                strength=interval, detail=f"{near or (low + high) / 2:.6g}",
            )  # fmt: skip
    return None


def _misfits_twice(entries: Entries, recipe: Recipe) -> NDArray[np.bool_]:
    """Return the entries that two merges after each other cannot have given."""
    low, high = entries.weight, entries.weight
    for _ in range(2):
        below, _ = sum_bounds(replace(entries, weight=low), recipe)
        _, above = sum_bounds(replace(entries, weight=high), recipe)
        low, high = reduce(round_to, recipe.final, below), reduce(round_to, recipe.final, above)
    return (entries.merged < low) | (entries.merged > high)


def _check_twice(case: _Case) -> ModuleMerge | None:
    """Conclude that the update was merged into a weight that it was already in."""
    if case.find_recipe(_misfits_twice) is None:
        return None
    return replace(
        case.result, conclusion=MergeConclusion.TWICE, cause=Cause.MERGED_TWICE, strength=(2.0, 2.0)
    )


def _check_lines(case: _Case) -> ModuleMerge | None:
    """Conclude that some rows or columns have the update, and the others are unchanged."""
    for recipe in case.candidates:
        if (misfits(case.sampled, recipe) & ~is_unchanged(case.sampled, recipe)).any():
            continue
        lacking = case.weight.failing_lines(case.factored, partial(misfits, recipe=recipe))
        changed = case.weight.failing_lines(case.factored, partial(_is_changed, recipe=recipe))
        for cause, lacks, changes in zip(
            (Cause.SOME_ROWS, Cause.SOME_COLUMNS), lacking, changed, strict=True
        ):
            if (lacks & changes).any() or lacks.all() or not lacks.any():
                continue
            missing = np.flatnonzero(lacks)
            return replace(
                case.result, conclusion=MergeConclusion.PARTLY, cause=cause,
                detail=f"{len(missing)} of {len(lacks)} without, {missing[0]} to {missing[-1]}",
            )  # fmt: skip
    return None


def _check_ranks(case: _Case) -> ModuleMerge | None:
    """Conclude that some directions of the factors were added, and not the others."""
    update = case.factored.update
    if isinstance(update, DenseUpdate) or update.rank < 2:
        return None
    terms = case.factored.scale * case.factored.terms(case.weight.rows, case.weight.columns)
    coefficients, *_ = np.linalg.lstsq(terms, case.difference, rcond=None)
    whole = np.abs(coefficients - 1) < _NEAR
    if not (whole | (np.abs(coefficients) < _NEAR)).all() or whole.all() or not whole.any():
        return None
    part = Factored(replace(update, A=update.A[whole], B=update.B[:, whole]))
    if case.of(part).find_recipe(misfits) is None:
        return None
    return replace(
        case.result, conclusion=MergeConclusion.PARTLY, cause=Cause.SOME_RANKS,
        detail=f"{part.rank} of {case.factored.rank} directions",
    )  # fmt: skip


def _check_other_updates(case: _Case) -> ModuleMerge | None:
    """Conclude that something else of the adapter was added: the transpose, another module."""
    if case.weight.shape[0] == case.weight.shape[1]:
        turned = case.factored.transposed()
        if case.of(turned).find_recipe(misfits) is not None:
            return replace(case.result, cause=Cause.TRANSPOSED)
    for name, load in case.others.items():
        try:
            candidate = case.of(Factored(load()))
        except ScaleError:
            continue
        if _is_related(candidate) and candidate.find_recipe(misfits) is not None:
            return replace(case.result, cause=Cause.OTHER_MODULE, detail=name)
    return None


def _check_restored(case: _Case) -> ModuleMerge | None:
    """Conclude that the update was added and subtracted again, which leaves rounding errors."""
    reached = np.abs(case.sampled.weight) + np.abs(case.sampled.delta)
    if (np.abs(case.difference) > 1.01 * spacing(reached, case.weight.merged_type)).any():
        return None
    strength, error = _least_squares(case.sampled)
    if abs(strength) > max(_NEGLIGIBLE, 4 * error):
        return None
    return replace(case.result, conclusion=MergeConclusion.RESTORED)


def _least_squares(sampled: Entries) -> tuple[float, float]:
    """Return the multiple of ΔW closest to the difference, and its standard error."""
    delta, difference = sampled.delta, sampled.merged - sampled.weight
    square = float(delta @ delta)
    strength = float(delta @ difference) / square
    residual = float(np.std(difference - strength * delta))
    return strength, residual / math.sqrt(square)


def _check_dora(case: _Case, update: LowRankUpdate) -> ModuleMerge:
    """Conclude about a weight whose rows (or columns) were rescaled to learned magnitudes."""
    weight = case.weight
    after = weight.after.array()
    applied = dora_fits(update, weight.W, after, case.candidates, weight.merged_type)
    if weight.is_identical or case.find_recipe(_is_changed):
        conclusion = MergeConclusion.INCONCLUSIVE if applied else MergeConclusion.ABSENT
        cause = Cause.NOTHING_TO_SEE if applied else None
        return replace(case.result, conclusion=conclusion, cause=cause)
    if applied is not None:
        return replace(case.result, conclusion=MergeConclusion.APPLIED, recipe=str(applied))
    if case.find_recipe(misfits) is not None:
        return replace(
            case.result, conclusion=MergeConclusion.PARTLY, cause=Cause.WITHOUT_MAGNITUDE
        )
    return case.result
