"""What is compared in a study, and the conclusion on each side: numbers and rules, no sentences.

Every table of comparisons, every sentence about them and the command line read these values, so
that a quantity has one value everywhere. The rules:

* A conclusion "more alike than unrelated adapters" comes from a test only: relabeled runs in a
  study with tasks and seeds, the rank among reference pairs for two adapters. A random baseline
  cannot give it, since unrelated adapters of one base exceed that too.
* The sides are tested in a fixed order, output first; the input side is tested if the output side
  shows a difference, then single ranks (Holm among them). No other correction is needed.
* Size is a statement of its own: a word for T, never below the largest T of unrelated pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis import chance
from lora_analysis.conclusions.comparison_values import (
    LEVEL,
    PAIRS_IN_WORDS,
    SIDES_IN_ORDER,
    Comparison,
    Conclusion,
    Kind,
    Level,
    Reason,
    size_in_words,
)
from lora_analysis.errors import InputError
from lora_analysis.spectra import Side
from lora_analysis.studies import Study
from lora_analysis.studies.base_models import base_keys, per_base
from lora_analysis.studies.inference import RunInference
from lora_analysis.studies.pair_classes import Exclusion, PairClass
from lora_analysis.studies.reference_levels import (
    PairOfModules,
    level_of_pair,
    module_type_strength,
)
from lora_analysis.studies.reference_test import REFERENCES_FOR_TEST, reference_test

if TYPE_CHECKING:
    import pandas as pd


def comparisons(study: Study) -> tuple[Comparison, ...]:
    """Return all comparisons of a study, base by base, the output side of each first."""
    result: list[Comparison] = []
    for base, pairs in per_base(study, study.pairs):
        on_base = _OnBase(study, base or None, pairs)
        if len(study.adapters) - len(study.reference) != 2:  # else the pair is all there is
            result += _compare_tasks(on_base)
            for side in SIDES_IN_ORDER:
                result += _describe_rank_pairs(on_base, side)
        result += _compare_pairs(on_base)
    return tuple(result)


def _describe_rank_pairs(on_base: _OnBase, side: Side) -> Iterator[Comparison]:
    """Yield the replicates at two different ranks: T and its level, without a test."""
    replicates = on_base.population("replicate", side)
    rank_pairs = on_base.rank_pairs(replicates)
    different = {pair for pair in rank_pairs if pair[0] < pair[1]}
    # As in the figure: the largest rank first, against the one closest to the paper's 8.
    for pair in sorted(different, key=lambda ranks: (-ranks[1], abs(ranks[0] - 8))):
        chosen = _select_rows(replicates, [other == pair for other in rank_pairs])
        low, high = (int(rank) for rank in pair)
        subject = f"Ranks {low} and {high} of one task, different seeds"
        comparison = on_base.describe(chosen, "ranks", subject, side, ranks=(low, high))
        if comparison.modules:
            yield comparison


class _OnBase:
    """The pairs of one base model, and what the values of a group of them are made from."""

    def __init__(self, study: Study, base: str | None, pairs: pd.DataFrame) -> None:
        self.study, self.base, self.pairs = study, base, pairs

    @cached_property
    def _rows(self) -> dict[tuple[str, str], np.ndarray]:
        return dict(self.study.similarities.groupby(["a", "b"]).indices)

    def population(self, name: str, side: Side) -> pd.DataFrame:
        """Return the pairs that count in a population."""
        return self.pairs[self.pairs[f"population_{side}"] == name]

    @cached_property
    def _rank_of(self) -> dict[str, float]:
        return dict(zip(self.study.runs["adapter"], self.study.runs["rank"], strict=True))

    def rank_pairs(self, pairs: pd.DataFrame) -> list[tuple[float, ...]]:
        """Return the ranks of both adapters of each pair, ascending; NaN if unknown."""
        names = zip(pairs["a"], pairs["b"], strict=True)
        return [tuple(sorted((self._rank_of[a], self._rank_of[b]))) for a, b in names]

    def level(
        self, side: Side, without: Sequence[tuple[str, str]] = (), ranks: tuple[int, ...] = ()
    ) -> Level | None:
        """Return T of the unrelated pairs other than some, of the same ranks if there are any."""
        rows = self.population("unrelated", side)
        rows = _select_rows(
            rows, [p not in without for p in zip(rows["a"], rows["b"], strict=True)]
        )
        if ranks:
            of_ranks = [pair == (ranks[0], ranks[-1]) for pair in self.rank_pairs(rows)]
            rows = _select_rows(rows, of_ranks) if any(of_ranks) else rows
        values = rows[f"mean_excess_{side}"].dropna()
        if values.empty:
            return None
        adapters = len(set(rows["a"]) | set(rows["b"]))
        return Level(float(values.median()), float(values.max()), len(values), adapters)

    @cached_property
    def _strengths(self) -> pd.DataFrame:
        return module_type_strength(self.study)

    def _stored_level(self, rows: pd.DataFrame, side: Side) -> Level | None:
        """Return the level of a reference file for rows of pairs of one or several rank pairs."""
        if not self.study.reference_levels or rows.empty:
            return None
        keys = base_keys(self.study)
        levels = []
        for (a, b), of_pair in rows.groupby(["a", "b"], sort=False):
            low, high = sorted((int(self._rank_of[a]), int(self._rank_of[b])))
            strengths = [self._strengths.loc[label].to_dict("index") for label in (a, b)]
            pair = PairOfModules(
                base=keys[a] or keys[b] or "",
                side=side,
                ranks=(low, high),
                module_types=of_pair["module_type"].value_counts().to_dict(),
                strengths=strengths,
            )
            level = level_of_pair(self.study.reference_levels, pair)
            if level is None:
                return None
            levels.append(level)
        medians, maxima, pairs = zip(*levels, strict=True)
        return Level(float(np.mean(medians)), max(maxima), min(pairs), None)

    def describe(
        self,
        pairs: pd.DataFrame,
        kind: Kind,
        subject: str,
        side: Side,
        *,
        ranks: tuple[int, ...] = (),
    ) -> Comparison:
        """Return a group of pairs with all of its values, without a conclusion."""
        names = list(zip(pairs["a"], pairs["b"], strict=True))
        positions = [self._rows[name] for name in names if name in self._rows]
        rows = self.study.similarities.iloc[np.concatenate(positions) if positions else []]
        rows = rows[(rows["side"] == side) & rows["usable"].astype(bool)]
        values = pairs[f"mean_excess_{side}"].dropna()
        mean = float(values.mean()) if len(values) else float("nan")
        is_pair = kind == "pair"
        level = self.level(side, names if is_pair else (), ranks) or self._stored_level(rows, side)
        defined = rows.loc[rows["degeneracy_1_1"] == "", "phi_1_1"].astype(float)
        angle = np.degrees(np.arccos(np.sqrt(np.clip(defined, 0.0, 1.0))))
        significant = rows["q_omega"] < LEVEL
        if not is_pair and len(rows):
            significant = significant.groupby([rows["a"], rows["b"]], sort=False).any()
        return Comparison(
            kind=kind,
            subject=subject,
            side=side,
            conclusion=None,
            reason=Reason.NONE,
            base=self.base,
            ranks=ranks,
            members=names[0] if is_pair else (),
            pair_class=PairClass(pairs["pair_class"].iloc[0]) if is_pair else None,
            pairs=len(values),
            modules=int(rows["module"].nunique()),
            mean_excess=mean,
            quartiles=(
                _quantile(rows["excess_omega"], 0.25),
                _quantile(rows["excess_omega"], 0.75),
            ),
            omega=_quantile(rows["omega"], 0.5),
            chance_omega=_quantile(rows["chance_omega"], 0.5),
            angle=_quantile(angle, 0.5),
            cosine=_quantile(pairs["median_cosine"].dropna(), 0.5),
            unrelated=level,
            size="" if np.isnan(mean) else size_in_words(mean, level.maximum if level else None),
            position=self._position(mean, level, side) if kind in ("pair", "ranks") else None,
            significant=(int(significant.sum()), len(significant)),
        )

    def _position(self, mean: float, level: Level | None, side: Side) -> float | None:
        """Return where T is between unrelated pairs (0) and replicates (1); None without both."""
        replicates = self.population("replicate", side)[f"mean_excess_{side}"].dropna()
        if level is None or replicates.empty:
            return None
        room = float(replicates.median()) - level.median
        return (mean - level.median) / room if room > 0 else None


def _select_rows(rows: pd.DataFrame, mask: Sequence[bool]) -> pd.DataFrame:
    """Return the rows where the mask is True; an empty list would select columns."""
    return rows[np.array(mask, dtype=bool)]


def _quantile(values: pd.Series, share: float) -> float:
    return float(values.quantile(share)) if len(values) else float("nan")


def _compare_tasks(on_base: _OnBase) -> Iterator[Comparison]:
    """Yield the test of all replicates, output side first, then that of single ranks."""
    is_different = True
    for side in SIDES_IN_ORDER:
        replicates = on_base.population("replicate", side)
        if replicates.empty:
            continue
        comparison = on_base.describe(replicates, "tasks", "Runs of one task", side)
        inference = _inference(on_base, side)
        if inference is None:
            comparison = _conclude_from_random(comparison, Reason.NO_REFERENCE)
        elif is_different:
            comparison = _conclude_from_runs(comparison, inference, inference.permutation.p_value)
        else:
            comparison = replace(
                comparison,
                conclusion=Conclusion.INCONCLUSIVE,
                reason=Reason.OUTPUT_FIRST,
                tasks=inference.tasks,
            )
        if comparison.modules:  # else the side is not tested, and is no gate for the next test
            is_different &= comparison.conclusion is Conclusion.MORE_ALIKE
        yield comparison
    yield from _compare_single_ranks(on_base, is_tested=is_different)


def _compare_single_ranks(on_base: _OnBase, *, is_tested: bool) -> Iterator[Comparison]:
    """Yield the replicates of each rank on the output side; p is adjusted over the ranks."""
    replicates = on_base.population("replicate", "output")
    rank_pairs = on_base.rank_pairs(replicates)
    every = sorted({int(low) for low, high in rank_pairs if low == high}, reverse=True)
    if len(set(rank_pairs)) < 2:
        return  # the comparison over all ranks is the same
    inferences = {rank: _inference(on_base, "output", rank) for rank in every}
    tested = {rank: test for rank, test in inferences.items() if test is not None}
    adjusted = dict(
        zip(
            tested,
            chance.holm([test.permutation.p_value for test in tested.values()]),
            strict=True,
        )
    )
    for rank in every:
        of_rank = _select_rows(replicates, [pair == (rank, rank) for pair in rank_pairs])
        subject = f"Runs of one task at rank {rank}"
        comparison = on_base.describe(of_rank, "rank", subject, "output", ranks=(rank,))
        if rank not in tested:
            yield _conclude_from_random(comparison, Reason.NONE_AT_RANK)
        elif is_tested:
            yield _conclude_from_runs(comparison, tested[rank], float(adjusted[rank]))
        else:
            yield replace(
                comparison,
                conclusion=Conclusion.INCONCLUSIVE,
                reason=Reason.RANKS_LAST,
                tasks=tested[rank].tasks,
            )


def _inference(on_base: _OnBase, side: Side, rank: int | None = None) -> RunInference | None:
    """Return the permutation test; None if the runs do not allow one."""
    try:
        inference = on_base.study.run_inference(side=side, rank=rank, base=on_base.base)
    except InputError:
        return None  # one task, or one run of each
    return inference if inference.within.size and inference.between.size else None


def _conclude_from_runs(comparison: Comparison, inference: RunInference, p: float) -> Comparison:
    """Return the comparison with the conclusion from the permutation test."""
    test = inference.permutation
    reason = Reason.NONE
    if test.smallest_p_value > LEVEL:
        conclusion, reason = Conclusion.TOO_FEW_RUNS, Reason.FEW_RUNS
    elif p > LEVEL:
        conclusion = Conclusion.NOT_DISTINGUISHABLE
    elif inference.has_all_tasks_apart:
        conclusion = Conclusion.MORE_ALIKE
    else:
        conclusion, reason = Conclusion.INCONCLUSIVE, Reason.UNEQUAL_TASKS
    return replace(
        comparison,
        conclusion=conclusion,
        reason=reason,
        p=p,
        smallest_p=test.smallest_p_value,
        tasks=inference.tasks,
    )


def _conclude_from_random(comparison: Comparison, reason: Reason) -> Comparison:
    """Return the comparison with the conclusion against random subspaces.

    Of one pair, one module with q < 0.05 is enough: under the global null, q falls below 0.05 in
    any module in 5 % of pairs. Of several pairs, at least half must have such a module.
    """
    count, total = comparison.significant
    if not total:
        return replace(
            comparison, conclusion=Conclusion.INCONCLUSIVE, reason=Reason.NO_USABLE_MODULE
        )
    if reason is Reason.NO_REFERENCE and comparison.unrelated is not None:
        reason = Reason.LEVEL_ONLY
    exceeds = count > 0 if comparison.kind == "pair" else 2 * count >= total
    return replace(
        comparison,
        conclusion=Conclusion.MORE_ALIKE_THAN_RANDOM
        if exceeds
        else Conclusion.NOT_DISTINGUISHABLE_FROM_RANDOM,
        reason=reason,
    )


def _compare_pairs(on_base: _OnBase) -> Iterator[Comparison]:
    """Yield pairs of unknown relation, and the only pair of a study whatever its relation."""
    study = on_base.study
    analyzed = [label for label in study.adapters if label not in study.reference]
    of_study = on_base.pairs[on_base.pairs["a"].isin(analyzed) & on_base.pairs["b"].isin(analyzed)]
    if len(analyzed) > 2:
        of_study = of_study[of_study["pair_class"] == PairClass.UNKNOWN]
        excluded = study.runs.loc[study.runs["excluded"] != Exclusion.NONE, "adapter"]
        of_study = of_study[~of_study["a"].isin(excluded) & ~of_study["b"].isin(excluded)]
    of_study = of_study[of_study["modules"] > 0]
    if len(of_study) > PAIRS_IN_WORDS:
        count = len(set(of_study["a"]) | set(of_study["b"]))
        subject = f"{count} adapters of unknown relation"
        for side in SIDES_IN_ORDER:
            comparison = on_base.describe(of_study, "adapters", subject, side)
            yield _conclude_from_random(comparison, Reason.NO_REFERENCE)
        return
    for i in range(len(of_study)):
        output = _compare_pair(on_base, of_study.iloc[[i]], "output", None)
        yield output
        yield _compare_pair(on_base, of_study.iloc[[i]], "input", output)


_WITHOUT_TEST: Final = {
    PairClass.DIFFERENT_BASE: Reason.DIFFERENT_BASE,
    PairClass.CHECKPOINT: Reason.ONE_SAMPLE,
    PairClass.STARTED_FROM_BASE: Reason.STARTED_FROM_BASE,
    PairClass.CONTAINED: Reason.ONE_SAMPLE,
    PairClass.SAME_RUN: Reason.ONE_SAMPLE,
    PairClass.WRONG_LABEL: Reason.WRONG_LABEL,
    PairClass.GRADIENTS_ALIKE: Reason.SHARED_START,
    PairClass.SAME_DATA_ORDER: Reason.SHARED_SEED,
    PairClass.SAME_SEED: Reason.SHARED_SEED,
}


def _compare_pair(
    on_base: _OnBase, pair: pd.DataFrame, side: Side, output: Comparison | None
) -> Comparison:
    """Return the conclusion on one pair; that on its output side is given for the input side."""
    row = pair.iloc[0]
    comparison = on_base.describe(pair, "pair", f"{row.a} and {row.b}", side)
    of_pair = PairClass(row["pair_class"])
    if of_pair in (PairClass.NEAR_DUPLICATE, PairClass.NEGATED_COPY):
        return replace(comparison, conclusion=Conclusion.NEAR_DUPLICATE, reason=Reason.ONE_SAMPLE)
    if of_pair in _WITHOUT_TEST:
        return replace(
            comparison, conclusion=Conclusion.INCONCLUSIVE, reason=_WITHOUT_TEST[of_pair]
        )
    if not comparison.modules:
        return replace(
            comparison, conclusion=Conclusion.INCONCLUSIVE, reason=Reason.NO_USABLE_MODULE
        )
    if side == "input" and of_pair is PairClass.SHARED_INIT:
        return replace(comparison, conclusion=Conclusion.INCONCLUSIVE, reason=Reason.SHARED_START)
    if of_pair is PairClass.BASE_NOT_KNOWN:  # what references are unrelated to is not known
        return _conclude_from_random(comparison, Reason.BASE_NOT_KNOWN)
    test = reference_test(on_base.study, str(row.a), str(row.b), side)
    if test is None:
        return _conclude_from_random(comparison, Reason.NO_REFERENCE)
    comparison = replace(comparison, reference_test=test)
    if len(test.references) < REFERENCES_FOR_TEST:
        return replace(
            comparison,
            conclusion=Conclusion.TOO_FEW_RUNS,
            reason=Reason.FEW_REFERENCES,
            smallest_p=test.smallest_p_value,
        )
    if test.out_of_range:
        return replace(
            comparison, conclusion=Conclusion.INCONCLUSIVE, reason=Reason.TRAINING_STRENGTH
        )
    if side == "input":
        passed = output is not None and output.conclusion is Conclusion.MORE_ALIKE
        if not passed or test.shares_start:
            return replace(
                comparison,
                conclusion=Conclusion.INCONCLUSIVE,
                reason=Reason.OUTPUT_FIRST if not passed else Reason.SHARED_START,
            )
    is_alike = test.p_value <= LEVEL
    return replace(
        comparison,
        conclusion=Conclusion.MORE_ALIKE if is_alike else Conclusion.NOT_DISTINGUISHABLE,
        p=test.p_value,
        smallest_p=test.smallest_p_value,
    )
