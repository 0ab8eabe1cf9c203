"""A state dictionary under loralib's names, as safetensors.

loralib's files state neither alpha nor ``enable_lora``; here the file's metadata has both, from
which they are read back: ``lora_scale``, the scale of every module, and ``enable_lora``,
``"1,0,1"``, if blocks of fused weights are joined as ``MergedLinear`` has them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.formats.loralib import ENABLED, SCALE, is_convolution, is_embedding
from lora_analysis.formats.merged import FUSED, block_names
from lora_analysis.formats.side_tensors import carried_metadata, side_output
from lora_analysis.formats.text_writing import (
    Factors,
    PlannedFactors,
    common_scale,
    fold_scales,
    folding_note,
    text_outlines,
)
from lora_analysis.storage.tensor_writer import output_group, safetensors_content

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter
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
    updates = text_outlines(adapter, _FORMAT)
    scale = common_scale(updates)
    scales = dict.fromkeys(updates, scale)
    metadata = {"format": "pt", SCALE: repr(float(scale)), **carried_metadata(adapter, _FORMAT)}
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
        tensors += output_group(shapes, partial(_module_arrays, name, planned))
    return {_WEIGHTS_NAME: safetensors_content(tensors, metadata)}


def _module_arrays(name: str, planned: PlannedFactors) -> dict[str, NDArray[np.float32]]:
    factors = planned.load()
    return {f"{name}.lora_A": factors.a, f"{name}.lora_B": factors.b}


def loralib_notes(adapter: Adapter) -> list[str]:
    """Return sentences on the alpha that a model must be made with, and on folded scales."""
    updates = text_outlines(adapter, _FORMAT)
    scale = common_scale(updates)
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
        whole[fused] = PlannedFactors(a, b, "linear", partial(_joined_factors, ordered))
    return whole, next(iter(patterns), None)


def _joined_factors(blocks: Sequence[PlannedFactors]) -> Factors:
    factors = [planned.load() for planned in blocks]
    return Factors(
        np.concatenate([block.a for block in factors]),
        np.concatenate([block.b for block in factors]),
    )
