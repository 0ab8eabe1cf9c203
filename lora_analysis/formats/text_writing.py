"""Files of text models: one scale for all modules, experts stacked."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.formats.written import layer_shapes, low_rank_update, writable_outlines
from lora_analysis.storage.dtypes import is_exact, narrow, narrowed_type, raw_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, UpdateOutline
    from lora_analysis.formats.written import Shape

_EXPERT: Final = re.compile(r"(?P<before>.+\.experts)\.(?P<index>\d+)\.(?P<after>.+)")


@dataclass(frozen=True, slots=True)
class FactorArrays:
    """A and B of one module as they will be stored; ``norms`` are DoRA's.

    Numbers of type bfloat16 are given as their bits.
    """

    a: NDArray[Any]
    b: NDArray[Any]
    norms: NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class PlannedFactors:
    """Shapes of a module's factors, their stored type, and a function that computes them in a type.

    The type is that of the source, if it holds the numbers exactly.
    """

    a: Shape
    b: Shape
    layout: str
    dtype: str
    load: Callable[[str], FactorArrays]
    norms: Shape | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a[-2]


def text_outlines(adapter: Adapter, format: str, **options: Any) -> dict[str, UpdateOutline]:
    """Return the outlines of an adapter for a text model, see `written.writable_outlines`."""
    layouts = ("linear", "conv1d", "embedding")
    return writable_outlines(adapter, format, layouts=layouts, **options)


def fold_scales(
    adapter: Adapter, updates: Mapping[str, UpdateOutline], scales: Mapping[str, float]
) -> dict[str, PlannedFactors]:
    """Return factors whose product times a given scale is the update.

    If an update has a different scale, the ratio goes into B. A factor too large for its type
    raises InputError when it is computed.

    Parameters
    ----------
    adapter, updates
        The adapter and the outlines of its updates.
    scales
        The scale that the file will state, by module.
    """
    planned = {}
    for name, update in updates.items():
        ratio = update.known_scale() / scales[name]
        planned[name] = PlannedFactors(
            *layer_shapes(update),
            layout=update.layout,
            dtype=_folded_type(adapter, name, update, ratio),
            load=partial(_folded_factors, adapter, name, ratio),
            norms=(update.shape[0],) if update.has_magnitude else None,
        )
    return planned


def _folded_type(adapter: Adapter, name: str, update: UpdateOutline, ratio: float) -> str:
    # A function of its own, so that no array outlives its module.
    dtype = narrowed_type(update.stored_dtype)
    if dtype == "float32":
        return dtype
    arrays = _folded_arrays(adapter, name, ratio).values()
    return dtype if all(is_exact(array, dtype) for array in arrays) else "float32"


def _folded_arrays(adapter: Adapter, name: str, ratio: float) -> dict[str, NDArray[Any]]:
    update = low_rank_update(adapter, name)
    b = update.B if ratio == 1 else update.B.astype(np.float64) * ratio
    arrays = {"A": update.A, "B": b}
    return arrays if update.magnitude is None else {**arrays, "magnitude": update.magnitude}


def _folded_factors(adapter: Adapter, name: str, ratio: float, dtype: str) -> FactorArrays:
    arrays = _folded_arrays(adapter, name, ratio)
    return FactorArrays(
        *(narrow(array, dtype, f"{role} of '{name}'") for role, array in arrays.items())
    )


def common_dtype(members: Iterable[PlannedFactors]) -> str:
    """Return the type of several factors, which is float32 if theirs differ."""
    dtypes = {planned.dtype for planned in members}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def common_scale(updates: Mapping[str, UpdateOutline]) -> float:
    """Return the scale that a file states for all modules: the commonest one but zero."""
    counts = Counter(s for update in updates.values() if (s := update.known_scale()))
    return counts.most_common(1)[0][0] if counts else 1.0


def folding_note(
    updates: Mapping[str, UpdateOutline], scales: Mapping[str, float], format: str, field: str
) -> list[str]:
    """Return the sentence on scales that went into B, if there are any.

    Parameters
    ----------
    updates, scales
        The outlines, and the scale that the file states, by module.
    format, field
        Names of the format and of the field that states the scale.
    """
    # Within the rounding of float32, it is the same scale.
    count = sum(
        not math.isclose(update.known_scale(), scales[name], rel_tol=1e-6)
        for name, update in updates.items()
    )
    if not count:
        return []
    return [
        f"{format} states one {field} for all modules: the scale of {count} of {len(updates)} "
        "modules is folded into B. ΔW is the same."
    ]


def stack_experts(factors: Mapping[str, PlannedFactors], format: str) -> dict[str, PlannedFactors]:
    """Return the modules with all experts of a stack as one: A ``(E, r, in)``, B ``(E, out, r)``.

    ``before.experts.3.up_proj`` becomes part of ``before.experts.up_proj``.

    Raises
    ------
    InputError
        Experts of a stack are missing, or differ in rank or shape.
    """
    plain: dict[str, PlannedFactors] = {}
    stacks: dict[str, dict[int, PlannedFactors]] = {}
    for name, planned in factors.items():
        if match := _EXPERT.fullmatch(name):
            whole = f"{match['before']}.{match['after']}"
            stacks.setdefault(whole, {})[int(match["index"])] = planned
        else:
            plain[name] = planned
    for whole, members in stacks.items():
        ordered = [members[index] for index in sorted(members)]
        shapes = {(planned.a, planned.b) for planned in ordered}
        if sorted(members) != list(range(len(members))) or len(shapes) != 1:
            message = (
                f"'{whole}': {format} stores the experts of a layer in one tensor, all of one "
                f"rank; found experts {sorted(members)[:8]} of shapes {sorted(shapes)[:3]}."
            )
            raise InputError(message)
        a, b = ((len(ordered), *shape) for shape in next(iter(shapes)))
        load = partial(_stacked_factors, ordered, a, b)
        plain[whole] = PlannedFactors(a, b, "linear", common_dtype(ordered), load)
    return plain


def _stacked_factors(
    members: Sequence[PlannedFactors], a: Shape, b: Shape, dtype: str
) -> FactorArrays:
    """Return the factors of a stack; one member at a time is loaded."""
    whole = FactorArrays(np.empty(a, raw_dtype(dtype)), np.empty(b, raw_dtype(dtype)))
    for index, member in enumerate(members):
        factors = member.load(dtype)
        whole.a[index], whole.b[index] = factors.a, factors.b
    return whole
