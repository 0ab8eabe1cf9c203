"""Formats of image models: keys of several trainers in one file, with an alpha per module.

A file may mix the patterns of several trainers. Next to the two factors of a module there may be
its alpha, a scalar, the core of a Tucker decomposition (``lora_mid``) and DoRA's norms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from lora_analysis.errors import MalformedFileError
from lora_analysis.finding import Finding
from lora_analysis.formats.build import AdapterParts
from lora_analysis.formats.factors import (
    StatedScale,
    StoredPair,
    alpha_zero_findings,
    scale_from_alpha,
)
from lora_analysis.formats.key_scheme import Role, StoredModules
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.products import (
    ProductModule,
    product_module,
    refuse_other_methods,
    sort_products,
)
from lora_analysis.formats.side_tensors import side_findings
from lora_analysis.formats.stored import contract, tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_analysis.formats.factors import StoredPair
    from lora_analysis.storage.tensors import NamedTensors

# Entry of an adapter's config: keys of the factors in the file it was read from, by module.
FACTOR_KEYS: Final = "factor_keys"
# Entry of an adapter's config: the type in which its file stores alphas.
ALPHA_TYPE: Final = "alpha_type"
_EXTRA: Final = re.compile(
    r"(?P<module>.+?)(?:[._]lora)?\."
    r"(?P<role>alpha|scalar|dora_scale|lora_magnitude_vector(\.[^.]+)?)"
)
_EXTRAS: Final[dict[str, Role]] = {"alpha": "alpha", "scalar": "scalar"}
_EMBEDDINGS: Final = "embeddings of new words"
# Tensors that trainers store next to the factors: reported and carried over, not analyzed.
_OTHERS: Final = (
    (re.compile(r".+\.(diff|diff_b|diff_m|set_weight|w_norm|b_norm)"), "trained in full"),
    (re.compile(r".+\.(lora_B|lora_up)(\.[^.]+)?\.bias"), "biases of B"),
    (re.compile(r"<.+>|bundle_emb\..+|(.+\.)?(emb_params|string_to_param\..+)"), _EMBEDDINGS),
)
# Gives the scale of a module of a rank that something besides its own tensors states.
StatedScales = Callable[[str, int], StatedScale | None]


def complete_image(
    stored: StoredModules,
    *,
    stated_scale: StatedScales = lambda _module, _rank: None,
    config: Mapping[str, Any] | None = None,
    rename: Callable[[str], str] = str,
) -> AdapterParts:
    """Return the parts of an adapter of an image model.

    Parameters
    ----------
    stored
        The keys of its factors.
    stated_scale
        Gives the scale of a module of a rank, if something besides its own tensors states it.
    config
        Facts about the file that a writer of the format needs.
    rename
        Gives the name of a module of LoHa or LoKr, if the file has no pairs of factors.

    Raises
    ------
    MalformedFileError
        A module has one factor only, or its alpha is not a number.
    UnsupportedMethodError
        The file holds a method whose update is not ``s·B·A``.
    """
    tensors = stored.tensors
    refuse_other_methods(stored.path, tensors.infos)
    products, product_scales = _take_products(stored, rename)
    rest = _sort_extras(stored)
    pairs = [
        _add_core_scalar_norms(tensors, pair, stored.modules[pair.module])
        for pair in stored.pairs()
    ]
    pairs += [product.pair for product in products]

    # The keys of modules that are not PEFT's, and alpha's type, for a writer of the format.
    facts: dict[str, Any] = dict(config or {})
    factor_keys = {
        module: (roles["A"], roles["B"], roles.get("alpha"))
        for module, roles in stored.modules.items()
        if roles["A"] != f"{module}.lora_A.weight" and "mid" not in roles
    }
    if factor_keys:
        facts[FACTOR_KEYS] = factor_keys
    alphas = [roles["alpha"] for roles in stored.modules.values() if "alpha" in roles]
    if alphas:
        facts[ALPHA_TYPE] = tensors.infos[alphas[0]].dtype
    findings = _dora_findings(pairs)
    findings += block_findings(tensors, pairs)
    findings += copied_findings(tensors, pairs)
    for what, keys in rest.items():
        findings += side_findings(f"{what}, not analyzed", keys)

    def scale(pair: StoredPair, rank: int) -> StatedScale:
        return product_scales.get(pair.module) or _scale(stored, stated_scale, pair, rank)

    return AdapterParts(
        pairs=pairs,
        scale=scale,
        scale_findings=partial(_scale_findings, stored),
        divisors={p.pair.module: p.rank for p in products if p.rank is not None},
        findings=findings,
        harmless=rest.get(_EMBEDDINGS, ()),
        config=facts,
        metadata=tensors.metadata,
        **_facts(tensors.metadata),
    )


def _take_products(
    stored: StoredModules, rename: Callable[[str], str]
) -> tuple[list[ProductModule], dict[str, StatedScale]]:
    """Return the modules of LoHa and LoKr with their scales, and take their keys from the others.

    The scale is alpha/r, and 1 without an alpha or, as LyCORIS decides, without a factored part.
    """
    patterns = list(dict.fromkeys(stored.patterns.values()))
    rename = patterns[0].rename if patterns else rename
    tensors, others = stored.tensors, dict.fromkeys(stored.others)
    products: list[ProductModule] = []
    scales: dict[str, StatedScale] = {}
    for name, parts in sort_products(stored.others).items():
        product = product_module(tensors, name, rename(name), parts)
        extras = {role: f"{name}.{role}" for role in ("alpha", "scalar", "dora_scale")}
        extras = {role: key for role, key in extras.items() if key in others}
        for key in (*parts.values(), *extras.values()):
            del others[key]
        pair = product.pair
        if "scalar" in extras:
            pair = replace(pair, b=pair.b.times(_number(tensors, extras["scalar"])))
        if "dora_scale" in extras:
            pair = _add_norms(tensors, pair, extras["dora_scale"])
        products.append(replace(product, pair=pair))
        scales[pair.module] = StatedScale(1.0, None, "format")
        if "alpha" in extras and product.rank is not None:
            alpha = _number(tensors, extras["alpha"])
            scales[pair.module] = scale_from_alpha(alpha, product.rank, "tensor")
    stored.others[:] = others
    return products, scales


def _sort_extras(stored: StoredModules) -> dict[str, list[str]]:
    """Add alphas, scalars and norms to their modules; return all other keys by what they are."""
    rest: dict[str, list[str]] = {}
    patterns = dict.fromkeys(stored.patterns.values())
    for key in stored.others:
        if match := _EXTRA.fullmatch(key):
            # The "_lora" before the dot may belong to the name, as in XLabs' "proj_lora".
            stems = match["module"], key[: match.start("role") - 1]
            names = dict.fromkeys(pattern.rename(stem) for stem in stems for pattern in patterns)
            module = next((name for name in names if name in stored.modules), None)
            if module is not None:
                stored.add(module, _EXTRAS.get(match["role"], "magnitude"), key)
                continue
        what = next((what for mark, what in _OTHERS if mark.fullmatch(key)), "no factors")
        rest.setdefault(what, []).append(key)
    return rest


def _add_core_scalar_norms(
    tensors: NamedTensors, pair: StoredPair, parts: Mapping[Role, str]
) -> StoredPair:
    """Return a pair with its kernel, and with its core, scalar and norms applied."""
    shapes = pair.a.shape(tensors), pair.b.shape(tensors)
    kernel = shapes[0][2:]
    a, b = pair.a, pair.b
    if "mid" in parts:
        # ΔW = einsum("ij…,ip,jr->pr…", mid, upᵀ, down): up stays B, mid and down make A.
        kernel = tensors.infos[parts["mid"]].shape[2:]
        a = contract(tensor(parts["mid"]), a.flatten())
    if "scalar" in parts:
        b = b.times(_number(tensors, parts["scalar"]))
    if kernel or any(len(shape) > 2 for shape in shapes):
        kernel = kernel or tuple(1 for _ in shapes[1][2:])
        pair = replace(pair, layout="conv", kernel=kernel)
        a, b = a.flatten(), b.flatten()
    pair = replace(pair, a=a, b=b)
    return _add_norms(tensors, pair, parts["magnitude"]) if "magnitude" in parts else pair


def _add_norms(tensors: NamedTensors, pair: StoredPair, name: str) -> StoredPair:
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


def _scale(
    stored: StoredModules, stated_scale: StatedScales, pair: StoredPair, rank: int
) -> StatedScale:
    """Return the scale by the module's own alpha, else as stated elsewhere, else the format's."""
    keys, pattern = stored.modules[pair.module], stored.patterns[pair.module]
    if "alpha" in keys:
        alpha = _number(stored.tensors, keys["alpha"])
        # An alpha of 0 counts as a missing one in kohya's format. With a Tucker decomposition,
        # alpha is divided by the rows of lora_down.
        if alpha != 0 or not pattern.alpha_is_rank:
            return scale_from_alpha(alpha, stored.tensors.infos[keys["A"]].shape[0], "tensor")
    return stated_scale(pair.module, rank) or pattern.default_scale(rank)


def _number(tensors: NamedTensors, name: str) -> float:
    shape = tensors.infos[name].shape
    values = np.asarray(tensors.read(name)).reshape(-1) if math.prod(shape) == 1 else None
    if values is None or not np.isfinite(float(values[0])):
        content = shape if values is None else values[0]
        message = f"{tensors.file_of(name)}: '{name}' must be one finite number, found {content}."
        raise MalformedFileError(message)
    return float(values[0])


def _scale_findings(
    stored: StoredModules, scales: Mapping[str, StatedScale]
) -> list[Finding | str]:
    by_reason: dict[str, list[str]] = {}
    for module, scale in scales.items():
        if scale.origin in ("format", "unknown") and module in stored.patterns:
            by_reason.setdefault(stored.patterns[module].reason, []).append(module)
    findings: list[Finding | str] = [*alpha_zero_findings(scales)]
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


def _facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return base model and seed that kohya's metadata state."""
    facts: dict[str, Any] = {}
    keys = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")
    bases = [metadata[key] for key in keys if metadata.get(key) not in (None, "", "None")]
    if bases:
        facts["base_model"] = bases[0]
    if re.fullmatch(r"-?[0-9]{1,19}", metadata.get("ss_seed", "")):
        facts["seed"] = int(metadata["ss_seed"])
    return facts


# Fused projections of FLUX: three parts of equal width, or q, k, v and the MLP's four widths.
_FUSED: Final = (
    (re.compile(r".*(img|txt)_attn[._]qkv"), (1, 1, 1)),
    (re.compile(r".*single_blocks[._]\d+[._]linear1"), (1, 1, 1, 4)),
)
_SPLIT: Final = re.compile(r"(?P<before>.*[._])(?P<letter>[qkv])(?P<after>_proj)?")


def block_findings(tensors: NamedTensors, pairs: Sequence[StoredPair]) -> list[Finding]:
    """Return a finding if B of fused projections is block-diagonal, as split_qkv leaves it.

    sd-scripts trains q, k, v (and the MLP) of FLUX separately, with ``alpha/r`` each, and saves
    them as one pair of rank 3r or 4r with the unchanged alpha. Every loader, its own too, then
    computes ``alpha/(3r)``. One module of each kind is checked: the option holds for a file.
    """
    findings = []
    for pattern, widths in _FUSED:
        fused = [pair for pair in pairs if pattern.fullmatch(pair.module)]
        if fused and _is_block_diagonal(fused[0].b.read(tensors), widths):
            fields = {"count": len(fused), "module": fused[0].module, "parts": len(widths)}
            findings.append(Finding("split-qkv", fields))
    return findings


def _is_block_diagonal(b: NDArray[np.floating], widths: Sequence[int]) -> bool:
    """Return True if B is zero outside its blocks, and in none of them."""
    unit, rank, n = sum(widths), b.shape[1], len(widths)
    if rank % n or b.shape[0] % unit:
        return False
    outside = b.copy()
    top = 0
    for k, width in enumerate(widths):
        rows = slice(top, top + width * b.shape[0] // unit)
        block = outside[rows, k * rank // n : (k + 1) * rank // n]
        if not block.any():
            return False
        block[:] = 0
        top = rows.stop
    return not outside.any()


def copied_findings(tensors: NamedTensors, pairs: Sequence[StoredPair]) -> list[Finding]:
    """Return a finding if q, k and v have one and the same A.

    Converters that split a fused projection copy its A to each part; the input subspaces of the
    parts are then identical, which training did not do. All are compared only if the first are.
    """
    groups: dict[tuple[str, str], list[StoredPair]] = {}
    for pair in pairs:
        if match := _SPLIT.fullmatch(pair.module):
            groups.setdefault((match["before"], match["after"] or ""), []).append(pair)
    first = next((group for group in groups.values() if len(group) > 1), [])
    if len({_digest(tensors, pair) for pair in first}) != 1 or not first[0].a.read(tensors).any():
        return []
    alike: dict[bytes, list[str]] = {}
    for pair in pairs:
        alike.setdefault(_digest(tensors, pair), []).append(pair.module)
    copied = [modules for modules in alike.values() if len(modules) > 1]
    return [Finding("copied-a", {"count": sum(map(len, copied)), "modules": copied[0]})]


def _digest(tensors: NamedTensors, pair: StoredPair) -> bytes:
    """Return a hash of the shape and the numbers of A."""
    import hashlib  # reading most adapters needs no hash

    a = np.ascontiguousarray(pair.a.read(tensors))
    return hashlib.sha256(repr(a.shape).encode() + a.tobytes()).digest()
