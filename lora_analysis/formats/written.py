"""What every writer of two factors asks of an adapter before it writes a byte."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.side_tensors import carried_tensors
from lora_analysis.storage.adapter_fields import refuse_more_than_factors
from lora_analysis.storage.tensor_writer import OutputTensor, output_group

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, UpdateOutline

Shape = tuple[int, ...]


def factors_alone(
    adapter: Adapter, format: str, refuse: Callable[[UpdateOutline], None]
) -> dict[str, UpdateOutline]:
    """Return the outlines of an adapter that is nothing but low-rank updates of known scale.

    Parameters
    ----------
    adapter, format
        What is written, and as what, for messages.
    refuse
        Raises for an update that the format cannot say.

    Raises
    ------
    InputError
        There are no modules, or one is a dense update.
    UnsupportedMethodError
        More than the factors was trained.
    ScaleError
        A scale is not known.
    """
    refuse_more_than_factors(adapter.config, adapter.label, f"which {format} files cannot say.")
    if adapter.saved_modules:
        message = (
            f"{adapter.label} also trained '{next(iter(adapter.saved_modules))}' in full, which a "
            f"file of {format} cannot hold. It is not written."
        )
        raise UnsupportedMethodError(message)
    carried_tensors(adapter, format)  # refuses what would be lost
    outlines = low_rank_outlines(adapter)
    for outline in outlines.values():
        refuse(outline)
        outline.known_scale()
    return outlines


def low_rank_outlines(adapter: Adapter) -> dict[str, UpdateOutline]:
    """Return the outline of each module; one module at a time is loaded for it.

    Raises
    ------
    InputError
        There are no modules, or one is a dense update.
    """
    outlines = {}
    for name in adapter:
        outlines[name] = adapter.outline(name)
        if outlines[name].dense:
            message = f"'{name}' in {adapter.label} is a dense update; a LoRA file holds A and B."
            raise InputError(message)
    if not outlines:
        message = f"{adapter.label} adapts no module; there is nothing to write."
        raise InputError(message)
    return outlines


def low_rank_update(adapter: Adapter, name: str) -> LowRankUpdate:
    """Return the update of a module that `low_rank_outlines` found to be of two factors."""
    update = adapter[name]
    if not isinstance(update, LowRankUpdate):
        message = f"'{name}' in {adapter.label} became a dense update while it was written."
        raise InputError(message)
    return update


def float32(factor: NDArray[np.floating], name: str) -> NDArray[np.float32]:
    """Return numbers as float32; refuse those that it cannot hold."""
    with np.errstate(over="ignore"):  # refused below, with the module's name
        stored = np.ascontiguousarray(factor, dtype=np.float32)
    if not np.isfinite(stored).all():
        message = f"A factor of '{name}' is too large for float32, the type it is written in."
        raise InputError(message)
    return stored


def layer_shapes(outline: UpdateOutline) -> tuple[Shape, Shape]:
    """Return the shapes of A and B as the layer stores them, of a convolution with its kernel."""
    d_out, d_in = outline.shape
    a: Shape = (outline.rank, d_in)
    b: Shape = (d_out, outline.rank)
    if outline.layout == "conv":
        a = (outline.rank, d_in // math.prod(outline.kernel), *outline.kernel)
        b = (*b, *(1 for _ in outline.kernel))
    return a, b


def layer_tensors(adapter: Adapter, module: str, shapes: Mapping[str, Shape]) -> list[OutputTensor]:
    """Return the tensors of one module in float32, read when they are written.

    ``shapes`` gives the shape by key of A, of B, and, if the module has them, of DoRA's norms.
    """
    return output_group(shapes, partial(_layer_arrays, adapter, module, shapes))


def _layer_arrays(
    adapter: Adapter, module: str, shapes: Mapping[str, Shape]
) -> dict[str, NDArray[np.float32]]:
    update = low_rank_update(adapter, module)
    parts = [update.A, update.B] + ([] if update.magnitude is None else [update.magnitude])
    return {
        key: float32(part, module).reshape(shape)
        for (key, shape), part in zip(shapes.items(), parts, strict=True)
    }
