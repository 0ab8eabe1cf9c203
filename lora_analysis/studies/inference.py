"""From pairs to runs: whether runs of one task agree more than runs of different tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lora_analysis import chance
from lora_analysis.errors import InputError
from lora_analysis.shared_init import InitRelation
from lora_analysis.spectra import SIDES, Side
from lora_analysis.studies.relations import base_key
from lora_analysis.text import html_facts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.studies.result import Study

QUANTITIES = ("omega", "phi_1_1", "phi_r_r", "excess_r_r", "signed_cosine")


@dataclass(frozen=True, slots=True, eq=False)
class RunInference:
    """Whether runs of one task agree more with each other than with runs of other tasks.

    Attributes
    ----------
    quantity, side, rank
        What was compared, and the one rank it was restricted to, or None.
    runs, tasks
        Labels and tasks of the runs, n of each.
    duplicates
        (left out, kept): adapters that are a run which is here already.
    similarity
        ``(n, n)``: median over modules of each pair; NaN where a pair has no value.
    permutation
        The test over relabeled runs, with the smallest p-value that n runs allow.
    within, between
        Lower quartile, median and upper quartile over pairs of one task, and of different ones.
    standard_error
        Of ``permutation.difference``, by leaving out one run at a time; None below three runs,
        and where leaving out a run leaves no pair of one task or of different ones.
    """

    quantity: str
    side: Side
    rank: int | None
    runs: tuple[str, ...]
    tasks: tuple[str, ...]
    duplicates: tuple[tuple[str, str], ...]
    similarity: NDArray[np.float64]
    permutation: chance.RunPermutation
    within: NDArray[np.float64]
    between: NDArray[np.float64]
    standard_error: float | None

    def _repr_html_(self) -> str:
        test = self.permutation
        facts = [
            ("runs, tasks", f"{self.n}, {len(set(self.tasks))}"),
            ("median between runs of one task", self.within[1]),
            ("median between runs of different tasks", self.between[1]),
            ("difference of the means", test.difference),
            ("its standard error (jackknife over runs)", self.standard_error),
            ("p, relabeling runs", test.p_value),
            ("smallest p that so few runs allow", test.smallest_p_value),
        ]
        return html_facts(f"{self.quantity}, {self.side} side", facts)

    @property
    def n(self) -> int:
        """How many runs, the unit of the test."""
        return len(self.runs)


def run_inference(
    study: Study,
    *,
    quantity: str = "omega",
    side: Side = "output",
    rank: int | None = None,
    base: str | None = None,
    draws: int = 9999,
    seed: int = 0,
) -> RunInference:
    """Return whether runs of one task agree more than runs of different tasks, over runs.

    The number of a pair of runs is its median over modules; input-side rows with a shared start
    and ill-defined φ(1, 1) do not count. Adapters that serve as the reference alone, or whose task
    or seed is not known, take no part. An adapter that is another one's run again (the same
    training run, with the same task, seed and rank) is excluded, the first one kept; any other
    pair from one training run is not two samples and has no number.

    Parameters
    ----------
    study
        Of adapters with known tasks and seeds.
    quantity
        A column of ``Study.similarities``: "omega", "phi_1_1", "phi_r_r", "excess_r_r" or
        "signed_cosine". Where modules differ in dimension, raw φ should not be taken together.
    side
        The output side says more: the input side is diluted by the initial A.
    rank
        Only runs of this rank.
    base
        Only runs of this base model, by its name.
    draws, seed
        Random relabelings, where all would be more than 20,000.

    Raises
    ------
    InputError
        An unknown quantity or side, no run left, runs of several base models, fewer than two
        tasks, or no task with two runs.

    Notes
    -----
    Relabeling takes runs as exchangeable where the task makes no difference: each may then carry
    any task's label. Runs of one task, seed and rank pattern drawn alike for every task are. Runs
    of one task and seed at different ranks are not: they share the order of the data and often
    their first directions, agree for that reason too, and make p too small. With several ranks in
    the study, ask for one at a time with ``rank``.
    """
    _check_columns(quantity, side)
    runs = _known_runs(study, rank, base)
    duplicates = _duplicates(study.pairs, runs)
    runs = runs[~runs["adapter"].isin([lost for lost, _ in duplicates])]
    labels = tuple(str(one) for one in runs["adapter"])
    tasks = tuple(str(one) for one in runs["task"])
    matrix = _matrix(study.similarities, labels, quantity, side)
    permutation = chance.permute_runs(matrix, tasks, draws=draws, seed=seed)
    codes = np.unique(tasks, return_inverse=True)[1]
    same = codes[:, None] == codes
    above = np.triu(np.ones_like(same), 1)
    return RunInference(
        quantity=quantity,
        side=side,
        rank=rank,
        runs=labels,
        tasks=tasks,
        duplicates=duplicates,
        similarity=matrix,
        permutation=permutation,
        within=_quartiles(matrix[same & above]),
        between=_quartiles(matrix[~same & above]),
        standard_error=_standard_error(matrix, codes),
    )


def _check_columns(quantity: str, side: str) -> None:
    if quantity not in QUANTITIES:
        message = f"quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}."
    elif side not in SIDES:
        message = f"side must be 'input' or 'output', got {side!r}."
    else:
        return
    raise InputError(message)


def _known_runs(study: Study, rank: int | None, base: str | None) -> pd.DataFrame:
    """Return the rows of runs that may be relabeled."""
    runs = study.runs[~study.runs["adapter"].isin(study.reference) & ~study.runs["earlier"]]
    runs = runs[runs["adapter"].isin(study.tabulated)]  # the others have no pairs
    if base is not None:
        runs = runs[runs["base_model"].map(base_key, na_action="ignore") == base_key(base)]
    known = runs.dropna(subset=["task", "seed"])
    if known.empty:
        message = (
            f"Inference over runs needs their tasks and seeds: of {len(runs)} adapters none has "
            "both. They come from the trainer's file beside the adapter, or from "
            "Provenance(task=..., seed=...)."
        )
        raise InputError(message)
    chosen = known if rank is None else known[known["rank"] == rank]
    if chosen.empty:
        found = sorted({int(one) for one in known["rank"].dropna()})
        message = f"No run has rank {rank}; the {len(known)} runs with a known task have {found}."
        raise InputError(message)
    bases = sorted({str(base_key(one)) for one in chosen["base_model"].dropna()})
    if len(bases) > 1:
        message = (
            f"The runs adapt {len(bases)} base models ({', '.join(bases[:4])}): directions of "
            "different bases have nothing to do with each other. Ask for one at a time with base=."
        )
        raise InputError(message)
    return chosen


def _duplicates(pairs: pd.DataFrame, runs: pd.DataFrame) -> tuple[tuple[str, str], ...]:
    """Return (left out, kept) of adapters that are one run."""
    # As text, so that two unknown ranks are alike.
    identity = {
        one.adapter: (str(one.task), str(one.seed), str(one.rank)) for one in runs.itertuples()
    }
    kept: dict[str, str] = {}
    for pair in pairs[pairs["initialization"] == InitRelation.SAME_RUN].itertuples():
        if pair.a in identity and identity[pair.a] == identity.get(pair.b):
            kept.setdefault(pair.b, kept.get(pair.a, pair.a))
    return tuple(kept.items())


def _matrix(
    table: pd.DataFrame, labels: Sequence[str], quantity: str, side: Side
) -> NDArray[np.float64]:
    """Return the median over modules of every pair, ``(n, n)``; NaN where there is none."""
    rows = table[table["side"] == side]
    if side == "input":
        rows = rows[~rows["shared_init"]]
    if quantity == "phi_1_1":
        rows = rows[rows["degeneracy_1_1"] == ""]
    rows = rows[
        (rows["initialization"] != InitRelation.SAME_RUN)
        & rows["a"].isin(labels)
        & rows["b"].isin(labels)
    ]
    place = {label: at for at, label in enumerate(labels)}
    matrix = np.full((len(labels), len(labels)), np.nan)
    for (a, b), value in rows.groupby(["a", "b"])[quantity].median().items():
        matrix[place[a], place[b]] = matrix[place[b], place[a]] = value
    return matrix


def _quartiles(values: NDArray[np.float64]) -> NDArray[np.float64]:
    known = values[~np.isnan(values)]
    return np.quantile(known, (0.25, 0.5, 0.75)) if known.size else np.full(3, np.nan)


def _standard_error(matrix: NDArray[np.float64], codes: NDArray[np.intp]) -> float | None:
    def difference(kept: NDArray[np.intp]) -> float:
        return chance.task_difference(matrix[np.ix_(kept, kept)], codes[kept])

    error = chance.jackknife(difference, len(codes))[1]
    return None if error is None or np.isnan(error) else error
