"""What the two writers for image models ask of an adapter, and how they give a scale as alpha."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.peft_pairs import DORA
from lora_analysis.formats.written import factors_alone, float32, saved
from lora_analysis.storage.atomic import write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, LowRankUpdate

Tensors = dict[str, "NDArray[np.floating]"]

_LAYOUTS: Final = ("linear", "conv")


def writable_updates(adapter: Adapter, format: str) -> dict[str, LowRankUpdate]:
    """Return the updates of an adapter whose every module such a file can hold.

    Raises
    ------
    InputError
        The adapter has no modules, a dense update, or a layout that the format cannot say.
    UnsupportedMethodError
        More than the factors was trained, or the update needs more than two of them.
    ScaleError
        A scale is not known.
    """
    return factors_alone(
        adapter, format, lambda update: _refuse_unsayable(update, adapter.label, format)
    )


def _refuse_unsayable(update: LowRankUpdate, label: str, format: str) -> None:
    if update.layout not in _LAYOUTS:
        message = (
            f"'{update.name}' in {label} adapts a weight of layout '{update.layout}', which a file "
            f"of {format} cannot say; its loaders would add the update the other way round."
        )
        raise InputError(message)
    if update.variant not in ("", DORA):
        reason = f"a part of {update.variant}, which also changes the base weight"
    elif update.variant == DORA and update.magnitude is None:
        reason = "DoRA's, but holds no magnitude"
    elif update.base_name:
        reason = f"for the weight '{update.base_name}', and loaders look for '{update.name}'"
    else:
        return
    message = f"'{update.name}' in {label} is {reason}. It is not written."
    raise UnsupportedMethodError(message)


def factor_tensors(update: LowRankUpdate) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return A and B as the layer stores them, a convolution's with its kernel, in float32."""
    a, b = float32(update.A, update.name), float32(update.B, update.name)
    if update.layout == "conv":
        a = a.reshape(update.rank, -1, *update.kernel)
        b = b.reshape(*b.shape, *(1 for _ in update.kernel))
    return a, b


def exact_alpha(update: LowRankUpdate) -> float:
    """Return the alpha of which ``alpha/r`` is the update's scale; whole where it is whole."""
    scale, rank, stated = update.known_scale(), update.rank, update.alpha
    alpha = stated if stated is not None and stated / rank == scale else scale * rank
    if not np.isfinite(alpha):
        message = f"The alpha of '{update.name}', {scale:g} times its rank {rank}, is not finite."
        raise InputError(message)
    # 2.0000000000000004·8 is meant as 16: the nearest whole number that gives the same scale.
    return float(round(alpha)) if round(alpha) / rank == scale else alpha


def write_file(
    path: Path, name: str, tensors: Mapping[str, NDArray[np.floating]], metadata: dict[str, str]
) -> Path:
    """Write one file: ``path`` where it ends in ``.safetensors``, else ``name`` in that folder."""
    file = path if path.suffix == ".safetensors" else path / name
    content = saved(tensors, {"format": "pt"} | metadata)
    write_atomic(file, content)
    return file
