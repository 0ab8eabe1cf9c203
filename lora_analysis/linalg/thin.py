"""Products of a large block with few columns or rows, at the speed of the arithmetic.

A BLAS first copies both sides of a product into an order of its own. If one of them is thin,
that takes longer than the product; OpenBLAS spares it for small products where there is AVX-512:
hence the pieces there. Elsewhere whole products are a quarter to a third faster than pieces, and
also if the BLAS may use several threads.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from lora_analysis.linalg.constants import Float

# With more columns the copy is not what counts.
_FEW = 32
# Depth and width of a piece, and how many multiplications it may take.
_DEPTH = 128
_WORK = 1_000_000
# OpenBLAS's names of processors with AVX-512.
_WITH_SMALL_KERNELS = {"SkylakeX", "Cooperlake", "SapphireRapids"}
# Sums of so many pieces are taken in their own type.
_GROUP = 8


def thin_product(block: NDArray[np.floating], X: NDArray[np.floating]) -> Float:
    """Return ``block·X`` in float64, ``(m, r)``.

    Parameters
    ----------
    block
        ``(m, n)``, of the type the products are taken in.
    X
        ``(n, r)``, of the same type.

    Notes
    -----
    In float32 a product of a few columns errs by some 2e-7 of its size in pieces, by 4e-7 whole.
    """
    (m, n), r = block.shape, X.shape[1]
    pieces = n // _DEPTH
    if not pieces or not _pays(block, r):
        return np.asarray(block @ X, dtype=np.float64)
    whole, height = pieces * _DEPTH, max(1, _WORK // (_DEPTH * r))
    grouped = pieces // _GROUP * _GROUP
    deep = np.ascontiguousarray(X[:whole]).reshape(pieces, _DEPTH, r)
    product = np.zeros((m, r))
    if whole < n:
        product += block[:, whole:] @ X[whole:]
    for top in range(0, m, height):
        part = block[top : top + height, :whole].reshape(-1, pieces, _DEPTH)
        products = part.transpose(1, 0, 2) @ deep
        groups = products[:grouped].reshape(-1, _GROUP, len(part), r).sum(axis=1)
        product[top : top + height] += groups.sum(axis=0, dtype=np.float64)
        if grouped < pieces:
            product[top : top + height] += products[grouped:].sum(axis=0)
    return product


def thin_left_product(Y: NDArray[np.floating], block: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return ``Yᵀ·block``, ``(r, n)``, for Y ``(m, r)`` and a block ``(m, n)`` of one type."""
    (m, n), r = block.shape, Y.shape[1]
    rows = np.ascontiguousarray(Y.T)
    pieces = n // _DEPTH
    if not pieces or m * r > _WORK // _DEPTH or not _pays(block, r):
        return np.asarray(rows @ block)
    whole = pieces * _DEPTH
    product = np.empty((r, n), block.dtype)
    wide = block[:, :whole].reshape(m, pieces, _DEPTH).transpose(1, 0, 2)
    product[:, :whole].reshape(r, pieces, _DEPTH)[:] = (rows @ wide).transpose(1, 0, 2)
    if whole < n:
        product[:, whole:] = rows @ block[:, whole:]
    return product


def _pays(block: NDArray[np.floating], columns: int) -> bool:
    controllers = _blas().lib_controllers
    return (
        0 < columns <= _FEW
        and block.flags.c_contiguous
        and bool(controllers)
        and all(
            controller.internal_api == "openblas"
            and controller.num_threads == 1
            and getattr(controller, "architecture", "") in _WITH_SMALL_KERNELS
            for controller in controllers
        )
    )


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")
