"""From an update to its spectrum: one at a time, its leading part, or whole shapes on a device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np

from lora_analysis import linalg
from lora_analysis.adapter import DenseUpdate, LowRankUpdate, Update
from lora_analysis.errors import InputError, require_package
from lora_analysis.formats import as_update, map_modules
from lora_analysis.spectra.values import Spectrum, VectorsOf

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


def _numerical_rank(S: NDArray[np.float64], rank: int, factor_norms: float) -> int:
    """Count singular values above the arithmetic's error, ``4r·2⁻⁵²·‖B‖₂‖A‖₂``.

    The stored factors are the adapter: the cut is at the error of float64 arithmetic on them,
    never at the rounding of the stored type, which would call half-precision files untrained.
    Zero wherever ‖BA‖_F ≤ 2⁻⁵²·‖B‖_F‖A‖_F, since no σ is then above r·2⁻⁵²·‖B‖₂‖A‖₂.
    """
    return int(np.count_nonzero(4 * rank * linalg.EPS * factor_norms < S))


def update_svd(update: LowRankUpdate, *, vectors: bool | int = True) -> linalg.FactoredSVD:
    """Return the SVD of B·A as `linalg.factored_svd` does; of Kronecker products from their parts.

    Those of LoKr have a rank of hundreds, and parts of a few dozen rows and columns.
    """
    if update.kronecker is not None:
        parts = update.kronecker.first, update.kronecker.second
        svds = [linalg.factored_svd(B, A, vectors=bool(vectors)) for B, A in parts]
        if len(svds[0].S) * len(svds[1].S) == min(update.rank, *update.shape):
            return linalg.kronecker_svd(*svds, vectors=vectors)
    return linalg.factored_svd(update.B, update.A, vectors=vectors)


def delta_spectrum(update: LowRankUpdate, svd: linalg.FactoredSVD) -> Spectrum:
    """Return the spectrum of ΔW from the SVD of B·A."""
    scale = 1.0 if update.scale is None else update.scale
    numerical_rank = _numerical_rank(svd.S, update.rank, float(svd.B_norm * svd.A_norm))
    return Spectrum(
        name=update.name,
        U=svd.U,
        S=abs(scale) * svd.S,
        V=-svd.V if scale < 0 and svd.V is not None else svd.V,
        of="delta",
        numerical_rank=numerical_rank if scale != 0 else 0,
        rank=update.rank,
        shape=update.shape,
        in_units_of_scale=update.scale is None,
        stored_dtype=update.stored_dtype,
        label=update.label,
        factor_condition=_factor_condition(update, svd, numerical_rank),
    )


def _factor_condition(update: LowRankUpdate, svd: linalg.FactoredSVD, numerical_rank: int) -> float:
    """Return κ(B̂) + κ(Â); if r exceeds a dimension, the bound by norms instead.

    Such a factor has dependent columns whatever was trained, and an infinite κ, while the
    singular values that there are may be well determined: rounding moves each by no more than
    ½·eps·√r·2‖B‖₂‖A‖₂.
    """
    if update.rank <= min(update.shape) or numerical_rank == 0:
        return float(svd.B_condition + svd.A_condition)
    return float(2 * svd.B_norm * svd.A_norm / svd.S[numerical_rank - 1])


def _factor_spectrum(update: LowRankUpdate, of: Literal["A", "B"], *, vectors: bool) -> Spectrum:
    """Return the spectrum of one factor alone: right vectors of A, or left vectors of B."""
    singular_vectors, values = linalg.tall_svd(update.A.T if of == "A" else update.B)
    cut = 4 * update.rank * linalg.EPS * values[0]
    return Spectrum(
        name=update.name,
        U=singular_vectors if vectors and of == "B" else None,
        S=values,
        V=singular_vectors if vectors and of == "A" else None,
        of=of,
        numerical_rank=int(np.count_nonzero(values > cut)),
        rank=update.rank,
        shape=update.shape,
        stored_dtype=update.stored_dtype,
        label=update.label,
    )


def _dense_spectrum(update: DenseUpdate, *, vectors: bool) -> Spectrum:
    delta = update.delta.astype(np.float64)
    U, V = None, None
    s: NDArray[Any]
    if not delta.any():  # an unchanged weight has no directions: one that counts nothing is enough
        s = np.zeros(1)
        U, V = (np.eye(d, 1) for d in update.shape) if vectors else (None, None)
    elif vectors:
        u, s, v = linalg.whole_svd(delta)
        sign = linalg.column_signs(u)
        U, V = u * sign, v * sign
    else:
        s = np.linalg.svd(delta, compute_uv=False)
    return _of_triplets(update, U, np.asarray(s, np.float64), V)


def _of_triplets(
    update: DenseUpdate,
    U: NDArray[np.float64] | None,
    S: NDArray[np.float64],
    V: NDArray[np.float64] | None,
) -> Spectrum:
    return Spectrum(
        name=update.name,
        U=U,
        S=S,
        V=V,
        of="delta",
        numerical_rank=int(np.count_nonzero(max(update.shape) * linalg.EPS * S[0] < S)),
        rank=update.rank,
        shape=update.shape,
        stored_dtype=update.stored_dtype,
        label=update.label,
    )


@overload
def spectrum(
    update: Update | Spectrum,
    *,
    of: VectorsOf = "delta",
    vectors: bool = True,
    device: str | None = None,
) -> Spectrum: ...
@overload
def spectrum(
    update: Any,
    *,
    of: VectorsOf = "delta",
    vectors: bool = True,
    device: str | None = None,
) -> Any: ...
def spectrum(
    update: Any,
    *,
    of: VectorsOf = "delta",
    vectors: bool = True,
    device: str | None = None,
) -> Any:
    """Return the singular values and vectors of ΔW = s·B·A, or of one factor alone.

    ΔW is never formed: QR of both factors and the SVD of an r × r core, in float64. The absolute
    error of each singular value is about 1e-15·s‖B‖₂‖A‖₂.

    Parameters
    ----------
    update
        A low-rank or dense update, in any form that :func:`as_update` takes; a Spectrum is given
        back as it is if its factor fits. An adapter, in any form that :func:`as_adapter` takes:
        the result is then a mapping of module names to spectra.
    of
        ``"delta"`` for ΔW; ``"A"`` for the right singular vectors of A alone (what the LoRA paper
        plots), ``"B"`` for the left ones of B alone. Those two depend on how ΔW is split into
        factors; only the span of all r directions does not.
    vectors
        False leaves the vectors out, which takes a quarter of the time: for norms and ranks.
    device
        A torch device to compute ΔW's on, as for `stacked_spectra`; numpy by default.

    Raises
    ------
    InputError
        An unknown factor, a factor of a dense update, or one factor alone on a device.

    Notes
    -----
    O((d_out + d_in)·r² + r³) for a low-rank update.

    Examples
    --------
    >>> import numpy as np
    >>> update = LowRankUpdate(name="q", A=np.eye(2, 5), B=2 * np.eye(7, 2), scale=0.5)
    >>> spectrum(update).S
    array([1., 1.])
    """
    if isinstance(update, Spectrum):
        if update.of != of:
            message = f"This spectrum is of factor {update.of!r}, asked for {of!r}."
            raise InputError(message)
        return update
    if not isinstance(update, LowRankUpdate | DenseUpdate):
        modules = map_modules(spectrum, update, of=of, vectors=vectors, device=device)
        if modules is not None:
            return modules
        update = as_update(update)
    if of not in ("delta", "A", "B"):
        message = f"of must be 'delta', 'A' or 'B', got {of!r}."
        raise InputError(message)
    if isinstance(update, DenseUpdate):
        if of != "delta":
            message = f"'{update.name}' is a dense update and has no factor {of}."
            raise InputError(message)
        return _dense_spectrum(update, vectors=vectors)
    if of != "delta":
        if device is not None:
            message = (
                f"Factor {of} alone of '{update.name}' was asked for on {device}; only "
                "of='delta' is computed there. Leave device out."
            )
            raise InputError(message)
        return _factor_spectrum(update, of, vectors=vectors)
    if device is not None:
        return _spectra_on_device([update], device, "float64", vectors=vectors)[0]
    return delta_spectrum(update, update_svd(update, vectors=vectors))


def stacked_spectra(
    updates: Iterable[Any],
    *,
    device: str | None = None,
    dtype: Literal["float64", "float32"] = "float64",
) -> list[Spectrum]:
    """Return the spectra of many updates, in their order, whole shapes at once on a device.

    Parameters
    ----------
    updates
        In any order of shapes and ranks; dense ones are taken one by one.
    device
        A torch device as ``"cuda"``; None computes one by one with numpy, which is quicker than a
        stack on a CPU.
    dtype
        In which to compute on the device. float32 is quicker on a GPU made for it: its error is
        about 1e-6·s‖B‖₂‖A‖₂ in every singular value, and smaller ones count as zero.

    Returns
    -------
    list of Spectrum
        In numpy arrays, as from `spectrum`.
    """
    given = [as_update(update) for update in updates]
    if device is None:
        return [spectrum(update) for update in given]
    spectra_by_index: dict[int, Spectrum] = {}
    groups: dict[tuple[int, int, int], dict[int, LowRankUpdate]] = {}
    for index, update in enumerate(given):
        if isinstance(update, DenseUpdate):
            spectra_by_index[index] = spectrum(update)
        else:
            groups.setdefault((*update.shape, update.rank), {})[index] = update
    for members in groups.values():
        spectra = _spectra_on_device(list(members.values()), device, dtype)
        spectra_by_index |= zip(members, spectra, strict=True)
    return [spectra_by_index[index] for index in range(len(given))]


def _spectra_on_device(
    updates: list[LowRankUpdate], device: str, dtype: str, *, vectors: bool = True
) -> list[Spectrum]:
    """Return the spectra of updates that share shape and rank, computed as one stack."""
    require_package("torch", "gpu", f"spectrum(device={device!r})")
    import torch

    kind = getattr(torch, dtype)
    stacks = ([update.B for update in updates], [update.A for update in updates])
    B, A = (
        torch.stack([torch.from_numpy(np.array(factor)) for factor in stack]).to(device).to(kind)
        for stack in stacks
    )
    svd = linalg.factored_svd(B, A, vectors=vectors)
    fields: list[Any] = [
        [None] * len(updates) if tensor is None else tensor.double().cpu().numpy()
        for tensor in cast("tuple[Any, ...]", svd)
    ]
    # The cut between rank and rounding is the arithmetic's: in float32 it is 2**29 higher, which
    # a larger norm of one factor expresses.
    fields[3] *= torch.finfo(kind).eps / linalg.EPS
    return [
        delta_spectrum(update, linalg.FactoredSVD(*parts))
        for update, *parts in zip(updates, *fields, strict=True)
    ]


def leading_spectrum(update: DenseUpdate, k: int) -> Spectrum:
    """Return the ``k`` leading singular triplets of a dense update.

    An iteration takes seconds for a large matrix whose whole spectrum would take minutes;
    see `linalg.leading_svd` for its error. The ranks and the norm of the result are those of the
    ``k`` directions alone.
    """
    count = min(k, *update.shape)
    u, s, v = linalg.leading_svd(update.delta, count)
    sign = linalg.column_signs(u)
    return _of_triplets(update, u * sign, s, v * sign)


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


@overload
def singular_values(update: Update) -> NDArray[np.float64]: ...
@overload
def singular_values(update: Any) -> Any: ...
def singular_values(update: Any) -> Any:
    """Return the singular values of ΔW, descending, ``(min(r, d_out, d_in),)``; no vectors.

    In units of the scale if that is unknown. For an adapter the result is a mapping of module names
    to arrays; updates and adapters may have any form that `as_update` and `as_adapter` take.

    Examples
    --------
    >>> import numpy as np
    >>> singular_values(LowRankUpdate(name="q", A=np.eye(2, 5), B=np.eye(7, 2), scale=3.0))
    array([3., 3.])
    """
    if not isinstance(update, LowRankUpdate | DenseUpdate):
        modules = map_modules(singular_values, update)
        if modules is not None:
            return modules
        update = as_update(update)
    if isinstance(update, DenseUpdate):
        return np.linalg.svd(update.delta.astype(np.float64), compute_uv=False)
    scale = 1.0 if update.scale is None else abs(update.scale)
    if update.kronecker is not None:
        return scale * update_svd(update, vectors=False).S
    return scale * linalg.factored_singular_values(update.B, update.A)


def update_norm(update: Update) -> float:
    """Return ‖ΔW‖_F, in units of the scale if that is unknown; no singular vectors are computed."""
    values = update.delta if isinstance(update, DenseUpdate) else singular_values(update)
    return float(np.sqrt(np.square(values, dtype=np.float64).sum()))
