"""Fused weights as PEFT up to 0.2 adapted them: ``enable_lora`` in the config, B a ``Conv1d``'s.

Reference: PEFT 0.2, ``tuners/lora.py``, ``MergedLinear``: A ``(r·g, d_in)``, B
``(d_out/n·g, r, 1)`` for g of n blocks. Other modules of the same adapter are plain pairs. Its
layer always had two groups, whatever ``enable_lora`` said; with another number it did not run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import MalformedFileError
from lora_analysis.formats.build import AdapterParts, beside_finding, build_adapter
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
from lora_analysis.formats.peft.files import check_weights
from lora_analysis.formats.peft.tensor_keys import module_name, sort_keys

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.factors import StoredPair
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.formats.sources import AdapterFiles

NAME: Final = "peft-merged"


def read_merged_linear(files: AdapterFiles, options: ReadOptions) -> Adapter:
    """Read an adapter whose config says ``enable_lora``.

    Raises
    ------
    MalformedFileError
        The config's fields are of wrong types, or the factors do not fit them.
    """
    check_weights(files, options)
    raw, config_path = files.config or {}, files.config_path or files.path
    enabled = _enabled(config_path, raw)
    tensors = files.open(options)
    keys = sort_keys(files.weights, tensors.infos)
    if list(keys.factors) != [None]:
        message = f"{files.weights}: no LoRA factors found, or of several adapters."
        raise MalformedFileError(message)
    pairs: list[StoredPair] = []
    fused = {}
    for pair in complete_pairs(
        files.weights, keys.factors[None], lambda module, role: f"{module}.lora_{role}.weight"
    ):
        a, b = pair.a.name, pair.b.name
        is_block = sum(enabled) == 1 and pair.module.rpartition(".")[2] in FUSED
        if is_block or is_merged(tensors, a, b):
            pairs += split(tensors, pair.module, a, b, enabled)
            fused[pair.module] = parts_of(tensors, pair.module, b, enabled)
        else:
            pairs.append(pair)
    config = PeftConfig(path=config_path, alpha=_number(config_path, raw, "lora_alpha"))
    saved = [module_name(key) for stored in keys.saved.values() for key in stored.values()]
    base_model = raw.get("base_model_name_or_path")
    parts = AdapterParts(
        pairs=pairs,
        scale=lambda pair, rank: config.stated_scale(pair.module, rank),
        reason=f"{CONFIG_NAME} states no lora_alpha",
        findings=(
            *merged_finding(len(fused), interleaved=any(map(interleaves, fused))),
            *beside_finding("not analyzed", saved),
        ),
        files=(config_path,),
        base_model=base_model if isinstance(base_model, str) else None,
        config={FUSED_PARTS: fused} if fused else None,
    )
    return build_adapter(files.path, NAME, tensors, options, parts)


def _enabled(path: Path, raw: Mapping[str, Any]) -> tuple[bool, ...]:
    value = raw["enable_lora"]
    if not isinstance(value, list) or not all(isinstance(block, bool) for block in value):
        message = f"{path}: enable_lora must be a list of true and false, found {value!r:.80}."
        raise MalformedFileError(message)
    return tuple(value)


def _number(path: Path, raw: Mapping[str, Any], key: str) -> float | None:
    value = raw.get(key)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    message = f"{path}: {key} must be a number, found {value!r:.80}."
    raise MalformedFileError(message)
