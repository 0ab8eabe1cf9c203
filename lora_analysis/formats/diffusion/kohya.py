"""kohya-ss sd-scripts, and all who took over its keys: LyCORIS LoCon, OneTrainer, SimpleTuner.

``<module>.lora_down.weight`` is A, ``<module>.lora_up.weight`` B, ``<module>.alpha`` a number; the
scale is ``alpha/r``. A module's name is the one in the file: its path in the base with ``_`` for
``.`` after a prefix (``lora_unet_``, ``lora_te1_``), which cannot be undone without the base.
Reference: sd-scripts ``networks/lora.py`` and ``lora_flux.py``, LyCORIS 4.1 ``modules/locon.py``.
"""

from __future__ import annotations

import re
from typing import Final

from lora_analysis.formats.diffusion.image_scheme import complete_image
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme

NAME: Final = "kohya"

# Converters put their own prefix before a name that still began with the component's.
_DOUBLED: Final = {"lora_unet_unet_": "lora_unet_", "lora_te_text_encoder_": "lora_te_"}


# Names that kohya's keys made of a module's path. Half-renamed files keep some of its dots.
FLATTENED: Final = re.compile(r"(lora_(unet|transformer|prior_unet|te[1-4]?)|lycoris)_[\w.]+")


def _flattened(module: str) -> str:
    """Return a module's name with one prefix, and underscores for the dots that were left."""
    for doubled, plain in _DOUBLED.items():
        if module.startswith(doubled):
            module = plain + module.removeprefix(doubled)
    return module.replace(".", "_") if FLATTENED.fullmatch(module) else module


KEYS: Final = (
    KeyPattern(
        # Some converters wrote underscores for all the dots, those of diffusers' keys too.
        re.compile(r"(?P<module>.+?)[._]lora(_linear_layer)?_(?P<role>down|up|mid)\.weight"),
        scale=1.0,
        reason="the format then takes alpha = r, a scale of 1; a conversion may have lost it",
        rename=_flattened,
        alpha_is_rank=True,
    ),
)
FORMAT: Final = KeyScheme(NAME, KEYS, complete_image)
