"""A state dictionary under loralib's names, as safetensors.

loralib's files state neither alpha nor ``enable_lora``; here the file's metadata has both, from
which they are read back: ``lora_scale``, the scale of every module, and ``enable_lora``,
``"1,0,1"``, if blocks of fused weights are joined as ``MergedLinear`` has them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.formats.loralib import ENABLED, SCALE, is_convolution, is_embedding
from lora_analysis.formats.merged import FUSED, block_names
from lora_analysis.formats.side_tensors import carried_metadata, side_output
from lora_analysis.formats.text_writing import (
    Factors,
    PlannedFactors,
    common_dtype,
    common_scale,
    fold_scales,
    folding_note,
    text_outlines,
)
from lora_analysis.formats.written import has_unknown_scale
from lora_analysis.storage.tensor_writer import output_group, safetensors_content

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, UpdateOutline
    from lora_analysis.storage.atomic import Content

_WEIGHTS_NAME: Final = "lora.safetensors"
_FORMAT: Final = "loralib"


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as one file of safetensors, by its name.

    Raises
    ------
    InputError
        A module's name implies a different layout, or blocks of fused weights do not fit together.
    UnsupportedMethodError
        An update needs more than two factors and a scale.
    """
    updates, scale = _scaled_outlines(adapter)
    metadata = {"format": "pt", **carried_metadata(adapter, _FORMAT)}
    if scale is not None:
        metadata[SCALE] = repr(float(scale))
    scales = dict.fromkeys(updates, 1.0 if scale is None else scale)
    whole, enabled = _join_blocks(fold_scales(adapter, updates, scales))
    if enabled:
        metadata[ENABLED] = ",".join(str(int(on)) for on in enabled)
    tensors = side_output(adapter, _FORMAT)
    for name, planned in whole.items():
        if is_convolution(name) or (planned.layout == "embedding") != is_embedding(name):
            message = (
                f"'{name}' is of layout '{planned.layout}', but readers of loralib's files infer "
                "a different one from the name. It is not written."
            )
            raise InputError(message)
        shapes = {f"{name}.lora_A": planned.a, f"{name}.lora_B": planned.b}
        produce = partial(_module_arrays, name, planned)
        tensors += output_group(shapes, produce, dtype=planned.dtype)
    return {_WEIGHTS_NAME: safetensors_content(tensors, metadata)}


def _scaled_outlines(adapter: Adapter) -> tuple[dict[str, UpdateOutline], float | None]:
    """Return the outlines and their common scale; None, with outlines of scale 1, if unknown."""
    updates = text_outlines(adapter, _FORMAT, unknown_scale=True)
    if has_unknown_scale(updates):
        return {name: replace(update, scale=1.0) for name, update in updates.items()}, None
    return updates, common_scale(updates)


def _module_arrays(name: str, planned: PlannedFactors) -> dict[str, NDArray[Any]]:
    factors = planned.load(planned.dtype)
    return {f"{name}.lora_A": factors.a, f"{name}.lora_B": factors.b}


def loralib_notes(adapter: Adapter) -> list[str]:
    """Return sentences on the alpha that a model must be made with, and on folded scales."""
    updates, scale = _scaled_outlines(adapter)
    if scale is None:
        return []
    scales = dict.fromkeys(updates, scale)
    return [
        f"Make loralib's layers with lora_alpha = {scale:g} · r: a state "
        "dictionary of loralib does not state it.",
        *folding_note(updates, scales, _FORMAT, "lora_alpha"),
    ]


def _join_blocks(
    factors: Mapping[str, PlannedFactors],
) -> tuple[dict[str, PlannedFactors], tuple[bool, ...] | None]:
    """Return the modules with blocks of fused weights joined, and which blocks are enabled.

    Raises
    ------
    InputError
        The blocks of a weight differ in rank or shape, or two weights have different blocks.
    """
    whole: dict[str, PlannedFactors] = {}
    blocks: dict[str, dict[str, PlannedFactors]] = {}
    for name, planned in factors.items():
        fused, _, _ = name.rpartition(".")
        if fused.rpartition(".")[2] in FUSED and name in block_names(fused, 3):
            blocks.setdefault(fused, {})[name] = planned
        else:
            whole[name] = planned
    patterns = set()
    for fused, members in blocks.items():
        names = block_names(fused, 3)
        patterns.add(tuple(name in members for name in names))
        ordered = [members[name] for name in names if name in members]
        if len({(planned.a, planned.b) for planned in ordered}) != 1 or len(patterns) != 1:
            message = (
                f"The blocks of '{fused}' differ in shape or rank, or different blocks are adapted "
                "in another module; loralib's MergedLinear has one rank, and one enable_lora."
            )
            raise InputError(message)
        a, b = ((len(ordered) * s[0], *s[1:]) for s in (ordered[0].a, ordered[0].b))
        load = partial(_joined_factors, ordered)
        whole[fused] = PlannedFactors(a, b, "linear", common_dtype(ordered), load)
    return whole, next(iter(patterns), None)


def _joined_factors(blocks: Sequence[PlannedFactors], dtype: str) -> Factors:
    factors = [planned.load(dtype) for planned in blocks]
    return Factors(
        np.concatenate([block.a for block in factors]),
        np.concatenate([block.b for block in factors]),
    )
