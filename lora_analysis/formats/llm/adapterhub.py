"""Adapters of AdapterHub's ``adapters``: ``<module>.loras.<name>.lora_A``, with a nested config.

Reference: adapters 1.3, ``methods/lora.py``. The folder holds ``pytorch_adapter.bin`` or
``adapter.safetensors``, and an ``adapter_config.json`` of the same name as PEFT's whose ``config``
says ``architecture``. A fused ``c_attn`` is adapted as loralib's ``MergedLinear``, its enabled
blocks in ``attn_matrices``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import UnsupportedMethodError
from lora_analysis.formats.build import AdapterParts, stated_alpha
from lora_analysis.formats.factors import StoredPair, finite_number
from lora_analysis.formats.fused_parts import FUSED_PARTS
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, StoredModules
from lora_analysis.formats.merged import merged_findings, split_fused
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.stored import tensor

if TYPE_CHECKING:
    from lora_analysis.formats.sources import AdapterFiles

_LORAS: Final = r"(?P<module>.+)\.loras\.(?P<adapter>[^.]+)\."
_KEYS: Final = (
    KeyPattern(re.compile(rf"{_LORAS}(?P<role>lora_A|lora_B)")),
    KeyPattern(re.compile(rf"{_LORAS}(?P<role>m)\.weight")),
)
_GATE: Final = re.compile(rf"{_LORAS}gate\..+")


def _is_config(config: Mapping[str, Any]) -> bool:
    """Return True unless the configuration is PEFT's, whose file has the same name."""
    return isinstance(config.get("config"), dict) and "peft_type" not in config


def _check(files: AdapterFiles) -> None:
    config = (files.config or {}).get("config", {})
    architecture = config.get("architecture", "lora")
    reasons = (
        (architecture != "lora", f"architecture {architecture!r}"),
        (config.get("composition_mode") == "scale", "composition_mode 'scale' (IA3)"),
        (config.get("vera_d") is not None or config.get("vera_b") is not None, "VeRA"),
        (bool(config.get("use_gating")), "use_gating: the update depends on the input"),
    )
    for applies, what in reasons:
        if applies:
            message = f"{files.config_path}: {what!s:.80}; only plain LoRA, s·B·A, is read."
            raise UnsupportedMethodError(message)


def _complete(stored: StoredModules) -> AdapterParts:
    chosen = {_KEYS[0].adapter(keys["A"]) for keys in stored.modules.values() if "A" in keys}
    gates = (match for key in stored.others if (match := _GATE.fullmatch(key)))
    if gate := next((match[0] for match in gates if match["adapter"] in chosen), None):
        message = f"{stored.path}: '{gate}' gates the update by the input; it is not read."
        raise UnsupportedMethodError(message)
    document = stored.files.config or {}
    config = document.get("config", {})
    matrices, enabled = config.get("attn_matrices"), stored.options.enable_lora
    if enabled is None and isinstance(matrices, list):
        enabled = tuple(part in matrices for part in "qkv")
    pairs: list[StoredPair] = []
    fused: dict[str, Any] = {}
    for plain in stored.pairs():
        module = plain.module
        blocks = split_fused(stored.tensors, module, plain.a.name, plain.b.name, enabled)
        if blocks is not None:
            pairs += blocks[0]
            fused[module] = blocks[1]
        elif norms := stored.modules[module].get("magnitude"):
            pairs.append(replace(plain, variant=DORA, magnitude=tensor(norms)))
        else:
            pairs.append(plain)
    base_model, config_path = document.get("model_name"), stored.files.config_path
    return AdapterParts(
        pairs=pairs,
        scale=stated_alpha(finite_number(config.get("alpha"))),
        reason=f"there is no {CONFIG_NAME} with config.alpha next to the file",
        findings=(*merged_findings(len(fused), interleaved=False), *stored.unanalyzed_findings()),
        files=() if config_path is None else (config_path,),
        config={FUSED_PARTS: fused} if fused else None,
        base_model=base_model if isinstance(base_model, str) else None,
    )


FORMAT: Final = KeyScheme(
    "adapterhub",
    _KEYS,
    _complete,
    weights=("adapter.safetensors", "pytorch_adapter.bin"),
    config=CONFIG_NAME,
    is_config=_is_config,
    check=_check,
)
