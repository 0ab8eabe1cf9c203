"""The adapter around edited updates: which facts about the source are still true."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_analysis.adapter import Adapter, LazyUpdate, LowRankUpdate
from lora_analysis.finding import as_findings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_analysis.adapter import Update

# The writer computes these from the updates; those of the source's config are outdated.
_OUTDATED = ("rank_pattern", "alpha_pattern", "r", "lora_alpha")


def derive_adapter(
    adapter: Adapter, updates: Mapping[str, Update | Callable[[], Update]], note: str
) -> Adapter:
    """Return an adapter in memory with the label, head, task and base of another.

    Parameters
    ----------
    adapter
        The source.
    updates
        The new adapter's modules. If some of the source's are missing, the config's targets are
        narrowed to the rest. The ranks of updates that a plain function returns stay unknown.
    note
        A sentence about the edit, which becomes a finding.
    """
    source = adapter.provenance
    ranks = {_rank(update) for update in updates.values()}
    config = {key: value for key, value in adapter.config.items() if key not in _OUTDATED}
    if len(updates) < len(adapter):
        config["target_modules"] = list(updates)
    return adapter.copy_with(
        updates=updates,
        provenance=replace(
            source,
            path=None,
            format="memory",
            files=(),
            scale_origin={name: source.scale_origin.get(name, "caller") for name in updates},
            rank=ranks.pop() if len(ranks) == 1 else None,
            findings=(*source.findings, *as_findings((note,))),
            source_format=source.source_format or source.format,
            also_read=source.inputs,
        ),
        config=config,
    )


def _rank(update: Update | Callable[[], Update]) -> int | None:
    if isinstance(update, LazyUpdate):
        return None if update.outline.dense else update.outline.rank
    return update.rank if isinstance(update, LowRankUpdate) else None
