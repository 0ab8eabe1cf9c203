"""Files that a sharded training saved without gathering its parts: told by their shapes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_analysis.errors import MalformedFileError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.patterns import module_type
from lora_analysis.text import plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_analysis.formats.factors import FactorRole
    from lora_analysis.formats.peft.adapter_config import PeftConfig
    from lora_analysis.storage.tensors import NamedTensors

    Factors = Mapping[str, dict[FactorRole, str]]

_GATHER = (
    "Gather them: run zero_to_fp32.py of the checkpoint and read the file that it makes, or save "
    "again with zero3_save_16bit_model (DeepSpeed) or with full, gathered state dictionaries "
    "(FSDP)."
)


def no_tensors(path: object) -> MalformedFileError:
    """Return the error for an adapter file without a single tensor."""
    return MalformedFileError(
        f"{path}: the file holds no tensors. DeepSpeed ZeRO-3 leaves such a file if the parts of "
        f"the model were not gathered when it was saved. {_GATHER}"
    )


def without_placeholders(
    path: object, tensors: NamedTensors, factors: Factors, findings: list[str | Finding]
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
        module: {name: tensors.infos[name].shape for name in stored.values()}
        for module, stored in factors.items()
    }
    flat = {module for module, named in shapes.items() if any(map(_is_lost, named.values()))}
    if not flat:
        return dict(factors)
    stacks = any(len(shape) == 3 for named in shapes.values() for shape in named.values())
    absent = {module_type(module) for module in flat}
    present = {module_type(module) for module in factors if module not in flat}
    empty = all(0 in shape for module in flat for shape in shapes[module].values())
    if stacks and empty and absent.isdisjoint(present):
        fields = {"modules": len(flat), "types": sorted(absent)}
        findings.append(Finding("empty-placeholders", fields))
        return {module: stored for module, stored in factors.items() if module not in flat}
    name, shape = next((n, s) for m in factors if m in flat for n, s in shapes[m].items()
                       if _is_lost(s))  # fmt: skip
    message = (
        f"{path}: the factors of {len(flat)} of {plural(len(factors), 'module')} are empty or flat "
        f"(first: tensor '{name}' has shape {shape}; a factor must be a non-empty matrix): the "
        "file was saved from a sharded training (DeepSpeed ZeRO-3, FSDP) without gathering the "
        f"parts. {_GATHER}"
    )
    raise MalformedFileError(message)


def _is_lost(shape: tuple[int, ...]) -> bool:
    return len(shape) < 2 or 0 in shape


def refuse_slices(
    path: object, tensors: NamedTensors, factors: Factors, config: PeftConfig
) -> None:
    """Raise where every pair is what one rank of a sharded training holds of it.

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
        stated = config.stated_rank(module)
        if a[0] >= b[1] or (stated is not None and stated != b[1]):
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


_NUMBERS = {2: "two", 3: "three", 4: "four"}
