"""ΔW against W: how strongly the update's directions are already present in the weight."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis import chance, linalg
from lora_analysis.adapter import DenseUpdate
from lora_analysis.amplify.controls import Controls
from lora_analysis.amplify.results import Amplification, RandomDirections
from lora_analysis.amplify.streaming import (
    Frames,
    Precision,
    Projection,
    precision_for,
    project,
)
from lora_analysis.bases import as_weight
from lora_analysis.errors import (
    BaseWeightError,
    DegenerateSubspaceError,
    IncompatibleError,
    InputError,
    ScaleError,
)
from lora_analysis.formats import as_update
from lora_analysis.spectra import Spectrum, leading_spectrum, spectrum

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Update
    from lora_analysis.bases import Weight
    from lora_analysis.bases.sanity_checks import WeightStatistics

# Float32 products err by 2e-7 to 4e-7 of what unaligned directions give. Where W is this much
# weaker along ΔW's directions, that may be 1e-6: those directions are taken again in float64.
_WEAK = 0.3


def _check(update: Spectrum, weight: Weight | NDArray[np.floating]) -> None:
    if update.in_units_of_scale:
        message = (
            f"The amplification of '{update.name}' in {update.label or 'this adapter'} needs "
            "its scale, which is not known. Pass scale= or alpha= when reading the adapter."
        )
        raise ScaleError(message)
    _check_directions(update, weight)


def _check_directions(update: Spectrum, weight: Weight | NDArray[np.floating]) -> None:
    """Raise if the update has no directions, or not those of this weight."""
    if update.shape != weight.shape:
        message = (
            f"'{update.name}' in {update.label or 'this adapter'} updates a weight of shape "
            f"{update.shape}, but '{getattr(weight, 'name', 'the weight')}' is {weight.shape} as "
            "(d_out, d_in). Is it another base model, or stored transposed?"
        )
        raise IncompatibleError(message)
    if update.untrained:
        message = (
            f"'{update.name}' in {update.label or 'this adapter'} is untrained: ΔW is zero and "
            "has no directions, so it cannot be compared with the weight."
        )
        raise DegenerateSubspaceError(message)


def amplification(
    update: Any,
    W: Any,
    *,
    k: int | None = None,
    draws: int = 16,
    seed: int = 0,
    weight_values: NDArray[np.float64] | None = None,
    weight_directions: bool = True,
    one_sided: bool = False,
    unrelated: Sequence[Any] = (),
    through_weight: int = 0,
) -> Amplification:
    """Measure how ΔW amplifies W, for every number of directions up to ``k``.

    ``AF_k = √Σ_{i≤k}σ_i(ΔW)² / ‖U_kᵀWV_k‖_F`` with ΔW's own top-k singular directions (LoRA,
    arXiv 2106.09685, section 7.3 and Table 7), next to the same for W's own and for random
    directions. The factor alone proves nothing: ``chance_factor`` is what random directions of
    the same size score, and ``enrichment`` the ratio of the two.

    Parameters
    ----------
    update
        An update with a known scale, in any form that :func:`as_update` takes, or its spectrum.
    W
        The frozen weight as ``(d_out, d_in)``, in any form that :func:`as_weight` takes: an array,
        a tensor, a layer, a weight of :func:`open_base`.
    k
        How many directions at most; the numerical rank by default.
    draws, seed
        Random directions drawn for mean and spread; their root mean square is exact without.
    weight_values
        W's leading singular values, descending, where they are known already.
    weight_directions
        Whether to find them otherwise, by an iteration of some seconds for 4096 × 4096.
    one_sided
        Whether to give ``output_enrichment`` too, which doubles the products.
    unrelated
        Unrelated updates of the same module, with which ``crossed`` is computed: U of one update
        with V of the other.
    through_weight
        Draws of random directions through W for ``enrichment_through_weight``; they need a second
        pass over W. None by default.

    Raises
    ------
    IncompatibleError
        The shapes of ΔW and W differ.
    ScaleError
        The scale of the update is not known.
    BaseWeightError
        W holds values that are not finite.
    DegenerateSubspaceError
        The update is untrained, or k exceeds its numerical rank.

    Notes
    -----
    One pass over W in blocks serves every k and all draws; O(d_out·d_in·n·(1 + draws)). For the
    precision of its products see `streaming.precision_for`.
    """
    return amplifications(
        [update],
        W,
        k=k,
        draws=draws,
        seed=seed,
        weight_values=weight_values,
        weight_directions=weight_directions,
        one_sided=one_sided,
        partners=unrelated,
        unrelated=[(0, i) for i in range(1, len(unrelated) + 1)],
        through_weight=through_weight,
    )[0]


def amplifications(
    updates: Sequence[Any],
    W: Any,
    *,
    k: int | None = None,
    draws: int = 16,
    seed: int = 0,
    weight_values: NDArray[np.float64] | None = None,
    weight_directions: bool = True,
    one_sided: bool = False,
    partners: Sequence[Any] = (),
    unrelated: Collection[tuple[int, int]] = (),
    through_weight: int = 0,
) -> list[Amplification]:
    """Measure how each of several updates of one weight amplifies it, in one pass over W.

    Parameters, errors and numbers are those of `amplification`; the random draws are the same for
    all updates. Two parameters differ:

    Parameters
    ----------
    updates, W, k, draws, seed, weight_values, weight_directions, one_sided, through_weight
        See `amplification`.
    partners
        Further updates of this weight for crossed values only, trained, of any scale.
    unrelated
        Pairs of positions in ``(*updates, *partners)`` whose directions are crossed.

    Notes
    -----
    Crossed values come from one product ``(U_1 … U_N)ᵀ·W·(V_1 … V_N)``, which is summed over the
    tiles of the same pass: O(d_out·(Σr)²) on top. The products take at most 52 MB; of more updates
    of a high rank only the leading directions of each are crossed
    (`controls.MOST_CROSSED_COLUMNS`).
    """
    W = as_weight(W)
    spectra = [_checked_spectrum(update, W, k) for update in updates]
    counts = [k or spectral.numerical_rank for spectral in spectra]
    most = max(counts, default=0)
    if weight_values is not None:
        _check_weight_values(weight_values, most)
    others = [_spectral(update, k) for update in partners]
    for spectral in others:
        _check_directions(spectral, W)
    update_frames = [_frame(*pair) for pair in zip(spectra, counts, strict=True)]
    # Crossed frames first: their products are taken from the first images.
    frames = [*update_frames, *(_frame(s, k or s.numerical_rank) for s in others)]
    precision = precision_for(W)
    controls = Controls(
        W.shape,
        frames,
        labels=[spectral.label for spectral in (*spectra, *others)],
        pairs=unrelated,
        columns=most,
        draws=through_weight,
        seed=seed,
        precision=precision,
    )
    projections, weight_norm, statistics = project(
        W,
        [*frames, *_random_frames(W.shape, most, draws, seed)],
        precision=precision,
        one_sided=one_sided,
        sums=controls.sums,
    )
    _check_norm(weight_norm, spectra)
    random = [_leading_norms(projection.core) for projection in projections[len(frames) :]]
    norms = np.array(random).reshape(draws, most)
    precisions = [precision] * len(update_frames)
    if precision == "float32":
        _sharpen(W, update_frames, projections, precisions)
    if weight_values is None and weight_directions and most:
        dense = W if isinstance(W, np.ndarray) else W.array()
        weight_values = linalg.leading_singular_values(dense, most)
    weight_facts = weight_norm, norms, weight_values
    results = [
        _amplification(spectral, _norm(update, spectral), projection, weight_facts, precision_used)
        for update, spectral, projection, precision_used in zip(
            updates, spectra, projections, precisions, strict=False
        )
    ]
    results = controls.add_to(results, W, weight_norm)
    return results if isinstance(W, np.ndarray) else _add_storage(results, W, statistics)


def _add_storage(
    results: Sequence[Amplification], W: Weight, statistics: WeightStatistics | None
) -> list[Amplification]:
    """Add how the weight is stored, and how far its rounding may change the numbers."""
    noise = W.noise() if W.storage else None
    return [
        replace(result, storage=W.storage, noise=noise, weight_statistics=statistics)
        for result in results
    ]


def _checked_spectrum(
    update: Update | Spectrum, W: Weight | NDArray[np.floating], k: int | None
) -> Spectrum:
    """Return the spectrum of an update whose amplification can be measured in k directions."""
    spectral = _spectral(update, k)
    _check(spectral, W)
    if k is not None:
        spectral.basis("input", k)  # raises beyond the numerical rank and between equal values
    return spectral


def _frame(spectral: Spectrum, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the first n left and right singular vectors."""
    return spectral.vectors("output")[:, :n], spectral.vectors("input")[:, :n]


def _random_frames(
    shape: tuple[int, int], columns: int, draws: int, seed: int
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return random orthonormal directions of both sides, one pair per draw."""
    rng = np.random.default_rng(seed)
    return [
        (linalg.haar_frame(rng, shape[0], columns), linalg.haar_frame(rng, shape[1], columns))
        for _ in range(draws)
    ]


def _check_weight_values(weight_values: NDArray[np.float64], count: int) -> None:
    if len(weight_values) < count:
        message = f"weight_values must hold at least {count} values, found {len(weight_values)}."
        raise InputError(message)


def _check_norm(weight_norm: float, spectra: Sequence[Spectrum]) -> None:
    """Raise if the weight holds values that are not finite: its norm shows it."""
    if not np.isfinite(weight_norm):
        message = (
            f"The base weight of '{spectra[0].name}' holds values that are not finite. "
            "No number can be computed against it; is the file damaged?"
        )
        raise BaseWeightError(message)


def _spectral(update: Update | Spectrum, k: int | None) -> Spectrum:
    """Return the spectrum; of a dense update the leading part alone, where that is enough."""
    if not isinstance(update, Spectrum):
        update = as_update(update)
    if isinstance(update, DenseUpdate) and k is not None:
        return leading_spectrum(update, k + 1)  # the next one tells whether the k-th is defined
    return spectrum(update)


def _norm(update: Update | Spectrum, spectral: Spectrum) -> float:
    """Return ‖ΔW‖_F: all of it, where the spectrum may hold the leading part alone."""
    if isinstance(update, DenseUpdate):
        return float(np.linalg.norm(update.delta.astype(np.float64)))
    return spectral.norm


def _sharpen(
    W: Weight | NDArray[np.floating],
    update_frames: Frames,
    projections: list[Projection],
    precisions: list[Precision],
) -> None:
    """Take the leading directions again in float64, up to the last k where W is weak."""
    again: dict[int, int] = {}  # index → the largest k for which W is weak along the top k
    for index, projection in enumerate(projections[: len(update_frames)]):
        unaligned = np.sqrt(np.arange(1, len(projection.core) + 1) / W.shape[0])
        unaligned *= np.sqrt(np.cumsum(projection.input_squares))
        weak = np.flatnonzero(_leading_norms(projection.core) < _WEAK * unaligned)
        if weak.size:
            again[index] = int(weak[-1]) + 1
    if not again:
        return
    frames = [
        (update_frames[index][0][:, :k], update_frames[index][1][:, :k])
        for index, k in again.items()
    ]
    exact, _, _ = project(W, frames, precision="float64", norm=False)
    for (index, k), projection in zip(again.items(), exact, strict=True):
        projections[index].core[:k, :k] = projection.core
        if k == len(projections[index].core):
            precisions[index] = "float64"


def _leading_norms(core: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ‖core[:k, :k]‖_F for every k: each k is a leading block of one core."""
    return np.sqrt(np.diagonal(linalg.cumulative_overlap(core)))


def _amplification(
    spectral: Spectrum,
    update_norm: float,
    projection: Projection,
    weight: tuple[float, NDArray[np.float64], NDArray[np.float64] | None],
    precision: Precision,
) -> Amplification:
    weight_norm, draws, weight_values = weight
    n = len(projection.core)
    k = np.arange(1, n + 1)
    d_out, d_in = spectral.shape
    norms = draws[:, :n]
    delta = np.sqrt(np.cumsum(spectral.S[:n] ** 2))
    projected = _leading_norms(projection.core)
    rms = chance.projected_norm_rms(weight_norm, spectral.shape, k)
    drawn = norms if len(norms) else np.full((1, n), np.nan)
    outputs = projection.output_squares
    with np.errstate(divide="ignore", invalid="ignore"):  # W may vanish on these directions
        return Amplification(
            module=spectral.name,
            label=spectral.label,
            core=projection.core,
            S=spectral.S[:n],
            weight_norm=weight_norm,
            relative_norm=update_norm / weight_norm if weight_norm else float("inf"),
            projected=projected,
            weight_top=None
            if weight_values is None
            else np.sqrt(np.cumsum(weight_values[:n] ** 2)),
            random=RandomDirections(drawn.mean(axis=0), drawn.std(axis=0), rms, len(norms), norms),
            amplification_factor=delta / projected,
            chance_factor=delta / rms,
            enrichment=projected / rms,
            input_enrichment=_one_sided(projection.input_squares, weight_norm, k / d_in),
            output_enrichment=outputs
            if outputs is None
            else _one_sided(outputs, weight_norm, k / d_out),
            precision=precision,
        )


def _one_sided(
    squares: NDArray[np.float64], weight_norm: float, share: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the norm along k directions over the root mean square of random ones, for all k."""
    return np.asarray(np.sqrt(np.cumsum(squares)) / (weight_norm * np.sqrt(share)))
