"""The folder that PEFT loads: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.fused_parts import parts_metadata
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME
from lora_analysis.formats.peft.experts import without_mark
from lora_analysis.formats.peft.experts_writer import is_expert, parameter_of, stacked_tensors
from lora_analysis.formats.peft.files import WEIGHTS_NAME
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.peft.tensor_keys import PREFIX, sort_keys
from lora_analysis.formats.side_tensors import side_output
from lora_analysis.formats.written import layer_shapes, layer_tensors, low_rank_outlines
from lora_analysis.patterns import ModulePatterns, matches_target, pattern_budget
from lora_analysis.storage.adapter_fields import refuse_more_than_factors
from lora_analysis.storage.tensor_writer import OutputTensor, safetensors_content

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, UpdateOutline
    from lora_analysis.formats.written import Shape
    from lora_analysis.storage.atomic import Content

T = TypeVar("T", int, float)

_FACTOR_ENDS: Final = {
    "": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}
_MAGNITUDE: Final = "lora_magnitude_vector"
# PEFT's fields that leave out some of the modules the targets name. They are not written.
_NARROWING: Final = ("exclude_modules", "layers_pattern", "layers_to_transform")


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as PEFT's files by name; see :func:`lora_analysis.write_adapter`."""
    refuse_more_than_factors(
        adapter.config,
        adapter.label,
        "which is not written: a model that loads the file would not compute what it did.",
    )
    side = side_output(adapter, "peft")
    updates = low_rank_outlines(adapter)
    for update in updates.values():
        _refuse_unsayable(update, adapter)
    tensors = _tensors(adapter, updates) + side
    config = _config(adapter, updates)
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    metadata = {"format": "pt"} | parts_metadata(adapter)
    # The config is the mark: without it, half a folder is not taken for an adapter.
    return {
        WEIGHTS_NAME: safetensors_content(tensors, metadata, config=config),
        CONFIG_NAME: f"{text}\n".encode(),
    }


def _refuse_unsayable(update: UpdateOutline, adapter: Adapter) -> None:
    """Raise for an update that needs more than two factors and a scale to be loaded again."""
    if update.variant not in ("", DORA):
        reason = f"a part of {update.variant}, which also changes the base weight"
    elif update.variant == DORA and not update.has_magnitude:
        reason = "DoRA's, but holds no magnitude"
    elif update.magnitude_side == "input":
        reason = "DoRA's with norms of input columns, and PEFT's are of rows"
    elif is_expert(update):  # refused below where it is not one of a whole stack
        return
    elif update.base_name and not adapter.config.get("layer_replication"):
        reason = f"for the weight '{update.base_name}', and PEFT would look for '{update.name}'"
    else:
        return
    message = f"'{update.name}' in {adapter.label} is {reason}. It is not written."
    raise UnsupportedMethodError(message)


def _module_shapes(update: UpdateOutline) -> dict[str, Shape]:
    """Return the shapes of one module's tensors by the end of their keys."""
    a, b = _FACTOR_ENDS["embedding" if update.layout == "embedding" else ""]
    shapes: dict[str, Shape] = dict(zip((a, b), layer_shapes(update), strict=True))
    if update.has_magnitude:
        rows = update.shape[0]
        conv = update.layout == "conv"
        shapes[_MAGNITUDE] = (1, rows, *(1 for _ in update.kernel)) if conv else (rows,)
    return shapes


def _tensors(adapter: Adapter, updates: Mapping[str, UpdateOutline]) -> list[OutputTensor]:
    """Return the tensors to write; refuse names that the keys cannot carry."""
    plain = {name: update for name, update in updates.items() if not is_expert(update)}
    stacked, tensors = stacked_tensors(adapter, updates, PREFIX)
    for name, update in plain.items():
        stem = f"{PREFIX}{name}"
        shapes = {f"{stem}.{end}": shape for end, shape in _module_shapes(update).items()}
        tensors += layer_tensors(adapter, name, shapes)
    for name in adapter.saved_modules:
        saved = np.asarray(adapter.saved_modules[name])  # read for its type and shape alone
        producer = partial(_saved_tensor, adapter, name)
        tensors.append(OutputTensor(f"{PREFIX}{name}", saved.dtype.name, saved.shape, producer))
    read_back = sort_keys(adapter.label, [tensor.name for tensor in tensors])
    if set(read_back.factors.get(None, {})) != {*plain, *stacked} or (
        set(read_back.saved.get(None, {})) != set(adapter.saved_modules)
    ):
        message = f"{adapter.label}: a module's name has a meaning of its own in PEFT's layout."
        raise InputError(message)
    return tensors


def _saved_tensor(adapter: Adapter, name: str) -> NDArray[Any]:
    return np.asarray(adapter.saved_modules[name])


def _alpha(update: UpdateOutline, *, rslora: bool) -> float:
    """Return the alpha from which PEFT computes the update's scale; whole where it is whole."""
    divisor = math.sqrt(update.rank) if rslora else update.rank
    scale = update.known_scale()
    stated = update.alpha
    alpha = stated if stated is not None and stated / divisor == scale else scale * divisor
    # 2.0000000000000004·8 is meant as 16: the nearest whole number that gives the same scale.
    if round(alpha) / divisor == scale or alpha == round(alpha):
        return round(alpha)
    return alpha


def _config(adapter: Adapter, updates: Mapping[str, UpdateOutline]) -> dict[str, Any]:
    """Return the config's fields; what only newer versions of PEFT know, only where it is set."""
    given = adapter.config
    newer = {
        "layer_replication": given.get("layer_replication"),
        "use_dora": _use_dora(adapter, updates),
    }
    rslora = bool(given.get("use_rslora"))
    # A stack of experts goes by the name of its parameter, with one rank and one scale.
    named = {parameter_of(name, update): update for name, update in updates.items()}
    rank, rank_pattern = _default_and_pattern({name: u.rank for name, u in named.items()})
    alpha, alpha_pattern = _default_and_pattern(
        {name: _alpha(update, rslora=rslora) for name, update in named.items()}
    )
    stacks = [name for name, update in named.items() if is_expert(update)]
    if stacks:  # a reader has to know that A acts on the inputs, which it did not before 0.19
        newer |= {"target_parameters": stacks, "peft_version": "0.19.0"}
    return {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": without_mark(given.get("auto_mapping")),
        "base_model_name_or_path": given.get("base_model_name_or_path")
        or adapter.provenance.base_model,
        "bias": "none",
        "fan_in_fan_out": any(update.layout == "conv1d" for update in updates.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": given.get("lora_dropout", 0.0),
        "modules_to_save": _modules_to_save(adapter),
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": given.get("revision"),
        "target_modules": _targets(adapter, updates),
        "task_type": given.get("task_type"),
        "use_rslora": rslora,
    } | {key: value for key, value in newer.items() if value}


def _use_dora(adapter: Adapter, updates: Mapping[str, UpdateOutline]) -> bool:
    """Say whether the adapter is DoRA's; PEFT's config says it of every module or of none."""
    kinds = {update.variant == DORA for update in updates.values()}
    if len(kinds) > 1:
        message = f"{adapter.label} is DoRA in some modules only, which PEFT's config cannot say."
        raise InputError(message)
    return kinds.pop()


def _default_and_pattern(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """Return the commonest value, and per module that differs its own.

    PEFT takes the first key that matches a module's name or its tail as a regular expression, and
    sorts the keys when it saves. Plain names are used (every version reads them) unless one of
    them would reach another module; then all are anchored and escaped, and order says nothing.
    """
    default, _ = Counter(values.values()).most_common(1)[0]
    plain = {name: value for name, value in values.items() if value != default}
    if all(_reaches_no_other(name, value, values) for name, value in plain.items()):
        return default, plain
    return default, {f"^{re.escape(name)}": value for name, value in plain.items()}


def _reaches_no_other(key: str, value: T, values: Mapping[str, T]) -> bool:
    """Say whether a plain name, read as a pattern, gives ``value`` to no module of another."""
    if re.escape(key) != key.replace(".", r"\."):
        return False
    pattern = ModulePatterns({key: value})
    return all(pattern.value(name, own) == own for name, own in values.items())


def _targets(adapter: Adapter, updates: Mapping[str, UpdateOutline]) -> list[str] | str:
    """Return the given targets where they alone still name the modules, else these in full."""
    given = adapter.config.get("target_modules")
    alone = all(adapter.config.get(key) is None for key in _NARROWING)
    modules = [name for name, update in updates.items() if not is_expert(update)]
    listed = isinstance(given, list | tuple) and all(isinstance(one, str) for one in given)
    if not listed and not isinstance(given, str):
        return modules
    with pattern_budget():
        if given and alone and all(matches_target(name, given) for name in modules):
            return given if isinstance(given, str) else sorted(given)
    return modules


def _modules_to_save(adapter: Adapter) -> list[str] | None:
    """Return the modules trained in full, those that hold saved tensors."""
    given = [str(name) for name in adapter.config.get("modules_to_save") or ()]
    covered = [name for name in adapter.saved_modules if any(f".{m}." in f".{name}" for m in given)]
    rest = {n.rpartition(".")[0] for n in adapter.saved_modules if n not in covered}
    return [*given, *sorted(rest)] or None
