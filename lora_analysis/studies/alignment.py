"""One name for one module, where adapters of the same model call it by two.

An adapter of diffusers names ``unet.mid_block…`` what PEFT on the denoiser alone, and diffusers
before it had text encoders, name ``mid_block…``; a model with a head names ``bert.encoder…`` what
the model without it names ``encoder…``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from lora_analysis.adapter import Adapter, LowRankUpdate, Update
from lora_analysis.finding import as_findings


def aligned(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters, a leading segment left out of names that others have without it.

    Only where the adapter shares no name with those others as it is. The weight in the base is
    looked up by the full name all the same, and a note says what was left out.
    """
    names = [frozenset(adapter) for adapter in adapters]
    # Of a thousand adapters most have the same names.
    heads = {own: _strange_head(own, set(names)) for own in set(names)}
    return [
        _without(adapter, head) if (head := heads[own]) else adapter
        for adapter, own in zip(adapters, names, strict=True)
    ]


def _strange_head(own: frozenset[str], every: Iterable[frozenset[str]]) -> str | None:
    """Return the segment that stands before the names of ``own`` and not before others' alone."""
    for head in sorted({name.partition(".")[0] for name in own if "." in name}):
        start = f"{head}."
        apart = (names for names in every if not any(one.startswith(start) for one in names))
        others = frozenset().union(*apart)
        shorter = {name.removeprefix(start) for name in own if name.startswith(start)}
        if shorter & others and not own & others:
            return head
    return None


def _without(adapter: Adapter, head: str) -> Adapter:
    shorter = {name: name.removeprefix(f"{head}.") for name in adapter}
    source = adapter.provenance
    note = f"its modules are called '{head}.…', those of others not; compared without it."
    origins = {shorter.get(name, name): one for name, one in source.scale_origin.items()}
    return Adapter(
        {new: partial(_renamed, adapter, name, new) for name, new in shorter.items()},
        label=adapter.label,
        provenance=replace(
            source, scale_origin=origins, findings=(*source.findings, *as_findings((note,)))
        ),
        saved_modules=adapter.saved_modules,
        config=adapter.config,
    )


def _renamed(adapter: Adapter, name: str, new: str) -> Update:
    update = adapter[name]
    if isinstance(update, LowRankUpdate):
        return replace(update, name=new, base_name=update.base_name or name)
    return replace(update, name=new)
