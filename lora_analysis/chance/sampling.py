"""Exact draws of the null distributions, without drawing whole frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

# Elements of one batch of draws.
_BATCH = 1 << 21


def similarity_draws(
    dimension: int, i: int, j: int, draws: int, *, seed: int = 0
) -> NDArray[np.float64]:
    """Return ``(draws,)`` exact samples of φ(i, j) of random subspaces, without any subspace.

    min(i, j)·φ is Pillai's trace of a matrix-variate Beta distribution, whose tridiagonal model
    (Edelman & Sutton 2008) needs 2·min(i, j) − 1 scalar Beta variables per draw.
    """
    rng = np.random.default_rng(seed)
    least = max(0, i + j - dimension)  # dimension of the intersection of any two such subspaces
    rows, columns = (dimension - i, dimension - j) if least else (i, j)
    p, q = sorted((rows, columns))
    if p == 0:
        return np.ones(draws)
    a, b = q - p, dimension - p - q
    k = np.arange(1, p + 1)
    c = rng.beta((a + k) / 2, (b + k) / 2, (draws, p))
    e = rng.beta(k[:-1] / 2, (a + b + 1 + k[:-1]) / 2, (draws, p - 1))
    trace = c[:, -1] + np.sum(c[:, :-1] * (1 - e) + (1 - c[:, 1:]) * e, axis=1)
    values: NDArray[np.float64] = (trace + least) / min(i, j)
    return values


def _grams(
    rng: np.random.Generator, dimension: int, rows: int, columns: int, draws: int
) -> NDArray[np.float64]:
    """Return ``(draws, rows, columns)``: products UᵀV of independent uniform frames.

    With U fixed to the first axes they are the upper rows of V = Z·R⁻¹, Z Gaussian and RᵀR = ZᵀZ.
    The rows below enter through their Gram matrix alone, which has Bartlett's triangular root.
    """
    upper = rng.standard_normal((draws, rows, columns))
    rest = dimension - rows
    if rest >= columns:
        root = np.tril(rng.standard_normal((draws, columns, columns)), -1)
        diagonal = np.arange(columns)
        root[:, diagonal, diagonal] = np.sqrt(rng.chisquare(rest - diagonal, (draws, columns)))
        lower = root.transpose(0, 2, 1)
    else:
        lower = rng.standard_normal((draws, rest, columns))
    q, r = np.linalg.qr(np.concatenate([upper, lower], axis=1))
    signs = np.where(np.diagonal(r, axis1=1, axis2=2) < 0, -1.0, 1.0)
    grams: NDArray[np.float64] = q[:, :rows] * signs[:, None, :]
    return grams


def _batches(draws: int, elements: int) -> Iterator[int]:
    size = max(1, _BATCH // elements)
    for start in range(0, draws, size):
        yield min(size, draws - start)


def _energies(singular_values: ArrayLike) -> NDArray[np.float64]:
    """Return σ² scaled to Σσ² = 1, without the zeros that may fill up."""
    s = np.abs(np.asarray(singular_values, dtype=np.float64))
    energy: NDArray[np.float64] = np.square(s[s > 0] / s.max())
    energy /= energy.sum()
    return energy


def energy_overlap_draws(
    dimension: int, singular_values: Sequence[ArrayLike], draws: int, *, seed: int = 0
) -> NDArray[np.float64]:
    """Return ``(draws,)`` exact samples of ω for two given spectra in random directions.

    With `monte_carlo_p_value` a p-value that no approximation touches. O(draws·(d₁ + r)·r²) for
    ranks r; ``dimension`` does not matter.
    """
    rng = np.random.default_rng(seed)
    energies_a, energies_b = (e / np.linalg.norm(e) for e in map(_energies, singular_values))
    samples = [
        np.einsum("a,nab,b->n", energies_a, np.square(gram), energies_b, optimize=True)
        for count in _batches(draws, (energies_a.size + energies_b.size) * energies_b.size)
        for gram in [_grams(rng, dimension, energies_a.size, energies_b.size, count)]
    ]
    return np.concatenate(samples)


def signed_cosine_draws(
    shape: tuple[int, int], singular_values: Sequence[ArrayLike], draws: int, *, seed: int = 0
) -> NDArray[np.float64]:
    """Return ``(draws,)`` exact samples of the signed cosine for two given spectra."""
    rng = np.random.default_rng(seed)
    sigma_a, sigma_b = (np.sqrt(_energies(values)) for values in singular_values)
    samples = []
    for count in _batches(draws, (sigma_a.size + sigma_b.size) * sigma_b.size):
        left, right = (_grams(rng, d, sigma_a.size, sigma_b.size, count) for d in shape)
        samples.append(np.einsum("a,nab,b->n", sigma_a, left * right, sigma_b, optimize=True))
    return np.concatenate(samples)


def enrichment_draws(
    singular_values: ArrayLike, shape: tuple[int, int], k: int, draws: int, *, seed: int = 0
) -> NDArray[np.float64]:
    """Return ``(draws,)`` exact samples of the enrichment of k random directions on both sides.

    ``‖UᵀWV‖_F·√(d_out·d_in)/(k·‖W‖_F)`` for W with these singular values, all of them.
    O(draws·n·k·(k + 1)) for n values.
    """
    rng = np.random.default_rng(seed)
    values = np.sqrt(_energies(singular_values))
    samples = []
    for count in _batches(draws, (values.size + k) * k):
        left, right = (_grams(rng, d, values.size, k, count) for d in shape)
        core = np.swapaxes(left, 1, 2) @ (values[:, None] * right)
        samples.append(np.sqrt(np.sum(core**2, axis=(1, 2))))
    chance = float(np.sqrt(float(shape[0]) * shape[1]))
    draws_over_chance: NDArray[np.float64] = np.concatenate(samples) * (chance / k)
    return draws_over_chance
