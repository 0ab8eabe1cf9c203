"""PEFT's ``target_parameters``: one pair of factors for a stack of experts, per expert.

``A`` is ``(r·E, in)``, expert by expert; ``B`` is ``(out, r·E)``, in which the column of expert e
is every E-th: ``ΔW_e = s·B[:, e::E]·A[e·r:(e+1)·r]`` (PEFT, ``ParamWrapper``). Several parameters
of one module nest in the order in which the module registers them, the first innermost, and no
key says which is which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.formats.factors import StoredPair
from lora_analysis.formats.stored import tensor
from lora_analysis.patterns import matches_target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_analysis.formats.factors import FactorRole
    from lora_analysis.formats.peft_config import PeftConfig
    from lora_analysis.storage.tensors import NamedTensors

_INSIDE: Final = ".base_layer"
# Every model with such experts registers the first projections before the last.
_REGISTERED: Final = ("gate_up_proj", "gate_proj", "up_proj", "w1", "v1", "w3", "down_proj", "w2")
_MAX_EXPERTS: Final = 4096
# Before this version PEFT took the axes as (expert, in, out) whatever the model said.
_TURNS_SINCE: Final = (0, 19)


@dataclass(slots=True)
class ExpertPairs:
    """The pairs of one parameter, one per expert."""

    pairs: list[StoredPair] = field(default_factory=list)
    config_names: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def expert_pairs(
    path: object,
    tensors: NamedTensors,
    pair: StoredPair,
    factors: Mapping[str, Mapping[FactorRole, str]],
    config: PeftConfig,
) -> ExpertPairs | None:
    """Return the pairs of every expert, or None where the pair is that of a plain module.

    ``factors`` are those of the whole adapter, from which the nesting is known. A module of
    one expert (a parameter that is a matrix) goes by the name of its parameter.
    """
    owner = _owner_of(pair.module)
    if not config.target_parameters or _is_module(owner, config):
        return None
    targets = _parameters_of(owner, config.target_parameters)
    if not targets:
        return None
    levels = [name for name in factors if _owner_of(name) == owner]
    levels.sort(key=len, reverse=True)  # the innermost first
    if len(levels) != len(targets):
        message = (
            f"{path}: '{owner}' has {len(levels)} pairs of factors, target_parameters names "
            f"{len(targets)} of its parameters: {', '.join(targets)}."
        )
        raise MalformedFileError(message)
    shapes = [_features(tensors, factors[level]) for level in levels]
    ordered = _in_order_of_shapes(registered_order(targets), shapes)
    return _split(
        path,
        tensors,
        pair,
        config,
        owner=owner,
        parameter=ordered[levels.index(pair.module)],
        shapes=dict(zip(ordered, shapes, strict=True)),
    )


def _owner_of(name: str) -> str:
    while name.endswith(_INSIDE):
        name = name.removesuffix(_INSIDE)
    return name


def _is_module(owner: str, config: PeftConfig) -> bool:
    targets = config.raw.get("target_modules")
    if not targets or not isinstance(targets, str | list):
        return False
    try:
        return matches_target(owner, targets)
    except InputError as error:
        message = f"{config.path}: target_modules: {error}"
        raise MalformedFileError(message) from error


def _parameters_of(owner: str, targets: tuple[str, ...]) -> list[str]:
    """Return the parameters of a module that are targets: full names, or their last segments."""
    found = []
    for target in targets:
        module, _, parameter = target.rpartition(".")
        if not module or owner == module or owner.endswith(f".{module}"):
            found.append(parameter)
    return list(dict.fromkeys(found))


def registered_order(parameters: list[str]) -> list[str]:
    """Return the parameters in the order of registration; unknown ones as the config has them."""
    if all(name in _REGISTERED for name in parameters):
        return sorted(parameters, key=_REGISTERED.index)
    return parameters


def _features(tensors: NamedTensors, stored: Mapping[FactorRole, str]) -> tuple[int, int]:
    """Return the columns of A and the rows of B, whatever the number of experts."""
    a = tensors.infos[stored["A"]].shape if "A" in stored else ()
    b = tensors.infos[stored["B"]].shape if "B" in stored else ()
    return (a[-1] if len(a) == 2 else 0), (b[0] if len(b) == 2 else 0)


def _in_order_of_shapes(parameters: list[str], shapes: list[tuple[int, int]]) -> list[str]:
    """Return the parameters as nested; shapes that allow only the other order decide.

    ``gate_up_proj`` maps d to 2·m features, ``down_proj`` m back to d.
    """
    if parameters != ["gate_up_proj", "down_proj"] or _fits(*shapes) or not _fits(*shapes[::-1]):
        return parameters
    return parameters[::-1]


def _fits(gate_up: tuple[int, int], down: tuple[int, int]) -> bool:
    return _straight(gate_up, down) or _straight(gate_up[::-1], down[::-1])


def _straight(gate_up: tuple[int, int], down: tuple[int, int]) -> bool:
    return gate_up[0] == down[1] and gate_up[1] == 2 * down[0]


def _is_turned(shapes: Mapping[str, tuple[int, int]], config: PeftConfig) -> bool | None:
    """Say whether A acts on the outputs, as PEFT wrote it before 0.19; None if it cannot be known.

    Two parameters of one module tell by their shapes, one alone by the version in the config.
    """
    if {"gate_up_proj", "down_proj"} <= shapes.keys():
        pair = shapes["gate_up_proj"], shapes["down_proj"]
        straight, turned = _straight(*pair), _straight(pair[0][::-1], pair[1][::-1])
        if straight != turned:
            return turned
    match = re.match(r"(\d{1,9})\.(\d{1,9})", str(config.raw.get("peft_version")))
    if match and (int(match[1]), int(match[2])) >= _TURNS_SINCE:
        return False
    return None


def _split(
    path: object,
    tensors: NamedTensors,
    pair: StoredPair,
    config: PeftConfig,
    *,
    owner: str,
    parameter: str,
    shapes: Mapping[str, tuple[int, int]],
) -> ExpertPairs:
    name = f"{owner}.{parameter}"
    rank, rows = config.stated_rank(name), pair.a.shape(tensors)[0]
    if rank is None or rows % rank or not 0 < rows // rank <= _MAX_EXPERTS:
        message = (
            f"{path}: the {rows} rows of '{pair.a.name}' are those of all experts; the config "
            f"gives rank {rank}, which does not say how many there are."
        )
        raise MalformedFileError(message)
    if any(len(factor.shape(tensors)) != 2 for factor in (pair.a, pair.b)):
        message = f"{path}: '{pair.a.name}' of '{name}' must be a matrix of all experts' rows."
        raise UnsupportedMethodError(message)
    experts, found = rows // rank, ExpertPairs()
    turned = experts > 1 and _is_turned(shapes, config)
    if turned is None:
        found.findings.append(
            f"'{parameter}': whether A of the experts acts on the inputs is not stated (PEFT "
            "before 0.19 took the axes as they came); it is taken to. Hold it against the base."
        )
    for expert in range(experts):
        a = tensor(pair.a.name, shared=True).rows(slice(expert * rank, (expert + 1) * rank))
        b = tensor(pair.b.name, shared=True).columns(slice(expert, None, experts))
        if turned:
            a, b = b.transposed(), a.transposed()
        module = f"{owner}.{expert}.{parameter}" if experts > 1 else name
        base_name = f"{name}[{expert}]" if experts > 1 else name
        found.pairs.append(StoredPair(module, a, b, base_name=base_name))
        found.config_names[module] = name
    return found
