"""Adapters of mlx-lm: ``adapters.safetensors`` with ``adapter_config.json``, or a bare ``.npz``.

Reference: mlx-lm 0.32, ``tuner/lora.py`` and ``tuner/dora.py``. A linear layer has ``lora_a``
``(d_in, r)`` and ``lora_b`` ``(r, d_out)``, an embedding ``(entries, r)`` and ``(r, features)``, a
stack of experts the other way round, ``(E, r, d_in)`` and ``(E, d_out, r)``. The multiplier is
``lora_parameters.scale``; up to mlx-lm 0.14 it was ``scale·alpha/rank``, and the configuration
of that time cannot be told from that of the versions up to 0.18.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import MalformedFileError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.formats.assembly import assembled, beside_finding
from lora_analysis.formats.factors import (
    UNKNOWN_SCALE,
    FactorRole,
    StatedScale,
    StoredPair,
    complete_pairs,
    finite_number,
)
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.sources import AdapterRef, ReadOptions, label_of, tensors_at
from lora_analysis.formats.stored import tensor
from lora_analysis.patterns import natural_key
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.marks import config_findings
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.storage.tensors import NamedTensors

NAME: Final = "mlx"

WEIGHTS_NAME: Final = "adapters.safetensors"
_WEIGHTS_NAMES: Final = (WEIGHTS_NAME, "adapters.npz")
_CHECKPOINT: Final = "[0-9]*_adapters.safetensors"
_MAX_EXPERTS: Final = 4096
# What mlx-lm stacks under this name are separate experts in the base.
SWITCH: Final = ".switch_mlp."

# GGUF's names end in the same way behind ".weight".
_KEY: Final = re.compile(r"(?P<module>.+)(?<!\.weight)\.(?P<role>lora_a|lora_b|m)")
_EMBEDDING: Final = re.compile(r"(.+\.)?(embed_tokens|wte|wpe|embedding|tok_embeddings|embed_in)")
# A DoRA embedding has a norm per entry here, where PEFT's has one per feature.
_DORA_OF_ENTRIES: Final = "DoRA by entries"


@dataclass(frozen=True, slots=True)
class _Place:
    """The files of an adapter; ``shown`` is the path it goes by."""

    shown: Path
    weights: Path
    config: Mapping[str, Any] | None
    config_path: Path | None


def is_embedding(module: str) -> bool:
    """Say whether a module's name is that of an embedding in mlx-lm's models."""
    return _EMBEDDING.fullmatch(module) is not None


def recognizes(path: Path, options: ReadOptions) -> bool:
    """Say whether an adapter of mlx-lm lies at exactly this path."""
    return _place(path, options) is not None


def _place(path: Path, options: ReadOptions) -> _Place | None:
    """Return the files that a folder, its config, its weights or a checkpoint lead to."""
    if path.name == CONFIG_NAME and path.is_file():
        path = path.parent
    folder = path if path.is_dir() else path.parent
    config = _config(folder / CONFIG_NAME)
    config_path = None if config is None else folder / CONFIG_NAME
    if path.is_dir():
        stored = [path / name for name in _WEIGHTS_NAMES if (path / name).is_file()]
        if stored and (config is not None or _holds_factors(stored[0], options)):
            return _Place(path, stored[0], config, config_path)
        return None
    full = config is not None and path.name in _WEIGHTS_NAMES
    if full or _holds_factors(path, options):
        return _Place(path, path, config, config_path)
    return None


def _config(path: Path) -> dict[str, Any] | None:
    """Return the arguments that mlx-lm was run with, None for another trainer's configuration."""
    if not path.is_file():
        return None
    try:
        config = read_json_object(path)
    except MalformedFileError:
        return None
    marks = ("lora_parameters", "fine_tune_type", "lora_layers")
    return config if any(mark in config for mark in marks) and "peft_type" not in config else None


def _holds_factors(path: Path, options: ReadOptions) -> bool:
    tensors = tensors_at(path, options)
    return tensors is not None and any(
        (match := _KEY.fullmatch(key)) and match["role"] != "m" for key in tensors.infos
    )


def find(path: Path, options: ReadOptions) -> list[AdapterRef]:
    """Return the adapter at a path and, in a folder, the checkpoints beside it."""
    place = _place(path, options)
    if place is None:
        return []
    found = [place.shown]
    if path.is_dir():
        checkpoints = [one for one in path.glob(_CHECKPOINT) if _holds_factors(one, options)]
        found += sorted(checkpoints, key=lambda one: natural_key(one.name))
    return [AdapterRef(one, NAME, label_of(one)) for one in found]


def read(path: Path, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG001 - unnamed
    """Read a folder's final adapter, or the file that is named.

    Raises
    ------
    MalformedFileError
        The files are damaged or contradict each other.
    UnsupportedMethodError
        The weights are those of a full fine-tune.
    """
    place = _place(path, options)
    if place is None:
        message = f"{path}: no adapter of mlx-lm lies here."
        raise MalformedFileError(message)
    config = place.config or {}
    _refuse_full(place, config)
    tensors = open_tensors(place.weights, allow_pickle=options.allow_pickle)
    pairs, others = _pairs(place.weights, tensors)
    scale, findings = _scale(config)
    model = config.get("model")
    return assembled(
        place.shown,
        NAME,
        tensors,
        pairs,
        lambda _pair, _rank: scale,
        options=options,
        missing="there is no adapter_config.json with lora_parameters.scale beside it",
        findings=(
            *config_findings(tensors.metadata, config, place.weights, place.config_path),
            *(findings if options.scale is None and options.alpha is None else []),
            *_dora_finding(pairs),
            *beside_finding("not analyzed", others),
        ),
        files=() if place.config_path is None else (place.config_path,),
        base_model=model if isinstance(model, str) else None,
    )


def _refuse_full(place: _Place, config: Mapping[str, Any]) -> None:
    if config.get("fine_tune_type") == "full":
        message = (
            f"{place.config_path}: fine_tune_type is 'full': {place.weights.name} holds the "
            "weights of a full fine-tune of mlx-lm, not a LoRA update. Subtract the base model."
        )
        raise UnsupportedMethodError(message)


def _pairs(path: Path, tensors: NamedTensors) -> tuple[list[StoredPair], list[str]]:
    """Return the pairs of every module, of each expert its own, and the names of all else."""
    factors: dict[str, dict[FactorRole, str]] = {}
    norms, others = {}, []
    for key in tensors.infos:
        match = _KEY.fullmatch(key)
        if match is None:
            others.append(key)
        elif match["role"] == "m":
            norms[match["module"]] = key
        else:
            role: FactorRole = "A" if match["role"] == "lora_a" else "B"
            factors.setdefault(match["module"], {})[role] = key
    others += [key for module, key in norms.items() if module not in factors]
    pairs: list[StoredPair] = []
    for plain in complete_pairs(path, factors, lambda m, role: f"{m}.lora_{role.lower()}"):
        if len(tensors.infos[plain.a.name].shape) == 3:
            pairs += _experts(path, tensors, plain)
        else:
            pairs.append(_matrix(plain, norms.get(plain.module)))
    if not pairs:
        message = (
            f"{path}: no LoRA factors found. First tensors: {', '.join(others[:3]) or 'none'}."
        )
        raise MalformedFileError(message)
    return pairs, others


def _matrix(plain: StoredPair, norm: str | None) -> StoredPair:
    pair = StoredPair.of(plain.module, plain.a.name, plain.b.name, flipped=True)
    embedding = is_embedding(plain.module)
    if embedding:
        pair = replace(pair, layout="embedding")
    if norm is None:
        return pair
    if embedding:
        return replace(pair, variant=_DORA_OF_ENTRIES)
    return replace(pair, variant=DORA, magnitude=tensor(norm))


def _experts(path: Path, tensors: NamedTensors, plain: StoredPair) -> Iterator[StoredPair]:
    a, b = (tensors.infos[factor.name].shape for factor in (plain.a, plain.b))
    if len(b) != 3 or a[0] != b[0] or a[0] > _MAX_EXPERTS:
        message = (
            f"{path}: '{plain.module}' has lora_a {a} and lora_b {b}; a stack of experts needs "
            f"(E, r, in) and (E, out, r), with at most {_MAX_EXPERTS:,} experts."
        )
        raise MalformedFileError(message)
    for expert in range(a[0]):
        a_e, b_e = plain.a.at(expert), plain.b.at(expert)
        if SWITCH in plain.module:
            own = plain.module.replace(SWITCH, f".experts.{expert}.")
            yield StoredPair(own, a_e, b_e)
        else:
            own, base_name = f"{plain.module}.{expert}", f"{plain.module}[{expert}]"
            yield StoredPair(own, a_e, b_e, base_name=base_name)


def _scale(config: Mapping[str, Any]) -> tuple[StatedScale, list[str]]:
    """Return the multiplier that the arguments state, and what is doubtful about it."""
    parameters = config.get("lora_parameters")
    if (
        not isinstance(parameters, dict)
        or (scale := finite_number(parameters.get("scale"))) is None
    ):
        return UNKNOWN_SCALE, []
    stated = StatedScale(scale, None, "config")
    if "num_layers" in config and "fine_tune_type" in config:
        return stated, []
    alpha, rank = (finite_number(parameters.get(key)) for key in ("alpha", "rank"))
    other = ""
    if alpha is not None and rank:
        other = f", here {scale * alpha / rank:g}"
    return stated, [
        f"The scale {scale:g} is taken from lora_parameters. mlx-lm up to 0.14 applied "
        f"scale·alpha/rank{other}, and nothing in this configuration tells its version: pass "
        "scale= if it was that old. Only the size of every update depends on it."
    ]


def _dora_finding(pairs: list[StoredPair]) -> list[Finding]:
    count = sum(bool(pair.variant) for pair in pairs)
    return [Finding("dora", {"count": count, "total": len(pairs)})] if count else []
