"""LyCORIS files that hold no pair of factors: LoHa, LoKr, OFT, GLoRA, IA3, full differences.

Its LoCon has kohya's keys and is read by :mod:`~lora_analysis.formats.diffusion.kohya`. The
others are recognized here so that they are refused by name, wherever they lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lora_analysis.errors import UnsupportedMethodError
from lora_analysis.formats.diffusion.other_methods import (
    dense_only,
    other_method,
    refuse_other_methods,
)
from lora_analysis.formats.sources import AdapterRef, ReadOptions, label_of, tensors_at
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.adapter import Adapter

NAME: Final = "lycoris"


def recognizes(path: Path, options: ReadOptions) -> bool:
    """Say whether a file holds one of LyCORIS' other methods."""
    tensors = None if options.pair else tensors_at(path, options)
    if tensors is None:
        return False
    return other_method(tensors.infos) is not None or dense_only(list(tensors.infos)) is not None


def find(path: Path, options: ReadOptions) -> list[AdapterRef]:
    """Return the file: reading it says which method it holds."""
    return [AdapterRef(path, NAME, label_of(path))] if recognizes(path, options) else []


def read(path: Path, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG001 - unnamed
    """Refuse the file by the name of its method.

    Raises
    ------
    UnsupportedMethodError
        Always.
    """
    keys = list(open_tensors(path, allow_pickle=options.allow_pickle).infos)
    refuse_other_methods(path, keys)
    message = (
        f"{path}: '{dense_only(keys)}' is the difference of a whole weight (LyCORIS 'full' or "
        "'norm'), not a pair of factors. Extract a LoRA of it, or compare it as a full fine-tune."
    )
    raise UnsupportedMethodError(message)
