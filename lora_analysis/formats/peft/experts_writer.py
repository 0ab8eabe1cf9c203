"""Experts put together again as PEFT stores them: one pair of factors for a whole stack."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import UnsupportedMethodError
from lora_analysis.formats.peft.experts import registered_order
from lora_analysis.formats.written import float32, low_rank_update
from lora_analysis.storage.tensor_writer import OutputTensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, UpdateOutline

_MEMBER: Final = re.compile(r"(.+)\[(\d+)\]")


def is_expert(update: UpdateOutline) -> bool:
    """Return True if an update is that of one member of a stack."""
    return update.base_name.endswith("]")


def parameter_of(name: str, update: UpdateOutline) -> str:
    """Return the name of the stack that an update is a member of; of others its own name."""
    return update.base_name.rpartition("[")[0] if is_expert(update) else name


def stacked_tensors(
    adapter: Adapter, updates: Mapping[str, UpdateOutline], prefix: str
) -> tuple[list[str], list[OutputTensor]]:
    """Return the modules of the stacks' keys, and A ``(r·E, in)`` and B ``(out, r·E)`` of each.

    A goes expert by expert, of B every E-th column is an expert's. Several parameters of one
    module nest, the one that is registered first innermost.

    Raises
    ------
    UnsupportedMethodError
        A stack lacks an expert, or its experts differ in rank or scale.
    """
    stacks: dict[str, dict[int, str]] = {}
    for name, update in updates.items():
        if match := _MEMBER.fullmatch(update.base_name):
            stacks.setdefault(match[1], {})[int(match[2])] = name
    owners: dict[str, list[str]] = {}
    for parameter in stacks:
        owner, _, last = parameter.rpartition(".")
        owners.setdefault(owner, []).append(last)
    modules, tensors = [], []
    for owner, names in owners.items():
        for depth, name in enumerate(reversed(registered_order(names))):
            module = owner + ".base_layer" * depth
            members = stacks[f"{owner}.{name}"]
            _refuse_incomplete(adapter.label, f"{owner}.{name}", members, updates)
            ordered = [members[expert] for expert in sorted(members)]
            (d_out, d_in), rank = updates[ordered[0]].shape, updates[ordered[0]].rank
            count = len(ordered)
            modules.append(module)
            tensors += [
                OutputTensor(
                    f"{prefix}{module}.lora_A.weight",
                    "float32",
                    (count * rank, d_in),
                    partial(_stacked_a, adapter, ordered),
                ),
                OutputTensor(
                    f"{prefix}{module}.lora_B.weight",
                    "float32",
                    (d_out, rank * count),
                    partial(_stacked_b, adapter, ordered),
                ),
            ]
    return modules, tensors


def _refuse_incomplete(
    label: str,
    parameter: str,
    members: Mapping[int, str],
    updates: Mapping[str, UpdateOutline],
) -> None:
    same = {(u.shape, u.rank, u.known_scale()) for u in map(updates.__getitem__, members.values())}
    if sorted(members) != list(range(len(members))) or len(members) < 2 or len(same) > 1:
        message = (
            f"{label}: PEFT stores the experts of '{parameter}' all together with one rank and "
            f"scale; found {len(members)} of them, up to number {max(members)}, with "
            f"{len(same)} ranks or scales. It is not written."
        )
        raise UnsupportedMethodError(message)


def _stacked_a(adapter: Adapter, names: Sequence[str]) -> NDArray[np.float32]:
    """Return A of all experts below each other; one expert at a time is loaded."""
    first = low_rank_update(adapter, names[0]).A
    whole = np.empty((len(names), *first.shape), np.float32)  # (E, r, in)
    for expert, name in enumerate(names):
        whole[expert] = float32(low_rank_update(adapter, name).A, name)
    return whole.reshape(-1, first.shape[1])


def _stacked_b(adapter: Adapter, names: Sequence[str]) -> NDArray[np.float32]:
    first = low_rank_update(adapter, names[0]).B
    whole = np.empty((*first.shape, len(names)), np.float32)  # (out, r, E)
    for expert, name in enumerate(names):
        whole[:, :, expert] = float32(low_rank_update(adapter, name).B, name)
    return whole.reshape(len(whole), -1)
