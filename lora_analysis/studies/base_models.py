"""Base models by name: statistics that pool pairs take one base model at a time."""

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
# Suffixes that quantized copies append to a model's name.
_COPY = re.compile(
    r"([-_.](gguf|awq|gptq|mlx|bnb|fp8|[348][-_]?bit|i?q[1-8](_\w+)?|b?f16|fp16|f32))+$",
    re.IGNORECASE,
)


def other_bases(names: Mapping[str, str | None], base: BaseWeights | None) -> frozenset[str]:
    """Return the labels of adapters that were trained on a different base than the given one.

    Names decide only if the adapters name several bases. If they all name one, the given base may
    be the same model under a different name (see `strange_name`).

    Parameters
    ----------
    names
        The base model that each adapter names, by label.
    base
        The given base weights.
    """
    keys = {label: base_key(name) for label, name in names.items()}
    if base is None or base.name is None or len(set(keys.values()) - {None}) < 2:
        return frozenset()
    given = _plain(base.name)
    return frozenset(label for label, key in keys.items() if key and _plain(key) != given)


def strange_name(names: Mapping[str, str | None], base: BaseWeights | None) -> str | None:
    """Return the base that all adapters name if the given one has a different name, else None.

    A generic folder name such as ``model`` does not count as a name.
    """
    keys = {base_key(name): name for name in names.values() if base_key(name)}
    if base is None or base.name is None or len(keys) != 1 or says_nothing(base.name):
        return None
    ((key, name),) = keys.items()
    return None if _plain(key) == _plain(base.name) else shown_base(name)


def _plain(name: str | None) -> str | None:
    return _COPY.sub("", base_key(name) or "") or None


def base_keys(study: Study) -> dict[str, str | None]:
    """Return the key of each adapter's base model (`base_key`) by label; None if not named."""
    runs = study.runs
    return {
        label: base_key(name) if isinstance(name, str) else None
        for label, name in zip(runs["adapter"], runs["base_model"], strict=True)
    }


def several_bases(study: Study) -> bool:
    """Return True if the adapters name more than one base model."""
    return len(set(base_keys(study).values()) - {None}) > 1


def per_base(study: Study, rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield rows of pairs (columns ``a`` and ``b``) by base model, with the name of the base.

    Directions of different bases are not comparable, so pairs are pooled within one base only.
    The name is "" if the study has one base or none is named; a pair of which one adapter names
    no base belongs to the base of the other.
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
    """Yield the rows of ``Study.runs`` by base, with its name; "" if there is at most one base."""
    if not several_bases(study):
        yield "", study.runs
        return
    keys = study.runs["adapter"].map(base_keys(study))
    for key, rows in study.runs[keys.notna()].groupby(keys[keys.notna()], sort=False):
        yield _names(study)[str(key)], rows


def bases_of(study: Study, adapters: pd.Series) -> list[str]:
    """Return the name of the base model of each adapter, for a table."""
    keys, names = base_keys(study), _names(study)
    return [names[keys[label] or ""] for label in adapters]


def _names(study: Study) -> dict[str, str]:
    """Return the name of each base by its key, in the spelling of the first adapter on it."""
    names = {"": NO_BASE}
    for name in study.runs["base_model"].dropna():
        if key := base_key(name):
            names.setdefault(key, shown_base(name) or key)
    return names
