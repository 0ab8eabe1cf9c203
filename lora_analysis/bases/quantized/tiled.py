"""Block scales in the order in which cuBLAS reads them: tiles of 128 rows by 4 blocks.

ComfyUI stores them so. Inside a tile, rows 32 apart follow each other; rows and blocks are padded
to whole tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.storage.safetensors import TensorInfo

_ROWS = 128
_BLOCKS = 4


def tiled_shape(weight: tuple[int, ...], scale: TensorInfo, run: int) -> tuple[int, ...]:
    """Return the shape of the scales once they are in rows, the stored shape if they do not fit.

    Parameters
    ----------
    weight
        Shape of the weight's numbers.
    scale
        The stored scales.
    run
        How many numbers a scale covers.
    """
    if len(weight) != 2 or weight[1] % run:
        return scale.shape
    rows, blocks = weight[0], weight[1] // run
    padded = -(-rows // _ROWS) * _ROWS * (-(-blocks // _BLOCKS) * _BLOCKS)
    return (rows, blocks) if scale.elements == padded else scale.shape


def untiled(scales: NDArray[np.float32], rows: int, blocks: int) -> NDArray[np.float32]:
    """Return the scales as a matrix ``(rows, blocks)``, without padding."""
    across = -(-blocks // _BLOCKS)
    tiles = scales.reshape(-1, across, 32, _ROWS // 32, _BLOCKS)
    matrix = tiles.transpose(0, 3, 2, 1, 4).reshape(-1, across * _BLOCKS)
    return np.ascontiguousarray(matrix[:rows, :blocks])
