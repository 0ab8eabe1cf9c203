"""Files of single ranks that tensor-parallel trainings leave: none is a whole adapter."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import UnsupportedMethodError

if TYPE_CHECKING:
    from pathlib import Path

# Megatron's and NeMo's folders, DeepSpeed's files.
_RANK: Final = re.compile(r"(?P<before>(?:.*_)?(?:mp|tp)_rank_)(?P<rank>\d{1,6})(?P<after>.*)")


def refuse_rank_part(path: Path) -> None:
    """Raise if a file, or its folder, is one of several ranks' parts.

    Each rank has some rows of B of a column-parallel layer and some columns of A of a row-parallel
    one: read alone, a part would pass for a smaller adapter.

    Raises
    ------
    UnsupportedMethodError
        Parts of further ranks are next to it.
    """
    for part in (path, path.absolute().parent):
        match = _RANK.fullmatch(part.name)
        if match is None:
            continue
        others = [
            sibling.name
            for sibling in part.absolute().parent.iterdir()
            if (other := _RANK.fullmatch(sibling.name))
            and other["before"] == match["before"]
            and other["rank"] != match["rank"]
        ]
        if others:
            message = (
                f"{path}: one of {len(others) + 1} parts of a tensor-parallel training (next to "
                f"it: {', '.join(sorted(others)[:3])}); the others hold rows of B or columns of A. "
                "Join them with the trainer's own tools, or export the adapter to PEFT."
            )
            raise UnsupportedMethodError(message)
