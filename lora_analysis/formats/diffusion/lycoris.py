"""LyCORIS files without pairs of factors: LoHa, LoKr, and what is refused by name.

Its LoCon has kohya's keys and is read by :mod:`~lora_analysis.formats.diffusion.kohya`, and so is
a mixed file. Reference: LyCORIS 4.1 ``lycoris/modules`` (``weight_list`` of each), T-LoRA.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import UnsupportedMethodError
from lora_analysis.formats.build import build_adapter
from lora_analysis.formats.diffusion.image_scheme import complete_image
from lora_analysis.formats.diffusion.kohya import KEYS
from lora_analysis.formats.key_scheme import StoredModules, sort_keys
from lora_analysis.formats.products import other_method, refuse_other_methods, sort_products
from lora_analysis.formats.sources import AdapterFiles, Format, tensors_at

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

_FULL: Final = re.compile(r"(?P<module>.+)\.(diff|w_norm)")


class _LyCORIS(Format):
    name = "lycoris"

    def locate(self, path: Path, options: ReadOptions) -> AdapterFiles | None:
        tensors = tensors_at(path, options)
        is_located = tensors is not None and self.recognizes(tensors, options)
        return AdapterFiles(path, path) if is_located else None

    def recognizes(self, tensors: NamedTensors, options: ReadOptions) -> bool:
        keys = tensors.infos
        is_of_lycoris = sort_products(keys) or other_method(keys) or _dense_key(keys)
        return options.pair is None and bool(is_of_lycoris)

    def read(self, files: AdapterFiles, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG002
        """Read LoHa and LoKr as factors; refuse other files by the name of their method.

        Raises
        ------
        UnsupportedMethodError
            The update of the method is not ``s·B·A``.
        """
        tensors = files.open(options)
        refuse_other_methods(files.path, tensors.infos)
        if not sort_products(tensors.infos):
            message = (
                f"{files.path}: '{_dense_key(tensors.infos)}' is the difference of a whole weight "
                "(LyCORIS 'full' or 'norm'), not a pair of factors. Merge it into its base, and "
                "read the merged model as a full fine-tune: `lora-analysis extract merged --base "
                "base`."
            )
            raise UnsupportedMethodError(message)
        stored = sort_keys(StoredModules(files, tensors, options), KEYS)
        parts = complete_image(stored, rename=KEYS[0].rename)
        return build_adapter(files.path, self.name, tensors, options, parts)


FORMAT: Final = _LyCORIS()


def _dense_key(keys: Iterable[str]) -> str | None:
    """Return the first key of a whole weight's difference, None if there is none."""
    return next((key for key in keys if _FULL.fullmatch(key)), None)
