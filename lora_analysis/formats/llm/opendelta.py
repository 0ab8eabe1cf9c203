"""Adapters of OpenDelta: ``<module>.lora.lora_A`` in ``pytorch_model.bin``, beside ``config.json``.

Reference: OpenDelta 0.3, ``delta_models/lora.py``: A ``(r, d_in)``, B ``(d_out, r)``,
``s = lora_alpha/lora_r``, both in the configuration.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError
from lora_analysis.formats.assembly import (
    assembled,
    beside_finding,
    factors_named,
    stated_alpha,
)
from lora_analysis.formats.factors import (
    complete_pairs,
    finite_number,
)
from lora_analysis.formats.sources import AdapterRef, ReadOptions, label_of, tensors_at
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.adapter import Adapter

NAME: Final = "opendelta"

_WEIGHTS_NAME: Final = "pytorch_model.bin"
_CONFIG_NAME: Final = "config.json"
_KEY: Final = re.compile(r"(?P<module>.+)\.lora\.lora_(?P<role>[AB])")


def recognizes(path: Path, options: ReadOptions) -> bool:
    """Say whether an adapter of OpenDelta lies here: by its config, or a file's names."""
    if path.is_dir():
        weights = path / _WEIGHTS_NAME
        return _config(path).get("delta_type") == "lora" and weights.is_file()
    tensors = tensors_at(path, options)
    return tensors is not None and any(map(_KEY.fullmatch, tensors.infos))


def _config(folder: Path) -> dict[str, Any]:
    try:
        path = folder / _CONFIG_NAME
        return read_json_object(path) if path.is_file() else {}
    except InputError:
        return {}


def find(path: Path, options: ReadOptions) -> list[AdapterRef]:
    """Return the adapter, where there is one."""
    return [AdapterRef(path, NAME, label_of(path))] if recognizes(path, options) else []


def read(path: Path, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG001 - unnamed
    """Read a folder or its weights.

    Raises
    ------
    MalformedFileError
        A module has one factor only, or its factors do not fit together.
    """
    weights = path / _WEIGHTS_NAME if path.is_dir() else path
    tensors = open_tensors(weights, allow_pickle=options.allow_pickle)
    factors, others = factors_named(tensors, _KEY, "A")
    pairs = complete_pairs(weights, factors, lambda m, role: f"{m}.lora.lora_{role}")
    config = _config(weights.parent)
    alpha, base = config.get("lora_alpha"), config.get("backbone_checkpoint_name")
    return assembled(
        path,
        NAME,
        tensors,
        pairs,
        stated_alpha(finite_number(alpha)),
        options=options,
        missing=f"no {_CONFIG_NAME} with lora_alpha lies beside the file",
        findings=beside_finding("not analyzed", others),
        files=(weights.with_name(_CONFIG_NAME),) if config else (),
        base_model=base if isinstance(base, str) else None,
    )
