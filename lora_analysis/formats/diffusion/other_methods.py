"""Methods of image trainers whose update is not ``s·B·A``: refused by name.

Reference: LyCORIS 4.1 ``lycoris/modules`` (``weight_list`` of each), T-LoRA.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import UnsupportedMethodError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# What a key's last segments say, and the method they belong to. Segments, not substrings.
_MARKS: Final = (
    (re.compile(r"(?P<module>.+)\.hada_(w[12]_[ab]|t[12])"), "LoHa (Hadamard products)"),
    (re.compile(r"(?P<module>.+)\.lokr_(w[12](_[ab])?|t[12])"), "LoKr (Kronecker products)"),
    (re.compile(r"(?P<module>.+)\.oft_(blocks|diag)"), "OFT or BOFT (rotations of the weight)"),
    (re.compile(r"(?P<module>.+)\.on_input"), "IA3 (rescaled activations)"),
    (re.compile(r"(?P<module>.+)\.lambda_layer(\.weight)?"), "T-LoRA (a timestep-masked rank)"),
)
_GLORA: Final = re.compile(r"(?P<module>.+)\.(?P<part>[ab][12])\.weight")
_FULL: Final = re.compile(r"(?P<module>.+)\.(diff|w_norm)")


def other_method(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the method and the first key of a file that is no LoRA, None where nothing says so.

    GLoRA's short names count only where one module has all four.
    """
    names = list(keys)
    glora: dict[str, set[str]] = {}
    for key in names:
        for mark, method in _MARKS:
            if mark.fullmatch(key):
                return method, key
        if match := _GLORA.fullmatch(key):
            parts = glora.setdefault(match["module"], set())
            parts.add(match["part"])
            if len(parts) == 4:
                return "GLoRA (ΔW = W·A + B)", key
    return None


def dense_only(keys: Sequence[str]) -> str | None:
    """Return the first key of a whole weight's difference, None where there is none."""
    return next((key for key in keys if _FULL.fullmatch(key)), None)


def refuse_other_methods(path: object, keys: Iterable[str]) -> None:
    """Raise where a file holds a method that is no LoRA, alone or beside pairs of factors."""
    if found := other_method(keys):
        method, key = found
        message = f"{path}: '{key}' belongs to {method}; its update is not s·B·A and is not read."
        raise UnsupportedMethodError(message)
