"""State dictionaries of Microsoft's loralib: plain parameters ``lora_A`` and ``lora_B``.

Reference: loralib 0.1.2, ``layers.py`` and ``lora_state_dict``. No file states an alpha. Of
``MergedLinear`` the caller says ``enable_lora``. ``ConvLoRA`` of a k × k kernel has A
``(r·k, c_in·k)`` and B ``(c_out·k, r·k)``, of which ``(B·A).view(c_out, c_in, k, k)`` is the
update: as a matrix ``(c_out, c_in·k·k)`` it is B, k rows made one, times k copies of A along the
diagonal, and has rank up to r·k².
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import MalformedFileError, UnsupportedMethodError
from lora_analysis.formats.build import AdapterParts
from lora_analysis.formats.factors import UNKNOWN_SCALE, StatedScale, StoredPair
from lora_analysis.formats.fused_parts import FUSED_PARTS
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, StoredModules
from lora_analysis.formats.llm.trainer_settings import number
from lora_analysis.formats.merged import (
    FUSED,
    enable_needed,
    interleaves,
    is_merged,
    merged_finding,
    parts_of,
    split,
)
from lora_analysis.formats.stored import block_diagonal, tensor

if TYPE_CHECKING:
    from lora_analysis.adapter import Layout
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

# Metadata that our own files state, since loralib's do not: see loralib_writer.
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
    scale = number(tensors.metadata.get(SCALE))
    file_scale = UNKNOWN_SCALE if scale is None else StatedScale(scale, None, "metadata")
    interleaved = any(map(interleaves, content.fused))
    return AdapterParts(
        pairs=content.pairs,
        scale=lambda _pair, _rank: file_scale,
        reason="loralib's files state no alpha",
        divisors=content.divisors,
        config={FUSED_PARTS: content.fused} if content.fused else None,
        findings=(
            *merged_finding(len(content.fused), interleaved=interleaved),
            *stored.not_analyzed(),
        ),
        metadata={k: v for k, v in tensors.metadata.items() if k not in (SCALE, ENABLED)},
    )


FORMAT: Final = KeyScheme("loralib", (_KEY,), _complete)


def _add(content: _Content, tensors: NamedTensors, pair: StoredPair, options: ReadOptions) -> None:
    """Add the content of one module's two tensors: a plain update, blocks, or a convolution."""
    module = _NESTING.sub("", pair.module)
    a, b = pair.a.name, pair.b.name
    last = module.rpartition(".")[2]
    enabled = options.enable_lora or _stated_blocks(tensors)
    if is_merged(tensors, a, b):
        if enabled is None:
            raise enable_needed(tensors, module, a, b)
        content.pairs += split(tensors, module, a, b, enabled)
        content.fused[module] = parts_of(tensors, module, b, enabled)
    elif enabled is not None and sum(enabled) == 1 and last in FUSED:
        content.pairs += split(tensors, module, a, b, enabled)
        content.fused[module] = parts_of(tensors, module, b, enabled)
    elif (size := _kernel(tensors, pair, options)) is not None:
        content.pairs.append(_convolution(tensors, module, pair, size))
        content.divisors[module] = tensors.infos[a].shape[0] // size
    else:
        layout: Layout = "embedding" if is_embedding(module) else "linear"
        content.pairs.append(StoredPair(module, pair.a, pair.b, layout=layout))


def _stated_blocks(tensors: NamedTensors) -> tuple[bool, ...] | None:
    flags = tensors.metadata.get(ENABLED, "").split(",")
    is_stated = all(flag in ("0", "1") for flag in flags) and "1" in flags
    return tuple(flag == "1" for flag in flags) if is_stated else None


def _kernel(tensors: NamedTensors, pair: StoredPair, options: ReadOptions) -> int | None:
    """Return the width of a convolution's kernel; None if the module is not one.

    The frozen kernel tells, where it is in the file; else the module's name says that there is
    one, and the caller how wide it is.
    """
    weight = tensors.infos.get(f"{pair.module}.conv.weight")
    if weight is not None and len(weight.shape) >= 3:
        _check_frozen(tensors, pair, weight.shape)
        return weight.shape[-1]
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


def _check_frozen(tensors: NamedTensors, pair: StoredPair, kernels: tuple[int, ...]) -> None:
    """Raise for a grouped convolution and for kernels that are no squares."""
    rows = tensors.infos[pair.b.name].shape[:1]
    square = len(kernels) == 4 and kernels[2] == kernels[3]
    if square and rows == (kernels[0] * kernels[3],):
        return
    message = (
        f"{tensors.file_of(pair.a.name)}: '{pair.module}' adapts kernels of shape {kernels} with "
        f"B of {rows[0] if rows else 0} rows: only square kernels without groups are read."
    )
    raise UnsupportedMethodError(message)


def _convolution(tensors: NamedTensors, module: str, pair: StoredPair, size: int) -> StoredPair:
    """Return the pair of a convolution with a square kernel; see the module's first lines."""
    a, b = (tensors.infos[factor.name].shape for factor in (pair.a, pair.b))
    fits = len(a) == len(b) == 2 and a[0] == b[1] and 0 not in a
    if not fits or a[0] % size or a[1] % size or b[0] % size:
        message = (
            f"{tensors.file_of(pair.a.name)}: '{module}' has A {a} and B {b}; loralib's ConvLoRA "
            f"of a kernel of {size} needs (r·{size}, c_in·{size}) and (c_out·{size}, r·{size})."
        )
        raise MalformedFileError(message)
    return StoredPair(
        module,
        block_diagonal([tensor(pair.a.name)] * size),
        tensor(pair.b.name).reshaped(b[0] // size, size * b[1]),
        layout="conv",
        kernel=(size, size),
    )
