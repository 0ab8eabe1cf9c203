"""The effective update, for methods in which it depends on the base weight.

DoRA rescales the rows of ``W + s·B·A``; KaSA first removes W's smallest directions from it;
PiSSA and OLoRA first subtract a product that is a function of W. The file alone gives
``s·B·A``; these functions compute the whole update, given W.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate, check_weight_shape
from lora_analysis.bases import Weight, as_base, as_weight, check_experts
from lora_analysis.errors import (
    DegenerateSubspaceError,
    IncompatibleError,
    InputError,
    UnsupportedMethodError,
)
from lora_analysis.finding import Finding
from lora_analysis.formats import as_adapter, as_update
from lora_analysis.linalg import is_torch_module

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Update
    from lora_analysis.bases import BaseWeights
    from lora_analysis.formats.options import Factors, InitialFactorsRequest, InitialFactorsSource

# PEFT computes in float32: if W's r-th and next singular value are closer than this, relatively,
# its leading space differs between machines.
_GAP = 1e-4
# Formats of trainers for image models, in which all layers store a weight as [out, in].
_ROWS_ARE_OUTPUTS = frozenset({"kohya", "flux", "diffusers", "cloneofsimo"})
# Findings of readers on such methods, which are no longer true of the effective update.
_LOW_RANK_PART = frozenset({"dora", "dora-columns", "kasa"})


def effective_update(update: Any, W: Any) -> Update:
    """Return the whole update of the weight, ``W' - W``, in the model with the adapter.

    DoRA (arXiv 2402.09353, eq. 5): ``W' = m·V/‖V‖``, row by row, with ``V = W + s·B·A``; the
    update is dense. If the magnitude is that of input columns (OneTrainer, LyCORIS
    without ``wd_on_out``), column by column, in a convolution channel by channel.
    KaSA (arXiv 2412.06071): ``s·B·diag·A`` minus the part of W along
    its r smallest singular directions, of rank 2r. Any other update is returned unchanged.

    Parameters
    ----------
    update
        As read, or anything that :func:`as_update` takes.
    W
        The base weight, shape ``(d_out, d_in)``, before training, or anything that
        :func:`as_weight` takes.

    Returns
    -------
    DenseUpdate or LowRankUpdate
        With the same name, label and shape.

    Raises
    ------
    ScaleError
        The scale is unknown.
    IncompatibleError
        W has a different shape.
    DegenerateSubspaceError
        A row or column of ``W + s·B·A`` is zero, or W's smallest directions are not defined.
    InputError
        The update is DoRA's but has no magnitude.

    Notes
    -----
    ``O(d_out·d_in·r)`` and one dense float64 matrix; KaSA takes the whole SVD of W.
    """
    part = as_update(update)
    if not isinstance(part, LowRankUpdate) or not part.variant:
        return part
    base = as_weight(W)
    weight = base.array() if isinstance(base, Weight) else base
    check_weight_shape(part, weight)
    if part.variant == "DoRA":
        return _dora_update(part, weight.astype(np.float64))
    if part.variant == "KaSA":
        return _kasa_update(part, weight.astype(np.float64))
    message = f"The effective update of '{part.name}' is not known for '{part.variant}'."
    raise UnsupportedMethodError(message)


def effective_adapter(adapter: Any, base: Any = None, *, transposed: bool | None = None) -> Adapter:
    """Return the adapter with every update replaced by its effective update.

    Parameters
    ----------
    adapter
        An adapter, or anything that :func:`as_adapter` takes.
    base
        The weights that training started from: from :func:`open_base`, or anything that it takes.
        None takes the frozen weights of ``adapter``, which must be a live model.
    transposed
        As in ``base.weight``. False by default for the formats of image models' trainers.

    Returns
    -------
    Adapter
        With the same modules; :func:`effective_update` is computed when a module is
        accessed, which may raise errors of the base's weights. Updates that are the whole change
        already are those of ``adapter``, without access to the base.

    Raises
    ------
    IncompatibleError
        The adapter stacks the factors of a different number of experts than the base has.
    """
    if base is None and not is_torch_module(adapter):
        message = "effective_adapter needs the base weights, unless the adapter is a live model."
        raise InputError(message)
    weights = as_base(adapter if base is None else base)
    parts = as_adapter(adapter)
    check_experts(parts, weights)
    weights = weights.matched_to([parts])
    source = parts.provenance
    transposed = stated_orientation(parts, transposed)
    findings = [finding for finding in source.findings if finding.code not in _LOW_RANK_PART]
    if len(findings) < len(source.findings):
        findings.append(Finding("whole-change", {"base": weights.address or weights.label}))
    effective = parts.copy_with(
        updates={name: partial(_load_effective, parts, name, weights, transposed) for name in parts}
    )
    return effective.with_provenance(
        findings=tuple(findings), also_read=(*source.also_read, *weights.inputs)
    )


def stated_orientation(adapter: Adapter, transposed: bool | None) -> bool | None:
    """Return how the base stores its weights: as asked for, else as the adapter's format implies.

    None if neither says; ``base.weight`` then decides.
    """
    if transposed is None and adapter.provenance.format in _ROWS_ARE_OUTPUTS:
        return False
    return transposed


def _load_effective(
    adapter: Adapter, name: str, base: BaseWeights, transposed: bool | None
) -> Update:
    update = adapter[name]
    if not isinstance(update, LowRankUpdate) or not update.variant:
        return update
    weight = base.weight(update.base_name or name, shape=update.shape, transposed=transposed)
    return effective_update(update, weight)


def initial_factors_from_base(
    base: BaseWeights, *, transposed: bool | None = None
) -> InitialFactorsSource:
    """Return a function that computes PiSSA's and OLoRA's initial factors from the base.

    For ``read_adapter(source, initial=initial_factors_from_base(base))``. PiSSA (arXiv
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
        Raises UnsupportedMethodError for a method whose initial factors are random or computed
        from data, and DegenerateSubspaceError if W's leading directions are not defined.

    Notes
    -----
    Computed in float64; PEFT used float32, so its residual weight differs by rounding. ``O(d³)``
    per module.
    """

    def initial_factors(request: InitialFactorsRequest) -> Factors:
        update, r = request.update, request.update.rank
        weight = base.weight(
            update.base_name or update.name, shape=update.shape, transposed=transposed
        )
        W = weight.array().astype(np.float64)
        if request.method == "pissa":
            U, S, Vh = np.linalg.svd(W, full_matrices=False)
            _check_gap(update, S, r)
            roots = np.sqrt(S[:r] / update.known_scale())
            return roots[:, None] * Vh[:r], U[:, :r] * roots
        if request.method == "olora" and not weight.transposed:
            Q, R = np.linalg.qr(W)
            return R[:r], Q[:, :r]
        reason = "its start is drawn at random or from data, or depends on how W is stored"
        message = (
            f"The initial factors of '{update.name}' cannot be computed from the base for "
            f"init_lora_weights '{request.method}': {reason}. Pass the adapter as saved before "
            "training."
        )
        raise UnsupportedMethodError(message)

    return initial_factors


def _dora_update(update: LowRankUpdate, W: NDArray[np.float64]) -> DenseUpdate:
    """Return the full change of a weight that DoRA rescales, ``m·V/‖V‖ − W``, V = W + s·B·A."""
    if update.magnitude is None:
        message = f"'{update.name}' is marked as DoRA, but has no magnitude."
        raise InputError(message)
    V = W + update.delta_weight()  # (d_out, d_in)
    by_rows = update.magnitude_side == "output"
    taps = 1 if by_rows else math.prod(update.kernel)
    vectors = V if by_rows else V.reshape(len(V), -1, taps)  # (d_out, channels, taps)
    norms = np.linalg.norm(vectors, axis=1) if by_rows else np.sqrt((vectors**2).sum(axis=(0, 2)))
    if not norms.all():
        axis = "rows" if by_rows else "input columns"
        message = f"'{update.name}': {np.count_nonzero(norms == 0)} {axis} of W + s·B·A are zero."
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


def _kasa_update(update: LowRankUpdate, W: NDArray[np.float64]) -> LowRankUpdate:
    """Return the update together with the removal of W's r smallest singular components."""
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    first = len(S) - update.rank  # of the directions that are removed
    if first < 1:
        message = f"'{update.name}': rank {update.rank} leaves nothing of a weight {W.shape}."
        raise IncompatibleError(message)
    _check_gap(update, S, first)
    scale = update.known_scale()
    return replace(
        update,
        A=np.vstack([update.A, Vh[first:]]),
        B=np.hstack([update.B, U[:, first:] * (-S[first:] / scale)]),
        alpha=None,
        variant="",
    )


def _check_gap(update: LowRankUpdate, S: NDArray[np.float64], k: int) -> None:
    """Raise if the first k singular directions are not separated from those that follow."""
    following = S[k] if k < len(S) else 0.0
    if S[k - 1] - following <= _GAP * S[k - 1]:
        message = (
            f"The first {k} singular directions of the weight of '{update.name}' are not defined: "
            f"sigma_{k} is {S[k - 1]:.6g}, the next {following:.6g}. Pass the adapter as saved "
            "before training."
        )
        raise DegenerateSubspaceError(message)
