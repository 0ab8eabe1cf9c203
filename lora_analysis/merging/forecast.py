"""What a merge would keep: the rounding of the sum to a stored type, before it is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.blocks import choose_names
from lora_analysis.effective import effective_update, stated_orientation
from lora_analysis.finding import Finding
from lora_analysis.formats import as_adapter
from lora_analysis.merging.model_check import adapted_weight, open_for_adapter
from lora_analysis.merging.module_check import Factored
from lora_analysis.merging.other_tensors import ROUNDED_TYPES
from lora_analysis.storage.dtypes import round_to
from lora_analysis.storage.limits import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from lora_analysis.adapter import Update
    from lora_analysis.bases import Weight
    from lora_analysis.progress import Progress


@dataclass(frozen=True, slots=True)
class MergeForecast:
    """What one merged weight of a type would keep of its update.

    Attributes
    ----------
    module, dtype
        Name in the adapter, and the type that the merged weight is stored in.
    retained
        ⟨W′ − round(W), ΔW⟩/‖ΔW‖²: 1 if the merge adds ΔW, 0 if rounding swallows it.
    unchanged
        Share of entries that the merge leaves as they are.
    noise
        ‖W′ − round(W) − ΔW‖/‖ΔW‖, of which most is rounding.
    rounding
        ‖W − round(W)‖/‖ΔW‖: what storing W in this type changes by itself, in units of ΔW.
    quantization
        ‖error of W's quantization‖/‖ΔW‖; NaN if the base is not quantized, or it is not known.
    change
        ‖ΔW‖/‖W‖.
    """

    module: str
    dtype: str
    retained: float
    unchanged: float
    noise: float
    rounding: float
    quantization: float
    change: float

    @property
    def is_lost(self) -> bool:
        """True if W is in this type already, and half of ΔW or more is swallowed."""
        return self.rounding == 0 and self.retained < 0.5


def merge_forecast(
    adapter: Any,
    base: Any,
    *,
    dtype: str | None = None,
    transposed: bool | None = None,
    modules: str | Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[MergeForecast]:
    """Forecast how much of each module's ΔW a merge into a type would keep, by replaying it.

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
    old = open_for_adapter(base, adapter)
    transposed = stated_orientation(adapter, transposed)
    names = choose_names(adapter, modules)
    results = []
    for done, name in enumerate(names, start=1):
        weight = adapted_weight(old, adapter, name, transposed)
        stored = weight.stored_dtype if not weight.storage else "bfloat16"
        target = dtype or (stored if stored in ROUNDED_TYPES else "bfloat16")
        results.append(_forecast(name, effective_update(adapter[name], weight), weight, target))
        if progress:
            progress("modules", done, len(names))
    return results


def _forecast(module: str, update: Update, weight: Weight, dtype: str) -> MergeForecast:
    """Replay the merge of one weight; its numbers leave memory before those of the next come."""
    factored = Factored(update)
    W = weight.array()
    inner = square = noise = rounding = norm = 0.0
    same = 0
    step = max(1, BLOCK_ELEMENTS // W.shape[1])
    for start in range(0, W.shape[0], step):
        rows = slice(start, min(start + step, W.shape[0]))
        product, _ = factored.tile(rows, slice(0, W.shape[1]))
        delta = factored.scale * product
        before = W[rows].astype(np.float64)
        stored = round_to(before, dtype)
        added = round_to(before + delta, dtype) - stored
        inner += float(np.vdot(added, delta))
        square += float(np.vdot(delta, delta))
        noise += float(np.sum(np.square(added - delta)))
        rounding += float(np.sum(np.square(before - stored)))
        norm += float(np.vdot(before, before))
        same += int(np.count_nonzero(added == 0))
    size = float(np.sqrt(square))
    error = weight.noise()
    undefined = float("nan")
    return MergeForecast(
        module,
        dtype,
        retained=inner / square if square else undefined,
        unchanged=same / W.size,
        noise=float(np.sqrt(noise)) / size if size else undefined,
        rounding=float(np.sqrt(rounding)) / size if size else undefined,
        quantization=undefined if error is None or not size else error * np.sqrt(norm) / size,
        change=size / float(np.sqrt(norm)) if norm else undefined,
    )


def forecast_findings(adapter: str, forecasts: Sequence[MergeForecast]) -> Iterator[Finding]:
    """Yield what to tell about a merge that has not been done."""
    defined = [forecast for forecast in forecasts if not np.isnan(forecast.retained)]
    if not defined:
        return
    for dtype in dict.fromkeys(forecast.dtype for forecast in defined):
        group = [forecast for forecast in defined if forecast.dtype == dtype]
        names = {"adapter": adapter, "dtype": dtype, "total": len(group)}
        medians = {
            name: float(np.median([getattr(forecast, name) for forecast in group]))
            for name in ("retained", "unchanged", "noise", "rounding", "quantization")
        }
        swallowed = [forecast.module for forecast in group if forecast.is_lost]
        if swallowed:
            yield Finding("forecast-lost", {**names, "count": len(swallowed), "modules": swallowed})
        least = min(forecast.retained for forecast in group)
        yield Finding("forecast", {**names, **medians, "least": least})
        if medians["rounding"] > 1:
            yield Finding("forecast-rounding", {**names, **medians})
        if not np.isnan(medians["quantization"]):
            yield Finding("forecast-quantized", {**names, **medians})
