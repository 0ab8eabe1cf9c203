"""The folder that PEFT loads: ``adapter_config.json`` and ``adapter_model.safetensors``.

An adapter that was read from such a folder keeps what is still true: the fields of its config, the
metadata of its file, its types, its model card. Weights that were read without a config, and whose
scale is therefore unknown, are written without one.

The experts of a stack are written as PEFT stores them: one pair of factors for all, see
`formats.peft.experts`.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.fused_parts import FUSED_PARTS, parts_metadata
from lora_analysis.formats.peft.adapter_config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    refuse_more_than_factors,
)
from lora_analysis.formats.peft.experts import UNSLOTH_MARK, registered_order
from lora_analysis.formats.peft.tensor_keys import PREFIX, sort_keys
from lora_analysis.formats.side_tensors import carried_metadata, side_output, source_format
from lora_analysis.formats.written import (
    default_and_others,
    exact_alpha,
    has_unknown_scale,
    is_dora,
    json_number,
    low_rank_outlines,
    low_rank_update,
    module_tensors,
    norms_shape,
    refuse_update,
    stored_types,
)
from lora_analysis.patterns import ModulePatterns, matches_target, pattern_budget
from lora_analysis.storage.dtypes import narrow, raw_dtype
from lora_analysis.storage.tensor_writer import OutputTensor, safetensors_content

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, UpdateOutline
    from lora_analysis.storage.atomic import Content

T = TypeVar("T", int, float)

_EXPERT: Final = re.compile(r"(.+)\[(\d+)\]")
# Fields that describe the tensors and the start of the source; what holds of them is stated anew.
_OF_THE_SOURCE: Final = frozenset(
    {
        "arrow_config",
        "corda_config",
        "enable_lora",
        "eva_config",
        "exclude_modules",
        "layer_replication",
        "loftq_config",
        "lora_ga_config",
        "monteclora_config",
        "target_parameters",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        FUSED_PARTS,
    }
)
# Files next to a config that are still true after an edit; larger ones are no documents.
_DOCUMENTS: Final = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_MAX_DOCUMENT_BYTES: Final = 1 << 20
# PEFT's fields that leave out some of the modules the targets name. They are not written.
_NARROWING: Final = ("exclude_modules", "layers_pattern", "layers_to_transform")


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as PEFT's files by name; see :func:`lora_analysis.write_adapter`."""
    refuse_more_than_factors(
        adapter.config,
        adapter.label,
        "which is not written: a model that loads the file would compute different numbers.",
    )
    side = side_output(adapter, "peft")
    updates = low_rank_outlines(adapter)
    if is_bare(adapter):
        metadata = {"format": "pt"} | carried_metadata(adapter, "peft") | parts_metadata(adapter)
        return {WEIGHTS_NAME: safetensors_content(_tensors(adapter, updates) + side, metadata)}
    for update in updates.values():
        # The name of the weight is that of an expert's stack, or PEFT replicates layers.
        has_base = _is_expert(update) or adapter.config.get("layer_replication")
        refuse_update(replace(update, base_name="") if has_base else update, adapter.label, "peft")
    tensors = _tensors(adapter, updates) + side
    config = _config(adapter, updates)
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    metadata = {"format": "pt"} | carried_metadata(adapter, "peft") | parts_metadata(adapter)
    documents: dict[str, Content] = {}
    config_path = _config_path(adapter)
    if source_format(adapter) == "peft" and config_path is not None:
        for path in map(config_path.with_name, _DOCUMENTS):
            if path.is_file() and path.stat().st_size <= _MAX_DOCUMENT_BYTES:
                documents[path.name] = path.read_bytes()
    # The config is the mark: without it, half a folder is not taken for an adapter.
    return {
        WEIGHTS_NAME: safetensors_content(tensors, metadata, config=config),
        **documents,
        CONFIG_NAME: f"{text}\n".encode(),
    }


def is_bare(adapter: Adapter) -> bool:
    """Return True for weights under PEFT's keys without a config and of unknown scale."""
    return (
        source_format(adapter) == "peft"
        and _config_path(adapter) is None
        and has_unknown_scale({name: adapter.outline(name) for name in adapter})
    )


def _config_path(adapter: Adapter) -> Path | None:
    """Return the config that an adapter was read with; an edited one's is that of its source."""
    paths = adapter.provenance.inputs
    return next((path for path in paths if path.name == CONFIG_NAME), None)


def _is_expert(update: UpdateOutline) -> bool:
    """Return True if an update is that of one expert of a stack."""
    return update.base_name.endswith("]")


def _tensors(adapter: Adapter, updates: Mapping[str, UpdateOutline]) -> list[OutputTensor]:
    """Return the tensors to write; refuse names that the keys cannot carry."""
    plain = {name: update for name, update in updates.items() if not _is_expert(update)}
    stacks, tensors = _expert_tensors(adapter, updates)
    for name, update in plain.items():
        stem = f"{PREFIX}{name}"
        is_embedding = update.layout == "embedding"
        tensors += module_tensors(
            adapter,
            name,
            f"{stem}.lora_embedding_A" if is_embedding else f"{stem}.lora_A.weight",
            f"{stem}.lora_embedding_B" if is_embedding else f"{stem}.lora_B.weight",
            norms=(
                (f"{stem}.lora_magnitude_vector", norms_shape(update))
                if update.has_magnitude
                else None
            ),
            dtypes=stored_types(adapter, name, update),
        )
    for name in adapter.saved_modules:
        saved = adapter.saved_modules.read_stored(name)
        tensors.append(OutputTensor(f"{PREFIX}{name}", saved.dtype, saved.shape, saved.read))
    read_back = sort_keys(adapter.label, [tensor.name for tensor in tensors])
    if set(read_back.factors.get(None, {})) != {*plain, *stacks} or (
        set(read_back.saved.get(None, {})) != set(adapter.saved_modules)
    ):
        message = f"{adapter.label}: a module's name has a meaning of its own in PEFT's layout."
        raise InputError(message)
    return tensors


def _expert_tensors(
    adapter: Adapter, updates: Mapping[str, UpdateOutline]
) -> tuple[list[str], list[OutputTensor]]:
    """Return the modules of the stacks' keys, and A ``(r·E, in)`` and B ``(out, r·E)`` of each.

    A goes expert by expert, of B every E-th column is an expert's. Several parameters of one
    module nest, the one that is registered first innermost.

    Raises
    ------
    UnsupportedMethodError
        A stack lacks an expert, or its experts differ in rank or scale.
    """
    stacks: dict[str, dict[str, dict[int, str]]] = {}
    for name, update in updates.items():
        if match := _EXPERT.fullmatch(update.base_name):
            owner, _, parameter = match[1].rpartition(".")
            stacks.setdefault(owner, {}).setdefault(parameter, {})[int(match[2])] = name
    modules, tensors = [], []
    for owner, parameters in stacks.items():
        for depth, parameter in enumerate(reversed(registered_order(list(parameters)))):
            members = parameters[parameter]
            outlines = [updates[name] for name in members.values()]
            kinds = {(u.shape, u.rank, u.known_scale()) for u in outlines}
            if sorted(members) != list(range(len(members))) or len(members) < 2 or len(kinds) > 1:
                message = (
                    f"{adapter.label}: PEFT stores the experts of '{owner}.{parameter}' all "
                    f"together with one rank and scale; found {len(members)} of them, up to number "
                    f"{max(members)}, with {len(kinds)} ranks or scales. It is not written."
                )
                raise UnsupportedMethodError(message)
            ((d_out, d_in), rank, _) = kinds.pop()
            count = len(members)
            names = [members[expert] for expert in range(count)]
            dtypes = {stored_types(adapter, name, updates[name])[0] for name in names}
            dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
            module = owner + ".base_layer" * depth
            modules.append(module)
            for role, shape, produce in (
                ("A", (count * rank, d_in), _stacked_a),
                ("B", (d_out, rank * count), _stacked_b),
            ):
                key = f"{PREFIX}{module}.lora_{role}.weight"
                producer = partial(produce, adapter, names, dtype)
                tensors.append(OutputTensor(key, dtype, shape, producer))
    return modules, tensors


def _stacked_a(adapter: Adapter, names: Sequence[str], dtype: str) -> NDArray[Any]:
    """Return A of all experts below each other; one expert at a time is loaded."""
    first = low_rank_update(adapter, names[0]).A
    whole = np.empty((len(names), *first.shape), raw_dtype(dtype))  # (E, r, in)
    for expert, name in enumerate(names):
        whole[expert] = narrow(low_rank_update(adapter, name).A, dtype, f"A of '{name}'")
    return whole.reshape(-1, first.shape[1])


def _stacked_b(adapter: Adapter, names: Sequence[str], dtype: str) -> NDArray[Any]:
    first = low_rank_update(adapter, names[0]).B
    whole = np.empty((*first.shape, len(names)), raw_dtype(dtype))  # (out, r, E)
    for expert, name in enumerate(names):
        whole[:, :, expert] = narrow(low_rank_update(adapter, name).B, dtype, f"B of '{name}'")
    return whole.reshape(len(whole), -1)


def _config(adapter: Adapter, updates: Mapping[str, UpdateOutline]) -> dict[str, Any]:
    """Return the config's fields: those given that are still true, and those of the factors.

    Fields that only newer versions of PEFT have are stated only if they are set.
    """
    given = adapter.config
    further: dict[str, Any] = {}
    if source_format(adapter) == "peft" and given.get("peft_type", "LORA") == "LORA":
        further = {key: given[key] for key in given if not (key in _OF_THE_SOURCE and given[key])}
    rslora = bool(given.get("use_rslora"))
    newer = {
        "layer_replication": given.get("layer_replication"),
        "use_dora": is_dora(updates.values(), adapter.label, "peft"),
    }
    # A stack of experts goes by the name of its parameter, with one rank and one scale.
    named = {
        update.base_name.rpartition("[")[0] if _is_expert(update) else name: update
        for name, update in updates.items()
    }
    rank, rank_pattern = _default_and_pattern({name: u.rank for name, u in named.items()})
    alpha, alpha_pattern = _default_and_pattern(
        {name: json_number(exact_alpha(u, rslora=rslora)) for name, u in named.items()}
    )
    stacks = [name for name, update in named.items() if _is_expert(update)]
    if stacks:  # tells a reader that A acts on the inputs, which it did not before 0.19
        newer |= {"target_parameters": stacks, "peft_version": "0.19.0"}
    start = given.get("init_lora_weights")
    mapping = given.get("auto_mapping")
    if isinstance(mapping, dict):  # the experts are written in PEFT's order, not in Unsloth's
        mapping = {key: value for key, value in mapping.items() if key != UNSLOTH_MARK} or None
    return (
        further
        | {
            "alpha_pattern": alpha_pattern,
            "auto_mapping": mapping,
            "base_model_name_or_path": given.get("base_model_name_or_path")
            or adapter.provenance.base_model,
            "bias": "none",
            "fan_in_fan_out": any(update.layout == "conv1d" for update in updates.values()),
            "inference_mode": True,
            "init_lora_weights": start if start in (False, "gaussian") else True,
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
        }
        | {key: value for key, value in newer.items() if value}
    )


def _default_and_pattern(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """Return the commonest value, and a pattern for every module that differs.

    PEFT takes the first key that matches a module's name or its tail as a regular expression, and
    sorts the keys when it saves. Plain names are used (every version reads them) unless one of
    them would match a module with a different value; then all are anchored and escaped.
    """
    default, others = default_and_others(values)
    for name, value in others.items():
        pattern = ModulePatterns({name: value})
        if re.escape(name) != name.replace(".", r"\.") or any(
            pattern.value(module, expected) != expected for module, expected in values.items()
        ):
            return default, {f"^{re.escape(key)}": value for key, value in others.items()}
    return default, others


def _targets(adapter: Adapter, updates: Mapping[str, UpdateOutline]) -> list[str] | str:
    """Return the given targets if they alone still name the modules, else these in full."""
    given = adapter.config.get("target_modules")
    alone = all(adapter.config.get(key) is None for key in _NARROWING)
    modules = [name for name, update in updates.items() if not _is_expert(update)]
    is_list = isinstance(given, list | tuple) and all(isinstance(name, str) for name in given)
    if not is_list and not isinstance(given, str):
        return modules
    with pattern_budget():
        if given and alone and all(matches_target(name, given) for name in modules):
            return given if isinstance(given, str) else sorted(given)
    return modules


def _modules_to_save(adapter: Adapter) -> list[str] | None:
    """Return the given modules to save, and those of further saved tensors."""
    given = [str(name) for name in adapter.config.get("modules_to_save") or ()]
    covered = [name for name in adapter.saved_modules if any(f".{m}." in f".{name}" for m in given)]
    rest = {n.rpartition(".")[0] for n in adapter.saved_modules if n not in covered}
    return [*given, *sorted(rest)] or None
