"""Everything a report knows, for programs: the tables, and one strict JSON document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_analysis import __version__
from lora_analysis.findings import Finding

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies import Study

SCHEMA_VERSION = 1
TABLE_NAMES = ("adapters", "spectra", "pairs", "similarities", "amplifications")


def all_tables(study: Study) -> list[tuple[str, pd.DataFrame]]:
    """Return every table of a study by name, empty ones too."""
    every = (study.runs, study.spectra, study.pairs, study.similarities, study.amplifications)
    return list(zip(TABLE_NAMES, every, strict=True))


def _json_value(value: Any) -> Any:
    """Return a JSON value: numpy's scalars as Python's, everything not finite as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def results(study: Study, said: Sequence[Finding]) -> dict[str, Any]:
    """Return the document of ``results.json``: findings, failures, and the rows of every table.

    Of the amplifications the rows at full rank; every k is in ``tables/amplifications.csv``.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "generator": f"lora_analysis {__version__}",
        "null_means": "not defined, not known, or not computed for this row",
        "findings": [
            {
                "kind": one.kind,
                "topic": one.topic,
                "text": one.text,
                "values": {key: _json_value(value) for key, value in one.values.items()},
            }
            for one in said
        ],
        "failures": [{"source": one.source, "reason": one.reason} for one in study.failures],
        **{
            name: [
                {key: _json_value(value) for key, value in row.items()}
                for row in table.astype(object).to_dict("records")
            ]
            for name, table in all_tables(study)
            if name != "amplifications"
        },
        "amplifications": [
            {key: _json_value(value) for key, value in row.items()}
            for row in _at_rank(study.amplifications).astype(object).to_dict("records")
        ],
    }


def _at_rank(table: pd.DataFrame) -> pd.DataFrame:
    return table if table.empty else table[table["at_rank"]]
