"""Parts that tensor-parallel trainings leave, one for each rank: none is an adapter."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import UnsupportedMethodError

if TYPE_CHECKING:
    from pathlib import Path

# Megatron's and NeMo's folders, DeepSpeed's files.
_RANK: Final = re.compile(r"(?P<before>(?:.*_)?(?:mp|tp)_rank_)(?P<rank>\d{1,6})(?P<after>.*)")


def refuse_rank_part(path: Path) -> None:
    """Raise where a file, or its folder, is one of several ranks' parts.

    Of a column-parallel layer each rank has some rows of B, of a row-parallel one some columns of
    A: read alone, a part would pass for a smaller adapter.

    Raises
    ------
    UnsupportedMethodError
        Others lie beside it.
    """
    for place in (path, path.absolute().parent):
        own = _RANK.fullmatch(place.name)
        if own is None:
            continue
        others = [
            one.name
            for one in place.absolute().parent.iterdir()
            if (match := _RANK.fullmatch(one.name))
            and match["before"] == own["before"]
            and match["rank"] != own["rank"]
        ]
        if others:
            message = (
                f"{path}: one of {len(others) + 1} parts of a tensor-parallel training (beside it: "
                f"{', '.join(sorted(others)[:3])}); rows of B or columns of A lie in the others. "
                "Put them together with the trainer's own tools, or export the adapter to PEFT."
            )
            raise UnsupportedMethodError(message)
