"""The similarity matrix of all pairs of adapters, accumulated module by module.

No table of pairs and modules is stored, so that a thousand adapters fit in memory: the result is
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
from lora_analysis.init_evidence import InitRows
from lora_analysis.results import frame
from lora_analysis.spectra import SIDES, Side
from lora_analysis.studies.pair_products import pair_blocks
from lora_analysis.text import html_table

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from lora_analysis.adapter import Update
    from lora_analysis.spectra import Spectrum
    from lora_analysis.studies.pair_products import ModulePairs

ALL = "all"
# Beyond this, modules are compared one at a time in blocks, without a matrix per module type.
MOST_AT_ONCE = 1000
_ROWS = 128
# Notebooks list only the names of larger similarity matrices.
_MAX_HTML = 24
# Cosine from which two updates are near-duplicates, whatever their norms.
DUPLICATE_COSINE = 0.99
# Share of modules with a shared initialization from which the input side of a pair is left out.
MOSTLY_SHARED = 0.5
# Optimal leaf ordering costs O(N³): up to this many adapters.
_MAX_OPTIMAL_ORDER = 200


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SimilarityMatrix:
    """Similarity of all pairs of N adapters, over all modules and by type of module.

    Attributes
    ----------
    labels
        Names along both axes, N of them.
    kinds
        ``"all"``, then every type of module (up to 1,000 adapters): names along the first axis of
        ``modules``, ``cosine`` and ``overlap``.
    modules
        ``(K,)``: number of modules of each kind.
    cosine
        ``(K, N, N)``: signed cosine of the updates over their common modules of the kind; 0 for
        random updates. NaN for pairs without a trained common module.
    overlap
        Per side ``(K, N, N)``: mean over common modules of ``(ω − c)/(1 − c)``, the excess of the
        energy-weighted overlap over the random baseline. On the input side, modules with a shared
        initialization are excluded, and all modules of a pair if at least half of them have one.
        NaN if no module is left.
    shared
        ``(N, N)``: share of the common modules that have a shared initialization.
    norms
        ``(N,)``: ‖ΔW‖ over all modules; 0 for an untrained adapter.
    """

    labels: tuple[str, ...]
    kinds: tuple[str, ...]
    modules: NDArray[np.intp]
    cosine: NDArray[np.float64]
    overlap: Mapping[Side, NDArray[np.float64]]
    shared: NDArray[np.float64]
    norms: NDArray[np.float64]

    def __repr__(self) -> str:
        return f"<SimilarityMatrix of {len(self.labels)} adapters, {self.modules[0]} modules>"

    def matrix(self, what: str = "output", kind: str = ALL) -> NDArray[np.float64]:
        """Return one ``(N, N)`` matrix: ``"cosine"``, or the overlap of a side.

        Raises
        ------
        InputError
            An unknown quantity or kind.
        """
        if what not in ("cosine", *SIDES) or kind not in self.kinds:
            message = (
                f"The matrix holds 'cosine', 'input' and 'output' of {', '.join(self.kinds)}; "
                f"got {what!r} of {kind!r}."
            )
            raise InputError(message)
        planes = self.cosine if what == "cosine" else self.overlap[what]  # type: ignore[index]
        matrix: NDArray[np.float64] = planes[self.kinds.index(kind)]
        return matrix

    def to_frame(self, what: str = "output", kind: str = ALL) -> pd.DataFrame:
        """Return one matrix as a table with the labels along both axes, see `matrix`."""
        rows = [dict(zip(self.labels, row, strict=True)) for row in self.matrix(what, kind)]
        return frame(rows, self.labels).set_axis(list(self.labels))

    def _repr_html_(self) -> str:
        whole = len(self.labels) <= _MAX_HTML
        rows = [
            (name, *(self.matrix("output")[i] if whole else ()))
            for i, name in enumerate(self.labels[:_MAX_HTML])
        ]
        columns = ("adapter", *(self.labels if whole else ()))
        note = "Excess of ω over the random baseline, output side, mean over modules."
        return html_table(f"Similarity matrix of {len(self.labels)} adapters", columns, rows, note)

    def placed(self, what: str = "output", kind: str = ALL) -> NDArray[np.intp]:
        """Return the positions of adapters with at least one value: all but untrained ones."""
        return np.flatnonzero(~np.isnan(self.matrix(what, kind)).all(axis=1))

    def linkage(self, what: str = "output", kind: str = ALL) -> NDArray[np.float64]:
        """Return the average-linkage tree of the P `placed` adapters, ``(P − 1, 4)`` as in scipy.

        The distance is 1 − similarity; pairs without a value have distance 1.
        """
        from scipy.cluster import hierarchy

        placed = self.placed(what, kind)
        if len(placed) < 2:
            return np.zeros((0, 4))
        matrix = self.matrix(what, kind)
        rows = []
        for position, row in enumerate(placed[:-1]):
            later = placed[position + 1 :]
            upper, lower = np.nan_to_num(matrix[row, later]), np.nan_to_num(matrix[later, row])
            rows.append(np.maximum(((1.0 - upper) + (1.0 - lower)) / 2, 0.0))
        condensed = np.concatenate(rows)
        optimal = len(self.labels) <= _MAX_OPTIMAL_ORDER
        tree: NDArray[np.float64] = hierarchy.linkage(
            condensed, method="average", optimal_ordering=optimal
        )
        return tree

    def order(self, what: str = "output", kind: str = ALL) -> NDArray[np.intp]:
        """Return the order of the leaves of the tree, followed by adapters that are not in it."""
        placed = self.placed(what, kind)
        if len(placed) > 2:
            from scipy.cluster import hierarchy

            placed = placed[hierarchy.leaves_list(self.linkage(what, kind))]
        rest = np.setdiff1d(np.arange(len(self.labels)), placed)
        return np.concatenate([placed, rest]).astype(np.intp)

    def duplicates(self, cosine: float = DUPLICATE_COSINE) -> list[tuple[str, ...]]:
        """Return groups of adapters whose updates have at least this signed cosine."""
        return self._groups(self.matrix("cosine") >= cosine)  # False of NaN

    def shared_inits(self) -> list[tuple[str, ...]]:
        """Return groups of adapters with a shared initialization in at least half the modules."""
        return self._groups(self.shared >= MOSTLY_SHARED)

    def untrained(self) -> list[str]:
        """Return the adapters whose update is zero."""
        return [name for name, norm in zip(self.labels, self.norms, strict=True) if norm == 0]

    def _groups(self, adjacent: NDArray[np.bool_]) -> list[tuple[str, ...]]:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import connected_components

        # A dense graph would be copied as float64.
        count, component = connected_components(csr_array(adjacent), directed=False)
        groups = (np.flatnonzero(component == index) for index in range(count))
        return [tuple(self.labels[i] for i in group) for group in groups if len(group) > 1]


@dataclass(frozen=True, slots=True, eq=False)
class ModuleContribution:
    """The contribution of one module: a fifth of the numbers of its pairs.

    ``members`` are the positions of its N updates; ``cosine`` and, per side, ``excess`` are
    ``(N, N)``, NaN for values that are excluded.
    """

    members: Sequence[int]
    cosine: NDArray[np.float64]
    excess: Mapping[Side, NDArray[np.float64]]
    norms: NDArray[np.float64]
    shared: NDArray[np.bool_]
    compared: NDArray[np.bool_]

    @classmethod
    def of(cls, members: Sequence[int], pairs: ModulePairs) -> ModuleContribution:
        """Return the contribution of the pairs of a module."""
        shared = compared = np.zeros(pairs.cosine.shape, dtype=bool)
        if pairs.init is not None:
            shared, compared = pairs.init.shared, ~np.isnan(pairs.init.row_cosine)
        excess = {}
        for side, values in pairs.sides.items():
            excess[side] = chance.excess(values.omega, values.chance_omega)
            if side == "input":
                excess[side][shared & ~np.eye(len(shared), dtype=bool)] = np.nan
        return cls(members, pairs.cosine, excess, pairs.norms, shared, compared)


@dataclass(frozen=True, slots=True, eq=False)
class BlockedContribution:
    """The contribution of many low-rank updates, computed in blocks when it is added.

    ``members`` are the positions of the updates, in order, with their spectra.
    """

    members: NDArray[np.intp]
    spectra: Sequence[Spectrum]
    updates: Sequence[LowRankUpdate]

    @classmethod
    def fits(cls, updates: Sequence[Update]) -> bool:
        """Return True if there are many updates, all low-rank and initialized by a random A."""
        return len(updates) > MOST_AT_ONCE and all(
            isinstance(u, LowRankUpdate) and u.layout != "embedding" for u in updates
        )


class SimilarityMatrixSums:
    """Sums over modules, of which `similarity_matrix` returns the means.

    Beyond `MOST_AT_ONCE` adapters there are only sums over all modules, not one per module type.

    Parameters
    ----------
    labels
        Labels of the adapters.
    kinds
        Type of each module that will be added.
    """

    def __init__(self, labels: Sequence[str], kinds: Sequence[str]) -> None:
        self.labels = tuple(labels)
        types = () if len(labels) > MOST_AT_ONCE else dict.fromkeys(kinds)
        self.kinds = (ALL, *(kind for kind in types if kind != ALL))
        shape = (len(self.kinds), len(labels), len(labels))
        self.modules = np.zeros(len(self.kinds), dtype=np.intp)
        self.inner = np.zeros(shape)
        self.squares = np.zeros(shape)  # of the row's adapter, over modules trained in both
        self.overlap = {side: np.zeros(shape) for side in SIDES}
        # Counts of modules and, within a module, of shapes.
        count_type = np.min_scalar_type(2 * len(kinds))
        self.counts = {side: np.zeros(shape, dtype=count_type) for side in SIDES}
        self.shared, self.compared = np.zeros((2, *shape[1:]), dtype=count_type)
        self.norms = np.zeros(len(labels))
        self._upper_only = False

    def add(self, kind: str, part: ModuleContribution | BlockedContribution) -> None:
        """Add one module of a kind."""
        if isinstance(part, BlockedContribution):
            self._add_blocks(kind, part)
            return
        block = np.ix_(part.members, part.members)
        trained = ~np.isnan(part.cosine)
        self.shared[block] += part.shared
        self.compared[block] += part.compared
        self.norms[list(part.members)] += part.norms**2
        for k in self._planes(kind):
            self.modules[k] += 1
            self.inner[k][block] += np.nan_to_num(part.cosine) * np.outer(part.norms, part.norms)
            self.squares[k][block] += np.where(trained, part.norms[:, None] ** 2, 0.0)
            for side, excess in part.excess.items():
                counted = trained & ~np.isnan(excess)
                self.overlap[side][k][block] += np.where(counted, excess, 0.0)
                self.counts[side][k][block] += counted

    def _add_blocks(self, kind: str, part: BlockedContribution) -> None:
        """Add one module of a kind, on and above the diagonal."""
        self._upper_only = True
        members = part.members
        norms = np.array([s.norm for s in part.spectra])
        self.norms[members] += norms**2
        trained = np.flatnonzero([s.numerical_rank > 0 for s in part.spectra])
        for k in self._planes(kind):
            self.modules[k] += 1
        for block in pair_blocks(part.spectra, part.updates):
            pairs = np.ix_(members[block.rows], members[block.columns])
            self.shared[pairs] += block.shared
            different = block.rows[:, None] != block.columns
            products = block.cosine * np.outer(norms[block.rows], norms[block.columns])
            for k in self._planes(kind):
                self.inner[k][pairs] += products
                rows = np.ix_(members[block.rows], members[trained])
                self.squares[k][rows] += norms[block.rows, None] ** 2
                for side, excess in block.excess.items():
                    counted = ~np.isnan(excess)
                    if side == "input":
                        counted &= ~(block.shared & different)
                    self.overlap[side][k][pairs] += np.where(counted, excess, 0.0)
                    self.counts[side][k][pairs] += counted
        untrained = np.setdiff1d(np.arange(len(part.members)), trained)
        init_rows = InitRows(part.updates) if len(untrained) else None
        every = np.arange(len(part.members))
        for first in range(0, len(untrained), _ROWS):
            some = untrained[first : first + _ROWS]
            shared = init_rows.shared(some, every)  # type: ignore[union-attr]  # there are some
            # A pair of two untrained updates occurs in both orders.
            repeated = np.isin(every, untrained) & (every < some[:, None])
            i, j = np.nonzero(shared & ~repeated)
            low, high = np.minimum(some[i], every[j]), np.maximum(some[i], every[j])
            self.shared[part.members[low], part.members[high]] += 1
        for first in range(0, len(members), _ROWS):
            self.compared[np.ix_(members[first : first + _ROWS], members[first:])] += 1

    def _planes(self, kind: str) -> Iterator[int]:
        """Yield the indices along the first axis to which a module of a kind is added."""
        yield 0
        if kind in self.kinds[1:]:
            yield self.kinds.index(kind)

    def similarity_matrix(self, members: Sequence[int]) -> SimilarityMatrix:
        """Return the similarity matrix of the adapters at these positions.

        The sums become the matrix in place, so this can be called once only.
        """
        every = len(members) == len(self.labels)
        plane: Any = np.s_[:, :] if every else np.ix_(members, members)
        if self._upper_only:
            for planes in (self.inner, *self.overlap.values(), *self.counts.values()):
                for matrix in planes:
                    _mirror_triangle(matrix)
            _mirror_triangle(self.shared)
            _mirror_triangle(self.compared)
        for inner, square in zip(self.inner, self.squares, strict=True):
            with np.errstate(divide="ignore", invalid="ignore"):
                for first in range(0, len(inner), _ROWS):
                    rows = slice(first, first + _ROWS)
                    lengths = np.sqrt(square[rows] * square[:, rows].T)
                    inner[rows] = np.clip(inner[rows] / lengths, -1.0, 1.0)
        cosine = self.inner if every else np.stack([matrix[plane] for matrix in self.inner])
        for side in SIDES:
            with np.errstate(divide="ignore", invalid="ignore"):
                for total, count in zip(self.overlap[side], self.counts[side], strict=True):
                    np.divide(total, count, out=total)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = self.shared / self.compared
        np.fill_diagonal(share, 0.0)
        for matrix in self.overlap["input"]:
            matrix[share >= MOSTLY_SHARED] = np.nan
        np.fill_diagonal(share, np.where(np.diag(self.compared) > 0, 1.0, np.nan))
        shared = share[plane]
        return SimilarityMatrix(
            labels=tuple(self.labels[i] for i in members),
            kinds=self.kinds,
            modules=self.modules,
            cosine=cosine,
            overlap={
                side: sums if every else np.stack([matrix[plane] for matrix in sums])
                for side, sums in self.overlap.items()
            },
            shared=shared,
            norms=np.sqrt(self.norms[list(members)]),
        )


def _mirror_triangle(plane: NDArray[Any]) -> None:
    """Copy the upper triangle to the lower one, in place."""
    for first in range(0, len(plane), _ROWS):
        rows = slice(first, first + _ROWS)
        plane[rows, :first] = plane[:first, rows].T
        corner = plane[rows, rows]
        lower = np.tril_indices(len(corner), -1)
        corner[lower] = corner.T[lower]
