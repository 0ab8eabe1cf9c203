"""The folder that PEFT loads: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.fused_parts import parts_metadata
from lora_analysis.formats.peft_config import CONFIG_NAME
from lora_analysis.formats.peft_experts_writer import is_expert, parameter_of, stacked_factors
from lora_analysis.formats.peft_keys import PREFIX, sort_keys
from lora_analysis.formats.peft_pairs import DORA
from lora_analysis.formats.peft_places import WEIGHTS_NAME
from lora_analysis.formats.written import float32, saved
from lora_analysis.patterns import matches_target, pattern_value
from lora_analysis.storage.adapter_fields import refuse_more_than_factors
from lora_analysis.storage.atomic import write_together

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter

T = TypeVar("T", int, float)

# PEFT's fields that leave out some of the modules the targets name. They are not written.
_NARROWING: Final = ("exclude_modules", "layers_pattern", "layers_to_transform")


def write_peft(adapter: Adapter, folder: Path) -> Path:
    """Write ``adapter`` as PEFT does; see :func:`lora_analysis.write_adapter`."""
    refuse_more_than_factors(
        adapter.config,
        adapter.label,
        "which is not written: a model that loads the file would not compute what it did.",
    )
    updates = _low_rank_updates(adapter)
    tensors = _tensors(adapter, updates)
    config = json.dumps(_config(adapter, updates), indent=2, sort_keys=True, allow_nan=False)
    # The config is the mark: without it, half a folder is not taken for an adapter.
    weights = saved(tensors, {"format": "pt"} | parts_metadata(adapter))
    write_together({folder / WEIGHTS_NAME: weights, folder / CONFIG_NAME: f"{config}\n".encode()})
    return folder


def _low_rank_updates(adapter: Adapter) -> dict[str, LowRankUpdate]:
    updates = {}
    for name, update in adapter.items():
        if not isinstance(update, LowRankUpdate):
            message = f"'{name}' in {adapter.label} is a dense update; a LoRA file holds A and B."
            raise InputError(message)
        _refuse_unsayable(update, adapter)
        updates[name] = update
    if not updates:
        message = f"{adapter.label} adapts no module; there is nothing to write."
        raise InputError(message)
    return updates


def _refuse_unsayable(update: LowRankUpdate, adapter: Adapter) -> None:
    """Raise for an update that needs more than two factors and a scale to be loaded again."""
    if update.variant not in ("", DORA):
        reason = f"a part of {update.variant}, which also changes the base weight"
    elif update.variant == DORA and update.magnitude is None:
        reason = "DoRA's, but holds no magnitude"
    elif is_expert(update):  # refused below where it is not one of a whole stack
        return
    elif update.base_name and not adapter.config.get("layer_replication"):
        reason = f"for the weight '{update.base_name}', and PEFT would look for '{update.name}'"
    else:
        return
    message = f"'{update.name}' in {adapter.label} is {reason}. It is not written."
    raise UnsupportedMethodError(message)


def _factor_tensors(update: LowRankUpdate) -> dict[str, NDArray[np.float32]]:
    """Return the tensors of one module by the end of their keys, in the shapes of its layer."""
    a, b = float32(update.A, update.name), float32(update.B, update.name)
    if update.layout == "embedding":
        return {"lora_embedding_A": a, "lora_embedding_B": b} | _magnitude(update)
    if update.layout == "conv":
        a = a.reshape(update.rank, -1, *update.kernel)
        b = b.reshape(*b.shape, *(1 for _ in update.kernel))
    return {"lora_A.weight": a, "lora_B.weight": b} | _magnitude(update)


def _magnitude(update: LowRankUpdate) -> dict[str, NDArray[np.float32]]:
    if update.magnitude is None:
        return {}
    norms = float32(update.magnitude, update.name)
    if update.layout == "conv":
        norms = norms.reshape(1, -1, *(1 for _ in update.kernel))
    return {"lora_magnitude_vector": norms}


def _tensors(adapter: Adapter, updates: Mapping[str, LowRankUpdate]) -> dict[str, NDArray[Any]]:
    """Return the tensors by key; refuse names that the keys cannot carry."""
    tensors: dict[str, NDArray[Any]] = {}
    plain = {name: update for name, update in updates.items() if not is_expert(update)}
    for name, update in plain.items():
        for end, tensor in _factor_tensors(update).items():
            tensors[f"{PREFIX}{name}.{end}"] = tensor
    stacked = stacked_factors(adapter.label, updates)
    for name, (a, b) in stacked.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    for name, tensor in adapter.saved_modules.items():
        tensors[f"{PREFIX}{name}"] = np.asarray(tensor, order="C")
    read_back = sort_keys(adapter.label, tensors)
    if set(read_back.factors.get(None, {})) != {*plain, *stacked} or (
        set(read_back.saved.get(None, {})) != set(adapter.saved_modules)
    ):
        message = f"{adapter.label}: a module's name has a meaning of its own in PEFT's layout."
        raise InputError(message)
    return tensors


def _alpha(update: LowRankUpdate, *, rslora: bool) -> float:
    """Return the alpha from which PEFT computes the update's scale; whole where it is whole."""
    divisor = math.sqrt(update.rank) if rslora else update.rank
    scale = update.known_scale()
    stated = update.alpha
    alpha = stated if stated is not None and stated / divisor == scale else scale * divisor
    # 2.0000000000000004·8 is meant as 16: the nearest whole number that gives the same scale.
    if round(alpha) / divisor == scale or alpha == round(alpha):
        return round(alpha)
    return alpha


def _config(adapter: Adapter, updates: Mapping[str, LowRankUpdate]) -> dict[str, Any]:
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
        "auto_mapping": given.get("auto_mapping"),
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


def _use_dora(adapter: Adapter, updates: Mapping[str, LowRankUpdate]) -> bool:
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
    return all(pattern_value(name, {key: value}, own) == own for name, own in values.items())


def _targets(adapter: Adapter, updates: Mapping[str, LowRankUpdate]) -> list[str] | str:
    """Return the given targets where they alone still name the modules, else these in full."""
    given = adapter.config.get("target_modules")
    alone = all(adapter.config.get(key) is None for key in _NARROWING)
    modules = [name for name, update in updates.items() if not is_expert(update)]
    listed = isinstance(given, list | tuple) and all(isinstance(one, str) for one in given)
    if not listed and not isinstance(given, str):
        return modules
    if given and alone and all(matches_target(name, given) for name in modules):
        return given if isinstance(given, str) else sorted(given)
    return modules


def _modules_to_save(adapter: Adapter) -> list[str] | None:
    """Return the modules trained in full, those that hold saved tensors."""
    given = [str(name) for name in adapter.config.get("modules_to_save") or ()]
    covered = [name for name in adapter.saved_modules if any(f".{m}." in f".{name}" for m in given)]
    rest = {n.rpartition(".")[0] for n in adapter.saved_modules if n not in covered}
    return [*given, *sorted(rest)] or None
