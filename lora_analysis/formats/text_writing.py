"""What the writers for text models ask of an adapter, and how several scales become one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.written import factors_alone, float32

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, LowRankUpdate

_EXPERT: Final = re.compile(r"(?P<before>.+\.experts)\.(?P<index>\d+)\.(?P<after>.+)")


@dataclass(frozen=True, slots=True)
class Factors:
    """A and B of one module as they will be stored, in float32; ``norms`` are DoRA's."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    layout: str
    norms: NDArray[np.float32] | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a.shape[-2])


def writable(
    adapter: Adapter, format: str, *, variants: tuple[str, ...] = ()
) -> dict[str, LowRankUpdate]:
    """Return the updates of an adapter, each of which a file of two factors can hold.

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
    update: LowRankUpdate, label: str, format: str, variants: tuple[str, ...]
) -> None:
    if update.layout == "conv":
        reason = f"a convolution's, which a file of {format} cannot say"
    elif update.variant and update.variant not in variants:
        reason = f"not the whole update ({update.variant}), which a file of {format} cannot say"
    elif update.variant and update.magnitude is None:
        reason = f"{update.variant}'s, but holds no magnitude"
    elif update.base_name:
        reason = f"for the weight '{update.base_name}', and loaders look for '{update.name}'"
    else:
        return
    message = f"'{update.name}' in {label} is {reason}. It is not written."
    raise UnsupportedMethodError(message)


def folded(
    updates: Mapping[str, LowRankUpdate], multiplier_of: Callable[[LowRankUpdate], float]
) -> dict[str, Factors]:
    """Return float32 factors whose product times a stated multiplier is the update.

    Where the update's scale is another than ``multiplier_of`` gives, the ratio goes into B.

    Raises
    ------
    InputError
        A factor is too large for float32.
    """
    found = {}
    for name, update in updates.items():
        ratio = update.known_scale() / multiplier_of(update)
        b = update.B if ratio == 1 else update.B.astype(np.float64) * ratio
        norms = None if update.magnitude is None else float32(update.magnitude, name)
        found[name] = Factors(float32(update.A, name), float32(b, name), update.layout, norms)
    return found


def one_scale(updates: Mapping[str, LowRankUpdate]) -> float:
    """Return the multiplier that a file states for all modules: the commonest one but zero."""
    counts = Counter(s for update in updates.values() if (s := update.known_scale()))
    return counts.most_common(1)[0][0] if counts else 1.0


def folding_note(updates: Mapping[str, LowRankUpdate], format: str, stated: str) -> list[str]:
    """Return the sentence on scales that went into B, where some did."""
    scale = one_scale(updates)
    count = sum(update.known_scale() != scale for update in updates.values())
    if not count:
        return []
    return [
        f"{format} states one {stated} for all modules: the scale of {count} of {len(updates)} "
        "modules is folded into B. ΔW is the same."
    ]


def with_experts_stacked(factors: Mapping[str, Factors], format: str) -> dict[str, Factors]:
    """Return the modules with all experts of a stack made one: A ``(E, r, in)``, B ``(E, out, r)``.

    ``before.experts.3.up_proj`` becomes part of ``before.experts.up_proj``.

    Raises
    ------
    InputError
        Experts of a stack are missing, or differ in rank or shape.
    """
    plain: dict[str, Factors] = {}
    stacks: dict[str, dict[int, Factors]] = {}
    for name, one in factors.items():
        if match := _EXPERT.fullmatch(name):
            whole = f"{match['before']}.{match['after']}"
            stacks.setdefault(whole, {})[int(match["index"])] = one
        else:
            plain[name] = one
    for whole, members in stacks.items():
        ordered = [members[index] for index in sorted(members)]
        shapes = {(one.a.shape, one.b.shape) for one in ordered}
        if sorted(members) != list(range(len(members))) or len(shapes) != 1:
            message = (
                f"'{whole}': {format} stores the experts of a layer in one, all of one rank; found "
                f"experts {sorted(members)[:8]} of shapes {sorted(shapes)[:3]}."
            )
            raise InputError(message)
        a, b = (np.stack([getattr(one, role) for one in ordered]) for role in "ab")
        plain[whole] = Factors(a, b, "linear")
    return plain
