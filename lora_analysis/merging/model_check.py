"""Check whether an adapter is in a merged model, at which strength, and what else differs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.bases import check_experts, open_base
from lora_analysis.bases.base_weights import BaseWeights
from lora_analysis.blocks import choose_names
from lora_analysis.effective import effective_update, stated_orientation
from lora_analysis.errors import BaseWeightError, IncompatibleError, InputError
from lora_analysis.finding import Finding
from lora_analysis.formats import as_adapter
from lora_analysis.merging.forecast import MergeForecast, forecast_module
from lora_analysis.merging.module_check import Cause, MergeConclusion, ModuleMerge, check_module
from lora_analysis.merging.replay import round_to
from lora_analysis.names import strip_wrappers
from lora_analysis.results import frame
from lora_analysis.storage.dtypes import widened

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.adapter import Adapter
    from lora_analysis.bases import Weight
    from lora_analysis.progress import Progress

_GOOD: Final = (MergeConclusion.APPLIED, MergeConclusion.INCONCLUSIVE)
# Modules that a sentence names.
_LISTED: Final = 8
_FORECAST_TYPES: Final = ("bfloat16", "float16", "float32")


class TensorState(StrEnum):
    """What was found about a tensor that is not an adapted weight."""

    SAVED = "trained in full and stored in the adapter: applied"
    SAVED_ABSENT = "trained in full and stored in the adapter: not applied"
    CHANGED = "differs, and the adapter does not explain it"
    OTHER_ROWS = "differs in rows that the adapter does not adapt"
    ONLY_BASE = "only in the base"
    ONLY_MERGED = "only in the merged model"
    UNREADABLE = "cannot be compared"


_BAD_STATES: Final = (TensorState.SAVED_ABSENT, TensorState.CHANGED, TensorState.OTHER_ROWS)


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that is not an adapted weight and differs between the models."""

    name: str
    state: TensorState
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MergeCheck:
    """Conclusions about every adapted weight and about every other tensor of two models.

    Attributes
    ----------
    adapter, base, merged
        Their labels.
    modules
        One conclusion per module of the adapter that both models have.
    tensors
        Other tensors that differ, or are in one model only; equal ones are counted in ``equal``.
    equal
        Number of other tensors that are the same in both.
    unmatched
        Modules that a model does not have, or whose numbers cannot be read, with the reason.
    """

    adapter: str
    base: str
    merged: str
    modules: tuple[ModuleMerge, ...]
    tensors: tuple[TensorDifference, ...]
    equal: int
    unmatched: Mapping[str, str]

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts().items())
        return f"<MergeCheck of {self.adapter!r} in {self.merged!r}: {counts}>"

    def counts(self) -> dict[MergeConclusion, int]:
        """Return the number of modules with each conclusion, most frequent first."""
        counted = Counter(module.conclusion for module in self.modules)
        return dict(counted.most_common())

    @property
    def is_failed(self) -> bool:
        """True if a module is not in the model as the adapter says, or more than that differs."""
        return any(module.conclusion not in _GOOD for module in self.modules) or any(
            tensor.state in _BAD_STATES for tensor in self.tensors
        )

    @property
    def is_inconclusive(self) -> bool:
        """True if nothing is wrong, but nothing shows that the adapter was merged either."""
        return not self.is_failed and not any(
            module.conclusion is MergeConclusion.APPLIED for module in self.modules
        )

    @property
    def conclusion(self) -> MergeConclusion:
        """The conclusion about the model: that of all modules that are not as they should be."""
        counts = self.counts()
        if self.is_inconclusive:
            return MergeConclusion.INCONCLUSIVE
        wrong = counts.keys() - set(_GOOD)
        if not wrong:
            extra = any(tensor.state in _BAD_STATES for tensor in self.tensors)
            return MergeConclusion.CHANGED if extra else MergeConclusion.APPLIED
        is_missing = MergeConclusion.APPLIED in counts or MergeConclusion.PARTLY in wrong
        if is_missing and wrong <= {MergeConclusion.ABSENT, MergeConclusion.PARTLY}:
            return MergeConclusion.PARTLY
        if wrong == {MergeConclusion.ABSENT, MergeConclusion.RESTORED}:
            return MergeConclusion.RESTORED
        return wrong.pop() if len(wrong) == 1 else MergeConclusion.CHANGED

    def strength(self) -> tuple[float, float] | None:
        """Return the multiple of ΔW that all applied modules allow; None if none is known."""
        intervals = [m.strength for m in self.modules if m.recipe and m.strength is not None]
        if not intervals:
            return None
        return max(low for low, _ in intervals), min(high for _, high in intervals)

    def findings(self) -> Iterator[Finding]:
        """Yield what to tell about the model: mistakes, then what is applied, then limits."""
        names = {"adapter": self.adapter, "merged": self.merged}
        total = {"total": len(self.modules)}
        applied: list[ModuleMerge] = []
        by_kind: dict[tuple[MergeConclusion, Cause | None], list[ModuleMerge]] = {}
        for module in self.modules:
            if module.conclusion is MergeConclusion.APPLIED:
                applied.append(module)
            else:
                by_kind.setdefault((module.conclusion, module.cause), []).append(module)
        for (conclusion, cause), group in by_kind.items():
            fields: dict[str, Any] = {**names, **total, "count": len(group)}
            fields["cause"] = cause and str(cause)
            if conclusion is MergeConclusion.INCONCLUSIVE:
                fields["modules"] = [module.module for module in group]
                yield Finding("merge-inconclusive", fields)
            else:
                rows = [module_row(module) for module in group[:_LISTED]]
                fields |= {"conclusion": str(conclusion), "modules": [_shown(row) for row in rows]}
                yield Finding("merge-not-applied", fields)
        if applied:
            yield Finding("merge-applied", {**names, **total, **self._of_applied(applied)})
        yield from self._tensor_findings()
        if self.unmatched:
            fields = {
                "modules": list(self.unmatched),
                "reason": next(iter(self.unmatched.values())),
            }
            count = {"count": len(self.unmatched), "total": len(self.unmatched) + len(self.modules)}
            yield Finding("merge-unmatched", {**names, **count, **fields})

    def _of_applied(self, applied: Sequence[ModuleMerge]) -> dict[str, Any]:
        low, high = self.strength() or (None, None)
        resolutions = [m.resolution for m in applied if not math.isnan(m.resolution)]
        counted = Counter(module.recipe for module in applied).most_common()
        return {
            "count": len(applied), "low": low, "high": high,
            "resolution": max(resolutions, default=None),
            "recipes": [{"recipe": recipe, "count": count} for recipe, count in counted],
        }  # fmt: skip

    def _tensor_findings(self) -> Iterator[Finding]:
        by_state: dict[TensorState, list[str]] = {}
        for tensor in self.tensors:
            by_state.setdefault(tensor.state, []).append(tensor.name)
        for state, tensors in by_state.items():
            code = "merge-tensors" if state in _BAD_STATES else "merge-other-tensors"
            if state is TensorState.SAVED:
                code = "merge-saved"
            fields = {"count": len(tensors), "state": str(state), "tensors": tensors}
            yield Finding(code, {"merged": self.merged, **fields})

    def to_frame(self) -> pd.DataFrame:
        """Return one row per module."""
        return frame([module_row(module) for module in self.modules])


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a sentence about one module that is not as it should be."""
    interval = row["strength_low"], row["strength_high"]
    is_told = row["conclusion"] == MergeConclusion.WRONG_STRENGTH and math.isfinite(sum(interval))
    return {
        "module": row["module"],
        "detail": row["detail"] or None,
        "low": interval[0] if is_told else None,
        "high": interval[1] if is_told else None,
    }


def module_row(module: ModuleMerge) -> dict[str, Any]:
    """Return the fields of a conclusion, as tables and JSON have them."""
    low, high = module.strength or (float("nan"), float("nan"))
    return {
        "module": module.module,
        "tensor": module.tensor,
        "conclusion": str(module.conclusion),
        "cause": None if module.cause is None else module.cause.name.lower().replace("_", "-"),
        "detail": module.detail,
        "recipe": module.recipe,
        "strength_low": low,
        "strength_high": high,
        "resolution": module.resolution,
        "change": module.change,
    }


def merge_check(
    adapter: Any,
    base: Any,
    merged: Any,
    *,
    transposed: bool | None = None,
    modules: str | Sequence[str] | None = None,
    progress: Progress | None = None,
) -> MergeCheck:
    """Check whether an adapter is in a merged model.

    Every adapted weight of the merged model is compared with all that a correct merge can have
    made of it, whatever it rounded and in which order it summed; see `replay`. A weight that fails
    is compared with the results of known mistakes: another strength, a second merge, missing rows,
    directions or layers. All other tensors of both models are compared as they are.

    Parameters
    ----------
    adapter
        Anything that :func:`lora_analysis.as_adapter` takes, with known scales.
    base, merged
        The two models: anything :func:`lora_analysis.open_base` accepts or returns.
    transposed
        As in ``BaseWeights.weight``, for both.
    modules
        Modules to check: the end of a name, a list of ends, or a regular expression. Other tensors
        are then not compared. None for all.
    progress
        Function called with (name of the stage, done, total).

    Raises
    ------
    ScaleError
        The scale of a module is not known.
    InputError
        No module of the adapter has a weight in both models.

    Notes
    -----
    Both models are read tensor by tensor; in memory are one weight and a tile of the other.
    """
    adapter = as_adapter(adapter)
    old, new = _opened(base, adapter), _opened(merged, adapter)
    new.model_type = new.model_type or old.model_type
    old.model_type = old.model_type or new.model_type
    transposed = stated_orientation(adapter, transposed)
    names = choose_names(adapter, modules)
    checked: list[ModuleMerge] = []
    unmatched: dict[str, str] = {}
    covered: dict[str, list[Weight]] = {}
    shapes = {name: adapter.outline(name).shape for name in names}
    for done, name in enumerate(names, start=1):
        adapter.outline(name).known_scale()
        try:
            before = _weight(old, adapter, name, transposed)
            after = _weight(new, adapter, name, transposed)
            for tensor in {piece.tensor for piece in after.pieces}:
                covered.setdefault(tensor, []).append(after)
            others = {
                other: partial(adapter.__getitem__, other)
                for other in names
                if other != name and shapes[other] == shapes[name]
            }
            checked.append(check_module(name, adapter[name], before, after, others))
        except (BaseWeightError, IncompatibleError) as error:
            unmatched[name] = str(error)
        if progress:
            progress("modules", done, len(names))
    if not checked:
        message = (
            f"No module of {adapter.label} has a weight in both {old.label} and {new.label}. The "
            f"first: {next(iter(unmatched.values()))}"
        )
        raise InputError(message)
    tensors: list[TensorDifference] = []
    equal = 0
    if modules is None:
        for compared in _other_tensors(_Models.of(adapter, old, new), covered, progress):
            equal += compared is None
            tensors += [] if compared is None else [compared]
    return MergeCheck(
        adapter.label, old.label, new.label, tuple(checked), tuple(tensors), equal, unmatched
    )


def merge_forecast(
    adapter: Any,
    base: Any,
    *,
    dtype: str | None = None,
    transposed: bool | None = None,
    modules: str | Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[MergeForecast]:
    """Forecast how much of each module's ΔW a merge into a type would keep.

    Parameters
    ----------
    adapter, base, transposed, modules, progress
        As for `merge_check`.
    dtype
        ``"bfloat16"``, ``"float16"`` or ``"float32"``; by default the base's own (of a quantized
        base bfloat16).

    Raises
    ------
    ScaleError
        The scale of a module is not known.
    BaseWeightError
        The base has no weight for a module.
    """
    adapter = as_adapter(adapter)
    old = _opened(base, adapter)
    transposed = stated_orientation(adapter, transposed)
    names = choose_names(adapter, modules)
    results = []
    for done, name in enumerate(names, start=1):
        weight = _weight(old, adapter, name, transposed)
        update = effective_update(adapter[name], weight)
        stored = weight.stored_dtype if not weight.storage else "bfloat16"
        target = dtype or (stored if stored in _FORECAST_TYPES else "bfloat16")
        results.append(forecast_module(name, update, weight, target))
        if progress:
            progress("modules", done, len(names))
    return results


def _opened(model: Any, adapter: Adapter) -> BaseWeights:
    weights = model if isinstance(model, BaseWeights) else open_base(model)
    check_experts(adapter, weights)
    return weights.matched_to([adapter])


def _weight(model: BaseWeights, adapter: Adapter, name: str, transposed: bool | None) -> Weight:
    outline = adapter.outline(name)
    return model.weight(outline.base_name or name, shape=outline.shape, transposed=transposed)


def _other_tensors(
    models: _Models, covered: Mapping[str, Sequence[Weight]], progress: Progress | None
) -> Iterator[TensorDifference | None]:
    """Yield what is known of every tensor, or rest of one, that no module adapts; None if equal."""
    pairs = _partners(models.old.names, models.new.names)
    for done, (before, after) in enumerate(pairs, start=1):
        if before is None or after is None:
            state = TensorState.ONLY_MERGED if before is None else TensorState.ONLY_BASE
            yield TensorDifference(after or before or "", state)
        elif not _is_covered(covered.get(after, ()), after, models.new.stored_shape(after)):
            yield models.compare(before, after, covered.get(after, ()))
        if progress:
            progress("other tensors", done, len(pairs))


_MARK: Final = re.compile(r"(^|\.)modules_to_save\.[^.]+\.")


def _plain(name: str) -> str:
    return strip_wrappers(_MARK.sub(r"\1", name))


def _partners(before: Sequence[str], after: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Return the tensors of two models in pairs, by name, then by name without wrappers."""
    left = dict.fromkeys(before)
    pairs: list[tuple[str | None, str | None]] = []
    rest = []
    for name in after:
        if name in left:
            pairs.append((name, name))
            del left[name]
        else:
            rest.append(name)
    short: dict[str, list[str]] = {}
    for name in left:
        short.setdefault(_without_model(name), []).append(name)
    for name in rest:
        candidates = short.get(_without_model(name), [])
        if len(candidates) == 1 and candidates[0] in left:
            pairs.append((candidates[0], name))
            del left[candidates[0]]
        else:
            pairs.append((None, name))
    return [*pairs, *((name, None) for name in left)]


def _without_model(name: str) -> str:
    return strip_wrappers(name).removeprefix("model.")


@dataclass(frozen=True, slots=True, eq=False)
class _Models:
    """The models before and after a merge, and what the adapter stores besides factors."""

    adapter: Adapter
    old: BaseWeights
    new: BaseWeights
    saved: Mapping[str, str]

    @classmethod
    def of(cls, adapter: Adapter, old: BaseWeights, new: BaseWeights) -> _Models:
        """Return them, with the names that the adapter's tensors have in a model."""
        saved = {_plain(name): name for name in adapter.saved_modules}
        for key, tensor in adapter.side_tensors.items():
            if tensor.alters_model:
                saved.setdefault(_plain(key), key)
        return cls(adapter, old, new, saved)

    def compare(
        self, before: str, after: str, weights: Sequence[Weight]
    ) -> TensorDifference | None:
        """Compare one tensor, or the rows of it that no module adapts; None if they are equal."""
        shape, dtype = self.new.stored_shape(after), self.new.stored_dtype(after)
        try:
            if self.old.stored_shape(before) != shape:
                reason = f"{self.old.stored_shape(before)} in the base, {shape} in the merged model"
                return TensorDifference(after, TensorState.UNREADABLE, reason)
            first, second = self.old.stored_tensor(before), self.new.stored_tensor(after)
        except InputError as error:
            return TensorDifference(after, TensorState.UNREADABLE, str(error))
        if weights:
            differing = np.asarray(_rounded(first, dtype) != np.asarray(second))
            _leave_out(differing, after, weights)
            return TensorDifference(after, TensorState.OTHER_ROWS) if differing.any() else None
        if (stored := self.saved.get(_plain(after))) is not None:
            target = _rounded(self._saved_tensor(stored), dtype)
            same = np.array_equal(target, second)
            return TensorDifference(after, TensorState.SAVED if same else TensorState.SAVED_ABSENT)
        if np.array_equal(first, second) or np.array_equal(_rounded(first, dtype), second):
            return None
        return TensorDifference(after, TensorState.CHANGED)

    def _saved_tensor(self, name: str) -> Any:
        if name in self.adapter.saved_modules:
            return np.asarray(self.adapter.saved_modules[name])
        tensor = self.adapter.side_tensors[name]
        return widened(tensor.read(), tensor.dtype)


def _is_covered(weights: Sequence[Weight], tensor: str, shape: tuple[int, ...]) -> bool:
    """Return True if modules adapt every entry of a tensor."""
    entries = sum(
        piece.height * weight.shape[1]
        for weight in weights
        for piece in weight.pieces
        if piece.tensor == tensor
    )
    return bool(weights) and entries >= math.prod(shape)


def _leave_out(differing: Any, tensor: str, weights: Iterable[Weight]) -> None:
    """Set the entries of a tensor that modules adapt to False."""
    for weight in weights:
        for piece in weight.pieces:
            if piece.tensor != tensor:
                continue
            part = differing if piece.index is None else differing[piece.index]
            for run in piece.runs:
                if weight.transposed:
                    part[..., run] = False
                else:
                    part[run] = False


def _rounded(values: Any, dtype: str) -> Any:
    """Return a tensor as a type stores it; as it is if it is not of floating-point numbers."""
    array = np.asarray(values)
    if dtype not in _FORECAST_TYPES or not np.issubdtype(array.dtype, np.floating):
        return array
    return round_to(array.astype(np.float64), dtype)
