"""Every pair of many adapters at once: one product per module and side, whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import chance, linalg
from lora_analysis.adapter import LowRankUpdate, Update
from lora_analysis.errors import IncompatibleError, InputError
from lora_analysis.execution import in_threads
from lora_analysis.initialisation import StartEvidence, start_evidence
from lora_analysis.patterns import choose_names, natural_key
from lora_analysis.spectra import SIDES, Side, Spectrum, spectrum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter

    _Sums = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

# Rows of the large product taken at a time: its blocks are reduced before the next are made, and
# what lies left of a block's own columns is known from the blocks before.
_ROWS = 128
_EVIDENCE = ("row_cosine", "cross_cosine", "z", "other_cosine")


@dataclass(frozen=True, slots=True, eq=False)
class PairValues:
    """One side of N updates of one module; every array is ``(N, N)``, symmetric.

    NaN wherever an update is untrained. The diagonal holds an update against itself.

    Attributes
    ----------
    phi_1_1, phi_r_r
        φ(1, 1), and φ at both numerical ranks.
    omega
        The energy-weighted overlap ω.
    chance_r_r, omega_chance
        Isotropic chance of the latter two; that of φ(1, 1) is 1/dimension.
    dimension
        Of the space the directions live in.
    """

    phi_1_1: NDArray[np.float64]
    phi_r_r: NDArray[np.float64]
    omega: NDArray[np.float64]
    chance_r_r: NDArray[np.float64]
    omega_chance: NDArray[np.float64]
    dimension: int

    @property
    def excess_r_r(self) -> NDArray[np.float64]:
        """``(φ − chance)/(1 − chance)`` at both ranks: what may be averaged over modules."""
        return chance.excess(self.phi_r_r, self.chance_r_r)


@dataclass(frozen=True, slots=True, eq=False)
class ModulePairs:
    """Every pair of N updates of one module.

    Attributes
    ----------
    sides
        φ and ω of the input and of the output side.
    cosine
        Signed cosine of the updates, ``(N, N)``; NaN wherever one is untrained.
    ranks, norms
        Numerical rank and ‖ΔW‖_F of each update, ``(N,)``.
    start
        Whether the pairs share their start, NaN with dense updates; None if not asked for.
    """

    module: str
    sides: Mapping[Side, PairValues]
    cosine: NDArray[np.float64]
    ranks: NDArray[np.intp]
    norms: NDArray[np.float64]
    start: StartEvidence | None = None


def module_pairs(
    spectra: Sequence[Spectrum], updates: Sequence[Update] | None = None
) -> ModulePairs:
    """Return φ(1, 1), φ(r, r), ω and the signed cosine of every pair of updates of one module.

    Parameters
    ----------
    spectra
        Of ΔW, all of one shape; ranks may differ.
    updates
        The same updates, for the evidence of a shared start; without them there is none.

    Raises
    ------
    IncompatibleError
        The shapes differ.

    Notes
    -----
    One product ``(Σr, d)·(d, Σr)`` a side, of which half is computed, and O((Σr)²) beside it.
    """
    shapes = {one.shape for one in spectra}
    if len(shapes) != 1:
        message = (
            f"The updates of '{spectra[0].name}' have shapes {sorted(shapes)}. "
            "All must adapt the same weight."
        )
        raise IncompatibleError(message)
    ranks = np.array([one.numerical_rank for one in spectra])
    energy, signed = _weights(spectra)
    sums = _reduced(spectra, ranks, energy, signed)
    trained = ranks > 0
    lost = ~np.logical_and.outer(trained, trained)
    participation = np.array([one.participation_ratio for one in spectra])
    d_out, d_in = spectra[0].shape
    sides = {
        side: _pair_values(values, ranks, participation, dimension, lost)
        for side, values, dimension in zip(SIDES, sums[:2], (d_in, d_out), strict=True)
    }
    return ModulePairs(
        module=spectra[0].name,
        sides=sides,
        cosine=np.where(lost, np.nan, np.clip(sums[2], -1.0, 1.0)),
        ranks=ranks,
        norms=np.array([one.norm for one in spectra]),
        start=None if updates is None else updates_start(updates),
    )


def _weights(spectra: Sequence[Spectrum]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the columns' weights in ω and in the cosine, each update's to norm one."""
    energy, signed = [], []
    for one in spectra:
        s = one.S[: one.numerical_rank]
        relative = s / (s[0] if s.size else 1.0)
        energy.append(relative**2 / (np.linalg.norm(relative**2) if s.size else 1.0))
        signed.append(relative / (np.linalg.norm(relative) if s.size else 1.0))
    return np.concatenate(energy), np.concatenate(signed)


def _reduced(
    spectra: Sequence[Spectrum],
    ranks: NDArray[np.intp],
    energy: NDArray[np.float64],
    signed: NDArray[np.float64],
) -> tuple[_Sums, _Sums, NDArray[np.float64]]:
    """Return per side (first squares, sums of squares, weighted sums), and the cosines.

    All are sums over blocks of ``U₁ᵀU₂``, of which a few thousand columns are there at a time.
    """
    count, starts = len(spectra), np.cumsum(ranks) - ranks
    bases = [np.vstack([one.vectors(side).T for one in spectra]) for side in SIDES]  # (Σr, d)
    owner = np.repeat(np.arange(count), ranks)
    member = np.zeros((len(owner), count))
    member[np.arange(len(owner)), owner] = 1.0
    first = starts[ranks > 0]
    found = np.zeros((7, count, count))
    for members in _chunks(ranks):
        low, high = starts[members[0]], starts[members[-1]] + ranks[members[-1]]
        own, rest = slice(low, high), slice(low, None)  # what lies before is known by symmetry
        grams = [basis[own] @ basis[rest].T for basis in bases]
        rows, columns = member[own, members[0] : members[-1] + 1].T, member[rest]
        block = np.s_[members[0] : members[-1] + 1, :]
        product = grams[0] * grams[1]
        found[6][block] = (rows * signed[own]) @ product @ (columns * signed[rest, None])
        heads = first[(first >= low) & (first < high)]
        for at, gram in enumerate(grams):
            tops = np.ix_(owner[heads], owner[first[first >= low]])
            found[3 * at][tops] = gram[np.ix_(heads - low, first[first >= low] - low)] ** 2
            np.square(gram, out=gram)
            found[3 * at + 1][block] = rows @ (gram @ columns)
            found[3 * at + 2][block] = (rows * energy[own]) @ (
                gram @ (columns * energy[rest, None])
            )
    for one in found:
        lower = np.tril_indices(count, -1)
        one[lower] = one.T[lower]
    return (found[0], found[1], found[2]), (found[3], found[4], found[5]), found[6]


def _chunks(ranks: NDArray[np.intp]) -> Iterator[list[int]]:
    """Yield runs of updates with ``_ROWS`` directions together or more; the last may have fewer."""
    members: list[int] = []
    for at in range(len(ranks)):
        members.append(at)
        if ranks[members].sum() >= _ROWS:
            yield members
            members = []
    if members:
        yield members


def _pair_values(
    sums: _Sums,
    ranks: NDArray[np.intp],
    participation: NDArray[np.float64],
    dimension: int,
    lost: NDArray[np.bool_],
) -> PairValues:
    first, squares, weighted = sums
    smaller = np.maximum(np.minimum.outer(ranks, ranks), 1)

    def known(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(lost, np.nan, np.minimum(values, 1.0))

    return PairValues(
        phi_1_1=known(first),
        phi_r_r=known(squares / smaller),
        omega=known(weighted),
        chance_r_r=known(np.maximum.outer(ranks, ranks) / dimension),
        omega_chance=known(np.sqrt(np.outer(participation, participation)) / dimension),
        dimension=dimension,
    )


def updates_start(updates: Sequence[Update]) -> StartEvidence:
    """Return the evidence of a shared start; dense updates have none, and NaN for it."""
    members = [at for at, one in enumerate(updates) if isinstance(one, LowRankUpdate)]
    shape = (len(updates), len(updates))
    shared = np.zeros(shape, dtype=bool)
    found = {name: np.full(shape, np.nan) for name in _EVIDENCE}
    if members:
        block = np.ix_(members, members)
        # mypy knows no list of a narrower type by its condition.
        known = start_evidence([updates[at] for at in members])  # type: ignore[misc]
        shared[block] = known.shared
        for name, values in found.items():
            values[block] = getattr(known, name)
    return StartEvidence(**found, shared=shared)


def pair_angles(
    spectra: Sequence[Spectrum], side: Side
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the smallest and the largest principal angle of every pair, at the numerical ranks.

    Returns
    -------
    tuple of ndarray
        ``(N, N)`` each, symmetric, in radians; NaN where an update is untrained.
    """
    ranks = np.array([one.numerical_rank for one in spectra])
    smallest, largest = np.full((2, len(spectra), len(spectra)), np.nan)
    kinds = [np.flatnonzero(ranks == rank) for rank in np.unique(ranks[ranks > 0])]
    for at, rows in enumerate(kinds):
        for columns in kinds[at:]:
            cosines = _block_cosines(spectra, rows, columns, side)
            for found, end in ((smallest, 0), (largest, -1)):
                angles = np.arccos(np.minimum(cosines[..., end], 1.0))
                found[np.ix_(rows, columns)] = angles
                found[np.ix_(columns, rows)] = angles.T
    # A cosine near 1 has lost the angle's digits: those few are taken from the sines.
    for a, b in zip(*np.nonzero(np.triu(smallest < 0.1)), strict=True):
        exact = linalg.principal_angles(spectra[a].vectors(side), spectra[b].vectors(side))
        smallest[a, b] = smallest[b, a] = exact[0]
        largest[a, b] = largest[b, a] = exact[-1]
    return smallest, largest


def _block_cosines(
    spectra: Sequence[Spectrum], rows: NDArray[np.intp], columns: NDArray[np.intp], side: Side
) -> NDArray[np.float64]:
    """Return the cosines of the principal angles, ``(rows, columns, min rank)``, falling."""
    left, right = (
        np.hstack([spectra[at].vectors(side) for at in part]) for part in (rows, columns)
    )
    gram = (left.T @ right).reshape(len(rows), -1, len(columns), right.shape[1] // len(columns))
    return np.linalg.svd(gram.transpose(0, 2, 1, 3), compute_uv=False)


@dataclass(frozen=True, slots=True, eq=False)
class PairwiseSimilarity:
    """N adapters against each other in M modules.

    Attributes
    ----------
    labels, modules
        Names along the axes, N and M of them.
    phi_1_1, phi_r_r, omega, excess_r_r
        ``(2, M, N, N)``, the input side first; NaN where a module is missing or untrained, or of
        another shape than the first adapter's that has it.
    cosine
        ``(M, N, N)``.
    total_cosine
        ``(N, N)``: signed cosine over all common modules at once.
    shared_start
        ``(M, N, N)``, whether the module starts from the same rows; input-side numbers of those
        come from the start.
    """

    labels: tuple[str, ...]
    modules: tuple[str, ...]
    phi_1_1: NDArray[np.float64]
    phi_r_r: NDArray[np.float64]
    omega: NDArray[np.float64]
    excess_r_r: NDArray[np.float64]
    cosine: NDArray[np.float64]
    total_cosine: NDArray[np.float64]
    shared_start: NDArray[np.bool_]

    def median(self, quantity: str = "omega", side: Side = "output") -> NDArray[np.float64]:
        """Return the median over modules of one quantity on one side, ``(N, N)``.

        Input-side values of modules with a shared start are left out; NaN where none is left.
        """
        values = getattr(self, quantity)[SIDES.index(side)]
        if side == "input":
            values = np.where(self.shared_start, np.nan, values)
        lost = np.isnan(values).all(axis=0)
        return np.where(lost, np.nan, np.nanmedian(np.where(lost, 0.0, values), axis=0))


def pairwise(
    adapters: Sequence[Adapter],
    *,
    modules: str | Sequence[str] | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> PairwiseSimilarity:
    """Compare every pair of adapters in every module: N factorisations a module, never N².

    Parameters
    ----------
    adapters
        At least two. They are read module by module, so that a hundred fit in memory.
    modules
        The end of module names, or one regular expression; all by default.
    workers
        Threads over modules; the CPUs of this process by default.
    progress
        Called with ("modules", done, total) after each module.

    Raises
    ------
    InputError
        Fewer than two adapters, or no module matches.
    """
    if len(adapters) < 2:
        message = f"Pairs need at least two adapters, got {len(adapters)}."
        raise InputError(message)
    chosen = chosen_modules(adapters, modules)
    count = len(adapters)
    sides = np.full((4, 2, len(chosen), count, count), np.nan)
    cosine = np.full((len(chosen), count, count), np.nan)
    shared = np.zeros((len(chosen), count, count), dtype=bool)
    inner = np.zeros((count, count))
    squares = np.zeros((count, count))
    walk = in_threads(lambda name: _visit(adapters, name), chosen, workers=workers)
    for at, (members, pairs) in enumerate(walk):
        block = np.ix_(members, members)
        for s, side in enumerate(SIDES):
            for q, name in enumerate(("phi_1_1", "phi_r_r", "omega", "excess_r_r")):
                sides[q, s, at][block] = getattr(pairs.sides[side], name)
        cosine[at][block] = pairs.cosine
        if pairs.start is not None:
            shared[at][block] = pairs.start.shared
        inner[block] += np.nan_to_num(pairs.cosine) * np.outer(pairs.norms, pairs.norms)
        squares[block] += np.where(np.isnan(pairs.cosine), 0.0, pairs.norms[:, None] ** 2)
        if progress:
            progress("modules", at + 1, len(chosen))
    with np.errstate(divide="ignore", invalid="ignore"):
        total = inner / np.sqrt(squares * squares.T)
    return PairwiseSimilarity(
        labels=tuple(adapter.label for adapter in adapters),
        modules=tuple(chosen),
        phi_1_1=sides[0],
        phi_r_r=sides[1],
        omega=sides[2],
        excess_r_r=sides[3],
        cosine=cosine,
        total_cosine=total,
        shared_start=shared,
    )


def chosen_modules(adapters: Sequence[Adapter], pattern: str | Sequence[str] | None) -> list[str]:
    """Return the names of modules that any adapter has and the pattern means, in order.

    Raises
    ------
    InputError
        None matches.
    """
    names = sorted({name for adapter in adapters for name in adapter}, key=natural_key)
    chosen = choose_names(names, pattern)
    if not chosen:
        message = f"No module of the {len(adapters)} adapters matches {pattern!r}."
        raise InputError(message)
    return chosen


def updates_of_one_shape(adapters: Sequence[Adapter], name: str) -> tuple[list[int], list[Update]]:
    """Return which adapters have the module in its first shape, and their updates, read now."""
    updates = {at: adapter[name] for at, adapter in enumerate(adapters) if name in adapter}
    shape = next(iter(updates.values())).shape
    members = [at for at, update in updates.items() if update.shape == shape]
    return members, [updates[at] for at in members]


def _visit(adapters: Sequence[Adapter], name: str) -> tuple[list[int], ModulePairs]:
    members, updates = updates_of_one_shape(adapters, name)
    return members, module_pairs([spectrum(one) for one in updates], updates)
