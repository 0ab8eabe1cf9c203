"""Edited adapters: without directions of their own or of another adapter, or noise of their norm.

`derive_adapter` decides which facts about the source are still true of an edited adapter.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora_analysis.adapter import NOT_STORED, Adapter, DenseUpdate, LazyUpdate, LowRankUpdate
from lora_analysis.edit.truncation import from_directions, refuse_partial_methods
from lora_analysis.errors import DegenerateSubspaceError, IncompatibleError, InputError
from lora_analysis.finding import as_findings
from lora_analysis.formats import as_adapter
from lora_analysis.spectra import spectrum, update_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from lora_analysis.adapter import Update

Sides = Literal["input", "output", "both"]

# The writer computes these from the updates; those of the source's config are outdated.
_OUTDATED = ("rank_pattern", "alpha_pattern", "r", "lora_alpha")


def keep_directions(update: Update, directions: Sequence[int]) -> LowRankUpdate:
    """Return the update's part along some of its singular directions.

    Parameters
    ----------
    update
        Low-rank or dense.
    directions
        Numbers of singular directions, the strongest is 1: ``range(1, k + 1)`` keeps the top k.

    Returns
    -------
    LowRankUpdate
        ``Σ_i u_i·σ_i·v_iᵀ`` with the scale folded in, as by :func:`lora_analysis.truncate`.

    Raises
    ------
    DegenerateSubspaceError
        A direction is beyond the numerical rank; or a direction to keep and one to drop have
        singular values that the stored type does not distinguish: the two are not defined.
    InputError
        A number is below 1.
    UnsupportedMethodError
        The update is a part of a method whose other part depends on the rank.
    """
    return _select_directions(update, directions, keep=True)


def drop_directions(update: Update, directions: Sequence[int]) -> LowRankUpdate:
    """Return the update without some of its singular directions, the strongest is 1.

    The rest of the spectrum does not change; errors are those of `keep_directions`. If nothing
    remains, the result is zero, of rank 1.
    """
    return _select_directions(update, directions, keep=False)


def _select_directions(update: Update, directions: Sequence[int], *, keep: bool) -> LowRankUpdate:
    refuse_partial_methods(update)
    whole = spectrum(update)
    subject = f"'{whole.name}' in {whole.label or 'the update'}"
    numbers = sorted({int(number) for number in directions})
    if numbers and numbers[0] < 1:
        message = f"Directions are counted from 1, got {numbers[0]} for {subject}."
        raise InputError(message)
    if numbers and numbers[-1] > whole.numerical_rank:
        message = (
            f"Direction {numbers[-1]} of {subject} is undefined: its numerical rank is "
            f"{whole.numerical_rank}."
        )
        raise DegenerateSubspaceError(message)
    selected = np.zeros(whole.numerical_rank, dtype=bool)
    selected[[number - 1 for number in numbers]] = True
    cut = np.flatnonzero((selected[:-1] != selected[1:]) & whole.degenerate[:-1])
    if cut.size:
        i = int(cut[0]) + 1
        message = (
            f"Directions {i} and {i + 1} of {subject} cannot be told apart: their singular values "
            f"differ by {whole.gaps[i - 1]:.1e} (relative). Name both, or neither."
        )
        raise DegenerateSubspaceError(message)
    indices = np.flatnonzero(selected == keep)
    U, V = whole.vectors("output"), whole.vectors("input")
    return from_directions(update, U[:, indices], whole.S[indices], V[:, indices])


def project_out(
    update: Update, *, output: ArrayLike | None = None, input: ArrayLike | None = None
) -> Update:
    """Return the update with given directions of its output or input side projected out.

    ``(I - PPᵀ)·ΔW·(I - QQᵀ)`` with P and Q orthonormal bases of the two spans; a side that is not
    given does not change. Singular vectors of W + ΔW that are not directions of W (intruders) are
    such directions too.

    Parameters
    ----------
    update
        Low-rank: B and A are projected, rank and scale stay. Dense: ΔW is.
    output
        Columns to project out of the output side, ``(d_out, n)``, of any length and angles.
    input
        Columns to project out of the input side, ``(d_in, n)``.

    Raises
    ------
    IncompatibleError
        The columns' length is not the number of features of the side.
    InputError
        No side is given, or a column is not finite.

    Examples
    --------
    >>> update = LowRankUpdate(name="q", A=np.eye(2, 3), B=np.eye(3, 2), scale=1.0)
    >>> project_out(update, output=np.array([[1.0], [0.0], [0.0]])).delta_weight()[0]
    array([0., 0., 0.])
    """
    refuse_partial_methods(update)
    if output is None and input is None:
        message = "Give directions to take out: output=, input=, or both."
        raise InputError(message)
    P = None if output is None else _orthonormal(update, output, "output", update.shape[0])
    Q = None if input is None else _orthonormal(update, input, "input", update.shape[1])
    if isinstance(update, DenseUpdate):
        return replace(update, delta=_project_out(_project_out(update.delta, P).T, Q).T)
    A, B = _project_out(update.A.T, Q).T, _project_out(update.B, P)
    return replace(update, A=A, B=B, stored_dtype="", stored_at=NOT_STORED)


def without_directions(adapter: Any, directions: Mapping[str, Sequence[int]]) -> Adapter:
    """Return the adapter without given singular directions of given modules.

    Parameters
    ----------
    adapter
        In any form that :func:`as_adapter` takes. Modules that are not named do not change.
    directions
        Per module the numbers of the directions to drop, as for `drop_directions`.

    Raises
    ------
    InputError
        The adapter has no such module, or nothing is named.
    """
    adapter = as_adapter(adapter)
    unknown = [name for name in directions if name not in adapter]
    if unknown or not directions:
        problem = f"no module '{unknown[0]}'" if unknown else "modules, but none was named"
        message = (
            f"{adapter.label} has {problem}; it has {len(adapter)}, as '{next(iter(adapter))}'."
        )
        raise InputError(message)
    edited = {
        name: drop_directions(adapter[name], numbers)
        for name, numbers in directions.items()
        if numbers
    }
    count = sum(len(set(numbers)) for numbers in directions.values())
    note = (
        f"Made from {adapter.label} without {count} singular directions in {len(edited)} modules."
    )
    return derive_adapter(adapter, _replace_modules(adapter, edited), note)


def without_subspace(
    adapter: Any, other: Any, *, side: Sides = "both", k: int | None = None
) -> Adapter:
    """Return the adapter with the directions of another one projected out, module by module.

    Parameters
    ----------
    adapter
        Modules that the other adapter does not have, or has not trained, do not change.
    other
        Its singular directions are projected out. In any form that :func:`as_adapter` takes.
    side
        ``"input"`` (the other's input directions), ``"output"`` (its output directions), or
        ``"both"``.
    k
        Only the other's leading directions; None for all up to its numerical rank.

    Raises
    ------
    InputError
        The two have no trained module in common, or the side is none of the three.
    DegenerateSubspaceError
        k exceeds the other's numerical rank, or cuts between coinciding singular values.
    IncompatibleError
        A module has different shapes in the two.
    """
    adapter, other = as_adapter(adapter), as_adapter(other)
    if side not in ("input", "output", "both"):
        message = f"side must be 'input', 'output' or 'both', got {side!r}."
        raise InputError(message)
    sides: tuple[Literal["input", "output"], ...] = (
        ("input", "output") if side == "both" else (side,)
    )
    edited = {}
    for name in (name for name in adapter if name in other):
        whole = spectrum(other[name])
        if not whole.untrained:
            bases = {s: whole.vectors(s) if k is None else whole.basis(s, k) for s in sides}
            edited[name] = project_out(adapter[name], **bases)
    if not edited:
        message = f"{adapter.label} and {other.label} have no trained module in common."
        raise InputError(message)
    which = "all directions" if k is None else f"the top {k} directions"
    note = (
        f"Made from {adapter.label} with {which} of {other.label} projected out "
        f"({'both sides' if side == 'both' else f'{side} side'}) in {len(edited)} of "
        f"{len(adapter)} modules."
    )
    return derive_adapter(adapter, _replace_modules(adapter, edited), note)


def _replace_modules(
    adapter: Adapter, edited: Mapping[str, Update]
) -> dict[str, Update | partial[Update]]:
    """Return the modules of an adapter, some replaced; the others are loaded on access."""
    return {
        name: edited[name] if name in edited else partial(adapter.__getitem__, name)
        for name in adapter
    }


def _orthonormal(
    update: Update, columns: ArrayLike, side: str, features: int
) -> NDArray[np.float64]:
    """Return an orthonormal basis of the columns' span; dependent columns add nothing."""
    given = np.asarray(columns, dtype=np.float64)
    if given.ndim != 2 or given.shape[0] != features:
        message = (
            f"Directions of the {side} side of '{update.name}' must be columns ({features}, n), "
            f"found shape {given.shape}."
        )
        raise IncompatibleError(message)
    if not np.isfinite(given).all():
        message = f"Directions of the {side} side of '{update.name}' hold non-finite values."
        raise InputError(message)
    length = np.linalg.norm(given, axis=0)
    unit = given[:, length > 0] / length[length > 0]
    U, sigma, _ = np.linalg.svd(unit, full_matrices=False)
    floor = max(unit.shape, default=1) * np.finfo(np.float64).eps * sigma[:1]
    return np.asarray(U[:, sigma > floor])


def _project_out(
    matrix: NDArray[np.floating], basis: NDArray[np.float64] | None
) -> NDArray[np.floating]:
    """Return the columns of a matrix minus their projection onto a span."""
    if basis is None:
        return matrix
    wide = matrix.astype(np.float64)
    wide = wide - basis @ (basis.T @ wide)
    return np.asarray(wide - basis @ (basis.T @ wide))  # twice: rounding of the first is removed


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


def derive_adapter(
    adapter: Adapter, updates: Mapping[str, Update | Callable[[], Update]], note: str
) -> Adapter:
    """Return an adapter in memory with the label, head, task and base of another.

    Parameters
    ----------
    adapter
        The source.
    updates
        The new adapter's modules. If some of the source's are missing, the config's targets are
        narrowed to the rest. The ranks of updates that a plain function returns stay unknown.
    note
        A sentence about the edit, which becomes a finding.
    """
    source = adapter.provenance
    ranks = {_rank(update) for update in updates.values()}
    config = {key: value for key, value in adapter.config.items() if key not in _OUTDATED}
    if len(updates) < len(adapter):
        config["target_modules"] = list(updates)
    return adapter.copy_with(
        updates=updates,
        provenance=replace(
            source,
            path=None,
            format="memory",
            files=(),
            scale_origin={name: source.scale_origin.get(name, "caller") for name in updates},
            rank=ranks.pop() if len(ranks) == 1 else None,
            findings=(*source.findings, *as_findings((note,))),
            source_format=source.source_format or source.format,
            also_read=source.inputs,
        ),
        config=config,
    )


def _rank(update: Update | Callable[[], Update]) -> int | None:
    if isinstance(update, LazyUpdate):
        return None if update.outline.dense else update.outline.rank
    return update.rank if isinstance(update, LowRankUpdate) else None
