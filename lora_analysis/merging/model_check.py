"""Check whether an adapter is in a merged model, at which strength, and what else differs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.bases import check_experts, open_base
from lora_analysis.bases.base_weights import BaseWeights
from lora_analysis.blocks import choose_names
from lora_analysis.effective import stated_orientation
from lora_analysis.errors import BaseWeightError, IncompatibleError, InputError
from lora_analysis.finding import Finding
from lora_analysis.formats import as_adapter
from lora_analysis.merging.module_check import Cause, MergeConclusion, ModuleMerge, check_module
from lora_analysis.merging.other_tensors import (
    BAD_STATES,
    ModelTensors,
    TensorComparison,
    TensorDifference,
    TensorState,
)
from lora_analysis.results import frame

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.adapter import Adapter
    from lora_analysis.bases import Weight
    from lora_analysis.progress import Progress

_GOOD: Final = (MergeConclusion.APPLIED, MergeConclusion.INCONCLUSIVE)
# Modules that a sentence names.
_LISTED: Final = 8


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
            tensor.state in BAD_STATES for tensor in self.tensors
        )

    @property
    def is_partial(self) -> bool:
        """True if a module or a stored tensor of the adapter could not be checked."""
        unmatched = any(tensor.state is TensorState.UNMATCHED for tensor in self.tensors)
        return bool(self.unmatched) or unmatched

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
            extra = any(tensor.state in BAD_STATES for tensor in self.tensors)
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
                fields["first"] = group[0].detail or None
                yield Finding("merge-inconclusive", fields)
            else:
                listed = []
                for module in group[:_LISTED]:
                    interval = module.strength or (math.nan, math.nan)
                    if conclusion is not MergeConclusion.WRONG_STRENGTH:
                        interval = math.nan, math.nan
                    low, high = interval if math.isfinite(sum(interval)) else (None, None)
                    row = {"module": module.module, "detail": module.detail or None}
                    listed.append({**row, "low": low, "high": high})
                fields |= {"conclusion": str(conclusion), "modules": listed}
                yield Finding("merge-not-applied", fields)
        if applied:
            low, high = self.strength() or (None, None)
            resolutions = [m.resolution for m in applied if not math.isnan(m.resolution)]
            counted = Counter(module.recipe for module in applied).most_common()
            fields = {
                "count": len(applied), "low": low, "high": high,
                "resolution": max(resolutions, default=None),
                "recipes": [{"recipe": recipe, "count": count} for recipe, count in counted],
            }  # fmt: skip
            yield Finding("merge-applied", {**names, **total, **fields})
        yield from self._tensor_findings()
        if self.unmatched:
            fields = {
                "modules": list(self.unmatched),
                "reason": next(iter(self.unmatched.values())),
            }
            count = {"count": len(self.unmatched), "total": len(self.unmatched) + len(self.modules)}
            yield Finding("merge-unmatched", {**names, **count, **fields})

    def _tensor_findings(self) -> Iterator[Finding]:
        by_state: dict[TensorState, list[str]] = {}
        for tensor in self.tensors:
            by_state.setdefault(tensor.state, []).append(tensor.name)
        for state, tensors in by_state.items():
            code = "merge-tensors" if state in BAD_STATES else "merge-other-tensors"
            if state is TensorState.SAVED:
                code = "merge-saved"
            fields = {"count": len(tensors), "state": str(state), "tensors": tensors}
            yield Finding(code, {"merged": self.merged, **fields})

    def to_frame(self) -> pd.DataFrame:
        """Return one row per module."""
        return frame([module_row(module) for module in self.modules])


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

    Every adapted weight of the merged model is compared with every value that a correct merge could
    produce, whatever it rounded and in which order it summed; see `replay`. A weight that fails
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
    old, new = open_for_adapter(base, adapter), open_for_adapter(merged, adapter)
    new.model_type = new.model_type or old.model_type
    old.model_type = old.model_type or new.model_type
    transposed = stated_orientation(adapter, transposed)
    names = choose_names(adapter, modules)
    checked: list[ModuleMerge] = []
    unmatched: dict[str, str] = {}
    in_base, in_merged = ModelTensors(old), ModelTensors(new)
    shapes = {name: adapter.outline(name).shape for name in names}
    for done, name in enumerate(names, start=1):
        adapter.outline(name).known_scale()
        try:
            before = adapted_weight(old, adapter, name, transposed)
            after = adapted_weight(new, adapter, name, transposed)
            in_base.add(before)
            in_merged.add(after)
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
        comparison = TensorComparison(adapter, in_base, in_merged, transposed)
        for difference in comparison.differences(progress):
            equal += difference is None
            tensors += [] if difference is None else [difference]
    return MergeCheck(
        adapter.label, old.label, new.label, tuple(checked), tuple(tensors), equal, unmatched
    )


def open_for_adapter(model: Any, adapter: Adapter) -> BaseWeights:
    """Return a model's weights, by the names of an adapter's modules."""
    weights = model if isinstance(model, BaseWeights) else open_base(model)
    check_experts(adapter, weights)
    return weights.matched_to([adapter])


def adapted_weight(
    model: BaseWeights, adapter: Adapter, name: str, transposed: bool | None
) -> Weight:
    """Return the weight that a module of an adapter adapts."""
    outline = adapter.outline(name)
    return model.weight(outline.base_name or name, shape=outline.shape, transposed=transposed)
