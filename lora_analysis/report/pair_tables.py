"""The tables of a report about pairs: verdicts, overlaps, starts, seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.conclusions import Finding, number
from lora_analysis.report.tables import ReportTable, cell
from lora_analysis.shared_init import InitRelation
from lora_analysis.studies import Relation
from lora_analysis.studies.base_models import per_base, several_bases

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """Return medians of φ and ω by relation, side and pair of ranks, chance beside each."""
    if study.similarities.empty:
        return None
    ranks = study.spectra.groupby("adapter")["rank"].max()
    table = study.similarities.assign(
        ranks=[
            "/".join(map(str, sorted((ranks[a], ranks[b]))))
            for a, b in zip(study.similarities["a"], study.similarities["b"], strict=True)
        ]
    )
    table = table[table["initialization"] != InitRelation.SAME_RUN]  # one sample, no pair
    rows = []
    for base, of_base in per_base(study, table):
        for relation in _ORDER:
            for side in ("output", "input"):
                own = of_base[(of_base["relation"] == relation) & (of_base["side"] == side)]
                for (pair_ranks, d), group in own.groupby(["ranks", "dimension"], sort=False):
                    row = _overlap_row(relation, side, f"{pair_ranks}", str(d), group)
                    rows.append((base, *row) if base else row)
    several = ("base",) if several_bases(study) else ()
    columns = (*several, "relation", "side", "ranks", "d", "pairs", "φ(1,1)", "chance",
               "φ(r,r)", "chance", "ω", "chance")  # fmt: skip
    caption = (
        "Medians over modules and pairs, without pairs that are one run. d: dimension of the "
        "space; ω: energy-weighted overlap. "
        f"“{Relation.REFERENCE}” is the reference; “{Relation.SHARED_SEED}” shares its initial A, "
        "so its input side "
        "is an artifact."
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
    """Return every pair: how it is related, how it started, how alike it is in all."""
    if study.pairs.empty:
        return None
    cells = ("phi_1_1", "output"), ("phi_1_1", "input"), ("omega", "output"), ("omega", "input")
    medians = study.similarities.groupby(["a", "b", "side"])[["phi_1_1", "omega"]].median()
    known = medians.to_dict("index")
    rows = []
    for pair in study.pairs.itertuples():
        found = (known.get((pair.a, pair.b, side), {}).get(value) for value, side in cells)
        shown = ("–" if one is None else number(one) for one in found)
        total = cell(float(pair.total_cosine))
        rows.append((pair.a, pair.b, pair.relation, pair.initialization, *shown, total))
    columns = ("adapter", "adapter", "relation", "initialization", "φ(1,1) out", "φ(1,1) in",
               "ω out",
               "ω in", "cosine")  # fmt: skip
    caption = (
        "Medians over modules; cosine: signed cosine of the two whole updates. Start: whether the "
        "two began from the same initial A."
    )
    return ReportTable("pairs", caption, columns, tuple(rows), 4)


_VERDICTS = {
    "share": "shared",
    "partly": "partly shared",
    "no more": "no more than unrelated",
    None: "no verdict",
}


def verdicts_table(said: Sequence[Finding]) -> ReportTable | None:
    """Return every comparison in one look, those too that share a sentence."""
    rows = []
    single = [part for whole in said for part in (whole.parts or (whole,))]
    for one in single:
        values = one.values
        for side in ("output", "input"):
            if f"phi_1_1_{side}" in values and "subject" in values:
                names = ("phi_1_1", "reference", "chance")
                numbers = (_small(values[f"{name}_{side}"]) for name in names)
                verdict = _VERDICTS[values[f"verdict_{side}"]]
                above = values[f"above_reference_95_{side}"]
                share = "–" if above is None else f"{above} of {values[f'values_{side}']}"
                subject = str(values["subject"])
                rows.append((subject, side, verdict, share, *map(cell, numbers)))
    if not rows:
        return None
    excess = any(one.values.get("above_chance_output") for one in single)
    name = "φ(1,1) above chance" if excess else "φ(1,1)"
    columns = ("comparison", "side", "first direction", "above 95 % of unrelated", name,
               "unrelated pairs", "chance")  # fmt: skip
    caption = (
        f"Medians of {name} over modules and pairs, beside those of the reference. The verdict "
        "rests on how many of the values, one per module and pair, lie above 95 % of the "
        "reference's: shared from half on (and every pair's median above every reference pair's), "
        "partly shared from a quarter on, where 5 % do among unrelated pairs."
    )
    return ReportTable("verdicts", caption, columns, tuple(rows), 3)


def _small(value: Any) -> Any:
    """Return a number to five decimals: above chance, nothing is 0 and not −1e-6."""
    return round(value, 5) + 0.0 if isinstance(value, float) else value


def starts_table(study: Study) -> ReportTable | None:
    """Return the pairs that do not start independently; None where all do."""
    pairs = study.pairs
    if pairs.empty:
        return None
    own = pairs[
        ~pairs["initialization"].isin([InitRelation.INDEPENDENT, InitRelation.NOT_APPLICABLE])
    ]
    if own.empty:
        return None
    rows = tuple(
        (one.a, one.b, one.relation, one.initialization,
         f"{one.shared_init_modules} of {one.modules}",
         cell(float(one.b_cosine if one.b_cosine is not None else np.nan)))
        for one in own.itertuples()
    )  # fmt: skip
    columns = ("adapter", "adapter", "relation", "initialization", "modules", "cosine of B")
    caption = (
        "Pairs that share their initial A, in how many modules, and how alike their B became "
        "(median matched cosine)."
    )
    return ReportTable("starts", caption, columns, rows, 4)


def runs_table(study: Study) -> ReportTable | None:
    """Return how much the overlap of runs spreads over seeds, by task and rank."""
    table = study.similarities
    table = table[(table["relation"] == "same task, different seed") & (table["side"] == "output")]
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
        (base, *key, own)
        for base, of_base in per_base(study, pairs)
        for key, own in of_base.groupby(["task", "rank"], sort=False)
    )
    for base, task, rank, own in groups:
        seeds = len(set(own["a"]) | set(own["b"]))
        low, high = own["omega"].quantile([0.25, 0.75])
        spread = f"{number(low)} to {number(high)}" if seeds >= 3 else "–"
        medians = (number(float(own[name].median())) for name in measured)
        row = (str(task), str(int(rank)), str(seeds), *medians, spread)
        rows.append((base, *row) if several else row)
    columns = (
        *several,
        "task",
        "rank",
        "seeds",
        "φ(1,1)",
        "chance",
        "ω",
        "chance",
        "quartiles of ω",
    )
    caption = (
        "Two seeds of one task and rank, output side: medians over modules, then over pairs of "
        "runs, each beside isotropic chance. Quartiles over pairs of runs from three seeds on."
    )
    return ReportTable("seeds", caption, columns, tuple(rows), 1 + len(several))
