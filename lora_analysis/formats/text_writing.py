"""What the writers for text models ask of an adapter, and how several scales become one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.written import factors_alone, float32, low_rank_update

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
    """The shapes of a module's factors, and a function that computes them."""

    a: Shape
    b: Shape
    layout: str
    load: Callable[[], Factors]
    norms: Shape | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a[-2]


def writable(
    adapter: Adapter, format: str, *, variants: tuple[str, ...] = ()
) -> dict[str, UpdateOutline]:
    """Return the outlines of an adapter's updates, each of which two factors can hold.

    Parameters
    ----------
    adapter, format
        What is written, and as what, for messages.
    variants
        Methods beyond plain LoRA that the format can say.

    Raises
    ------
    InputError
        There are no modules, or one is a dense update or a convolution's.
    UnsupportedMethodError
        More than factors was trained, or a module needs more than two of them.
    ScaleError
        A scale is not known.
    """
    return factors_alone(
        adapter, format, lambda update: _refuse_unsayable(update, adapter.label, format, variants)
    )


def _refuse_unsayable(
    update: UpdateOutline, label: str, format: str, variants: tuple[str, ...]
) -> None:
    if update.layout == "conv":
        reason = f"a convolution's, which a file of {format} cannot say"
    elif update.variant and update.variant not in variants:
        reason = f"not the whole update ({update.variant}), which a file of {format} cannot say"
    elif update.variant and not update.has_magnitude:
        reason = f"{update.variant}'s, but holds no magnitude"
    elif update.magnitude_side == "input":
        reason = f"DoRA's with norms of input columns; a file of {format} holds norms of rows"
    elif update.base_name:
        reason = f"for the weight '{update.base_name}', and loaders look for '{update.name}'"
    else:
        return
    message = f"'{update.name}' in {label} is {reason}. It is not written."
    raise UnsupportedMethodError(message)


def folded(
    adapter: Adapter,
    updates: Mapping[str, UpdateOutline],
    multiplier_of: Callable[[UpdateOutline], float],
) -> dict[str, PlannedFactors]:
    """Return float32 factors whose product times a stated multiplier is the update.

    If the update's scale differs from what ``multiplier_of`` gives, the ratio goes into B. A factor
    too large for float32 raises InputError when it is computed.
    """
    return {
        name: PlannedFactors(
            (update.rank, update.shape[1]),
            (update.shape[0], update.rank),
            update.layout,
            partial(_folded, adapter, name, update.known_scale() / multiplier_of(update)),
            (update.shape[0],) if update.has_magnitude else None,
        )
        for name, update in updates.items()
    }


def _folded(adapter: Adapter, name: str, ratio: float) -> Factors:
    update = low_rank_update(adapter, name)
    b = update.B if ratio == 1 else update.B.astype(np.float64) * ratio
    norms = None if update.magnitude is None else float32(update.magnitude, name)
    return Factors(float32(update.A, name), float32(b, name), norms)


def one_scale(updates: Mapping[str, UpdateOutline]) -> float:
    """Return the multiplier that a file states for all modules: the commonest one but zero."""
    counts = Counter(s for update in updates.values() if (s := update.known_scale()))
    return counts.most_common(1)[0][0] if counts else 1.0


def folding_note(updates: Mapping[str, UpdateOutline], format: str, stated: str) -> list[str]:
    """Return the sentence on scales that went into B, where some did."""
    scale = one_scale(updates)
    count = sum(update.known_scale() != scale for update in updates.values())
    if not count:
        return []
    return [
        f"{format} states one {stated} for all modules: the scale of {count} of {len(updates)} "
        "modules is folded into B. ΔW is the same."
    ]


def with_experts_stacked(
    factors: Mapping[str, PlannedFactors], format: str
) -> dict[str, PlannedFactors]:
    """Return the modules with all experts of a stack made one: A ``(E, r, in)``, B ``(E, out, r)``.

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
                f"'{whole}': {format} stores the experts of a layer in one, all of one rank; found "
                f"experts {sorted(members)[:8]} of shapes {sorted(shapes)[:3]}."
            )
            raise InputError(message)
        a, b = ((len(ordered), *shape) for shape in next(iter(shapes)))
        plain[whole] = PlannedFactors(a, b, "linear", partial(_stacked, ordered, a, b))
    return plain


def _stacked(members: Sequence[PlannedFactors], a: Shape, b: Shape) -> Factors:
    """Return the factors of a stack; one member at a time is loaded."""
    whole = Factors(np.empty(a, np.float32), np.empty(b, np.float32))
    for index, member in enumerate(members):
        factors = member.load()
        whole.a[index], whole.b[index] = factors.a, factors.b
    return whole
