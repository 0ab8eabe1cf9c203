"""Adapters of NeMo and Megatron-Bridge: ``linear_in.weight`` and ``linear_out.weight``.

Reference: NeMo, ``lora_converter.py``; Megatron-Bridge, ``peft/lora.py`` and ``canonical_lora.py``.
A is ``(r, d_in)``, B ``(d_out, r)``. In the canonical layout q, k, v, gate and up have factors of
their own. Else the fused ``linear_qkv`` has one pair, the rows of B group by group of heads
(q … q, k, v); they are taken apart where the number of heads is known.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import MalformedFileError, UnsupportedMethodError
from lora_analysis.formats.build import AdapterParts, stated_alpha
from lora_analysis.formats.factors import StoredPair
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, StoredModules
from lora_analysis.formats.sources import (
    AdapterFiles,
    refuse_rank_part,
    setting_count,
    setting_number,
    trainer_settings,
)

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.finding import Finding
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

_KEY: Final = KeyPattern(re.compile(r"(?P<module>.+)\.(?P<role>linear_in|linear_out)\.weight"))
_ADAPTER: Final = re.compile(r"(^|.*\.)(adapter|adapter_layer)\..*")
_LAYER: Final = re.compile(r"(?:.*\.)?layers\.(?P<index>\d+)\.(?P<part>.+)")
_QKV: Final = "self_attn.qkv"
# What stands behind the layer's number → the module in Hugging Face's Llama-like models.
_PARTS: Final = {
    "self_attention.adapter_layer.lora_kqv_adapter": _QKV,
    "self_attention.linear_qkv.adapter": _QKV,
    **{
        f"self_attention.adapter_layer.lora_unfused_kqv_adapter.{p}_adapter": f"self_attn.{p}_proj"
        for p in "qkv"
    },
    **{f"self_attention.linear_qkv.adapter.adapter_{p}": f"self_attn.{p}_proj" for p in "qkv"},
    "self_attention.adapter_layer.lora_dense_attention_adapter": "self_attn.o_proj",
    "self_attention.linear_proj.adapter": "self_attn.o_proj",
    **{
        f"mlp.adapter_layer.lora_unfused_hto4h_adapter.{p}_adapter": f"mlp.{p}_proj"
        for p in ("gate", "up")
    },
    **{f"mlp.linear_fc1.adapter.adapter_{p}": f"mlp.{p}_proj" for p in ("gate", "up")},
    "mlp.adapter_layer.lora_hto4h_adapter": "mlp.linear_fc1",
    "mlp.linear_fc1.adapter": "mlp.linear_fc1",
    "mlp.adapter_layer.lora_4htoh_adapter": "mlp.down_proj",
    "mlp.linear_fc2.adapter": "mlp.down_proj",
}
_FC1: Final = "mlp.linear_fc1"
_CONFIGS: Final = ("model_config.yaml", "run_config.yaml")


def _is_archive(path: Path) -> bool:
    """Return True if a file is a ``.nemo``: a tar archive, plain or compressed."""
    if path.suffix != ".nemo" or not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(262)
    return start[257:262] == b"ustar" or start[:2] == b"\x1f\x8b"


def _is_marked(tensors: NamedTensors) -> bool:
    return any(_KEY.match(key) and _ADAPTER.fullmatch(key) for key in tensors.infos)


def _check(files: AdapterFiles) -> None:
    if _is_archive(files.weights):
        message = (
            f"{files.weights}: a .nemo archive. Unpack it (tar xf) and read the model_weights.ckpt "
            "in it; of several mp_rank_* folders, export the adapter to PEFT first."
        )
        raise UnsupportedMethodError(message)
    refuse_rank_part(files.weights)


def _complete(stored: StoredModules) -> AdapterParts:
    path, tensors = stored.path, stored.tensors
    pairs: list[StoredPair] = []
    for plain in stored.pairs():
        match = _LAYER.fullmatch(plain.module)
        part = match and _PARTS.get(match["part"])
        module = f"model.layers.{match['index']}.{part}" if match and part else plain.module
        if module.endswith(_QKV):
            pairs += _split_qkv(tensors, plain, module.removesuffix("qkv"), stored.options)
        elif module.endswith(_FC1) and (width := _gate_width(path, tensors, plain)):
            prefix = module.removesuffix(_FC1)
            for name, rows in (("gate", slice(0, width)), ("up", slice(width, 2 * width))):
                pairs.append(StoredPair(f"{prefix}mlp.{name}_proj", plain.a, plain.b.rows(rows)))
        else:
            pairs.append(StoredPair(module, plain.a, plain.b))
    alpha, config = _alpha(path)
    findings: list[Finding | str] = [*stored.unanalyzed_findings()]
    if fused := sum(pair.module.endswith(".linear_fc1") for pair in pairs):
        text = (
            f"{fused} modules linear_fc1 are kept whole: the rows of B are Megatron's own, gate "
            "above up in every tensor-parallel part. A model_config.yaml next to the file that "
            "states ffn_hidden_size and tensor_model_parallel_size 1 lets them be split."
        )
        findings.insert(0, text)
    return AdapterParts(
        pairs=pairs,
        scale=stated_alpha(alpha),
        reason=(
            "there is no model_config.yaml or run_config.yaml with a single alpha next to the file"
        ),
        findings=findings,
        files=() if config is None else (config,),
    )


class _NeMo(KeyScheme):
    def locate(self, path: Path, options: ReadOptions) -> AdapterFiles | None:
        """Return the file, or an archive of such a file, which is refused when it is read."""
        return AdapterFiles(path, path) if _is_archive(path) else super().locate(path, options)


FORMAT: Final = _NeMo("nemo", (_KEY,), _complete, is_marked=_is_marked, check=_check)


def _alpha(path: Path) -> tuple[float | None, Path | None]:
    for name in _CONFIGS:
        config = path.with_name(name)
        if (alpha := setting_number(trainer_settings(config).get("alpha"))) is not None:
            return alpha, config
    return None, None


def _split_qkv(
    tensors: NamedTensors, plain: StoredPair, prefix: str, options: ReadOptions
) -> list[StoredPair]:
    """Return the pairs of q, k and v, which share A; the rows of B are in groups of heads."""
    shape = tensors.infos[plain.b.name].shape
    if options.heads is None:
        message = (
            f"{tensors.path}: '{plain.module}' adapts the fused q, k, v, whose rows {shape} are "
            "interleaved by groups of heads, and the number of heads is unknown. Pass heads= "
            "(command line: --heads 32,8); or export the adapter to PEFT."
        )
        raise UnsupportedMethodError(message)
    heads, groups = options.heads
    rows, rank = shape if len(shape) == 2 else (0, 0)
    if heads % groups or not rows or rows % (heads + 2 * groups):
        message = (
            f"{tensors.path}: '{plain.b.name}' has shape {shape}, which {heads} heads in {groups} "
            "groups do not divide."
        )
        raise MalformedFileError(message)
    size, queries = rows // (heads + 2 * groups), heads // groups
    by_group = plain.b.reshape(groups, (queries + 2) * size, rank)
    ends = (0, queries * size, (queries + 1) * size, (queries + 2) * size)
    return [
        StoredPair(
            f"{prefix}{part}_proj",
            plain.a,
            by_group.columns(slice(start, stop)).reshape(groups * (stop - start), rank),
        )
        for part, start, stop in zip("qkv", ends[:-1], ends[1:], strict=True)
    ]


def _gate_width(path: Path, tensors: NamedTensors, plain: StoredPair) -> int | None:
    """Return the number of the gate's rows in a fused gate and up, None if it is unknown.

    If a configuration says that the tensors were not split over devices, the gate is above up;
    that there are both follows from rows twice the width that the configuration states.
    """
    rows = tensors.infos[plain.b.name].shape[0]
    for name in _CONFIGS:
        settings = trainer_settings(path.with_name(name))
        width = setting_count(settings.get("ffn_hidden_size"))
        whole = setting_count(settings.get("tensor_model_parallel_size")) == 1
        if whole and width is not None and rows == 2 * width:
            return width
    return None
