"""Tables of a report about pairs: conclusions, overlaps, initializations, seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.conclusions import comparisons
from lora_analysis.conclusions.comparisons import SIDES_IN_ORDER
from lora_analysis.report.tables import ReportTable, cell
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation
from lora_analysis.studies.base_models import per_base, several_bases
from lora_analysis.text import number, overlap_number

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies import Study

_ORDER = (
    Relation.REPEATED,
    Relation.OTHER_RANK,
    Relation.OTHER_SEED,
    Relation.OTHER_RANK_AND_SEED,
    Relation.SHARED_SEED_OTHER_RANK,
    Relation.UNKNOWN,
)


def overlap_table(study: Study) -> ReportTable | None:
    """Return medians of φ and ω by relation, side and pair of ranks, each with its baseline."""
    if study.similarities.empty:
        return None
    ranks = study.spectra.groupby("adapter")["rank"].max()
    table = study.similarities.assign(
        ranks=[
            "/".join(map(str, sorted((ranks[a], ranks[b]))))
            for a, b in zip(study.similarities["a"], study.similarities["b"], strict=True)
        ]
    )
    table = table[table["initialization"] != InitRelation.SAME_RUN]  # one sample, not a pair
    rows = []
    for base, of_base in per_base(study, table):
        for relation in _ORDER:
            for side in SIDES_IN_ORDER:
                chosen = of_base[(of_base["relation"] == relation) & (of_base["side"] == side)]
                for (pair_ranks, d), group in chosen.groupby(["ranks", "dimension"], sort=False):
                    row = _overlap_row(relation, side, f"{pair_ranks}", str(d), group)
                    rows.append((base, *row) if base else row)
    several = ("base",) if several_bases(study) else ()
    columns = (*several, "relation", "side", "ranks", "d", "pairs", "φ(1,1)", "random",
               "φ(r,r)", "random", "ω", "random")  # fmt: skip
    caption = (
        "Medians over modules and pairs, without pairs from one training run; random: the random "
        "baseline; d: dimension of the space; ω: energy-weighted overlap. "
        f"“{Relation.OTHER_TASK}” is the reference; “{Relation.SHARED_SEED}” shares the initial A, "
        "so the input side is an artifact."
    )
    return ReportTable("overlaps", caption, columns, tuple(rows), 3 + len(several))


def _overlap_row(
    relation: str, side: str, ranks: str, dimension: str, group: pd.DataFrame
) -> tuple[str, ...]:
    values = ("phi_1_1", "chance_1_1", "phi_r_r", "chance_r_r", "omega", "chance_omega")
    pairs = group.groupby(["a", "b"]).ngroups
    return (
        relation,
        side,
        ranks,
        dimension,
        str(pairs),
        *(number(group[v].median()) for v in values),
    )


def pairs_table(study: Study) -> ReportTable | None:
    """Return every pair: relation, initialization, overlap, and cosine of the whole updates."""
    if study.pairs.empty:
        return None
    cells = ("phi_1_1", "output"), ("phi_1_1", "input"), ("omega", "output"), ("omega", "input")
    medians = study.similarities.groupby(["a", "b", "side"])[["phi_1_1", "omega"]].median()
    overlaps = medians.to_dict("index")
    rows = []
    for pair in study.pairs.itertuples():
        values = (overlaps.get((pair.a, pair.b, side), {}).get(value) for value, side in cells)
        texts = ("–" if value is None else number(value) for value in values)
        total = cell(float(pair.total_cosine))
        rows.append((pair.a, pair.b, pair.relation, pair.initialization, *texts, total))
    columns = ("adapter", "adapter", "relation", "initialization", "φ(1,1) output",
               "φ(1,1) input", "ω output", "ω input", "cosine")  # fmt: skip
    caption = (
        "Medians over modules. Initialization: relation of the two initial A; cosine: signed "
        "cosine of the two whole updates."
    )
    return ReportTable("pairs", caption, columns, tuple(rows), 4)


def comparisons_table(study: Study) -> ReportTable | None:
    """Return every comparison of a study, one row per side; None without any."""
    rows = []
    for comparison in comparisons(study):
        level = comparison.unrelated
        rows.append(
            (
                comparison.subject,
                comparison.side,
                str(comparison.conclusion or "described only"),
                overlap_number(comparison.mean_excess),
                overlap_number(level.median) if level else "–",
            )
        )
    columns = ("comparison", "side", "conclusion", "T", "unrelated")
    return ReportTable("comparisons", "T.", columns, tuple(rows), 3) if rows else None


def initializations_table(study: Study) -> ReportTable | None:
    """Return the pairs whose initializations are not independent; None if all are."""
    ordinary = (InitRelation.INDEPENDENT, InitRelation.NOT_APPLICABLE)
    pairs = study.pairs[~study.pairs["initialization"].isin(ordinary)]
    if pairs.empty:
        return None
    rows = tuple(
        (pair.a, pair.b, pair.relation, pair.initialization,
         f"{pair.shared_init_modules} of {pair.modules}",
         cell(float(pair.b_cosine if pair.b_cosine is not None else np.nan)))
        for pair in pairs.itertuples()
    )  # fmt: skip
    columns = ("adapter", "adapter", "relation", "initialization", "modules", "cosine of B")
    caption = (
        "Pairs with a shared initialization of A: the modules that share it, and the median "
        "matched cosine of B."
    )
    return ReportTable("initializations", caption, columns, rows, 4)


def seeds_table(study: Study) -> ReportTable | None:
    """Return the overlap of runs with different seeds, and its spread, by task and rank."""
    table = study.similarities
    table = table[(table["relation"] == Relation.OTHER_SEED) & (table["side"] == "output")]
    table = table[table["initialization"] != InitRelation.SAME_RUN]
    if table.empty:
        return None
    runs = study.runs.set_index("adapter")
    measured = ["phi_1_1", "chance_1_1", "omega", "chance_omega"]
    pairs = table.groupby(["a", "b"], sort=False)[measured].median().reset_index()
    pairs = pairs.assign(task=pairs["a"].map(runs["task"]), rank=pairs["a"].map(runs["rank"]))
    rows = []
    several = ("base",) if several_bases(study) else ()
    groups = (
        (base, *key, rows_of_rank)
        for base, of_base in per_base(study, pairs)
        for key, rows_of_rank in of_base.groupby(["task", "rank"], sort=False)
    )
    for base, task, rank, group in groups:
        seeds = len(set(group["a"]) | set(group["b"]))
        low, high = group["omega"].quantile([0.25, 0.75])
        spread = f"{number(low)} to {number(high)}" if seeds >= 3 else "–"
        medians = (number(float(group[name].median())) for name in measured)
        row = (str(task), str(int(rank)), str(seeds), *medians, spread)
        rows.append((base, *row) if several else row)
    columns = (
        *several,
        "task",
        "rank",
        "seeds",
        "φ(1,1)",
        "random",
        "ω",
        "random",
        "quartiles of ω",
    )
    caption = (
        "Two seeds of one task and rank, output side: medians over modules, then over pairs of "
        "runs, each next to the random baseline. Quartiles are over pairs of runs, from three "
        "seeds on."
    )
    return ReportTable("seeds", caption, columns, tuple(rows), 1 + len(several))
