"""Adapters that torchtune saved in its own names: ``layers.0.attn.q_proj.lora_a.weight``.

Reference: torchtune 0.6, ``modules/peft/lora.py``, ``models/convert_weights.py``. A is
``(r, d_in)``, B ``(d_out, r)``, DoRA's norms ``magnitude``. The file is a torch pickle
(``adapter_model.pt``) and states no alpha; the run's configuration next to it does. For models that
come from Meta's order of q and k rows (Llama, Mistral, Gemma) torchtune keeps that order in its own
files; it is turned to that of Hugging Face where the number of heads is known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from lora_analysis.adapter import TORCHTUNE_ROWS
from lora_analysis.errors import MalformedFileError
from lora_analysis.formats.build import AdapterParts, stated_alpha
from lora_analysis.formats.factors import StoredPair, finite_number
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, StoredModules
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.sources import config_at, setting_number, trainer_settings
from lora_analysis.formats.stored import deinterleave_heads, tensor

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.finding import Finding
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

_KEYS: Final = (
    KeyPattern(re.compile(r"(?P<module>.+)\.(?P<role>lora_a|lora_b)\.weight")),
    KeyPattern(re.compile(r"(?P<module>.+)\.(?P<role>magnitude)")),
)
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


def _complete(stored: StoredModules) -> AdapterParts:
    order = _order(stored.path, stored.options)
    norms = {module: keys.get("magnitude") for module, keys in stored.modules.items()}
    pairs = [_pair(stored.tensors, plain, norms[plain.module], order) for plain in stored.pairs()]
    alpha, config = _alpha(stored.path)
    findings: list[Finding | str] = [*stored.unanalyzed_findings()]
    if unordered := [pair.module for pair in pairs if pair.variant == TORCHTUNE_ROWS]:
        text = (
            f"Output side not to be used: the rows of B of {len(unordered)} q and k modules "
            f"(first: '{unordered[0]}') may be in Meta's order, and neither heads= (command line: "
            "--heads 32,8) nor a config.json of the base next to the file decides. Singular "
            "values and the input side do not depend on it."
        )
        findings.insert(0, text)
    return AdapterParts(
        pairs=pairs,
        scale=stated_alpha(alpha),
        reason="neither the file nor a configuration of the run next to it states alpha",
        findings=findings,
        files=() if config is None else (config,),
    )


FORMAT: Final = KeyScheme("torchtune", _KEYS, _complete)


def _alpha(path: Path) -> tuple[float | None, Path | None]:
    """Return the alpha of the exported config or of the run's own, and the path of that file."""
    exported = path.with_name(CONFIG_NAME)
    if (alpha := finite_number(config_at(exported).get("lora_alpha"))) is not None:
        return alpha, exported
    for folder in (path.parent, path.absolute().parent.parent):
        run = folder / "torchtune_config.yaml"
        if (alpha := setting_number(trainer_settings(run).get("lora_alpha"))) is not None:
            return alpha, run
    return None, None


@dataclass(frozen=True, slots=True)
class _Order:
    """Order of the rows of q and k: as in Hugging Face's model, or by head in Meta's order."""

    is_plain: bool = False
    heads: dict[str, int] = field(default_factory=dict)


def _order(path: Path, options: ReadOptions) -> _Order:
    base = config_at(path.with_name("config.json"))
    kind = base.get("model_type")
    if kind in _LEFT:
        return _Order(is_plain=True)
    if options.heads is not None:
        return _Order(heads=dict(zip("qk", options.heads, strict=True)))
    queries = base.get("num_attention_heads")
    keys = base.get("num_key_value_heads", queries)
    if kind in _PERMUTED and isinstance(queries, int) and isinstance(keys, int):
        return _Order(heads={"q": queries, "k": keys})
    return _Order()


def _pair(tensors: NamedTensors, plain: StoredPair, norm: str | None, order: _Order) -> StoredPair:
    module = _OUTSIDE.get(plain.module, plain.module)
    if match := _LAYER.fullmatch(plain.module):
        part = _PARTS.get(match["part"])
        module = module if part is None else f"model.layers.{match['index']}.{part}"
    pair = replace(plain, module=module)
    if norm is not None:
        pair = replace(pair, variant=DORA, magnitude=tensor(norm))
    rotated = _ROTATED.fullmatch(plain.module)
    if rotated is None or order.is_plain:
        return pair
    if not order.heads:
        return replace(pair, variant=TORCHTUNE_ROWS, magnitude=None)
    heads, shape = order.heads[rotated["part"]], tensors.infos[plain.b.name].shape
    if len(shape) != 2 or heads < 1 or shape[0] % (2 * heads):
        message = (
            f"{tensors.path}: '{plain.b.name}' has shape {shape}; its rows do not divide into "
            f"{heads} heads of two halves."
        )
        raise MalformedFileError(message)
    if pair.magnitude is not None:
        pair = replace(pair, magnitude=deinterleave_heads(pair.magnitude, shape[:1], heads))
    return replace(pair, b=deinterleave_heads(plain.b, shape, heads))
