"""LyCORIS files that hold no pair of factors: LoHa, LoKr, OFT, GLoRA, IA3, full differences.

Its LoCon has kohya's keys and is read by :mod:`~lora_analysis.formats.diffusion.kohya`. The
others are recognized here so that they are refused by name. Reference: LyCORIS 4.1
``lycoris/modules`` (``weight_list`` of each), T-LoRA.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import UnsupportedMethodError
from lora_analysis.formats.sources import AdapterFiles, Format, tensors_at

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

# Last segments of a key, and the method they belong to. Segments, not substrings.
_MARKS: Final = (
    (re.compile(r"(?P<module>.+)\.hada_(w[12]_[ab]|t[12])"), "LoHa (Hadamard products)"),
    (re.compile(r"(?P<module>.+)\.lokr_(w[12](_[ab])?|t[12])"), "LoKr (Kronecker products)"),
    (re.compile(r"(?P<module>.+)\.oft_(blocks|diag)"), "OFT or BOFT (rotations of the weight)"),
    (re.compile(r"(?P<module>.+)\.on_input"), "IA3 (rescaled activations)"),
    (re.compile(r"(?P<module>.+)\.lambda_layer(\.weight)?"), "T-LoRA (a timestep-masked rank)"),
)
_GLORA: Final = re.compile(r"(?P<module>.+)\.(?P<part>[ab][12])\.weight")
_FULL: Final = re.compile(r"(?P<module>.+)\.(diff|w_norm)")


def _other_method(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the method and the first key of a file that is not LoRA, None if there is none.

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


def refuse_other_methods(path: object, keys: Iterable[str]) -> None:
    """Raise if a file holds a method that is not LoRA, alone or next to pairs of factors."""
    if match := _other_method(keys):
        method, key = match
        message = f"{path}: '{key}' belongs to {method}; its update is not s·B·A and is not read."
        raise UnsupportedMethodError(message)


class _LyCORIS(Format):
    name = "lycoris"

    def locate(self, path: Path, options: ReadOptions) -> AdapterFiles | None:
        tensors = tensors_at(path, options)
        is_located = tensors is not None and self.recognizes(tensors, options)
        return AdapterFiles(path, path) if is_located else None

    def recognizes(self, tensors: NamedTensors, options: ReadOptions) -> bool:
        keys = tensors.infos
        return options.pair is None and bool(_other_method(keys) or _dense_key(keys))

    def read(self, files: AdapterFiles, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG002
        """Refuse the file by the name of its method.

        Raises
        ------
        UnsupportedMethodError
            Always.
        """
        keys = files.open(options).infos
        refuse_other_methods(files.path, keys)
        message = (
            f"{files.path}: '{_dense_key(keys)}' is the difference of a whole weight (LyCORIS "
            "'full' or 'norm'), not a pair of factors. Extract a LoRA of it, or compare it as a "
            "full fine-tune."
        )
        raise UnsupportedMethodError(message)


FORMAT: Final = _LyCORIS()


def _dense_key(keys: Iterable[str]) -> str | None:
    """Return the first key of a whole weight's difference, None if there is none."""
    return next((key for key in keys if _FULL.fullmatch(key)), None)
