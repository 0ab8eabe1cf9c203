"""Controls of the enrichment: crossed directions of unrelated updates, directions through W.

An enrichment above 1 can come from the geometry of W alone: every update that gradients sent
through W has directions along which W is strong. Two controls show how much that gives. *Crossed*:
U of one update and V of an unrelated update of the same module, which no training put together.
*Through W*: random directions after one product with W.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis import chance, linalg
from lora_analysis.amplify.results import Amplification, CrossedEnrichment
from lora_analysis.amplify.streaming import Frames, Precision, TileSum, project

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.bases import Weight

# Below this number of crossed values an enrichment is not called specific: p would exceed .05.
FEWEST_CROSSED: Final = 19
SIGNIFICANT: Final = 0.05
# Columns of all crossed frames together, 40 adapters of rank 64: their product takes 52 MB.
# Of more, only the leading directions of each are crossed.
MOST_CROSSED_COLUMNS: Final = 2560
# Directions through W: updates of a higher rank, which are dense ones, have no control beyond.
MOST_THROUGH_WEIGHT: Final = 512
# A crossed value this close to the update's own counts as equal: at full rank all of them are 1.
_TIE: Final = 1e-9


class Controls:
    """Both controls of several updates of one weight.

    Parameters
    ----------
    shape
        Of W.
    frames, labels
        U and V of each update, the measured ones first; these are the first frames of the pass.
    pairs
        Pairs of positions in ``frames`` that are crossed.
    columns, draws, seed, precision
        Of the random directions through W; none without draws.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        frames: Frames,
        *,
        labels: Sequence[str],
        pairs: Collection[tuple[int, int]],
        columns: int,
        draws: int,
        seed: int,
        precision: Precision,
    ) -> None:
        self._labels, self._pairs, self._precision = labels, pairs, precision
        self._products = CrossedProducts(frames) if pairs else None
        self._sketch = None
        if draws and columns:
            columns = min(columns, MOST_THROUGH_WEIGHT)
            self._sketch = Sketch(shape, columns, draws, seed, precision)

    @property
    def sums(self) -> list[TileSum]:
        """The sums that the pass over W has to fill."""
        return [total for total in (self._products, self._sketch) if total is not None]

    def add_to(
        self, results: list[Amplification], W: Weight | NDArray[np.floating], weight_norm: float
    ) -> list[Amplification]:
        """Return the amplifications with their controls."""
        through = None
        if self._sketch is not None:
            through = enrichment_through_weight(W, self._sketch, weight_norm, self._precision)
        controlled = []
        for index, result in enumerate(results):
            fields: dict[str, Any] = {}
            n = len(result.S)
            if self._products is not None:
                paired = {i if j == index else j for i, j in self._pairs if index in (i, j)}
                partners = sorted(paired - {index})
                values = np.full((2, len(partners), n), np.nan)
                with np.errstate(divide="ignore", invalid="ignore"):  # W may be zero
                    for row, partner in enumerate(partners):
                        for way, pair in enumerate(((index, partner), (partner, index))):
                            norms = self._products.norms(*pair)[:n]
                            values[way, row, : len(norms)] = norms / result.random.rms[: len(norms)]
                labels = tuple(self._labels[partner] for partner in partners)
                fields["crossed"] = CrossedEnrichment(labels, *values)
            if through is not None:  # NaN beyond the directions that were drawn
                fields["enrichment_through_weight"] = np.full(n, np.nan)
                fields["enrichment_through_weight"][: len(through)] = through[:n]
            controlled.append(replace(result, **fields))
        return controlled


# --- Crossed directions -----------------------------------------------------------------------


class CrossedProducts:
    """``U_iᵀWV_j`` of all updates i and j, summed over the tiles of W.

    Parameters
    ----------
    frames
        U and V of each update; these are the first frames of the pass.
    """

    def __init__(self, frames: Frames) -> None:
        ranks = [u.shape[1] for u, _ in frames]
        most = max(ranks)  # directions of each update that fit into `MOST_CROSSED_COLUMNS`
        while most > 1 and int(np.minimum(ranks, most).sum()) > MOST_CROSSED_COLUMNS:
            most -= 1
        counts = np.minimum(ranks, most)
        starts = np.cumsum([0, *ranks[:-1]])
        ends = np.cumsum(counts)
        self._parts = [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]
        self._columns = np.concatenate(
            [np.arange(start, start + n) for start, n in zip(starts, counts, strict=True)]
        )
        self._U = np.hstack([u[:, :n] for (u, _), n in zip(frames, counts, strict=True)])
        self._product = np.zeros((int(ends[-1]),) * 2)

    def add(
        self,
        rows: slice,
        columns: slice,  # noqa: ARG002 - images are of these columns
        block: NDArray[np.floating],  # noqa: ARG002
        images: NDArray[np.float64],
    ) -> None:
        """Add one tile."""
        self._product += self._U[rows].T @ images[:, self._columns]

    def norms(self, i: int, j: int) -> NDArray[np.float64]:
        """Return ``‖U_kᵀWV_k‖_F`` with U of update i and V of j, for all k that both have."""
        core = self._product[self._parts[i], self._parts[j]]
        n = min(core.shape)
        return np.sqrt(np.diagonal(linalg.cumulative_overlap(core[:n, :n])))


# --- Random directions through W --------------------------------------------------------------


class Sketch:
    """``W·G`` and ``Wᵀ·H`` of Gaussian G and H, summed over the tiles of W.

    Parameters
    ----------
    shape
        Of W.
    columns
        Directions of each draw.
    draws, seed
        How many draws, and their seed.
    precision
        Type of the products with W.
    """

    def __init__(
        self, shape: tuple[int, int], columns: int, draws: int, seed: int, precision: Precision
    ) -> None:
        # A stream of its own, so that the number of random directions changes nothing.
        rng = np.random.default_rng([seed, 1])
        self.columns, self.draws = columns, draws
        d_out, d_in = shape
        G, H = (rng.standard_normal((d, columns * draws)) for d in (d_in, d_out))
        self._G, self._H = G.astype(precision), H.astype(precision)
        self._WG = np.zeros((d_out, columns * draws))
        self._HW = np.zeros((columns * draws, d_in))

    def add(
        self,
        rows: slice,
        columns: slice,
        block: NDArray[np.floating],
        images: NDArray[np.float64],  # noqa: ARG002
    ) -> None:
        """Add one tile."""
        self._WG[rows] += linalg.thin_product(block, self._G[columns])
        self._HW[:, columns] += linalg.thin_left_product(self._H[rows], block)

    def frames(self) -> Frames:
        """Return ``orth(W·G)`` and ``orth(Wᵀ·H)`` of each draw.

        The first k columns of each are those of k directions: a QR decomposition is nested.
        """
        parts = [
            slice(draw * self.columns, (draw + 1) * self.columns) for draw in range(self.draws)
        ]
        return [
            (np.linalg.qr(self._WG[:, part]).Q, np.linalg.qr(self._HW[part].T).Q) for part in parts
        ]


def enrichment_through_weight(
    W: Weight | NDArray[np.floating], sketch: Sketch, weight_norm: float, precision: Precision
) -> NDArray[np.float64]:
    """Return the mean enrichment of random directions through W for every k, from a second pass."""
    projections, _, _ = project(W, sketch.frames(), precision=precision, norm=False)
    norms = [
        np.sqrt(np.diagonal(linalg.cumulative_overlap(projection.core)))
        for projection in projections
    ]
    k = np.arange(1, sketch.columns + 1)
    rms = chance.projected_norm_rms(weight_norm, W.shape, k)
    with np.errstate(divide="ignore", invalid="ignore"):  # W may be zero
        return np.asarray(np.mean(norms, axis=0) / rms)


# --- One run over its modules -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunEnrichment:
    """The enrichment of one adapter over its modules, next to its controls.

    Attributes
    ----------
    label
        The adapter.
    modules
        Number of modules.
    enrichment
        Median over the modules, with all directions of each update.
    through_weight
        Median over the modules of random directions through W, as many; NaN if not computed.
    crossed
        One value per partner and way to cross: the median over the modules that both have, with
        as many directions as both have.
    matched
        This adapter's own median over the same modules with the same number of directions, for
        each value of ``crossed``. It differs from ``enrichment`` only for partners of a lower rank
        or with fewer modules.
    """

    label: str
    modules: int
    enrichment: float
    through_weight: float
    crossed: tuple[float, ...]
    matched: tuple[float, ...]

    @property
    def median_crossed(self) -> float:
        """Median of the crossed values; NaN without one."""
        return _median(self.crossed)

    @property
    def median_matched(self) -> float:
        """Median of the own values that the crossed ones are compared with; NaN without one."""
        return _median(self.matched)

    @property
    def range_crossed(self) -> tuple[float, float]:
        """Smallest and largest crossed value; NaN without one."""
        if not self.crossed:
            return float("nan"), float("nan")
        return min(self.crossed), max(self.crossed)

    @property
    def p(self) -> float:
        """Rank of the own enrichment among the crossed values.

        ``(1 + #{crossed ≥ own})/(1 + n)``, each crossed value compared at equal k and modules,
        ties against; NaN without crossed values.
        """
        if not self.crossed:
            return float("nan")
        reached = np.array(self.crossed) >= np.array(self.matched) * (1 - _TIE)
        return (1 + int(reached.sum())) / (1 + len(self.crossed))

    @property
    def smallest_p(self) -> float:
        """The smallest p that this number of crossed values allows."""
        return 1 / (1 + len(self.crossed))

    @property
    def testable(self) -> bool:
        """True with at least `FEWEST_CROSSED` crossed values."""
        return len(self.crossed) >= FEWEST_CROSSED

    @property
    def specific(self) -> bool:
        """True if the enrichment exceeds the crossed values with p ≤ .05, and there are enough."""
        return self.testable and self.p <= SIGNIFICANT


def run_enrichments(results: Iterable[Amplification]) -> tuple[RunEnrichment, ...]:
    """Return the enrichment of each adapter over its modules, in the order of the adapters.

    Parameters
    ----------
    results
        Amplifications of any number of adapters, for example `Study.amplified`.
    """
    by_label: dict[str, list[Amplification]] = {}
    for result in results:
        by_label.setdefault(result.label, []).append(result)
    enrichments = []
    for label, modules in by_label.items():
        # Per partner and module: U × V′, U′ × V, and the update's own value at the same k.
        triples: dict[str, list[tuple[float, float, float]]] = {}
        for result in modules:
            if result.crossed is None:
                continue
            output, input_ = result.crossed.output, result.crossed.input
            for row, partner in enumerate(result.crossed.partners):
                last = int(np.count_nonzero(~np.isnan(output[row]))) - 1
                if last >= 0:
                    triple = output[row, last], input_[row, last], result.enrichment[last]
                    triples.setdefault(partner, []).append(triple)
        medians = [np.median(values, axis=0) for values in triples.values()]  # over modules
        through = [
            float(result.enrichment_through_weight[-1])
            for result in modules
            if result.enrichment_through_weight is not None
        ]
        enrichment = RunEnrichment(
            label=label,
            modules=len(modules),
            enrichment=_median([float(result.enrichment[-1]) for result in modules]),
            through_weight=_median(through),
            crossed=tuple(float(value) for row in medians for value in row[:2]),
            matched=tuple(float(row[2]) for row in medians for _ in range(2)),
        )
        enrichments.append(enrichment)
    return tuple(enrichments)


def _median(values: Sequence[float]) -> float:
    """Return the median of the values that are defined; NaN if none is."""
    defined = [value for value in values if not np.isnan(value)]
    return float(np.median(defined)) if defined else float("nan")
