"""A control for the size of an update: random noise of the same norm."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.adapter import NOT_STORED, DenseUpdate
from lora_analysis.edit.derived_adapter import derive_adapter
from lora_analysis.spectra import update_norm

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter, Update


def noise_of_equal_norm(adapter: Adapter, *, seed: int = 0) -> Adapter:
    """Return an adapter with Gaussian noise for every update, of its shape, rank and norm.

    The control for a comparison of a full fine-tune with LoRA, and for every result that the size
    of an update alone could explain: spectrum, intruders, amplification, the change of the
    weight's magnitude. Where the adapter differs from its noise, training is the cause.

    Parameters
    ----------
    adapter
        Dense updates (:func:`lora_analysis.read_fine_tune`) or low-rank ones.
    seed
        Seed for the noise. Each module has its own generator, by its name and the seed.

    Returns
    -------
    Adapter
        Labeled with "(noise)". For a dense update, a dense one with independent
        normal entries; for a low-rank one, ``s·B·A`` of its rank with normal A and B (for DoRA,
        noise for its low-rank part alone). ‖ΔW‖_F is that of the module's update
        (in units of the scale if that is unknown). Computed when a module is accessed; zero
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
    note = f"Gaussian noise of each update's norm instead of the update (seed {seed}): a control."
    noise = derive_adapter(adapter, updates, note)
    noise = noise.with_provenance(rank=adapter.provenance.rank, metrics={})
    return noise.with_label(f"{adapter.label} (noise)")


def _noise(adapter: Adapter, name: str, seed: int) -> Update:
    return noise_of_update(adapter[name], name, seed)


def noise_of_update(update: Update, name: str, seed: int = 0) -> Update:
    """Return the noise of `noise_of_equal_norm` for one update, drawn for a module's name."""
    digest = hashlib.blake2b(f"{name}\n{seed}".encode(), digest_size=16).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    if isinstance(update, DenseUpdate):
        delta = rng.standard_normal(update.shape, dtype=np.float32)
        size = update_norm(replace(update, delta=delta))
        return replace(update, delta=delta * (update_norm(update) / size))
    A, B = (rng.standard_normal(M.shape).astype(M.dtype) for M in (update.A, update.B))
    noise = replace(update, A=A, B=B, variant="", magnitude=None, stored_at=NOT_STORED)
    size = update_norm(noise)
    ratio = update_norm(update) / size if size else 0.0
    return replace(noise, B=(B * ratio).astype(B.dtype))
