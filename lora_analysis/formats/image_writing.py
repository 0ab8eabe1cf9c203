"""What the two writers for image models ask of an adapter, and how they give a scale as alpha."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.peft_pairs import DORA
from lora_analysis.formats.written import factors_alone

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter, UpdateOutline

_LAYOUTS: Final = ("linear", "conv")


def writable_updates(adapter: Adapter, format: str) -> dict[str, UpdateOutline]:
    """Return the outlines of an adapter whose every module such a file can hold.

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


def _refuse_unsayable(update: UpdateOutline, label: str, format: str) -> None:
    if update.layout not in _LAYOUTS:
        message = (
            f"'{update.name}' in {label} adapts a weight of layout '{update.layout}', which a file "
            f"of {format} cannot say; its loaders would add the update the other way round."
        )
        raise InputError(message)
    if update.variant not in ("", DORA):
        reason = f"a part of {update.variant}, which also changes the base weight"
    elif update.variant == DORA and not update.has_magnitude:
        reason = "DoRA's, but holds no magnitude"
    elif update.base_name:
        reason = f"for the weight '{update.base_name}', and loaders look for '{update.name}'"
    else:
        return
    message = f"'{update.name}' in {label} is {reason}. It is not written."
    raise UnsupportedMethodError(message)


def exact_alpha(update: UpdateOutline) -> float:
    """Return the alpha of which ``alpha/r`` is the update's scale; whole where it is whole."""
    scale, rank, stated = update.known_scale(), update.rank, update.alpha
    alpha = stated if stated is not None and stated / rank == scale else scale * rank
    if not np.isfinite(alpha):
        message = f"The alpha of '{update.name}', {scale:g} times its rank {rank}, is not finite."
        raise InputError(message)
    # 2.0000000000000004·8 is meant as 16: the nearest whole number that gives the same scale.
    return float(round(alpha)) if round(alpha) / rank == scale else alpha
