"""The whole spectrum of a frozen weight, kept on disk once it is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis import linalg
from lora_analysis.bases import as_weight
from lora_analysis.errors import BaseWeightError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.linalg import DenseSVD

# Spectra that take less time than this (seconds) are not cached.
_WORTH_KEEPING = 1.0


def weight_svd(W: Any, *, cache: bool = True) -> DenseSVD:
    """Return the whole thin SVD of a frozen weight, in float64.

    Parameters
    ----------
    W
        The weight as ``(d_out, d_in)``, in any form that :func:`as_weight` takes.
    cache
        Whether to take it from disk where it is there, and to keep it there otherwise, under the
        hash of W's values: in ``$LORA_ANALYSIS_CACHE`` (by default the user's cache folder), up to
        ``$LORA_ANALYSIS_CACHE_GB`` gigabytes, the least recently used going first. Small weights,
        of less than a second, are not kept.

    Returns
    -------
    DenseSVD
        U ``(d_out, n)``, S ``(n,)`` descending, V ``(d_in, n)`` with n the smaller side.

    Raises
    ------
    BaseWeightError
        W holds values that are not finite.

    Notes
    -----
    Through `linalg.gram_svd`; `linalg.gram_seconds` says about how long it takes: half a minute
    for 4096 × 4096 on one core, when a full LAPACK SVD takes minutes.
    """
    W = as_weight(W)
    dense = W if isinstance(W, np.ndarray) else W.array()
    if not np.isfinite(dense).all():
        message = (
            f"The base weight '{getattr(W, 'name', 'W')}' holds values that are not finite. "
            "It has no spectrum; is the file damaged?"
        )
        raise BaseWeightError(message)
    if not cache or linalg.gram_seconds(dense.shape) < _WORTH_KEEPING:
        return linalg.gram_svd(dense)
    from lora_analysis.storage.cache import read_cached, write_cached

    key = f"svd-{_hash(dense)}"
    cached = read_cached(key)
    n = min(dense.shape)
    shapes = {"U": (dense.shape[0], n), "S": (n,), "V": (dense.shape[1], n)}
    if cached is not None and {name: a.shape for name, a in cached.items()} == shapes:
        return linalg.DenseSVD(cached["U"], cached["S"], cached["V"])
    svd = linalg.gram_svd(dense)
    write_cached(key, svd._asdict())
    return svd


def _hash(dense: NDArray[np.floating]) -> str:
    """Return a hash of shape, type and values."""
    import hashlib

    digest = hashlib.blake2b(f"{dense.shape} {dense.dtype}".encode(), digest_size=20)
    for rows in np.array_split(dense, max(1, dense.size >> 22)):
        digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()
