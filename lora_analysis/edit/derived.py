"""The adapter around edited updates: what of the old one still holds of the new one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_analysis.adapter import Adapter, LazyUpdate, LowRankUpdate
from lora_analysis.finding import as_findings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_analysis.adapter import Update

# The writer works these out from the updates; what the old config said of them is no longer so.
_OUTDATED = ("use_rslora", "rank_pattern", "alpha_pattern", "r", "lora_alpha")


def derived(
    adapter: Adapter, updates: Mapping[str, Update | Callable[[], Update]], sentence: str
) -> Adapter:
    """Return an adapter in memory with the label, head, task and base of another.

    Parameters
    ----------
    adapter
        The one it was made from.
    updates
        Its modules. Where some are gone, the config's targets are narrowed to the rest. The ranks
        of those that a plain function returns stay unknown.
    sentence
        What was done, which becomes a finding.
    """
    source = adapter.provenance
    ranks = {_rank(update) for update in updates.values()}
    return Adapter(
        updates,
        label=adapter.label,
        provenance=replace(
            source,
            path=None,
            format="memory",
            files=(),
            scale_origin={name: source.scale_origin.get(name, "caller") for name in updates},
            rank=ranks.pop() if len(ranks) == 1 else None,
            findings=(*source.findings, *as_findings((sentence,))),
            source_format=source.source_format or source.format,
            also_read=source.inputs,
        ),
        saved_modules=adapter.saved_modules,
        config=_config(adapter, updates),
        side_tensors=adapter.side_tensors,
    )


def _rank(update: Update | Callable[[], Update]) -> int | None:
    if isinstance(update, LazyUpdate):
        return None if update.outline.dense else update.outline.rank
    return update.rank if isinstance(update, LowRankUpdate) else None


def _config(adapter: Adapter, updates: Mapping[str, object]) -> dict[str, Any]:
    config = {key: value for key, value in adapter.config.items() if key not in _OUTDATED}
    if len(updates) < len(adapter):
        config["target_modules"] = list(updates)
    return config
