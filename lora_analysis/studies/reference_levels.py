"""Levels of unrelated adapters, kept in a JSON file: how alike strangers of one base are.

A file is made once per base model from adapters of many tasks, and then tells how alike unrelated
adapters are where none are at hand. It gives levels only: a test needs the adapters themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from lora_analysis import __version__
from lora_analysis.errors import InputError, MalformedFileError
from lora_analysis.spectra import SIDES, Side
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.limits import MAX_REFERENCE_BYTES
from lora_analysis.storage.outputs import write_output_file
from lora_analysis.storage.records import REFERENCE_FORMAT
from lora_analysis.studies.base_models import base_keys

if TYPE_CHECKING:
    from lora_analysis.studies.result import Study

VERSION: Final = 1
STATISTIC: Final = "mean over modules of (ω - c)/(1 - c), c = sqrt(PR1·PR2)/d"
# Distributions of fewer pairs are shown, not used.
FEWEST_PAIRS: Final = 10
QUANTILES: Final = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_RANGES: Final = ("relative_norm", "norm", "participation_ratio")

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class ReferenceLevel:
    """T of unrelated pairs in the modules of one type, on one side, at one pair of ranks.

    Attributes
    ----------
    base
        Key of the base model; "" if the adapters named none.
    module_type, side, ranks
        What the values are of; the smaller rank first.
    pairs, adapters, tasks
        Number of pairs behind the quantiles, of their adapters, and of the adapters' tasks
        (adapters of unknown task count as a task each).
    quantiles
        Of T over the pairs, at `QUANTILES`.
    ranges
        Smallest and largest median over the modules of ‖ΔW‖/‖W‖ (if the base was given), ‖ΔW‖ and
        participation ratio of the adapters: the level does not hold outside.
    """

    base: str
    module_type: str
    side: Side
    ranks: tuple[int, int]
    pairs: int
    adapters: int
    tasks: int
    quantiles: tuple[float, ...]
    ranges: Mapping[str, Range]

    @property
    def is_usable(self) -> bool:
        """True if enough pairs are behind the level."""
        return self.pairs >= FEWEST_PAIRS

    @property
    def median(self) -> float:
        """The median of T over the pairs."""
        return self.quantiles[QUANTILES.index(0.5)]

    @property
    def maximum(self) -> float:
        """The largest T of a pair."""
        return self.quantiles[-1]

    def holds_for(self, strength: Mapping[str, float]) -> bool:
        """Return True if an adapter with these medians is in the range of the reference."""
        relative = strength.get("relative_norm", math.nan)
        by_weight = "relative_norm" in self.ranges and math.isfinite(relative)
        return all(
            self.ranges[name][0] <= strength[name] <= self.ranges[name][1]
            for name in ("relative_norm" if by_weight else "norm", "participation_ratio")
        )


def reference_levels(study: Study) -> tuple[ReferenceLevel, ...]:
    """Return the levels of all unrelated pairs of a study.

    Pairs are unrelated if tasks and seeds are known to differ (see `PairClass`), or if they were
    passed as a reference.

    Raises
    ------
    InputError
        The study has no unrelated pair.
    """
    levels = []
    keys = base_keys(study)
    task = {
        row.adapter: row.task if isinstance(row.task, str) else f"\0{row.adapter}"
        for row in study.runs.itertuples()
    }
    rank = dict(zip(study.runs["adapter"], study.runs["rank"], strict=True))
    strength = module_type_strength(study)
    for side in SIDES:
        rows = study.population("unrelated", side)
        # A level is one of two ranks: full fine-tunes and mixtures of ranks have none.
        ranked = study.runs.loc[study.runs["rank"].notna(), "adapter"]
        rows = rows[rows["a"].isin(ranked) & rows["b"].isin(ranked)]
        rows = rows.assign(
            base=[keys[a] or keys[b] or "" for a, b in zip(rows["a"], rows["b"], strict=True)],
            ranks=[
                tuple(sorted((rank[a], rank[b]))) for a, b in zip(rows["a"], rows["b"], strict=True)
            ],
        )
        for (base, module_type, ranks), group in rows.groupby(
            ["base", "module_type", "ranks"], sort=True
        ):
            values = group.groupby(["a", "b"])["excess_omega"].mean()
            adapters = sorted(set(group["a"]) | set(group["b"]))
            of_type = strength.loc[[(label, module_type) for label in adapters]]
            ranges = {
                name: (float(of_type[name].min()), float(of_type[name].max()))
                for name in _RANGES
                if name in of_type and of_type[name].notna().all()
            }
            levels.append(
                ReferenceLevel(
                    base=base,
                    module_type=module_type,
                    side=side,
                    ranks=(int(ranks[0]), int(ranks[1])),
                    pairs=len(values),
                    adapters=len(adapters),
                    tasks=len({task[label] for label in adapters}),
                    quantiles=tuple(float(value) for value in np.quantile(values, QUANTILES)),
                    ranges=ranges,
                )
            )
    if not levels:
        message = (
            f"None of the {len(study.pairs)} pairs is known to be unrelated (different tasks and "
            "seeds on one base), so there is no level to store. Pass label= (command line: --label "
            "'{task}-r{rank}-s{seed}') if names state tasks and seeds."
        )
        raise InputError(message)
    return tuple(levels)


def module_type_strength(study: Study) -> pd.DataFrame:
    """Return medians over the modules of each type: norm, participation ratio, relative norm.

    Indexed by adapter and module type.
    """
    by_type = study.spectra.groupby(["adapter", "module_type"])
    strength = by_type[["norm", "participation_ratio"]].median()
    at_rank = study.amplifications
    if len(at_rank):
        at_rank = at_rank[at_rank["at_rank"].astype(bool)]
        relative = at_rank.groupby(["adapter", "module_type"])["relative_norm"].median()
        strength["relative_norm"] = relative
    return strength


@dataclass(frozen=True, slots=True)
class PairOfModules:
    """What a pair of adapters needs a level for.

    Attributes
    ----------
    base, side, ranks
        Key of the base, the side, and the ranks of the pair in ascending order.
    module_types
        Number of usable modules of each type.
    strengths
        Of both adapters, medians by module type, see `module_type_strength`.
    """

    base: str
    side: Side
    ranks: tuple[int, int]
    module_types: Mapping[str, int]
    strengths: Sequence[Mapping[str, Mapping[str, float]]]


def level_of_pair(
    levels: Sequence[ReferenceLevel], pair: PairOfModules
) -> tuple[float, float, int] | None:
    """Return median and maximum of T for a pair, and the number of pairs behind them.

    The medians and maxima of the module types are averaged over the modules of the pair, which
    bounds the maximum from above: no unrelated pair need be the most alike in all types. None if a
    module type has no usable level, or the pair is outside the range of the reference.
    """
    index = {(level.base, level.module_type, level.side, level.ranks): level for level in levels}
    used = []
    for module_type in pair.module_types:
        level = index.get((pair.base, module_type, pair.side, pair.ranks))
        if level is None or not level.is_usable:
            return None
        if not all(level.holds_for(strength[module_type]) for strength in pair.strengths):
            return None
        used.append(level)
    if not used:
        return None
    counts = list(pair.module_types.values())
    return (
        float(np.average([level.median for level in used], weights=counts)),
        float(np.average([level.maximum for level in used], weights=counts)),
        min(level.pairs for level in used),
    )


def write_reference(
    study: Study, path: str | Path, *, inputs: Sequence[Path] = (), force: bool = False
) -> tuple[ReferenceLevel, ...]:
    """Write the levels of the unrelated pairs of a study as JSON, and return them.

    Raises
    ------
    InputError
        The study has no unrelated pair, or the file is somebody else's.
    """
    levels = reference_levels(study)
    document = {
        "format": REFERENCE_FORMAT,
        "version": VERSION,
        "generator": f"lora_analysis {__version__}",
        "statistic": STATISTIC,
        "quantiles": list(QUANTILES),
        "levels": [
            {
                "base": level.base,
                "module_type": level.module_type,
                "side": level.side,
                "ranks": list(level.ranks),
                "pairs": level.pairs,
                "adapters": level.adapters,
                "tasks": level.tasks,
                "values": list(level.quantiles),
                "ranges": {name: list(bounds) for name, bounds in level.ranges.items()},
            }
            for level in levels
        ],
    }
    text = json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    write_output_file(Path(path), text.encode(), inputs=inputs, force=force)
    return levels


def read_reference(path: str | Path) -> tuple[ReferenceLevel, ...]:
    """Read the levels that `write_reference` wrote.

    Raises
    ------
    MalformedFileError
        The file is larger than 16 MiB, damaged, or from a different version.
    SourceError
        It is not a regular file.
    """
    path = Path(path)
    document = read_json_object(path, max_bytes=MAX_REFERENCE_BYTES)
    if document.get("format") != REFERENCE_FORMAT:
        message = f"{path} is not a reference file: its \"format\" is not '{REFERENCE_FORMAT}'."
        raise MalformedFileError(message)
    header = document.get("version"), document.get("statistic"), document.get("quantiles")
    if header != (VERSION, STATISTIC, list(QUANTILES)):
        message = (
            f"{path} was written by {document.get('generator')!r}, whose reference files differ "
            f"(version {document.get('version')!r}, this program reads {VERSION}). Write it again "
            "with `lora-analysis reference`."
        )
        raise MalformedFileError(message)
    try:
        return tuple(_level(fields) for fields in document["levels"])
    except (KeyError, TypeError, ValueError) as error:
        message = f"{path} is damaged: {type(error).__name__}: {error}."
        raise MalformedFileError(message) from error


def _level(fields: Mapping[str, Any]) -> ReferenceLevel:
    """Return a level from its JSON object, every field checked."""
    low, high = fields["ranks"]
    counts = [fields[name] for name in ("pairs", "adapters", "tasks")]
    quantiles = tuple(_finite_number(value) for value in fields["values"])
    ranges = {}
    for name, (least, most) in fields["ranges"].items():
        if name in _RANGES:
            ranges[name] = (_finite_number(least), _finite_number(most))
    is_valid = (
        all(type(count) is int and count > 0 for count in (low, high, *counts))
        and all(isinstance(fields[name], str) for name in ("base", "module_type"))
        and fields["side"] in SIDES
        and len(quantiles) == len(QUANTILES)
        and list(quantiles) == sorted(quantiles)
        and {"norm", "participation_ratio"} <= ranges.keys()
    )
    if not is_valid:
        message = f"the level of {fields['module_type']!r} has values that cannot be"
        raise ValueError(message)
    return ReferenceLevel(
        base=fields["base"],
        module_type=fields["module_type"],
        side=fields["side"],
        ranks=(low, high),
        pairs=counts[0],
        adapters=counts[1],
        tasks=counts[2],
        quantiles=quantiles,
        ranges=ranges,
    )


def _finite_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        message = f"{value!r} is not a finite number"
        raise ValueError(message)
    return float(value)


def is_reference_file(source: object) -> bool:
    """Return True if a source names a reference file, not an adapter: a JSON file."""
    return isinstance(source, str | Path) and Path(source).suffix == ".json"
