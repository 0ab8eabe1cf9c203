"""From the sorted keys of an image model's file to an adapter: pairs, scales, findings."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from lora_analysis.adapter import Adapter, Provenance
from lora_analysis.errors import MalformedFileError
from lora_analysis.finding import Finding, as_findings
from lora_analysis.formats.diffusion.image_findings import block_findings, copied_findings
from lora_analysis.formats.diffusion.image_keys import (
    EMBEDDINGS,
    Part,
    SortedParts,
    Spelling,
    sort_parts,
)
from lora_analysis.formats.factors import (
    FactorRole,
    StatedScale,
    StoredPair,
    alpha_zero_finding,
    callers_scale,
    common_rank,
    complete_pairs,
    scale_from_alpha,
    stored_rank,
    update_loaders,
)
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.side_tensors import side_finding, side_tensors
from lora_analysis.formats.sources import ReadOptions, label_of, run_facts
from lora_analysis.formats.stored import contract, tensor
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from lora_analysis.adapter import SideTensor
    from lora_analysis.storage.tensors import NamedTensors

# Entry of an adapter's config: keys of the factors in the file it was read from, by module.
FACTOR_KEYS: Final = "factor_keys"
_ROLE: Final = re.compile(r"(down|up)(?=(\.weight)?$)|(?<=lora_)[AB](?=(\.[^.]+)?\.weight$)")
_PARTNERS: Final = {"down": "up", "up": "down", "A": "B", "B": "A"}


def read_image_adapter(
    path: Path,
    options: ReadOptions,
    *,
    format: str,
    spellings: Sequence[Spelling],
    stated: Callable[[str, int], StatedScale | None] = lambda _module, _rank: None,
    config: Mapping[str, Any] | None = None,
) -> Adapter:
    """Read one file whose keys are spelled in one or several of the given ways.

    Parameters
    ----------
    path
        The file.
    options
        The caller's.
    format
        Name in the provenance.
    spellings
        Ways to name factors, the first that matches a key counts.
    stated
        Gives the scale of a module of a rank, where something beside its own tensors states it.
    config
        What a writer of the format needs to know of the file.

    Raises
    ------
    MalformedFileError
        A module has one factor only, its factors do not fit, or its alpha is no number.
    UnsupportedMethodError
        The file holds a method whose update is not ``s·B·A``.
    """
    tensors = open_tensors(path, allow_pickle=options.allow_pickle)
    parts = sort_parts(path, tensors.infos, spellings)
    pairs = [_completed(tensors, pair, parts.modules[pair.module]) for pair in _pairs(path, parts)]
    ranks = {pair.module: stored_rank(tensors, pair) for pair in pairs}
    scales = {
        module: callers_scale(options, rank)
        or _own_scale(tensors, parts, module)
        or stated(module, rank)
        or parts.spellings[module].scale(rank)
        for module, rank in ranks.items()
    }
    label = options.label or label_of(path)
    return Adapter(
        update_loaders(tensors, pairs, scales, label=label),
        label=label,
        provenance=Provenance(
            path=path,
            format=format,
            files=tensors.files,
            scale_origin={module: one.origin for module, one in scales.items()},
            rank=common_rank(ranks),
            metadata=tensors.metadata,
            findings=as_findings(
                (
                    *_scale_findings(parts, scales),
                    *_dora_findings(pairs),
                    *block_findings(tensors, pairs),
                    *copied_findings(tensors, pairs),
                    *_rest_findings(parts),
                )
            ),
            **_facts(path, tensors.metadata),
        ),
        config={**(config or {}), **_factor_keys(parts)},
        side_tensors=_side_tensors(tensors, parts),
    )


def _factor_keys(parts: SortedParts) -> dict[str, Any]:
    """Return the stored keys (of A, B and alpha) of modules that are not spelled as PEFT does."""
    keys = {
        module: (stored["A"], stored["B"], stored.get("alpha"))
        for module, stored in parts.modules.items()
        if stored["A"] != f"{module}.lora_A.weight" and "mid" not in stored
    }
    return {FACTOR_KEYS: keys} if keys else {}


def _side_tensors(tensors: NamedTensors, parts: SortedParts) -> dict[str, SideTensor]:
    keys = [key for names in parts.rest.values() for key in names]
    return side_tensors(tensors, keys, harmless=parts.rest.get(EMBEDDINGS, ()))


def _pairs(path: Path, parts: SortedParts) -> list[StoredPair]:
    """Return the pairs of a file; the missing partner is named after the one that is there."""
    factors: dict[str, dict[FactorRole, str]] = {}
    for module, stored in parts.modules.items():
        if "A" not in stored and "B" not in stored:
            message = f"{path}: '{module}' has '{next(iter(stored.values()))}' but no factors."
            raise MalformedFileError(message)
        roles: tuple[FactorRole, ...] = ("A", "B")
        factors[module] = {role: stored[role] for role in roles if role in stored}
    return complete_pairs(path, factors, lambda module, _: _partner(factors[module]))


def _partner(factors: Mapping[FactorRole, str]) -> str:
    (have,) = factors.values()
    return _ROLE.sub(lambda role: _PARTNERS[role[0]], have)


def _completed(tensors: NamedTensors, pair: StoredPair, parts: Mapping[Part, str]) -> StoredPair:
    """Return a pair with its kernel, its core and what else its module stores."""
    shapes = pair.a.shape(tensors), pair.b.shape(tensors)
    kernel = shapes[0][2:]
    a, b = pair.a, pair.b
    if "mid" in parts:
        # ΔW = einsum("ij…,ip,jr->pr…", mid, upᵀ, down): up stays B, mid and down make A.
        kernel = tensors.infos[parts["mid"]].shape[2:]
        a = contract(tensor(parts["mid"]), a.flattened())
    if "scalar" in parts:
        b = b.times(_number(tensors, parts["scalar"]))
    if kernel or any(len(shape) > 2 for shape in shapes):
        kernel = kernel or tuple(1 for _ in shapes[1][2:])
        pair = replace(pair, layout="conv", kernel=kernel)
        a, b = a.flattened(), b.flattened()
    pair = replace(pair, a=a, b=b)
    return _with_norms(tensors, pair, parts["norms"]) if "norms" in parts else pair


def _with_norms(tensors: NamedTensors, pair: StoredPair, name: str) -> StoredPair:
    """Return a pair as DoRA's, with the norms of the rows or of the input channels of W + ΔW.

    LyCORIS and OneTrainer store ``dora_scale`` as ``[out, 1, …]`` (``wd_on_out``, "output axis")
    or as ``[1, in, …]``; ComfyUI decides by the first axis. PEFT's norms are of rows.
    """
    shape, count = tensors.infos[name].shape, math.prod(tensors.infos[name].shape)
    rows = pair.b.shape(tensors)[0]
    if len(shape) > 1:
        by_inputs = shape[0] == 1 and (rows > 1 or count > 1)
    else:
        channels = pair.a.shape(tensors)[-1] // math.prod(pair.kernel)
        by_inputs = count == channels != rows
    side: Literal["output", "input"] = "output"
    if by_inputs and name.endswith("dora_scale"):
        side = "input"
    return replace(pair, variant=DORA, magnitude=tensor(name), magnitude_side=side)


def _own_scale(tensors: NamedTensors, parts: SortedParts, module: str) -> StatedScale | None:
    """Return the scale from the module's own alpha, None without one that says anything."""
    stored = parts.modules[module]
    if "alpha" not in stored:
        return None
    alpha = _number(tensors, stored["alpha"])
    if alpha == 0 and parts.spellings[module].alpha_is_rank:
        return None  # in kohya's words, as if it were not there
    # Of a Tucker decomposition, alpha is divided by the rows of lora_down.
    return scale_from_alpha(alpha, tensors.infos[stored["A"]].shape[0], "tensor")


def _number(tensors: NamedTensors, name: str) -> float:
    shape = tensors.infos[name].shape
    values = np.asarray(tensors.read(name)).reshape(-1) if math.prod(shape) == 1 else None
    if values is None or not np.isfinite(float(values[0])):
        found = shape if values is None else values[0]
        message = f"{tensors.file_of(name)}: '{name}' must be one finite number, found {found}."
        raise MalformedFileError(message)
    return float(values[0])


def _scale_findings(parts: SortedParts, scales: Mapping[str, StatedScale]) -> list[Finding | str]:
    by_reason: dict[str, list[str]] = {}
    for module, one in scales.items():
        if one.origin in ("format", "unknown"):
            by_reason.setdefault(parts.spellings[module].reason, []).append(module)
    findings: list[Finding | str] = [*alpha_zero_finding(scales)]
    for reason, modules in by_reason.items():
        if scales[modules[0]].scale is None:
            fields = {"modules": len(modules), "of": len(scales), "reason": reason}
            findings.append(Finding("scale-unknown", fields))
        else:
            findings.append(f"{len(modules)} of {len(scales)} modules state no alpha: {reason}.")
    return findings


def _dora_findings(pairs: Sequence[StoredPair]) -> list[Finding]:
    dora = [pair for pair in pairs if pair.variant == DORA]
    findings = [Finding("dora", {"count": len(dora), "total": len(pairs)})] if dora else []
    by_inputs = [pair.module for pair in dora if pair.magnitude_side == "input"]
    if by_inputs:
        fields = {"count": len(by_inputs), "total": len(pairs), "module": f"'{by_inputs[0]}'"}
        findings.append(Finding("dora-columns", fields))
    return findings


def _rest_findings(parts: SortedParts) -> Iterator[Finding]:
    for what, keys in parts.rest.items():
        yield from side_finding(f"{what}, not analyzed", keys)


def _facts(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what a training run left about itself: beside the file, or in kohya's metadata."""
    facts: dict[str, Any] = dict(run_facts(path.parent))
    stated = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")
    bases = [metadata[key] for key in stated if metadata.get(key) not in (None, "", "None")]
    if bases:
        facts["base_model"] = bases[0]
    if "seed" not in facts and re.fullmatch(r"-?[0-9]{1,19}", metadata.get("ss_seed", "")):
        facts["seed"] = int(metadata["ss_seed"])
    return facts
