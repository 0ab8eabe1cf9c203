"""The atlas: every adapter against every other, summed up while the modules go by.

No table of pairs and modules is kept, so that a thousand adapters fit in memory: what remains is
one matrix per quantity and type of module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis import chance
from lora_analysis.errors import InputError
from lora_analysis.showing import html_table
from lora_analysis.spectra import SIDES, Side

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.pairwise import ModulePairs

ALL = "all"
# A notebook shows larger atlases by name only.
SHOWN = 24
# From here on two updates are one, whatever their length.
DUPLICATE_COSINE = 0.99
# An order in which neighbours in the tree are neighbours in the picture costs O(N³) to find.
_ORDERED_BEST = 200


@dataclass(frozen=True, slots=True, eq=False)
class Atlas:
    """N adapters against each other, by type of module and in all.

    Attributes
    ----------
    labels
        Names along both axes, N of them.
    kinds
        ``"all"``, then every type of module; names along the first axis of what follows.
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
                f"The atlas holds 'cosine', 'input' and 'output' of {', '.join(self.kinds)}; "
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
        return html_table(f"Atlas of {len(self.labels)} adapters", columns, rows, note)

    def placed(self, what: str = "output", kind: str = ALL) -> NDArray[np.intp]:
        """Return the places of the adapters with any number: all but the untrained."""
        return np.flatnonzero(~np.isnan(self.matrix(what, kind)).all(axis=1))

    def linkage(self, what: str = "output", kind: str = ALL) -> NDArray[np.float64]:
        """Return the tree of average linkage over the P `placed` ones, ``(P − 1, 4)`` as scipy's.

        The distance is 1 − similarity; pairs without a number stand as far apart as strangers.
        """
        from scipy.cluster import hierarchy
        from scipy.spatial.distance import squareform

        placed = self.placed(what, kind)
        if len(placed) < 2:
            return np.zeros((0, 4))
        distance = 1.0 - np.nan_to_num(self.matrix(what, kind)[np.ix_(placed, placed)], nan=0.0)
        np.fill_diagonal(distance, 0.0)
        condensed = squareform(np.maximum((distance + distance.T) / 2, 0.0), checks=False)
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
        return self._groups(np.nan_to_num(self.matrix("cosine")) >= cosine)

    def shared_starts(self) -> list[tuple[str, ...]]:
        """Return groups of adapters that share their initial rows in half of all modules."""
        return self._groups(np.nan_to_num(self.shared) >= 0.5)

    def untrained(self) -> list[str]:
        """Return the adapters whose update is zero."""
        return [name for name, norm in zip(self.labels, self.norms, strict=True) if norm == 0]

    def _groups(self, alike: NDArray[np.bool_]) -> list[tuple[str, ...]]:
        from scipy.sparse.csgraph import connected_components

        count, member = connected_components(alike, directed=False)
        found = (np.flatnonzero(member == at) for at in range(count))
        return [tuple(self.labels[at] for at in one) for one in found if len(one) > 1]


@dataclass(frozen=True, slots=True, eq=False)
class AtlasPart:
    """What the atlas needs of one module: a fifth of what is known of its pairs.

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
    def of(cls, members: Sequence[int], pairs: ModulePairs) -> AtlasPart:
        """Take it out of the pairs of a module."""
        shared = compared = np.zeros(pairs.cosine.shape, dtype=bool)
        if pairs.start is not None:
            shared, compared = pairs.start.shared, ~np.isnan(pairs.start.row_cosine)
        above = {}
        for side, values in pairs.sides.items():
            above[side] = chance.excess(values.omega, values.omega_chance)
            if side == "input":
                above[side][shared & ~np.eye(len(shared), dtype=bool)] = np.nan
        return cls(members, pairs.cosine, above, pairs.norms, shared, compared)


class AtlasSums:
    """What is added up over modules; `atlas` gives the means.

    Parameters
    ----------
    labels
        Of the adapters.
    kinds
        Every type of module that will come.
    """

    def __init__(self, labels: Sequence[str], kinds: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.kinds = (ALL, *(kind for kind in dict.fromkeys(kinds) if kind != ALL))
        shape = (len(self.kinds), len(labels), len(labels))
        self.modules = np.zeros(len(self.kinds), dtype=np.intp)
        self.inner = np.zeros(shape)
        self.squares = np.zeros(shape)  # of the row's adapter, over modules that both train
        self.overlap = {side: np.zeros(shape) for side in SIDES}
        # Of modules: there are fewer than a hundred thousand.
        self.counts = {side: np.zeros(shape, dtype=np.int32) for side in SIDES}
        self.shared, self.compared = np.zeros((2, *shape[1:]), dtype=np.int32)
        self.norms = np.zeros(len(labels))

    def add(self, kind: str, part: AtlasPart) -> None:
        """Add one module of a kind."""
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

    def _places(self, kind: str) -> Iterator[int]:
        yield 0
        if kind != ALL:
            yield self.kinds.index(kind)

    def atlas(self, kept: Sequence[int]) -> Atlas:
        """Return the atlas of some of the adapters: a failed one has half of its modules here."""
        plane = np.ix_(kept, kept)

        def means(sums: NDArray[Any], over: NDArray[Any]) -> NDArray[np.float64]:
            """Divide kind by kind, so that the sums are not copied whole."""
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.stack(
                    [one[plane] / by[plane] for one, by in zip(sums, over, strict=True)]
                )

        cosine = np.empty((len(self.kinds), len(kept), len(kept)))
        for at, square in enumerate(self.squares):
            lengths = np.sqrt(square * square.T)[plane]
            with np.errstate(divide="ignore", invalid="ignore"):
                cosine[at] = np.clip(self.inner[at][plane] / lengths, -1.0, 1.0)
        return Atlas(
            labels=tuple(self.labels[at] for at in kept),
            kinds=self.kinds,
            modules=self.modules,
            cosine=cosine,
            overlap={side: means(self.overlap[side], self.counts[side]) for side in SIDES},
            shared=means(self.shared[None], self.compared[None])[0],
            norms=np.sqrt(self.norms[list(kept)]),
        )
