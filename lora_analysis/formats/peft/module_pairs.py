"""The two factors of each module of a PEFT file, for every kind of layer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import MalformedFileError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.formats.factors import StatedScale, StoredPair, complete_pairs
from lora_analysis.formats.peft.experts import (
    ExpertPairs,
    expert_findings,
    expert_pairs,
    is_shared_stack,
    shared_pairs,
)
from lora_analysis.formats.stored import StoredFactor, block_diagonal, tensor
from lora_analysis.patterns import module_type
from lora_analysis.text import plural

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_analysis.formats.factors import FactorRole
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.formats.peft.adapter_config import Blocks, PeftConfig
    from lora_analysis.formats.peft.tensor_keys import Part, SortedKeys
    from lora_analysis.storage.tensors import NamedTensors

# Conv3d's kernel has three axes beside those of the channels.
_CONV_AXES: Final = 5
_LAYER = re.compile(
    r"(?P<before>(model\.)*(bert\.)?(layers|encoder\.layer|h))\.(?P<index>\d{1,9})\."
)

# Widths of kernels, the commonest first.
_WIDTHS = (3, 5, 7, 1)

_GATHER = (
    "Gather them: run zero_to_fp32.py of the checkpoint and read the file that it makes, or save "
    "again with zero3_save_16bit_model (DeepSpeed) or with full, gathered state dictionaries "
    "(FSDP)."
)
_NUMBERS: Final = {2: "two", 3: "three", 4: "four"}

DORA = "DoRA"
KASA = "KaSA"


@dataclass(slots=True)
class ModulePairs:
    """The pairs of one adapter, and findings about them.

    ``config_names`` holds the name of a module in the config, if it is another one.
    """

    pairs: list[StoredPair] = field(default_factory=list)
    config_names: dict[str, str] = field(default_factory=dict)
    divisors: dict[str, str] = field(default_factory=dict)
    pruned: list[str] = field(default_factory=list)
    findings: list[Finding | str] = field(default_factory=list)


def module_pairs(
    path: object,
    tensors: NamedTensors,
    keys: SortedKeys,
    chosen: str | None,
    *,
    config: PeftConfig,
    options: ReadOptions,
) -> ModulePairs:
    """Return the factors of every module of the adapter called ``chosen``.

    Raises
    ------
    MalformedFileError
        Tensors of a module are missing or do not belong together.
    UnsupportedMethodError
        Factors lie inside others, and no config says of which parameters.
    """
    content = ModulePairs()
    extras = keys.extras.get(chosen, {})
    factors = keys.factors[chosen]
    if keys.extras:
        _check_names(path, keys)
        factors = _without_pruned(tensors, factors, extras, content)
    factors = _without_placeholders(path, tensors, factors, content.findings)
    _refuse_slices(path, tensors, factors, config)
    stacks: list[ExpertPairs] = []
    for plain in complete_pairs(path, factors, _expected_key):
        stored = extras.get(plain.module, {})
        _check_kind(path, plain, stored)
        if is_shared_stack(plain.a.shape(tensors), plain.b.shape(tensors)):
            expert: ExpertPairs | None = shared_pairs(path, tensors, plain)
        else:
            pair = _layer(tensors, plain, config)
            expert = expert_pairs(path, tensors, pair, factors, config=config, options=options)
        if expert is not None:
            content.pairs += expert.pairs
            content.config_names |= expert.config_names
            stacks.append(expert)
            continue
        if plain.module.endswith(".base_layer"):
            message = (
                f"{path}: tensor '{plain.a.name}' lies inside the factors of the same module: an "
                "expert parameter, of which target_parameters in the config should tell the name."
            )
            raise UnsupportedMethodError(message)
        if config.blocks is not None:
            pair = _expanded(path, pair, config.blocks)
        if _is_flat_kernel(pair, stored):
            pair = _with_kernel(tensors, pair, options)
        content.pairs.append(_variant(path, pair, stored, config))
        if name := stored.get("rank divisor"):
            content.divisors[plain.module] = name
    if config.replicated:
        content.pairs = [_with_base_name(path, pair, config) for pair in content.pairs]
    content.findings += expert_findings(stacks, config, options)
    content.findings += _findings(content.pairs)
    if extras:
        _check_leftovers(path, factors, extras)
        content.findings += _kernel_findings(content.pairs, extras, options)
    if config.replicated:
        content.findings.append(Finding("layers-replicated"))
    return content


def _expected_key(module: str, role: str) -> str:
    return f"{module}.lora_{role}.weight"


def _check_names(path: object, keys: SortedKeys) -> None:
    """Raise if a tensor that belongs to factors has another adapter's name than any of them."""
    for name in keys.extras.keys() - keys.factors.keys():
        first = next(iter(next(iter(keys.extras[name].values())).values()))
        message = f"{path}: '{first}' belongs to no factors of its adapter."
        raise MalformedFileError(message)


def _without_pruned(
    tensors: NamedTensors,
    factors: Mapping[str, dict[FactorRole, str]],
    extras: Mapping[str, Mapping[Part, str]],
    content: ModulePairs,
) -> dict[str, dict[FactorRole, str]]:
    """Return the factors without those of modules that AdaLoRA has cut down to rank 0."""
    values = {module: stored.get("singular values") for module, stored in extras.items()}
    cut = [name for name in factors if (e := values.get(name)) and 0 in tensors.infos[e].shape]
    content.pruned += cut
    if cut:
        content.findings.append(Finding("pruned-to-rank-0", {"modules": len(cut), "first": cut[0]}))
    return {module: stored for module, stored in factors.items() if module not in cut}


def _check_kind(path: object, pair: StoredPair, stored: Mapping[Part, str]) -> None:
    """Raise for factors that are plain parameters, which only AdaLoRA stores beside its E."""
    for factor in (pair.a, pair.b):
        embedding = "lora_embedding_" in factor.name
        if (
            not embedding
            and not factor.name.endswith(".weight")
            and "singular values" not in stored
        ):
            message = (
                f"{path}: tensor '{factor.name}' is not <module>.lora_A.weight or "
                "<module>.lora_B.weight, with or without an adapter's name. Is it from another "
                "trainer?"
            )
            raise UnsupportedMethodError(message)


def _layer(tensors: NamedTensors, pair: StoredPair, config: PeftConfig) -> StoredPair:
    """Return the pair with the layout of its layer, by its keys and shapes."""
    if "lora_embedding_" in pair.a.name:
        return replace(pair, layout="embedding")
    a, b = (factor.shape(tensors) for factor in (pair.a, pair.b))
    if not 3 <= len(a) <= _CONV_AXES:  # matrices, and what is refused for having too many
        return replace(pair, layout="conv1d" if config.fan_in_fan_out else "linear")
    return replace(
        pair,
        a=pair.a.flattened(),
        b=_up_factor(a, b, pair.b),
        layout="conv",
        kernel=a[2:],
    )


def _expanded(path: object, pair: StoredPair, blocks: Blocks) -> StoredPair:
    """Return the pair with BD-LoRA's block-diagonal factor whole; it is stored as stacked blocks.

    PEFT (``BdLoraConfig``) compares each entry with any part of the module's name.

    Raises
    ------
    MalformedFileError
        The config names the module for both factors.
    """
    if pair.layout in ("conv", "embedding"):  # PEFT has blocks of matrices alone
        return pair
    parts = [
        role
        for role, names in (("a", blocks.in_a), ("b", blocks.in_b))
        if any(name in pair.module for name in names)
    ]
    if not parts:
        return pair
    if len(parts) == 2:
        message = f"{path}: use_bdlora names '{pair.module}' for both of its factors."
        raise MalformedFileError(message)
    if parts == ["a"]:
        return replace(pair, a=pair.a.spread(blocks.count))
    return replace(pair, b=pair.b.spread(blocks.count))


def _is_flat_kernel(pair: StoredPair, stored: Mapping[Part, str]) -> bool:
    """Return True for AdaLoRA on a convolution, whose A is stored as a matrix, by its name."""
    return "singular values" in stored and "conv" in pair.module.lower()


def _with_kernel(tensors: NamedTensors, pair: StoredPair, options: ReadOptions) -> StoredPair:
    """Return AdaLoRA's pair of a 2-D convolution with the layout of one.

    Its A is ``(r, c_in·k·k)`` and no tensor tells k: the caller's, else the commonest odd width
    whose square divides the columns.
    """
    columns = pair.a.shape(tensors)[-1]
    widths = _WIDTHS if options.kernel is None else (options.kernel,)
    width = next((k for k in widths if columns % (k * k) == 0), None)
    return pair if width is None else replace(pair, layout="conv", kernel=(width, width))


def _kernel_findings(
    pairs: Sequence[StoredPair],
    extras: Mapping[str, Mapping[Part, str]],
    options: ReadOptions,
) -> list[Finding]:
    flat = [pair for pair in pairs if _is_flat_kernel(pair, extras.get(pair.module, {}))]
    if not flat or options.kernel is not None:
        return []
    fields = {
        "modules": len(flat),
        "first": flat[0].module,
        "kernel": list(flat[0].kernel),
    }
    return [Finding("kernel-assumed", fields)]


def _up_factor(a: tuple[int, ...], b: tuple[int, ...], factor: StoredFactor) -> StoredFactor:
    """Return B ``(c_out, r)`` of a convolution; that of a grouped one has blocks on its diagonal.

    PEFT gives B the groups of the base, A none: outputs of group g see rows of A of group g only.
    """
    flat = factor.flattened()
    groups, rest = divmod(a[0], math.prod(b[1:]) or 1)
    if groups <= 1 or rest or b[0] % groups:
        return flat  # one group, or shapes that do not fit and are refused as such
    height = b[0] // groups
    return block_diagonal(
        [flat.rows(slice(group * height, (group + 1) * height)) for group in range(groups)]
    )


def _variant(
    path: object, pair: StoredPair, stored: Mapping[Part, str], config: PeftConfig
) -> StoredPair:
    """Return the pair with the tensors that its method stores next to the two factors."""
    if values := stored.get("singular values"):
        return replace(pair, a=pair.a.scaled_rows(tensor(values)))
    if diagonal := stored.get("diagonal"):
        return replace(pair, a=pair.a.scaled_rows(tensor(diagonal)), variant=KASA)
    if magnitude := stored.get("magnitude"):
        return replace(pair, variant=DORA, magnitude=tensor(magnitude))
    lacking = "lora_magnitude_vector" if config.use_dora else ""
    lacking = "lora_diag" if config.raw.get("kasa_config") else lacking
    lacking = "lora_E" if config.adalora else lacking
    if lacking:
        message = f"{path}: '{pair.module}' has no {lacking}, which its config promises."
        raise MalformedFileError(message)
    return pair


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
    return replace(pair, base_name=base_name)


def _check_leftovers(
    path: object, factors: Mapping[str, object], extras: Mapping[str, Mapping[Part, str]]
) -> None:
    for module, stored in extras.items():
        if module not in factors and "singular values" not in stored:
            name = next(iter(stored.values()))
            message = f"{path}: '{name}' belongs to a module without lora_A and lora_B."
            raise MalformedFileError(message)


def _findings(pairs: list[StoredPair]) -> list[Finding | str]:
    findings: list[Finding | str] = []
    if count := sum(pair.variant == DORA for pair in pairs):
        findings.append(Finding("dora", {"count": count, "total": len(pairs)}))
    if any(pair.variant == KASA for pair in pairs):
        findings.append(Finding("kasa"))
    grouped = [
        p.module for p in pairs if p.layout == "conv" and len(set(p.b.names)) < len(p.b.names)
    ]
    if grouped:
        fields = {"modules": len(grouped), "first": grouped[0]}
        findings.append(Finding("grouped-convolutions", fields))
    return findings


def divided_scale(
    tensors: NamedTensors, divisor: str | None, alpha: float, rank: int, start_rank: int | None
) -> StatedScale:
    """Return AdaLoRA's multiplier, alpha over the rank before pruning.

    ``alpha/(ranknum + 1e-5)``, with ranknum as stored (old files), else the rank that training
    started from; an alpha that is not positive stands for the rank (PEFT, ``adalora/layer.py``).
    """
    stored = None if divisor is None else float(tensors.read(divisor).reshape(-1)[0])
    before = stored or float(start_rank or rank)
    return StatedScale((alpha if alpha > 0 else rank) / (before + 1e-5), alpha, "config")


def no_tensors(path: object) -> MalformedFileError:
    """Return the error for an adapter file without a single tensor."""
    return MalformedFileError(
        f"{path}: the file holds no tensors. DeepSpeed ZeRO-3 leaves such a file if the parts of "
        f"the model were not gathered when it was saved. {_GATHER}"
    )


def _without_placeholders(
    path: object,
    tensors: NamedTensors,
    factors: Mapping[str, dict[FactorRole, str]],
    findings: list[str | Finding],
) -> dict[str, dict[FactorRole, str]]:
    """Return the factors that hold numbers; add a finding about empty ones that mean "absent".

    Tinker's adapters of mixtures of experts, whose factors have three axes, have empty factors for
    a projection that the model lacks. Otherwise an empty factor was not gathered.

    Raises
    ------
    MalformedFileError
        Factors are empty, or no matrices.
    """
    unusable: dict[str, str] = {}
    for module, stored in factors.items():
        for key in stored.values():
            shape = tensors.infos[key].shape
            if len(shape) < 2 or 0 in shape:
                unusable.setdefault(module, key)
    if not unusable:
        return dict(factors)
    shapes = {
        module: [tensors.infos[key].shape for key in stored.values()]
        for module, stored in factors.items()
    }
    stacks = any(len(shape) == 3 for pair in shapes.values() for shape in pair)
    absent = {module_type(module) for module in unusable}
    present = {module_type(module) for module in factors if module not in unusable}
    empty = all(0 in shape for module in unusable for shape in shapes[module])
    if stacks and empty and absent.isdisjoint(present):
        fields = {"modules": len(unusable), "types": sorted(absent)}
        findings.append(Finding("empty-placeholders", fields))
        return {module: stored for module, stored in factors.items() if module not in unusable}
    name = next(iter(unusable.values()))
    message = (
        f"{path}: the factors of {len(unusable)} of {plural(len(factors), 'module')} are empty or "
        f"flat (first: tensor '{name}' has shape {tensors.infos[name].shape}; a factor must be a "
        "non-empty matrix): the file was saved from a sharded training (DeepSpeed ZeRO-3, FSDP) "
        f"without gathering the parts. {_GATHER}"
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
