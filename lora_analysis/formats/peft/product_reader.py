"""PEFT's LoHa and LoKr, read as two factors: see `formats.products`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.formats.build import AdapterParts, build_adapter
from lora_analysis.formats.factors import finite_number, scale_from_alpha
from lora_analysis.formats.products import product_module, sort_products
from lora_analysis.formats.side_tensors import side_finding
from lora_analysis.names import strip_wrappers
from lora_analysis.patterns import pattern_value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.factors import StatedScale, StoredPair
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.formats.sources import AdapterFiles

PRODUCT_METHODS: Final = frozenset({"LOHA", "LOKR"})


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
            findings=side_finding("not analyzed", [k for k in others if k not in saved.values()]),
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
