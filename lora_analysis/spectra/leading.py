"""The leading part of a dense update's spectrum, without the rest of it."""

from __future__ import annotations

import numpy as np

from lora_analysis import linalg
from lora_analysis.adapter import DenseUpdate
from lora_analysis.spectra.values import Spectrum


def leading_spectrum(update: DenseUpdate, k: int) -> Spectrum:
    """Return the ``k`` leading singular triplets of a dense update.

    An iteration takes seconds for a large matrix whose whole spectrum would take minutes;
    see `linalg.leading_svd` for its error. The ranks and the norm of the result are those of the
    ``k`` directions alone.
    """
    count = min(k, *update.shape)
    u, s, v = linalg.leading_svd(update.delta, count)
    sign = linalg.column_signs(u)
    return Spectrum(
        name=update.name,
        U=u * sign,
        S=s,
        V=v * sign,
        of="delta",
        numerical_rank=int(np.count_nonzero(s > max(update.shape) * linalg.EPS * s[0])),
        rank=update.rank,
        shape=update.shape,
        stored_dtype=update.stored_dtype,
        label=update.label,
    )
