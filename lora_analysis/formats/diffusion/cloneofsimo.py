"""cloneofsimo's ``lora`` for Stable Diffusion: safetensors by place, or a list in a torch file.

``unet:3:up`` is B of the fourth adapted layer of the UNet and ``unet:3:down`` its A; a ``.pt``
file holds a bare list, B and A of each layer in turn, and says not even of which model. What the
layers are called is not stored. The format has no alpha: its layers add ``B·A`` as it is.
Reference: ``lora_diffusion/lora.py`` (``save_lora_weight``, ``save_safeloras_with_embeds``).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.formats.diffusion.image_scheme import complete_image
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, Role, has_factors

if TYPE_CHECKING:
    from lora_analysis.storage.tensors import NamedTensors

_REASON: Final = "the format has none, its scale is 1"


class _Alternating(KeyPattern):
    """B and A of each layer in turn, by their positions in a list."""

    def match(self, key: str) -> tuple[str, Role] | None:
        """Return the number of the layer and the role of a position."""
        if not self.regex.fullmatch(key):
            return None
        layer, second = divmod(int(key), 2)
        return str(layer), "A" if second else "B"


_NUMBERED: Final = KeyPattern(
    re.compile(r"(?P<module>[^:]+:\d+):(?P<role>up|down)"), scale=1.0, reason=_REASON
)
_LISTED: Final = _Alternating(re.compile(r"\d{1,6}"), scale=1.0, reason=_REASON)


def _is_marked(tensors: NamedTensors) -> bool:
    """Return True for numbered keys, or a list in which B and A of one rank take turns."""
    infos = tensors.infos
    if has_factors(infos, [_NUMBERED]):
        return True
    if not infos or len(infos) % 2 or list(infos) != [str(i) for i in range(len(infos))]:
        return False
    shapes = [info.shape for info in infos.values()]
    return all(
        len(up) >= 2 and len(down) >= 2 and up[1] == down[0]
        for up, down in zip(shapes[::2], shapes[1::2], strict=True)
    )


FORMAT: Final = KeyScheme("cloneofsimo", (_NUMBERED, _LISTED), complete_image, is_marked=_is_marked)
