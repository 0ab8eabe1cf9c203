"""Parts of fused weights, q and v of a joint projection: apart in an adapter, one pair in a file.

A file holds one pair of factors for the whole weight, as its model does: A of the parts below each
other, B with a block of columns for each part, zero outside of its rows. An adapter's config states
the rows of each part under ``fused_parts``, and the file in metadata that other programs ignore::

    {"h.0.attn.c_attn": {"rows": 48, "parts": {"q": [[0, 16]], "v": [[32, 48]]}}}

The metadata also has the rank of each part. A part is named after the weight and itself,
``h.0.attn.c_attn.q``, by which the reader of the base cuts out its rows too.
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
from lora_analysis.formats.written import join_updates
from lora_analysis.storage.documents import parse_json_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import UpdateOutline
    from lora_analysis.formats.factors import StoredPair
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

FUSED_PARTS: Final = "fused_parts"
METADATA: Final = "lora_analysis.fused_parts"


def join_parts(
    adapter: Adapter, *, but: Callable[[str, Mapping[str, Any]], bool] | None = None
) -> Adapter:
    """Return the adapter with the parts of each fused weight as one update of the whole.

    Its config then states the rank of each part too. An adapter without parts is returned as it is;
    weights for which ``but`` returns True (given their name and entry in the config) stay in parts.

    Raises
    ------
    InputError
        A part is dense.
    UnsupportedMethodError
        A part is of a method whose update is more than ``s·B·A``.
    """
    given = adapter.config.get(FUSED_PARTS) or {}
    entries = {name: entry for name, entry in given.items() if not (but and but(name, entry))}
    owners = {
        f"{module}.{part}": module for module, entry in entries.items() for part in entry["parts"]
    }
    if owners.keys().isdisjoint(adapter):
        return adapter
    updates: dict[str, LazyUpdate] = {}
    fused: dict[str, Any] = {}
    for name in adapter:
        module = owners.get(name, name)
        if name not in owners:
            updates[name] = adapter.lazy(name)
        elif module not in fused:
            updates[module], fused[module] = _join(adapter, module, entries[module])
    origins = {owners.get(name, name): o for name, o in adapter.provenance.scale_origin.items()}
    return Adapter(
        updates,
        label=adapter.label,
        provenance=replace(adapter.provenance, scale_origin=origins),
        saved_modules=adapter.saved_modules,
        config={**adapter.config, FUSED_PARTS: fused},
        side_tensors=adapter.side_tensors,
    )


def _join(
    adapter: Adapter, module: str, entry: Mapping[str, Any]
) -> tuple[LazyUpdate, dict[str, Any]]:
    """Return the parts of a weight as an update of the whole, and its entry with their ranks."""
    outlines = {}
    for part in entry["parts"]:
        if (name := f"{module}.{part}") not in adapter:
            continue
        outlines[part] = outline = adapter.outline(name)
        where = f"'{name}' in {outline.label}"
        if outline.dense:
            message = f"{where} is a dense update; a LoRA file holds A and B."
            raise InputError(message)
        if outline.variant:
            message = (
                f"{where} is a part of a fused weight and of {outline.variant}; such parts cannot "
                "be joined."
            )
            raise UnsupportedMethodError(message)
    leading = max(outlines, key=lambda part: abs(outlines[part].known_scale()))
    ranks = {part: outline.rank for part, outline in outlines.items()}
    rows = {part: entry["parts"][part] for part in outlines}
    first = outlines[leading]
    whole = replace(
        first,
        name=module,
        shape=(entry["rows"], first.shape[1]),
        rank=sum(ranks.values()),
        alpha=None,
    )
    load = partial(_load_whole, adapter, whole, rows, leading)
    return LazyUpdate(whole, load), {"rows": entry["rows"], "parts": rows, "ranks": ranks}


def _load_whole(
    adapter: Adapter,
    whole: UpdateOutline,
    parts: Mapping[str, Sequence[Sequence[int]]],
    leading: str,
) -> LowRankUpdate:
    """Return the update of a fused weight: A of its parts below each other, B in their rows."""
    rows = {f"{whole.name}.{part}": indices_of(runs) for part, runs in parts.items()}
    joined = join_updates(adapter, rows, whole.shape[0], f"{whole.name}.{leading}")
    return replace(joined, name=whole.name)


def indices_of(runs: Sequence[Sequence[int]]) -> list[int]:
    """Return the rows in runs ``[start, stop]``."""
    return [row for start, stop in runs for row in range(start, stop)]


def runs_of(rows: Sequence[int]) -> list[list[int]]:
    """Return rows as runs ``[start, stop]``, in order."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] = row + 1
        else:
            runs.append([row, row + 1])
    return runs


def parts_metadata(adapter: Adapter) -> dict[str, str]:
    """Return the metadata of a file whose weights are joined of parts.

    The order of the parts is that of their columns.
    """
    entries = adapter.config.get(FUSED_PARTS) or {}
    present = {module: entry for module, entry in entries.items() if module in adapter}
    return {METADATA: json.dumps(present)} if present else {}


def split_parts(
    tensors: NamedTensors,
    pairs: Sequence[StoredPair],
    scales: Mapping[str, StatedScale],
    options: ReadOptions,
    *,
    rslora: bool,
) -> tuple[list[StoredPair], dict[str, StatedScale], dict[str, Any]]:
    """Return the pairs with fused weights split, their scales, and the config's entries.

    The file's metadata has the entry `METADATA`, which tells the parts.

    Raises
    ------
    MalformedFileError
        The metadata on a weight does not fit its factors.
    """
    text = tensors.metadata[METADATA]
    entries = parse_json_text(text, tensors.path, what=f"metadata '{METADATA}'")
    split: list[StoredPair] = []
    fused: dict[str, Any] = {}
    part_scales: dict[str, StatedScale] = {}
    for pair in pairs:
        scale = scales[pair.module]
        if pair.module not in entries:
            split.append(pair)
            part_scales[pair.module] = scale
            continue
        entry = entries[pair.module]
        _check_entry(tensors, pair, entry)
        fused[pair.module] = {"rows": entry["rows"], "parts": entry["parts"]}
        whole_b = tensor(pair.b.name, shared=True)
        start = 0
        for part, rank in entry["ranks"].items():
            columns = slice(start, start + rank)
            rows = stack([whole_b.rows(slice(*run)) for run in entry["parts"][part]])
            name = f"{pair.module}.{part}"
            split.append(
                replace(pair, module=name, a=pair.a.rows(columns), b=rows.columns(columns))
            )
            # The scale of the whole, with the alpha of the part's rank.
            given = callers_scale(options, rank, rslora=rslora)
            part_scales[name] = given or scale
            if given is None and scale.scale is not None:
                alpha = scale.scale * (rank**0.5 if rslora else rank)
                part_scales[name] = replace(scale, alpha=alpha)
            start += rank
    return split, part_scales, fused


def _check_entry(tensors: NamedTensors, pair: StoredPair, entry: Any) -> None:
    """Raise for parts that do not have the rows and ranks of the factors, or not all of B."""
    try:
        d_out, rank = pair.b.shape(tensors)
        parts, ranks = entry["parts"], entry["ranks"]
        runs = sorted(tuple(run) for runs in parts.values() for run in runs)
        edges = [edge for run in runs for edge in run]
        numbers = [*edges, *ranks.values(), entry["rows"]]
        fits = (
            all(type(number) is int for number in numbers)
            and list(parts) == list(ranks)
            and all(len(run) == 2 and run[0] < run[1] for run in runs)
            and all(parts.values())
            and min(edges) >= 0
            and max(edges) <= d_out == entry["rows"]
            and min(ranks.values()) >= 1
            and sum(ranks.values()) == rank
            and all(first[1] <= second[0] for first, second in pairwise(runs))
            and _is_zero_outside(pair.b.read(tensors), parts, ranks)
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        fits = False
    if not fits:
        message = (
            f"{tensors.file_of(pair.a.name)}: the metadata '{METADATA}' on '{pair.module}' does "
            "not fit its factors. Was the file changed by another program?"
        )
        raise MalformedFileError(message)


def _is_zero_outside(
    B: NDArray[Any], parts: Mapping[str, Sequence[Sequence[int]]], ranks: Mapping[str, int]
) -> bool:
    """Return True if each part's columns of B are zero outside of its rows."""
    start = 0
    for part, rank in ranks.items():
        outside = np.ones(len(B), dtype=bool)
        outside[indices_of(parts[part])] = False
        if np.any(B[outside, start : start + rank]):
            return False
        start += rank
    return True
