"""Quantization schemes that are decoded: a table of stored type, type of the scales and scheme.

A byte may be an integer, a float or an exponent, and the tensors alone do not always determine
which. A weight is decoded only if a row of the table covers its stored type and the type of its
scales, and, if several schemes store the same two types, only if the file states the scheme.
Everything else is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from lora_analysis.bases.quantized.codes import RawTensors, storage_error
from lora_analysis.storage.dtypes import FLOAT8

if TYPE_CHECKING:
    from lora_analysis.storage.safetensors import TensorInfo

Meaning = Literal["factor", "power of two"]

_FACTORS: Final = frozenset({"float32", "float16", "bfloat16", "float64"})
_PACKED: Final = frozenset({"uint8"})
_FOUR_BIT: Final = _PACKED | {"float4_e2m1"}


@dataclass(frozen=True, slots=True)
class Decoding:
    """One row of the table.

    Attributes
    ----------
    name
        Name of the scheme.
    stored, scales
        Types of the weight's tensor and of its scales.
    meaning
        Whether a scale is the factor itself or the exponent of a power of two.
    must_be_stated
        True if the file must state the scheme, False if the two types are enough.
    contradicted
        Schemes that store the same types with another meaning; a file that states one is refused.
    """

    name: str
    stored: frozenset[str]
    scales: frozenset[str]
    meaning: Meaning
    must_be_stated: bool = False
    contradicted: frozenset[str] = frozenset()


def _row(
    name: str,
    stored: frozenset[str],
    scales: frozenset[str] | set[str],
    meaning: Meaning,
    *,
    must_be_stated: bool = False,
    contradicted: tuple[str, ...] = (),
) -> Decoding:
    return Decoding(
        name, stored, frozenset(scales), meaning, must_be_stated, frozenset(contradicted)
    )


_POWER: Final = "power of two"

# Scales that cover rows, groups or blocks of a matrix of 8-bit numbers.
DECODED_8_BIT: Final = (
    _row("fp8", FLOAT8, _FACTORS, "factor"),
    _row("MXFP8", FLOAT8, {"float8_e8m0fnu"}, _POWER),
    _row("MXFP8", FLOAT8, {"uint8"}, _POWER, must_be_stated=True),
    # Two E2M1 codes in an int8 have the same types (DeepSeek-V4's experts next to fp8 layers).
    _row("int8", frozenset({"int8"}), _FACTORS, "factor", contradicted=("fp8", "mxfp4", "mxfp8")),
)
# Scales per 16 or 32 packed codes of four or six bits.
DECODED_PACKED: Final = (
    _row("MXFP4", _FOUR_BIT, {"float8_e8m0fnu"}, _POWER, contradicted=("mxfp6",)),
    _row("MXFP4", _FOUR_BIT, {"uint8"}, _POWER, must_be_stated=True),
    _row("NVFP4", _FOUR_BIT, {"float8_e4m3fn"}, "factor"),
    _row("MXFP6", _PACKED, {"uint8", "float8_e8m0fnu"}, _POWER, must_be_stated=True),
)

# Writers' names of a scheme → the name in the table.
_SCHEME_NAMES: Final = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "float-quantized": "fp8",
    "int-quantized": "int8",
    "mxfp8": "mxfp8",
    "mxfp8-quantized": "mxfp8",
    "ue8m0": "mxfp8",
    "mxfp4": "mxfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "w4a8_mxfp4_fp8": "mxfp4",
    "mxfp6-pack-quantized": "mxfp6",
    "nvfp4": "nvfp4",
    "nvfp4_awq": "nvfp4",
    "w4a16_nvfp4": "nvfp4",
    "nvfp4-pack-quantized": "nvfp4",
    "fp8_pb_wo": "fp8",
    "fp8_per_channel_per_token": "fp8",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "float8_e4m3fn_rowwise": "fp8",
    "float8_e4m3fn_blockwise": "fp8",
    "int8_tensorwise": "int8",
    "int8_blockwise": "int8",
}
# Fields that ComfyUI may state for a layer without changing the meaning of its tensors.
_HARMLESS: Final = frozenset(
    {
        "format", "full_precision_matrix_mult", "group_size", "block_size", "orig_dtype", "params",
        "per_row",
    }
)  # fmt: skip
_COMFY_MARK: Final = "comfy_quant"
_COMFY_METADATA: Final = "_quantization_metadata"
_MAX_MARK_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Scheme:
    """Quantization scheme that a file states for a weight.

    Attributes
    ----------
    kinds
        Schemes of the table that are stated; several if layers differ.
    source
        Source of the statement, for messages.
    block
        Edges of a block, if stated.
    exact
        True if the scheme is stated for this weight itself, so that no other is accepted.
    tiled
        True if block scales are stored in the order of cuBLAS's tiles, and the first of two codes
        in a byte is the high one (ComfyUI).
    """

    kinds: frozenset[str] = frozenset()
    source: str = "no configuration states how it is quantized"
    block: tuple[int, int] | None = None
    exact: bool = False
    tiled: bool = False


@dataclass(frozen=True, slots=True)
class Schemes:
    """The schemes of a file: one for all weights, and ComfyUI's by layer."""

    whole: Scheme
    layers: Mapping[str, Any] = field(default_factory=dict)

    def of(self, weight: str, tensors: RawTensors, label: str) -> Scheme:
        """Return the scheme of the weight with this name.

        Raises
        ------
        BaseWeightError
            ComfyUI's mark on the layer is not readable, or names a scheme that is not decoded.
        """
        path = weight.removesuffix(".weight")
        mark = f"{path}.{_COMFY_MARK}"
        if mark in tensors.infos:
            info = tensors.infos[mark]
            if info.dtype != "uint8" or info.elements > _MAX_MARK_BYTES:
                why = f"'{mark}' is {info.dtype} {info.shape}, not the bytes of a JSON object"
                raise storage_error(label, weight, "ComfyUI", why)
            try:
                content = json.loads(bytes(tensors.raw(mark, 0, info.elements)))
            except (ValueError, RecursionError) as error:
                why = f"'{mark}' is not readable ({error})"
                raise storage_error(label, weight, "ComfyUI", why) from error
            return _comfy_scheme(weight, content, label)
        for name in (path, path.partition("diffusion_model.")[2]):
            if name in self.layers:
                return _comfy_scheme(weight, self.layers[name], label)
        return self.whole


def stated_schemes(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Schemes:
    """Return the schemes in a model's ``quantization_config`` and in the metadata of its file."""
    names = [name for name in _names(config) if isinstance(name, str)]
    lower = [name.lower() for name in names]
    kinds = frozenset(_SCHEME_NAMES[name] for name in lower if name in _SCHEME_NAMES)
    source = f"the configuration states {', '.join(dict.fromkeys(names))}" if names else ""
    # The edges of blocks, if the configuration states them for the whole or for a group.
    candidates = [config.get("weight_block_size")]
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            candidates.append(weights.get("block_structure"))
    blocks = [
        (block[0], block[1])
        for block in candidates
        if isinstance(block, list)
        and len(block) == 2
        and all(isinstance(edge, int) and edge > 0 for edge in block)
    ]
    whole = Scheme(kinds, source, blocks[0] if blocks else None) if source else Scheme()
    try:
        document = json.loads(metadata.get(_COMFY_METADATA, "{}"))
        layers = document.get("layers", {}) if isinstance(document, dict) else {}
    except (ValueError, RecursionError):
        layers = {}
    return Schemes(whole, layers if isinstance(layers, dict) else {})


def decoding_of(
    rows: tuple[Decoding, ...],
    weight: TensorInfo,
    scale: TensorInfo,
    scheme: Scheme,
    label: str,
) -> Decoding:
    """Return the row of the table for a weight and its scales.

    Raises
    ------
    BaseWeightError
        No row covers the two types under the scheme that the file states.
    """
    types = f"{weight.dtype} with {scale.dtype} scales"
    covering = [row for row in rows if weight.dtype in row.stored and scale.dtype in row.scales]
    for row in covering:
        if row.name.lower() in scheme.kinds:
            return row
        if not (row.must_be_stated or row.contradicted & scheme.kinds or scheme.exact):
            return row
    if not covering:
        why = f"it is stored as {types}, which is not read; dequantize the model first"
        raise storage_error(label, weight.name, "quantized", why)
    readable = " or ".join(dict.fromkeys(row.name for row in covering))
    why = f"{types} are read as {readable}, but {scheme.source}; dequantize the model first"
    raise storage_error(label, weight.name, "quantized", why)


def _names(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the names of schemes in a configuration, as its writer spells them."""
    for key in ("quant_method", "format", "quant_algo", "scale_fmt"):
        yield config.get(key)
    for key in ("config_groups", "quantized_layers"):
        groups = config.get(key)
        for group in groups.values() if isinstance(groups, Mapping) else ():
            if isinstance(group, Mapping):
                yield group.get("format") or group.get("quant_algo")


def _comfy_scheme(weight: str, mark: Any, label: str) -> Scheme:
    """Return the scheme that ComfyUI's mark states for one layer."""
    format_ = mark.get("format") if isinstance(mark, dict) else None
    format_ = format_ if isinstance(format_, str) else ""
    kind = _SCHEME_NAMES.get(format_)
    source = f"ComfyUI's mark states {format_ or 'no format'}"
    if kind is None:
        why = f"{source}, which is not read; dequantize the model first"
        raise storage_error(label, weight, "ComfyUI", why)
    params = mark.get("params")
    options = {**mark, **(params if isinstance(params, dict) else {})}
    if not options.get("convrot"):
        options.pop("convrot_groupsize", None)  # the size of a rotation that was not applied
    changing = [key for key, value in options.items() if value and key not in _HARMLESS]
    if changing:
        why = f"{source} with {', '.join(changing)}, which is not read; dequantize the model first"
        raise storage_error(label, weight, "ComfyUI", why)
    size = options.get("group_size") or options.get("block_size")
    block = (size, size) if isinstance(size, int) and size > 0 and "blockwise" in format_ else None
    return Scheme(frozenset({kind}), source, block, exact=True, tiled=kind in ("mxfp8", "nvfp4"))
