"""Base weights in memory: the parameters of a live model, or a mapping of arrays."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.bases.tensor_names import matrix_shape, quantized_error
from lora_analysis.bases.weight import TensorSource
from lora_analysis.errors import BaseWeightError
from lora_analysis.storage.limits import BLOCK_ELEMENTS
from lora_analysis.storage.tensor_reader import tile_slices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.bases.weight import Tiles


def is_live_model(source: object) -> bool:
    """Return True for a ``torch.nn.Module``; without torch loaded, nothing can be one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


class ArraySource(TensorSource):
    """A mapping of tensor names to arrays, each matrix ``(d_out, d_in)``."""

    def __init__(self, arrays: Mapping[str, Any], label: str) -> None:
        self._arrays = {
            name if name.endswith("weight") else f"{name}.weight": np.asarray(array)
            for name, array in arrays.items()
        }
        self._label = label

    @property
    def names(self) -> Sequence[str]:
        """Names of all tensors; the plain name of a module means its weight."""
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape."""
        return self._arrays[name].shape

    def dtype(self, name: str) -> str:
        """Return the type."""
        return str(self._arrays[name].dtype)

    def transposed(self, name: str) -> bool | None:  # noqa: ARG002
        """Return False: the caller passes matrices as ``(d_out, d_in)``."""
        return False

    def tiles(self, name: str, index: int | None) -> Tiles:
        """Yield a matrix tile by tile."""
        return _tiles(_matrix(name, self._arrays[name], index))

    def read(self, name: str) -> NDArray[Any]:
        """Return an array as it was passed."""
        return self._arrays[name]

    def refuse_unreadable(self, name: str) -> None:
        """Raise if the array does not contain floating-point numbers."""
        if not np.issubdtype(self._arrays[name].dtype, np.floating):
            raise quantized_error(self._label, name, f"stored as {self.dtype(name)}")


class ModelSource(TensorSource):
    """The parameters of a live model, on their device.

    An adapter that is active but not merged leaves the frozen weight under ``base_layer``, which is
    read. A merged one has changed the weight itself and is refused, and so is a parameter that no
    longer belongs to the model: merging and unmerging replace them.
    """

    def __init__(self, model: Any, label: str) -> None:
        self._model = model
        self._label = label
        # Tied weights under every name: a module may be adapted under any of them.
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    @property
    def names(self) -> Sequence[str]:
        """Names of all parameters."""
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return tuple(self._parameters[name].shape)

    def dtype(self, name: str) -> str:
        """Return the type of a parameter."""
        return str(self._parameters[name].dtype).removeprefix("torch.")

    def transposed(self, name: str) -> bool | None:
        """Return False for Linear (``[out, in]``), True for Conv1D (``[in, out]``), else None."""
        module = self._model.get_submodule(name.rpartition(".")[0])
        module = getattr(module, "base_layer", module)  # an adapter came after the base was opened
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            return True
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            return self.shape(name) != (module.out_features, module.in_features)
        return False if name.endswith("in_proj_weight") else None

    def tiles(self, name: str, index: int | None) -> Tiles:
        """Yield a matrix tile by tile, each copied to the CPU separately."""
        return _tiles(_matrix(name, self._parameters[name].detach(), index))

    def read(self, name: str) -> NDArray[Any]:
        """Return a parameter of any shape, copied to the CPU."""
        tensor = self._parameters[name].detach()
        whole: NDArray[Any] = (
            (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
        )
        return whole

    def refuse_unreadable(self, name: str) -> None:
        """Raise for quantized, empty and replaced parameters, and if an adapter is merged."""
        parameter = self._parameters[name]
        path, _, last = name.rpartition(".")
        current: Any = None
        with suppress(AttributeError):
            current = getattr(self._model.get_submodule(path), last, None)
        if current is not parameter:
            message = (
                f"{self._label}: '{name}' is no longer the model's parameter; was an adapter "
                "merged or unmerged since the base was opened? Open the unmerged model again."
            )
            raise BaseWeightError(message)
        if not parameter.is_floating_point():
            raise quantized_error(self._label, name, f"stored as {self.dtype(name)}")
        if parameter.is_meta:
            message = f"{self._label}: '{name}' is on the meta device and holds no values."
            raise BaseWeightError(message)
        for owner in (path, path.removesuffix(".base_layer")):
            if getattr(self._model.get_submodule(owner), "merged", False):
                message = (
                    f"{self._label}: an adapter is merged into '{name}'; the frozen weight is not "
                    "there to be read. Unmerge it first."
                )
                raise BaseWeightError(message)


def _matrix(name: str, array: Any, index: int | None) -> Any:
    """Return an array as a matrix: one of a stack, or a kernel with a row per output."""
    return array[index] if index is not None else array.reshape(matrix_shape(name, array.shape))


def _tiles(matrix: Any) -> Tiles:
    """Yield a matrix (numpy or torch) in float32 tiles of one reused buffer."""
    tiles = list(tile_slices(tuple(matrix.shape), BLOCK_ELEMENTS))
    largest = max((_elements(rows, columns) for rows, columns in tiles), default=0)
    buffer = np.empty(largest, dtype=np.float32)
    for rows, columns in tiles:
        tile = buffer[: _elements(rows, columns)].reshape(rows.stop - rows.start, -1)
        part = matrix[rows, columns]
        # bfloat16 and fp8 exist in torch only, which widens them; numpy casts all other types.
        tile[...] = part if isinstance(part, np.ndarray) else part.float().cpu().numpy()
        yield rows, columns, tile


def _elements(rows: slice, columns: slice) -> int:
    return int((rows.stop - rows.start) * (columns.stop - columns.start))
