"""Number of experts of a base, and the check that an adapter stacks factors for as many."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import IncompatibleError

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter
    from lora_analysis.bases.base_weights import BaseWeights

_STACK: Final = re.compile(r"(?:.*\.)?(?:experts|moe)\.\w+(?:\.weight)?")
_NUMBERED: Final = re.compile(r"(?P<owner>.*\.experts)\.(?P<index>\d{1,9})\..+")
_FIELDS: Final = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts",
)  # fmt: skip
_SHARED: Final = re.compile(r"(^|\.)shared_experts?\.")
# Codes of findings on adapters with the factors of all experts in one stack.
_STACK_CODES: Final = ("expert-order", "expert-stack", "expert-factors-shared")


def check_experts(adapter: Adapter, base: BaseWeights) -> None:
    """Raise if an adapter stacks the factors of another number of experts than the base has.

    The file alone does not determine the number: rows of A can be 4 experts of rank 2 or 8 of rank
    1, and the wrong choice makes every update wrong, with plausible shapes.

    Raises
    ------
    IncompatibleError
        The numbers differ; the message names both.
    """
    for finding in adapter.provenance.findings:
        if finding.code not in _STACK_CODES:
            continue
        experts = finding.fields["experts"]
        expected = _count_experts(base)
        if expected is None or experts == expected:
            continue
        names = ", ".join(f"'{name}'" for name in finding.fields["parameters"])
        message = (
            f"{adapter.label} holds factors of {experts} experts ({names}), the base {base.label} "
            f"has {expected}. Is it another base? If the trainer scaled the rank per expert, so "
            "that the config's r is not the rank of one, pass the number of experts: "
            f"experts={expected} (command line: --experts {expected})."
        )
        raise IncompatibleError(message)


def _count_experts(base: BaseWeights) -> int | None:
    """Return the number of experts of a layer; None if there are none, or layers differ.

    By the first axis of the stacks, else the numbers in names, else the config.
    """
    stacks: set[int] = set()
    numbered: dict[str, int] = {}
    for name in base.names:
        if _SHARED.search(name):
            continue
        if match := _NUMBERED.fullmatch(name):
            owner = match["owner"]
            numbered[owner] = max(numbered.get(owner, 0), int(match["index"]) + 1)
        elif _STACK.fullmatch(name) and len(shape := base.stored_shape(name)) >= 3:
            stacks.add(shape[0])
    counts = stacks or set(numbered.values())
    if counts:
        return counts.pop() if len(counts) == 1 else None
    nested = [value for value in base.config.values() if isinstance(value, dict)]
    counts = {
        value
        for fields in (base.config, *nested)
        for key in _FIELDS
        if type(value := fields.get(key)) is int
    }
    return counts.pop() if len(counts) == 1 and min(counts) > 0 else None
