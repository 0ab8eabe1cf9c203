"""The control of an update's size: noise of the same norm, which learned nothing."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.adapter import NOT_STORED, DenseUpdate
from lora_analysis.edit.derived import derived
from lora_analysis.spectra import singular_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, LowRankUpdate, Update


def noise_of_equal_norm(adapter: Adapter, *, seed: int = 0) -> Adapter:
    """Return Gaussian noise in the place of every update, of its shape, rank and norm.

    The control of a full fine-tune against LoRA, and of every figure that could come from the size
    of a change alone: spectrum, intruders, amplification, the change of the weight's magnitude.
    What the adapter has and its noise has not, training put there.

    Parameters
    ----------
    adapter
        Of dense updates (:func:`lora_analysis.read_fine_tune`) or of low-rank ones.
    seed
        Of the noise. Each module draws from a generator of its own, by its name and the seed.

    Returns
    -------
    Adapter
        Under the label with "(noise)". In a dense update's place a dense one with independent
        normal entries; in a low-rank one's place ``s·B·A`` of its rank with normal A and B, of
        DoRA's in the place of its low-rank part alone. ‖ΔW‖_F is that of the module's own update
        (in units of the scale where that is not known). Drawn when a module is asked for; zero
        updates stay zero.

    Examples
    --------
    >>> from lora_analysis.adapter import Adapter
    >>> tuned = Adapter({"q": DenseUpdate("q", np.eye(4))}, label="tuned")
    >>> noise = noise_of_equal_norm(tuned)
    >>> noise.label, round(float(np.linalg.norm(noise["q"].delta_weight())), 6)
    ('tuned (noise)', 2.0)
    """
    updates = {name: partial(_noise, adapter, name, seed) for name in adapter}
    sentence = f"Gaussian noise of each update's norm in its place (seed {seed}): a control."
    made = derived(adapter, updates, sentence).described(rank=adapter.provenance.rank, metrics={})
    return made.relabeled(f"{adapter.label} (noise)")


def _noise(adapter: Adapter, name: str, seed: int) -> Update:
    update = adapter[name]
    digest = hashlib.blake2b(f"{name}\n{seed}".encode(), digest_size=16).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    if isinstance(update, DenseUpdate):
        drawn = rng.standard_normal(update.shape, dtype=np.float32)
        return replace(update, delta=drawn * (_norm(update.delta) / _norm(drawn)))
    return _low_rank(update, rng)


def _low_rank(update: LowRankUpdate, rng: np.random.Generator) -> LowRankUpdate:
    A, B = (rng.standard_normal(one.shape).astype(one.dtype) for one in (update.A, update.B))
    drawn = replace(update, A=A, B=B, variant="", magnitude=None, stored_at=NOT_STORED)
    size = _norm(singular_values(drawn))
    ratio = _norm(singular_values(update)) / size if size else 0.0
    return replace(drawn, B=(B * ratio).astype(B.dtype))


def _norm(values: NDArray[np.floating]) -> float:
    """Return ‖·‖_F, its squares summed in float64."""
    return float(np.sqrt(np.square(values, dtype=np.float64).sum()))
