"""Layers of Stable Diffusion and FLUX under the names that loaders look up.

sd-scripts names the layers of SDXL and FLUX as their authors' code does, those of Stable Diffusion
1 and 2 as diffusers does, with underscores for the dots. diffusers has paths. FLUX differs by more
than spelling: the authors' code has one weight for q, k and v (and the input of the MLP in single
blocks), diffusers one each. Both directions are exact. A fused update is split by
rows of B; directions that a part does not use are left out, so that three LoRAs that sd-scripts
trained apart (``split_qkv``) come apart again. Parts with equal A are joined under this A, others
block by block.

Reference: sd-scripts ``library/sdxl_original_unet.py``, ``library/flux_models.py`` and
``networks/lora_flux.py``; diffusers 0.42 ``loaders/lora_conversion_utils.py``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.adapter import NOT_STORED, Adapter, LazyUpdate, LowRankUpdate
from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.family_names import (
    FLUX_DOUBLE,
    FLUX_SINGLE,
    FLUX_TOP,
    authors_name,
    diffusers_name,
)
from lora_analysis.formats.written import join_updates, low_rank_update
from lora_analysis.names import split_component

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lora_analysis.adapter import Update

# Names that kohya's keys made of a module's path. Half-renamed files keep some of its dots.
FLATTENED: Final = re.compile(r"(lora_(unet|transformer|prior_unet|te[1-4]?)|lycoris)_[\w.]+")
# A segment of a flattened path: one with underscores in U-Nets, FLUX, CLIP or T5 (a longer one
# before one that it starts with), else what is between two of them.
_SEGMENT: Final = re.compile(
    r"("
    r"single_transformer_blocks|transformer_blocks|guidance_embedder|timestep_embedder|"
    r"adaLN_modulation|context_embedder|skip_connection|text_projection|time_text_embed|"
    r"time_embedding|add_embedding|conv_shortcut|double_blocks|norm1_context|output_blocks|"
    r"single_blocks|text_embedder|time_emb_proj|input_blocks|middle_block|down_blocks|"
    r"final_layer|guidance_in|add_k_proj|add_q_proj|add_v_proj|emb_layers|ff_context|"
    r"out_layers|text_model|time_embed|to_add_out|x_embedder|in_layers|label_emb|mid_block|"
    r"out_layer|self_attn|up_blocks|vector_in|conv_out|img_attn|in_layer|linear_1|linear_2|"
    r"norm_out|out_proj|proj_mlp|proj_out|txt_attn|conv_in|img_mlp|img_mod|proj_in|time_in|"
    r"txt_mlp|txt_mod|img_in|k_proj|q_proj|to_out|txt_in|v_proj|to_k|to_q|to_v|wi_0|wi_1|[^_]+"
    r")(?:_|$)"
)
_UNET: Final = re.compile(
    r"(down|up)_blocks\.\d+\.(resnets|attentions|downsamplers|upsamplers)\.\d+\..+"
    r"|mid_block\.(resnets|attentions)\.\d+\..+|conv_(in|out)|(time|add)_embedding\.linear_[12]"
)
# SDXL has three levels, none with attention at the first; other U-Nets have four, three with.
_NOT_SDXL: Final = re.compile(r"(down|up)_blocks\.3\.|(down_blocks\.0|up_blocks\.2)\.attentions\.")
_SDXL: Final = re.compile(
    r"up_blocks\.0\.attentions\.|add_embedding\."
    r"|((down|up)_blocks\.\d|mid_block)\.attentions\.\d+\.transformer_blocks\.[1-9]"
)
_TEXT_ENCODER: Final = re.compile(r"text_model\..+|encoder\.block\.\d+\..+")
# Diffusers' names of the parts of fused weights, and their rows in units of the hidden size.
_QKV: Final = {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1}
_FUSED: Final = {
    "attn.to_qkv": _QKV,
    "attn.add_qkv_proj": {"attn.add_q_proj": 1, "attn.add_k_proj": 1, "attn.add_v_proj": 1},
    "attn.to_qkv_mlp": {**_QKV, "proj_mlp": 4},
}
# diffusers has the rows of the scale before those of the shift, the authors' code after them.
_SHIFT_SCALE: Final = "norm_out.shift_scale"
_SCALE_SHIFT: Final = "norm_out.linear"
_BLOCK: Final = re.compile(
    r"(?P<kind>(double|single)_blocks|(single_)?transformer_blocks)\.(?P<number>\d+)\.(?P<layer>.+)"
)
_DIFFUSERS_BLOCK: Final = re.compile(r"(single_)?transformer_blocks\.\d")
# Kind of block: diffusers' name, the authors' layers, and the number of blocks in FLUX.
_KINDS: Final = {
    "double_blocks": ("transformer_blocks", FLUX_DOUBLE, 19),
    # XLabs' processors add to q, k and v of the first layer alone.
    "single_blocks": (
        "single_transformer_blocks",
        FLUX_SINGLE | {"linear1.qkv": "attn.to_qkv"},
        38,
    ),
}


def dotted_path(flat: str) -> str:
    """Return a flattened path of a U-Net, FLUX, CLIP or T5 with its dots.

    Examples
    --------
    >>> dotted_path("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0")
    'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0'
    """
    return ".".join(match[1] for match in _SEGMENT.finditer(flat))


def to_diffusers_names(adapter: Adapter) -> Adapter:
    """Return an adapter with its modules under diffusers' paths, fused weights of FLUX split.

    Modules that diffusers' models do not have keep their names. Nothing changes if no module has a
    name of kohya's files or of FLUX's authors.

    Raises
    ------
    InputError
        Two modules have one path, or a fused weight does not divide into its parts.
    UnsupportedMethodError
        A fused weight is DoRA's, with norms of input columns.
    """
    paths = {module: _component_path(module) for module in adapter}
    flux = {
        m: name for m, (c, path) in paths.items() if not c and (name := _diffusers_flux_name(path))
    }
    if not flux and not any(map(_is_flat, adapter)):
        return adapter
    updates: dict[str, LazyUpdate] = {}
    for module, (component, path) in paths.items():
        name = module
        if module in flux:
            parts = _split(adapter, module, flux[module])
        else:
            if component.startswith("text_encoder") and _TEXT_ENCODER.fullmatch(path):
                # T5 is FLUX's second text encoder, and the third in kohya's names.
                is_second = flux and component == "text_encoder_3"
                name = f"{'text_encoder_2' if is_second else component}.{path}"
            elif not component and _UNET.fullmatch(diffusers_name(path)):
                name = f"unet.{diffusers_name(path)}"
            elif not component and _DIFFUSERS_BLOCK.match(path):
                name = f"transformer.{path}"
            parts = {name: adapter.lazy(module)}
        if twice := parts.keys() & updates.keys():
            message = f"Two modules of {adapter.label} would both be '{min(twice)}' in diffusers."
            raise InputError(message)
        updates |= parts
    return _with_updates(adapter, updates)


def to_authors_names(adapter: Adapter, *, dotted: bool = False) -> Adapter:
    """Return an adapter with the modules of SDXL and FLUX under their authors' paths.

    Parts of FLUX's fused weights are joined; those that the adapter lacks are zero. Other models
    and flattened names do not change, unless ``dotted`` asks for the paths of FLUX that they are
    made of. FLUX is recognized by its layers and the number of its blocks: models with the same
    layers have more.

    Raises
    ------
    InputError
        Parts of a weight do not have the sizes of FLUX's layers.
    UnsupportedMethodError
        A part is DoRA's.
    """
    if dotted and all(map(_is_flat, adapter)):
        return _with_updates(adapter, {_dotted_flux(name): adapter.lazy(name) for name in adapter})
    paths = {module: _component_path(module) for module in adapter if not _is_flat(module)}
    denoiser = [path for component, path in paths.values() if not component]
    is_sdxl = any(map(_SDXL.match, denoiser)) and not any(map(_NOT_SDXL.match, denoiser))
    layers = [_authors_flux_name(path) for path in denoiser]
    is_flux = None not in layers and any("single_blocks." in str(layer) for layer in layers)
    if not is_sdxl and not is_flux:
        return adapter
    updates: dict[str, LazyUpdate] = {}
    fused: dict[str, dict[str, str]] = {}
    for module in adapter:
        component, path = paths.get(module, ("flattened", module))
        if component == "text_encoder_2" and path.startswith("encoder.block."):
            updates[f"text_encoder_3.{path}"] = adapter.lazy(module)
        elif component == "text_encoder" and not dotted:
            # The first of two, which it need not have.
            updates[f"te1.{path}"] = adapter.lazy(module)
        elif component:
            updates[module] = adapter.lazy(module)
        elif is_sdxl:
            updates[f"unet.{authors_name(path)}"] = adapter.lazy(module)
        else:
            fused.setdefault(f"transformer.{_authors_flux_name(path)}", {})[module] = path
    updates |= {whole: _join(adapter, whole, parts) for whole, parts in fused.items()}
    return _with_updates(adapter, updates)


def _dotted_flux(module: str) -> str:
    component, path = _component_path(module)
    return f"diffusion_model.{path}" if not component and _diffusers_flux_name(path) else module


def _is_flat(module: str) -> bool:
    return FLATTENED.fullmatch(module) is not None


def _component_path(module: str) -> tuple[str, str]:
    """Return the component of a module's name and its path in it, with dots."""
    component, path = split_component(module)
    return component, path if "." in path else dotted_path(path)


def _with_updates(adapter: Adapter, updates: Mapping[str, LazyUpdate]) -> Adapter:
    """Return an adapter with renamed updates, of which each knows its new name."""
    origins = adapter.provenance.scale_origin
    renamed = {}
    scale_origin = {}
    for name, update in updates.items():
        scale_origin[name] = origins.get(update.outline.name, "caller")
        outline = replace(update.outline, name=name)
        renamed[name] = LazyUpdate(outline, partial(_load_renamed, update, name))
    return adapter.copy_with(
        updates=renamed, provenance=replace(adapter.provenance, scale_origin=scale_origin)
    )


def _load_renamed(update: LazyUpdate, name: str) -> Update:
    return replace(update.load(), name=name)


def _diffusers_flux_name(path: str) -> str | None:
    """Return diffusers' path of a layer of FLUX in the authors' spelling, fused as it is there."""
    if path in FLUX_TOP:
        return FLUX_TOP[path]
    match = _BLOCK.fullmatch(path)
    if match is None or match["kind"] not in _KINDS:
        return None
    blocks, layers, count = _KINDS[match["kind"]]
    layer = layers.get(match["layer"]) if int(match["number"]) < count else None
    return layer and f"{blocks}.{match['number']}.{layer}"


def _authors_flux_name(path: str) -> str | None:
    """Return the authors' path of a layer of diffusers' FLUX, or of the weight it is a part of."""
    if path == _SCALE_SHIFT:
        path = _SHIFT_SCALE
    match = _BLOCK.fullmatch(path)
    if match is None:
        return next((name for name, layer in FLUX_TOP.items() if layer == path), None)
    for kind, (blocks, layers, count) in _KINDS.items():
        if match["kind"] == blocks and int(match["number"]) < count:
            for layer, theirs in layers.items():
                parts = _FUSED.get(theirs, {theirs: 1})
                if match["layer"] in parts and layer != "linear1.qkv":
                    return f"{kind}.{match['number']}.{layer}"
    return None


def _rows_of_parts(name: str, rows: int) -> dict[str, NDArray[np.intp]]:
    """Return the rows that each part of a fused weight of diffusers' FLUX has, by its path."""
    if name == _SHIFT_SCALE:
        return {_SCALE_SHIFT: np.roll(np.arange(rows), rows // 2)}
    for fused, parts in _FUSED.items():
        if name.endswith(f".{fused}"):
            before = name.removesuffix(fused)
            unit, rest = divmod(rows, sum(parts.values()))
            if rest:
                message = f"'{name}' has {rows} rows, which do not divide into {', '.join(parts)}."
                raise InputError(message)
            ends = np.cumsum([count * unit for count in parts.values()])
            return {
                f"{before}{part}": np.arange(end - count * unit, end)
                for (part, count), end in zip(parts.items(), ends, strict=True)
            }
    return {name: np.arange(rows)}


def _split(adapter: Adapter, module: str, name: str) -> dict[str, LazyUpdate]:
    """Return a layer of FLUX under its path in diffusers, or its parts under theirs.

    A part whose rows of B are zero is left out, unless all are or DoRA's norms belong to it.
    """
    outline = adapter.outline(module)
    parts = _rows_of_parts(name, outline.shape[0])
    if list(parts) == [name]:
        return {f"transformer.{name}": adapter.lazy(module)}
    if outline.magnitude_side == "input":
        message = (
            f"'{module}' is DoRA with norms of input columns of a fused weight: not divisible."
        )
        raise UnsupportedMethodError(message)
    B = low_rank_update(adapter, module).B
    split = {}
    for part, rows in parts.items():
        columns = np.flatnonzero(B[rows].any(axis=0))
        if outline.has_magnitude or not B.any():
            columns = np.arange(outline.rank)
        if len(columns):
            size, rank = (len(rows), outline.shape[1]), len(columns)
            load = partial(_load_part, adapter, module, rows, columns)
            planned = replace(outline, shape=size, rank=rank, alpha=None)
            split[f"transformer.{part}"] = LazyUpdate(planned, load)
    return split


def _load_part(
    adapter: Adapter, module: str, rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> LowRankUpdate:
    update = low_rank_update(adapter, module)
    magnitude = None if update.magnitude is None else update.magnitude[rows]
    A, B = update.A[columns], update.B[np.ix_(rows, columns)]
    return replace(update, A=A, B=B, alpha=None, magnitude=magnitude, stored_at=NOT_STORED)


def _join(adapter: Adapter, whole: str, paths: Mapping[str, str]) -> LazyUpdate:
    """Return the update of a weight of the authors' FLUX from the modules that are parts of it.

    Parameters
    ----------
    adapter
        The adapter, with the modules under diffusers' names.
    whole
        Name of the weight.
    paths
        Path of each part in diffusers by its module.
    """
    fused = _diffusers_flux_name(whole.removeprefix("transformer.")) or ""
    outlines = {module: adapter.outline(module) for module in paths}
    first, outline = next(iter(outlines.items()))
    if [fused] == list(paths.values()):
        return adapter.lazy(first)
    if any(outline.variant for outline in outlines.values()):
        message = f"'{first}' is a part of '{whole}' and of DoRA; such parts cannot be joined."
        raise UnsupportedMethodError(message)
    shares = next((parts for layer, parts in _FUSED.items() if fused.endswith(f".{layer}")), {})
    share = next((n for part, n in shares.items() if paths[first].endswith(f".{part}")), 1)
    total = outline.shape[0] // share * (sum(shares.values()) or 1)
    places = _rows_of_parts(fused, total)
    modules = {path: module for module, path in paths.items()}
    rows = {modules[path]: places[path] for path in places if path in modules}
    sizes = {
        (outlines[module].shape[0] - len(rows[module]), outlines[module].shape[1])
        for module in rows
    }
    if sizes != {(0, outline.shape[1])}:
        message = (
            f"The parts of '{whole}' in {adapter.label} do not have the sizes of FLUX's layers."
        )
        raise InputError(message)
    updates = [low_rank_update(adapter, module) for module in rows]
    is_shared = all(
        update.scale == updates[0].scale and np.array_equal(update.A, updates[0].A)
        for update in updates
    )
    rank = outline.rank if is_shared else sum(update.rank for update in updates)
    planned = replace(outline, shape=(total, outline.shape[1]), rank=rank, alpha=None)
    leading = next(iter(rows))
    load = partial(join_updates, adapter, rows, total, leading, is_shared=is_shared)
    return LazyUpdate(planned, load)
