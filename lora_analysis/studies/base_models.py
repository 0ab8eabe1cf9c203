"""Base models by name: statistics that pool pairs take one base model at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_analysis.adapter import is_fine_tune
from lora_analysis.formats.sources import is_uninformative
from lora_analysis.studies.base_identity import (
    base_key,
    base_title,
    is_same_key,
    model_and_structure,
    plain_model,
    resolve_keys,
    same_base,
    structure_hash,
)

__all__ = [
    "NO_BASE",
    "base_key",
    "base_keys",
    "base_title",
    "bases_of",
    "differing_base_name",
    "other_bases",
    "pairs_across_bases",
    "per_base",
    "runs_on_base",
    "runs_per_base",
    "same_base",
    "several_bases",
    "with_base_name",
]

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.adapter import Adapter
    from lora_analysis.bases import BaseWeights
    from lora_analysis.studies.result import Study

NO_BASE = "no base named"


def other_bases(names: Mapping[str, str | None], base: BaseWeights | None) -> frozenset[str]:
    """Return the labels of adapters that were trained on a different base than the given one.

    Names decide only if the adapters name several bases. If they all name one, the given base may
    be the same model under a different name (see `differing_base_name`).

    Parameters
    ----------
    names
        The base model that each adapter names, by label.
    base
        The given base weights. If it is not known whether an adapter's base is the same model, the
        last parts of their names decide.
    """
    keys = dict(zip(names, resolve_keys(names.values()), strict=True))
    if base is None or base.name is None or len(set(keys.values()) - {None}) < 2:
        return frozenset()
    return frozenset(label for label, key in keys.items() if key and not _is_given(key, base))


def differing_base_name(names: Mapping[str, str | None], base: BaseWeights | None) -> str | None:
    """Return the base that all adapters name if the given one has a different name, else None.

    A generic folder name such as ``model`` does not count as a name.
    """
    keys = resolve_keys(names.values())
    named = {key: name for key, name in zip(keys, names.values(), strict=True) if key}
    if base is None or base.name is None or len(named) != 1 or is_uninformative(base.name):
        return None
    ((key, name),) = named.items()
    return None if _is_given(key, base) else base_title(name)


def with_base_name(
    adapter: Adapter, adapters: Sequence[Adapter], base: BaseWeights | None
) -> Adapter:
    """Return a full fine-tune of the given base with the name that other adapters have for it.

    Their difference to the given weights was computed, whose path is all that is known of them.
    Other adapters are returned as they are.
    """
    if base is None or not is_fine_tune(adapter):
        return adapter
    names = [
        other.provenance.base_model
        for other in adapters
        if not is_fine_tune(other) and other.provenance.base_model
    ]
    named = {key: name for key, name in zip(resolve_keys(names), names, strict=True) if key}
    same = [name for key, name in named.items() if len(named) == 1 or _is_given(key, base)]
    return adapter.with_provenance(base_model=same[0]) if same else adapter


def _is_given(key: str, base: BaseWeights) -> bool:
    """Return True if a base is the given one, by name and structure, else by its last name."""
    model, structure = model_and_structure(key)
    if structure and (given := structure_hash(base.config)) and structure != given:
        return False
    location = base.address or (str(base.path.absolute()) if base.path else None)
    same = is_same_key(key, base_key(location))
    return model == plain_model(base.name or "") if same is None else same


def base_keys(study: Study) -> dict[str, str | None]:
    """Return a key of each adapter's base model by label, equal for one base; None if not named."""
    runs = study.runs
    return {
        label: key if isinstance(key, str) else None
        for label, key in zip(runs["adapter"], runs["base_key"], strict=True)
    }


def runs_on_base(study: Study, base: str) -> pd.Series:
    """Return a mask of the rows of ``Study.runs`` whose base model is the one of this name."""
    given = base_key(base)
    return (study.runs["base_model"] == base) | study.runs["base_key"].map(
        lambda key: isinstance(key, str) and bool(is_same_key(key, given))
    )


def several_bases(study: Study) -> bool:
    """Return True if the adapters name more than one base model."""
    return len(set(base_keys(study).values()) - {None}) > 1


class PairsAcrossBases(NamedTuple):
    """Pairs of analyzed adapters whose bases are not the same, and whether each is compared.

    Attributes
    ----------
    different, not_known
        Labels of pairs with different bases, and of those whose bases may or may not be the same.
    """

    different: dict[tuple[str, str], bool]
    not_known: dict[tuple[str, str], bool]


def pairs_across_bases(study: Study) -> PairsAcrossBases:
    """Return the pairs of analyzed adapters that both name a base, and not the same one."""
    keys = base_keys(study)
    compared = set(zip(study.pairs["a"], study.pairs["b"], strict=True))
    result = PairsAcrossBases({}, {})
    labels = [
        label for label in study.fully_compared if label not in study.reference and keys[label]
    ]
    for pair in combinations(labels, 2):
        same = is_same_key(keys[pair[0]], keys[pair[1]])
        if not same:
            (result.not_known if same is None else result.different)[pair] = pair in compared
    return result


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
        yield _name_by_key(study)[str(key)], rows[of_rows == key]


def runs_per_base(study: Study) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the rows of ``Study.runs`` by base, with its name; "" if there is at most one base."""
    if not several_bases(study):
        yield "", study.runs
        return
    keys = study.runs["adapter"].map(base_keys(study))
    for key, rows in study.runs[keys.notna()].groupby(keys[keys.notna()], sort=False):
        yield _name_by_key(study)[str(key)], rows


def bases_of(study: Study, adapters: pd.Series) -> list[str]:
    """Return the name of the base model of each adapter, for a table."""
    keys, names = base_keys(study), _name_by_key(study)
    return [names[keys[label] or ""] for label in adapters]


def _name_by_key(study: Study) -> dict[str, str]:
    """Return the name of each base by its key, in the spelling of the first adapter on it."""
    names = {"": NO_BASE}
    for key, name in zip(study.runs["base_key"], study.runs["base_model"], strict=True):
        if isinstance(key, str):
            names.setdefault(key, name if isinstance(name, str) else key)
    return names
