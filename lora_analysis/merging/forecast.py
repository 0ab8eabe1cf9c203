"""What a merge would keep: the rounding of the sum to a stored type, before it is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.finding import Finding
from lora_analysis.merging.module_check import Factored
from lora_analysis.storage.dtypes import round_to
from lora_analysis.storage.limits import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from lora_analysis.adapter import Update
    from lora_analysis.bases import Weight


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


def forecast_module(module: str, update: Update, weight: Weight, dtype: str) -> MergeForecast:
    """Replay the merge of one weight and measure what is kept.

    Parameters
    ----------
    module
        Name in the adapter.
    update
        Its update, with a known scale; the whole change of the weight for DoRA.
    weight
        The weight in the base.
    dtype
        ``"bfloat16"``, ``"float16"`` or ``"float32"``.
    """
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
