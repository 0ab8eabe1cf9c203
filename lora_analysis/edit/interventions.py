"""Directions taken out of an update, by their place in its spectrum or by another's subspace."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from lora_analysis.adapter import NOT_STORED, DenseUpdate, LowRankUpdate
from lora_analysis.edit.derived import derived
from lora_analysis.edit.truncation import from_directions, refuse_parts
from lora_analysis.errors import DegenerateSubspaceError, IncompatibleError, InputError
from lora_analysis.spectra import spectrum

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from lora_analysis.adapter import Adapter, Update
    from lora_analysis.spectra import Spectrum

Sides = Literal["input", "output", "both"]


def keep_directions(update: Update, directions: Sequence[int]) -> LowRankUpdate:
    """Return the update's part along some of its singular directions.

    Parameters
    ----------
    update
        Low-rank or dense.
    directions
        Places in the spectrum, the strongest is 1: ``range(1, k + 1)`` keeps the top k.

    Returns
    -------
    LowRankUpdate
        ``Σ_i u_i·σ_i·v_iᵀ`` with the scale folded in, as by :func:`lora_analysis.truncate`.

    Raises
    ------
    DegenerateSubspaceError
        A direction lies beyond the numerical rank, or one that is kept and one that is not have
        singular values which the stored type does not tell apart: which is which is not defined.
    InputError
        A place is below 1.
    UnsupportedMethodError
        The update is a part of a method whose other part depends on the rank.
    """
    refuse_parts(update)
    found = spectrum(update)
    at = np.flatnonzero(_chosen(found, directions))
    U, V = found.vectors("output"), found.vectors("input")
    return from_directions(update, U[:, at], found.S[at], V[:, at])


def drop_directions(update: Update, directions: Sequence[int]) -> LowRankUpdate:
    """Return the update without some of its singular directions, the strongest is 1.

    The rest of the spectrum stays as it is; errors are those of `keep_directions`. Where nothing
    is left, the result is zero, of rank 1.
    """
    refuse_parts(update)
    found = spectrum(update)
    dropped = _chosen(found, directions)
    rest = np.flatnonzero(~dropped)
    U, V = found.vectors("output"), found.vectors("input")
    return from_directions(update, U[:, rest], found.S[rest], V[:, rest])


def project_out(
    update: Update, *, output: ArrayLike | None = None, input: ArrayLike | None = None
) -> Update:
    """Return the update without what it writes to, or reads from, given directions.

    ``(I - PPᵀ)·ΔW·(I - QQᵀ)`` with P and Q orthonormal bases of the two spans; a side that is not
    given stays as it is. Singular vectors of W + ΔW that are no directions of W (intruders) are
    such directions too.

    Parameters
    ----------
    update
        Low-rank: B and A are projected, rank and scale stay. Dense: ΔW is.
    output
        Columns to take out of the output side, ``(d_out, n)``, of any length and angles.
    input
        Columns to take out of the input side, ``(d_in, n)``.

    Raises
    ------
    IncompatibleError
        A column has another length than the side has features.
    InputError
        No side is given, or a column is not finite.

    Examples
    --------
    >>> update = LowRankUpdate(name="q", A=np.eye(2, 3), B=np.eye(3, 2), scale=1.0)
    >>> project_out(update, output=np.array([[1.0], [0.0], [0.0]])).delta_weight()[0]
    array([0., 0., 0.])
    """
    refuse_parts(update)
    if output is None and input is None:
        message = "Give directions to take out: output=, input=, or both."
        raise InputError(message)
    P = None if output is None else _orthonormal(update, output, "output", update.shape[0])
    Q = None if input is None else _orthonormal(update, input, "input", update.shape[1])
    if isinstance(update, DenseUpdate):
        return replace(update, delta=_without(_without(update.delta, P).T, Q).T)
    A, B = _without(update.A.T, Q).T, _without(update.B, P)
    return replace(update, A=A, B=B, stored_dtype="", stored_at=NOT_STORED)


def without_directions(adapter: Adapter, directions: Mapping[str, Sequence[int]]) -> Adapter:
    """Return the adapter without named singular directions of named modules; see `drop_directions`.

    Parameters
    ----------
    adapter
        Its other modules stay as they are.
    directions
        Per module the places in its spectrum, the strongest is 1.

    Raises
    ------
    InputError
        The adapter has no such module, or nothing is named.
    """
    _refuse_unknown(adapter, directions)
    new = {
        name: drop_directions(adapter[name], places)
        for name, places in directions.items()
        if places
    }
    count = sum(len(set(places)) for places in directions.values())
    sentence = (
        f"Made from {adapter.label} without {count} singular directions in {len(new)} modules."
    )
    return derived(adapter, _with(adapter, new), sentence)


def without_subspace(
    adapter: Adapter, other: Adapter, *, side: Sides = "both", k: int | None = None
) -> Adapter:
    """Return the adapter with the directions of another one projected out, module by module.

    Parameters
    ----------
    adapter
        Modules that the other adapter does not have, or has not trained, stay as they are.
    other
        Its singular directions are taken out.
    side
        ``"input"`` (what the other reads), ``"output"`` (what it writes to), or ``"both"``.
    k
        Only the other's leading directions; None for all up to its numerical rank.

    Raises
    ------
    InputError
        The two have no trained module in common, or the side is none of the three.
    DegenerateSubspaceError
        k exceeds the other's numerical rank, or cuts between coinciding singular values.
    IncompatibleError
        A module has other shapes in the two.
    """
    if side not in ("input", "output", "both"):
        message = f"side must be 'input', 'output' or 'both', got {side!r}."
        raise InputError(message)
    shared = [name for name in adapter if name in other]
    new = {}
    for name in shared:
        found = spectrum(other[name])
        if not found.untrained:
            new[name] = project_out(adapter[name], **_bases(found, side, k))
    if not new:
        message = f"{adapter.label} and {other.label} have no trained module in common."
        raise InputError(message)
    what = "all directions" if k is None else f"the top {k} directions"
    sentence = (
        f"Made from {adapter.label} with {what} of {other.label} projected out "
        f"({'both sides' if side == 'both' else f'{side} side'}) in {len(new)} of {len(adapter)} "
        "modules."
    )
    return derived(adapter, _with(adapter, new), sentence)


def _bases(found: Spectrum, side: Sides, k: int | None) -> dict[str, NDArray[np.float64]]:
    sides: tuple[Literal["input", "output"], ...] = (
        ("input", "output") if side == "both" else (side,)
    )
    return {one: found.vectors(one) if k is None else found.basis(one, k) for one in sides}


def _with(adapter: Adapter, new: Mapping[str, Update]) -> dict[str, Update | partial[Update]]:
    """Return the modules of an adapter, some replaced; the others are read when asked for."""
    return {name: new[name] if name in new else partial(_get, adapter, name) for name in adapter}


def _get(adapter: Adapter, name: str) -> Update:
    return adapter[name]


def _refuse_unknown(adapter: Adapter, names: Iterable[str]) -> None:
    wanted = list(names)
    unknown = [name for name in wanted if name not in adapter]
    if unknown or not wanted:
        found = f"no module '{unknown[0]}'" if unknown else "modules, but none was named"
        message = f"{adapter.label} has {found}; it has {len(adapter)}, as '{next(iter(adapter))}'."
        raise InputError(message)


def _chosen(found: Spectrum, directions: Sequence[int]) -> NDArray[np.bool_]:
    """Return for each direction up to the numerical rank whether it is named."""
    where = f"'{found.name}' in {found.label or 'the update'}"
    named = sorted({int(place) for place in directions})
    if named and named[0] < 1:
        message = f"Directions are counted from 1, got {named[0]} for {where}."
        raise InputError(message)
    if named and named[-1] > found.numerical_rank:
        message = (
            f"Direction {named[-1]} of {where} is undefined: its numerical rank is "
            f"{found.numerical_rank}."
        )
        raise DegenerateSubspaceError(message)
    chosen = np.zeros(found.numerical_rank, dtype=bool)
    chosen[[place - 1 for place in named]] = True
    cut = np.flatnonzero((chosen[:-1] != chosen[1:]) & found.degenerate[:-1])
    if cut.size:
        i = int(cut[0]) + 1
        message = (
            f"Directions {i} and {i + 1} of {where} cannot be told apart: their singular values "
            f"differ by {found.gaps[i - 1]:.1e} (relative). Name both, or neither."
        )
        raise DegenerateSubspaceError(message)
    return chosen


def _orthonormal(
    update: Update, columns: ArrayLike, side: str, features: int
) -> NDArray[np.float64]:
    """Return an orthonormal basis of a span, of as many columns as are independent."""
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
    u, s, _ = np.linalg.svd(unit, full_matrices=False)
    return np.asarray(u[:, s > max(unit.shape, default=1) * np.finfo(np.float64).eps * s[:1]])


def _without(
    matrix: NDArray[np.floating], basis: NDArray[np.float64] | None
) -> NDArray[np.floating]:
    """Return the columns of a matrix less their part in a span."""
    if basis is None:
        return matrix
    wide = matrix.astype(np.float64)
    wide = wide - basis @ (basis.T @ wide)
    return np.asarray(wide - basis @ (basis.T @ wide))  # twice: what is left points out of it
