"""State dictionaries of Microsoft's loralib: plain parameters ``lora_A`` and ``lora_B``.

Reference: loralib 0.1.2, ``layers.py`` and ``lora_state_dict``. No file states an alpha. Of
``MergedLinear`` the caller says ``enable_lora``. ``ConvLoRA`` of a k × k kernel has A
``(r·k, c_in·k)`` and B ``(c_out·k, r·k)``, of which ``(B·A).view(c_out, c_in, k, k)`` is the
update: as a matrix ``(c_out, c_in·k·k)`` it is B, k rows made one, times k copies of A along the
diagonal, and has rank up to r·k².

Files that are written here have both in their metadata, from which they are read back:
``lora_scale``, the scale of every module, and ``enable_lora``, ``"1,0,1"``, if blocks of fused
weights are joined as ``MergedLinear`` has them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.formats.build import AdapterParts
from lora_analysis.formats.factors import UNKNOWN_SCALE, StatedScale, StoredPair
from lora_analysis.formats.fused_parts import FUSED_PARTS
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, StoredModules
from lora_analysis.formats.merged import (
    FUSED,
    block_names,
    interleaves,
    merged_findings,
    split_fused,
)
from lora_analysis.formats.side_tensors import carried_metadata, side_output
from lora_analysis.formats.sources import setting_number
from lora_analysis.formats.stored import block_diagonal, tensor
from lora_analysis.formats.text_writing import (
    FactorArrays,
    PlannedFactors,
    common_dtype,
    common_scale,
    fold_scales,
    folding_note,
    text_outlines,
)
from lora_analysis.formats.written import has_unknown_scale
from lora_analysis.storage.tensor_writer import output_group, safetensors_content

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, Layout, UpdateOutline
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.atomic import Content
    from lora_analysis.storage.tensors import NamedTensors

# Metadata that our own files state, since loralib's do not.
SCALE: Final = "lora_scale"
ENABLED: Final = "enable_lora"

_KEY: Final = KeyPattern(re.compile(r"(?P<module>.+)\.lora_(?P<role>[AB])"))
# Training loops save the dictionary inside another, or from inside a parallel wrapper.
_NESTING: Final = re.compile(r"^((model_state_dict|state_dict|module)\.)+")
_EMBEDDINGS: Final = re.compile(r"wte|wpe|.*embed(ding)?s?(_tokens|_in|_tokenizer)?")
_CONV: Final = re.compile(r".*conv.*", re.IGNORECASE)


def is_embedding(module: str) -> bool:
    """Return True if a module's name is that of an embedding."""
    return _EMBEDDINGS.fullmatch(module.rpartition(".")[2]) is not None


def is_convolution(module: str) -> bool:
    """Return True if a module's name is that of a convolution."""
    return _CONV.fullmatch(module.rpartition(".")[2]) is not None


@dataclass(slots=True)
class _Content:
    """The pairs of a file, the divisor of alpha if it is not the rank, and the fused weights."""

    pairs: list[StoredPair] = field(default_factory=list)
    divisors: dict[str, int] = field(default_factory=dict)
    fused: dict[str, Any] = field(default_factory=dict)


def _complete(stored: StoredModules) -> AdapterParts:
    tensors = stored.tensors
    content = _Content()
    for pair in stored.pairs():
        _add(content, tensors, pair, stored.options)
    scale = setting_number(tensors.metadata.get(SCALE))
    file_scale = UNKNOWN_SCALE if scale is None else StatedScale(scale, None, "metadata")
    interleaved = any(map(interleaves, content.fused))
    return AdapterParts(
        pairs=content.pairs,
        scale=lambda _pair, _rank: file_scale,
        reason="loralib's files state no alpha",
        divisors=content.divisors,
        config={FUSED_PARTS: content.fused} if content.fused else None,
        findings=(
            *merged_findings(len(content.fused), interleaved=interleaved),
            *stored.unanalyzed_findings(),
        ),
        metadata={k: v for k, v in tensors.metadata.items() if k not in (SCALE, ENABLED)},
    )


FORMAT: Final = KeyScheme("loralib", (_KEY,), _complete)


def _add(content: _Content, tensors: NamedTensors, pair: StoredPair, options: ReadOptions) -> None:
    """Add the content of one module's two tensors: a plain update, blocks, or a convolution."""
    module = _NESTING.sub("", pair.module)
    a, b = pair.a.name, pair.b.name
    enabled = options.enable_lora
    flags = tensors.metadata.get(ENABLED, "").split(",")
    if enabled is None and all(flag in ("0", "1") for flag in flags) and "1" in flags:
        enabled = tuple(flag == "1" for flag in flags)
    if blocks := split_fused(tensors, module, a, b, enabled):
        content.pairs += blocks[0]
        content.fused[module] = blocks[1]
    elif (size := _kernel(tensors, pair, options)) is not None:
        # A convolution with a square kernel; see the module's first lines.
        shape_a, shape_b = tensors.infos[a].shape, tensors.infos[b].shape
        fits = len(shape_a) == len(shape_b) == 2 and shape_a[0] == shape_b[1] and 0 not in shape_a
        if not fits or any(n % size for n in (*shape_a, shape_b[0])):
            message = (
                f"{tensors.file_of(a)}: '{module}' has A {shape_a} and B {shape_b}; loralib's "
                f"ConvLoRA of a kernel of {size} needs (r·{size}, c_in·{size}) and "
                f"(c_out·{size}, r·{size})."
            )
            raise MalformedFileError(message)
        copies = block_diagonal([tensor(a)] * size)
        kernels = tensor(b).reshape(shape_b[0] // size, size * shape_b[1])
        content.pairs.append(
            StoredPair(module, copies, kernels, layout="conv", kernel=(size, size))
        )
        content.divisors[module] = shape_a[0] // size
    else:
        layout: Layout = "embedding" if is_embedding(module) else "linear"
        content.pairs.append(StoredPair(module, pair.a, pair.b, layout=layout))


def _kernel(tensors: NamedTensors, pair: StoredPair, options: ReadOptions) -> int | None:
    """Return the width of a convolution's kernel; None if the module is not one.

    The frozen kernel tells, where it is in the file; else the module's name says that there is
    one, and the caller how wide it is.
    """
    weight = tensors.infos.get(f"{pair.module}.conv.weight")
    if weight is not None and len(weight.shape) >= 3:
        kernels, rows = weight.shape, tensors.infos[pair.b.name].shape[:1]
        square = len(kernels) == 4 and kernels[2] == kernels[3]
        if not square or rows != (kernels[0] * kernels[3],):
            message = (
                f"{tensors.file_of(pair.a.name)}: '{pair.module}' adapts kernels of shape "
                f"{kernels} with B of {rows[0] if rows else 0} rows: only square kernels without "
                "groups are read."
            )
            raise UnsupportedMethodError(message)
        return kernels[-1]
    if not is_convolution(pair.module):
        return None
    if options.kernel is None:
        shapes = tensors.infos[pair.a.name].shape, tensors.infos[pair.b.name].shape
        message = (
            f"{tensors.file_of(pair.a.name)}: '{pair.module}' has A {shapes[0]} and B {shapes[1]} "
            "and seems to be a convolution (loralib's ConvLoRA), whose factors do not tell its "
            "kernel. Pass kernel= (command line: --kernel 3); or save the frozen weights with it."
        )
        raise UnsupportedMethodError(message)
    return options.kernel


_WEIGHTS_NAME: Final = "lora.safetensors"
_FORMAT: Final = "loralib"


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as one file of safetensors, by its name.

    Raises
    ------
    InputError
        A module's name implies a different layout, or blocks of fused weights do not fit together.
    UnsupportedMethodError
        An update needs more than two factors and a scale.
    """
    updates, scale = _scaled_outlines(adapter)
    metadata = {"format": "pt", **carried_metadata(adapter, _FORMAT)}
    if scale is not None:
        metadata[SCALE] = repr(float(scale))
    scales = dict.fromkeys(updates, 1.0 if scale is None else scale)
    whole, enabled = _join_blocks(fold_scales(adapter, updates, scales))
    if enabled:
        metadata[ENABLED] = ",".join(str(int(on)) for on in enabled)
    tensors = side_output(adapter, _FORMAT)
    for name, planned in whole.items():
        if is_convolution(name) or (planned.layout == "embedding") != is_embedding(name):
            message = (
                f"'{name}' is of layout '{planned.layout}', but readers of loralib's files infer "
                "a different one from the name. It is not written."
            )
            raise InputError(message)
        shapes = {f"{name}.lora_A": planned.a, f"{name}.lora_B": planned.b}
        produce = partial(_module_arrays, name, planned)
        tensors += output_group(shapes, produce, dtype=planned.dtype)
    return {_WEIGHTS_NAME: safetensors_content(tensors, metadata)}


def _scaled_outlines(adapter: Adapter) -> tuple[dict[str, UpdateOutline], float | None]:
    """Return the outlines and their common scale; None, with outlines of scale 1, if unknown."""
    updates = text_outlines(adapter, _FORMAT, unknown_scale=True)
    if has_unknown_scale(updates):
        return {name: replace(update, scale=1.0) for name, update in updates.items()}, None
    return updates, common_scale(updates)


def _module_arrays(name: str, planned: PlannedFactors) -> dict[str, NDArray[Any]]:
    factors = planned.load(planned.dtype)
    return {f"{name}.lora_A": factors.a, f"{name}.lora_B": factors.b}


def loralib_notes(adapter: Adapter) -> list[str]:
    """Return sentences on the alpha that a model must be made with, and on folded scales."""
    updates, scale = _scaled_outlines(adapter)
    if scale is None:
        return []
    scales = dict.fromkeys(updates, scale)
    return [
        f"Make loralib's layers with lora_alpha = {scale:g} · r: a state "
        "dictionary of loralib does not state it.",
        *folding_note(updates, scales, _FORMAT, "lora_alpha"),
    ]


def _join_blocks(
    factors: Mapping[str, PlannedFactors],
) -> tuple[dict[str, PlannedFactors], tuple[bool, ...] | None]:
    """Return the modules with blocks of fused weights joined, and which blocks are enabled.

    Raises
    ------
    InputError
        The blocks of a weight differ in rank or shape, or two weights have different blocks.
    """
    whole: dict[str, PlannedFactors] = {}
    blocks: dict[str, dict[str, PlannedFactors]] = {}
    for name, planned in factors.items():
        fused, _, _ = name.rpartition(".")
        if fused.rpartition(".")[2] in FUSED and name in block_names(fused, 3):
            blocks.setdefault(fused, {})[name] = planned
        else:
            whole[name] = planned
    patterns = set()
    for fused, members in blocks.items():
        names = block_names(fused, 3)
        patterns.add(tuple(name in members for name in names))
        ordered = [members[name] for name in names if name in members]
        if len({(planned.a, planned.b) for planned in ordered}) != 1 or len(patterns) != 1:
            message = (
                f"The blocks of '{fused}' differ in shape or rank, or different blocks are adapted "
                "in another module; loralib's MergedLinear has one rank, and one enable_lora."
            )
            raise InputError(message)
        a, b = ((len(ordered) * s[0], *s[1:]) for s in (ordered[0].a, ordered[0].b))
        load = partial(_joined_factors, ordered)
        whole[fused] = PlannedFactors(a, b, "linear", common_dtype(ordered), load)
    return whole, next(iter(patterns), None)


def _joined_factors(blocks: Sequence[PlannedFactors], dtype: str) -> FactorArrays:
    factors = [planned.load(dtype) for planned in blocks]
    return FactorArrays(
        np.concatenate([block.a for block in factors]),
        np.concatenate([block.b for block in factors]),
    )
