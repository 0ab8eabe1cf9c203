"""A state dictionary under loralib's names, as safetensors.

loralib's files state neither alpha nor ``enable_lora``; here both stand in the file's metadata,
from which they are read back: ``lora_scale``, the multiplier of every module, and
``enable_lora``, ``"1,0,1"``, where blocks of fused weights were put together as ``MergedLinear``
has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.formats.loralib import ENABLED, SCALE, is_convolution, is_embedding
from lora_analysis.formats.merged import FUSED, block_names
from lora_analysis.formats.text_writing import folded, folding_note, one_scale, writable
from lora_analysis.formats.written import saved
from lora_analysis.storage.atomic import write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.text_writing import Factors

_WEIGHTS_NAME: Final = "lora.safetensors"
_FORMAT: Final = "loralib"


def write_loralib(adapter: Adapter, path: Path) -> Path:
    """Write one file: ``path`` where it ends in ``.safetensors``, else a file in that folder.

    Raises
    ------
    InputError
        A module's name means something else to loralib's reader, or blocks of fused weights do
        not fit together.
    UnsupportedMethodError
        An update needs more than two factors and a scale.
    """
    updates = writable(adapter, _FORMAT)
    scale = one_scale(updates)
    factors = folded(updates, lambda _update: scale)
    metadata = {"format": "pt", SCALE: repr(float(scale))}
    whole, enabled = _merged(factors)
    if enabled:
        metadata[ENABLED] = ",".join(str(int(on)) for on in enabled)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, one in whole.items():
        _check_name(name, one)
        tensors |= {f"{name}.lora_A": one.a, f"{name}.lora_B": one.b}
    file = path if path.suffix == ".safetensors" else path / _WEIGHTS_NAME
    return write_atomic(file, saved(tensors, metadata))


def loralib_notes(adapter: Adapter) -> list[str]:
    """Return what a user of the file has to know."""
    updates = writable(adapter, _FORMAT)
    return [
        f"Make loralib's layers with lora_alpha = {one_scale(updates):g} · r: a state dictionary "
        "of loralib does not state it.",
        *folding_note(updates, _FORMAT, "lora_alpha"),
    ]


def _check_name(name: str, one: Factors) -> None:
    if is_convolution(name) or (one.layout == "embedding") != is_embedding(name):
        message = (
            f"'{name}' is of layout '{one.layout}', and its name says otherwise to who reads "
            "loralib's files. It is not written."
        )
        raise InputError(message)


def _merged(factors: Mapping[str, Factors]) -> tuple[dict[str, Factors], tuple[bool, ...] | None]:
    """Return the modules with blocks of fused weights put together, and which are enabled.

    Raises
    ------
    InputError
        The blocks of a weight differ in rank, height or A's width, or the weights in which of them
        are there.
    """
    whole: dict[str, Factors] = {}
    blocks: dict[str, dict[str, Factors]] = {}
    for name, one in factors.items():
        fused, _, _ = name.rpartition(".")
        if fused.rpartition(".")[2] in FUSED and name in block_names(fused, 3):
            blocks.setdefault(fused, {})[name] = one
        else:
            whole[name] = one
    patterns = set()
    for fused, members in blocks.items():
        names = block_names(fused, 3)
        patterns.add(tuple(name in members for name in names))
        ordered = [members[name] for name in names if name in members]
        if len({(one.a.shape, one.b.shape) for one in ordered}) != 1 or len(patterns) != 1:
            message = (
                f"The blocks of '{fused}' differ in shape or rank, or other blocks are adapted in "
                "another module; loralib's MergedLinear has one rank, and one enable_lora."
            )
            raise InputError(message)
        a, b = (np.concatenate([getattr(one, role) for one in ordered]) for role in "ab")
        whole[fused] = type(ordered[0])(a, b, "linear")
    return whole, next(iter(patterns), None)
