"""An adapter from a hub: it says the repository and the commit, not the cache it lies in."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lora_analysis.adapter import Adapter
from lora_analysis.storage.hub_names import shown_errors

if TYPE_CHECKING:
    from lora_analysis.adapter import Update
    from lora_analysis.storage.hub_names import Snapshot


def fetched(adapter: Adapter, snapshot: Snapshot) -> Adapter:
    """Return the adapter with its address on the hub; its modules are still read when asked for."""
    source = adapter.provenance
    return Adapter(
        {name: partial(_load, adapter, name, snapshot) for name in adapter},
        label=adapter.label,
        provenance=replace(
            source,
            address=snapshot.address(source.path or snapshot.path),
            revision=snapshot.commit,
            findings=tuple(one.mapped(snapshot.with_addresses) for one in source.findings),
        ),
        saved_modules=adapter.saved_modules,
        config=adapter.config,
        side_tensors=adapter.side_tensors,
    )


def _load(adapter: Adapter, name: str, snapshot: Snapshot) -> Update:
    with shown_errors(snapshot):
        return adapter[name]
