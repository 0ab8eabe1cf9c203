"""LoHa and LoKr as two factors: products of matrices whose update is exactly ``s·B·A``.

LoHa's update is ``(B₁A₁) ∘ (B₂A₂)``, of rank r² at most: the rows of B are Kronecker products of
the rows of B₁ and B₂, and so are the columns of A. LoKr's is ``C ⊗ D`` with C and D stored whole
or as two factors each: ``C₁C₂ ⊗ D₁D₂ = (C₁ ⊗ D₁)(C₂ ⊗ D₂)``. Reference: LyCORIS 4.1
``modules/loha.py`` and ``lokr.py``, PEFT ``tuners/loha`` and ``tuners/lokr``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.formats.build import AdapterParts, build_adapter
from lora_analysis.formats.factors import StoredPair, finite_number, scale_from_alpha
from lora_analysis.formats.side_tensors import side_findings
from lora_analysis.formats.stored import (
    StoredFactor,
    contract,
    identity_like,
    khatri_rao,
    kronecker,
    tensor,
)
from lora_analysis.names import strip_wrappers
from lora_analysis.patterns import pattern_value

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.factors import StatedScale
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.formats.sources import AdapterFiles
    from lora_analysis.storage.tensors import NamedTensors

# PEFT's names of the two methods.
PRODUCT_METHODS: Final = frozenset({"LOHA", "LOKR"})

_KEY: Final = re.compile(
    r"(?P<module>.+)\.(?P<part>hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2))"
)
# Last segments of a key, and the method they belong to. Segments, not substrings.
_MARKS: Final = (
    (re.compile(r"(?P<module>.+)\.oft_(blocks|diag)"), "OFT or BOFT (rotations of the weight)"),
    (re.compile(r"(?P<module>.+)\.on_input"), "IA3 (rescaled activations)"),
    (re.compile(r"(?P<module>.+)\.lambda_layer(\.weight)?"), "T-LoRA (a timestep-masked rank)"),
)
_GLORA: Final = re.compile(r"(?P<module>.+)\.(?P<part>[ab][12])\.weight")
# A Kronecker product that is stored whole has the rank of the weight.
_MOST_RANK: Final = 2**14
# Numbers in a factor that is computed; the file itself may be tiny.
_MAX_ELEMENTS: Final = 2**28


@dataclass(frozen=True, slots=True)
class ProductModule:
    """One module of LoHa or LoKr.

    Attributes
    ----------
    pair
        Its factors.
    method
        ``"LoHa"`` or ``"LoKr"``.
    rank
        The rank that alpha is divided by; None if no part is factored, which LyCORIS then ignores.
    """

    pair: StoredPair
    method: str
    rank: int | None


def sort_products(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the keys of LoHa and LoKr by module and part, in the order of the file."""
    modules: dict[str, dict[str, str]] = {}
    for key in keys:
        if match := _KEY.fullmatch(key):
            modules.setdefault(match["module"], {})[match["part"]] = key
    return modules


def product_module(
    tensors: NamedTensors, stored: str, module: str, parts: Mapping[str, str]
) -> ProductModule:
    """Return one module as two factors.

    Parameters
    ----------
    tensors
        The file.
    stored, module
        The module's name in the file, for messages, and in the base model.
    parts
        Part (``"hada_w1_a"``) → key, as `sort_products` returns them.

    Raises
    ------
    MalformedFileError
        A part is missing, or the parts do not fit together.
    """
    is_loha = any(part.startswith("hada") for part in parts)
    try:
        result = (_loha if is_loha else _lokr)(tensors, module, parts)
        for factor in (result.pair.a, result.pair.b):
            rows, columns = factor.shape(tensors)
            if rows * columns > _MAX_ELEMENTS:
                message = f"a factor of shape ({rows}, {columns})"
                raise ValueError(message)  # noqa: TRY301
    except (KeyError, ValueError, IndexError) as error:
        method = "LoHa" if is_loha else "LoKr"
        problem = f"no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
        message = (
            f"{tensors.file_of(next(iter(parts.values())))}: the parts of '{stored}' are not those "
            f"of a {method}: {problem}; it has {', '.join(sorted(parts))}."
        )
        raise MalformedFileError(message) from error
    return result


def _loha(tensors: NamedTensors, module: str, parts: Mapping[str, str]) -> ProductModule:
    factors_a, factors_b = [], []
    kernel: tuple[int, ...] = ()
    for number in (1, 2):
        a, b = (tensor(parts[f"hada_w{number}_{side}"]) for side in "ab")
        core = parts.get(f"hada_t{number}")
        if core is not None:
            # ΔW₁ = einsum("ij…,ip,jr->pr…", t, w_a, w_b): w_a stays B, t and w_b make A.
            kernel = tensors.infos[core].shape[2:]
            a, b = a.transpose(), contract(tensor(core), b).flatten()
        factors_b.append(a)
        factors_a.append(b.transpose())
    pair = StoredPair(
        module, khatri_rao(*factors_a).transpose(), khatri_rao(*factors_b),
        layout="conv" if kernel else "linear", kernel=kernel, most_rank=_MOST_RANK,
    )  # fmt: skip
    return ProductModule(pair, "LoHa", tensors.infos[parts["hada_w1_b"]].shape[0])


def _lokr(tensors: NamedTensors, module: str, parts: Mapping[str, str]) -> ProductModule:
    kernel: tuple[int, ...] = ()
    rank = None
    if "lokr_t2" in parts:
        core = parts["lokr_t2"]
        kernel = tensors.infos[core].shape[2:]
        rank = tensors.infos[parts["lokr_w2_b"]].shape[0]
        second = (
            tensor(parts["lokr_w2_a"]).transpose(),
            contract(tensor(core), tensor(parts["lokr_w2_b"])).flatten(),
        )
    elif "lokr_w2_b" in parts:
        rank = tensors.infos[parts["lokr_w2_b"]].shape[0]
        second = tensor(parts["lokr_w2_a"]), tensor(parts["lokr_w2_b"]).flatten()
    else:
        shape = tensors.infos[parts["lokr_w2"]].shape
        kernel = shape[2:]
        second = _as_product(tensors, tensor(parts["lokr_w2"]).flatten())
    if "lokr_w1_b" in parts:
        rank = tensors.infos[parts["lokr_w1_b"]].shape[0] if rank is None else rank
        first = tensor(parts["lokr_w1_a"]), tensor(parts["lokr_w1_b"])
    else:
        first = _as_product(tensors, tensor(parts["lokr_w1"]))
    pair = StoredPair(
        module, kronecker(first[1], second[1]), kronecker(first[0], second[0]),
        layout="conv" if kernel else "linear", kernel=kernel, most_rank=_MOST_RANK,
    )  # fmt: skip
    return ProductModule(pair, "LoKr", rank)


def _as_product(tensors: NamedTensors, matrix: StoredFactor) -> tuple[StoredFactor, StoredFactor]:
    """Return a matrix that is stored whole as a product with the smaller identity."""
    rows, columns = matrix.flatten().shape(tensors)
    if columns <= rows:
        return matrix, identity_like(matrix, columns)
    return identity_like(matrix, rows), matrix


def other_method(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the method and the first key of a file that is not LoRA, None if there is none.

    GLoRA's short names count only where one module has all four.
    """
    names = list(keys)
    glora: dict[str, set[str]] = {}
    for key in names:
        for mark, method in _MARKS:
            if mark.fullmatch(key):
                return method, key
        if match := _GLORA.fullmatch(key):
            parts = glora.setdefault(match["module"], set())
            parts.add(match["part"])
            if len(parts) == 4:
                return "GLoRA (ΔW = W·A + B)", key
    return None


def refuse_other_methods(path: object, keys: Iterable[str]) -> None:
    """Raise if a file holds a method that is not LoRA, alone or next to pairs of factors."""
    if match := other_method(keys):
        method, key = match
        message = (
            f"{path}: '{key}' belongs to {method}; its update is not s·B·A and is not read. Merge "
            "it into its base, and read the merged model as a full fine-tune: `lora-analysis "
            "extract merged --base base`."
        )
        raise UnsupportedMethodError(message)


def read_products(files: AdapterFiles, options: ReadOptions) -> Adapter:
    """Read an adapter of PEFT's LoHa or LoKr; the scale is always alpha/r of its config.

    Raises
    ------
    MalformedFileError
        Parts of a module are missing, or the config states no rank or alpha.
    UnsupportedMethodError
        A LoKr of a one-dimensional convolution is stored whole: PEFT applies it with its entries
        in another order.
    """
    config = files.config or {}
    tensors = files.open(options)
    products, others = [], dict.fromkeys(tensors.infos)
    for name, parts in sort_products(tensors.infos).items():
        whole = parts.get("lokr_w2")
        if whole is not None and len(tensors.infos[whole].shape) == 3:
            message = (
                f"{files.weights}: '{whole}' is the whole factor of a one-dimensional convolution, "
                "which PEFT applies with its entries in another order. Merge it into its base, and "
                "read the merged model as a full fine-tune."
            )
            raise UnsupportedMethodError(message)
        products.append(product_module(tensors, name, strip_wrappers(name), parts))
        for key in parts.values():
            del others[key]
    if not products:
        message = (
            f"{files.weights}: the config names {config.get('peft_type')}, but no tensor does."
        )
        raise MalformedFileError(message)

    def scale(pair: StoredPair, _rank: int) -> StatedScale:
        alpha = _number(files, config, pair.module, "alpha")
        return scale_from_alpha(alpha, round(_number(files, config, pair.module, "rank")), "config")

    saved = {strip_wrappers(key): key for key in others if key.endswith((".weight", ".bias"))}
    base = config.get("base_model_name_or_path")
    return build_adapter(
        files.path, "peft", tensors, options,
        AdapterParts(
            pairs=[product.pair for product in products],
            scale=scale,
            findings=side_findings("not analyzed", [k for k in others if k not in saved.values()]),
            files=() if files.config_path is None else (files.config_path,),
            base_model=base if isinstance(base, str) else None,
            config=config,
            divisors={
                product.pair.module: round(
                    _number(files, config, product.pair.module, "rank")
                )
                for product in products
            },
            saved=saved,
        ),
    )  # fmt: skip


def _number(files: AdapterFiles, config: Mapping[str, Any], module: str, what: str) -> float:
    """Return rank or alpha of a module by the config: its pattern, else the default."""
    default = config.get("r" if what == "rank" else "alpha")
    patterns = config.get(f"{what}_pattern")
    try:
        value = pattern_value(module, patterns, default) if isinstance(patterns, dict) else default
    except InputError as error:
        message = f"{files.config_path}: {what}_pattern: {error}"
        raise MalformedFileError(message) from error
    if (number := finite_number(value)) is None or (what == "rank" and number < 1):
        message = f"{files.config_path}: {what} of '{module}' must be a number, found {value!r}."
        raise MalformedFileError(message)
    return number
