"""What the writers for image models have in common: modules, alphas, stored types.

Each module is first described from its outline (`PlannedModule`); its numbers are read when the
file is written, module by module, so that no more than one of them is in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.written import factors_alone, low_rank_update
from lora_analysis.storage.dtypes import is_exact, narrow, narrowed_type
from lora_analysis.storage.tensor_writer import OutputTensor, output_array, output_group

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, UpdateOutline

_LAYOUTS: Final = ("linear", "conv")


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """What a writer knows of a module before it reads the module's numbers for the file.

    ``dtype`` is the type its factors are written in: that of its source, if it holds them exactly.
    ``norms`` is the shape of DoRA's magnitude as LyCORIS stores it, None without one.
    """

    name: str
    rank: int
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    dtype: str
    scale: float
    alpha: float
    norms: tuple[int, ...] | None
    norms_dtype: str
    magnitude_side: str

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of A as a layer stores it, a convolution's with its kernel."""
        channels = self.shape[1] // math.prod(self.kernel)
        return (self.rank, channels, *self.kernel)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Shape of B as a layer stores it."""
        return (self.shape[0], self.rank, *(1 for _ in self.kernel))


def planned_modules(adapter: Adapter, format: str) -> dict[str, PlannedModule]:
    """Return what is written of each module of an adapter, all of which such a file can hold.

    Raises
    ------
    InputError
        The adapter has no modules, a dense update, a layout that the format cannot express, or
        numbers that its type cannot hold.
    UnsupportedMethodError
        More than the factors was trained, or the update needs more than two of them.
    ScaleError
        A scale is not known.
    """
    outlines = factors_alone(
        adapter, format, lambda update: _refuse_inexpressible(update, adapter.label, format)
    )
    return {name: _planned(adapter, name, outline) for name, outline in outlines.items()}


def _refuse_inexpressible(update: UpdateOutline, label: str, format: str) -> None:
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


def _planned(adapter: Adapter, name: str, outline: UpdateOutline) -> PlannedModule:
    dtype, norms_dtype = _written_types(adapter, name, outline)
    return PlannedModule(
        name=name,
        rank=outline.rank,
        shape=outline.shape,
        kernel=outline.kernel,
        dtype=dtype,
        scale=outline.known_scale(),
        alpha=exact_alpha(outline),
        norms=_norms_shape(outline),
        norms_dtype=norms_dtype,
        magnitude_side=outline.magnitude_side,
    )


def _written_types(adapter: Adapter, name: str, outline: UpdateOutline) -> tuple[str, str]:
    """Return the types of the factors and of DoRA's norms: the source's if it holds the numbers.

    Readers multiply some tensors out (Tucker cores, learned scalars), whose products it does not.
    """
    stored = narrowed_type(outline.stored_dtype)
    if stored == "float32":
        return stored, stored
    update = low_rank_update(adapter, name)
    exact = is_exact(update.A, stored) and is_exact(update.B, stored)
    norms_exact = update.magnitude is not None and is_exact(update.magnitude, stored)
    return stored if exact else "float32", stored if norms_exact else "float32"


def _norms_shape(outline: UpdateOutline) -> tuple[int, ...] | None:
    if not outline.has_magnitude:
        return None
    d_out, d_in = outline.shape
    if outline.magnitude_side == "input":
        return (1, d_in // math.prod(outline.kernel), *(1 for _ in outline.kernel))
    return (d_out, 1, *(1 for _ in outline.kernel))


def exact_alpha(update: UpdateOutline) -> float:
    """Return the alpha of which ``alpha/r`` is the update's scale; whole where it is whole."""
    scale, rank, stated = update.known_scale(), update.rank, update.alpha
    alpha = stated if stated is not None and stated / rank == scale else scale * rank
    if not np.isfinite(alpha):
        message = f"The alpha of '{update.name}', {scale:g} times its rank {rank}, is not finite."
        raise InputError(message)
    # 2.0000000000000004·8 is meant as 16: the nearest whole number that gives the same scale.
    return float(round(alpha)) if round(alpha) / rank == scale else alpha


def factor_tensors(adapter: Adapter, plan: PlannedModule, a: str, b: str) -> list[OutputTensor]:
    """Return the two factors of a module under their keys, read together when they are written."""
    shapes = {a: plan.a_shape, b: plan.b_shape}
    return output_group(shapes, partial(_factors, adapter, plan, a, b), dtype=plan.dtype)


def _factors(adapter: Adapter, plan: PlannedModule, a: str, b: str) -> dict[str, NDArray[Any]]:
    update = low_rank_update(adapter, plan.name)
    return {
        a: narrow(update.A, plan.dtype, f"A of '{plan.name}'").reshape(plan.a_shape),
        b: narrow(update.B, plan.dtype, f"B of '{plan.name}'").reshape(plan.b_shape),
    }


def norms_tensor(
    adapter: Adapter, plan: PlannedModule, key: str, shape: tuple[int, ...]
) -> OutputTensor:
    """Return DoRA's magnitude of a module under a key, in the shape that loaders expect."""
    return OutputTensor(key, plan.norms_dtype, shape, partial(_norms, adapter, plan, shape))


def _norms(adapter: Adapter, plan: PlannedModule, shape: tuple[int, ...]) -> NDArray[Any]:
    magnitude = low_rank_update(adapter, plan.name).magnitude
    if magnitude is None:
        message = f"'{plan.name}' in {adapter.label} lost its magnitude while it was written."
        raise InputError(message)
    return narrow(magnitude, plan.norms_dtype, f"magnitude of '{plan.name}'").reshape(shape)


def alpha_tensor(key: str, alpha: float) -> OutputTensor:
    """Return alpha as float32 where that holds it exactly, as float64 where it does not."""
    with np.errstate(over="ignore", under="ignore"):
        narrow_alpha = np.array(alpha, np.float32)
    exact = float(narrow_alpha) == alpha
    return output_array(key, narrow_alpha if exact else np.array(alpha, np.float64))
