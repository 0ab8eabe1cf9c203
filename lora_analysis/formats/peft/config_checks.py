"""Compare ``adapter_config.json`` with the tensors: which modules, layers and ranks are missing.

No rule compares types of modules with each other: models that mix kinds of layers (attention in
every fourth, experts in some) would be accused. Each rule looks at one type's own layers, or at one
field of the config.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError
from lora_analysis.finding import Finding
from lora_analysis.names import may_be_tied
from lora_analysis.patterns import layer_index, matches_target

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from lora_analysis.formats.peft.adapter_config import PeftConfig

# Heads that PEFT adds to modules_to_save by itself, by the type of the task; one is enough.
_HEADS: Final = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_NUMBER: Final = re.compile(r"(?<![^.])\d{1,9}(?![^.])")
_DIGIT: Final = re.compile(r"\d")
# More missing layers than this share are a choice, not a loss.
_MISSING_SHARE: Final = 0.25
_MAX_LISTED: Final = 8
_MAX_LAYERS: Final = 10_000


@dataclass(frozen=True, slots=True)
class ModuleInventory:
    """The content of a file, under the names of modules that the config uses.

    ``adapted`` are the modules with factors, ``pruned`` those that AdaLoRA cut to rank 0, ``saved``
    tensors trained in full, ``biases`` biases of the base among them.
    """

    adapted: Sequence[str]
    pruned: Collection[str] = ()
    saved: Collection[str] = ()
    biases: int = 0


def config_gaps(config: PeftConfig, stored: ModuleInventory) -> list[Finding]:
    """Return findings about modules that only the config, or only the file, has."""
    if config.path is None:
        return []
    findings = [*_target_findings(config, stored), *_layer_findings(config, stored)]
    heads = _HEADS.get(str(config.raw.get("task_type")), ())
    modules = {module for name in stored.saved for module in _owners(name)}
    present = _endings(modules, _modules_to_save(config))
    head_stored = not present.isdisjoint(heads)
    missing = [
        entry
        for entry in dict.fromkeys(config.modules_to_save)
        if entry not in present and not (entry in heads and head_stored)
    ]
    if missing:
        fields = {"modules": missing[:_MAX_LISTED], "of": len(set(config.modules_to_save))}
        findings.append(Finding("config-saved-missing", fields))
    bias = config.raw.get("bias")
    if isinstance(bias, str) and bias not in ("", "none") and not stored.biases:
        findings.append(Finding("config-biases-missing", {"bias": bias}))
    return findings


def saves_in_full(config: PeftConfig, tensor: str) -> bool:
    """Return True if the config has PEFT save this tensor in full.

    PEFT takes every module whose name ends with an entry of ``modules_to_save``, in the middle of
    a segment too; it adds the heads of classifiers, and with ``ensure_weight_tying`` the module
    that shares its weight with a saved embedding.
    """
    saved = _modules_to_save(config)
    modules = _owners(tensor)
    if _endings(modules, saved):
        return True
    tied = config.raw.get("ensure_weight_tying") is True
    return tied and _is_tied(modules) and any(_is_tied([name]) for name in saved)


def _owners(tensor: str) -> list[str]:
    """Return the names of all modules that a tensor lies in."""
    segments = tensor.split(".")
    return [".".join(segments[:count]) for count in range(1, len(segments))]


def _endings(names: Iterable[str], ends: Collection[str]) -> set[str]:
    """Return those of ``ends`` with which a name ends, wherever its segments begin."""
    pool = set(ends)
    lengths = {len(end) for end in pool}
    return {
        end
        for name in names
        for length in lengths
        if length <= len(name) and (end := name[len(name) - length :]) in pool
    }


def _modules_to_save(config: PeftConfig) -> tuple[str, ...]:
    return (*config.modules_to_save, *_HEADS.get(str(config.raw.get("task_type")), ()))


def _is_tied(modules: Iterable[str]) -> bool:
    return any(map(may_be_tied, modules))


def _target_findings(config: PeftConfig, stored: ModuleInventory) -> list[Finding]:
    findings = _exclusion_findings(config, stored) if config.raw.get("exclude_modules") else []
    targets = config.raw.get("target_modules")
    entries = [targets] if isinstance(targets, str) else targets
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        return findings
    if not entries or any(entry.lower() == "all-linear" for entry in entries):
        return findings
    names = [*stored.adapted, *stored.pruned]
    if isinstance(targets, list):
        ends = {end for name in names for end in _ends(name)}
        if missing := [target for target in targets if target not in ends]:
            fields = {"targets": missing[:_MAX_LISTED], "count": len(missing), "of": len(targets)}
            findings.append(Finding("config-targets-missing", fields))
    pool = targets if isinstance(targets, str) else frozenset(entries)
    try:
        beyond = [name for name in stored.adapted if not _is_target(config, name, pool)]
    except InputError as error:  # an expression that PEFT cannot use either
        return [*findings, Finding("config-targets-unchecked", {"reason": str(error)})]
    if beyond:
        fields = {"modules": len(beyond), "of": len(stored.adapted), "first": beyond[0]}
        findings.append(Finding("config-targets-exceeded", fields))
    return findings


def _exclusion_findings(config: PeftConfig, stored: ModuleInventory) -> list[Finding]:
    """Return the modules with factors that ``exclude_modules`` keeps from being adapted."""
    excluded = config.raw.get("exclude_modules")
    if isinstance(excluded, list):
        patterns: str | frozenset[str] = frozenset(
            name for name in excluded if isinstance(name, str)
        )
    elif isinstance(excluded, str):
        patterns = excluded
    else:
        return []
    try:
        modules = [name for name in stored.adapted if patterns and _matches(name, patterns)]
    except InputError:  # an expression that PEFT, too, cannot use: it decides nothing here
        return []
    if not modules:
        return []
    fields = {"modules": len(modules), "of": len(stored.adapted), "first": modules[0]}
    return [Finding("config-excluded", fields)]


def _ends(name: str) -> list[str]:
    segments = name.split(".")
    return [".".join(segments[i:]) for i in range(len(segments))]


def _matches(name: str, targets: str | frozenset[str]) -> bool:
    if isinstance(targets, str):
        return matches_target(name, targets)
    return not targets.isdisjoint(_ends(name))


def _is_target(config: PeftConfig, name: str, targets: str | frozenset[str]) -> bool:
    if _matches(name, targets):
        return True
    # Inside a target lie the projections of an attention module; a tied one is added by PEFT.
    owner = name.rpartition(".")[0]
    if owner and name.endswith(".out_proj") and _matches(owner, targets):
        return True
    if config.raw.get("ensure_weight_tying") is True and _is_tied([name]):
        return True
    return any(name == target or name.endswith(f".{target}") for target in config.target_parameters)


def _layer_findings(config: PeftConfig, stored: ModuleInventory) -> list[Finding]:
    """Return the layers that the config names and the file lacks, or that a type lacks within."""
    layers: dict[str, set[int]] = {}
    for name in (*stored.adapted, *stored.pruned):
        index = layer_index(name)
        # A number at the end counts the parts of a sequence, of which some have no weights.
        if index is not None and not name.rpartition(".")[2].isdecimal():
            layers.setdefault(_NUMBER.sub("*", name, count=1), set()).add(index)
    if not layers:
        return []
    fields: dict[str, object]
    entry = config.raw.get("layers_to_transform")
    chosen: list[Any] = entry if isinstance(entry, list) else [entry]
    if chosen and all(type(layer) is int for layer in chosen):
        return _layer_choice_findings(set(chosen), set.union(*layers.values()))
    if _selects_layers(config):
        return []
    gaps: dict[str, list[int]] = {}
    for kind, indices in layers.items():
        span = range(min(indices), max(indices) + 1)
        if len(span) <= _MAX_LAYERS and _looks_lost([index in indices for index in span]):
            gaps[kind] = [index for index in span if index not in indices]
    if not gaps:
        return []
    kind, missing = next(iter(gaps.items()))
    fields = {
        "modules": sum(map(len, gaps.values())),
        "types": len(gaps),
        "first": kind.replace("*", str(missing[0]), 1),
        "layers": sorted(set().union(*gaps.values()))[:_MAX_LISTED],
    }
    return [Finding("layers-missing", fields)]


def _layer_choice_findings(chosen: Collection[int], present: Collection[int]) -> list[Finding]:
    """Return how the layers with factors differ from those in ``layers_to_transform``."""
    ordered = sorted(chosen)
    missing = [layer for layer in ordered if layer not in present]
    if not _looks_lost([layer in present for layer in ordered]):
        missing = []
    beyond = sorted(set(present) - set(chosen))
    if not missing and not beyond:
        return []
    fields = {"missing": missing[:_MAX_LISTED], "beyond": beyond[:_MAX_LISTED]}
    return [Finding("config-layers-differ", fields)]


def _selects_layers(config: PeftConfig) -> bool:
    """Return True if the config may name single layers itself, in a pattern or in full."""
    texts: list[str] = []
    for key in ("target_modules", "exclude_modules"):
        value = config.raw.get(key)
        values = value if isinstance(value, list) else [value]
        texts += [text for text in values if isinstance(text, str)]
    texts += config.target_parameters
    return any(_DIGIT.search(re.sub(r"(?<=[A-Za-z_])\d+", "", text)) for text in texts)


def _looks_lost(members: Sequence[bool]) -> bool:
    """Return True if the absent members of a sequence are few and follow no pattern.

    A pattern that repeats at least twice (attention in every fourth layer) and a type that is in
    few of the layers are how models are built.
    """
    missing = members.count(False)
    if not missing or (missing > 1 and missing > _MISSING_SHARE * len(members)):
        return False
    return not any(
        all(members[i] == members[i + period] for i in range(len(members) - period))
        for period in range(2, len(members) // 2 + 1)
    )
