"""Adapters of litgpt: ``lit_model.pth.lora``, a torch pickle of ``{"model": {...}}``.

Reference: litgpt 0.5, ``lora.py``. Of the fused ``attn.qkv``, A is ``(r·g, d_in)`` for g enabled
of q, k and v, B their rows one below the other; with grouped queries those of k and v are fewer.
``hyperparameters.yaml`` next to the file states alpha and what is enabled, ``model_config.yaml``
the heads.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import UnsupportedMethodError
from lora_analysis.formats.build import AdapterParts, stated_alpha
from lora_analysis.formats.factors import StoredPair
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, StoredModules
from lora_analysis.formats.merged import enable_lora_error, is_merged, merged_findings, split
from lora_analysis.formats.sources import setting_count, setting_number, trainer_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

_KEY: Final = KeyPattern(re.compile(r"(?:model\.)?(?P<module>.+)\.lora_(?P<role>[AB])"))
_OWN: Final = re.compile(
    r"(model\.)?transformer\.h\.\d+\.(attn\.(qkv|attn)|mlp\.fc(_[12])?)\.lora_[AB]"
)
_BLOCK: Final = re.compile(r"transformer\.h\.(?P<index>\d+)\.(?P<part>.+)")
# The names of the same modules in models with a gated MLP of three matrices, in Hugging Face's.
_LLAMA_PARTS: Final = {
    **{f"attn.qkv.{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
_GATED: Final = frozenset({"LLaMAMLP", "GemmaMLP"})


def _is_marked(tensors: NamedTensors) -> bool:
    return any(_OWN.fullmatch(key) for key in tensors.infos)


def _complete(stored: StoredModules) -> AdapterParts:
    path, tensors = stored.path, stored.tensors
    settings = [path.with_name(name) for name in ("hyperparameters.yaml", "model_config.yaml")]
    run, model = map(trainer_settings, settings)
    pairs: list[StoredPair] = []
    fused = 0
    for plain in stored.pairs():
        if plain.module.endswith(".attn.attn"):
            message = (
                f"{path}: '{plain.module}' is of a litgpt before 0.5, which kept q, k and v of "
                "each group of heads together; which rows B has is not known. Convert the "
                "adapter with the version that wrote it."
            )
            raise UnsupportedMethodError(message)
        if not plain.module.endswith(".attn.qkv"):
            pairs.append(plain)
            continue
        a, b = plain.a.name, plain.b.name
        enabled = stored.options.enable_lora or _enabled_parts(tensors, a, b, run)
        if enabled is None:
            if is_merged(tensors, a, b):
                raise enable_lora_error(tensors, plain.module, a, b)
            message = (
                f"{tensors.file_of(a)}: '{plain.module}' adapts one of q, k and v, and it is "
                "unknown which. Pass enable_lora= (command line: --enable-lora 1,0,0), or put "
                "litgpt's hyperparameters.yaml next to the file."
            )
            raise UnsupportedMethodError(message)
        widths = _widths(tensors, plain, enabled, model, stored.options)
        pairs += split(tensors, plain.module, a, b, enabled, widths=widths)
        fused += 1
    if model.get("mlp_class_name") in _GATED:
        pairs = [_rename_module(pair) for pair in pairs]
    base_model = run.get("checkpoint_dir")
    return AdapterParts(
        pairs=pairs,
        scale=stated_alpha(setting_number(run.get("lora_alpha"))),
        reason="there is no hyperparameters.yaml with lora_alpha next to the file",
        findings=(*merged_findings(fused, interleaved=False), *stored.unanalyzed_findings()),
        files=tuple(file for file in settings if file.is_file()),
        base_model=base_model if isinstance(base_model, str) else None,
    )


FORMAT: Final = KeyScheme("litgpt", (_KEY,), _complete, is_marked=_is_marked)


def _rename_module(pair: StoredPair) -> StoredPair:
    """Return a pair under the name that Llama's own model gives its module."""
    match = _BLOCK.fullmatch(pair.module)
    part = match and _LLAMA_PARTS.get(match["part"])
    if not match or not part:
        return pair
    return StoredPair(f"model.layers.{match['index']}.{part}", pair.a, pair.b)


def _enabled_parts(
    tensors: NamedTensors, a: str, b: str, run: Mapping[str, Any]
) -> tuple[bool, ...] | None:
    """Return the flags of q, k and v in the run's settings; all three if there are three groups."""
    flags = [run.get(f"lora_{part}") for part in ("query", "key", "value")]
    if all(isinstance(enabled, bool) for enabled in flags):
        return tuple(map(bool, flags))
    shapes = tensors.infos[a].shape, tensors.infos[b].shape
    three = is_merged(tensors, a, b) and shapes[0][0] == 3 * shapes[1][1]
    return (True, True, True) if three else None


def _widths(
    tensors: NamedTensors,
    plain: StoredPair,
    enabled: Sequence[bool],
    model: Mapping[str, Any],
    options: ReadOptions,
) -> tuple[int, ...] | None:
    """Return the rows of q, k and v; None if those enabled have equally many.

    Raises
    ------
    UnsupportedMethodError
        Neither the model's configuration nor the caller says how many heads each has.
    """
    if len(enabled) != 3 or sum(enabled) == 1 or not enabled[0]:
        return None
    rows = tensors.infos[plain.b.name].shape[0]
    heads = setting_count(model.get("n_head"))
    groups = setting_count(model.get("n_query_groups")) or heads
    if options.heads is not None:
        heads, groups = options.heads
    if heads is None or groups is None:
        message = (
            f"{tensors.path}: B of '{plain.module}' has {rows} rows of q and of k or v, and "
            "it is unknown how many belong to which. Put litgpt's model_config.yaml next to the "
            "file, or pass heads= (command line: --heads 32,4)."
        )
        raise UnsupportedMethodError(message)
    of_each = (heads, groups, groups)
    size = rows // sum(n for n, on in zip(of_each, enabled, strict=True) if on)
    return tuple(n * size for n in of_each)
