"""Adapters of OpenDelta: ``<module>.lora.lora_A`` in ``pytorch_model.bin``, with ``config.json``.

Reference: OpenDelta 0.3, ``delta_models/lora.py``: A ``(r, d_in)``, B ``(d_out, r)``,
``s = lora_alpha/lora_r``, both in the configuration.
"""

from __future__ import annotations

import re
from typing import Final

from lora_analysis.formats.build import AdapterParts, stated_alpha
from lora_analysis.formats.factors import finite_number
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, StoredModules

_CONFIG_NAME: Final = "config.json"
_KEY: Final = KeyPattern(re.compile(r"(?P<module>.+)\.lora\.lora_(?P<role>[AB])"))


def _complete(stored: StoredModules) -> AdapterParts:
    config, path = stored.files.config or {}, stored.files.config_path
    base_model = config.get("backbone_checkpoint_name")
    return AdapterParts(
        pairs=stored.pairs(),
        scale=stated_alpha(finite_number(config.get("lora_alpha"))),
        reason=f"there is no {_CONFIG_NAME} with lora_alpha next to the file",
        findings=stored.unanalyzed_findings(),
        files=() if path is None else (path,),
        base_model=base_model if isinstance(base_model, str) else None,
    )


FORMAT: Final = KeyScheme(
    "opendelta",
    (_KEY,),
    _complete,
    weights=("pytorch_model.bin",),
    config=_CONFIG_NAME,
    is_config=lambda config: config.get("delta_type") == "lora" or "lora_alpha" in config,
)
