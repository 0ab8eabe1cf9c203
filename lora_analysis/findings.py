"""Plain sentences made from a study's numbers.

Each sentence carries its value, its reference and its chance. Medians over modules lead, pairs of
adapters are the unit, and a verdict is made against a reference (adapters of other tasks with
other seeds on the same modules), never against isotropic chance: unrelated adapters exceed that
too. Cells whose direction is ill defined, and input sides that share their start, do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora_analysis.studies import REFERENCE, SHARED_SEED, Study

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.spectra import Side

Kind = Literal["result", "reference", "artefact", "limit", "failure"]

# Pairs of unknown relation are described one by one up to this many, then together.
PAIRS_IN_WORDS = 6


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence (or two) about a study, with the numbers in it.

    Attributes
    ----------
    kind
        ``"result"``; ``"reference"`` (what unrelated adapters give); ``"artefact"`` (a number
        that has another cause than learning); ``"limit"`` (what cannot be said); ``"failure"``.
    topic
        What it is about, one or two words.
    """

    kind: Kind
    topic: str
    text: str
    values: Mapping[str, float | int | str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Level:
    """One number over a group of pairs.

    Attributes
    ----------
    median, low, high
        Median and quartiles over all modules of all pairs.
    pair_medians
        Median over modules, for each pair: the unit of every verdict.
    modules, left_out
        Modules per pair, and how many cells did not count.
    """

    median: float
    low: float
    high: float
    pair_medians: tuple[float, ...]
    modules: int
    left_out: int

    @property
    def pairs(self) -> int:
        """How many pairs have a value."""
        return len(self.pair_medians)


def number(value: float) -> str:
    """Return a number as a sentence shows it: two digits that matter, no exponent where short."""
    if not np.isfinite(value):
        return "undefined"
    if value == 0:
        return "0"
    if 0.1 <= abs(value) < 1000:
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.2g}" if 1e-4 <= abs(value) < 0.1 else f"{value:.1e}"


def plural(count: int, word: str) -> str:
    """Return ``"1 pair"``, ``"2 pairs"``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def level(rows: pd.DataFrame, value: str) -> Level | None:
    """Return the level of one column over rows of ``Study.similarities``; None if none count."""
    counted = rows
    if value == "phi_1_1":
        counted = counted[counted["ill_defined_1_1"] == ""]
    counted = counted[~(counted["shared_start"] & (counted["side"] == "input"))]
    if counted.empty:
        return None
    low, median, high = np.quantile(counted[value], [0.25, 0.5, 0.75])
    by_pair = counted.groupby(["a", "b"], sort=False)[value]
    return Level(
        float(median),
        float(low),
        float(high),
        tuple(float(one) for one in by_pair.median()),
        int(by_pair.size().max()),
        len(rows) - len(counted),
    )


def _chance(rows: pd.DataFrame, value: str) -> float:
    column = {"phi_1_1": "chance_1_1", "phi_r_r": "chance_r_r", "omega": "omega_chance"}[value]
    return float(rows[column].median())


def _verdict(found: Level, reference: Level) -> str:
    """Return what the pair medians say against those of the reference."""
    above = sum(one > max(reference.pair_medians) for one in found.pair_medians)
    if above == found.pairs:
        return "above every reference pair"
    if found.median > reference.high and above:
        return f"above every reference pair in {above} of {found.pairs} pairs"
    if found.median > reference.high:
        return "above most reference values, but not clear of them"
    return "no more alike than unrelated adapters"


def _ranks(rows: pd.DataFrame, study: Study) -> str:
    ranks = study.runs.set_index("adapter")["rank"]
    pairs = {tuple(sorted((ranks[a], ranks[b]))) for a, b in zip(rows["a"], rows["b"], strict=True)}
    return ", ".join(f"{int(a)}/{int(b)}" for a, b in sorted(pairs))


def _side_clause(study: Study, rows: pd.DataFrame, side: Side) -> tuple[str, dict[str, Any]]:
    """Return "output side: median φ(1,1) 0.61 ..., reference 0.04, chance 0.005: verdict"."""
    own = rows[rows["side"] == side]
    found = level(own, "phi_1_1")
    if found is None:
        return f"on the {side} side no first direction is well defined", {}
    reference = level(study.select(REFERENCE, side), "phi_1_1")
    chance = _chance(own, "phi_1_1")
    text = (
        f"median φ(1,1) on the {side} side {number(found.median)} "
        f"(quartiles {number(found.low)} to {number(found.high)})"
    )
    values: dict[str, Any] = {
        f"phi_1_1_{side}": found.median,
        f"chance_{side}": chance,
        f"pairs_{side}": found.pairs,
        f"modules_{side}": found.modules,
    }
    if reference is None:
        return f"{text}, isotropic chance {number(chance)}", values
    values[f"reference_{side}"] = reference.median
    values[f"verdict_{side}"] = verdict = _verdict(found, reference)
    return (
        f"{text}, other tasks {number(reference.median)}, isotropic chance {number(chance)}: "
        f"{verdict}"
    ), values


def _shared_words(values: Mapping[str, Any]) -> str:
    """Return which first direction a group shares, in words no stronger than the verdicts."""
    clear = [
        side
        for side in ("output", "input")
        if values.get(f"verdict_{side}") == "above every reference pair"
    ]
    if len(clear) == 2:
        return "share their first output and input direction"
    if clear:
        return f"share their first {clear[0]} direction"
    return "do not clearly share a first direction"


def _compared(study: Study, rows: pd.DataFrame, who: str, topic: str) -> Finding:
    clauses, values = [], {}
    for side in ("output", "input"):
        clause, numbers = _side_clause(study, rows, side)  # type: ignore[arg-type]
        clauses.append(clause)
        values.update(numbers)
    pairs = plural(rows.groupby(["a", "b"]).ngroups, "pair")
    modules = plural(int(rows["module"].nunique()), "module")
    numbers = "; ".join(clauses)
    if any(key.startswith("verdict") for key in values):
        text = f"{who} {_shared_words(values)} ({pairs}, {modules}): {numbers}."
    else:
        text = f"{who} ({pairs}, {modules}): {numbers}. No reference, so no verdict."
    return Finding("result", topic, text, values)


def _failures(study: Study) -> Iterator[Finding]:
    for one in study.failures:
        text = f"{one.source} could not be analysed: {one.reason}"
        yield Finding("failure", "not analysed", text, {"source": one.source})


def _untrained(study: Study) -> Iterator[Finding]:
    for row in study.runs.itertuples():
        missing = row.modules - row.trained_modules
        if not missing:
            continue
        which = "all" if missing == row.modules else str(missing)
        text = (
            f"{row.adapter} is untrained: ΔW is zero in all {plural(row.modules, 'module')}, so it "
            "has no directions and takes part in no comparison."
            if which == "all"
            else f"{row.adapter}: ΔW is zero in {missing} of {plural(row.modules, 'module')}; they "
            "have no directions and are left out."
        )
        yield Finding("limit", "untrained", text, {"adapter": row.adapter, "modules": missing})


def _file_notes(study: Study) -> Iterator[Finding]:
    for adapter in study.adapters.values():
        for note in adapter.provenance.findings:
            yield Finding("limit", "file", f"{adapter.label}: {note}", {"adapter": adapter.label})


def _mismatched(study: Study) -> Iterator[Finding]:
    for row in study.pairs.itertuples():
        if row.mismatched_modules:
            text = (
                f"{row.a} and {row.b} differ in shape in {plural(row.mismatched_modules, 'module')} of "
                "the same name: they adapt different base models and are not compared there."
            )
        elif not row.modules:
            text = f"{row.a} and {row.b} adapt no module in common: nothing can be compared."
        else:
            continue
        yield Finding("limit", "nothing in common", text, {"a": row.a, "b": row.b})


def _starts(study: Study) -> Iterator[Finding]:
    """Say which pairs are not two samples, or share their start, where no seed explains it."""
    words = {
        "same run": "start from the same A and their B agrees too (median matched cosine {b}): one "
        "run, a continued run, or the same seed on the same task. They are one sample, not two.",
        "same initial A": "start from the same A in all {n} modules (same script, same seed), "
        "while B was learned apart (median matched cosine {b}). Their input-side overlap comes "
        "from the start and counts nowhere.",
        "partly shared": "start from the same A in {n} of {m} modules; these are left out on the "
        "input side.",
        "same input space": "span the same input space under other rows (a resized copy, or an "
        "init from data or from W). Their input-side overlap is not learned.",
        "undecidable": "have rank 1: whether they share their start cannot be told.",
    }
    for row in study.pairs.itertuples():
        if row.start not in words or row.relation == SHARED_SEED:
            continue
        told = words[row.start].format(
            b=number(row.b_cosine or 0.0), n=row.shared_modules, m=row.modules
        )
        values = {"a": row.a, "b": row.b, "start": row.start, "modules": row.shared_modules}
        yield Finding("artefact", "shared start", f"{row.a} and {row.b} {told}", values)


def _reference(study: Study) -> Iterator[Finding]:
    output = level(study.select(REFERENCE, "output"), "phi_1_1")
    if output is None:
        if len(study.adapters) > 1:
            yield _no_reference()
        return
    values, parts = {}, []
    for side in ("output", "input"):
        rows = study.select(REFERENCE, side)  # type: ignore[arg-type]
        found, chance = level(rows, "phi_1_1"), _chance(rows, "phi_1_1")
        if found is None:
            continue
        parts.append(f"{side} {number(found.median)} (chance {number(chance)})")
        values |= {f"phi_1_1_{side}": found.median, f"chance_{side}": chance}
    text = (
        f"Unrelated adapters set the reference: {plural(output.pairs, 'pair')} with other task and "
        f"other seed have a median φ(1,1) of {' and '.join(parts)}. Every verdict here is made "
        "against these pairs, not against chance."
    )
    yield Finding("reference", "reference", text, values)


def _no_reference() -> Finding:
    text = (
        "No pair with another task and another seed is known here, so there is no reference. "
        "Overlaps above isotropic chance are reported as just that: unrelated adapters of one "
        "base exceed chance too."
    )
    return Finding("limit", "no reference", text)


def _by_rank_pair(study: Study) -> Iterator[Finding]:
    rows = study.similarities
    if rows.empty:
        return
    rows = rows[rows["relation"] == "same task, other rank"]
    ranks = study.runs.set_index("adapter")["rank"]
    keys = [tuple(sorted((ranks[a], ranks[b]))) for a, b in zip(rows["a"], rows["b"], strict=True)]
    for low, high in sorted(set(keys)):
        chosen = rows[[key == (low, high) for key in keys]]
        who = f"Rank {int(low)} and rank {int(high)} on the same task"
        yield _compared(study, chosen, who, "ranks")


def _by_seed(study: Study) -> Iterator[Finding]:
    rows = study.similarities
    if rows.empty:
        return
    rows = rows[rows["relation"] == "same task, other seed"]
    ranks = study.runs.set_index("adapter")["rank"].reindex(rows["a"]).to_numpy()
    for rank in sorted(set(ranks)):
        chosen = rows[ranks == rank]
        who = f"Two seeds of rank {int(rank)} on the same task"
        yield _compared(study, chosen, who, "seeds")


def _unknown(study: Study) -> Iterator[Finding]:
    rows = study.similarities
    rows = rows if rows.empty else rows[rows["relation"] == "unknown"]
    if rows.empty:
        return
    groups = list(rows.groupby(["a", "b"], sort=False))
    if len(groups) > PAIRS_IN_WORDS:
        yield _compared(study, rows, f"{len(study.adapters)} adapters of unknown relation", "pairs")
        return
    for (a, b), chosen in groups:
        yield _compared(study, chosen, f"{a} and {b}", "pairs")


def _shared_seed(study: Study) -> Iterator[Finding]:
    flagged = study.pairs[(study.pairs["relation"] == SHARED_SEED)] if len(study.pairs) else None
    if flagged is None or flagged.empty:
        return
    flagged = flagged[flagged["start"] == "same initial A"]
    if flagged.empty:
        return
    keys = set(zip(flagged["a"], flagged["b"], strict=True))
    sides = {}
    for side in ("input", "output"):
        rows = study.select(SHARED_SEED, side)  # type: ignore[arg-type]
        own = rows[[key in keys for key in zip(rows["a"], rows["b"], strict=True)]]
        other = study.select(REFERENCE, side)  # type: ignore[arg-type]
        sides[side] = (
            own["phi_r_r"].median(),
            other["phi_r_r"].median(),
            own["chance_r_r"].median(),
        )
    (i, i_ref, i_c), (o, o_ref, o_c) = sides["input"], sides["output"]
    text = (
        f"{plural(len(flagged), 'pair')} of different tasks share their initial A because they ran "
        f"the same seed. Their input-side φ(r,r) is {number(i)} (median; other seeds "
        f"{number(i_ref)}, chance {number(i_c)}) while their output side is at {number(o)} (other "
        f"seeds {number(o_ref)}, chance {number(o_c)}): the input overlap is the common start, "
        "not something both tasks learned. It counts in no result."
    )
    values = {"input": i, "input_reference": i_ref, "output": o, "output_reference": o_ref}
    yield Finding("artefact", "shared seed", text, {k: float(v) for k, v in values.items()})


def _amplified(study: Study) -> Iterator[Finding]:
    table = study.amplifications
    if table.empty:
        return
    full = table[table["at_rank"]].merge(study.runs[["adapter", "rank"]], on="adapter")
    for rank, rows in full.groupby("rank"):
        factor, by_chance, rich = (
            rows[name].quantile([0.25, 0.5, 0.75]).to_list()
            for name in ("amplification_factor", "chance_factor", "enrichment")
        )
        text = (
            f"At rank {int(rank)} ΔW is {number(factor[1])} times as strong as W along ΔW's own "
            f"directions (amplification factor, median over {plural(len(rows), 'module')} of "
            f"{plural(rows['adapter'].nunique(), 'adapter')}; quartiles {number(factor[0])} to "
            f"{number(factor[2])}). Random directions would score {number(by_chance[1])}: W holds "
            f"{number(rich[1])} times as much along ΔW's directions as along random ones "
            "(enrichment)."
        )
        values = {
            "rank": int(rank),
            "amplification_factor": factor[1],
            "chance_factor": by_chance[1],
            "enrichment": rich[1],
        }
        yield Finding("result", "amplification", text, values)
    if full["rank"].nunique() > 1:
        text = (
            "Part of the fall of factor and enrichment with rank is A's initial noise, which a "
            "larger rank keeps more of; it is no sign that larger ranks learn something else."
        )
        yield Finding("limit", "amplification", text)


def _energy(study: Study) -> Iterator[Finding]:
    trained = study.spectra[study.spectra["numerical_rank"] > 0]
    if trained.empty:
        return
    parts = []
    for rank, rows in trained.groupby("rank"):
        low, median, high = rows["energy_rank_90"].quantile([0.25, 0.5, 0.75])
        parts.append(f"rank {int(rank)}: {median:.0f} ({low:.0f} to {high:.0f})")
    text = (
        f"Directions that hold 90 % of ‖ΔW‖², median over modules (quartiles) — {'; '.join(parts)}."
    )
    yield Finding("result", "directions needed", text)


def _accuracy(study: Study) -> Iterator[Finding]:
    if "metric_accuracy" not in study.runs:
        return
    parts = []
    for (task, rank), rows in study.runs.groupby(["task", "rank"]):
        start = rows.get("metric_base_accuracy")
        before = "" if start is None or start.isna().all() else f" from {start.median():.0%}"
        parts.append(f"{task} rank {int(rank)}{before} to {rows['metric_accuracy'].median():.0%}")
    yield Finding("result", "accuracy", f"Accuracy on held-out data: {'; '.join(parts)}.")


def _few_runs(study: Study) -> Iterator[Finding]:
    runs = study.runs.dropna(subset=["task", "rank", "seed"])
    if runs.empty:
        return
    counts = runs.groupby(["task", "rank"])["seed"].nunique()
    few = [f"{task} rank {int(rank)} ({n})" for (task, rank), n in counts.items() if n < 3]
    if few:
        text = (
            f"Fewer than three seeds: {', '.join(few)}. No interval over seeds is given for them; "
            "quartiles are over modules and describe this study only."
        )
        yield Finding("limit", "few runs", text)


_MAKERS: tuple[Callable[[Study], Iterator[Finding]], ...] = (
    _failures,
    _untrained,
    _mismatched,
    _starts,
    _reference,
    _by_rank_pair,
    _by_seed,
    _unknown,
    _shared_seed,
    _amplified,
    _energy,
    _accuracy,
    _few_runs,
    _file_notes,
)


def findings(study: Study) -> tuple[Finding, ...]:
    """Return everything the study can say in words; artefacts stand before what they touch."""
    return tuple(finding for maker in _MAKERS for finding in maker(study))
