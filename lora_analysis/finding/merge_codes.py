"""Codes of findings on an adapter in a merged model, with the sentence of each."""

from __future__ import annotations

from typing import Final

from lora_analysis.finding.templates import Code

MERGE_CODES: Final[dict[str, Code]] = {
    "merge-applied": Code(
        "result",
        "merge",
        "applied in {count} of {total:plural module}[[ at strength 1: every number allows "
        "{low:.6g} to {high:.6g}]].[[ A difference of {resolution:.2g} in one module would have "
        "shown.]] Computed as: {recipes}.",
        subject="{adapter} in {merged}",
        items={"recipes": "{recipe} ({count:plural module})"},
    ),
    "merge-not-applied": Code(
        "damage",
        "merge",
        "{conclusion} in {count} of {total:plural module}[[ ({cause})]]: {modules}.",
        subject="{adapter} in {merged}",
        items={"modules": "{module}[[ ({detail})]][[, strength {low:.6g} to {high:.6g}]]"},
    ),
    "merge-inconclusive": Code(
        "limit",
        "merge",
        "inconclusive in {count} of {total:plural module} ({cause}): {modules}.[[ The first is "
        "{first}.]]",
        subject="{adapter} in {merged}",
    ),
    "merge-tensors": Code(
        "damage", "merge", "{state}: {count:plural tensor} ({tensors}).", subject="{merged}"
    ),
    "merge-other-tensors": Code(
        "limit", "merge", "{state}: {count:plural tensor} ({tensors}).", subject="{merged}"
    ),
    "merge-saved": Code(
        "result",
        "merge",
        "{state}: {count:plural tensor} ({tensors}).",
        subject="{merged}",
    ),
    "merge-unmatched": Code(
        "limit",
        "merge",
        "{count} of {total:plural module} were not checked ({modules}). The first: {reason}",
        subject="{adapter} in {merged}",
    ),
    "forecast": Code(
        "result",
        "merge",
        "a merge into {dtype} keeps {retained:.0%} of ΔW (median over {total:plural module}; least "
        "{least:.0%}), and leaves {unchanged:.0%} of the entries as they are. Rounding adds "
        "noise of {noise:.2g} ‖ΔW‖.",
        subject="{adapter}",
    ),
    "forecast-lost": Code(
        "damage",
        "merge",
        "in {count} of {total:plural module}, a merge into {dtype} loses half of ΔW or more: "
        "{modules}. Merge into a wider type, or keep the adapter apart.",
        subject="{adapter}",
    ),
    "forecast-rounding": Code(
        "limit",
        "merge",
        "storing W as {dtype} by itself changes it by {rounding:.2g} ‖ΔW‖ (median over modules): "
        "most of the difference to the base is rounding, not the adapter.",
        subject="{adapter}",
    ),
    "forecast-quantized": Code(
        "limit",
        "merge",
        "the base is quantized; its own rounding error is {quantization:.2g} ‖ΔW‖ (median over "
        "modules).",
        subject="{adapter}",
    ),
}
