"""Permutation test over runs: agreement within one task against agreement between tasks."""

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
from lora_analysis.studies.base_models import runs_on_base
from lora_analysis.studies.table_rows import Degeneracy
from lora_analysis.text import html_facts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.studies.result import Study

QUANTITIES = ("omega", "phi_1_1", "phi_r_r", "excess_r_r", "signed_cosine")


@dataclass(frozen=True, slots=True, eq=False)
class RunInference:
    """Comparison of pairs of runs of one task with pairs of runs of different tasks.

    Attributes
    ----------
    quantity, side, rank
        The quantity and side that were compared, and the rank if only one was used.
    runs, tasks
        Labels and tasks of the runs, n of each.
    duplicates
        (excluded, included) labels of adapters from the same training run.
    similarity
        ``(n, n)``: median over modules of each pair; NaN for pairs without a value.
    permutation
        The test over relabeled runs, with the smallest p-value that n runs allow.
    within, between
        Lower quartile, median and upper quartile over pairs of one task, and of different tasks.
    standard_error
        Jackknife standard error of ``permutation.difference`` over runs; None with fewer than
        three runs, and if leaving out a run leaves no pair of one task or of different tasks.
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
        """Number of runs, the unit of the test."""
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
    """Test if runs of one task agree more than runs of different tasks, by permuting runs.

    The value of a pair of runs is the median over modules, without input-side rows with a shared
    initialization and without degenerate φ(1, 1). Reference adapters and adapters without a known
    task and seed are excluded. Of adapters from the same training run with the same task, seed and
    rank, only the first is used; other pairs from the same training run have no value.

    Parameters
    ----------
    study
        Study of adapters with known tasks and seeds.
    quantity
        Column of ``Study.similarities``: "omega", "phi_1_1", "phi_r_r", "excess_r_r" or
        "signed_cosine". If modules differ in dimension, raw φ should not be pooled.
    side
        The output side is more informative: the input side is diluted by the initial A.
    rank
        Use runs of this rank only.
    base
        Use runs of this base model only, by its name.
    draws, seed
        Number and seed of random relabelings if there are more than 20,000 relabelings.

    Raises
    ------
    InputError
        An unknown quantity or side, no run left, runs of several base models, fewer than two
        tasks, or no task with two runs.

    Notes
    -----
    The test assumes that runs are exchangeable if the task has no effect. That holds if seeds and
    ranks are drawn in the same way for every task. It does not hold for runs of one task and seed
    at different ranks: they share the order of the data and often their first directions, which
    makes p too small. If the study has several ranks, pass ``rank``.
    """
    _check_columns(quantity, side)
    runs = _known_runs(study, rank, base)
    duplicates = _duplicates(study.pairs, runs)
    runs = runs[~runs["adapter"].isin([excluded for excluded, _ in duplicates])]
    labels = tuple(str(label) for label in runs["adapter"])
    tasks = tuple(str(task) for task in runs["task"])
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
    """Return the rows of runs with a known task and seed that were not only a reference."""
    runs = study.runs[~study.runs["adapter"].isin(study.reference) & ~study.runs["earlier"]]
    runs = runs[runs["adapter"].isin(study.tabulated)]  # without pairs there are no values
    if base is not None:
        runs = runs[runs_on_base(study, base).loc[runs.index]]
    labeled = runs.dropna(subset=["task", "seed"])
    if labeled.empty:
        message = (
            f"Inference over runs needs their tasks and seeds: of {len(runs)} adapters none has "
            "both. They are read from the trainer's file next to the adapter, or from "
            "Provenance(task=..., seed=...)."
        )
        raise InputError(message)
    chosen = labeled if rank is None else labeled[labeled["rank"] == rank]
    if chosen.empty:
        ranks = sorted({int(value) for value in labeled["rank"].dropna()})
        message = f"No run has rank {rank}; the {len(labeled)} runs with a known task have {ranks}."
        raise InputError(message)
    bases = sorted(chosen.drop_duplicates("base_key")["base_model"].dropna())
    if len(bases) > 1:
        message = (
            f"The runs adapt {len(bases)} base models ({', '.join(bases[:4])}): directions of "
            "different bases are not comparable. Choose one with base=."
        )
        raise InputError(message)
    return chosen


def _duplicates(pairs: pd.DataFrame, runs: pd.DataFrame) -> tuple[tuple[str, str], ...]:
    """Return (excluded, included) labels of adapters from the same training run."""
    # As text, so that two unknown ranks are equal.
    identity = {
        run.adapter: (str(run.task), str(run.seed), str(run.rank)) for run in runs.itertuples()
    }
    included: dict[str, str] = {}
    for pair in pairs[pairs["initialization"] == InitRelation.SAME_RUN].itertuples():
        if pair.a in identity and identity[pair.a] == identity.get(pair.b):
            included.setdefault(pair.b, included.get(pair.a, pair.a))
    return tuple(included.items())


def _matrix(
    table: pd.DataFrame, labels: Sequence[str], quantity: str, side: Side
) -> NDArray[np.float64]:
    """Return the median over modules of every pair, ``(n, n)``; NaN without a value."""
    rows = table[table["side"] == side]
    if side == "input":
        rows = rows[~rows["shared_init"]]
    if quantity == "phi_1_1":
        rows = rows[rows["degeneracy_1_1"] == Degeneracy.NONE]
    rows = rows[
        (rows["initialization"] != InitRelation.SAME_RUN)
        & rows["a"].isin(labels)
        & rows["b"].isin(labels)
    ]
    index = {label: i for i, label in enumerate(labels)}
    matrix = np.full((len(labels), len(labels)), np.nan)
    for (a, b), value in rows.groupby(["a", "b"])[quantity].median().items():
        matrix[index[a], index[b]] = matrix[index[b], index[a]] = value
    return matrix


def _quartiles(values: NDArray[np.float64]) -> NDArray[np.float64]:
    values = values[~np.isnan(values)]
    return np.quantile(values, (0.25, 0.5, 0.75)) if values.size else np.full(3, np.nan)


def _standard_error(matrix: NDArray[np.float64], codes: NDArray[np.intp]) -> float | None:
    def difference(runs: NDArray[np.intp]) -> float:
        return chance.task_difference(matrix[np.ix_(runs, runs)], codes[runs])

    error = chance.jackknife(difference, len(codes))[1]
    return None if error is None or np.isnan(error) else error
