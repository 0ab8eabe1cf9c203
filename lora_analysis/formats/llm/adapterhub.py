"""Adapters of AdapterHub's ``adapters``: ``<module>.loras.<name>.lora_A``, with a nested config.

Reference: adapters 1.3, ``methods/lora.py``. The folder holds ``pytorch_adapter.bin`` or
``adapter.safetensors``, and an ``adapter_config.json`` of the same name as PEFT's whose ``config``
says ``architecture``. A fused ``c_attn`` is adapted as loralib's ``MergedLinear``, its enabled
blocks in ``attn_matrices``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError, MalformedFileError, SourceError, UnsupportedMethodError
from lora_analysis.formats.assembly import assembled, beside_finding, stated_alpha
from lora_analysis.formats.factors import (
    FactorRole,
    StoredPair,
    complete_pairs,
    finite_number,
)
from lora_analysis.formats.fused_parts import FUSED_PARTS
from lora_analysis.formats.merged import (
    FUSED,
    enable_needed,
    is_merged,
    merged_finding,
    parts_of,
    split,
)
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.sources import AdapterRef, ReadOptions, label_of, tensors_at
from lora_analysis.formats.stored import tensor
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.storage.tensors import NamedTensors

NAME: Final = "adapterhub"

_WEIGHTS_NAMES: Final = ("adapter.safetensors", "pytorch_adapter.bin")
_KEY: Final = re.compile(
    r"(?P<module>.+)\.loras\.(?P<name>[^.]+)\.(?P<role>lora_A|lora_B|m\.weight|gate\..+)"
)


@dataclass(frozen=True, slots=True)
class _Place:
    shown: Path
    weights: Path
    config_path: Path | None
    document: Mapping[str, Any]


def recognizes(path: Path, options: ReadOptions) -> bool:
    """Say whether an adapter of AdapterHub lies at exactly this path."""
    return _place(path, options) is not None


def _place(path: Path, options: ReadOptions) -> _Place | None:
    if path.name == CONFIG_NAME and path.is_file():
        path = path.parent
    config_path = (path if path.is_dir() else path.parent) / CONFIG_NAME
    document = _document(config_path)
    known = config_path if document else None
    if path.is_dir():
        stored = [path / name for name in _WEIGHTS_NAMES if (path / name).is_file()]
        return _Place(path, stored[0], known, document) if stored and document else None
    if (document and path.name in _WEIGHTS_NAMES) or _holds_factors(path, options):
        return _Place(path, path, known, document)
    return None


def _document(path: Path) -> dict[str, Any]:
    """Return the configuration, empty where it is another library's or there is none."""
    try:
        found = read_json_object(path) if path.is_file() else {}
    except InputError:
        return {}
    return found if isinstance(found.get("config"), dict) and "peft_type" not in found else {}


def _holds_factors(path: Path, options: ReadOptions) -> bool:
    tensors = tensors_at(path, options)
    return tensors is not None and any(map(_KEY.fullmatch, tensors.infos))


def find(path: Path, options: ReadOptions) -> list[AdapterRef]:
    """Return the adapter, where there is one."""
    place = _place(path, options)
    return [] if place is None else [AdapterRef(place.shown, NAME, label_of(place.shown))]


def read(path: Path, name: str | None, options: ReadOptions) -> Adapter:
    """Read the adapter at ``path``, or the one called ``name`` where its file holds several.

    Raises
    ------
    MalformedFileError
        A module has one factor only, or its factors do not fit together.
    SourceError
        The file holds several adapters, and none, or no such one, is named.
    UnsupportedMethodError
        It is no LoRA: a bottleneck adapter, IA3, VeRA, or gated.
    """
    place = _place(path, options)
    if place is None:
        message = f"{path}: no adapter of AdapterHub lies here."
        raise MalformedFileError(message)
    config = place.document.get("config", {})
    _refuse_others(place, config)
    tensors = open_tensors(place.weights, allow_pickle=options.allow_pickle)
    factors, norms, others = _sorted(place, tensors, name)
    pairs, fused = _pairs(place, tensors, factors, norms, _enabled(config, options))
    alpha = config.get("alpha")
    base = place.document.get("model_name")
    return assembled(
        place.shown,
        NAME,
        tensors,
        pairs,
        stated_alpha(finite_number(alpha)),
        options=options,
        missing=f"no {CONFIG_NAME} with config.alpha lies beside the file",
        findings=(
            *merged_finding(len(fused), interleaved=False),
            *beside_finding("not analyzed", others),
        ),
        files=() if place.config_path is None else (place.config_path,),
        config={FUSED_PARTS: fused} if fused else None,
        base_model=base if isinstance(base, str) else None,
    )


def _refuse_others(place: _Place, config: Mapping[str, Any]) -> None:
    reasons = (
        (
            config.get("architecture", "lora") != "lora",
            f"architecture {config.get('architecture')!r}",
        ),
        (config.get("composition_mode") == "scale", "composition_mode 'scale' (IA3)"),
        (config.get("vera_d") is not None or config.get("vera_b") is not None, "VeRA"),
        (bool(config.get("use_gating")), "use_gating: the update depends on the input"),
    )
    for applies, what in reasons:
        if applies:
            message = f"{place.config_path}: {what!s:.80}; only plain LoRA, s·B·A, is read."
            raise UnsupportedMethodError(message)


def _sorted(
    place: _Place, tensors: NamedTensors, name: str | None
) -> tuple[dict[str, dict[FactorRole, str]], dict[str, str], list[str]]:
    """Return factors and norms of the chosen adapter by module, and the names of all else."""
    matches = {key: match for key in tensors.infos if (match := _KEY.fullmatch(key))}
    names = sorted({match["name"] for match in matches.values()})
    if name is None and len(names) == 1:
        (name,) = names
    if name not in names:
        listed = ", ".join(f"'{place.shown}#{one}'" for one in names) or "none"
        message = f"{place.weights}: one adapter was asked for, it holds: {listed}."
        raise SourceError(message)
    factors: dict[str, dict[FactorRole, str]] = {}
    norms: dict[str, str] = {}
    for key, match in matches.items():
        if match["name"] != name:
            continue
        if match["role"].startswith("gate."):
            message = f"{place.weights}: '{key}' gates the update by the input; it is not read."
            raise UnsupportedMethodError(message)
        if match["role"] == "m.weight":
            norms[match["module"]] = key
        else:
            role: FactorRole = "A" if match["role"] == "lora_A" else "B"
            factors.setdefault(match["module"], {})[role] = key
    return factors, norms, [key for key in tensors.infos if key not in matches]


def _enabled(config: Mapping[str, Any], options: ReadOptions) -> tuple[bool, ...] | None:
    if options.enable_lora is not None:
        return options.enable_lora
    matrices = config.get("attn_matrices")
    return tuple(part in matrices for part in "qkv") if isinstance(matrices, list) else None


def _pairs(
    place: _Place,
    tensors: NamedTensors,
    factors: Mapping[str, Mapping[FactorRole, str]],
    norms: Mapping[str, str],
    enabled: tuple[bool, ...] | None,
) -> tuple[list[StoredPair], dict[str, Any]]:
    """Return the pairs, fused modules taken apart, and what the config is to say of those."""
    pairs: list[StoredPair] = []
    fused: dict[str, Any] = {}
    for plain in complete_pairs(place.weights, factors, lambda m, role: f"{m}.loras.*.lora_{role}"):
        a, b, last = plain.a.name, plain.b.name, plain.module.rpartition(".")[2]
        merged = is_merged(tensors, a, b)
        if merged and enabled is None:
            raise enable_needed(tensors, plain.module, a, b)
        if enabled and (merged or (sum(enabled) == 1 and last in FUSED)):
            pairs += split(tensors, plain.module, a, b, enabled)
            fused[plain.module] = parts_of(tensors, plain.module, b, enabled)
        elif plain.module in norms:
            magnitude = tensor(norms[plain.module])
            pairs.append(replace(plain, variant=DORA, magnitude=magnitude))
        else:
            pairs.append(plain)
    return pairs, fused
