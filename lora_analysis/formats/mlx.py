"""Adapters of mlx-lm: ``adapters.safetensors`` with ``adapter_config.json``, or a bare ``.npz``.

Reference: mlx-lm 0.32, ``tuner/lora.py`` and ``tuner/dora.py``. A linear layer has ``lora_a``
``(d_in, r)`` and ``lora_b`` ``(r, d_out)``, an embedding ``(entries, r)`` and ``(r, features)``, a
stack of experts the other way round, ``(E, r, d_in)`` and ``(E, d_out, r)``. The multiplier is
``lora_parameters.scale``; up to mlx-lm 0.14 it was ``scale·alpha/rank``, and the configuration
of that time cannot be told from that of the versions up to 0.18.

mlx-lm makes every layer of the rank and scale in the configuration before it loads the factors. So
a written folder has smaller ranks filled up with zeros, and different scales folded into
``lora_b``. Its ``num_layers`` is -1, all layers, since the depth of the base is not known; a layer
without factors keeps its zeros.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.formats.build import AdapterParts
from lora_analysis.formats.factors import (
    UNKNOWN_SCALE,
    StatedScale,
    StoredPair,
    finite_number,
    split_stack,
)
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, StoredModules
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.sources import AdapterFiles, AdapterRef, label_of
from lora_analysis.formats.stored import tensor
from lora_analysis.formats.text_writing import (
    PlannedFactors,
    common_scale,
    fold_scales,
    folding_note,
    stack_experts,
    text_outlines,
)
from lora_analysis.formats.written import is_dora
from lora_analysis.patterns import natural_key
from lora_analysis.storage.records import config_findings
from lora_analysis.storage.tensor_writer import OutputTensor, output_group, safetensors_content

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.formats.written import Shape
    from lora_analysis.storage.atomic import Content

WEIGHTS_NAME: Final = "adapters.safetensors"
_CHECKPOINT: Final = "[0-9]*_adapters.safetensors"
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
            "weights of a full fine-tune of mlx-lm, not a LoRA update. Copy it into a "
            "folder of its own and pass its base with base= (command line: --base)."
        )
        raise UnsupportedMethodError(message)


def _complete(stored: StoredModules) -> AdapterParts:
    tensors, files, options = stored.tensors, stored.files, stored.options
    config = files.config or {}
    pairs: list[StoredPair] = []
    for plain in stored.pairs():
        if len(tensors.infos[plain.a.name].shape) == 3:
            pairs += split_stack(tensors, plain, mark=SWITCH, names=("lora_a", "lora_b"))
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
        reason="there is no adapter_config.json with lora_parameters.scale next to the file",
        findings=(
            *config_findings(tensors.metadata, config, stored.path, files.config_path),
            *(findings if options.scale is None and options.alpha is None else []),
            *([Finding("dora", {"count": dora, "total": len(pairs)})] if dora else []),
            *stored.unanalyzed_findings(),
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
        f"scale·alpha/rank{other}, and this configuration does not state its version: pass "
        "scale= if it was that old. Only the size of every update depends on it."
    ]


_FORMAT: Final = "MLX"
_LAYER: Final = re.compile(r".*?layers\.\d+\.(?P<key>.+)")


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as mlx-lm's files by name.

    Raises
    ------
    InputError
        An embedding has a name that mlx-lm's models do not give one, or only some modules are
        DoRA's.
    UnsupportedMethodError
        MLX cannot express an update.
    """
    updates = text_outlines(adapter, _FORMAT, variants=(DORA,))
    scale = common_scale(updates)
    scales = dict.fromkeys(updates, scale)
    dora = is_dora(updates.values(), adapter.label, _FORMAT)
    if dora and any(update.layout == "embedding" for update in updates.values()):
        message = f"{adapter.label}: DoRA in an embedding, which MLX cannot express."
        raise InputError(message)
    factors = stack_experts(fold_scales(adapter, updates, scales), _FORMAT)
    rank = max(planned.rank for planned in factors.values())
    tensors: list[OutputTensor] = []
    # Names inside a layer, by which mlx-lm finds modules to adapt, or whole ones.
    keys: set[str] = set()
    for module, planned in factors.items():
        name = module if len(planned.a) == 2 else module.replace(".experts.", SWITCH)
        if (planned.layout == "embedding") != is_embedding(name):
            message = (
                f"'{name}' is of layout '{planned.layout}', but readers of MLX files infer a "
                "different one from the name. It is not written."
            )
            raise InputError(message)
        tensors += _module_tensors(name, planned, rank)
        match = _LAYER.fullmatch(name)
        keys.add(match["key"] if match else name)
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {
            "keys": sorted(keys),
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
        },
        "model": adapter.provenance.base_model,
        "num_layers": -1,
    }
    return {
        WEIGHTS_NAME: safetensors_content(tensors, {"format": "mlx"}, config=config),
        CONFIG_NAME: f"{json.dumps(config, indent=4)}\n".encode(),
    }


def mlx_notes(adapter: Adapter) -> list[str]:
    """Return sentences on scales that were folded and ranks that were filled up."""
    updates = text_outlines(adapter, _FORMAT, variants=(DORA,))
    scale = common_scale(updates)
    scales = dict.fromkeys(updates, scale)
    ranks = {update.rank for update in updates.values()}
    filled = sum(update.rank != max(ranks) for update in updates.values())
    notes = folding_note(updates, scales, _FORMAT, "scale")
    if filled:
        notes.append(
            f"MLX has one rank for all modules: {filled} of {len(updates)} are filled up with "
            f"zeros to rank {max(ranks)}. ΔW is the same."
        )
    return notes


def _module_tensors(name: str, planned: PlannedFactors, rank: int) -> list[OutputTensor]:
    """Return one module's tensors, filled up to a rank: experts as they are, others transposed."""
    a, b = (*planned.a[:-2], rank, planned.a[-1]), (*planned.b[:-1], rank)
    shapes = {f"{name}.lora_a": a, f"{name}.lora_b": b}
    if len(a) == 2:
        shapes = {key: shape[::-1] for key, shape in shapes.items()}
        if planned.norms is not None:
            shapes[f"{name}.m"] = planned.norms
    return output_group(shapes, partial(_module_arrays, planned, shapes), dtype=planned.dtype)


def _module_arrays(planned: PlannedFactors, shapes: Mapping[str, Shape]) -> dict[str, NDArray[Any]]:
    factors = planned.load(planned.dtype)
    a, b = factors.a, factors.b
    if a.ndim == 2:
        a, b = a.T, b.T
    arrays = [a, b] if factors.norms is None else [a, b, factors.norms]
    filled = {}
    for (name, shape), array in zip(shapes.items(), arrays, strict=True):
        filled[name] = np.ascontiguousarray(array)
        if array.shape != shape:  # zeros after the last entries along each axis
            filled[name] = np.zeros(shape, array.dtype)
            filled[name][tuple(slice(size) for size in array.shape)] = array
    return filled
