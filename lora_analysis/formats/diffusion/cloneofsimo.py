"""cloneofsimo's ``lora`` for Stable Diffusion: safetensors by place, or a list in a torch file.

``unet:3:up`` is B of the fourth adapted layer of the UNet and ``unet:3:down`` its A; a ``.pt``
file holds a bare list, B and A of each layer in turn, and says not even of which model. What the
layers are called is not stored. The format has no alpha: its layers add ``B·A`` as it is.
Reference: ``lora_diffusion/lora.py`` (``save_lora_weight``, ``save_safeloras_with_embeds``).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.formats.diffusion.image_keys import Part, Spelling, spelled
from lora_analysis.formats.diffusion.image_pairs import read_image_adapter
from lora_analysis.formats.sources import AdapterRef, ReadOptions, label_of, tensors_at

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.storage.safetensors import TensorSpec

NAME: Final = "cloneofsimo"

_REASON: Final = "the format has none, its scale is 1"


class _InTurn(Spelling):
    """B and A of each layer in turn, by their places in a list."""

    def factor(self, key: str) -> tuple[str, Part] | None:
        """Return the layer's number and the part at a place."""
        if not self.pattern.fullmatch(key):
            return None
        layer, second = divmod(int(key), 2)
        return str(layer), "A" if second else "B"


_BY_PLACE: Final = Spelling(
    re.compile(r"(?P<module>[^:]+:\d+):(?P<role>up|down)"), default=1.0, reason=_REASON
)
_LISTED: Final = _InTurn(re.compile(r"\d{1,6}"), default=1.0, reason=_REASON)


def _is_list_of_pairs(infos: Mapping[str, TensorSpec]) -> bool:
    """Say whether the tensors are a list in which B and A of one rank take turns."""
    if not infos or len(infos) % 2 or list(infos) != [str(i) for i in range(len(infos))]:
        return False
    shapes = [info.shape for info in infos.values()]
    return all(
        len(up) >= 2 and len(down) >= 2 and up[1] == down[0]
        for up, down in zip(shapes[::2], shapes[1::2], strict=True)
    )


def recognizes(path: Path, options: ReadOptions) -> bool:
    """Say whether a file holds factors by place, or a list in which they take turns."""
    tensors = None if options.pair else tensors_at(path, options)
    if tensors is None:
        return False
    return spelled(tensors.infos, [_BY_PLACE]) or _is_list_of_pairs(tensors.infos)


def find(path: Path, options: ReadOptions) -> list[AdapterRef]:
    """Return the file, where it holds such factors."""
    return [AdapterRef(path, NAME, label_of(path))] if recognizes(path, options) else []


def read(path: Path, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG001 - unnamed
    """Read the file; the layers of both models are one adapter.

    Raises
    ------
    MalformedFileError
        A layer has one factor only, or its factors do not fit.
    """
    return read_image_adapter(path, options, format=NAME, spellings=(_BY_PLACE, _LISTED))
