"""The two factors of each module of a PEFT file, for every kind of layer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import MalformedFileError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.formats.factors import StoredPair, complete_pairs
from lora_analysis.formats.peft.experts import (
    ExpertPairs,
    expert_findings,
    expert_pairs,
    is_shared_stack,
    shared_pairs,
)
from lora_analysis.formats.stored import block_diagonal, tensor
from lora_analysis.patterns import module_type
from lora_analysis.text import plural

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_analysis.formats.factors import FactorRole
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.formats.peft.adapter_config import PeftConfig
    from lora_analysis.formats.peft.tensor_keys import Part, SortedKeys
    from lora_analysis.storage.tensors import NamedTensors

# Conv3d's kernel has three axes in addition to those of the channels.
_CONV_AXES: Final = 5
_LAYER = re.compile(
    r"(?P<before>(model\.)*(bert\.)?(layers|encoder\.layer|h))\.(?P<index>\d{1,9})\."
)

# Widths of kernels, the commonest first.
_WIDTHS = (3, 5, 7, 1)

GATHER = (
    "Gather them: run zero_to_fp32.py of the checkpoint and read the file that it makes, or save "
    "again with zero3_save_16bit_model (DeepSpeed) or with full, gathered state dictionaries "
    "(FSDP)."
)
_NUMBERS: Final = {2: "two", 3: "three", 4: "four"}

DORA = "DoRA"
KASA = "KaSA"


@dataclass(slots=True)
class PeftPairs:
    """The pairs of one adapter, and findings about them.

    ``config_names`` holds the name of a module in the config, if it is another one.
    """

    pairs: list[StoredPair] = field(default_factory=list)
    config_names: dict[str, str] = field(default_factory=dict)
    divisors: dict[str, str] = field(default_factory=dict)
    pruned: list[str] = field(default_factory=list)
    findings: list[Finding | str] = field(default_factory=list)


def read_pairs(
    path: object,
    tensors: NamedTensors,
    keys: SortedKeys,
    chosen: str | None,
    *,
    config: PeftConfig,
    options: ReadOptions,
) -> PeftPairs:
    """Return the factors of every module of the adapter called ``chosen``.

    Raises
    ------
    MalformedFileError
        Tensors of a module are missing or do not belong together.
    UnsupportedMethodError
        Factors lie inside others, and no config says of which parameters.
    """
    content = PeftPairs()
    extras = keys.extras.get(chosen, {})
    factors = _without_pruned(path, tensors, keys, chosen, content)
    factors = _without_placeholders(path, tensors, factors, content.findings)
    _refuse_slices(path, tensors, factors, config)
    stacks: list[ExpertPairs] = []
    for plain in complete_pairs(path, factors):
        stored = extras.get(plain.module, {})
        for name in (plain.a.name, plain.b.name):
            # Only AdaLoRA stores factors that are plain parameters, next to its E.
            is_parameter = not name.endswith(".weight") and "lora_embedding_" not in name
            if is_parameter and "singular values" not in stored:
                message = (
                    f"{path}: tensor '{name}' is not <module>.lora_A.weight or "
                    "<module>.lora_B.weight, with or without an adapter's name. Is it from another "
                    "trainer?"
                )
                raise UnsupportedMethodError(message)
        if is_shared_stack(plain.a.shape(tensors), plain.b.shape(tensors)):
            expert: ExpertPairs | None = shared_pairs(path, tensors, plain)
        else:
            pair = _layer(tensors, plain, config)
            expert = (
                expert_pairs(path, tensors, pair, factors, config=config, options=options)
                if config.target_parameters
                else None
            )
        if expert is not None:
            content.pairs += expert.pairs
            content.config_names |= expert.config_names
            stacks.append(expert)
            continue
        if plain.module.endswith(".base_layer"):
            message = (
                f"{path}: tensor '{plain.a.name}' is nested in the factors of the same module: an "
                "expert parameter, which target_parameters in the config should name."
            )
            raise UnsupportedMethodError(message)
        content.pairs.append(
            _add_method_tensors(path, tensors, pair, stored, config=config, options=options)
        )
        if divisor := stored.get("rank divisor"):
            content.divisors[plain.module] = divisor
    if config.replicated:
        content.pairs = [_with_base_name(path, pair, config) for pair in content.pairs]
    if stacks:
        content.findings += expert_findings(stacks, config, options)
    for module, stored in extras.items():
        if module not in factors and "singular values" not in stored:
            name = next(iter(stored.values()))
            message = f"{path}: '{name}' belongs to a module without lora_A and lora_B."
            raise MalformedFileError(message)
    content.findings += _findings(content.pairs, extras, config, options)
    return content


def _layer(tensors: NamedTensors, pair: StoredPair, config: PeftConfig) -> StoredPair:
    """Return the pair with the layout of its layer, by its keys and shapes.

    B of a grouped convolution has blocks on its diagonal: PEFT gives B the groups of the base, A
    none, so that outputs of group g see rows of A of group g only.
    """
    if "lora_embedding_" in pair.a.name:
        return replace(pair, layout="embedding")
    a, b = (factor.shape(tensors) for factor in (pair.a, pair.b))
    if not 3 <= len(a) <= _CONV_AXES:  # matrices, and what is refused for having too many
        return replace(pair, layout="conv1d" if config.fan_in_fan_out else "linear")
    up = pair.b.flatten()  # (c_out, r)
    groups, rest = divmod(a[0], math.prod(b[1:]) or 1)
    # Shapes that do not fit are refused as such.
    if groups > 1 and not rest and b[0] % groups == 0:
        height = b[0] // groups
        up = block_diagonal(
            [up.rows(slice(group * height, (group + 1) * height)) for group in range(groups)]
        )
    return replace(pair, a=pair.a.flatten(), b=up, layout="conv", kernel=a[2:])


def _add_method_tensors(
    path: object,
    tensors: NamedTensors,
    pair: StoredPair,
    stored: Mapping[Part, str],
    *,
    config: PeftConfig,
    options: ReadOptions,
) -> StoredPair:
    """Return the pair with what its method adds: blocks, a kernel, tensors next to the factors.

    BD-LoRA stores a block-diagonal factor as stacked blocks of matrices; PEFT (``BdLoraConfig``)
    compares each entry of its config with any part of the module's name. A of AdaLoRA on a 2-D
    convolution is ``(r, c_in·k·k)``, and no tensor tells k: the caller's, else the commonest odd
    width whose square divides the columns.

    Raises
    ------
    MalformedFileError
        The config names the module for both factors of BD-LoRA, or a tensor of its method is
        missing.
    """
    if config.blocks is not None and pair.layout not in ("conv", "embedding"):
        in_a, in_b = (
            any(name in pair.module for name in names)
            for names in (config.blocks.in_a, config.blocks.in_b)
        )
        if in_a and in_b:
            message = f"{path}: use_bdlora names '{pair.module}' for both of its factors."
            raise MalformedFileError(message)
        if in_a:
            pair = replace(pair, a=pair.a.spread_blocks(config.blocks.count))
        if in_b:
            pair = replace(pair, b=pair.b.spread_blocks(config.blocks.count))
    if _is_flat_kernel(pair, stored):
        columns = pair.a.shape(tensors)[-1]
        widths = _WIDTHS if options.kernel is None else (options.kernel,)
        if width := next((k for k in widths if columns % (k * k) == 0), None):
            pair = replace(pair, layout="conv", kernel=(width, width))
    if values := stored.get("singular values"):
        return replace(pair, a=pair.a.scale_rows(tensor(values)))
    if diagonal := stored.get("diagonal"):
        return replace(pair, a=pair.a.scale_rows(tensor(diagonal)), variant=KASA)
    if magnitude := stored.get("magnitude"):
        return replace(pair, variant=DORA, magnitude=tensor(magnitude))
    lacking = "lora_magnitude_vector" if config.use_dora else ""
    lacking = "lora_diag" if config.raw.get("kasa_config") else lacking
    lacking = "lora_E" if config.adalora else lacking
    if lacking:
        message = f"{path}: '{pair.module}' has no {lacking}, which its config promises."
        raise MalformedFileError(message)
    return pair


def _is_flat_kernel(pair: StoredPair, stored: Mapping[Part, str]) -> bool:
    """Return True for AdaLoRA on a convolution, whose A is stored as a matrix, by its name."""
    return "singular values" in stored and "conv" in pair.module.lower()


def _with_base_name(path: object, pair: StoredPair, config: PeftConfig) -> StoredPair:
    """Return the pair with the name of the original layer if layers were replicated."""
    name = pair.base_name or pair.module
    match = _LAYER.match(name)
    if match is None:
        return pair
    origins = chain.from_iterable(range(*span) for span in config.replicated)
    index = int(match["index"])
    origin = next(islice(origins, index, None), None)
    if origin is None:
        message = f"{path}: '{pair.module}' is beyond the layers that layer_replication makes."
        raise MalformedFileError(message)
    base_name = f"{match['before']}.{origin}.{name[match.end() :]}"
    return pair if base_name == pair.module else replace(pair, base_name=base_name)


def _findings(
    pairs: Sequence[StoredPair],
    extras: Mapping[str, Mapping[Part, str]],
    config: PeftConfig,
    options: ReadOptions,
) -> list[Finding | str]:
    findings: list[Finding | str] = []
    if count := sum(pair.variant == DORA for pair in pairs):
        findings.append(Finding("dora", {"count": count, "total": len(pairs)}))
    if any(pair.variant == KASA for pair in pairs):
        findings.append(Finding("kasa"))
    grouped = [
        p.module for p in pairs if p.layout == "conv" and len(set(p.b.names)) < len(p.b.names)
    ]
    if grouped:
        fields: dict[str, object] = {"modules": len(grouped), "first": grouped[0]}
        findings.append(Finding("grouped-convolutions", fields))
    flat = [pair for pair in pairs if _is_flat_kernel(pair, extras.get(pair.module, {}))]
    if flat and options.kernel is None:
        fields = {"modules": len(flat), "first": flat[0].module, "kernel": list(flat[0].kernel)}
        findings.append(Finding("kernel-assumed", fields))
    if config.replicated:
        findings.append(Finding("layers-replicated"))
    return findings


def _without_pruned(
    path: object, tensors: NamedTensors, keys: SortedKeys, chosen: str | None, content: PeftPairs
) -> dict[str, dict[FactorRole, str]]:
    """Return the factors without those of modules that AdaLoRA has cut down to rank 0.

    Raises
    ------
    MalformedFileError
        A tensor that belongs to factors has another adapter's name than any of them.
    """
    for name in keys.extras.keys() - keys.factors.keys():
        first = next(iter(next(iter(keys.extras[name].values())).values()))
        message = f"{path}: '{first}' belongs to no factors of its adapter."
        raise MalformedFileError(message)
    factors, extras = keys.factors[chosen], keys.extras.get(chosen, {})
    values = {module: stored.get("singular values") for module, stored in extras.items()}
    cut = [name for name in factors if (e := values.get(name)) and 0 in tensors.infos[e].shape]
    content.pruned += cut
    if cut:
        content.findings.append(Finding("pruned-to-rank-0", {"modules": len(cut), "first": cut[0]}))
    return {module: stored for module, stored in factors.items() if module not in cut}


def _without_placeholders(
    path: object,
    tensors: NamedTensors,
    factors: dict[str, dict[FactorRole, str]],
    findings: list[Finding | str],
) -> dict[str, dict[FactorRole, str]]:
    """Return the factors that hold numbers; add a finding about empty ones that mean "absent".

    Tinker's adapters of mixtures of experts, whose factors have three axes, have empty factors for
    a projection that the model lacks. Otherwise an empty factor was not gathered.

    Raises
    ------
    MalformedFileError
        Factors are empty, or no matrices.
    """
    shapes = {
        module: {key: tensors.infos[key].shape for key in stored.values()}
        for module, stored in factors.items()
    }
    unusable: dict[str, str] = {}
    for module, shape_of in shapes.items():
        for key, shape in shape_of.items():
            if len(shape) < 2 or 0 in shape:
                unusable.setdefault(module, key)
    if not unusable:
        return factors
    stacks = any(len(shape) == 3 for shape_of in shapes.values() for shape in shape_of.values())
    absent = {module_type(module) for module in unusable}
    present = {module_type(module) for module in factors if module not in unusable}
    empty = all(0 in shape for module in unusable for shape in shapes[module].values())
    if stacks and empty and absent.isdisjoint(present):
        fields = {"modules": len(unusable), "types": sorted(absent)}
        findings.append(Finding("empty-placeholders", fields))
        return {module: stored for module, stored in factors.items() if module not in unusable}
    name = next(iter(unusable.values()))
    message = (
        f"{path}: the factors of {len(unusable)} of {plural(len(factors), 'module')} are empty or "
        f"flat (first: tensor '{name}' has shape {tensors.infos[name].shape}; a factor must be a "
        "non-empty matrix): the file was saved from a sharded training (DeepSpeed ZeRO-3, FSDP) "
        f"without gathering the parts. {GATHER}"
    )
    raise MalformedFileError(message)


def _refuse_slices(
    path: object,
    tensors: NamedTensors,
    factors: Mapping[str, dict[FactorRole, str]],
    config: PeftConfig,
) -> None:
    """Raise if every pair is the part of one rank of a sharded training.

    FSDP2 divides the rows of each tensor: A ``(r, d_in)`` becomes ``(r/n, d_in)``, B
    ``(d_out, r)`` becomes ``(d_out/n, r)``, so that B still has the rank that the config states.

    Raises
    ------
    UnsupportedMethodError
        That is so of every pair of matrices, with the same n.
    """
    ranks = set()
    first = None
    for module, stored in factors.items():
        if len(stored) != 2:
            return
        a, b = (tensors.infos[stored[role]].shape for role in ("A", "B"))
        if len(a) != 2 or len(b) != 2:
            continue
        config_rank = config.stated_rank(module)
        if a[0] >= b[1] or (config_rank is not None and config_rank != b[1]):
            return
        ranks.add(math.ceil(b[1] / a[0]))
        first = first or (module, a, b)
    if len(ranks) != 1 or first is None:
        return
    module, a, b = first
    (count,) = ranks
    message = (
        f"{path}: A has {a[0]} rows and B {b[1]} columns (first: '{module}', A {a}, B {b}), and "
        f"so in every module: this is one of {_NUMBERS.get(count, str(count))} ranks of a sharded "
        "training (FSDP2 divides the rows of each tensor among its ranks). The other ranks hold "
        "the rest of A and of B. Save it again from the gathered model (a full state dictionary "
        "with every rank's part), or join the ranks' tensors along their rows."
    )
    raise UnsupportedMethodError(message)
