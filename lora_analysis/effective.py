"""The update really applied, for methods in which it depends on the base weight.

DoRA rescales the rows of ``W + s·B·A``; KaSA first takes W's smallest directions out of it;
PiSSA and OLoRA first take out a product that is a function of W. What the file alone says is
``s·B·A``: here is what becomes of it once W is known.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate
from lora_analysis.bases import Weight, check_experts
from lora_analysis.errors import (
    DegenerateSubspaceError,
    IncompatibleError,
    InputError,
    UnsupportedMethodError,
)
from lora_analysis.finding import Finding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Update
    from lora_analysis.bases import BaseWeights
    from lora_analysis.formats.options import Factors, InitialFactorsRequest, InitialFactorsSource

# PEFT works in float32: where W's r-th and next singular value are closer than this, relatively,
# its leading space is another one on another machine.
_GAP = 1e-4
# Formats of trainers for image models, all of whose layers store a weight as [out, in].
_ROWS_ARE_OUTPUTS = frozenset({"kohya", "flux", "diffusers", "cloneofsimo"})
# Findings of readers on such methods; they no longer hold once the base is known.
_LOW_RANK_PART = frozenset({"dora", "dora-columns", "kasa"})


def effective_update(update: Update, W: Weight | NDArray[np.floating]) -> Update:
    """Return the change of the weight that the model with the adapter really has.

    DoRA (arXiv 2402.09353, eq. 5): ``W' = m·V/‖V‖``, row by row, with ``V = W + s·B·A``, and the
    change is ``W' - W``, dense. Where the magnitude is that of input columns (OneTrainer, LyCORIS
    without ``wd_on_out``), column by column, of a convolution channel by channel.
    KaSA (arXiv 2412.06071): ``s·B·diag·A`` less the part of W along
    its r smallest singular directions, of rank 2r. Any other update is returned as it is.

    Parameters
    ----------
    update
        As read.
    W
        The base weight, shape ``(d_out, d_in)``, before training.

    Returns
    -------
    DenseUpdate or LowRankUpdate
        Of the same name, label and shape.

    Raises
    ------
    ScaleError
        The scale is not known.
    IncompatibleError
        W has another shape.
    DegenerateSubspaceError
        A row or column of ``W + s·B·A`` is zero, or W's smallest directions are not defined.
    InputError
        The update says it is DoRA's and holds no magnitude.

    Notes
    -----
    ``O(d_out·d_in·r)`` and one dense float64 matrix; KaSA takes the whole SVD of W.
    """
    if not isinstance(update, LowRankUpdate) or not update.variant:
        return update
    weight = _array(update, W)
    if update.variant == "DoRA":
        return _dora(update, weight)
    if update.variant == "KaSA":
        return _kasa(update, weight)
    message = f"What '{update.variant}' makes of '{update.name}' is not known."
    raise UnsupportedMethodError(message)


def effective_adapter(
    adapter: Adapter, base: BaseWeights, *, transposed: bool | None = None
) -> Adapter:
    """Return the adapter with every update as the model with it really has it.

    Parameters
    ----------
    adapter
        As read.
    base
        The weights that training started from.
    transposed
        As in ``base.weight``. Formats of image models' trainers say it: False.

    Returns
    -------
    Adapter
        Of the same modules; what :func:`effective_update` says is worked out when a module is
        asked for, and so are the errors of the base's weights. Updates that are the whole change
        already are those of ``adapter``, and the base is not asked for theirs.

    Raises
    ------
    IncompatibleError
        The adapter stacks the factors of another number of experts than the base has.
    """
    check_experts(adapter, base)
    base = base.matched_to([adapter])
    if transposed is None and adapter.provenance.format in _ROWS_ARE_OUTPUTS:
        transposed = False
    findings = [one for one in adapter.provenance.findings if one.code not in _LOW_RANK_PART]
    if len(findings) < len(adapter.provenance.findings):
        findings.append(Finding("whole-change", {"base": base.address or base.label}))
    return Adapter(
        {name: partial(_effective, adapter, name, base, transposed) for name in adapter},
        label=adapter.label,
        provenance=replace(
            adapter.provenance,
            findings=tuple(findings),
            also_read=(*adapter.provenance.also_read, *base.inputs),
        ),
        saved_modules=adapter.saved_modules,
        config=adapter.config,
        side_tensors=adapter.side_tensors,
    )


def _effective(adapter: Adapter, name: str, base: BaseWeights, transposed: bool | None) -> Update:
    update = adapter[name]
    if not isinstance(update, LowRankUpdate) or not update.variant:
        return update
    weight = base.weight(update.base_name or name, shape=update.shape, transposed=transposed)
    return effective_update(update, weight)


def initial_factors_from_base(
    base: BaseWeights, *, transposed: bool | None = None
) -> InitialFactorsSource:
    """Return what works PiSSA's and OLoRA's initial factors out of the base, for ``read_adapter``.

    ``read_adapter(source, initial=initial_factors_from_base(base))``. PiSSA (arXiv
    2404.02948): with the thin SVD of W, ``s·B₀A₀`` is its best approximation of rank r. OLoRA
    (arXiv 2406.01775): with ``W = QR``, B₀ is Q's first r columns and A₀ R's first r rows.

    Parameters
    ----------
    base
        The weights that training started from, unquantized.
    transposed
        As in ``base.weight``.

    Returns
    -------
    callable
        Raises UnsupportedMethodError for a method whose start is drawn at random or from data,
        and DegenerateSubspaceError where W's leading directions are not defined.

    Notes
    -----
    In float64, where PEFT used float32: its residual weight differs by rounding. ``O(d³)`` a
    module.
    """

    def start(request: InitialFactorsRequest) -> Factors:
        update = request.update
        weight = base.weight(
            update.base_name or update.name, shape=update.shape, transposed=transposed
        )
        W = weight.array().astype(np.float64)
        if request.method == "pissa":
            return _pissa(update, W)
        if request.method == "olora" and not weight.transposed:
            return _olora(update, W)
        reason = "its start is drawn at random or from data, or depends on how W is stored"
        message = (
            f"The initial factors of '{update.name}' cannot be worked out of the base for "
            f"init_lora_weights '{request.method}': {reason}. Pass the adapter as saved before "
            "training."
        )
        raise UnsupportedMethodError(message)

    return start


def _array(update: LowRankUpdate, W: Weight | NDArray[np.floating]) -> NDArray[np.float64]:
    whole = W.array() if isinstance(W, Weight) else np.asarray(W)
    if whole.shape != update.shape:
        message = (
            f"'{update.name}' in {update.label or 'this adapter'} updates a weight of shape "
            f"{update.shape}, found {whole.shape}. Is it another base model, or stored transposed?"
        )
        raise IncompatibleError(message)
    return whole.astype(np.float64)


def _dora(update: LowRankUpdate, W: NDArray[np.float64]) -> DenseUpdate:
    if update.magnitude is None:
        message = f"'{update.name}' is said to be DoRA's, but holds no magnitude."
        raise InputError(message)
    V = W + update.delta_weight()  # (d_out, d_in)
    by_rows = update.magnitude_side == "output"
    taps = 1 if by_rows else math.prod(update.kernel)
    vectors = V if by_rows else V.reshape(len(V), -1, taps)  # (d_out, channels, taps)
    norms = np.linalg.norm(vectors, axis=1) if by_rows else np.sqrt((vectors**2).sum(axis=(0, 2)))
    if not norms.all():
        what = "rows" if by_rows else "input columns"
        message = f"'{update.name}': {np.count_nonzero(norms == 0)} {what} of W + s·B·A are zero."
        raise DegenerateSubspaceError(message)
    factors = update.magnitude / norms
    V *= factors[:, None] if by_rows else np.repeat(factors, taps)
    V -= W
    return DenseUpdate(
        update.name,
        V,
        stored_dtype=update.stored_dtype,
        label=update.label,
        layout=update.layout,
        kernel=update.kernel,
    )


def _kasa(update: LowRankUpdate, W: NDArray[np.float64]) -> LowRankUpdate:
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    kept = len(S) - update.rank
    if kept < 1:
        message = f"'{update.name}': rank {update.rank} leaves nothing of a weight {W.shape}."
        raise IncompatibleError(message)
    _check_gap(update, S, kept)
    scale = update.known_scale()
    return replace(
        update,
        A=np.vstack([update.A, Vh[kept:]]),
        B=np.hstack([update.B, U[:, kept:] * (-S[kept:] / scale)]),
        alpha=None,
        variant="",
    )


def _pissa(update: LowRankUpdate, W: NDArray[np.float64]) -> Factors:
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    r = update.rank
    _check_gap(update, S, r)
    roots = np.sqrt(S[:r] / update.known_scale())
    return roots[:, None] * Vh[:r], U[:, :r] * roots


def _olora(update: LowRankUpdate, W: NDArray[np.float64]) -> Factors:
    Q, R = np.linalg.qr(W)
    return R[: update.rank], Q[:, : update.rank]


def _check_gap(update: LowRankUpdate, S: NDArray[np.float64], k: int) -> None:
    """Raise where the first k singular directions cannot be told from those that follow."""
    following = S[k] if k < len(S) else 0.0
    if S[k - 1] - following <= _GAP * S[k - 1]:
        message = (
            f"The first {k} singular directions of the weight of '{update.name}' are not defined: "
            f"sigma_{k} is {S[k - 1]:.6g}, the next {following:.6g}. Pass the adapter as saved "
            "before training."
        )
        raise DegenerateSubspaceError(message)
