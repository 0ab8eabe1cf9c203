"""ΔW against W: how strongly the update's directions are already present in the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import chance, linalg
from lora_analysis.errors import (
    BaseWeightError,
    DegenerateSubspaceError,
    IncompatibleError,
    InputError,
    ScaleError,
)
from lora_analysis.spectra import Spectrum, spectrum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from lora_analysis.adapter import Update
    from lora_analysis.bases import Weight

# Elements of a dense weight turned to float64 at a time.
_TILE = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class RandomDirections:
    """‖UᵀWV‖_F over seeded draws of uniform directions, for every k.

    Attributes
    ----------
    mean, spread
        ``(n,)``: mean and standard deviation over the draws; NaN without draws.
    rms
        ``(n,)``: the exact root mean square, ``‖W‖_F·k/√(d_out·d_in)``.
    draws
        How many draws.
    """

    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    rms: NDArray[np.float64]
    draws: int


@dataclass(frozen=True, slots=True, eq=False)
class Amplification:
    """One update held against its frozen weight, for every k up to n = its numerical rank.

    Every array over k has shape ``(n,)``; entry ``k-1`` uses the top-k singular directions of
    ΔW. The last entry is the LoRA paper's number.

    Attributes
    ----------
    core
        ``UᵀWV``, ``(n, n)``.
    S
        Singular values of ΔW, ``(n,)``.
    weight_norm, relative_norm
        ‖W‖_F and ‖ΔW‖_F/‖W‖_F.
    projected
        ‖U_kᵀWV_k‖_F: W seen through ΔW's own directions.
    weight_top
        √Σ_{i≤k}σ_i(W)²: W through its own top-k directions; None if not asked for.
    random
        W through random directions.
    amplification_factor
        ``√Σ_{i≤k}σ_i(ΔW)² / projected_k``.
    chance_factor
        The same with the random root mean square below: what random directions would score.
    enrichment
        ``projected_k / random rms``; its square has mean 1 for random directions. The part of
        the amplification factor that is not merely the size of ΔW.
    """

    module: str
    label: str
    core: NDArray[np.float64]
    S: NDArray[np.float64]
    weight_norm: float
    relative_norm: float
    projected: NDArray[np.float64]
    weight_top: NDArray[np.float64] | None
    random: RandomDirections
    amplification_factor: NDArray[np.float64]
    chance_factor: NDArray[np.float64]
    enrichment: NDArray[np.float64]

    @property
    def k(self) -> NDArray[np.intp]:
        """1…n, the number of directions behind each entry."""
        return np.arange(1, len(self.S) + 1)


def _tiles(
    W: Weight | NDArray[np.floating],
) -> Iterator[tuple[slice, slice, NDArray[np.floating]]]:
    """Yield row slice, column slice and tile; an array keeps its own precision."""
    if not isinstance(W, np.ndarray):
        yield from W.blocks()
        return
    rows = max(1, _TILE // W.shape[1])
    for start in range(0, W.shape[0], rows):
        yield slice(start, start + rows), slice(None), W[start : start + rows]


def _check(update: Spectrum, weight: Weight | NDArray[np.floating]) -> None:
    if update.in_units_of_scale:
        message = (
            f"The amplification of '{update.name}' in {update.label or 'this adapter'} needs "
            "its scale, which is not known. Pass scale= or alpha= when reading the adapter."
        )
        raise ScaleError(message)
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
            "has no directions to hold against the weight."
        )
        raise DegenerateSubspaceError(message)


def _project(
    weight: Weight | NDArray[np.floating],
    pairs: list[tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> tuple[list[NDArray[np.float64]], float]:
    """Return ``UᵀWV`` for every pair (U, V), and ‖W‖_F, in one pass over the tiles of W.

    The products are in float64: W's values are exact in it, and a float32 sum over a wide row
    would lose the small projections that the amplification factor divides by.
    """
    cores = [np.zeros((u.shape[1], v.shape[1])) for u, v in pairs]
    square = 0.0
    for rows, columns, tile in _tiles(weight):
        block = tile.astype(np.float64)
        square += float(np.vdot(block, block))
        for at, (u, v) in enumerate(pairs):
            cores[at] += u[rows].T @ (block @ v[columns])
    return cores, float(np.sqrt(square))


def _leading_norms(core: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ‖core[:k, :k]‖_F for every k: each k is a leading block of one core."""
    return np.sqrt(np.diagonal(linalg.cumulative_overlap(core)))


def amplification(
    update: Update | Spectrum,
    W: Weight | NDArray[np.floating],
    *,
    k: int | None = None,
    draws: int = 16,
    seed: int = 0,
    weight_values: NDArray[np.float64] | None = None,
    weight_directions: bool = True,
) -> Amplification:
    """Return how ΔW amplifies W, for every number of directions up to ``k``.

    ``AF_k = √Σ_{i≤k}σ_i(ΔW)² / ‖U_kᵀWV_k‖_F`` with ΔW's own top-k singular directions (LoRA,
    arXiv 2106.09685, section 7.3 and Table 7), beside the same for W's own and for random
    directions. The factor alone proves nothing: ``chance_factor`` is what random directions of
    the same size score, and ``enrichment`` the ratio of the two.

    Parameters
    ----------
    update
        An update with a known scale, or its spectrum.
    W
        The frozen weight as ``(d_out, d_in)``: a tensor from `open_base`, or an array.
    k
        How many directions at most; the numerical rank by default.
    draws, seed
        Random directions drawn for mean and spread; their root mean square is exact without.
    weight_values
        W's leading singular values, descending, where they are known already.
    weight_directions
        Whether to find them otherwise, which costs an SVD of W.

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
    One pass over W in blocks serves every k and all draws; O(d_out·d_in·n·(1 + draws)).
    """
    spectral = spectrum(update)
    _check(spectral, W)
    n = spectral.numerical_rank if k is None else k
    if k is not None:
        spectral.basis("input", k)  # raises beyond the numerical rank and between equal values
    rng = np.random.default_rng(seed)
    d_out, d_in = spectral.shape
    frames = [
        (linalg.haar_frame(rng, d_out, n), linalg.haar_frame(rng, d_in, n)) for _ in range(draws)
    ]
    own = (spectral.vectors("output")[:, :n], spectral.vectors("input")[:, :n])
    (core, *random_cores), weight_norm = _project(W, [own, *frames])
    if not np.isfinite(weight_norm):
        message = (
            f"The base weight of '{spectral.name}' holds values that are not finite. "
            "No number can be computed against it; is the file damaged?"
        )
        raise BaseWeightError(message)
    if weight_values is not None and len(weight_values) < n:
        message = f"weight_values must hold at least {n} values, found {len(weight_values)}."
        raise InputError(message)
    s = spectral.S[:n]
    update_norm = np.sqrt(np.cumsum(s**2))
    projected = _leading_norms(core)
    rms = chance.projected_norm_rms(weight_norm, spectral.shape, np.arange(1, n + 1))
    norms = (
        np.array([_leading_norms(c) for c in random_cores]) if draws else np.full((1, n), np.nan)
    )
    if weight_values is None and weight_directions:
        dense = W if isinstance(W, np.ndarray) else W.array()
        weight_values = linalg.leading_singular_values(dense, n)
    with np.errstate(divide="ignore", invalid="ignore"):  # W may vanish on these directions
        factor, chance_factor, enrichment = (
            update_norm / projected,
            update_norm / rms,
            projected / rms,
        )
    return Amplification(
        module=spectral.name,
        label=spectral.label,
        core=core,
        S=s,
        weight_norm=weight_norm,
        relative_norm=float(spectral.norm / weight_norm) if weight_norm else float("inf"),
        projected=projected,
        weight_top=None if weight_values is None else np.sqrt(np.cumsum(weight_values[:n] ** 2)),
        random=RandomDirections(norms.mean(axis=0), norms.std(axis=0), rms, draws),
        amplification_factor=factor,
        chance_factor=chance_factor,
        enrichment=enrichment,
    )
