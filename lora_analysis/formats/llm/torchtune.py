"""Adapters that torchtune saved in its own names: ``layers.0.attn.q_proj.lora_a.weight``.

Reference: torchtune 0.6, ``modules/peft/lora.py``, ``models/convert_weights.py``. A is
``(r, d_in)``, B ``(d_out, r)``, DoRA's norms ``magnitude``. The file is a torch pickle
(``adapter_model.pt``) and states no alpha; the run's configuration beside it does. For models that
come from Meta's order of q and k rows (Llama, Mistral, Gemma) torchtune keeps that order in its own
files; it is turned to that of Hugging Face where the number of heads is known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError, MalformedFileError
from lora_analysis.formats.assembly import (
    assembled,
    beside_finding,
    factors_named,
    stated_alpha,
)
from lora_analysis.formats.factors import (
    StoredPair,
    complete_pairs,
    finite_number,
)
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.plain_yaml import number, plain_values
from lora_analysis.formats.rotary import in_halves, vector_in_halves
from lora_analysis.formats.sources import AdapterRef, ReadOptions, label_of, tensors_at
from lora_analysis.formats.stored import tensor
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.storage.tensors import NamedTensors

NAME: Final = "torchtune"

_KEY: Final = re.compile(r"(?P<module>.+)\.(?P<role>lora_a|lora_b)\.weight")
_NORM: Final = re.compile(r"(?P<module>.+)\.magnitude")
_ROTATED: Final = re.compile(r".*\battn\.(?P<part>[qk])_proj")
_LAYER: Final = re.compile(r"layers\.(?P<index>\d+)\.(?P<part>.+)")
_PARTS: Final = {
    **{f"attn.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"},
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_OUTSIDE: Final = {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}

# model_type in the base's config.json: those whose rows torchtune permutes, those it leaves.
_PERMUTED: Final = frozenset({"llama", "mistral", "gemma", "gemma2"})
_LEFT: Final = frozenset({"qwen2", "qwen3", "phi3"})
_OTHER_ORDER: Final = "rows in torchtune's order"


def recognizes(path: Path, options: ReadOptions) -> bool:
    """Say whether a file holds factors under torchtune's names."""
    tensors = tensors_at(path, options)
    return tensors is not None and any(_KEY.fullmatch(key) for key in tensors.infos)


def find(path: Path, options: ReadOptions) -> list[AdapterRef]:
    """Return the file, where it is one."""
    return [AdapterRef(path, NAME, label_of(path))] if recognizes(path, options) else []


def read(path: Path, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG001 - unnamed
    """Read an ``adapter_model.pt``.

    Raises
    ------
    MalformedFileError
        A module has one factor only, its factors do not fit together, or the heads do not divide
        its rows.
    """
    tensors = open_tensors(path, allow_pickle=options.allow_pickle)
    factors, beside = factors_named(tensors, _KEY, "lora_a")
    norms = {match["module"]: key for key in beside if (match := _NORM.fullmatch(key))}
    order = _order(path, options)
    pairs = [
        _pair(tensors, plain, norms.get(plain.module), order)
        for plain in complete_pairs(
            path, factors, lambda m, role: f"{m}.lora_{role.lower()}.weight"
        )
    ]
    alpha, config = _alpha(path)
    marked = [pair.module for pair in pairs if pair.variant == _OTHER_ORDER]
    return assembled(
        path,
        NAME,
        tensors,
        pairs,
        stated_alpha(alpha),
        options=options,
        missing="the file states no alpha, nor does a configuration of the run beside it",
        findings=(
            *_order_finding(marked),
            *beside_finding("not analyzed", [key for key in beside if key not in norms.values()]),
        ),
        files=() if config is None else (config,),
    )


def _alpha(path: Path) -> tuple[float | None, Path | None]:
    """Return the alpha that the exported config or the run's own states, and which file did."""
    exported = path.with_name(CONFIG_NAME)
    if (stated := finite_number(_json(exported).get("lora_alpha"))) is not None:
        return stated, exported
    for folder in (path.parent, path.absolute().parent.parent):
        run = folder / "torchtune_config.yaml"
        if (alpha := number(plain_values(run).get("lora_alpha"))) is not None:
            return alpha, run
    return None, None


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path) if path.is_file() else {}
    except InputError:
        return {}


@dataclass(frozen=True, slots=True)
class _Order:
    """What is known of the order of q and k rows: heads of each where they are to be turned."""

    left: bool = False
    heads: dict[str, int] = field(default_factory=dict)


def _order(path: Path, options: ReadOptions) -> _Order:
    base = _json(path.with_name("config.json"))
    kind = base.get("model_type")
    if kind in _LEFT:
        return _Order(left=True)
    if options.heads is not None:
        return _Order(heads=dict(zip("qk", options.heads, strict=True)))
    queries = base.get("num_attention_heads")
    keys = base.get("num_key_value_heads", queries)
    if kind in _PERMUTED and isinstance(queries, int) and isinstance(keys, int):
        return _Order(heads={"q": queries, "k": keys})
    return _Order()


def _pair(tensors: NamedTensors, plain: StoredPair, norm: str | None, order: _Order) -> StoredPair:
    pair = replace(plain, module=_base_module(plain.module))
    if norm is not None:
        pair = replace(pair, variant=DORA, magnitude=tensor(norm))
    rotated = _ROTATED.fullmatch(plain.module)
    if rotated is None or order.left:
        return pair
    if not order.heads:
        return replace(pair, variant=_OTHER_ORDER, magnitude=None)
    heads, shape = order.heads[rotated["part"]], tensors.infos[plain.b.name].shape
    if len(shape) != 2 or heads < 1 or shape[0] % (2 * heads):
        message = (
            f"{tensors.path}: '{plain.b.name}' has shape {shape}; its rows do not divide into "
            f"{heads} heads of two halves."
        )
        raise MalformedFileError(message)
    if pair.magnitude is not None:
        pair = replace(pair, magnitude=vector_in_halves(pair.magnitude, shape[0], heads))
    return replace(pair, b=in_halves(plain.b, *shape, heads))


def _base_module(module: str) -> str:
    """Return the name of a module in Hugging Face's models; unknown ones as they are."""
    if match := _LAYER.fullmatch(module):
        part = _PARTS.get(match["part"])
        return module if part is None else f"model.layers.{match['index']}.{part}"
    return _OUTSIDE.get(module, module)


def _order_finding(marked: list[str]) -> list[str]:
    if not marked:
        return []
    return [
        f"Output side not to be used: the rows of B of {len(marked)} q and k modules (first: "
        f"'{marked[0]}') may be in Meta's order, and neither heads= (command line: --heads 32,8) "
        "nor a config.json of the base beside the file tells. Singular values and the input side "
        "do not depend on it."
    ]
