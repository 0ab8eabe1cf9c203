"""Fused tensors of several modules: the rows of q, k, v, gate and up, and their layout.

Most families put blocks after each other (q|k|v, gate|up). GPT-NeoX, BLOOM, old Falcon and
DeBERTa interleave per head (q, k, v of head 0, then of head 1); new Falcon and InternLM2 per group
of heads that share k and v; gpt-oss row by row. The wrong layout gives plausible numbers of wrong
rows, so an unknown family is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_QKV: Final = ("q", "k", "v")
_GATE_UP: Final = ("gate", "up")
_QKV_MLP: Final = (*_QKV, "mlp")

# Module of one part → the fused modules that may contain it, and the part that it is.
_PART_NAMES: Final = {
    **{f"{p}_proj": (("qkv_proj", "W_pack", "query_key_value", "c_attn"), p) for p in _QKV},
    **{f"{p}_proj": (("gate_up_proj",), p) for p in _GATE_UP},
    **{f"to_{p}": (("to_qkv", "to_qkv_mlp"), p) for p in _QKV},
    **{f"add_{p}_proj": (("add_qkv_proj",), p) for p in _QKV},
}
# Fused module → the modules that it may be joined from.
_JOINED: Final = {
    "qkv_proj": tuple(f"{p}_proj" for p in _QKV),
    "W_pack": tuple(f"{p}_proj" for p in _QKV),
    "gate_up_proj": tuple(f"{p}_proj" for p in _GATE_UP),
    "to_qkv": tuple(f"to_{p}" for p in _QKV),
    "add_qkv_proj": tuple(f"add_{p}_proj" for p in _QKV),
}
_FUSED: Final = frozenset(
    {
        "qkv_proj", "W_pack", "query_key_value", "c_attn", "gate_up_proj", "to_qkv", "to_qkv_mlp",
        "add_qkv_proj", "Wqkv", "qkv", "wqkv", "in_proj", "attn_qkv", "self_attn", "attn",
    }
)  # fmt: skip
_OWN_PARTS: Final = {
    "q": "q", "k": "k", "v": "v", "query": "q", "key": "k", "value": "v", "gate": "gate",
    "up": "up", "mlp": "mlp",
}  # fmt: skip
_SINGLE_BLOCK: Final = re.compile(
    r"(.*single_transformer_blocks\.\d+)\.(proj_mlp|attn\.to_qkv_mlp)"
)

_PER_HEAD: Final = frozenset({"bloom", "deberta", "gpt_neox", "gpt_neox_japanese"})
_FALCON: Final = frozenset({"falcon", "RefinedWeb", "RefinedWebModel"})
_HEADS: Final = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS: Final = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """Configuration of a model that determines the layout of its fused tensors.

    ``blocks`` is True if the writer of the file has reordered interleaved rows into blocks, as the
    converter to GGUF does.
    """

    model_type: str | None
    config: Mapping[str, Any]
    blocks: bool = False

    def number(self, names: Sequence[str]) -> int | None:
        """Return the first number that the configuration states under one of the names."""
        nested = self.config.get("text_config")
        for source in (self.config, nested if isinstance(nested, Mapping) else {}):
            for name in names:
                value = source.get(name)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None


def fused_with_part(module: str) -> list[tuple[str, str]]:
    """Return fused modules that may contain a module, each with the part that it is."""
    path, _, last = module.rpartition(".")
    candidates = []
    if last in _PART_NAMES:
        names, part = _PART_NAMES[last]
        candidates = [(f"{path}.{name}" if path else name, part) for name in names]
    if last in _OWN_PARTS and path.rpartition(".")[2] in _FUSED:
        candidates.append((path, _OWN_PARTS[last]))
    if (match := _SINGLE_BLOCK.fullmatch(module)) and match[2] == "proj_mlp":
        candidates.append((f"{match[1]}.attn.to_qkv_mlp", "mlp"))
    if module == "norm_out.linear" or module.endswith(".norm_out.linear"):
        candidates.append((module.removesuffix("linear") + "shift_scale", "swapped"))
    return candidates


def parts_inside(module: str) -> list[tuple[str, str]]:
    """Return the modules that a fused module may contain, each with the part that it is."""
    path, _, last = module.rpartition(".")
    names = [(name, part) for name, (fused, part) in _PART_NAMES.items() if last in fused]
    parts = [(f"{path}.{name}" if path else name, part) for name, part in names]
    if (match := _SINGLE_BLOCK.fullmatch(module)) and last == "to_qkv_mlp":
        parts.append((f"{match[1]}.proj_mlp", "mlp"))
    return parts


def parts_of_fused(module: str) -> list[str]:
    """Return the modules whose rows, one after the other, make a fused module; or none."""
    path, _, last = module.rpartition(".")
    if (match := _SINGLE_BLOCK.fullmatch(module)) and last == "to_qkv_mlp":
        return [*(f"{path}.to_{p}" for p in _QKV), f"{match[1]}.proj_mlp"]
    return [f"{path}.{name}" if path else name for name in _JOINED.get(last, ())]


def rows_of_part(
    module: str, part: str, shape: tuple[int, int], height: int | None, layout: ModelLayout
) -> tuple[slice, ...] | str:
    """Return the rows of one part of a fused weight as runs, or the reason why they are not known.

    Parameters
    ----------
    module
        The fused module.
    part
        "q", "k", "v", "gate", "up", "mlp"; "all" for every row in the running model's order.
    shape
        Shape of the fused weight, ``(d_out, d_in)``.
    height
        Number of rows that the part must have, if an update determines it.
    layout
        Configuration of the model.
    """
    total, last = shape[0], module.rpartition(".")[2]
    if part == "all" and not isinstance(_grouping(last, 0, layout), tuple):
        return (slice(0, total),)
    if part == "swapped" or part in _GATE_UP:
        half = total // 2
        if total % 2:
            return f"its {total} rows have no half"
        if part == "swapped":  # diffusers has scale before shift, the authors shift before scale
            return (slice(half, total), slice(0, half))
        position = _GATE_UP.index(part)
        if layout.model_type == "gpt_oss":
            return tuple(slice(row, row + 1) for row in range(position, total, 2))
        return (slice(position * half, (position + 1) * half),)
    if last == "to_qkv_mlp":
        edges = [0, shape[1], 2 * shape[1], 3 * shape[1], total]
        position = _QKV_MLP.index(part)
        return (slice(edges[position], edges[position + 1]),)
    grouped = _grouping(last, total, layout)
    if isinstance(grouped, str):
        return grouped
    if grouped is not None:
        return _rows_in_groups(part, *grouped, blocks=layout.blocks)
    if part not in _QKV:
        return f"its rows are q, k and v, not {part}"
    widths = _widths(part, total, height, layout)
    if isinstance(widths, str):
        return widths
    position = _QKV.index(part)
    return (slice(sum(widths[:position]), sum(widths[: position + 1])),)


def _grouping(last: str, total: int, layout: ModelLayout) -> tuple[int, int, int] | str | None:
    """Return (groups, query heads in each, rows of a head); None for blocks; or the reason."""
    kind = layout.model_type
    if last == "qkv_proj" and kind == "codegen":
        return "CodeGen mixes the rows of its qkv_proj over devices, which is not undone"
    interleaved = (last in ("query_key_value", "in_proj") and kind in _PER_HEAD) or (
        last == "c_attn" and kind == "gpt_bigcode" and not layout.config.get("multi_query", True)
    )
    heads, groups = layout.number(_HEADS), layout.number(_KV_HEADS)
    per_group = 1
    if kind in _FALCON and last == "query_key_value":
        if layout.config.get("new_decoder_architecture"):
            interleaved, per_group = True, (heads or 0) // (groups or 1)
        elif layout.config.get("multi_query", True):
            return None
        interleaved = True
    elif last == "wqkv":
        interleaved, per_group = True, (heads or 0) // (groups or 1)
    elif last == "query_key_value" and not interleaved and kind != "chatglm":
        return f"how family '{kind}' orders the rows of query_key_value is not known"
    if not interleaved:
        return None
    if not heads or not per_group:
        return "its config.json states no number of heads, by which the rows interleave"
    count = heads // per_group * (per_group + 2)
    if total % count:
        return f"its {total} rows do not divide into {count} heads"
    return heads // per_group, per_group, total // count


def _rows_in_groups(
    part: str, groups: int, queries: int, head: int, *, blocks: bool
) -> tuple[slice, ...] | str:
    """Return the runs of a part: interleaved group by group, or in blocks of the writer."""
    size = (queries + 2) * head
    inside = {"q": (0, queries), "k": (queries, queries + 1), "v": (queries + 1, queries + 2)}
    if part == "all":
        starts = {"q": 0, "k": groups * queries * head, "v": groups * (queries + 1) * head}
        return tuple(
            slice(starts[name] + group * width, starts[name] + (group + 1) * width)
            for group in range(groups)
            for name, (low, high) in inside.items()
            for width in [(high - low) * head]
        )
    if part not in inside:
        return f"its rows are q, k and v, not {part}"
    low, high = inside[part]
    if blocks:
        return (slice(low * groups * head, high * groups * head),)
    return tuple(
        slice(group * size + low * head, group * size + high * head) for group in range(groups)
    )


def _widths(
    part: str, total: int, height: int | None, layout: ModelLayout
) -> tuple[int, int, int] | str:
    """Return the numbers of rows of q, k and v in blocks: k and v have as many, q has the rest."""
    heads = layout.number(_HEADS)
    shared = layout.number(_KV_HEADS) or heads
    if layout.config.get("multi_query") and layout.number(_KV_HEADS) is None:
        shared = 1
    if height is None:
        if heads is None or shared is None or total % (heads + 2 * shared):
            return "how its rows divide is not known without an update's shape"
        kv = total // (heads + 2 * shared) * shared
    else:
        kv = (total - height) // 2 if part == "q" else height
    query = total - 2 * kv
    if kv <= 0 or query < kv or (height is not None and height != (query if part == "q" else kv)):
        return f"no division of its {total} rows gives {part} {height} of them"
    return query, kv, kv
