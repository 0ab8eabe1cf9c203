"""How many experts a layer of a base has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_STACK: Final = re.compile(r"(?:.*\.)?(?:experts|moe)\.\w+(?:\.weight)?")
_NUMBERED: Final = re.compile(r"(?P<owner>.*\.experts)\.(?P<index>\d{1,9})\..+")
_FIELDS: Final = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts",
)  # fmt: skip
_SHARED: Final = re.compile(r"(^|\.)shared_experts?\.")


def count_experts(
    names: Iterable[str], shape_of: Callable[[str], tuple[int, ...]], config: Mapping[str, Any]
) -> int | None:
    """Return the number of experts of a layer; None if there are none, or layers differ.

    Parameters
    ----------
    names, shape_of
        The tensors of the base.
    config
        The model's ``config.json``; it decides only where no tensor does.
    """
    stacks: set[int] = set()
    numbered: dict[str, int] = {}
    for name in names:
        if _SHARED.search(name):
            continue
        if match := _NUMBERED.fullmatch(name):
            owner = match["owner"]
            numbered[owner] = max(numbered.get(owner, 0), int(match["index"]) + 1)
        elif _STACK.fullmatch(name) and len(shape := shape_of(name)) >= 3:
            stacks.add(shape[0])
    counts = stacks or set(numbered.values())
    if counts:
        return counts.pop() if len(counts) == 1 else None
    texts = [config, *(value for value in config.values() if isinstance(value, dict))]
    stated = {value for text in texts for key in _FIELDS if type(value := text.get(key)) is int}
    return stated.pop() if len(stated) == 1 and min(stated) > 0 else None
