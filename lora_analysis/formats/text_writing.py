"""Files of text models: one scale for all modules, experts stacked, factors in float32."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.formats.written import layer_shapes, low_rank_update, writable_outlines
from lora_analysis.storage.dtypes import narrow

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, UpdateOutline
    from lora_analysis.formats.written import Shape

_EXPERT: Final = re.compile(r"(?P<before>.+\.experts)\.(?P<index>\d+)\.(?P<after>.+)")


@dataclass(frozen=True, slots=True)
class Factors:
    """A and B of one module as they will be stored, in float32; ``norms`` are DoRA's."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    norms: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class PlannedFactors:
    """Shapes of a module's factors, and a function that computes them."""

    a: Shape
    b: Shape
    layout: str
    load: Callable[[], Factors]
    norms: Shape | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a[-2]


def text_outlines(
    adapter: Adapter, format: str, *, variants: Collection[str] = ()
) -> dict[str, UpdateOutline]:
    """Return the outlines of an adapter for a text model, see `written.writable_outlines`."""
    layouts = ("linear", "conv1d", "embedding")
    return writable_outlines(adapter, format, layouts=layouts, variants=variants)


def fold_scales(
    adapter: Adapter, updates: Mapping[str, UpdateOutline], scales: Mapping[str, float]
) -> dict[str, PlannedFactors]:
    """Return float32 factors whose product times a given scale is the update.

    If an update has a different scale, the ratio goes into B. A factor too large for float32 raises
    InputError when it is computed.

    Parameters
    ----------
    adapter, updates
        The adapter and the outlines of its updates.
    scales
        The scale that the file will state, by module.
    """
    return {
        name: PlannedFactors(
            *layer_shapes(update),
            layout=update.layout,
            load=partial(_folded_factors, adapter, name, update.known_scale() / scales[name]),
            norms=(update.shape[0],) if update.has_magnitude else None,
        )
        for name, update in updates.items()
    }


def _folded_factors(adapter: Adapter, name: str, ratio: float) -> Factors:
    update = low_rank_update(adapter, name)
    b = update.B if ratio == 1 else update.B.astype(np.float64) * ratio
    return Factors(
        narrow(update.A, "float32", f"A of '{name}'"),
        narrow(b, "float32", f"B of '{name}'"),
        None
        if update.magnitude is None
        else narrow(update.magnitude, "float32", f"magnitude of '{name}'"),
    )


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
        plain[whole] = PlannedFactors(a, b, "linear", partial(_stacked_factors, ordered, a, b))
    return plain


def _stacked_factors(members: Sequence[PlannedFactors], a: Shape, b: Shape) -> Factors:
    """Return the factors of a stack; one member at a time is loaded."""
    whole = Factors(np.empty(a, np.float32), np.empty(b, np.float32))
    for index, member in enumerate(members):
        factors = member.load()
        whole.a[index], whole.b[index] = factors.a, factors.b
    return whole
