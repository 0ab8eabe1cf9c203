"""Parts of fused weights, q and v of a joint projection: apart in an adapter, one pair in a file.

A file holds one pair of factors for the whole weight, which is what its model has: A of the parts
below each other, B with a block of columns for each, zero outside of that part's rows. Which rows
and columns are whose, an adapter's config says under ``fused_parts``, and the file in the metadata
that other programs pass over::

    {"h.0.attn.c_attn": {"rows": 48, "parts": {"q": [[0, 16]], "v": [[32, 48]]}}}

A part goes by the name of the weight and its own, ``h.0.attn.c_attn.q``, by which the reader of
the base cuts its rows out too.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.adapter import Adapter, LazyUpdate, LowRankUpdate
from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.formats.factors import StatedScale, callers_scale
from lora_analysis.formats.stored import stack, tensor
from lora_analysis.storage.documents import parse_json_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import UpdateOutline
    from lora_analysis.formats.factors import StoredPair
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

FUSED_PARTS: Final = "fused_parts"
_METADATA: Final = "lora_analysis.fused_parts"


def joined(
    adapter: Adapter, *, but: Callable[[str, Mapping[str, Any]], bool] | None = None
) -> Adapter:
    """Return the adapter with the parts of each fused weight as one update of the whole.

    Its config then says per weight the rank of each part too. An adapter without parts is
    returned as it is, and of the weights of which ``but`` says so (by name and what the config
    states) the parts are left apart.

    Raises
    ------
    InputError
        A part is dense.
    UnsupportedMethodError
        A part is of a method whose update is more than ``s·B·A``.
    """
    given = adapter.config.get(FUSED_PARTS) or {}
    stated = {module: held for module, held in given.items() if not (but and but(module, held))}
    owners = {
        f"{module}.{part}": module for module, held in stated.items() for part in held["parts"]
    }
    if owners.keys().isdisjoint(adapter):
        return adapter
    updates: dict[str, LazyUpdate] = {}
    told: dict[str, Any] = {}
    for name in adapter:
        module = owners.get(name, name)
        if name not in owners:
            updates[name] = adapter.lazy(name)
        elif module not in told:
            parts = [p for p in stated[module]["parts"] if f"{module}.{p}" in adapter]
            updates[module], told[module] = _whole(adapter, module, stated[module], parts)
    origins = {owners.get(name, name): o for name, o in adapter.provenance.scale_origin.items()}
    return Adapter(
        updates,
        label=adapter.label,
        provenance=replace(adapter.provenance, scale_origin=origins),
        saved_modules=adapter.saved_modules,
        config={**adapter.config, FUSED_PARTS: told},
        side_tensors=adapter.side_tensors,
    )


def _whole(
    adapter: Adapter, module: str, stated: Mapping[str, Any], parts: Sequence[str]
) -> tuple[LazyUpdate, dict[str, Any]]:
    """Return parts as an update of their weight, and what the config says of it."""
    outlines = {part: _plain(adapter.outline(f"{module}.{part}")) for part in parts}
    leading = max(outlines, key=lambda part: abs(outlines[part].known_scale()))
    ranks = {part: outline.rank for part, outline in outlines.items()}
    rows = {part: stated["parts"][part] for part in parts}
    told = {"rows": stated["rows"], "parts": rows, "ranks": ranks}
    first = outlines[leading]
    whole = replace(
        first,
        name=module,
        shape=(stated["rows"], first.shape[1]),
        rank=sum(ranks.values()),
        alpha=None,
    )
    return LazyUpdate(whole, partial(_put_together, adapter, whole, told, leading)), told


def _put_together(
    adapter: Adapter, whole: UpdateOutline, stated: Mapping[str, Any], leading: str
) -> LowRankUpdate:
    """Return the update of a fused weight: A of its parts below each other, B in their rows."""
    updates: dict[str, LowRankUpdate] = {}
    for part in stated["parts"]:
        update = adapter[f"{whole.name}.{part}"]
        if isinstance(update, LowRankUpdate):  # _plain saw to it
            updates[part] = update
    kind = np.result_type(*(update.B for update in updates.values()))
    B = np.zeros((whole.shape[0], whole.rank), kind)
    scale = whole.known_scale()
    start = 0
    for part, update in updates.items():
        same = update.scale == scale
        columns = slice(start, start + update.rank)
        B[indices_of(stated["parts"][part]), columns] = (
            update.B if same else update.B * (update.known_scale() / scale)
        )
        start += update.rank
    A = np.vstack([update.A for update in updates.values()])
    return replace(updates[leading], name=whole.name, A=A, B=B, alpha=None)


def _plain(update: UpdateOutline) -> UpdateOutline:
    if update.dense:
        message = f"'{update.name}' in {update.label} is a dense update; a LoRA file holds A and B."
        raise InputError(message)
    if update.variant:
        message = (
            f"'{update.name}' in {update.label} is a part of a fused weight and of "
            f"{update.variant}; the two are not put together."
        )
        raise UnsupportedMethodError(message)
    return update


def indices_of(runs: Sequence[Sequence[int]]) -> list[int]:
    """Return the rows that runs hold."""
    return [row for start, stop in runs for row in range(start, stop)]


def runs_of(rows: Sequence[int]) -> list[list[int]]:
    """Return rows as runs ``[start, stop]``, in their order."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] = row + 1
        else:
            runs.append([row, row + 1])
    return runs


def parts_metadata(adapter: Adapter) -> dict[str, str]:
    """Return what a file's metadata has to say of an adapter whose parts are joined.

    The order of the parts is that of their columns.
    """
    stated = adapter.config.get(FUSED_PARTS) or {}
    told = {module: held for module, held in stated.items() if module in adapter}
    return {_METADATA: json.dumps(told)} if told else {}


def parted(
    tensors: NamedTensors,
    pairs: Sequence[StoredPair],
    scales: Mapping[str, StatedScale],
    options: ReadOptions,
    *,
    rslora: bool,
) -> tuple[list[StoredPair], dict[str, StatedScale], dict[str, Any]]:
    """Return the pairs with those of fused weights taken apart, their scales, and the config's say.

    Raises
    ------
    MalformedFileError
        What the metadata says of a weight does not fit its factors.
    """
    stated = _stated(tensors)
    found: list[StoredPair] = []
    told: dict[str, Any] = {}
    by_part: dict[str, StatedScale] = {}
    for pair in pairs:
        if pair.module not in stated:
            found.append(pair)
            by_part[pair.module] = scales[pair.module]
            continue
        held = stated[pair.module]
        _check(tensors, pair, held)
        told[pair.module] = {"rows": held["rows"], "parts": held["parts"]}
        for part, rank in _cut(pair, held):
            found.append(part)
            by_part[part.module] = _scale(scales[pair.module], options, rank, rslora=rslora)
    return found, by_part, told


def _stated(tensors: NamedTensors) -> dict[str, Any]:
    text = tensors.metadata.get(_METADATA)
    if text is None:
        return {}
    return parse_json_text(text, tensors.path, what=f"metadata '{_METADATA}'")


def _check(tensors: NamedTensors, pair: StoredPair, held: Any) -> None:
    """Raise for parts whose rows or ranks are not those of the factors, and where B says more."""
    try:
        d_out, rank = pair.b.shape(tensors)
        parts, ranks = held["parts"], held["ranks"]
        edges = [edge for runs in parts.values() for run in runs for edge in run]
        numbers = [*edges, *ranks.values(), held["rows"]]
        fits = (
            all(type(number) is int for number in numbers)
            and list(parts) == list(ranks)
            and all(len(run) == 2 and run[0] < run[1] for runs in parts.values() for run in runs)
            and all(parts.values())
            and min(edges) >= 0
            and max(edges) <= d_out == held["rows"]
            and min(ranks.values()) >= 1
            and sum(ranks.values()) == rank
            and _disjoint(parts.values())
            and _zero_outside(pair.b.read(tensors), parts, ranks)
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        fits = False
    if not fits:
        message = (
            f"{tensors.file_of(pair.a.name)}: what the metadata '{_METADATA}' says of "
            f"'{pair.module}' does not fit its factors. Was the file changed by another program?"
        )
        raise MalformedFileError(message)


def _disjoint(parts: Iterable[Sequence[Sequence[int]]]) -> bool:
    runs = sorted(tuple(run) for part in parts for run in part)
    return all(one[1] <= two[0] for one, two in pairwise(runs))


def _zero_outside(
    B: NDArray[Any], parts: Mapping[str, Sequence[Sequence[int]]], ranks: Mapping[str, int]
) -> bool:
    """Say whether each part's columns of B are zero outside of its rows: else there is more."""
    start = 0
    for part, rank in ranks.items():
        outside = np.ones(len(B), dtype=bool)
        outside[indices_of(parts[part])] = False
        if np.any(B[outside, start : start + rank]):
            return False
        start += rank
    return True


def _cut(pair: StoredPair, held: Mapping[str, Any]) -> Iterator[tuple[StoredPair, int]]:
    """Yield the parts of a pair, each with its rank."""
    whole = tensor(pair.b.name, shared=True)
    start = 0
    for part, rank in held["ranks"].items():
        own = slice(start, start + rank)
        rows = stack([whole.rows(slice(*run)) for run in held["parts"][part]])
        yield (
            replace(pair, module=f"{pair.module}.{part}", a=pair.a.rows(own), b=rows.columns(own)),
            rank,
        )
        start += rank


def _scale(stated: StatedScale, options: ReadOptions, rank: int, *, rslora: bool) -> StatedScale:
    """Return a part's multiplier: that of the whole, with the alpha of its own rank."""
    if called := callers_scale(options, rank, rslora=rslora):
        return called
    if stated.scale is None:
        return stated
    return replace(stated, alpha=stated.scale * (rank**0.5 if rslora else rank))
