"""Experts put together again as PEFT stores them: one pair of factors for a whole stack."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import UnsupportedMethodError
from lora_analysis.formats.peft_experts import registered_order
from lora_analysis.formats.written import float32

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lora_analysis.adapter import LowRankUpdate

_MEMBER: Final = re.compile(r"(.+)\[(\d+)\]")


def is_expert(update: LowRankUpdate) -> bool:
    """Say whether an update is that of one member of a stack."""
    return update.base_name.endswith("]")


def parameter_of(name: str, update: LowRankUpdate) -> str:
    """Return the name of the stack that an update is a member of; of others its own name."""
    return update.base_name.rpartition("[")[0] if is_expert(update) else name


def stacked_factors(
    label: str, updates: Mapping[str, LowRankUpdate]
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return A ``(r·E, in)`` and B ``(out, r·E)`` of each stack, by the module of its key.

    A goes expert by expert, of B every E-th column is an expert's. Several parameters of one
    module nest, the one that is registered first innermost.

    Raises
    ------
    UnsupportedMethodError
        A stack lacks an expert, or its experts differ in rank or scale.
    """
    stacks: dict[str, dict[int, LowRankUpdate]] = {}
    for update in updates.values():
        if match := _MEMBER.fullmatch(update.base_name):
            stacks.setdefault(match[1], {})[int(match[2])] = update
    owners: dict[str, list[str]] = {}
    for parameter in stacks:
        owner, _, last = parameter.rpartition(".")
        owners.setdefault(owner, []).append(last)
    found = {}
    for owner, names in owners.items():
        for depth, name in enumerate(reversed(registered_order(names))):
            key = owner + ".base_layer" * depth
            found[key] = _stacked(label, f"{owner}.{name}", stacks[f"{owner}.{name}"])
    return found


def _stacked(
    label: str, parameter: str, members: Mapping[int, LowRankUpdate]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    ordered = [members[expert] for expert in sorted(members)]
    same = {(one.A.shape, one.B.shape, one.known_scale()) for one in ordered}
    if sorted(members) != list(range(len(members))) or len(members) < 2 or len(same) > 1:
        message = (
            f"{label}: PEFT stores the experts of '{parameter}' all together with one rank and "
            f"scale; found {len(members)} of them, up to number {max(members)}, with "
            f"{len(same)} ranks or scales. It is not written."
        )
        raise UnsupportedMethodError(message)
    a = np.concatenate([float32(one.A, one.name) for one in ordered])  # (E·r, in)
    b = np.stack([float32(one.B, one.name) for one in ordered], axis=2)  # (out, r, E)
    return a, b.reshape(len(b), -1)
