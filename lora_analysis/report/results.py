"""Everything a report says, for programs: one strict JSON document of summaries.

``results.schema.json`` beside this file describes it (JSON Schema, draft 2020-12). Rows per module
and pair are in ``tables/``, grids in ``grids.npz``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lora_analysis import __version__
from lora_analysis.conclusions import Finding
from lora_analysis.errors import InputError
from lora_analysis.studies.base_models import bases_of, runs_per_base, several_bases

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies import Study

SCHEMA_VERSION = 4
TABLE_NAMES = ("adapters", "spectra", "pairs", "similarities", "amplifications", "changes")
# Matrices of more adapters are in tables/similarity_matrix_*.csv alone.
SIMILARITY_MATRIX_LIMIT = 100
_OVERLAPS = (
    "phi_1_1", "chance_1_1", "phi_r_r", "chance_r_r", "omega", "chance_omega", "signed_cosine",
)  # fmt: skip
_SPECTRA = (
    "rank", "numerical_rank", "effective_rank", "stable_rank", "energy_rank_90", "energy_rank_99",
    "participation_ratio", "norm", "rounding_error",
)  # fmt: skip
_WEIGHTS = (
    "k", "projected", "projected_random", "delta_norm", "weight_norm", "relative_norm",
    "amplification_factor", "chance_factor", "enrichment",
)  # fmt: skip


def results_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``results.json``."""
    text = files("lora_analysis.report").joinpath("results.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def all_tables(study: Study) -> list[tuple[str, pd.DataFrame]]:
    """Return every table of a study by name, empty ones too."""
    every = (study.runs, study.spectra, study.pairs, study.similarities, study.amplifications,
             study.changes)  # fmt: skip
    return list(zip(TABLE_NAMES, every, strict=True))


def json_value(value: Any) -> Any:
    """Return a JSON value: numpy's scalars as Python's, everything not finite as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [json_value(item) for item in value] if isinstance(value, list | tuple) else value


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(key): json_value(value) for key, value in row.items()}
        for row in table.astype(object).to_dict("records")
    ]


def results(study: Study, said: Sequence[Finding]) -> dict[str, Any]:
    """Return the document of ``results.json``."""
    return {
        "schema_version": SCHEMA_VERSION,
        "generator": f"lora_analysis {__version__}",
        "null_means": "not defined, not known, or not computed for this row",
        "findings": [
            {
                **one.to_dict(),
                "kind": one.kind,
                "fields": {key: json_value(value) for key, value in one.values.items()},
            }
            for one in said
        ],
        "failures": [one.to_dict() for one in study.failures],
        "unmatched": [
            {"module": module, "reason": reason} for module, reason in study.unmatched.items()
        ],
        "adapters": _records(study.runs),
        "spectra": _medians(study.spectra, ["adapter"], _SPECTRA),
        "pairs": _records(study.pairs),
        "overlaps": _overlaps(study),
        "modules": _modules(study),
        "amplifications": _medians(_at_rank(study.amplifications), ["adapter"], _WEIGHTS),
        "run_inference": list(_inference(study)),
        "similarity_matrix": _similarity_matrix(study),
    }


def _medians(
    table: pd.DataFrame, by: Sequence[str], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Return medians per group, and over how many rows."""
    if table.empty:
        return []
    groups = table.groupby(list(by), sort=False)
    medians = groups[list(columns)].median()
    return _records(medians.assign(rows=groups.size()).reset_index())


def _overlaps(study: Study) -> list[dict[str, Any]]:
    """Return medians over modules for each pair and side."""
    return _medians(study.similarities, ["a", "b", "relation", "side"], _OVERLAPS)


def _modules(study: Study) -> list[dict[str, Any]]:
    """Return medians over the pairs of each relation, for each base, module and side."""
    table = study.similarities
    base = bases_of(study, table["a"]) if several_bases(study) else [None] * len(table)
    # As text: groups of None would be left out.
    table = table.assign(base=[one or "" for one in base])
    rows = _medians(table, ["base", "module", "relation", "side"], _OVERLAPS)
    return [{**row, "base": row["base"] or None} for row in rows]


def _at_rank(table: pd.DataFrame) -> pd.DataFrame:
    return table if table.empty else table[table["at_rank"]]


def _inference(study: Study) -> Iterator[dict[str, Any]]:
    asked = [
        (base or None, rank)
        for base, runs in runs_per_base(study)
        for rank in sorted({int(one) for one in runs["rank"].dropna()})
    ]
    for base, rank in asked:
        try:
            found = study.run_inference(rank=rank, base=base)
        except InputError:
            continue
        yield {
            "base": base,
            "rank": rank,
            "quantity": found.quantity,
            "side": found.side,
            "runs": list(found.runs),
            "tasks": list(found.tasks),
            "within": [json_value(one) for one in found.within],
            "between": [json_value(one) for one in found.between],
            "difference": json_value(found.permutation.difference),
            "standard_error": json_value(found.standard_error),
            "p": found.permutation.p_value,
            "smallest_p": found.permutation.smallest_p_value,
        }


def _similarity_matrix(study: Study) -> dict[str, Any] | None:
    similarity_matrix = study.similarity_matrix
    if (
        similarity_matrix is None
        or not 2 <= len(similarity_matrix.labels) <= SIMILARITY_MATRIX_LIMIT
    ):
        return None
    return {
        "labels": list(similarity_matrix.labels),
        "order": [int(one) for one in similarity_matrix.order()],
        **{
            what: [[json_value(one) for one in row] for row in similarity_matrix.matrix(what)]
            for what in ("output", "input", "cosine")
        },
        "shared_init": [[json_value(one) for one in row] for row in similarity_matrix.shared],
    }
