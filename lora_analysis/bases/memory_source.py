"""Base weights in memory: the parameters of a live model, or a mapping of arrays."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.bases.tensor_names import matrix_shape, quantized_error
from lora_analysis.bases.weight import TensorSource, Weight
from lora_analysis.errors import BaseWeightError, InputError
from lora_analysis.linalg import is_array, is_tensor, is_torch_module, missing_values
from lora_analysis.storage.limits import BLOCK_ELEMENTS
from lora_analysis.storage.tensor_reader import tile_slices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.bases.weight import Tiles


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
        if reason := missing_values(parameter):
            message = f"{self._label}: '{name}' {reason}"
            raise BaseWeightError(message)
        for owner in (path, path.removesuffix(".base_layer")):
            if getattr(self._model.get_submodule(owner), "merged", False):
                message = (
                    f"{self._label}: an adapter is merged into '{name}'; the frozen weight is not "
                    "there to be read. Unmerge it first."
                )
                raise BaseWeightError(message)


def as_weight(W: Any) -> Weight | NDArray[np.floating]:
    """Return a frozen weight ``(d_out, d_in)`` for anything that holds one.

    Parameters
    ----------
    W
        A `Weight` of `open_base`, or a floating-point matrix ``(d_out, d_in)``: a numpy array,
        which is returned as it is, or a tensor. A layer with a ``weight``, on any device: linear,
        transformers' ``Conv1D``, an embedding (``W`` is the transposed table), a convolution (its
        kernels flattened). A layer with an adapter stands for the layer that it wraps. The values
        of tensors and layers are read block by block, and not copied before.

    Raises
    ------
    InputError
        It is none of these.
    BaseWeightError
        The layer's weight is quantized, offloaded, sharded, or has an adapter merged into it.

    Examples
    --------
    >>> as_weight([[1.0, 2.0], [3.0, 4.0]]).shape
    (2, 2)
    """
    if isinstance(W, Weight):
        return W
    if is_torch_module(W):
        label = type(W).__name__
        while "base_layer" in W._modules:
            if getattr(W, "merged", False):
                message = (
                    f"{label}: an adapter is merged into the weight; the frozen weight is not "
                    "there to be read. Unmerge it first."
                )
                raise BaseWeightError(message)
            W = W.base_layer
        tensor = W._parameters.get("weight")
        if tensor is None or tensor.ndim < 2:
            message = (
                f"A {label} has no weight that is a matrix. Accepted: a linear, Conv1D, embedding "
                "or convolution layer, or the weight of a module of open_base(model)."
            )
            raise InputError(message)
        source = ModelSource(W, label)
        source.refuse_unreadable("weight")
        transposed = hasattr(W, "num_embeddings") or bool(source.transposed("weight"))
        return _tensor_weight(label, tensor, transposed=transposed)
    if is_tensor(W) and W.ndim == 2 and W.is_floating_point():
        if reason := missing_values(W):
            message = f"The weight {reason}"
            raise BaseWeightError(message)
        return _tensor_weight("the weight", W, transposed=False)
    array = W if is_tensor(W) else np.asarray(W)
    if isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype.kind in "fiu":
        return array if array.dtype.kind == "f" else array.astype(np.float64)
    kind = f"{array.dtype} of shape {tuple(array.shape)}" if is_array(W) else type(W).__name__
    message = (
        f"No base weight can be made of {kind}. Accepted: a floating-point matrix (d_out, d_in), "
        "a weight of open_base, or a linear, Conv1D, embedding or convolution layer."
    )
    raise InputError(message)


def _tensor_weight(name: str, tensor: Any, *, transposed: bool) -> Weight:
    matrix = tensor.detach().reshape(len(tensor), -1)
    rows, columns = matrix.shape
    return Weight(
        name,
        (columns, rows) if transposed else (rows, columns),
        str(tensor.dtype).removeprefix("torch."),
        transposed,
        partial(_tiles, matrix),
        _check=partial(_refuse_non_finite, name),
    )


def _refuse_non_finite(name: str, tile: NDArray[np.float32]) -> None:
    if not np.isfinite(tile).all():
        message = f"{name} holds values that are not finite; nothing can be computed with it."
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
