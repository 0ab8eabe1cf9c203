"""Base weights in safetensors files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_analysis.bases.naming import quantised, quantised_storage
from lora_analysis.storage.dtypes import FLOATING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_analysis.bases.weights import Tiles
    from lora_analysis.storage.tensors import TensorFiles


class StoredTensors:
    """The tensors of one file, or of the shards an index names."""

    def __init__(self, tensors: TensorFiles, label: str) -> None:
        self._tensors = tensors
        self._label = label
        self._all = frozenset(tensors.infos)

    @property
    def names(self) -> Sequence[str]:
        """Names of all tensors."""
        return list(self._tensors.infos)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the stored shape."""
        return self._tensors.infos[name].shape

    def dtype(self, name: str) -> str:
        """Return the stored type."""
        return self._tensors.infos[name].dtype

    def transposed(self, name: str) -> bool | None:  # noqa: ARG002 - a file does not say
        """Return None: only the model's family knows."""
        return None

    def tiles(self, name: str) -> Tiles:
        """Yield a matrix tile by tile."""
        return self._tensors.blocks(name)

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor of any shape."""
        return self._tensors.read(name)

    def refuse_unreadable(self, name: str) -> None:
        """Raise where the tensor is the payload of a quantised weight."""
        if found := quantised_storage(name, self._all):
            raise quantised(self._label, *found)
        if (dtype := self.dtype(name)) not in FLOATING:
            raise quantised(self._label, name, f"stored as {dtype}")
