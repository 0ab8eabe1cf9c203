"""Fused weights as PEFT up to 0.2 adapted them: ``enable_lora`` in the config, B a ``Conv1d``'s.

Reference: PEFT 0.2, ``tuners/lora.py``, ``MergedLinear``: A ``(r·g, d_in)``, B
``(d_out/n·g, r, 1)`` for g of n blocks. Other modules of the same adapter are plain pairs. Its
layer always had two groups, whatever ``enable_lora`` said; with another number it did not run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lora_analysis.errors import InputError, MalformedFileError
from lora_analysis.formats.assembly import assembled, beside_finding
from lora_analysis.formats.factors import complete_pairs
from lora_analysis.formats.fused_parts import FUSED_PARTS
from lora_analysis.formats.merged import (
    FUSED,
    interleaves,
    is_merged,
    merged_finding,
    parts_of,
    split,
)
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME, PeftConfig
from lora_analysis.formats.peft.peft_places import PeftPlace, check_weights, locate_peft_files
from lora_analysis.formats.peft.tensor_keys import module_name, sort_keys
from lora_analysis.formats.sources import AdapterRef, ReadOptions, label_of
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.factors import StoredPair
    from lora_analysis.storage.tensors import NamedTensors

NAME: Final = "peft-merged"


def recognizes(path: Path, options: ReadOptions) -> bool:
    """Say whether an adapter of PEFT lies here whose config says ``enable_lora``."""
    return _place(path, options) is not None


def _place(path: Path, options: ReadOptions) -> PeftPlace | None:
    place = locate_peft_files(path, options)
    if place is None or place.config is None:
        return None
    try:
        enabled = read_json_object(place.config).get("enable_lora")
    except MalformedFileError:
        return None
    return place if enabled else None


def find(path: Path, options: ReadOptions) -> list[AdapterRef]:
    """Return the adapter, where there is one."""
    place = _place(path, options)
    return [] if place is None else [AdapterRef(place.shown, NAME, label_of(place.shown))]


def read(path: Path, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG001 - unnamed
    """Read the adapter at ``path``.

    Raises
    ------
    MalformedFileError
        The config's fields are of wrong types, or the factors do not fit them.
    """
    place = _place(path, options)
    if place is None or place.config is None:
        message = f"{path}: no adapter with enable_lora lies here."
        raise InputError(message)
    check_weights(place, options)
    raw = read_json_object(place.config)
    enabled = _enabled(place.config, raw)
    tensors = open_tensors(place.weights, allow_pickle=options.allow_pickle)
    keys = sort_keys(place.weights, tensors.infos)
    if list(keys.factors) != [None]:
        message = f"{place.weights}: no LoRA factors found, or of several adapters."
        raise MalformedFileError(message)
    pairs: list[StoredPair] = []
    fused = {}
    for pair in complete_pairs(
        place.weights, keys.factors[None], lambda module, role: f"{module}.lora_{role}.weight"
    ):
        if _is_fused(tensors, pair, enabled):
            pairs += split(tensors, pair.module, pair.a.name, pair.b.name, enabled)
            fused[pair.module] = parts_of(tensors, pair.module, pair.b.name, enabled)
        else:
            pairs.append(pair)
    alpha = _number(place.config, raw, "lora_alpha")
    config = PeftConfig(path=place.config, alpha=alpha)
    beside = [module_name(key) for keys_ in keys.saved.values() for key in keys_.values()]
    base_model = raw.get("base_model_name_or_path")
    return assembled(
        place.shown,
        NAME,
        tensors,
        pairs,
        lambda pair, rank: config.stated_scale(pair.module, rank),
        options=options,
        missing=f"{CONFIG_NAME} states no lora_alpha",
        findings=(
            *merged_finding(len(fused), interleaved=any(map(interleaves, fused))),
            *beside_finding("not analyzed", beside),
        ),
        files=(place.config,),
        base_model=base_model if isinstance(base_model, str) else None,
        config={FUSED_PARTS: fused} if fused else None,
    )


def _is_fused(tensors: NamedTensors, pair: StoredPair, enabled: tuple[bool, ...]) -> bool:
    one = sum(enabled) == 1 and pair.module.rpartition(".")[2] in FUSED
    return one or is_merged(tensors, pair.a.name, pair.b.name)


def _enabled(path: Path, raw: dict[str, Any]) -> tuple[bool, ...]:
    found = raw["enable_lora"]
    if not isinstance(found, list) or not all(isinstance(one, bool) for one in found):
        message = f"{path}: enable_lora must be a list of true and false, found {found!r:.80}."
        raise MalformedFileError(message)
    return tuple(found)


def _number(path: Path, raw: dict[str, Any], key: str) -> float | None:
    found = raw.get(key)
    if found is None or (isinstance(found, int | float) and not isinstance(found, bool)):
        return found
    message = f"{path}: {key} must be a number, found {found!r:.80}."
    raise MalformedFileError(message)
