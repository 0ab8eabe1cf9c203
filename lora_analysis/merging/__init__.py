"""Whether an adapter is in a merged model, at what strength, and what a merge loses."""

from lora_analysis.merging.forecast import MergeForecast, forecast_findings, merge_forecast
from lora_analysis.merging.model_check import MergeCheck, merge_check
from lora_analysis.merging.module_check import Cause, MergeConclusion, ModuleMerge
from lora_analysis.merging.other_tensors import TensorDifference, TensorState
from lora_analysis.merging.replay import Recipe

__all__ = [
    "Cause",
    "MergeCheck",
    "MergeConclusion",
    "MergeForecast",
    "ModuleMerge",
    "Recipe",
    "TensorDifference",
    "TensorState",
    "forecast_findings",
    "merge_check",
    "merge_forecast",
]
