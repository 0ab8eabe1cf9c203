"""Adapters of mlx-lm: ``adapters.safetensors`` with ``adapter_config.json``, or a bare ``.npz``.

Reference: mlx-lm 0.32, ``tuner/lora.py`` and ``tuner/dora.py``. A linear layer has ``lora_a``
``(d_in, r)`` and ``lora_b`` ``(r, d_out)``, an embedding ``(entries, r)`` and ``(r, features)``, a
stack of experts the other way round, ``(E, r, d_in)`` and ``(E, d_out, r)``. The multiplier is
``lora_parameters.scale``; up to mlx-lm 0.14 it was ``scale·alpha/rank``, and the configuration
of that time cannot be told from that of the versions up to 0.18.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import MalformedFileError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.formats.build import AdapterParts
from lora_analysis.formats.factors import (
    UNKNOWN_SCALE,
    StatedScale,
    StoredPair,
    finite_number,
)
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, StoredModules
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.sources import AdapterFiles, AdapterRef, label_of
from lora_analysis.formats.stored import tensor
from lora_analysis.patterns import natural_key
from lora_analysis.storage.records import config_findings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

WEIGHTS_NAME: Final = "adapters.safetensors"
_CHECKPOINT: Final = "[0-9]*_adapters.safetensors"
_MAX_EXPERTS: Final = 4096
# What mlx-lm stacks under this name are separate experts in the base.
SWITCH: Final = ".switch_mlp."

# GGUF's names end in the same way behind ".weight".
_KEY: Final = KeyPattern(re.compile(r"(?P<module>.+)(?<!\.weight)\.(?P<role>lora_a|lora_b|m)"))
_EMBEDDING: Final = re.compile(r"(.+\.)?(embed_tokens|wte|wpe|embedding|tok_embeddings|embed_in)")
# A DoRA embedding has a norm per entry here, where PEFT's has one per feature.
_DORA_OF_ENTRIES: Final = "DoRA by entries"


def is_embedding(module: str) -> bool:
    """Return True if a module's name is that of an embedding in mlx-lm's models."""
    return _EMBEDDING.fullmatch(module) is not None


def _is_config(config: Mapping[str, Any]) -> bool:
    """Return True if a configuration holds arguments of mlx-lm and is not PEFT's."""
    marks = ("lora_parameters", "fine_tune_type", "lora_layers")
    return any(mark in config for mark in marks) and "peft_type" not in config


def _check(files: AdapterFiles) -> None:
    if (files.config or {}).get("fine_tune_type") == "full":
        message = (
            f"{files.config_path}: fine_tune_type is 'full': {files.weights.name} holds the "
            "weights of a full fine-tune of mlx-lm, not a LoRA update. Subtract the base model."
        )
        raise UnsupportedMethodError(message)


def _complete(stored: StoredModules) -> AdapterParts:
    tensors, files, options = stored.tensors, stored.files, stored.options
    config = files.config or {}
    pairs: list[StoredPair] = []
    for plain in stored.pairs():
        if len(tensors.infos[plain.a.name].shape) == 3:
            pairs += _experts(stored.path, tensors, plain)
        else:
            pairs.append(_matrix(plain, stored.modules[plain.module].get("magnitude")))
    if not pairs:
        names = ", ".join(stored.others[:3]) or "none"
        message = f"{stored.path}: no LoRA factors found. First tensors: {names}."
        raise MalformedFileError(message)
    scale, findings = _scale(config)
    base_model = config.get("model")
    dora = sum(bool(pair.variant) for pair in pairs)
    return AdapterParts(
        pairs=pairs,
        scale=lambda _pair, _rank: scale,
        reason="there is no adapter_config.json with lora_parameters.scale beside it",
        findings=(
            *config_findings(tensors.metadata, config, stored.path, files.config_path),
            *(findings if options.scale is None and options.alpha is None else []),
            *([Finding("dora", {"count": dora, "total": len(pairs)})] if dora else []),
            *stored.not_analyzed(),
        ),
        files=() if files.config_path is None else (files.config_path,),
        base_model=base_model if isinstance(base_model, str) else None,
    )


class _MLX(KeyScheme):
    """The final adapter of a folder; its checkpoints are found, too."""

    def find(self, files: AdapterFiles, options: ReadOptions) -> list[AdapterRef]:
        """Return the adapter at a path and, in a folder, the checkpoints in it."""
        paths = [files.path]
        if files.path.is_dir():
            checkpoints = [
                path for path in files.path.glob(_CHECKPOINT) if self.locate(path, options)
            ]
            paths += sorted(checkpoints, key=lambda path: natural_key(path.name))
        return [AdapterRef(path, self.name, label_of(path)) for path in paths]


FORMAT: Final = _MLX(
    "mlx",
    (_KEY,),
    _complete,
    weights=(WEIGHTS_NAME, "adapters.npz"),
    config=CONFIG_NAME,
    is_config=_is_config,
    check=_check,
)


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
            yield StoredPair(plain.module.replace(SWITCH, f".experts.{expert}."), a_e, b_e)
        else:
            module, base_name = f"{plain.module}.{expert}", f"{plain.module}[{expert}]"
            yield StoredPair(module, a_e, b_e, base_name=base_name)


def _scale(config: Mapping[str, Any]) -> tuple[StatedScale, list[str]]:
    """Return the multiplier that the arguments state, and the finding if it is ambiguous."""
    parameters = config.get("lora_parameters")
    if (
        not isinstance(parameters, dict)
        or (scale := finite_number(parameters.get("scale"))) is None
    ):
        return UNKNOWN_SCALE, []
    file_scale = StatedScale(scale, None, "config")
    if "num_layers" in config and "fine_tune_type" in config:
        return file_scale, []
    alpha, rank = (finite_number(parameters.get(key)) for key in ("alpha", "rank"))
    other = ""
    if alpha is not None and rank:
        other = f", here {scale * alpha / rank:g}"
    return file_scale, [
        f"The scale {scale:g} is taken from lora_parameters. mlx-lm up to 0.14 applied "
        f"scale·alpha/rank{other}, and nothing in this configuration tells its version: pass "
        "scale= if it was that old. Only the size of every update depends on it."
    ]
