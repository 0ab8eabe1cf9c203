"""Do two adapters share their initial factor? The artefact that makes strangers look alike.

A moves little in training. Two unrelated adapters whose scripts ran with the same seed share
their initial A and so most of their input directions: overlaps of 0.93 to 0.998 on real pairs
whose output sides agree no better than chance. The rule below tells such pairs from independent
ones by the rows of A themselves, one by one, which no learning brings into line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from lora_analysis.adapter import LowRankUpdate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

StartKind = Literal[
    "independent",  # no module shares its start
    "partly shared",  # some modules do; they do not count on the input side
    "same initial A",  # all do, and B was learned apart: same script, same seed
    "same run",  # all do, and B agrees too: one run twice, or one continued
    "same input space",  # rows differ, their span does not: resized, or an init from data or W
    "undecidable",  # rank 1 on both sides leaves nothing to compare the rows with
    "not applicable",  # no low-rank factors
]

# A pair of spans this alike without alike rows was not found among independent adapters.
SAME_SPACE = 0.7
# Median cosine of the other factor from which two adapters are not two samples.
SAME_RUN = 0.4


@dataclass(frozen=True, slots=True)
class ModuleStart:
    """The evidence from one module.

    Attributes
    ----------
    row_cosine
        c: mean cosine of row k of one initial factor with row k of the other.
    cross_cosine
        q: root mean square cosine of rows k and l ≠ k; None where both ranks are 1.
    z
        ``√n·c/max(q, 1/√d)`` over the n common rows; None where q is.
    other_cosine
        Mean cosine of column k with column k of the other factor (B).
    shared
        Whether the module starts from the same rows.
    """

    module: str
    ranks: tuple[int, int]
    row_cosine: float
    cross_cosine: float | None
    z: float | None
    other_cosine: float
    shared: bool


@dataclass(frozen=True, slots=True)
class SharedStart:
    """The verdict on a pair of adapters.

    Attributes
    ----------
    kind
        One of the outcomes; see the module's text.
    modules
        Names of the modules that share their start, in order.
    compared
        How many modules were compared.
    other_cosine
        Median over the shared modules of the matched cosine of B; None if there are none.
    """

    kind: StartKind
    modules: tuple[str, ...]
    compared: int
    other_cosine: float | None = None

    @property
    def contaminates_input(self) -> bool:
        """True where an input-side overlap of all modules may come from the start alone."""
        return self.kind in ("same initial A", "same run", "same input space")


def _unit_rows(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    rows = matrix.astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)


def module_start(a: LowRankUpdate, b: LowRankUpdate) -> ModuleStart:
    """Return the evidence that ``a`` and ``b`` started from the same rows of A.

    Parameters
    ----------
    a, b
        Updates of one module with the same d_in. B may be untrained.

    Notes
    -----
    c alone is not enough: learned rows correlate with each other. q, the same cosine over rows
    that do not belong together, is what independent rows of these very factors give.
    """
    cosines = _unit_rows(a.A) @ _unit_rows(b.A).T  # (r₁, r₂)
    n = min(cosines.shape)
    matched = float(np.mean(np.diagonal(cosines)))
    columns = _unit_rows(a.B.T[:n]) * _unit_rows(b.B.T[:n]) if a.shape == b.shape else np.zeros(1)
    off = np.eye(*cosines.shape) == 0
    cross = z = None
    # The same rows to the last digits need no statistics: a file against itself, or a frozen A.
    shared = matched > 1 - 1e-6
    if off.any():
        cross = float(np.sqrt(np.mean(cosines[off] ** 2)))
        z = float(np.sqrt(n) * matched / max(cross, 1 / np.sqrt(a.shape[1])))
        shared |= (matched >= 0.2 and z >= 5) or (matched >= 0.5 and z >= 4)
    return ModuleStart(
        module=a.name,
        ranks=(a.rank, b.rank),
        row_cosine=matched,
        cross_cosine=cross,
        z=z,
        other_cosine=float(np.sum(columns) / n),
        shared=bool(shared),
    )


def _rank_one_verdict(starts: Sequence[ModuleStart]) -> SharedStart:
    """Judge a pair whose ranks are 1: only many modules of one sign can show a shared start."""
    cosines = np.array([start.row_cosine for start in starts])
    strong = np.abs(cosines) >= 0.5
    if strong.sum() >= 6 and abs(np.sign(cosines[strong]).sum()) == strong.sum():
        flagged = [start for start, is_strong in zip(starts, strong, strict=True) if is_strong]
        return _verdict(flagged, len(starts))
    return SharedStart("undecidable", (), len(starts))


def _verdict(flagged: Sequence[ModuleStart], compared: int) -> SharedStart:
    names = tuple(start.module for start in flagged)
    other = float(np.median([start.other_cosine for start in flagged]))
    if len(flagged) < compared:
        return SharedStart("partly shared", names, compared, other)
    kind: StartKind = "same run" if other >= SAME_RUN else "same initial A"
    return SharedStart(kind, names, compared, other)


def judge_start(
    starts: Sequence[ModuleStart], input_similarity: Sequence[float] = ()
) -> SharedStart:
    """Return the verdict on a pair of adapters from the evidence of their common modules.

    Parameters
    ----------
    starts
        One `ModuleStart` per common low-rank module. Among others, modules of rank 1 on both
        sides are passed over: alone they cannot tell.
    input_similarity
        φ_input(r, r) of the same modules, to recognise the same span under other rows. Values
        where a rank comes near the dimension should be left out: they are large by chance.
    """
    if not starts:
        return SharedStart("not applicable", (), 0)
    decidable = [start for start in starts if start.ranks != (1, 1)]
    if not decidable:
        return _rank_one_verdict(starts)
    flagged = [start for start in decidable if start.shared]
    if flagged:
        return _verdict(flagged, len(decidable))
    if len(input_similarity) and float(np.median(input_similarity)) >= SAME_SPACE:
        return SharedStart("same input space", (), len(decidable))
    return SharedStart("independent", (), len(decidable))
