"""Everything in a report, for programs: ``results.json``, ``tables/`` and ``grids.npz``.

``results.json`` is one strict JSON document of findings and summaries. `results_schema` describes
it (JSON Schema, draft 2020-12).
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pandas as pd

from lora_analysis import __version__
from lora_analysis.conclusions.comparison_findings import comparison_fields
from lora_analysis.conclusions.comparison_values import SIDES_IN_ORDER
from lora_analysis.errors import InputError
from lora_analysis.execution import in_threads
from lora_analysis.finding import CODES, Finding
from lora_analysis.report.representatives import choose_drawn_pairs, common_modules
from lora_analysis.studies.base_models import bases_of, runs_per_base, several_bases
from lora_analysis.text import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.conclusions import Comparison, SummaryLine
    from lora_analysis.studies import GroupAnalysis, Study

SCHEMA_VERSION = 5
TABLE_NAMES = ("adapters", "spectra", "pairs", "similarities", "amplifications", "changes")
# Matrices of more adapters are in tables/similarity_matrix_*.csv alone.
SIMILARITY_MATRIX_LIMIT = 100
_OVERLAPS = (
    "phi_1_1", "chance_1_1", "phi_r_r", "chance_r_r", "omega", "chance_omega", "excess_omega",
    "signed_cosine",
)  # fmt: skip
_SPECTRA = (
    "rank", "numerical_rank", "effective_rank", "stable_rank", "energy_rank_90", "energy_rank_99",
    "participation_ratio", "norm", "rounding_error",
)  # fmt: skip
_WEIGHTS = (
    "k", "projected", "projected_random", "delta_norm", "weight_norm", "relative_norm",
    "amplification_factor", "chance_factor", "enrichment", "enrichment_crossed",
    "enrichment_through_weight",
)  # fmt: skip
_CHANGES = (
    "k", "relative_change", "mean_drift", "largest_drift", "noise_drift", "top_overlap",
    "chance_top_overlap", "noise_top_overlap", "leading_energy", "trailing_energy",
    "chance_energy", "changed_in_bfloat16", "noise_in_bfloat16", "intruders", "noise_intruders",
)  # fmt: skip


def results_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``results.json``, with every code of a finding and its meaning."""
    text = files("lora_analysis.report").joinpath("results.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    finding = schema["properties"]["findings"]["items"]["properties"]
    finding["code"]["oneOf"] = [
        {"const": name, "title": f"{code.severity}: {code.topic}", "description": code.template}
        for name, code in CODES.items()
    ]
    finding["topic"]["enum"] = sorted({code.topic for code in CODES.values()})
    return schema


def all_tables(study: Study) -> list[tuple[str, pd.DataFrame]]:
    """Return every table of a study by name, empty ones too."""
    every = (study.runs, study.spectra, study.pairs, study.similarities, study.amplifications,
             study.changes)  # fmt: skip
    return list(zip(TABLE_NAMES, every, strict=True))


def json_value(value: Any) -> Any:
    """Return a JSON value: numpy's scalars as Python's, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [json_value(row) for row in table.astype(object).to_dict("records")]


def results(
    study: Study,
    findings: Sequence[Finding],
    compared: Sequence[Comparison],
    lines: Sequence[SummaryLine],
    group: GroupAnalysis | None = None,
) -> dict[str, Any]:
    """Return the document of ``results.json``."""
    amplifications = study.amplifications
    if not amplifications.empty:
        amplifications = amplifications[amplifications["at_rank"]]
    return {
        "schema_version": SCHEMA_VERSION,
        "generator": f"lora_analysis {__version__}",
        "null_means": "undefined, unknown, or not computed for this row",
        "summary": [json_value(line.to_dict()) for line in lines],
        "comparisons": [json_value(comparison_fields(comparison)) for comparison in compared],
        "findings": [json_value(finding.to_dict()) for finding in findings],
        "failures": [failure.to_dict() for failure in study.failures],
        "unmatched": [
            {"module": module, "reason": reason} for module, reason in study.unmatched.items()
        ],
        "left_out": {
            side: [
                {"module": module, "reason": reason}
                for module, reason in study.left_out.get(side, {}).items()
            ]
            for side in SIDES_IN_ORDER
        },
        "adapters": _records(study.runs),
        "spectra": _medians(study.spectra, ["adapter"], _SPECTRA),
        "pairs": _records(study.pairs),
        "overlaps": _medians(study.similarities, ["a", "b", "pair_class", "side"], _OVERLAPS),
        "modules": _medians_by_population(study),
        "amplifications": _medians(amplifications, ["adapter"], _WEIGHTS),
        "weight_changes": _medians(study.changes, ["adapter", "module_type", "side"], _CHANGES),
        "run_inference": list(_inference(study)),
        "group_analysis": None if group is None else json_value(group.to_dict()),
        "similarity_matrix": _similarity_matrix(study),
    }


def _similarity_matrix(study: Study) -> dict[str, Any] | None:
    """Return the similarity matrices of a study; None of one adapter, and of too many."""
    matrix = study.similarity_matrix
    if matrix is None or not 2 <= len(matrix.labels) <= SIMILARITY_MATRIX_LIMIT:
        return None
    planes = {what: matrix.matrix(what) for what in ("output", "input", "cosine")}
    planes["shared_init"] = matrix.shared
    return {
        "labels": list(matrix.labels),
        "order": [int(index) for index in matrix.order()],
        **{name: json_value(values.tolist()) for name, values in planes.items()},
    }


def _medians_by_population(study: Study) -> list[dict[str, Any]]:
    """Return medians over the pairs of each population, for each base, module and side."""
    table = study.similarities
    base = bases_of(study, table["a"]) if several_bases(study) else [None] * len(table)
    # As text: groups of None would be left out.
    table = table.assign(base=[name or "" for name in base])
    table = table[table["usable"].astype(bool) & (table["population"] != "")]
    rows = _medians(table, ["base", "module", "population", "side"], _OVERLAPS)
    return [{**row, "base": row["base"] or None} for row in rows]


def _medians(
    table: pd.DataFrame, by: Sequence[str], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Return medians per group, and over how many rows."""
    if table.empty:
        return []
    groups = table.groupby(list(by), sort=False)
    medians = groups[list(columns)].median()
    return _records(medians.assign(rows=groups.size()).reset_index())


def _inference(study: Study) -> Iterator[dict[str, Any]]:
    for base, runs in runs_per_base(study):
        ranks = sorted({int(rank) for rank in runs["rank"].dropna()})
        for rank in (None, *(ranks if len(ranks) > 1 else ())):
            for side in SIDES_IN_ORDER:
                try:
                    result = study.run_inference(side=side, rank=rank, base=base or None)
                except InputError:
                    continue
                yield {
                    "base": base or None,
                    "rank": rank,
                    "side": side,
                    "blocks": [{"task": task, "seed": seed} for task, seed in result.blocks],
                    "adapters": [list(labels) for labels in result.adapters],
                    "mean_excess": json_value(result.mean_excess.tolist()),
                    "within": json_value(result.within.tolist()),
                    "between": json_value(result.between.tolist()),
                    "difference": json_value(result.permutation.difference),
                    "standard_error": json_value(result.standard_error),
                    "p": result.permutation.p_value,
                    "smallest_p": result.permutation.smallest_p_value,
                }


def grids_file(study: Study) -> bytes | None:
    """Return the bytes of ``grids.npz``: φ of the drawn pairs in each common module.

    One float32 array per key ``"a|b|side|module"``, ``[i-1, j-1]`` being φ(i, j) of a's leading i
    and b's leading j directions, which end at the numerical ranks. None without pairs.
    """
    every = [pair for drawn in choose_drawn_pairs(study).values() for pair in drawn.pairs]
    modules = {pair: common_modules(study, *pair) for pair in dict.fromkeys(every)}
    pairs: dict[str, list[tuple[str, str]]] = {}
    for pair, common in modules.items():
        for module in common:
            pairs.setdefault(module, []).append(pair)
    values = in_threads(lambda module: study.phi(pairs[module], module), pairs)
    grids = dict(zip(pairs, values, strict=True))
    arrays: dict[str, NDArray[np.float32]] = {}
    for (a, b), common in modules.items():
        for module in common:
            for side in SIDES_IN_ORDER:
                # A slash would create a folder inside the archive.
                key = printable(f"{a}|{b}|{side}|{module}").replace("/", "∕")
                arrays[key] = grids[module][a, b, side].astype(np.float32)
    if not arrays:
        return None
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


_CELLS_AT_ONCE = 2**18
# A spreadsheet treats the wide signs like the narrow ones.
_FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def csv_text(table: pd.DataFrame) -> str:
    """Return a table as CSV; text that a spreadsheet would run as a formula is quoted.

    One row is one line: unprintable characters and line ends are escaped.
    """
    return str(
        table.map(_escape_formula).to_csv(
            index=False, header=[_escape_formula(name) for name in table.columns]
        )
    )


def write_square_csv(table: pd.DataFrame, stream: BinaryIO) -> None:
    """Write a `square_table` as `csv_text` does, some rows at a time."""
    rows = max(1, _CELLS_AT_ONCE // len(table.columns))
    for first in range(0, len(table), rows):
        part = table.iloc[first : first + rows].copy()
        part.isetitem(0, part.iloc[:, 0].map(_escape_formula))
        header = [_escape_formula(name) for name in table.columns] if first == 0 else False
        stream.write(part.to_csv(index=False, header=header).encode())


def _escape_formula(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    line = printable(value)
    return f"'{line}" if line.startswith(_FORMULA_STARTS) else line


def square_table(labels: Sequence[str], values: NDArray[np.float64]) -> pd.DataFrame:
    """Return a matrix over adapters as a table, their names in the first column and the header."""
    table = pd.DataFrame(values, columns=list(labels))
    table.insert(0, "adapter", list(labels), allow_duplicates=True)
    return table
