"""The formats that are read, in the order they are asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from lora_analysis.formats import (
    adapterhub,
    cloneofsimo,
    consolidated,
    diffusers,
    flux,
    gguf,
    kohya,
    litgpt,
    loralib,
    lycoris,
    mlx,
    nemo,
    opendelta,
    pairs,
    peft,
    peft_merged,
    torchtune,
)

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.sources import AdapterRef, ReadOptions


class Format(Protocol):
    """What a format's module provides."""

    @property
    def NAME(self) -> str:  # noqa: N802 - a module's constant
        """Name in ``Provenance.format``."""

    def recognises(self, path: Path, options: ReadOptions) -> bool:
        """Say, from content and options, whether the format lies at exactly this file or folder."""

    def find(self, path: Path, options: ReadOptions) -> list[AdapterRef]:
        """Return the adapters at exactly this path, without looking into sub-folders."""

    def read(self, path: Path, name: str | None, options: ReadOptions) -> Adapter:
        """Read one of them."""


# The first that recognises a source reads it. Those with marks of their own come first: diffusers
# and FLUX files also have PEFT's keys, and a plain ``.lora_A`` may be loralib's or anybody's.
READERS: Final[tuple[Format, ...]] = (
    diffusers,
    flux,
    kohya,
    peft_merged,
    consolidated,
    peft,
    gguf,
    mlx,
    torchtune,
    litgpt,
    adapterhub,
    opendelta,
    nemo,
    cloneofsimo,
    lycoris,
    loralib,
    pairs,
)
