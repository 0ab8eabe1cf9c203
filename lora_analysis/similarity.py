"""Similarity of two updates of one module: φ, principal angles, ω, signed cosine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, overload

import numpy as np

from lora_analysis import chance, linalg
from lora_analysis.adapter import DenseUpdate
from lora_analysis.errors import DegenerateSubspaceError, IncompatibleError, InputError
from lora_analysis.formats import as_update, map_modules
from lora_analysis.results import frame, heat_map
from lora_analysis.spectra import (
    SIDES,
    Side,
    Spectrum,
    VectorsOf,
    check_side,
    default_side,
    leading_spectrum,
    spectrum,
)
from lora_analysis.text import html_table

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from lora_analysis.adapter import Update

# Directions of a full fine-tune that are compared with those of another one.
FINE_TUNE_DIRECTIONS: Final = 16


class Degeneracy(NamedTuple):
    """For each i of one axis of a grid: what is wrong with the top-i subspace."""

    degenerate: NDArray[np.bool_]
    nearly_degenerate: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class SimilarityGrid:
    """Subspace similarity φ(i, j) of two updates of one module, with its the random baseline.

    Attributes
    ----------
    values
        ``(k₁, k₂)``, each axis ending at its numerical rank; ``values[i-1, j-1]`` is φ(i, j): 0
        for orthogonal subspaces, 1 if the smaller is contained in the larger.
    chance
        ``(k₁, k₂)``, mean of φ for independent uniform subspaces, max(i, j)/dimension.
    dimension
        Of the space the directions live in: d_in or d_out.
    rows_degeneracy, columns_degeneracy
        If a top-i subspace is undefined or soft because singular values (nearly) coincide.
    """

    values: NDArray[np.float64]
    chance: NDArray[np.float64]
    dimension: int
    module: str
    side: Side
    of: VectorsOf
    labels: tuple[str, str]
    rows_degeneracy: Degeneracy
    columns_degeneracy: Degeneracy

    def __post_init__(self) -> None:
        self.values.flags.writeable = False
        self.chance.flags.writeable = False

    @property
    def excess(self) -> NDArray[np.float64]:
        """``(φ − chance)/(1 − chance)``, the form to average over modules."""
        return chance.excess(self.values, self.chance)

    @property
    def p_value(self) -> NDArray[np.float64]:
        """``(k₁, k₂)``: P(φ_null ≥ φ), one-sided, for independent uniform subspaces.

        It measures the distance from the random baseline only: unrelated adapters of one base
        differ from that too. See `chance.similarity_p_value` for the distribution.
        """
        i, j = np.indices(self.values.shape) + 1
        return chance.similarity_p_value(self.dimension, i, j, self.values)

    @property
    def null_method(self) -> NDArray[np.str_]:
        """``(k₁, k₂)``: how each p-value was found: "exact", "matched beta" or "sampled"."""
        i, j = np.indices(self.values.shape) + 1
        return chance.similarity_null_method(self.dimension, i, j)

    def at(self, i: int, j: int) -> float:
        """Return φ(i, j), counting from 1 as the paper does.

        Raises
        ------
        DegenerateSubspaceError
            i or j lies beyond the numerical rank.
        """
        if not (1 <= i <= self.values.shape[0] and 1 <= j <= self.values.shape[1]):
            message = (
                f"φ({i}, {j}) of '{self.module}' is undefined: the numerical ranks of "
                f"{self.labels[0]} and {self.labels[1]} are {self.values.shape}."
            )
            raise DegenerateSubspaceError(message)
        return float(self.values[i - 1, j - 1])

    def __repr__(self) -> str:
        rows, columns = self.values.shape
        corner = f", φ(1, 1) = {self.values[0, 0]:.3g}" if self.values.size else ""
        return (
            f"<SimilarityGrid of {self.labels[0]!r} and {self.labels[1]!r}, {self.module!r}, "
            f"{self.side} side: {rows} × {columns}{corner}, d = {self.dimension}>"
        )

    def summary(self) -> dict[str, float]:
        """Return φ at the corners, and the random baseline there, for tables over modules."""
        if not self.values.size:
            return {"φ(1, 1)": np.nan}
        rows, columns = self.values.shape
        return {
            "i": rows,
            "j": columns,
            "φ(1, 1)": float(self.values[0, 0]),
            "φ(i, j)": float(self.values[-1, -1]),
            "random φ(i, j)": float(self.chance[-1, -1]),
        }

    def to_frame(self) -> pd.DataFrame:
        """Return one row per pair (i, j), with the random baseline and the excess over it."""
        indices = np.indices(self.values.shape) + 1
        columns = (*indices, self.values, self.chance, self.excess)
        names = ("i", "j", "phi", "chance", "excess")
        rows = zip(*(values.ravel() for values in columns), strict=True)
        return frame([dict(zip(names, row, strict=True)) for row in rows], names)

    def _repr_html_(self) -> str:
        rows, columns = self.values.shape
        cells = dict.fromkeys(((1, 1), (1, columns), (rows, columns)) if rows and columns else ())
        title = f"φ(i, j) of {self.labels[0]} and {self.labels[1]}, {self.module}, {self.side} side"
        note = f"{rows} × {columns} cells; d = {self.dimension}. Unrelated adapters exceed random."
        cell_rows = ((i, j, self.values[i - 1, j - 1], self.chance[i - 1, j - 1]) for i, j in cells)
        table = html_table(title, ("i", "j", "φ", "random"), cell_rows, note)
        return table + heat_map(self.values, self.labels)

    def degeneracy(self, i: int, j: int) -> str:
        """Return ``"degenerate"``, ``"nearly degenerate"`` or ``""`` for φ(i, j)."""
        axes = ((self.rows_degeneracy, i - 1), (self.columns_degeneracy, j - 1))
        if any(axis.degenerate[index] for axis, index in axes):
            return "degenerate"
        return (
            "nearly degenerate"
            if any(axis.nearly_degenerate[index] for axis, index in axes)
            else ""
        )


def _check_same_space(a: Spectrum, b: Spectrum, side: Side) -> int:
    axis = 1 if side == "input" else 0
    if a.shape[axis] != b.shape[axis]:
        message = (
            f"Cannot compare the {side} side of '{a.name}': {a.label or 'the first'} has "
            f"{a.shape[axis]} features, {b.label or 'the second'} has {b.shape[axis]}. "
            "Both must adapt the same base model."
        )
        raise IncompatibleError(message)
    return a.shape[axis]


def compared_directions(a: Update, b: Update) -> int | None:
    """Return how many directions a full fine-tune is compared in: those of the low-rank update.

    All directions of a dense update span the whole space, whatever was learned. None for two
    low-rank updates, of which all directions are compared; for two dense ones
    `FINE_TUNE_DIRECTIONS`.
    """
    ranks = [update.rank for update in (a, b) if not isinstance(update, DenseUpdate)]
    if len(ranks) == 2:
        return None
    return ranks[0] if ranks else min(FINE_TUNE_DIRECTIONS, *a.shape)


@overload
def subspace_similarity(
    a: Update | Spectrum,
    b: Update | Spectrum,
    *,
    side: Side | None = None,
    of: VectorsOf = "delta",
    k: int | None = None,
) -> SimilarityGrid: ...
@overload
def subspace_similarity(
    a: Any, b: Any, *, side: Side | None = None, of: VectorsOf = "delta", k: int | None = None
) -> Any: ...
def subspace_similarity(
    a: Any, b: Any, *, side: Side | None = None, of: VectorsOf = "delta", k: int | None = None
) -> Any:
    """Return φ(i, j) for all i, j up to the numerical ranks, with the random baseline next to it.

    ``φ(i, j) = ‖U₁[:, :i]ᵀ U₂[:, :j]‖_F² / min(i, j)`` over singular vectors, strongest first
    (LoRA, arXiv 2106.09685, section 7.2): 1 if the smaller subspace is contained in the larger,
    0 if they are orthogonal, max(i, j)/d on average for random ones.

    Parameters
    ----------
    a, b
        Updates of the same module in any form that :func:`as_update` takes, or their spectra (to
        factor each only once); or two adapters in any form that :func:`as_adapter` takes.
    side
        ``"output"``: left singular vectors, in R^d_out; ``"input"``: right ones, in R^d_in. By
        default output, for ``of="A"`` input, the only side of A.
    of
        Whose singular vectors, see `spectrum`; ``"A"`` is the paper's choice.
    k
        Leading directions of each at most; of a large dense update no others are computed. All by
        default.

    Returns
    -------
    SimilarityGrid
        Empty along an axis whose update is untrained. For two adapters a mapping of module names to
        grids.

    Raises
    ------
    IncompatibleError
        The dimensions of the chosen side differ.
    InputError
        ``of`` has no such side.

    Examples
    --------
    >>> import numpy as np
    >>> from lora_analysis import LowRankUpdate
    >>> one = LowRankUpdate(name="q", A=np.eye(1, 4), B=np.eye(3, 1), scale=1.0)
    >>> two = LowRankUpdate(name="q", A=np.eye(2, 4), B=np.diag([2.0, 1, 0])[:, :2], scale=1.0)
    >>> subspace_similarity(one, two).values
    array([[1., 1.]])
    """
    side = default_side(of) if side is None else side
    check_side(side, of)
    if modules := map_modules(subspace_similarity, a, b, side=side, of=of, k=k):
        return modules
    if k is not None and k < 1:
        message = f"A subspace needs k >= 1 directions, got k = {k}."
        raise InputError(message)
    spectra: list[Spectrum] = []
    for given in (a, b):
        update = given if k is None or isinstance(given, Spectrum) else as_update(given)
        if k and isinstance(update, DenseUpdate) and of == "delta" and update.delta.any():
            spectra.append(leading_spectrum(update, k + 1))  # and the gap to the next one
        else:
            spectra.append(spectrum(update, of=of))
    first, second = spectra
    dimension = _check_same_space(first, second, side)
    gram = first.vectors(side)[:, :k].T @ second.vectors(side)[:, :k]  # (k₁, k₂)
    return SimilarityGrid(
        values=linalg.overlap_grid(gram),
        chance=chance.similarity_grid_mean(dimension, *gram.shape),
        dimension=dimension,
        module=first.name,
        side=side,
        of=of,
        labels=(first.label or "first", second.label or "second"),
        rows_degeneracy=Degeneracy(first.degenerate[:k], first.nearly_degenerate[:k]),
        columns_degeneracy=Degeneracy(second.degenerate[:k], second.nearly_degenerate[:k]),
    )


@overload
def principal_angles(
    a: Update | Spectrum, b: Update | Spectrum, *, side: Side, k: int | tuple[int, int]
) -> NDArray[np.float64]: ...
@overload
def principal_angles(a: Any, b: Any, *, side: Side, k: int | tuple[int, int]) -> Any: ...
def principal_angles(a: Any, b: Any, *, side: Side, k: int | tuple[int, int]) -> Any:
    """Return the principal angles between two top-k subspaces of ΔW, in radians, ascending.

    The mean of their squared cosines is φ(k, k). Accurate to 1e-15 near 0 and near π/2.

    Parameters
    ----------
    a, b
        Two updates or two adapters, as for `subspace_similarity`; for adapters the result is a
        mapping of module names to arrays.
    side
        ``"input"`` or ``"output"``.
    k
        Directions of each, or one number per update.

    Returns
    -------
    ndarray
        ``(min(k),)``, in [0, π/2].

    Raises
    ------
    DegenerateSubspaceError
        k exceeds a numerical rank, or cuts between coinciding singular values.
    """
    if modules := map_modules(principal_angles, a, b, side=side, k=k):
        return modules
    first, second = spectrum(a), spectrum(b)
    _check_same_space(first, second, side)
    i, j = k if isinstance(k, tuple) else (k, k)
    return linalg.principal_angles(first.basis(side, i), second.basis(side, j))


@overload
def chordal_distance(
    a: Update | Spectrum, b: Update | Spectrum, *, side: Side, k: int | tuple[int, int]
) -> float: ...
@overload
def chordal_distance(a: Any, b: Any, *, side: Side, k: int | tuple[int, int]) -> Any: ...
def chordal_distance(a: Any, b: Any, *, side: Side, k: int | tuple[int, int]) -> Any:
    """Return ``‖sin θ‖₂`` over the principal angles of two top-k subspaces, in [0, √min(k)].

    0 if the smaller subspace is contained in the larger; ``√(min(k)·(1 − φ))``, and right where φ
    rounds to 1. For parameters and errors see `principal_angles`.
    """
    if modules := map_modules(chordal_distance, a, b, side=side, k=k):
        return modules
    return float(np.linalg.norm(np.sin(principal_angles(a, b, side=side, k=k))))


@overload
def energy_overlap(
    a: Update | Spectrum, b: Update | Spectrum, *, side: Side = "output"
) -> float: ...
@overload
def energy_overlap(a: Any, b: Any, *, side: Side = "output") -> Any: ...
def energy_overlap(a: Any, b: Any, *, side: Side = "output") -> Any:
    """Return ω, the energy-weighted overlap of two updates on one side, in [0, 1].

    ``ω = Σ_ab σ_a²τ_b²(u_a·v_b)² / √(Σσ⁴·Στ⁴)``: the cosine between ΔW₁ΔW₁ᵀ and ΔW₂ΔW₂ᵀ (output;
    the other product for input). It needs no choice of i and j and does not depend on the
    scale. The random baseline is `chance.energy_overlap_mean`. NaN if either is untrained. For two
    adapters, in any form that `as_adapter` takes, a mapping of module names to numbers.
    """
    if modules := map_modules(energy_overlap, a, b, side=side):
        return modules
    first, second = spectrum(a), spectrum(b)
    _check_same_space(first, second, side)
    if first.untrained or second.untrained:
        return float("nan")
    gram = first.vectors(side).T @ second.vectors(side)  # (k₁, k₂)
    s = (first.S[: gram.shape[0]] / first.S[0]) ** 2
    t = (second.S[: gram.shape[1]] / second.S[0]) ** 2
    return float(min(s @ gram**2 @ t / (np.linalg.norm(s) * np.linalg.norm(t)), 1.0))


@overload
def signed_cosine(a: Update | Spectrum, b: Update | Spectrum) -> float: ...
@overload
def signed_cosine(a: Any, b: Any) -> Any: ...
def signed_cosine(a: Any, b: Any) -> Any:
    """Return ``⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖)``, in [−1, 1]; NaN if either is untrained.

    For unrelated updates the mean is 0 and the variance exactly 1/(d_out·d_in), whatever their
    spectra. An unknown scale is taken as positive: nothing but its sign matters here. For two
    adapters, in any form that `as_adapter` takes, a mapping of module names to numbers.

    Raises
    ------
    IncompatibleError
        The shapes differ.

    Notes
    -----
    ``Σ_ab σ_a τ_b (u_a·u_b)(v_a·v_b)``: from spectra, O((d_out + d_in)·r₁r₂).
    """
    if modules := map_modules(signed_cosine, a, b):
        return modules
    first, second = spectrum(a), spectrum(b)
    for side in SIDES:
        _check_same_space(first, second, side)
    if first.untrained or second.untrained:
        return float("nan")
    grams = [first.vectors(side).T @ second.vectors(side) for side in SIDES]
    s, t = (spectral.S[: spectral.numerical_rank] / spectral.S[0] for spectral in (first, second))
    s, t = s / np.linalg.norm(s), t / np.linalg.norm(t)
    return float(np.clip(s @ (grams[0] * grams[1]) @ t, -1.0, 1.0))


def random_similarity(dimension: int, shape: tuple[int, int], *, seed: int = 0) -> SimilarityGrid:
    """Return φ of two independent Gaussian matrices: the random panel of the paper's Figure 4.

    Parameters
    ----------
    dimension
        Dimension of the space.
    shape
        ``(i, j)``: columns of the two matrices.
    seed
        Of the one draw that is shown; its mean over draws is the grid's ``chance``.
    """
    rng = np.random.default_rng(seed)
    frames = [linalg.haar_frame(rng, dimension, columns) for columns in shape]
    fine = [Degeneracy(np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)) for n in shape]
    return SimilarityGrid(
        values=linalg.overlap_grid(frames[0].T @ frames[1]),
        chance=chance.similarity_grid_mean(dimension, *shape),
        dimension=dimension,
        module="random Gaussian",
        side="input",
        of="delta",
        labels=("random", "random"),
        rows_degeneracy=fine[0],
        columns_degeneracy=fine[1],
    )
