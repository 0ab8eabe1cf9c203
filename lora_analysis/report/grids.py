"""The heat-maps of a report as arrays."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.report.selection import common_modules, drawn_pairs
from lora_analysis.text import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.studies import Study


def grids_file(study: Study) -> bytes | None:
    """Return ``grids.npz``: φ of the drawn pairs in every common module; None without pairs.

    One float32 array per key ``"a|b|side|module"``, ``[i-1, j-1]`` being φ(i, j) of a's leading i
    and b's leading j directions, which end at the numerical ranks.
    """
    arrays = dict(_grids(study))
    if not arrays:
        return None
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _grids(study: Study) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for a, b in dict.fromkeys(drawn_pairs(study).values()):
        for module in common_modules(study, a, b):
            for side in ("output", "input"):
                grid = study.grid(a, b, module, side=side)
                # A slash would make a folder inside the archive.
                key = printable(f"{a}|{b}|{side}|{module}").replace("/", "∕")
                yield key, grid.values.astype(np.float32)
