"""PEFT's ``target_parameters``: one pair of factors for a stack of experts, per expert.

``A`` is ``(r·E, in)``, expert by expert; ``B`` is ``(out, r·E)``, in which expert e has every E-th
column: ``ΔW_e = s·B[:, e::E]·A[e·r:(e+1)·r]`` (PEFT, ``ParamWrapper``). Unsloth packed the columns
of an expert next to each other until September 2026 and marks such configs. Several parameters of
one module nest in the order in which the module registers them, the first innermost, and the keys
do not name them.

A parameter that is a matrix has one "expert"; the ``weight`` of a module is the module itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.formats.factors import StoredPair
from lora_analysis.formats.stored import tensor
from lora_analysis.patterns import matches_target
from lora_analysis.storage.limits import MAX_EXPERTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_analysis.formats.factors import FactorRole
    from lora_analysis.formats.options import ExpertOrder, ReadOptions
    from lora_analysis.formats.peft.adapter_config import PeftConfig
    from lora_analysis.storage.tensors import NamedTensors

_INSIDE: Final = ".base_layer"
# Every model with such experts registers the first projections before the last.
_REGISTERED: Final = ("gate_up_proj", "gate_proj", "up_proj", "w1", "v1", "w3", "down_proj", "w2")
# Before this version PEFT took the axes as (expert, in, out) for every model.
_ORDERED_SINCE: Final = (0, 19)
UNSLOTH_MARK: Final = "unsloth_fixed"
_ORDER_REASONS: Final = {
    "caller": "as the caller chose",
    "mark": "by Unsloth's mark in the config, auto_mapping.unsloth_fixed",
    "default": "as PEFT packs them: the config has no mark of another writer",
}


@dataclass(slots=True)
class ExpertPairs:
    """The pairs of one parameter, one per expert.

    ``experts`` is 0 for a parameter that is a matrix; ``code`` is that of the finding about them.
    """

    pairs: list[StoredPair] = field(default_factory=list)
    config_names: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    parameter: str = ""
    experts: int = 0
    code: str = "expert-order"


def expert_pairs(
    path: object,
    tensors: NamedTensors,
    pair: StoredPair,
    factors: Mapping[str, Mapping[FactorRole, str]],
    *,
    config: PeftConfig,
    options: ReadOptions,
) -> ExpertPairs | None:
    """Return the pairs of every expert, or None if the pair is that of a plain module.

    ``factors`` are those of the whole adapter, which show the nesting. A module of one expert (a
    parameter that is a matrix) goes by the name of its parameter.
    """
    owner = _strip_nesting(pair.module)
    if _is_target_module(owner, config):
        return None
    # Targets are full names of parameters, or their last segments.
    split_targets = [target.rpartition(".") for target in config.target_parameters]
    targets = list(
        dict.fromkeys(
            parameter
            for module, _, parameter in split_targets
            if not module or owner == module or owner.endswith(f".{module}")
        )
    )
    if not targets:
        return None
    levels = [name for name in factors if _strip_nesting(name) == owner]
    levels.sort(key=len, reverse=True)  # the innermost first
    if len(levels) != len(targets):
        message = (
            f"{path}: '{owner}' has {len(levels)} pairs of factors, target_parameters names "
            f"{len(targets)} of its parameters: {', '.join(targets)}."
        )
        raise MalformedFileError(message)
    shapes = []
    for stored in (factors[level] for level in levels):
        # The columns of A and the rows of B do not depend on the number of experts.
        a = tensors.infos[stored["A"]].shape if "A" in stored else ()
        b = tensors.infos[stored["B"]].shape if "B" in stored else ()
        shapes.append(((a[-1] if len(a) == 2 else 0), (b[0] if len(b) == 2 else 0)))
    ordered = registered_order(targets)
    # Shapes that allow only the other order decide.
    if ordered == ["gate_up_proj", "down_proj"] and not _fit(*shapes) and _fit(*shapes[::-1]):
        ordered.reverse()
    return _split(
        path,
        tensors,
        pair,
        config,
        options,
        owner=owner,
        parameter=ordered[levels.index(pair.module)],
        shapes=dict(zip(ordered, shapes, strict=True)),
    )


def _strip_nesting(name: str) -> str:
    while name.endswith(_INSIDE):
        name = name.removesuffix(_INSIDE)
    return name


def _is_target_module(owner: str, config: PeftConfig) -> bool:
    targets = config.raw.get("target_modules")
    if not targets or not isinstance(targets, str | list):
        return False
    try:
        return matches_target(owner, targets)
    except InputError as error:
        message = f"{config.path}: target_modules: {error}"
        raise MalformedFileError(message) from error


def registered_order(parameters: list[str]) -> list[str]:
    """Return the parameters in the order of registration; unknown ones in the config's order."""
    if all(name in _REGISTERED for name in parameters):
        return sorted(parameters, key=_REGISTERED.index)
    return parameters


def _fit(gate_up: tuple[int, int], down: tuple[int, int]) -> bool:
    return _fit_inputs(gate_up, down) or _fit_inputs(gate_up[::-1], down[::-1])


def _fit_inputs(gate_up: tuple[int, int], down: tuple[int, int]) -> bool:
    """Return True if A acts on inputs: ``gate_up_proj`` d to 2·m, ``down_proj`` m back to d."""
    return gate_up[0] == down[1] and gate_up[1] == 2 * down[0]


def _acts_on_outputs(shapes: Mapping[str, tuple[int, int]], config: PeftConfig) -> bool | None:
    """Return True if A acts on the outputs, as PEFT wrote it before 0.19; None if not known.

    The shapes of two parameters of one module decide, or the version in the config.
    """
    if {"gate_up_proj", "down_proj"} <= shapes.keys():
        gate_up, down = shapes["gate_up_proj"], shapes["down_proj"]
        on_outputs = _fit_inputs(gate_up[::-1], down[::-1])
        if _fit_inputs(gate_up, down) != on_outputs:
            return on_outputs
    match = re.match(r"(\d{1,9})\.(\d{1,9})", str(config.raw.get("peft_version")))
    if match and (int(match[1]), int(match[2])) >= _ORDERED_SINCE:
        return False
    return None


def expert_order(config: PeftConfig, options: ReadOptions) -> tuple[ExpertOrder, str]:
    """Return the order of the columns of B, and why: "caller", "mark" or "default"."""
    if options.expert_order is not None:
        return options.expert_order, "caller"
    mapping = config.raw.get("auto_mapping")
    if isinstance(mapping, dict) and mapping.get(UNSLOTH_MARK) is True:
        return "expert-slowest", "mark"
    return "expert-fastest", "default"


def _count_experts(
    path: object,
    pair: StoredPair,
    rows: int,
    config: PeftConfig,
    options: ReadOptions,
    *,
    name: str,
) -> int:
    """Return the number of experts that have rows in A.

    Raises
    ------
    MalformedFileError
        The rows are not a multiple of the config's rank, or of the caller's number of experts.
    """
    if options.experts is not None and not name.endswith(".weight"):
        if rows % options.experts:
            message = (
                f"{path}: the {rows} rows of '{pair.a.name}' cannot be those of "
                f"{options.experts} experts: {rows} is not a multiple of {options.experts}."
            )
            raise MalformedFileError(message)
        return options.experts
    rank = config.stated_rank(name)
    if rank is None or rows % rank or not 0 < rows // rank <= MAX_EXPERTS:
        message = (
            f"{path}: the {rows} rows of '{pair.a.name}' are those of all experts; the config "
            f"gives rank {rank}, from which their number does not follow. Pass experts=, the "
            "number of experts of the base (command line: --experts)."
        )
        raise MalformedFileError(message)
    return rows // rank


def _split(
    path: object,
    tensors: NamedTensors,
    pair: StoredPair,
    config: PeftConfig,
    options: ReadOptions,
    *,
    owner: str,
    parameter: str,
    shapes: Mapping[str, tuple[int, int]],
) -> ExpertPairs:
    name = f"{owner}.{parameter}"
    shape = pair.a.shape(tensors), pair.b.shape(tensors)
    if len(shape[0]) != 2 or len(shape[1]) != 2:
        message = (
            f"{path}: '{pair.a.name}' {shape[0]} and '{pair.b.name}' {shape[1]} of '{name}' must "
            "be matrices of all experts' rows and columns."
        )
        raise UnsupportedMethodError(message)
    rows = shape[0][0]
    experts = _count_experts(path, pair, rows, config, options, name=name)
    rank = rows // experts
    if experts == 1:
        module = owner if parameter == "weight" else name
        base_name = "" if parameter == "weight" else name
        plain = StoredPair(module, tensor(pair.a.name), tensor(pair.b.name), base_name=base_name)
        return ExpertPairs([plain], {module: name})
    split = ExpertPairs(parameter=parameter, experts=experts)
    on_outputs = _acts_on_outputs(shapes, config)
    if on_outputs is None:
        split.findings.append(Finding("expert-orientation-unknown", {"parameter": parameter}))
    order, _ = expert_order(config, options)
    for expert in range(experts):
        rows_of_a = slice(expert * rank, (expert + 1) * rank)
        columns = rows_of_a if order == "expert-slowest" else slice(expert, None, experts)
        a = tensor(pair.a.name, shared=True).rows(rows_of_a)
        b = tensor(pair.b.name, shared=True).columns(columns)
        if on_outputs:
            a, b = b.transpose(), a.transpose()
        module = f"{owner}.{expert}.{parameter}"
        split.pairs.append(StoredPair(module, a, b, base_name=f"{name}[{expert}]"))
        split.config_names[module] = name
    return split


def is_shared_stack(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return True for A ``(1 or E, r, d_in)`` and B ``(1 or E, d_out, r)``, from their shapes.

    The kernels of a ``Conv1d``, A ``(r, c_in, k)`` and B ``(c_out, r, 1)``, have three axes too.
    """
    if len(a) != 3 or len(b) != 3 or a[1] != b[2] or 0 in (*a, *b):
        return False
    kernel = b[2] == 1 and a[0] % b[1] == 0
    return not kernel and (a[0] == b[0] or 1 in (a[0], b[0]))


def shared_pairs(path: object, tensors: NamedTensors, pair: StoredPair) -> ExpertPairs:
    """Return the pairs of every expert of factors with three axes, one of which may be shared.

    Reference: Tinker's adapters of mixtures of experts: w1 and w3 share A ``(1, r, d_in)`` and
    have B ``(E, d_out, r)``, w2 has A ``(E, r, d_in)`` and shares B ``(1, d_out, r)``.
    """
    a, b = pair.a.shape(tensors), pair.b.shape(tensors)
    experts = max(a[0], b[0])
    if experts > MAX_EXPERTS:
        message = (
            f"{path}: '{pair.module}' has factors {a} and {b} of {experts} experts; the limit is "
            f"{MAX_EXPERTS}."
        )
        raise MalformedFileError(message)
    owner, _, parameter = pair.module.rpartition(".")
    code = "expert-stack" if a[0] == b[0] else "expert-factors-shared"
    split = ExpertPairs(parameter=parameter, experts=experts, code=code)
    for expert in range(experts):
        module = f"{owner}.{expert}.{parameter}"
        split.pairs.append(
            StoredPair(
                module,
                tensor(pair.a.name, shared=True).at(expert if a[0] > 1 else 0),
                tensor(pair.b.name, shared=True).at(expert if b[0] > 1 else 0),
            )
        )
        split.config_names[module] = pair.module
    return split


def expert_findings(
    stacks: Sequence[ExpertPairs], config: PeftConfig, options: ReadOptions
) -> list[Finding]:
    """Return the findings about the stacks of an adapter, once for all of a kind."""
    groups: dict[tuple[str, int], list[str]] = {}
    findings: list[Finding] = []
    for stack in stacks:
        findings += [finding for finding in stack.findings if finding not in findings]
        if stack.experts:
            groups.setdefault((stack.code, stack.experts), []).append(stack.parameter)
    for (code, experts), parameters in groups.items():
        fields: dict[str, object] = {"parameters": sorted(set(parameters)), "experts": experts}
        if code == "expert-order":
            order, source = expert_order(config, options)
            reason = _ORDER_REASONS[source]
            fields |= {"order": order, "source": source, "reason": reason}
        findings.append(Finding(code, fields))
    return findings
