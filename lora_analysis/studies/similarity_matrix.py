"""The similarity matrix: every adapter against every other, summed up while the modules go by.

No table of pairs and modules is kept, so that a thousand adapters fit in memory: what remains is
one matrix per quantity and type of module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis import chance
from lora_analysis.adapter import LowRankUpdate
from lora_analysis.errors import InputError
from lora_analysis.pairwise import pair_blocks
from lora_analysis.shared_init import InitRows
from lora_analysis.spectra import SIDES, Side
from lora_analysis.text import html_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Update
    from lora_analysis.pairwise import ModulePairs
    from lora_analysis.spectra import Spectrum

ALL = "all"
# Beyond, one module at a time is compared, block by block, and types of modules are not told apart.
MOST_AT_ONCE = 1000
_ROWS = 128
# A notebook shows larger similarity matrices by name only.
SHOWN = 24
# From here on two updates are one, whatever their length.
DUPLICATE_COSINE = 0.99
# An order in which neighbors in the tree are neighbors in the picture costs O(N³) to find.
_ORDERED_BEST = 200


@dataclass(frozen=True, slots=True, eq=False)
class SimilarityMatrix:
    """N adapters against each other, by type of module and in all.

    Attributes
    ----------
    labels
        Names along both axes, N of them.
    kinds
        ``"all"``, then every type of module, up to 1,000 adapters; names along the first axis of
        what follows.
    modules
        ``(K,)``: modules of each kind.
    cosine
        ``(K, N, N)``: signed cosine of the updates over all their common modules of the kind;
        isotropic chance 0.
    overlap
        Per side ``(K, N, N)``: mean over common modules of ``(ω − c)/(1 − c)``, the energy-weighted
        overlap above isotropic chance. Modules whose two updates share their initial A do not
        count on the input side. Both are NaN where nothing is left.
    shared
        ``(N, N)``: share of the common modules that start from the same initial rows.
    norms
        ``(N,)``: ‖ΔW‖ over all modules; 0 of an untrained adapter.
    """

    labels: tuple[str, ...]
    kinds: tuple[str, ...]
    modules: NDArray[np.intp]
    cosine: NDArray[np.float64]
    overlap: Mapping[Side, NDArray[np.float64]]
    shared: NDArray[np.float64]
    norms: NDArray[np.float64]

    def matrix(self, what: str = "output", kind: str = ALL) -> NDArray[np.float64]:
        """Return one ``(N, N)`` matrix: ``"cosine"``, or the overlap of a side.

        Raises
        ------
        InputError
            Another quantity, or a kind that is not there.
        """
        if what not in ("cosine", *SIDES) or kind not in self.kinds:
            message = (
                f"The matrix holds 'cosine', 'input' and 'output' of {', '.join(self.kinds)}; "
                f"got {what!r} of {kind!r}."
            )
            raise InputError(message)
        of = self.cosine if what == "cosine" else self.overlap[what]  # type: ignore[index]
        found: NDArray[np.float64] = of[self.kinds.index(kind)]
        return found

    def _repr_html_(self) -> str:
        rows = [
            (name, *(self.matrix("output")[at] if len(self.labels) <= SHOWN else ()))
            for at, name in enumerate(self.labels[:SHOWN])
        ]
        columns = ("adapter", *(self.labels if len(self.labels) <= SHOWN else ()))
        note = "Mean over modules of ω above chance, output side."
        return html_table(f"Similarity matrix of {len(self.labels)} adapters", columns, rows, note)

    def placed(self, what: str = "output", kind: str = ALL) -> NDArray[np.intp]:
        """Return the places of the adapters with any number: all but the untrained."""
        return np.flatnonzero(~np.isnan(self.matrix(what, kind)).all(axis=1))

    def linkage(self, what: str = "output", kind: str = ALL) -> NDArray[np.float64]:
        """Return the tree of average linkage over the P `placed` ones, ``(P − 1, 4)`` as scipy's.

        The distance is 1 − similarity; pairs without a number stand as far apart as strangers.
        """
        from scipy.cluster import hierarchy

        placed = self.placed(what, kind)
        if len(placed) < 2:
            return np.zeros((0, 4))
        condensed = _condensed_distances(self.matrix(what, kind), placed)
        best = len(self.labels) <= _ORDERED_BEST
        tree: NDArray[np.float64] = hierarchy.linkage(
            condensed, method="average", optimal_ordering=best
        )
        return tree

    def order(self, what: str = "output", kind: str = ALL) -> NDArray[np.intp]:
        """Return the order in which the tree has no crossing branches, those outside it last."""
        placed = self.placed(what, kind)
        if len(placed) > 2:
            from scipy.cluster import hierarchy

            placed = placed[hierarchy.leaves_list(self.linkage(what, kind))]
        rest = np.setdiff1d(np.arange(len(self.labels)), placed)
        return np.concatenate([placed, rest]).astype(np.intp)

    def duplicates(self, cosine: float = DUPLICATE_COSINE) -> list[tuple[str, ...]]:
        """Return groups of adapters whose updates point the same way, by the signed cosine."""
        return self._groups(self.matrix("cosine") >= cosine)  # False of NaN

    def shared_inits(self) -> list[tuple[str, ...]]:
        """Return groups of adapters that share their initial rows in half of all modules."""
        return self._groups(self.shared >= 0.5)

    def untrained(self) -> list[str]:
        """Return the adapters whose update is zero."""
        return [name for name, norm in zip(self.labels, self.norms, strict=True) if norm == 0]

    def _groups(self, alike: NDArray[np.bool_]) -> list[tuple[str, ...]]:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import connected_components

        # A dense graph would be copied as numbers.
        count, member = connected_components(csr_array(alike), directed=False)
        found = (np.flatnonzero(member == at) for at in range(count))
        return [tuple(self.labels[at] for at in one) for one in found if len(one) > 1]


@dataclass(frozen=True, slots=True, eq=False)
class ModuleContribution:
    """What the similarity matrix needs of one module: a fifth of what is known of its pairs.

    ``members`` are the places of its N updates, ``cosine`` and ``above`` per side ``(N, N)``, NaN
    where nothing counts.
    """

    members: Sequence[int]
    cosine: NDArray[np.float64]
    above: Mapping[Side, NDArray[np.float64]]
    norms: NDArray[np.float64]
    shared: NDArray[np.bool_]
    compared: NDArray[np.bool_]

    @classmethod
    def of(cls, members: Sequence[int], pairs: ModulePairs) -> ModuleContribution:
        """Take it out of the pairs of a module."""
        shared = compared = np.zeros(pairs.cosine.shape, dtype=bool)
        if pairs.start is not None:
            shared, compared = pairs.start.shared, ~np.isnan(pairs.start.row_cosine)
        above = {}
        for side, values in pairs.sides.items():
            above[side] = chance.excess(values.omega, values.chance_omega)
            if side == "input":
                above[side][shared & ~np.eye(len(shared), dtype=bool)] = np.nan
        return cls(members, pairs.cosine, above, pairs.norms, shared, compared)


@dataclass(frozen=True, slots=True, eq=False)
class BlockedContribution:
    """The same of many low-rank updates, computed block by block when it is added up.

    ``members`` are the places of the updates, in order, with their spectra.
    """

    members: NDArray[np.intp]
    spectra: Sequence[Spectrum]
    updates: Sequence[LowRankUpdate]

    @classmethod
    def fits(cls, updates: Sequence[Update]) -> bool:
        """Return True if there are many updates, whose start is that of their A."""
        return len(updates) > MOST_AT_ONCE and all(
            isinstance(one, LowRankUpdate) and one.layout != "embedding" for one in updates
        )


class SimilarityMatrixSums:
    """What is added up over modules; `similarity_matrix` gives the means.

    Beyond `MOST_AT_ONCE` adapters, only sums over all modules are kept, not those of each type.

    Parameters
    ----------
    labels
        Of the adapters.
    kinds
        Types of all modules that will come.
    """

    def __init__(self, labels: Sequence[str], kinds: Sequence[str]) -> None:
        self.labels = tuple(labels)
        own = () if len(labels) > MOST_AT_ONCE else dict.fromkeys(kinds)
        self.kinds = (ALL, *(kind for kind in own if kind != ALL))
        shape = (len(self.kinds), len(labels), len(labels))
        self.modules = np.zeros(len(self.kinds), dtype=np.intp)
        self.inner = np.zeros(shape)
        self.squares = np.zeros(shape)  # of the row's adapter, over modules that both train
        self.overlap = {side: np.zeros(shape) for side in SIDES}
        # Of modules and, within one, of shapes.
        whole = np.min_scalar_type(2 * len(kinds))
        self.counts = {side: np.zeros(shape, dtype=whole) for side in SIDES}
        self.shared, self.compared = np.zeros((2, *shape[1:]), dtype=whole)
        self.norms = np.zeros(len(labels))
        self._upper_only = False

    def add(self, kind: str, part: ModuleContribution | BlockedContribution) -> None:
        """Add one module of a kind."""
        if isinstance(part, BlockedContribution):
            self._add_blocks(kind, part)
            return
        block = np.ix_(part.members, part.members)
        known = ~np.isnan(part.cosine)
        self.shared[block] += part.shared
        self.compared[block] += part.compared
        self.norms[list(part.members)] += part.norms**2
        for at in self._places(kind):
            self.modules[at] += 1
            self.inner[at][block] += np.nan_to_num(part.cosine) * np.outer(part.norms, part.norms)
            self.squares[at][block] += np.where(known, part.norms[:, None] ** 2, 0.0)
            for side, above in part.above.items():
                counted = known & ~np.isnan(above)
                self.overlap[side][at][block] += np.where(counted, above, 0.0)
                self.counts[side][at][block] += counted

    def _add_blocks(self, kind: str, part: BlockedContribution) -> None:
        """Add one module of a kind, on and above the diagonal."""
        self._upper_only = True
        members = part.members
        norms = np.array([one.norm for one in part.spectra])
        self.norms[members] += norms**2
        trained = np.flatnonzero([one.numerical_rank > 0 for one in part.spectra])
        for at in self._places(kind):
            self.modules[at] += 1
        for block in pair_blocks(part.spectra, part.updates):
            pairs = np.ix_(members[block.rows], members[block.columns])
            self.shared[pairs] += block.shared
            different = block.rows[:, None] != block.columns
            products = block.cosine * np.outer(norms[block.rows], norms[block.columns])
            for at in self._places(kind):
                self.inner[at][pairs] += products
                rows = np.ix_(members[block.rows], members[trained])
                self.squares[at][rows] += norms[block.rows, None] ** 2
                for side, above in block.excess.items():
                    counted = ~np.isnan(above)
                    if side == "input":
                        counted &= ~(block.shared & different)
                    self.overlap[side][at][pairs] += np.where(counted, above, 0.0)
                    self.counts[side][at][pairs] += counted
        self._add_untrained_starts(part, trained)
        for first in range(0, len(members), _ROWS):
            self.compared[np.ix_(members[first : first + _ROWS], members[first:])] += 1

    def _add_untrained_starts(self, part: BlockedContribution, trained: NDArray[np.intp]) -> None:
        """Count the shared starts of pairs with an untrained update, which blocks leave out."""
        untrained = np.setdiff1d(np.arange(len(part.members)), trained)
        rows = InitRows(part.updates) if len(untrained) else None
        every = np.arange(len(part.members))
        for first in range(0, len(untrained), _ROWS):
            own = untrained[first : first + _ROWS]
            shared = rows.shared(own, every)  # type: ignore[union-attr]  # there are some
            # A pair of two untrained ones is met from both sides.
            later = np.isin(every, untrained) & (every < own[:, None])
            i, j = np.nonzero(shared & ~later)
            low, high = np.minimum(own[i], every[j]), np.maximum(own[i], every[j])
            self.shared[part.members[low], part.members[high]] += 1

    def _places(self, kind: str) -> Iterator[int]:
        yield 0
        if kind in self.kinds[1:]:
            yield self.kinds.index(kind)

    def similarity_matrix(self, kept: Sequence[int]) -> SimilarityMatrix:
        """Return the similarity matrix of the adapters at ``kept``; failed ones are incomplete.

        The sums are turned into it in place, so that they can be asked for once.
        """
        every = len(kept) == len(self.labels)
        plane: Any = np.s_[:, :] if every else np.ix_(kept, kept)
        if self._upper_only:
            for planes in (self.inner, *self.overlap.values(), *self.counts.values()):
                for one in planes:
                    _mirror(one)
            _mirror(self.shared)
            _mirror(self.compared)
        for inner, square in zip(self.inner, self.squares, strict=True):
            _to_cosines(inner, square)
        cosine = self.inner if every else np.stack([one[plane] for one in self.inner])
        for side in SIDES:
            _divide(self.overlap[side], self.counts[side])
        with np.errstate(divide="ignore", invalid="ignore"):
            shared = self.shared[plane] / self.compared[plane]
        return SimilarityMatrix(
            labels=tuple(self.labels[at] for at in kept),
            kinds=self.kinds,
            modules=self.modules,
            cosine=cosine,
            overlap={
                side: sums if every else np.stack([one[plane] for one in sums])
                for side, sums in self.overlap.items()
            },
            shared=shared,
            norms=np.sqrt(self.norms[list(kept)]),
        )


def _condensed_distances(
    matrix: NDArray[np.float64], placed: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Return 1 − similarity of all pairs of some adapters, as scipy orders them."""
    rows = []
    for position, row in enumerate(placed[:-1]):
        later = placed[position + 1 :]
        there, back = (
            np.nan_to_num(one, nan=0.0) for one in (matrix[row, later], matrix[later, row])
        )
        rows.append(np.maximum(((1.0 - there) + (1.0 - back)) / 2, 0.0))
    return np.concatenate(rows)


def _mirror(plane: NDArray[Any]) -> None:
    """Copy what is above the diagonal to below it, in place."""
    for first in range(0, len(plane), _ROWS):
        rows = slice(first, first + _ROWS)
        plane[rows, :first] = plane[:first, rows].T
        corner = plane[rows, rows]
        lower = np.tril_indices(len(corner), -1)
        corner[lower] = corner.T[lower]


def _to_cosines(inner: NDArray[np.float64], squares: NDArray[np.float64]) -> None:
    """Divide inner products by the lengths of both updates, in place."""
    with np.errstate(divide="ignore", invalid="ignore"):
        for first in range(0, len(inner), _ROWS):
            rows = slice(first, first + _ROWS)
            lengths = np.sqrt(squares[rows] * squares[:, rows].T)
            inner[rows] = np.clip(inner[rows] / lengths, -1.0, 1.0)


def _divide(sums: NDArray[np.float64], counts: NDArray[Any]) -> None:
    """Divide in place; NaN where nothing was counted."""
    with np.errstate(divide="ignore", invalid="ignore"):
        for one, by in zip(sums, counts, strict=True):
            np.divide(one, by, out=one)
