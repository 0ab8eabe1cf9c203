"""Adapters of litgpt: ``lit_model.pth.lora``, a torch pickle of ``{"model": {...}}``.

Reference: litgpt 0.5, ``lora.py``. Of the fused ``attn.qkv``, A is ``(r·g, d_in)`` for g enabled
of q, k and v, B their rows one below the other; with grouped queries those of k and v are fewer.
``hyperparameters.yaml`` beside the file states alpha and what is enabled, ``model_config.yaml``
the heads.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import UnsupportedMethodError
from lora_analysis.formats.assembly import (
    assembled,
    beside_finding,
    factors_named,
    stated_alpha,
)
from lora_analysis.formats.factors import (
    StoredPair,
    complete_pairs,
)
from lora_analysis.formats.merged import enable_needed, is_merged, merged_finding, split
from lora_analysis.formats.plain_yaml import count, number, plain_values
from lora_analysis.formats.sources import AdapterRef, ReadOptions, label_of, tensors_at
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.storage.tensors import NamedTensors

NAME: Final = "litgpt"

_KEY: Final = re.compile(r"(?:model\.)?(?P<module>.+)\.lora_(?P<role>[AB])")
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


def recognizes(path: Path, options: ReadOptions) -> bool:
    """Say whether a file holds factors of litgpt's modules."""
    tensors = tensors_at(path, options)
    return tensors is not None and any(_OWN.fullmatch(key) for key in tensors.infos)


def find(path: Path, options: ReadOptions) -> list[AdapterRef]:
    """Return the file, where it is one."""
    return [AdapterRef(path, NAME, label_of(path))] if recognizes(path, options) else []


def read(path: Path, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG001 - unnamed
    """Read a ``lit_model.pth.lora``.

    Raises
    ------
    MalformedFileError
        A module has one factor only, or its factors do not fit together.
    UnsupportedMethodError
        Nothing says which of q, k and v were adapted, or how many rows each has.
    InputError
        ``enable_lora`` contradicts the shapes.
    """
    tensors = open_tensors(path, allow_pickle=options.allow_pickle)
    factors, others = factors_named(tensors, _KEY, "A")
    run = plain_values(path.with_name("hyperparameters.yaml"))
    model = plain_values(path.with_name("model_config.yaml"))
    pairs: list[StoredPair] = []
    fused = 0
    for plain in complete_pairs(path, factors, lambda module, role: f"{module}.lora_{role}"):
        if plain.module.endswith(".attn.attn"):
            message = (
                f"{path}: '{plain.module}' is of a litgpt before 0.5, which kept q, k and v of "
                "each group of heads together; which rows B has is not known. Convert the "
                "adapter with the version that wrote it."
            )
            raise UnsupportedMethodError(message)
        if plain.module.endswith(".attn.qkv"):
            pairs += _qkv(tensors, plain, run, model, options)
            fused += 1
        else:
            pairs.append(plain)
    if model.get("mlp_class_name") in _GATED:
        pairs = [_renamed(pair) for pair in pairs]
    alpha = number(run.get("lora_alpha"))
    beside = [path.with_name(n) for n in ("hyperparameters.yaml", "model_config.yaml")]
    return assembled(
        path,
        NAME,
        tensors,
        pairs,
        stated_alpha(alpha),
        options=options,
        missing="no hyperparameters.yaml with lora_alpha lies beside the file",
        findings=(
            *merged_finding(fused, interleaved=False),
            *beside_finding("not analyzed", others),
        ),
        files=tuple(one for one in beside if one.is_file()),
        base_model=run.get("checkpoint_dir"),
    )


def _renamed(pair: StoredPair) -> StoredPair:
    match = _BLOCK.fullmatch(pair.module)
    part = match and _LLAMA_PARTS.get(match["part"])
    if not match or not part:
        return pair
    return StoredPair(f"model.layers.{match['index']}.{part}", pair.a, pair.b)


def _qkv(
    tensors: NamedTensors,
    plain: StoredPair,
    run: Mapping[str, str],
    model: Mapping[str, str],
    options: ReadOptions,
) -> list[StoredPair]:
    a, b = plain.a.name, plain.b.name
    enabled = options.enable_lora or _enabled(tensors, a, b, run)
    if enabled is None:
        if is_merged(tensors, a, b):
            raise enable_needed(tensors, plain.module, a, b)
        message = (
            f"{tensors.file_of(a)}: '{plain.module}' adapts one of q, k and v, and nothing says "
            "which. Pass enable_lora= (command line: --enable-lora 1,0,0), or put litgpt's "
            "hyperparameters.yaml beside the file."
        )
        raise UnsupportedMethodError(message)
    widths = _widths(tensors, plain, enabled, model, options)
    return split(tensors, plain.module, a, b, enabled, widths=widths)


def _enabled(
    tensors: NamedTensors, a: str, b: str, run: Mapping[str, str]
) -> tuple[bool, ...] | None:
    """Return which of q, k and v the run's settings name, or all where there are three groups."""
    stated = [run.get(f"lora_{part}") for part in ("query", "key", "value")]
    if all(one in ("true", "false") for one in stated):
        return tuple(one == "true" for one in stated)
    shapes = tensors.infos[a].shape, tensors.infos[b].shape
    three = is_merged(tensors, a, b) and shapes[0][0] == 3 * shapes[1][1]
    return (True, True, True) if three else None


def _widths(
    tensors: NamedTensors,
    plain: StoredPair,
    enabled: Sequence[bool],
    model: Mapping[str, str],
    options: ReadOptions,
) -> tuple[int, ...] | None:
    """Return the rows of q, k and v; None where those enabled have equally many.

    Raises
    ------
    UnsupportedMethodError
        Neither the model's configuration nor the caller says how many heads each has.
    """
    if len(enabled) != 3 or sum(enabled) == 1 or not enabled[0]:
        return None
    rows = tensors.infos[plain.b.name].shape[0]
    heads = count(model.get("n_head"))
    groups = count(model.get("n_query_groups")) or heads
    if options.heads is not None:
        heads, groups = options.heads
    if heads is None or groups is None:
        message = (
            f"{tensors.path}: B of '{plain.module}' has {rows} rows of q and of k or v, and "
            "nothing says how many are whose. Put litgpt's model_config.yaml beside the file, or "
            "pass heads= (command line: --heads 32,4)."
        )
        raise UnsupportedMethodError(message)
    of_each = (heads, groups, groups)
    size = rows // sum(n for n, on in zip(of_each, enabled, strict=True) if on)
    return tuple(n * size for n in of_each)
