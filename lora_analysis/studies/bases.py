"""Which base each adapter is of: what pools pairs takes one base at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.formats.sources import says_nothing
from lora_analysis.studies.relations import base_key, shown_base

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.bases import BaseWeights
    from lora_analysis.studies.result import Study

NO_BASE = "no base named"
# What files and folders of quantized copies add to a model's name.
_COPY = re.compile(
    r"([-_.](gguf|awq|gptq|mlx|bnb|fp8|[348][-_]?bit|i?q[1-8](_\w+)?|b?f16|fp16|f32))+$",
    re.IGNORECASE,
)


def other_bases(named: Mapping[str, str | None], base: BaseWeights | None) -> frozenset[str]:
    """Return the labels of adapters of another base than the one they are to be held against.

    Names decide where the adapters name several bases; where they name one, it may be called
    otherwise on this disk (`strange_name` says so).

    Parameters
    ----------
    named
        What the adapters call their base, by label.
    base
        The one that is given.
    """
    keys = {label: base_key(name) for label, name in named.items()}
    if base is None or base.name is None or len(set(keys.values()) - {None}) < 2:
        return frozenset()
    own = _plain(base.name)
    return frozenset(label for label, key in keys.items() if key is not None and _plain(key) != own)


def strange_name(named: Mapping[str, str | None], base: BaseWeights | None) -> str | None:
    """Return the one base that adapters name where the given one is called otherwise.

    A folder called ``model`` is called nothing.
    """
    keys = {base_key(name): name for name in named.values() if base_key(name)}
    if base is None or base.name is None or len(keys) != 1 or says_nothing(base.name):
        return None
    ((key, name),) = keys.items()
    return None if _plain(key) == _plain(base.name) else shown_base(name)


def _plain(name: str | None) -> str | None:
    return _COPY.sub("", base_key(name) or "") or None


def base_keys(study: Study) -> dict[str, str | None]:
    """Return what tells the base of each adapter apart, by label; None where it names none."""
    runs = study.runs
    return {
        label: base_key(name) if isinstance(name, str) else None
        for label, name in zip(runs["adapter"], runs["base_model"], strict=True)
    }


def several_bases(study: Study) -> bool:
    """Say whether the adapters name more than one base."""
    return len(set(base_keys(study).values()) - {None}) > 1


def per_base(study: Study, rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield rows of pairs (columns ``a`` and ``b``) by the base they are on, with its name.

    Directions of different bases have nothing to do with each other, so what pools pairs pools
    those of one base. The name is "" where the study has one base, or none is named; a pair in
    which one adapter names no base is of the other's.
    """
    if rows.empty:
        return
    if not several_bases(study):
        yield "", rows
        return
    keys = base_keys(study)
    of_rows = np.array(
        [keys[a] or keys[b] or "" for a, b in zip(rows["a"], rows["b"], strict=True)]
    )
    for key in dict.fromkeys(of_rows):
        yield _names(study)[str(key)], rows[of_rows == key]


def runs_per_base(study: Study) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the rows of ``Study.runs`` by base, with its name; "" where there is one at most."""
    if not several_bases(study):
        yield "", study.runs
        return
    names = study.runs["adapter"].map(base_keys(study))
    for key, own in study.runs[names.notna()].groupby(names[names.notna()], sort=False):
        yield _names(study)[str(key)], own


def bases_of(study: Study, adapters: pd.Series) -> list[str]:
    """Return the shown name of the base of each adapter."""
    keys, names = base_keys(study), _names(study)
    return [names[keys[one] or ""] for one in adapters]


def _names(study: Study) -> dict[str, str]:
    """Return how each base is called, by its key: as the first adapter on it calls it."""
    names = {"": NO_BASE}
    for name in study.runs["base_model"].dropna():
        if key := base_key(name):
            names.setdefault(key, shown_base(name) or key)
    return names
