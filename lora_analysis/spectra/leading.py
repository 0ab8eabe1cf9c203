"""The leading part of a dense update's spectrum, without the rest of it."""

from __future__ import annotations

from dataclasses import replace

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


def partial_spectrum(update: DenseUpdate, k: int) -> Spectrum:
    """Return all singular values of a large dense update, with the ``k`` leading vectors.

    A quarter of the time of a full SVD. The values beyond the leading ones are roots of eigenvalues
    of ``ΔW·ΔWᵀ``: their absolute error is below 1e-6·σ₁, and smaller ones count as zero.
    """
    leading = leading_spectrum(update, k)
    delta = update.delta.astype(np.float64)
    delta = delta if delta.shape[0] <= delta.shape[1] else delta.T
    squares = np.linalg.eigvalsh(delta @ delta.T)[::-1]
    S = np.sqrt(np.maximum(squares, 0.0))
    S[: len(leading.S)] = leading.S
    least = np.sqrt(max(update.shape) * linalg.EPS) * S[0]
    return replace(leading, S=S, numerical_rank=int(np.count_nonzero(least < S)))
